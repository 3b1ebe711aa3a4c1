//! Iteration over maximal runs of set pages.

use super::IovaBitmap;
use crate::addr::IovaRange;

/// Maximal runs of set pages in rising order, see [`IovaBitmap::runs`].
#[derive(Clone, Debug)]
pub struct Runs<'a> {
    bitmap: &'a IovaBitmap,
    next_page: u64,
}

impl<'a> Runs<'a> {
    pub(super) fn new(bitmap: &'a IovaBitmap) -> Self {
        Self {
            bitmap,
            next_page: 0,
        }
    }
}

impl Iterator for Runs<'_> {
    type Item = IovaRange;

    fn next(&mut self) -> Option<IovaRange> {
        let (first, end) = self.bitmap.run_of_pages(self.next_page, u64::MAX)?;
        self.next_page = end;
        self.bitmap.range_of_pages(first, end - 1)
    }
}

impl std::iter::FusedIterator for Runs<'_> {}
