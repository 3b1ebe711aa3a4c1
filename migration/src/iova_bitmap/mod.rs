//! A bitmap of the pages of a range of I/O virtual addresses that were written.
//!
//! One bit stands for one page. The bitmap is how a writer that tracks (a device, an IOMMU, a
//! hypervisor, another process) tells what it wrote, whatever page size it tracks at, and how the
//! migration loop keeps what is still to be sent.
//!
//! # Layout
//!
//! Page `n = (iova - base) >> shift` is bit `n % 64` of word `n / 64`. In memory the words are
//! little-endian, so the same page is bit `n % 8` of byte `n / 8`: the layout of the kernel's
//! `iova_bitmap` (drivers/iommu/iommufd/iova_bitmap.c) and so of every VFIO and iommufd dirty
//! report. (The formulas in the kernel's comments differ; they index by the absolute IOVA and pick
//! bit `iova % 64`, which is bit 0 for every page. The code does what is said here.)
//!
//! # What is promised
//!
//! - A write of any length at any address sets every page it touches; ranges are clamped to the
//!   bitmap, and the last byte of the 64-bit space can be in one. Nothing wraps.
//! - The last page may be cut short by the bitmap's end; ranges given out end there.
//! - [`words_mut`](IovaBitmap::words_mut) is page-aligned, present memory which may be given to a
//!   kernel report. Bits beyond the last page are ignored wherever they come from.
//! - Nothing but [`clear`](IovaBitmap::clear), [`clear_range`](IovaBitmap::clear_range) and
//!   [`take_into`](IovaBitmap::take_into) makes a page clean, and the last only what the other
//!   bitmap then holds.
//! - Scans go a word at a time and pass over empty words.
//!
//! ```
//! use vm_migration::addr::{Iova, PageSize};
//! use vm_migration::iova_bitmap::IovaBitmap;
//!
//! let mut bitmap = IovaBitmap::new(Iova(0x10_0000), 0x10_0000, PageSize::SIZE_4K)?;
//! bitmap.set(Iova(0x10_1fff), 2); // two bytes, two pages
//! let run = bitmap.runs().next().expect("one run");
//! assert_eq!((run.first(), run.last()), (Iova(0x10_1000), Iova(0x10_2fff)));
//! # Ok::<(), vm_migration::iova_bitmap::BitmapError>(())
//! ```

mod bits;
mod buffer;
#[cfg(test)]
mod naive;
#[cfg(test)]
mod properties;
mod runs;
#[cfg(test)]
mod tests;

use std::fmt;
use std::io;

use crate::addr::{Iova, IovaRange, PageSize};
use bits::Offset;
use buffer::PageBuffer;

pub use runs::Runs;

/// The most pages one bitmap may have: 2^33, that is 1 GiB of bits, or 32 TiB of 4 KiB pages.
///
/// It bounds what a wrong length can make us allocate.
pub const MAX_PAGES: u64 = 1 << 33;

