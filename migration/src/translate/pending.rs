//! Guest pages that a log named and nobody asked for yet.

use iova_bitmap::{BitmapError, IovaBitmap};

use super::map::{GpaRange, MAP_PAGE, Mapping};
use crate::addr::{Gpa, Iova, IovaRange};

/// Bits of a word.
const WORD_BITS: u64 = 64;

/// Dirty pages of the guest, by GPA, in pages of [`MAP_PAGE`].
///
/// As in [`GuestDirty`](crate::dirty::GuestDirty), whose bitmaps these are moved into, a GPA is the
/// "IOVA" of its bitmap.
#[derive(Debug, Default)]
pub(super) struct Pending {
    /// One for each range of RAM, in rising order.
    ram: Vec<IovaBitmap>,
    outside: u64,
}

impl Pending {
    /// Tracks `ranges` of guest memory, sorted and not overlapping; all is clean. What memory there
    /// is serves again if the ranges are the same as before.
    pub(super) fn restart(&mut self, ranges: &[IovaRange]) -> Result<(), BitmapError> {
        if self
            .ram
            .iter()
            .map(IovaBitmap::range)
            .eq(ranges.iter().copied())
        {
            self.ram.iter_mut().for_each(IovaBitmap::clear);
            return Ok(());
        }
        self.ram.clear();
        for range in ranges {
            self.ram.push(IovaBitmap::over(*range, MAP_PAGE)?);
        }
        Ok(())
    }

    /// How many pages were named that are no RAM, since this was made.
    pub(super) fn outside(&self) -> u64 {
        self.outside
    }

    /// Moves the pages of `window` to `bitmap`: how many pages of `bitmap` that were, and the window
    /// which follows starts where. `None` if `window` does not lie in a range of RAM.
    pub(super) fn give_out(
        &mut self,
        window: IovaRange,
        bitmap: &mut IovaBitmap,
    ) -> Option<(u64, Option<Iova>)> {
        let index = self.index_of(window.first());
        let kept = self.ram.get_mut(index)?;
        if !kept.covers(window) || !bitmap.covers(window) {
            return None;
        }
        let named = kept.take_into(bitmap);
        let next = if window.last() < kept.range().last() {
            window.last().0.checked_add(1).map(Iova)
        } else {
            let next = self.ram.get(index.saturating_add(1));
            next.map(|ram| ram.range().first())
        };
        Some((named, next))
    }

    /// Adds the guest pages that the set `pages` of a log lead to by `mapping`.
    pub(super) fn add(&mut self, pages: &IovaBitmap, mapping: Mapping) {
        let Some(part) = mapping.iova().intersection(pages.range()) else {
            return;
        };
        match self.add_words(pages, mapping, part) {
            None => self.add_runs(pages, mapping, Some(part)),
            Some(done) => {
                let before = done.first().0.checked_sub(1);
                let before = before.and_then(|last| IovaRange::from_ends(part.first(), Iova(last)));
                self.add_runs(pages, mapping, before);
                let after = done.last().0.checked_add(1);
                let after = after.and_then(|first| IovaRange::from_ends(Iova(first), part.last()));
                self.add_runs(pages, mapping, after);
            }
        }
    }

    /// Adds as much of `part` as is whole words of `pages`, if all that is RAM of one range and
    /// starts a page of the log in both spaces; gives what was added.
    fn add_words(
        &mut self,
        pages: &IovaBitmap,
        mapping: Mapping,
        part: IovaRange,
    ) -> Option<IovaRange> {
        let (base, page) = (pages.range().first(), pages.page_size());
        let word_bytes = page.bytes().checked_mul(WORD_BITS)?;
        let first = (part.first().0 - base.0).div_ceil(word_bytes);
        let end = (part.last().0 - base.0).checked_add(1)? / word_bytes;
        let words = first.checked_mul(word_bytes)?..end.checked_mul(word_bytes)?;
        let whole = IovaRange::from_ends(
            Iova(base.0.checked_add(words.start)?),
            Iova(base.0.checked_add(words.end.checked_sub(1)?)?),
        )?;
        let GpaRange { first: gpa, last } = mapping.translate(whole)?;
        let index = self.index_of(Iova(gpa.0));
        let ram = self.ram.get_mut(index)?;
        if !ram.covers(IovaRange::from_ends(Iova(gpa.0), Iova(last.0))?) {
            return None;
        }
        let words = usize::try_from(first).ok()?..usize::try_from(end).ok()?;
        let words = pages.words().get(words)?;
        // Refused where GPAs do not start a page of the log: then by runs.
        ram.or_words(Iova(gpa.0), page, words).ok()?;
        Some(whole)
    }

    /// Adds `part` run by run.
    fn add_runs(&mut self, pages: &IovaBitmap, mapping: Mapping, part: Option<IovaRange>) {
        let Some(part) = part else {
            return;
        };
        // The count, and the length of a run, keep each look at the bitmap within `part`: there may
        // be as many mappings as pages.
        let mut left = pages.count_in(part);
        let page = pages.page_size();
        let most = (part.last().0 - part.first().0).saturating_add(page.bytes());
        let mut from = part.first();
        while left > 0 {
            let Some(run) = pages.next_run(from, most) else {
                return;
            };
            if let Some(gpas) = run
                .intersection(part)
                .and_then(|run| mapping.translate(run))
            {
                self.set(gpas);
            }
            let pages_of_run = ((run.last().0 - run.first().0) >> page.shift()).saturating_add(1);
            left = left.saturating_sub(pages_of_run);
            match run.last().0.checked_add(1) {
                Some(next) => from = Iova(next),
                None => return,
            }
        }
    }

    /// Sets the pages of `gpas` that are RAM, and counts the others.
    fn set(&mut self, gpas: GpaRange) {
        let Some(range) = IovaRange::from_ends(Iova(gpas.first.0), Iova(gpas.last.0)) else {
            return;
        };
        let mut outside = pages_touched(range);
        let index = self.index_of(range.first());
        for ram in self.ram.iter_mut().skip(index) {
            let Some(part) = ram.range().intersection(range) else {
                break;
            };
            ram.set_range(part);
            outside = outside.saturating_sub(pages_touched(part));
        }
        if outside != 0 {
            self.outside = self.outside.saturating_add(outside);
            let gpa = Gpa(range.first().0);
            tracing::debug!(%gpa, outside, "a device wrote where there is no RAM");
        }
    }

    /// The first range of RAM that ends at or after `gpa`.
    fn index_of(&self, gpa: Iova) -> usize {
        self.ram.partition_point(|ram| ram.range().last() < gpa)
    }
}

fn pages_touched(range: IovaRange) -> u64 {
    let shift = MAP_PAGE.shift();
    ((range.last().0 >> shift) - (range.first().0 >> shift)).saturating_add(1)
}
