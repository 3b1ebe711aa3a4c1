//! A device's log as a source of dirty guest pages.

use std::sync::Arc;

use iova_bitmap::IovaBitmap;

use super::IovaLog;
use super::handle::MapHandle;
use super::map::IovaMap;
use super::state::State;
use crate::addr::{Iova, IovaRange, PageSize};
use crate::dirty::WINDOW_BYTES;
use crate::source::{Clearing, DirtyError, DirtySource, Precision, Reported};
use crate::sync::Mutex;

/// A log in a device's addresses as a [`DirtySource`], whose addresses are GPAs; see the
/// [module](super).
pub struct Translated<L> {
    way: Way<L>,
}

enum Way<L> {
    /// An IOVA is the GPA.
    Identity(L),
    Mapped(Mapped),
}

struct Mapped {
    id: String,
    state: Arc<Mutex<State>>,
    /// Where the window behind the last one starts: while windows follow on each other, what was
    /// read for the first of them serves.
    next: Option<Iova>,
}

impl<L: IovaLog> Translated<L> {
    /// The device sees guest memory where the guest sees it.
    pub const fn identity(log: L) -> Self {
        Self {
            way: Way::Identity(log),
        }
    }

    /// The device sees guest memory through `map`, which the handle changes.
    pub fn mapped(log: L, map: IovaMap) -> (Self, MapHandle)
    where
        L: 'static,
    {
        Self::with_window(log, map, WINDOW_BYTES)
    }

    /// As [`mapped`](Self::mapped), reading at most `bytes` of the log at once, but at least one of
    /// its pages: for logs that are slow, as who changes the map waits for one such report.
    pub fn with_window(log: L, map: IovaMap, bytes: u64) -> (Self, MapHandle)
    where
        L: 'static,
    {
        let id = log.id().to_owned();
        let state = Arc::new(Mutex::new(State::new(Box::new(log), map, bytes)));
        let handle = MapHandle::new(Arc::clone(&state));
        let way = Way::Mapped(Mapped {
            id,
            state,
            next: None,
        });
        (Self { way }, handle)
    }
}

impl Mapped {
    fn report(
        &mut self,
        window: IovaRange,
        bitmap: &mut IovaBitmap,
    ) -> Result<Reported, DirtyError> {
        if self.next.take() != Some(window.first()) {
            // The lock is let go between windows of the log, for those who change the map: what they
            // take away they report, and what they add was not written before this round.
            let mut from = Some(Iova(0));
            while let Some(at) = from {
                from = self.state.lock().read_next(at)?;
            }
        }
        let (named, next) = self.state.lock().give_out(window, bitmap)?;
        self.next = next;
        Ok(Reported::counted(named))
    }
}

impl<L: IovaLog> DirtySource for Translated<L> {
    fn id(&self) -> &str {
        match &self.way {
            Way::Identity(log) => log.id(),
            Way::Mapped(mapped) => &mapped.id,
        }
    }

    fn granularity(&self) -> PageSize {
        match &self.way {
            Way::Identity(log) => log.granularity(),
            Way::Mapped(mapped) => mapped.state.lock().granularity(),
        }
    }

    fn precision(&self) -> Precision {
        match &self.way {
            Way::Identity(log) => log.precision(),
            Way::Mapped(mapped) => mapped.state.lock().precision(),
        }
    }

    fn start(&mut self, ranges: &[IovaRange]) -> Result<(), DirtyError> {
        match &mut self.way {
            Way::Identity(log) => log.start(ranges),
            Way::Mapped(mapped) => {
                mapped.next = None;
                mapped.state.lock().start(ranges)
            }
        }
    }

    fn report(
        &mut self,
        window: IovaRange,
        bitmap: &mut IovaBitmap,
    ) -> Result<Reported, DirtyError> {
        match &mut self.way {
            Way::Identity(log) => log.report(window, bitmap),
            Way::Mapped(mapped) => mapped.report(window, bitmap),
        }
    }

    fn clearing(&mut self) -> Clearing<'_> {
        Clearing::AtReport
    }

    fn stop(&mut self) -> Result<(), DirtyError> {
        match &mut self.way {
            Way::Identity(log) => log.stop(),
            Way::Mapped(mapped) => mapped.state.lock().stop(),
        }
    }
}
