//! The device's dirty log, by the addresses that the device uses.
//!
//! All of guest memory is mapped for the device where the guest sees it, so its IOVAs are GPAs:
//! [`Translated::identity`](vm_migration::Translated::identity) makes the log a source for the
//! migration loop.

use std::sync::Arc;

use vm_migration::{
    AfterUnmap, DirtyError, Iova, IovaBitmap, IovaLog, IovaRange, PageSize, Precision, Reported,
};

use crate::device::Inner;

/// What a log is in.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Log {
    /// Not started.
    Off,
    /// Reports are complete.
    On,
    /// A report failed: what was written since the one before it is not known any more.
    Lost,
}

/// One mapped region, as the device reports it: whole, whatever the window.
struct Piece {
    region: IovaRange,
    /// What was reported and not yet given out, at the page size the device chose.
    kept: IovaBitmap,
    /// Where the window behind the last one starts: while windows follow on each other, the report
    /// made for the first of them serves.
    next: Option<Iova>,
}

/// The pages a passthrough device writes.
///
/// The log is asked region by region as they are mapped, because some servers know no other
/// pieces. An error of any report holds until the log is started anew: it never reads as clean.
pub struct PassthroughDirty {
    inner: Arc<Inner>,
    page: PageSize,
    log: Log,
    /// The mapped regions at the start, in rising order.
    pieces: Vec<Piece>,
}

impl PassthroughDirty {
    pub(crate) const fn new(inner: Arc<Inner>) -> Self {
        Self {
            inner,
            page: PageSize::SIZE_4K,
            log: Log::Off,
            pieces: Vec::new(),
        }
    }

    fn failed(
        &self,
        operation: &'static str,
        cause: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> DirtyError {
        DirtyError::backend(&self.inner.id, operation, cause)
    }

    fn not_tracked(&self, range: IovaRange) -> DirtyError {
        DirtyError::not_tracked(&self.inner.id, range)
    }

    /// Gives out what of `window` is in the region of number `index`, asking the device unless it
    /// was asked for an earlier window of the same round.
    fn report_piece(
        &mut self,
        index: usize,
        window: IovaRange,
        bitmap: &mut IovaBitmap,
    ) -> Result<u64, DirtyError> {
        let Some(piece) = self.pieces.get_mut(index) else {
            return Ok(0);
        };
        if piece.next != Some(window.first()) {
            let words = piece.kept.words_mut();
            let asked = self
                .inner
                .backend
                .report_log(piece.region, self.page, words);
            if let Err(cause) = asked {
                return Err(self.failed("report", cause));
            }
        }
        let named = piece.kept.take_into(bitmap);
        if piece.region.last() <= window.last() {
            // A page that reaches over the window's end was given out with it.
            piece.kept.clear();
            piece.next = None;
        } else {
            piece.next = window.last().0.checked_add(1).map(Iova);
        }
        Ok(named)
    }

    /// Starts the device's log and makes room for its reports of `regions`.
    fn begin(&mut self, ranges: &[IovaRange], regions: Vec<IovaRange>) -> Result<(), DirtyError> {
        let merged = merge_nearest(ranges.to_vec(), self.inner.backend.max_log_ranges());
        let chosen = self
            .inner
            .backend
            .start_log(PageSize::SIZE_4K, &merged)
            .map_err(|cause| self.failed("start", cause))?;
        // Reports are of 4 KiB pages at least.
        self.page = chosen.max(PageSize::SIZE_4K);
        self.pieces = regions
            .into_iter()
            .map(|region| {
                let kept = IovaBitmap::over(region, self.page)
                    .map_err(|cause| self.failed("start", cause))?;
                Ok(Piece {
                    region,
                    kept,
                    next: None,
                })
            })
            .collect::<Result<_, DirtyError>>()?;
        Ok(())
    }

    fn report_window(
        &mut self,
        window: IovaRange,
        bitmap: &mut IovaBitmap,
    ) -> Result<u64, DirtyError> {
        // A report clears at the device, so nothing may fall outside of the bitmap.
        if !bitmap.covers(window) {
            return Err(self.not_tracked(window));
        }
        let mut next = Some(window.first().0);
        let mut named = 0;
        for index in 0..self.pieces.len() {
            let Some(part) = self
                .pieces
                .get(index)
                .and_then(|piece| piece.region.intersection(window))
            else {
                continue;
            };
            if next == Some(part.first().0) {
                next = part.last().0.checked_add(1);
            }
            named += self.report_piece(index, window, bitmap)?;
        }
        // Memory of the window that the device cannot reach it does not write; but then somebody
        // thought that it could.
        if next != window.last().0.checked_add(1) {
            return Err(self.not_tracked(window));
        }
        Ok(named)
    }
}

impl IovaLog for PassthroughDirty {
    fn id(&self) -> &str {
        &self.inner.id
    }

