//! A dirty source whose writes a test makes.

use std::sync::Arc;

use iova_bitmap::IovaBitmap;
use parking_lot::Mutex;

use crate::addr::{Iova, IovaRange, PageSize};
use crate::source::{Clearing, DeferredClear, DirtyError, DirtySource, Precision, Reported};

/// What a test tells a [`FakeSource`], and sees of it.
#[derive(Clone, Debug, Default)]
pub(super) struct Script {
    /// Writes not yet reported, or of a deferred source not yet cleared.
    pub(super) writes: Vec<IovaRange>,
    /// The first address of the window whose next report fails, and loses what it took.
    pub(super) fail_at: Option<Iova>,
    /// Whether the next start fails.
    pub(super) fail_start: bool,
    /// Whether the next clear fails.
    pub(super) fail_clear: bool,
    /// How often it was started.
    pub(super) starts: u32,
    /// The windows it was asked for.
    pub(super) windows: Vec<IovaRange>,
}

/// Reports the ranges its script has, at its own page size.
#[derive(Debug)]
pub(super) struct FakeSource {
    id: String,
    page: PageSize,
    /// Whether it clears when told to, as KVM does.
    deferred: bool,
    script: Arc<Mutex<Script>>,
}

impl FakeSource {
    pub(super) fn new(id: &str, page: PageSize) -> Self {
        Self {
            id: id.to_owned(),
            page,
            deferred: false,
            script: Arc::default(),
        }
    }

    /// One that clears in a second step, page by page: its writes must be of single pages to be
    /// cleared wholly.
    pub(super) fn deferred(id: &str) -> Self {
        Self {
            deferred: true,
            ..Self::new(id, PageSize::SIZE_4K)
        }
    }

    pub(super) fn script(&self) -> Arc<Mutex<Script>> {
        Arc::clone(&self.script)
    }

    fn failed(
        &self,
        operation: &'static str,
        cause: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> DirtyError {
        DirtyError::backend(&self.id, operation, cause)
    }
}

impl DirtySource for FakeSource {
    fn id(&self) -> &str {
        &self.id
    }

    fn granularity(&self) -> PageSize {
        self.page
    }

    fn precision(&self) -> Precision {
        Precision::Coarse
    }

    fn start(&mut self, _ranges: &[IovaRange]) -> Result<(), DirtyError> {
        let mut script = self.script.lock();
        script.starts += 1;
        if std::mem::take(&mut script.fail_start) {
            return Err(self.failed("start", "gone"));
        }
        script.writes.clear();
        Ok(())
    }

    fn report(
        &mut self,
        window: IovaRange,
        bitmap: &mut IovaBitmap,
    ) -> Result<Reported, DirtyError> {
        // As a device does: into a bitmap of its own page size, which is then ORed in.
        let base = Iova(window.first().0 & !(self.page.bytes() - 1));
        let own = IovaRange::from_ends(base, window.last()).unwrap();
        let mut log = IovaBitmap::over(own, self.page).unwrap();
        let mut script = self.script.lock();
        script.windows.push(window);
        let deferred = self.deferred;
        script.writes.retain(|write| {
            let inside = write.intersection(window).is_some();
            if inside {
                log.set_range(*write);
            }
            deferred || !inside
        });
        if script.fail_at == Some(window.first()) {
            script.fail_at = None;
            return Err(self.failed("report", "unplugged"));
        }
        bitmap
            .or_words(base, self.page, log.words())
            .map(Reported::counted)
            .map_err(|error| self.failed("report", error))
    }

    fn clearing(&mut self) -> Clearing<'_> {
        if self.deferred {
            Clearing::BeforeSend(self)
        } else {
            Clearing::AtReport
        }
    }

    fn stop(&mut self) -> Result<(), DirtyError> {
        Ok(())
    }
}

impl DeferredClear for FakeSource {
    fn clear(&mut self, range: IovaRange, pages: &IovaBitmap) -> Result<(), DirtyError> {
        let mut script = self.script.lock();
        if std::mem::take(&mut script.fail_clear) {
            return Err(self.failed("clear", "unplugged"));
        }
        assert!(pages.covers(range));
        script
            .writes
            .retain(|write| write.intersection(range).is_none() || !pages.contains(write.first()));
        Ok(())
    }
}
