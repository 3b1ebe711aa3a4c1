//! Property tests against a set of page numbers.
