//! A bitmap done naively, to compare with: a set of page numbers, addresses in 128 bits, and every
//! question answered by trying each page.
//!
//! The property tests and the fuzz target `iova_bitmap` (which includes this file) share it, so it
//! uses nothing of the crate.

use std::collections::BTreeSet;

/// Which pages are set of the addresses `base..=last`.
#[derive(Clone, Debug)]
pub(crate) struct Naive {
    pub(crate) base: u128,
    pub(crate) last: u128,
    page: u128,
    /// Numbers of the set pages.
    pub(crate) set: BTreeSet<u128>,
}

impl Naive {
    pub(crate) fn new(base: u64, last: u64, page: u64) -> Self {
        Self {
            base: base.into(),
            last: last.into(),
            page: page.into(),
            set: BTreeSet::new(),
        }
    }

    pub(crate) fn pages(&self) -> impl Iterator<Item = u128> + use<> {
        0..=(self.last - self.base) / self.page
    }

    /// First and last address of a page, clipped at the end.
    pub(crate) fn bounds(&self, n: u128) -> (u128, u128) {
        let start = self.base + n * self.page;
        (start, (start + self.page - 1).min(self.last))
    }

    pub(crate) fn set_through(&mut self, first: u128, last: u128) {
        for n in self.pages() {
            let (start, end) = self.bounds(n);
            if start <= last && first <= end {
                self.set.insert(n);
            }
        }
    }

    pub(crate) fn or_words(&mut self, base: u128, page: u128, words: &[u64]) {
        for (n, word) in (0u128..).zip(words) {
            for bit in (0u128..64).filter(|bit| word & (1 << bit) != 0) {
                let start = base + (n * 64 + bit) * page;
                self.set_through(start, start + page - 1);
            }
        }
    }

    pub(crate) fn merge(&mut self, other: &Naive) {
        for n in &other.set {
            let (first, last) = other.bounds(*n);
            self.set_through(first, last);
        }
    }

    /// The set pages without those wholly within.
    pub(crate) fn clear_within(&mut self, first: u128, last: u128) {
        let cleared: Vec<_> = self
            .pages()
            .filter(|n| first <= self.bounds(*n).0 && self.bounds(*n).1 <= last)
            .collect();
        self.set.retain(|n| !cleared.contains(n));
    }

    pub(crate) fn runs(&self) -> Vec<(u128, u128)> {
        let mut runs: Vec<(u128, u128)> = Vec::new();
        for n in &self.set {
            let (start, end) = self.bounds(*n);
            match runs.last_mut() {
                Some((_, last)) if *last + 1 == start => *last = end,
                _ => runs.push((start, end)),
            }
        }
        runs
    }
}
