//! What the device's engine writes, and where: its contract, by which every page is judged.
//!
//! Record number `s` (from 1) goes to page `((s - 1) * step) mod pages`. Its word 0 is `s`, its word
//! `k` is `(s ^ pattern) + k * WORD_STEP`. So the number of records that the device says it wrote
//! tells for each page which record it holds.

use anyhow::ensure;

/// How one word of a record differs from the one before.
const WORD_STEP: u64 = 0x9e37_79b9_7f4a_7c15;

/// Word `index` of record `stamp`.
pub(super) const fn word(stamp: u64, pattern: u64, index: u64) -> u64 {
    match index {
        0 => stamp,
        _ => (stamp ^ pattern).wrapping_add(index.wrapping_mul(WORD_STEP)),
    }
}

/// The order in which pages are written.
#[derive(Debug)]
pub(super) struct Order {
    /// For each page, how many others come before it in each pass.
    turn: Vec<u32>,
}

impl Order {
    /// Pages in steps of `step`, which must get to all of them.
    pub(super) fn new(pages: u32, step: u32) -> anyhow::Result<Self> {
        let mut turn = vec![u32::MAX; usize::try_from(pages)?];
        for at in 0..pages {
            let page = u64::from(at) * u64::from(step) % u64::from(pages);
            turn[usize::try_from(page)?] = at;
        }
        ensure!(
            !turn.contains(&u32::MAX),
            "steps of {step} do not get to all of {pages} pages"
        );
        Ok(Self { turn })
    }

    /// How many pages there are.
    pub(super) const fn pages(&self) -> usize {
        self.turn.len()
    }

    /// The last of the first `stamp` records that went to `page`, 0 if none did.
    pub(super) fn last(&self, page: usize, stamp: u64) -> u64 {
        let first = u64::from(self.turn[page]) + 1;
        if stamp < first {
            return 0;
        }
        // There is a page, so there are not 0.
        let pages = u64::try_from(self.turn.len()).unwrap_or(u64::MAX).max(1);
        first + (stamp - first) / pages * pages
    }
}

/// What is wrong with a page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Fault {
    /// An older record than the device wrote before the look: a write was lost.
    Stale,
    /// A newer one than it wrote after the look, or one that belongs to another page.
    Foreign,
    /// Words of different records.
    Torn,
}

/// Judges the record number that was seen in `page`, with the device's count before and after.
pub(super) fn judge(
    order: &Order,
    page: usize,
    seen: u64,
    before: u64,
    after: u64,
) -> Option<Fault> {
    if seen < order.last(page, before) {
        return Some(Fault::Stale);
    }
    // Between the two, any record of this page may be there.
    if seen > order.last(page, after) || order.last(page, seen) != seen {
        return Some(Fault::Foreign);
    }
    None
}
