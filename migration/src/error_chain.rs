//! An error with its causes, on one line.

use std::error::Error;
use std::fmt;

/// An error and all its causes, outermost first, joined by `: `.
///
/// An error says what failed and keeps its cause apart, for those who handle it; who only tells
/// it, in a log, an event or to a peer, tells all of it.
///
/// ```
/// use vm_migration::{ErrorChain, PageSize, IovaBitmap, Iova};
/// use vm_migration::dirty::RamLayoutError;
/// use vm_migration::Gpa;
///
/// let source = IovaBitmap::new(Iova(0), 0, PageSize::SIZE_4K).unwrap_err();
/// let text = ErrorChain(&RamLayoutError::Bitmap { gpa: Gpa(0), source }).to_string();
/// assert!(text.starts_with("no dirty bitmaps for the RAM"));
/// assert!(text.contains(": 0x0 bytes from IOVA"));
/// ```
#[derive(Clone, Copy, Debug)]
pub struct ErrorChain<'a>(pub &'a dyn Error);

impl fmt::Display for ErrorChain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)?;
        let mut next = self.0.source();
        while let Some(cause) = next {
            write!(f, ": {cause}")?;
            next = cause.source();
        }
        Ok(())
    }
}
