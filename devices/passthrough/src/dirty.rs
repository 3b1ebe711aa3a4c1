//! The device's dirty log as a source for the migration loop.

use std::sync::Arc;

use vm_migration::{DirtyError, DirtySource, Iova, IovaBitmap, IovaRange, PageSize, Precision};

use crate::backend::BackendError;
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

/// The pages a passthrough device writes.
///
/// The log is asked region by region as they are mapped, because some servers know no other
/// windows. An error of any report holds until the log is started anew: it never reads as clean.
pub struct PassthroughDirty {
    inner: Arc<Inner>,
    page: PageSize,
    log: Log,
    /// The mapped regions at the start.
    regions: Vec<IovaRange>,
    /// Kept from report to report.
    words: Vec<u64>,
}

impl PassthroughDirty {
    pub(crate) const fn new(inner: Arc<Inner>) -> Self {
        Self {
            inner,
            page: PageSize::SIZE_4K,
            log: Log::Off,
            regions: Vec::new(),
            words: Vec::new(),
        }
    }

    fn failed(
        &self,
        operation: &'static str,
        cause: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> DirtyError {
        DirtyError::Backend {
            source_id: self.inner.id.clone(),
            operation,
            cause: cause.into(),
        }
    }

    fn not_tracked(&self, range: IovaRange) -> DirtyError {
        DirtyError::NotTracked {
            source_id: self.inner.id.clone(),
            first: range.first(),
            last: range.last(),
        }
    }

    /// One region's report, at the page size the device chose.
    fn report_region(
        &mut self,
        region: IovaRange,
        bitmap: &mut IovaBitmap,
    ) -> Result<(), DirtyError> {
        let pages = (region.last().0 - region.first().0) / self.page.bytes() + 1;
        let words = usize::try_from(pages.div_ceil(64))
            .map_err(|_| self.failed("report", "the region is too large for this host"))?;
        self.words.clear();
        self.words.resize(words, 0);
        let reported = self
            .inner
            .backend
            .report_log(region, self.page, &mut self.words);
        reported.map_err(|cause: BackendError| self.failed("report", cause))?;
        bitmap
            .or_words(region.first(), self.page, &self.words)
            .map_err(|cause| self.failed("report", cause))
    }

    fn report_window(
        &mut self,
        window: IovaRange,
        bitmap: &mut IovaBitmap,
    ) -> Result<(), DirtyError> {
        // A report clears at the device, so nothing may fall outside of the bitmap.
        if !bitmap.covers(window) {
            return Err(self.not_tracked(window));
        }
        let mut next = Some(window.first().0);
        for index in 0..self.regions.len() {
            let Some(&region) = self.regions.get(index) else {
                break;
            };
            if region.last() < window.first() || region.first() > window.last() {
                continue;
            }
            if region.first() < window.first() || region.last() > window.last() {
                return Err(self.not_tracked(region));
            }
            if next == Some(region.first().0) {
                next = region.last().0.checked_add(1);
            }
            self.report_region(region, bitmap)?;
        }
        // Memory of the window that the device cannot reach it does not write; but then somebody
        // thought that it could.
        if next != window.last().0.checked_add(1) {
            return Err(self.not_tracked(window));
        }
        Ok(())
    }
}

impl DirtySource for PassthroughDirty {
    fn id(&self) -> &str {
        &self.inner.id
    }

    fn granularity(&self) -> PageSize {
        self.page
    }

    fn precision(&self) -> Precision {
        Precision::Exact
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
        let merged = merge_nearest(ranges.to_vec(), self.inner.backend.max_log_ranges());
        let chosen = self
            .inner
            .backend
            .start_log(PageSize::SIZE_4K, &merged)
            .map_err(|cause| self.failed("start", cause))?;
        // Reports are of 4 KiB pages at least.
        self.page = chosen.max(PageSize::SIZE_4K);
        self.regions = regions;
        self.log = Log::On;
        Ok(())
    }

    fn report(&mut self, window: IovaRange, bitmap: &mut IovaBitmap) -> Result<(), DirtyError> {
        match self.log {
            Log::On => {}
            Log::Off => return Err(self.failed("report", "the log was not started")),
            Log::Lost => return Err(self.failed("report", "an earlier report failed")),
        }
        let reported = self.report_window(window, bitmap);
        if reported.is_err() {
            self.log = Log::Lost;
        }
        reported
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
