//! The bitmap.

use core::fmt;

use crate::addr::{Iova, IovaRange, PageSize};
use crate::bits::{self, Offset};
use crate::error::BitmapError;
use crate::raw::{self, PageBuffer};
use crate::runs::{Drain, Runs};
use crate::windows::Windows;

/// The most pages one bitmap may have: 2^33, that is 1 GiB of bits, or 32 TiB of 4 KiB pages.
///
/// It bounds what a wrong length can make us allocate.
pub const MAX_PAGES: u64 = 1 << 33;

/// Which addresses a bitmap is about, and which bit stands for which.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Geometry {
    /// The first address: start of page 0, a multiple of the page size.
    base: u64,
    /// The last address, inclusive: `base + length` may be 2^64 and is never formed.
    last: u64,
    page: PageSize,
    /// Pages, the last perhaps cut short; 1..=MAX_PAGES.
    pub(crate) pages: u64,
}

impl Geometry {
    fn new(range: IovaRange, page: PageSize) -> Result<Self, BitmapError> {
        let (base, last) = (range.first().0, range.last().0);
        check_aligned(range.first(), page)?;
        let pages = ((last - base) >> page.shift()).saturating_add(1);
        if pages > MAX_PAGES {
            return Err(BitmapError::TooManyPages {
                pages,
                page_bytes: page.bytes(),
            });
        }
        Ok(Self {
            base,
            last,
            page,
            pages,
        })
    }

    /// Words that hold all pages.
    fn words(&self) -> usize {
        bits::word_index(self.pages - 1) + 1
    }

    fn contains(&self, address: u64) -> bool {
        self.base <= address && address <= self.last
    }

    /// The page of an address within.
    fn page_of(&self, address: u64) -> u64 {
        (address - self.base) >> self.page.shift()
    }

    /// The pages that the addresses `first..=last` touch.
    fn pages_touched(&self, first: u64, last: u64) -> Option<(u64, u64)> {
        if first > self.last || last < self.base {
            return None;
        }
        let first = self.page_of(first.max(self.base));
        Some((first, self.page_of(last.min(self.last))))
    }

    /// The pages wholly in `range`, first and last; the last page counts as ending where the bitmap
    /// ends.
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

    /// The addresses of the pages `first..end`, clipped at the bitmap's end; `None` if they lie
    /// behind it.
    #[inline]
    pub(crate) fn range_of_pages(&self, first: u64, end: u64) -> Option<IovaRange> {
        if first >= self.pages {
            return None;
        }
        let start = self.base + (first << self.page.shift());
        // The end of the last page may be 2^64, which wraps to 0: the byte before it is right.
        let end = self
            .base
            .wrapping_add(end.min(self.pages) << self.page.shift());
        IovaRange::from_ends(Iova(start), Iova(end.wrapping_sub(1).min(self.last)))
    }

    /// The addresses of pages `first..end` after page `from`, all of them before the last page.
    #[inline]
    pub(crate) fn places_from(&self, from: u64) -> impl Fn(u64, u64) -> IovaRange {
        let shift = self.page.shift();
        let base = self.base + (from << shift);
        move |first, end| {
            let (first, end) = (base + (first << shift), base + (end << shift));
            IovaRange::from_ordered(Iova(first), Iova(end - 1))
        }
    }

    /// Pages of a window of about `bytes`: whole words, at least one.
    pub(crate) fn window_pages(&self, bytes: u64) -> u64 {
        let words = (bytes >> self.page.shift()) / bits::WORD_BITS;
        words.max(1) * bits::WORD_BITS
    }

    /// Where the page at `base`, of our size, is; `base` is a multiple of it.
    fn offset_of(&self, base: u64) -> Offset {
        if base >= self.base {
            Offset::Ahead((base - self.base) >> self.page.shift())
        } else {
            Offset::Behind((self.base - base) >> self.page.shift())
        }
    }
}

impl fmt::Debug for Geometry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:#x}..={:#x} by {:#x}",
            self.base,
            self.last,
            self.page.bytes()
        )
    }
}

