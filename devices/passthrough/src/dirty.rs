//! The device's dirty log, or the one it shares, by the addresses that the device uses.
//!
//! All of guest memory is mapped for the device where the guest sees it, so its IOVAs are GPAs:
//! [`Translated::identity`] makes the log a source for the migration loop.

use std::sync::Arc;

use vm_migration::{
    AfterUnmap, DirtyError, DirtySource, Iova, IovaBitmap, IovaLog, IovaRange, PageSize, Precision,
    Reported, StateError, Translated,
};

use crate::backend::SharedLog;
use crate::device::Passthrough;
use crate::rung::{DmaLog, EverythingDirty, FoundLog, OfMany};

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
    log_of: Arc<dyn DmaLog>,
    page: PageSize,
    log: Log,
    /// The mapped regions at the start, in rising order.
    pieces: Vec<Piece>,
}

impl PassthroughDirty {
    pub(crate) fn new(log_of: Arc<dyn DmaLog>) -> Self {
        Self {
            log_of,
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
        DirtyError::backend(self.log_of.id(), operation, cause)
    }

    fn not_tracked(&self, range: IovaRange) -> DirtyError {
        DirtyError::not_tracked(self.log_of.id(), range)
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
        if piece.next != Some(window.first())
            && let Err(cause) = self.log_of.report(&mut piece.kept)
        {
            return Err(self.failed("report", cause));
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
        let merged = merge_nearest(ranges.to_vec(), self.log_of.max_ranges());
        let chosen = self
            .log_of
            .start(&merged)
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
        self.log_of.id()
    }

    fn granularity(&self) -> PageSize {
        self.page
    }

    fn precision(&self) -> Precision {
        self.log_of.precision()
    }

    fn after_unmap(&self) -> AfterUnmap {
        // Servers keep the log with the mapped region.
        AfterUnmap::Forgotten
    }

    fn start(&mut self, ranges: &[IovaRange]) -> Result<(), DirtyError> {
        let mut regions: Vec<IovaRange> = self
            .log_of
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
                if let Err(error) = self.log_of.stop() {
                    let device = self.log_of.id();
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
        let stopped = self.log_of.stop();
        stopped.map_err(|cause| self.failed("stop", cause))
    }
}

/// The sources of what these devices write, by the rung of each; with each device goes whether
/// there is consent to the last rung. Devices that share a log share a source.
///
/// # Errors
/// As [`Passthrough::dirty_rung`].
pub fn dirty_sources<'a>(
    devices: impl IntoIterator<Item = (&'a Passthrough, bool)>,
) -> Result<Vec<Box<dyn DirtySource>>, StateError> {
    let mut sources: Vec<Box<dyn DirtySource>> = Vec::new();
    let mut shared: Vec<Arc<dyn SharedLog>> = Vec::new();
    for (device, consent) in devices {
        let inner = Arc::clone(&device.inner);
        match device.find_log(consent)? {
            FoundLog::Device => sources.push(source(inner)),
            FoundLog::Nowhere => sources.push(Box::new(EverythingDirty::new(inner))),
            FoundLog::Shared(log) => {
                if !shared.iter().any(|known| same(known, &log)) {
                    let of = OfMany::new(inner, Arc::clone(&log));
                    sources.push(source(Arc::new(of)));
                    shared.push(log);
                }
            }
        }
    }
    Ok(sources)
}

/// A log as a source: it goes by GPAs already.
fn source(log: Arc<dyn DmaLog>) -> Box<dyn DirtySource> {
    Box::new(Translated::identity(PassthroughDirty::new(log)))
}

/// Whether two handles are on the same log.
fn same(one: &Arc<dyn SharedLog>, other: &Arc<dyn SharedLog>) -> bool {
    std::ptr::addr_eq(Arc::as_ptr(one), Arc::as_ptr(other))
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
