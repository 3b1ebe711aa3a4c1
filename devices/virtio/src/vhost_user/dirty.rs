//! The backend as a writer of guest memory.

use std::sync::Arc;

use vm_memory::{GuestAddressSpace, GuestMemoryBackend};
use vm_migration::memory::{self, MemoryHandle};
use vm_migration::source::{Clearing, Reported};
use vm_migration::{DirtyError, DirtySource, IovaBitmap, IovaRange, PageSize, Precision};

use super::connection::ExchangeError;
use super::log::{LOG_PAGE, SharedLog};
use super::session::{Session, VhostUserError};

/// The pages that a vhost-user backend writes, by the log that it shares.
///
/// A backend that is lost fails every report: what it wrote last nobody knows.
pub struct VhostUserDirty {
    id: String,
    session: Arc<Session>,
    memory: MemoryHandle,
    log: Option<Arc<SharedLog>>,
    tracked: Vec<IovaRange>,
}

impl VhostUserDirty {
    pub(super) fn new(id: String, session: Arc<Session>, memory: MemoryHandle) -> Self {
        Self {
            id,
            session,
            memory,
            log: None,
            tracked: Vec::new(),
        }
    }

    fn failed(
        &self,
        operation: &'static str,
        cause: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> DirtyError {
        DirtyError::backend(&self.id, operation, cause)
    }

    fn not_tracked(&self, range: IovaRange) -> DirtyError {
        DirtyError::not_tracked(&self.id, range)
    }

    fn require_backend(&self) -> Result<(), VhostUserError> {
        match self.session.lost() {
            None => Ok(()),
            Some(reason) => Err(ExchangeError::Lost {
                reason: reason.to_owned(),
            }
            .into()),
        }
    }
}

impl DirtySource for VhostUserDirty {
    fn id(&self) -> &str {
        &self.id
    }

    fn granularity(&self) -> PageSize {
        LOG_PAGE
    }

    fn precision(&self) -> Precision {
        Precision::Exact
    }

    fn start(&mut self, ranges: &[IovaRange]) -> Result<(), DirtyError> {
        // What was logged before is of no use any more, even if this fails.
        self.log = None;
        self.tracked.clear();
        let guest = self.memory.memory();
        if let Some(hole) = ranges.iter().find(|range| !memory::is_ram(&guest, **range)) {
            return Err(self.not_tracked(*hole));
        }
        let log =
            SharedLog::new(guest.last_addr().0).map_err(|cause| self.failed("start", cause))?;
        let log = Arc::new(log);
        self.session
            .start_log(Arc::clone(&log))
            .map_err(|cause| self.failed("start", cause))?;
        self.log = Some(log);
        self.tracked = ranges.to_vec();
        Ok(())
    }

    fn report(
        &mut self,
        window: IovaRange,
        bitmap: &mut IovaBitmap,
    ) -> Result<Reported, DirtyError> {
        let Some(log) = &self.log else {
            return Err(self.failed("report", VhostUserError::NoLog));
        };
        // A take clears, so nothing may fall outside of the bitmap.
        let tracked = |range: &IovaRange| range.intersection(window) == Some(window);
        if !self.tracked.iter().any(tracked) || !bitmap.covers(window) {
            return Err(self.not_tracked(window));
        }
        let named = log
            .take(window, bitmap)
            .map_err(|cause| self.failed("report", cause))?;
        // After the take: a backend that died before it may have written more than it logged.
        self.require_backend()
            .map_err(|cause| self.failed("report", cause))?;
        Ok(Reported::counted(named))
    }

    fn clearing(&mut self) -> Clearing<'_> {
        Clearing::AtReport
    }

    fn stop(&mut self) -> Result<(), DirtyError> {
        self.log = None;
        self.tracked.clear();
        self.session
            .stop_log()
            .map_err(|cause| self.failed("stop", cause))
    }
}
