//! A dirty source whose writes a test makes.

use std::sync::Arc;

use parking_lot::Mutex;

use crate::addr::{Iova, IovaRange, PageSize};
use crate::iova_bitmap::IovaBitmap;
use crate::source::{DirtyError, DirtySource, Precision};

/// What a test tells a [`FakeSource`].
#[derive(Clone, Debug, Default)]
pub(super) struct Script {
    /// Writes not yet reported.
    pub(super) writes: Vec<IovaRange>,
    /// The first address of the window whose next report fails, and loses what it took.
    pub(super) fail_at: Option<Iova>,
}

/// Reports the ranges its script has, at its own page size.
#[derive(Debug)]
pub(super) struct FakeSource {
    id: String,
    page: PageSize,
    script: Arc<Mutex<Script>>,
}

impl FakeSource {
    pub(super) fn new(id: &str, page: PageSize) -> Self {
        Self {
            id: id.to_owned(),
            page,
            script: Arc::default(),
        }
    }

    pub(super) fn script(&self) -> Arc<Mutex<Script>> {
        Arc::clone(&self.script)
    }

    fn failed(&self, cause: Box<dyn std::error::Error + Send + Sync>) -> DirtyError {
        DirtyError::Backend {
            source_id: self.id.clone(),
            operation: "report",
            cause,
        }
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
        self.script.lock().writes.clear();
        Ok(())
    }

    fn report(&mut self, window: IovaRange, bitmap: &mut IovaBitmap) -> Result<(), DirtyError> {
        // As a device does: into a bitmap of its own page size, which is then ORed in.
        let base = Iova(window.first().0 & !(self.page.bytes() - 1));
        let own = IovaRange::from_ends(base, window.last()).unwrap();
        let mut log = IovaBitmap::over(own, self.page).unwrap();
        let mut script = self.script.lock();
        script.writes.retain(|write| {
            let inside = write.intersection(window).is_some();
            if inside {
                log.set_range(*write);
            }
            !inside
        });
        if script.fail_at == Some(window.first()) {
            script.fail_at = None;
            return Err(self.failed("unplugged".into()));
        }
        bitmap
            .or_words(base, self.page, log.words())
            .map_err(|error| self.failed(Box::new(error)))
    }

    fn stop(&mut self) -> Result<(), DirtyError> {
        Ok(())
    }
}