/// Which pages of a range of I/O virtual addresses were written.
///
/// See the [crate](crate) for the layout and what is promised.
pub struct IovaBitmap {
    geometry: Geometry,
    /// Room for `geometry`'s words, perhaps more. Bits beyond `pages` may be set through
    /// `words_mut`; every reader leaves them out.
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
        let geometry = Geometry::new(range, page)?;
        let words = geometry.words();
        let buffer =
            PageBuffer::new(words).map_err(|source| BitmapError::Memory { words, source })?;
        Ok(Self { geometry, buffer })
    }

    /// Makes it a clean bitmap of another range, with the same page size and the same memory.
    ///
    /// # Errors
    /// If the range's first address is not a multiple of the page size, or the range needs more
    /// bits than there is memory for; then nothing changed.
    pub fn retarget(&mut self, range: IovaRange) -> Result<(), BitmapError> {
        let geometry = Geometry::new(range, self.geometry.page)?;
        let room = bits::bit_len(self.buffer.as_slice());
        if geometry.pages > room {
            return Err(BitmapError::TooSmall {
                pages: geometry.pages,
                room,
            });
        }
        // Both: what is in use now, and what was in use before.
        self.clear();
        self.geometry = geometry;
        self.clear();
        Ok(())
    }

    /// The addresses the bitmap is about.
    pub fn range(&self) -> IovaRange {
        let Geometry { base, last, .. } = self.geometry;
        IovaRange::from_ends(Iova(base), Iova(last)).unwrap_or(IovaRange::ALL)
    }

    /// The size of the pages that bits stand for.
    pub fn page_size(&self) -> PageSize {
        self.geometry.page
    }

    /// How many pages there are, written or not.
    pub fn pages(&self) -> u64 {
        self.geometry.pages
    }

    pub(crate) fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// Whether every address of `range` is within the bitmap.
    pub fn covers(&self, range: IovaRange) -> bool {
        self.geometry.base <= range.first().0 && range.last().0 <= self.geometry.last
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

    /// Sets the page of each address; those outside the bitmap are left out. For the list that a
    /// device or a dirty ring gives, in whatever order: faster than one [`set`](Self::set) after the
    /// other.
    pub fn set_each(&mut self, addresses: &[Iova]) {
        let geometry = self.geometry;
        let words = self.words_mut();
        let span = geometry.last - geometry.base;
        let mut set = |address: &Iova| {
            // Below the base it wraps, and is beyond any span.
            let offset = address.0.wrapping_sub(geometry.base);
            if offset <= span {
                let page = offset >> geometry.page.shift();
                if let Some(word) = words.get_mut(bits::word_index(page)) {
                    *word |= 1 << (page % bits::WORD_BITS);
                }
            }
        };
        // Neighbours in a sorted list are in the same word, where each OR waits for the one before.
        // So four places of the list are gone on with in turn.
        let (one, two) = addresses.split_at(addresses.len() / 2);
        let ((a, b), (c, d)) = (one.split_at(one.len() / 2), two.split_at(one.len() / 2));
        for (((a, b), c), d) in a.iter().zip(b).zip(c).zip(d) {
            set(a);
            set(b);
            set(c);
            set(d);
        }
        // What the longer quarters have more.
        let done = a.len().min(b.len()).min(c.len()).min(d.len());
        for quarter in [a, b, c, d] {
            quarter.iter().skip(done).for_each(&mut set);
        }
    }

    /// Sets every page.
    pub fn set_all(&mut self) {
        let last = self.geometry.pages - 1;
        bits::set(self.words_mut(), 0, last);
    }

    /// Whether the page of `iova` is set; false outside the bitmap.
    pub fn contains(&self, iova: Iova) -> bool {
        let geometry = self.geometry;
        geometry.contains(iova.0) && bits::get(self.words(), geometry.page_of(iova.0))
    }

    /// Whether a page that `range` touches is set.
    pub fn any_in(&self, range: IovaRange) -> bool {
        self.geometry
            .pages_touched(range.first().0, range.last().0)
            .is_some_and(|(first, last)| {
                bits::next_set(self.words(), first).is_some_and(|page| page <= last)
            })
    }

    /// ORs in a bitmap from elsewhere: bit `n % 64` of `words[n / 64]` stands for the `page`-sized
    /// page at `base + n * page`.
    ///
    /// Its base and page size may be any. Where its pages are larger than ours, one of its bits
    /// sets many; where they are smaller, one set bit sets the page of ours it lies in. What lies
    /// outside of this bitmap, or beyond 2^64, is left out. With the same page size and bases a
    /// multiple of 64 pages apart, words are ORed as they are.
    ///
    /// Returns how many pages of this bitmap were named, those included that were set before.
    ///
    /// # Errors
    /// If `base` is not a multiple of `page`; then nothing is set.
    pub fn or_words(
        &mut self,
        base: Iova,
        page: PageSize,
        words: &[u64],
    ) -> Result<u64, BitmapError> {
        check_aligned(base, page)?;
        Ok(self.or_foreign(base.0, page, words, u64::MAX))
    }

    /// ORs in what `other` has set; what lies outside of this bitmap is left out.
    ///
    /// Returns how many pages of this bitmap were named, those included that were set before.
    pub fn merge(&mut self, other: &IovaBitmap) -> u64 {
        let from = other.geometry;
        self.or_foreign(from.base, from.page, other.words(), from.last)
    }

    /// The words, bits beyond the last page included: those mean nothing.
    pub fn words(&self) -> &[u64] {
        let words = self.geometry.words();
        self.buffer.as_slice().get(..words).unwrap_or_default()
    }

    /// The words, for a report to be written into: page-aligned, and with feature `std` present and
    /// not copied on a fork, so that a kernel report neither fails nor misses pages for want of
    /// memory.
    ///
    /// Their address stays the same for the life of the bitmap. Bits beyond the last page may be
    /// written and are ignored.
    pub fn words_mut(&mut self) -> &mut [u64] {
        let words = self.geometry.words();
        self.buffer
            .as_mut_slice()
            .get_mut(..words)
            .unwrap_or_default()
    }

    /// Cuts it into windows of `bytes`, rounded down to whole words (64 pages) but at least one,
    /// the last perhaps shorter.
    pub fn windows_mut(&mut self, bytes: u64) -> Windows<'_> {
        Windows::new(self, bytes)
    }

    /// Makes every page clean.
    pub fn clear(&mut self) {
        self.words_mut().fill(0);
    }

    /// Makes the pages clean that lie wholly in `range`; one that reaches out of it stays.
    ///
    /// The bitmap's last page counts as ending where the bitmap ends.
    pub fn clear_range(&mut self, range: IovaRange) {
        if let Some((first, last)) = self.geometry.pages_within(range) {
            bits::clear(self.words_mut(), first, last);
        }
    }

    /// Moves the set pages to `target`: sets there what is set here, and makes clean here what
    /// `target` covers. With the same page size and bases a multiple of 64 pages apart that is one
    /// pass over the words.
    ///
    /// A page that `target` does not cover wholly stays set here, so none is lost. Returns how many
    /// pages of `target` were named, those included that were set before.
    pub fn take_into(&mut self, target: &mut IovaBitmap) -> u64 {
        if let Some(named) = self.take_words_into(target) {
            return named;
        }
        let named = target.merge(self);
        self.clear_range(target.range());
        named
    }

    /// [`take_into`](Self::take_into) in one pass: if the page sizes are the same, the words of both
    /// lie over each other, and every page here that `target` touches lies wholly in it.
    fn take_words_into(&mut self, target: &mut IovaBitmap) -> Option<u64> {
        let (ours, theirs) = (self.geometry, target.geometry);
        if ours.page != theirs.page {
            return None;
        }
        let (ahead, behind) = match theirs.offset_of(ours.base) {
            Offset::Ahead(bits) => (bits, 0),
            Offset::Behind(bits) => (0, bits),
        };
        if !(ahead | behind).is_multiple_of(bits::WORD_BITS) {
            return None;
        }
        let touched = ours.pages_touched(theirs.base, theirs.last)?;
        if ours.pages_within(target.range()) != Some(touched) {
            return None;
        }
        let (first, last) = touched;
        // `first` starts a word, as both bases do; `last` may be in the middle of one.
        let whole = bits::word_index(last + 1);
        let source = self.words_mut();
        let tail = match source.get_mut(whole) {
            Some(word) if !(last + 1).is_multiple_of(bits::WORD_BITS) => {
                let tail = *word & bits::upto_mask(last);
                *word &= !bits::upto_mask(last);
                tail
            }
            _ => 0,
        };
        let source = source.get_mut(bits::word_index(first)..whole)?;
        let target = target.words_mut().get_mut(bits::word_index(ahead)..)?;
        if let Some(word) = target.get_mut(source.len()) {
            *word |= tail;
        }
        Some(raw::take(target, source) + u64::from(tail.count_ones()))
    }

    /// How many pages are set.
    pub fn count(&self) -> u64 {
        bits::count(self.words(), 0, self.geometry.pages - 1)
    }

    /// How many of the pages that `range` touches are set.
    pub fn count_in(&self, range: IovaRange) -> u64 {
        self.geometry
            .pages_touched(range.first().0, range.last().0)
            .map_or(0, |(first, last)| bits::count(self.words(), first, last))
    }

    /// Whether no page is set.
    pub fn is_empty(&self) -> bool {
        self.run_of_pages(0, 1).is_none()
    }

    /// The maximal runs of set pages in rising order, the last clipped at the bitmap's end.
    pub fn runs(&self) -> Runs<'_> {
        Runs::new(self)
    }

    /// The maximal runs of set pages as [`runs`](Self::runs) gives them, each of them clean once it
    /// is given out. What is not given out stays set.
    pub fn drain(&mut self) -> Drain<'_> {
        Drain::new(self)
    }

    /// The first run of set pages at or after the page of `from`, cut so that it has at most
    /// `max_bytes`, but at least one page.
    ///
    /// `from` may be anywhere: before the bitmap stands for its first page, and there is no run
    /// behind its end.
    pub fn next_run(&self, from: Iova, max_bytes: u64) -> Option<IovaRange> {
        let geometry = self.geometry;
        if from.0 > geometry.last {
            return None;
        }
        let from = geometry.page_of(from.0.max(geometry.base));
        let max_pages = (max_bytes >> geometry.page.shift()).max(1);
        let (first, end) = self.run_of_pages(from, max_pages)?;
        geometry.range_of_pages(first, end)
    }

    /// The same set of addresses by pages of another size: where those are larger, a page is set of
    /// which any part was; where they are smaller, all parts of a set page are.
    ///
    /// The new bitmap starts at the page that holds this one's first address.
    ///
    /// # Errors
    /// If there would be more than [`MAX_PAGES`] pages, or memory is short.
    pub fn resample(&self, page: PageSize) -> Result<IovaBitmap, BitmapError> {
        let base = self.geometry.base & !(page.bytes() - 1);
        let range = IovaRange::from_ends(Iova(base), Iova(self.geometry.last));
        let mut other = IovaBitmap::over(range.unwrap_or(IovaRange::ALL), page)?;
        other.merge(self);
        Ok(other)
    }

    /// The first run of at most `max_pages` set pages at or after page `from`, as first and end
    /// (exclusive).
    fn run_of_pages(&self, from: u64, max_pages: u64) -> Option<(u64, u64)> {
        let (words, pages) = (self.words(), self.geometry.pages);
        let first = bits::next_set(words, from).filter(|first| *first < pages)?;
        let limit = first.saturating_add(max_pages).min(pages);
        Some((first, bits::next_clear(words, first, limit)))
    }

    /// Sets every page touched by the addresses `first..=last`, as far as within.
    fn set_through(&mut self, first: u64, last: u64) {
        if let Some((first, last)) = self.geometry.pages_touched(first, last) {
            bits::set(self.words_mut(), first, last);
        }
    }

    /// ORs in the bits of `words` that stand for pages which start at or before `last`, taking the
    /// page that `last` is in to end there. `base` is a multiple of `page` and at most `last`.
    /// Gives the pages of ours that were named.
    fn or_foreign(&mut self, base: u64, page: PageSize, words: &[u64], last: u64) -> u64 {
        let last_bit = (last - base) >> page.shift();
        if page != self.geometry.page {
            return self.or_runs(base, page, words, last_bit, last);
        }
        // The last word of ours may get bits beyond our last page: they are taken out again, and
        // of the sum; what a kernel left there before must not be.
        let geometry = self.geometry;
        let pages = geometry.pages;
        let ours = self.words_mut();
        bits::clear_from(ours, pages);
        // The word of `last_bit` may have bits beyond it, so it is ORed apart.
        let split = bits::word_index(last_bit).min(words.len());
        let (whole, rest) = words.split_at(split);
        let mut named = bits::or_at(ours, whole, geometry.offset_of(base));
        if let Some(word) = rest.first() {
            let start = base + (bits::bit_len(whole) << page.shift());
            let word = [word & bits::upto_mask(last_bit)];
            named += bits::or_at(ours, &word, geometry.offset_of(start));
        }
        let beyond = bits::count(ours, pages, bits::bit_len(ours));
        bits::clear_from(ours, pages);
        named - beyond
    }

    /// ORs in words of another page size, run by run. Gives the pages of ours that were named.
    fn or_runs(
        &mut self,
        base: u64,
        page: PageSize,
        words: &[u64],
        last_bit: u64,
        last: u64,
    ) -> u64 {
        let mut named = 0;
        // The first page of ours not yet counted: two runs of smaller pages may be in one of ours.
        let mut uncounted = 0;
        // Bits that lie wholly before us need not be looked at.
        let mut from = self.geometry.base.saturating_sub(base) >> page.shift();
        while let Some(first) = bits::next_set(words, from).filter(|first| *first <= last_bit) {
            let start = base + (first << page.shift());
            if start > self.geometry.last {
                break;
            }
            let end = bits::next_clear(words, first, last_bit.saturating_add(1));
            let run_last = base + ((end - 1) << page.shift()) + (page.bytes() - 1);
            if let Some((first, last)) = self.geometry.pages_touched(start, run_last.min(last)) {
                bits::set(self.words_mut(), first, last);
                named += (last + 1).saturating_sub(first.max(uncounted));
                uncounted = last + 1;
            }
            from = end;
        }
        named
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
            .field("of", &self.geometry)
            .field("set", &self.count())
            .finish()
    }
}
