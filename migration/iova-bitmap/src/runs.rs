//! Iteration over maximal runs of set pages.

use core::fmt;

use crate::addr::IovaRange;
use crate::bitmap::{Geometry, IovaBitmap};
use crate::bits::{self, kernels::Edges};
use crate::raw;

/// Finds runs in words, by the places where bits change.
#[derive(Clone)]
struct Scanner {
    edges: Edges,
    /// The first word not yet looked at.
    next: usize,
    /// Whether the last bit looked at is set: a run is open.
    open: bool,
}

impl Scanner {
    fn new() -> Self {
        Self {
            edges: Edges::new(),
            next: 0,
            open: false,
        }
    }

    /// The next edge; `words` are those of the first call.
    fn edge(&mut self, words: &[u64]) -> Option<u64> {
        loop {
            if let Some(edge) = self.edges.pop() {
                return Some(edge);
            }
            if !self.refill(words) {
                return None;
            }
        }
    }

    /// Looks at more words, if there are some.
    fn refill(&mut self, words: &[u64]) -> bool {
        let rest = words.get(self.next..).unwrap_or_default();
        if rest.is_empty() {
            return false;
        }
        let looked_at = raw::edges(
            rest,
            bits::word_start(self.next),
            self.open,
            &mut self.edges,
        );
        self.next += looked_at;
        if let Some(last) = looked_at.checked_sub(1).and_then(|last| rest.get(last)) {
            self.open = last >> (bits::WORD_BITS - 1) != 0;
        }
        true
    }

    /// The next run of set pages, if it is found already.
    #[inline]
    fn found(&mut self, geometry: &Geometry) -> Option<IovaRange> {
        let (first, end) = self.edges.pop_run()?;
        geometry.range_of_pages(first, end)
    }

    /// Gives `add` the runs that are found already. Those near the bitmap's end are left to
    /// [`run`](Self::run), so that none here need be clipped.
    #[inline]
    fn fold_found<T>(
        &mut self,
        geometry: &Geometry,
        start: T,
        mut add: impl FnMut(T, IovaRange) -> T,
    ) -> T {
        let Some(runs) = self.edges.pop_runs(geometry.pages) else {
            return start;
        };
        let place = geometry.places_from(runs.base);
        runs.fold(start, |sum, (first, end)| add(sum, place(first, end)))
    }

    /// The next run of set pages; `words` are those of the first call.
    #[inline]
    fn run(&mut self, words: &[u64], geometry: &Geometry) -> Option<IovaRange> {
        self.found(geometry).or_else(|| {
            let first = self.edge(words)?;
            // A run that no edge ends goes on to the end.
            let end = self.edge(words).unwrap_or(geometry.pages);
            geometry.range_of_pages(first, end)
        })
    }
}

/// Maximal runs of set pages in rising order, see [`IovaBitmap::runs`].
#[derive(Clone)]
pub struct Runs<'a> {
    geometry: Geometry,
    words: &'a [u64],
    scanner: Scanner,
}

impl<'a> Runs<'a> {
    pub(crate) fn new(bitmap: &'a IovaBitmap) -> Self {
        Self {
            geometry: bitmap.geometry(),
            words: bitmap.words(),
            scanner: Scanner::new(),
        }
    }
}

impl Iterator for Runs<'_> {
    type Item = IovaRange;

    #[inline]
    fn next(&mut self) -> Option<IovaRange> {
        self.scanner.run(self.words, &self.geometry)
    }

    /// As by [`next`](Self::next), but the runs that are found at once are given in one loop.
    #[inline]
    fn fold<T, F: FnMut(T, IovaRange) -> T>(mut self, start: T, mut add: F) -> T {
        let mut sum = start;
        while let Some(run) = self.next() {
            sum = add(sum, run);
            sum = self.scanner.fold_found(&self.geometry, sum, &mut add);
        }
        sum
    }
}

impl core::iter::FusedIterator for Runs<'_> {}

impl fmt::Debug for Runs<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Runs").field("of", &self.geometry).finish()
    }
}

/// Maximal runs of set pages in rising order, which are clean once given out; see
/// [`IovaBitmap::drain`].
///
/// Dropped early it leaves set what it has not given out.
pub struct Drain<'a> {
    geometry: Geometry,
    words: &'a mut [u64],
    scanner: Scanner,
    /// Words below this index are zero, but for what the scanner still holds.
    cleared: usize,
}

impl<'a> Drain<'a> {
    pub(crate) fn new(bitmap: &'a mut IovaBitmap) -> Self {
        Self {
            geometry: bitmap.geometry(),
            words: bitmap.words_mut(),
            scanner: Scanner::new(),
            cleared: 0,
        }
    }

    /// Clears the words whose runs the scanner has found.
    fn clear_looked_at(&mut self) {
        let until = self.scanner.next;
        if let Some(words) = self.words.get_mut(self.cleared..until) {
            words.fill(0);
        }
        self.cleared = until;
    }
}

impl Iterator for Drain<'_> {
    type Item = IovaRange;

    #[inline]
    fn next(&mut self) -> Option<IovaRange> {
        let run = self.scanner.run(self.words, &self.geometry);
        // Only a refill looks at words, and it happens once for many runs.
        if self.cleared != self.scanner.next {
            self.clear_looked_at();
        }
        run
    }
    /// As by [`next`](Self::next), but the runs that are found at once are given in one loop.
    #[inline]
    fn fold<T, F: FnMut(T, IovaRange) -> T>(mut self, start: T, mut add: F) -> T {
        let mut sum = start;
        while let Some(run) = self.next() {
            sum = add(sum, run);
            sum = self.scanner.fold_found(&self.geometry, sum, &mut add);
        }
        sum
    }
}

impl core::iter::FusedIterator for Drain<'_> {}

impl Drop for Drain<'_> {
    fn drop(&mut self) {
        // What was found and not given out goes back; what was not looked at is still there.
        let looked_at = bits::word_start(self.scanner.next);
        while self.scanner.edges.has_more() {
            if let Some(first) = self.scanner.edges.pop() {
                let end = self.scanner.edges.pop().unwrap_or(looked_at);
                bits::set(self.words, first, end.saturating_sub(1));
            }
        }
    }
}

impl fmt::Debug for Drain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Drain").field("of", &self.geometry).finish()
    }
}
