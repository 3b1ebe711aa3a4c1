//! Iteration over maximal runs of set pages.

use super::{IovaBitmap, bits};
use crate::addr::IovaRange;

/// Maximal runs of set pages in rising order, see [`IovaBitmap::runs`].
///
/// It keeps the word it is in, so that many short runs cost a few shifts each.
#[derive(Clone, Debug)]
pub struct Runs<'a> {
    bitmap: &'a IovaBitmap,
    words: &'a [u64],
    /// Where `rest` is from.
    index: usize,
    /// What is not yet given out of the word at `index`.
    rest: u64,
}

impl<'a> Runs<'a> {
    pub(super) fn new(bitmap: &'a IovaBitmap) -> Self {
        let words = bitmap.words();
        Self {
            bitmap,
            words,
            index: 0,
            rest: words.first().copied().unwrap_or(0),
        }
    }

    /// The next run in bits, first and end, bits beyond the last page included.
    fn next_bits(&mut self) -> Option<(u64, u64)> {
        if self.rest == 0 {
            self.index = bits::next_word(self.words, self.index + 1)?;
            self.rest = *self.words.get(self.index)?;
        }
        let low = self.rest.trailing_zeros();
        let first = bits::word_start(self.index) + u64::from(low);
        let ones = (self.rest >> low).trailing_ones();
        if low + ones < u64::BITS {
            // Adding 1 to a run's lowest bit clears it and sets the bit behind it, which was clear.
            self.rest &= self.rest + (1 << low);
            return Some((first, first + u64::from(ones)));
        }
        // The run goes on in the next word, over full ones, to the first clear bit.
        self.index += 1;
        while self.words.get(self.index) == Some(&u64::MAX) {
            self.index += 1;
        }
        let word = self.words.get(self.index).copied().unwrap_or(0);
        let more = word.trailing_ones();
        self.rest = word & (u64::MAX << more);
        Some((first, bits::word_start(self.index) + u64::from(more)))
    }
}

impl Iterator for Runs<'_> {
    type Item = IovaRange;

    fn next(&mut self) -> Option<IovaRange> {
        let (first, end) = self.next_bits()?;
        let pages = self.bitmap.pages();
        if first >= pages {
            return None;
        }
        self.bitmap.range_of_pages(first, end.min(pages) - 1)
    }
}

impl std::iter::FusedIterator for Runs<'_> {}