/// Why a bitmap cannot be made or used so.
#[derive(Debug, thiserror::Error)]
pub enum BitmapError {
    /// The range is empty or runs past the end of the 64-bit space.
    #[error("{len:#x} bytes from IOVA {base} are not a range: give 1 byte or more, within 2^64")]
    BadRange {
        /// First address asked for.
        base: Iova,
        /// Length asked for, in bytes.
        len: u64,
    },
    /// A bitmap's first address is not at the start of a page.
    #[error("IOVA {base} is not a multiple of the page size {page_bytes:#x}: round it down")]
    Misaligned {
        /// First address asked for.
        base: Iova,
        /// Page size in bytes.
        page_bytes: u64,
    },
    /// The range has more than [`MAX_PAGES`] pages.
    #[error(
        "a bitmap of {pages} pages of {page_bytes:#x} bytes is over the limit of {MAX_PAGES}: \
         use larger pages or several bitmaps"
    )]
    TooManyPages {
        /// Pages asked for (at most `u64::MAX`).
        pages: u64,
        /// Page size in bytes.
        page_bytes: u64,
    },
    /// The memory for the bits could not be had.
    #[error("cannot get present memory for a bitmap of {words} words: free some memory")]
    Memory {
        /// Words of 8 bytes asked for.
        words: usize,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// Which pages of a range of I/O virtual addresses were written.
///
/// See the [module](self) for the layout and what is promised.
pub struct IovaBitmap {
    /// What the bitmap is about, for [`Self::range`].
    range: IovaRange,
    /// The range's first address: start of page 0, a multiple of the page size.
    base: u64,
    /// The range's last address, inclusive: `base + length` may be 2^64 and is never formed.
    last: u64,
    page: PageSize,
    /// Pages, the last perhaps cut short; 1..=MAX_PAGES.
    pages: u64,
    /// `pages / 64` words, rounded up. Bits beyond `pages` may be set through `words_mut`; every
    /// reader leaves them out.
    buffer: PageBuffer,
}

impl IovaBitmap {
    /// A clean bitmap of `len` bytes from `base`, with one bit per `page`.
    ///
    /// # Errors
    /// If the range is empty or runs past 2^64, if `base` is not a multiple of `page`, if there
    /// are more than [`MAX_PAGES`] pages, or if memory is short.
    pub fn new(base: Iova, len: u64, page: PageSize) -> Result<Self, BitmapError> {
        let range = IovaRange::new(base, len).ok_or(BitmapError::BadRange { base, len })?;
        Self::over(range, page)
    }

    /// A clean bitmap of `range`, which unlike [`new`](Self::new)'s can be the whole 64-bit space.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn over(range: IovaRange, page: PageSize) -> Result<Self, BitmapError> {
        let (base, last) = (range.first().0, range.last().0);
        check_aligned(range.first(), page)?;
        let pages = ((last - base) >> page.shift()).saturating_add(1);
        if pages > MAX_PAGES {
            return Err(BitmapError::TooManyPages {
                pages,
                page_bytes: page.bytes(),
            });
        }
        let words = bits::word_index(pages - 1) + 1;
        let buffer =
            PageBuffer::new(words).map_err(|source| BitmapError::Memory { words, source })?;
        Ok(Self {
            range,
            base,
            last,
            page,
            pages,
            buffer,
        })
    }

    /// The addresses the bitmap is about.
    pub fn range(&self) -> IovaRange {
        self.range
    }

    /// The size of the pages that bits stand for.
    pub fn page_size(&self) -> PageSize {
        self.page
    }

    /// How many pages there are, written or not.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Whether every address of `range` is within the bitmap.
    pub fn covers(&self, range: IovaRange) -> bool {
        self.base <= range.first().0 && range.last().0 <= self.last
    }

    /// Sets every page that `len` bytes from `iova` touch; what is outside the bitmap is left out,
    /// and no bytes touch no page.
    pub fn set(&mut self, iova: Iova, len: u64) {
        if let Some(more) = len.checked_sub(1) {
            self.set_through(iova.0, iova.0.saturating_add(more));
        }
    }

    /// Sets every page that `range` touches.
    pub fn set_range(&mut self, range: IovaRange) {
        self.set_through(range.first().0, range.last().0);
    }

    /// Sets every page.
    pub fn set_all(&mut self) {
        bits::set(self.buffer.as_mut_slice(), 0, self.pages - 1);
    }

    /// Whether the page of `iova` is set; false outside the bitmap.
    pub fn contains(&self, iova: Iova) -> bool {
        self.base <= iova.0
            && iova.0 <= self.last
            && bits::get(self.buffer.as_slice(), self.page_of(iova.0))
    }

    /// ORs in a bitmap from elsewhere: bit `n % 64` of `words[n / 64]` stands for the `page`-sized
    /// page at `base + n * page`.
    ///
    /// Its base and page size may be any. Where its pages are larger than ours, one of its bits
    /// sets many; where they are smaller, one set bit sets the page of ours it lies in. What lies
    /// outside of this bitmap, or beyond 2^64, is left out. With the same page size and bases a
    /// multiple of 64 pages apart, words are ORed as they are.
    ///
    /// # Errors
    /// If `base` is not a multiple of `page`; then nothing is set.
    pub fn or_words(
        &mut self,
        base: Iova,
        page: PageSize,
        words: &[u64],
    ) -> Result<(), BitmapError> {
        check_aligned(base, page)?;
        self.or_foreign(base.0, page, words, u64::MAX);
        Ok(())
    }

    /// ORs in what `other` has set; what lies outside of this bitmap is left out.
    pub fn merge(&mut self, other: &IovaBitmap) {
        self.or_foreign(other.base, other.page, other.words(), other.last);
    }

    /// The words, bits beyond the last page included: those mean nothing.
    pub fn words(&self) -> &[u64] {
        self.buffer.as_slice()
    }

    /// The words, for a report to be written into: page-aligned, present, and not copied on a
    /// fork, so a kernel report neither fails nor misses pages for want of memory.
    ///
    /// Their address stays the same for the life of the bitmap. Bits beyond the last page may be
    /// written and are ignored.
    pub fn words_mut(&mut self) -> &mut [u64] {
        self.buffer.as_mut_slice()
    }

    /// Makes every page clean.
    pub fn clear(&mut self) {
        self.buffer.as_mut_slice().fill(0);
    }

    /// Makes the pages clean that lie wholly in `range`; one that reaches out of it stays.
    ///
    /// The bitmap's last page counts as ending where the bitmap ends.
    pub fn clear_range(&mut self, range: IovaRange) {
        if let Some((first, last)) = self.pages_within(range) {
            bits::clear(self.buffer.as_mut_slice(), first, last);
        }
    }

    /// Moves the set pages to `target`: sets there what is set here, and makes clean here what
    /// `target` covers.
    ///
    /// A page that `target` does not cover wholly stays set here, so none is lost.
    pub fn take_into(&mut self, target: &mut IovaBitmap) {
        target.merge(self);
        if target.covers(self.range()) {
            self.clear();
        } else {
            self.clear_range(target.range());
        }
    }

    /// How many pages are set.
    pub fn count(&self) -> u64 {
        let (whole, end) = self.live_words();
        let ones = |word: u64| u64::from(word.count_ones());
        whole.iter().map(|word| ones(*word)).sum::<u64>() + ones(end)
    }

    /// Whether no page is set.
    pub fn is_empty(&self) -> bool {
        self.run_of_pages(0, 1).is_none()
    }

    /// The maximal runs of set pages in rising order, the last clipped at the bitmap's end.
    pub fn runs(&self) -> Runs<'_> {
        Runs::new(self)
    }

    /// The first run of set pages at or after the page of `from`, cut so that it has at most
    /// `max_bytes`, but at least one page.
    ///
    /// `from` may be anywhere: before the bitmap stands for its first page, and there is no run
    /// behind its end.
    pub fn next_run(&self, from: Iova, max_bytes: u64) -> Option<IovaRange> {
        if from.0 > self.last {
            return None;
        }
        let from = self.page_of(from.0.max(self.base));
        let max_pages = (max_bytes >> self.page.shift()).max(1);
        let (first, end) = self.run_of_pages(from, max_pages)?;
        self.range_of_pages(first, end - 1)
    }

    /// The page of an address within the bitmap.
    fn page_of(&self, address: u64) -> u64 {
        (address - self.base) >> self.page.shift()
    }

    /// The pages wholly in `range`, first and last.
    fn pages_within(&self, range: IovaRange) -> Option<(u64, u64)> {
        let (from, through) = (range.first().0, range.last().0);
        if from > self.last || through < self.base {
            return None;
        }
        let first = match from.checked_sub(self.base) {
            None | Some(0) => 0,
            // The first page start at or after `from`: one after the page of the byte before.
            Some(offset) => ((offset - 1) >> self.page.shift()) + 1,
        };
        let end = if through >= self.last {
            self.pages
        } else {
            // Below `last`, so one more cannot wrap.
            self.page_of(through + 1)
        };
        (first < end).then(|| (first, end - 1))
    }

    /// The addresses of the pages `first..=last`, clipped at the bitmap's end.
    fn range_of_pages(&self, first: u64, last: u64) -> Option<IovaRange> {
        let start = self.base + (first << self.page.shift());
        // The page's own end may be beyond the bitmap's, but not beyond 2^64, as the base is
        // aligned and the page's start is within.
        let end = self.base + (last << self.page.shift()) + (self.page.bytes() - 1);
        IovaRange::from_ends(Iova(start), Iova(end.min(self.last)))
    }

    /// The first run of at most `max_pages` set pages at or after page `from`, as first and end
    /// (exclusive).
    fn run_of_pages(&self, from: u64, max_pages: u64) -> Option<(u64, u64)> {
        let words = self.buffer.as_slice();
        let first = bits::next_set(words, from).filter(|first| *first < self.pages)?;
        let limit = first.saturating_add(max_pages).min(self.pages);
        Some((first, bits::next_clear(words, first, limit)))
    }

    /// The words that hold pages only, and the last word without the bits beyond the last page.
    fn live_words(&self) -> (&[u64], u64) {
        match self.buffer.as_slice().split_last() {
            Some((end, whole)) => (whole, end & bits::upto_mask(self.pages - 1)),
            None => (&[], 0),
        }
    }

    /// Sets every page touched by the addresses `first..=last`, as far as within.
    fn set_through(&mut self, first: u64, last: u64) {
        if first > self.last || last < self.base {
            return;
        }
        let first = self.page_of(first.max(self.base));
        let last = self.page_of(last.min(self.last));
        bits::set(self.buffer.as_mut_slice(), first, last);
    }

    /// ORs in the bits of `words` that stand for pages which start at or before `last`, taking the
    /// page that `last` is in to end there. `base` is a multiple of `page` and at most `last`.
    fn or_foreign(&mut self, base: u64, page: PageSize, words: &[u64], last: u64) {
        let last_bit = (last - base) >> page.shift();
        if page != self.page {
            return self.or_runs(base, page, words, last_bit, last);
        }
        // The word of `last_bit` may have bits beyond it, so it is ORed apart.
        let split = bits::word_index(last_bit).min(words.len());
        let (whole, rest) = words.split_at(split);
        self.or_same_page(base, whole);
        if let Some(word) = rest.first() {
            let start = base + (bits::bit_len(whole) << page.shift());
            self.or_same_page(start, &[word & bits::upto_mask(last_bit)]);
        }
        bits::clear_from(self.buffer.as_mut_slice(), self.pages);
    }

    /// ORs in words of our own page size.
    fn or_same_page(&mut self, base: u64, words: &[u64]) {
        let offset = if base >= self.base {
            Offset::Ahead((base - self.base) >> self.page.shift())
        } else {
            Offset::Behind((self.base - base) >> self.page.shift())
        };
        bits::or_at(self.buffer.as_mut_slice(), words, offset);
    }

    /// ORs in words of another page size, run by run.
    fn or_runs(&mut self, base: u64, page: PageSize, words: &[u64], last_bit: u64, last: u64) {
        // Bits that lie wholly before us need not be looked at.
        let mut from = self.base.saturating_sub(base) >> page.shift();
        while let Some(first) = bits::next_set(words, from).filter(|first| *first <= last_bit) {
            let start = base + (first << page.shift());
            if start > self.last {
                break;
            }
            let end = bits::next_clear(words, first, last_bit.saturating_add(1));
            let run_last = base + ((end - 1) << page.shift()) + (page.bytes() - 1);
            self.set_through(start, run_last.min(last));
            from = end;
        }
    }
}

/// A bitmap's first address must start a page, or bits would stand for the wrong addresses.
fn check_aligned(base: Iova, page: PageSize) -> Result<(), BitmapError> {
    if base.0 & (page.bytes() - 1) == 0 {
        return Ok(());
    }
    Err(BitmapError::Misaligned {
        base,
        page_bytes: page.bytes(),
    })
}

impl fmt::Debug for IovaBitmap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IovaBitmap")
            .field("base", &Iova(self.base))
            .field("last", &Iova(self.last))
            .field("page_bytes", &self.page.bytes())
            .field("set", &self.count())
            .finish()
    }
}
