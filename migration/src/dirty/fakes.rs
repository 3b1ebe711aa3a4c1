//! A dirty source whose writes a test makes.

use std::sync::Arc;

use parking_lot::Mutex;

use crate::addr::{Iova, IovaRange, PageSize};
use crate::iova_bitmap::IovaBitmap;
use crate::source::{DirtyError, DirtySource, Precision};

/// The writes of a [`FakeSource`] not yet reported, as ranges.
pub(super) type Writes = Arc<Mutex<Vec<IovaRange>>>;

/// Reports the ranges put into its `writes`, at its own page size.
#[derive(Debug)]
pub(super) struct FakeSource {
    id: String,
    page: PageSize,
    writes: Writes,
    /// Fails the report of the window with this first address, after having reported.
    pub(super) fail_at: Option<Iova>,
}

impl FakeSource {
    pub(super) fn new(id: &str, page: PageSize) -> Self {
        Self {
            id: id.to_owned(),
            page,
            writes: Writes::default(),
            fail_at: None,
        }
    }

    pub(super) fn writes(&self) -> Writes {
        Arc::clone(&self.writes)
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
        self.writes.lock().clear();
        Ok(())
    }

    fn report(&mut self, window: IovaRange, bitmap: &mut IovaBitmap) -> Result<(), DirtyError> {
        // As a device does: into a bitmap of its own page size, which is then ORed in.
        let base = Iova(window.first().0 & !(self.page.bytes() - 1));
        let own = IovaRange::from_ends(base, window.last()).unwrap();
        let mut log = IovaBitmap::over(own, self.page).unwrap();
        self.writes.lock().retain(|write| {
            let inside = write.intersection(window).is_some();
            if inside {
                log.set_range(*write);
            }
            !inside
        });
        bitmap
            .or_words(base, self.page, log.words())
            .map_err(|error| self.failed(Box::new(error)))?;
        if self.fail_at == Some(window.first()) {
            return Err(self.failed("unplugged".into()));
        }
        Ok(())
    }

    fn stop(&mut self) -> Result<(), DirtyError> {
        Ok(())
    }
}

impl FakeSource {
    fn failed(&self, cause: Box<dyn std::error::Error + Send + Sync>) -> DirtyError {
        DirtyError::Backend {
            source_id: self.id.clone(),
            operation: "report",
            cause,
        }
    }
}
