//! Random histories of a migration against a naive model of it.
