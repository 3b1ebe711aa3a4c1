//! The IOVA bitmap.

/// Which pages of a range of I/O virtual addresses were written.
#[derive(Debug)]
pub struct IovaBitmap {}