    fn granularity(&self) -> PageSize {
        self.page
    }

    fn precision(&self) -> Precision {
        Precision::Exact
    }

    fn after_unmap(&self) -> AfterUnmap {
        // Servers keep the log with the mapped region.
        AfterUnmap::Forgotten
    }

    fn start(&mut self, ranges: &[IovaRange]) -> Result<(), DirtyError> {
        let mut regions: Vec<IovaRange> = self
            .inner
            .mapped()
            .iter()
            .filter_map(|ram| IovaRange::new(Iova(ram.gpa.0), ram.len))
            .collect();
        regions.sort_unstable();
        for range in ranges {
            let reached = regions
                .iter()
                .any(|region| region.first() <= range.last() && range.first() <= region.last());
            if !reached {
                return Err(self.not_tracked(*range));
            }
        }
        // A device that logs already would refuse to start.
        self.stop()?;
        match self.begin(ranges, regions) {
            Ok(()) => {
                self.log = Log::On;
                Ok(())
            }
            Err(error) => {
                // It may have started all the same, its answer lost, and would refuse the next start.
                if let Err(error) = self.inner.backend.stop_log() {
                    let device = &self.inner.id;
                    let error = vm_migration::ErrorChain(&error).to_string();
                    tracing::debug!(device, error, "dirty log that did not start is not stopped");
                }
                Err(error)
            }
        }
    }

    fn report(
        &mut self,
        window: IovaRange,
        bitmap: &mut IovaBitmap,
    ) -> Result<Reported, DirtyError> {
        match self.log {
            Log::On => {}
            Log::Off => return Err(self.failed("report", "the log was not started")),
            Log::Lost => return Err(self.failed("report", "an earlier report failed")),
        }
        let reported = self.report_window(window, bitmap);
        if reported.is_err() {
            self.log = Log::Lost;
        }
        reported.map(Reported::counted)
    }

    fn stop(&mut self) -> Result<(), DirtyError> {
        if self.log == Log::Off {
            return Ok(());
        }
        self.log = Log::Off;
        let stopped = self.inner.backend.stop_log();
        stopped.map_err(|cause| self.failed("stop", cause))
    }
}

/// Merges sorted ranges over the smallest gaps until there are at most `most`.
fn merge_nearest(mut ranges: Vec<IovaRange>, most: usize) -> Vec<IovaRange> {
    while ranges.len() > most.max(1) {
        let gap = |at: usize| match (ranges.get(at), ranges.get(at + 1)) {
            (Some(a), Some(b)) => b.first().0.saturating_sub(a.last().0),
            _ => u64::MAX,
        };
        let nearest = (0..ranges.len() - 1).min_by_key(|at| gap(*at)).unwrap_or(0);
        let next = ranges.remove(nearest + 1);
        if let Some(range) = ranges.get_mut(nearest) {
            let len = (next.last().0 - range.first().0).saturating_add(1);
            *range = IovaRange::new(range.first(), len).unwrap_or(*range);
        }
    }
    ranges
}

#[cfg(test)]
mod tests;
