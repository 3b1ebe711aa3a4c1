//! A bitmap cut into windows, to be filled or read piece by piece.

use crate::addr::IovaRange;
use crate::bitmap::{Geometry, IovaBitmap};
use crate::bits;

/// A part of a bitmap: whole words of it.
#[derive(Debug)]
pub struct Window<'a> {
    /// The addresses it is about.
    pub range: IovaRange,
    /// Its words: the page at `range.first()` is bit 0 of the first. Bits beyond the range's last
    /// page are ignored.
    pub words: &'a mut [u64],
}

/// The windows of a bitmap in rising order, see [`IovaBitmap::windows_mut`].
#[derive(Debug)]
pub struct Windows<'a> {
    geometry: Geometry,
    rest: &'a mut [u64],
    /// The first page of `rest`.
    next_page: u64,
    /// Words of a window, 1 or more.
    words: usize,
}

impl<'a> Windows<'a> {
    pub(crate) fn new(bitmap: &'a mut IovaBitmap, bytes: u64) -> Self {
        let geometry = bitmap.geometry();
        Self {
            geometry,
            rest: bitmap.words_mut(),
            next_page: 0,
            words: bits::word_index(geometry.window_pages(bytes)),
        }
    }
}

impl<'a> Iterator for Windows<'a> {
    type Item = Window<'a>;

    fn next(&mut self) -> Option<Window<'a>> {
        let rest = core::mem::take(&mut self.rest);
        let len = self.words.min(rest.len());
        let (words, rest) = rest.split_at_mut_checked(len)?;
        let end = (self.next_page + bits::bit_len(words)).min(self.geometry.pages);
        let range = self.geometry.range_of_pages(self.next_page, end)?;
        self.rest = rest;
        self.next_page = end;
        Some(Window { range, words })
    }
}

impl core::iter::FusedIterator for Windows<'_> {}
