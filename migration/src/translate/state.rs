//! What the collector and whoever changes the map share, under one lock.

use iova_bitmap::{BitmapError, IovaBitmap};

use super::map::{IovaMap, Mapping};
use super::pending::Pending;
use super::{AfterUnmap, ChangeError, IovaLog};
use crate::addr::{Iova, IovaRange, PageSize};
use crate::dirty::WINDOW_BYTES;
use crate::source::{DirtyError, Precision};

/// The most pages of a log that are read at once: those of [`WINDOW_BYTES`] in pages of 4 KiB. It
/// bounds the buffer for a log of smaller pages.
const WINDOW_PAGES: u64 = WINDOW_BYTES >> 12;

/// Why a translated log has nothing to report.
#[derive(Debug, thiserror::Error)]
pub enum TranslateError {
    /// It was not started.
    #[error("the log was not started: start it first")]
    NotStarted,
    /// What was written since is not known; see [`translate`](super).
    #[error("an earlier report failed: start the log anew and take every page as dirty")]
    Lost,
    /// A bitmap cannot be made for what was asked.
    #[error("no bitmap for what the log reports")]
    Bitmap(#[from] BitmapError),
}

/// What the log is in.
enum Phase {
    Off,
    /// It runs; the bitmap is what it reports into.
    On(IovaBitmap),
    /// A report failed.
    Lost,
}

/// How to learn what was written.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Learn {
    /// The log says it.
    Ask,
    /// Nobody knows any more: everything.
    Assume,
}

/// A log, where its addresses lead, and what it named that nobody asked for yet.
pub(super) struct State {
    log: Box<dyn IovaLog>,
    map: IovaMap,
    /// The most bytes to read of the log at once.
    most: u64,
    phase: Phase,
    pending: Pending,
}

impl State {
    pub(super) fn new(log: Box<dyn IovaLog>, map: IovaMap, most: u64) -> Self {
        Self {
            log,
            map,
            most: most.min(WINDOW_BYTES),
            phase: Phase::Off,
            pending: Pending::default(),
        }
    }

    pub(super) fn granularity(&self) -> PageSize {
        self.log.granularity()
    }

    pub(super) fn precision(&self) -> Precision {
        match self.log.precision() {
            Precision::Exact if !self.map.is_aligned_to(self.log.granularity()) => {
                Precision::Coarse
            }
            precision => precision,
        }
    }

    pub(super) fn pages_outside_ram(&self) -> u64 {
        self.pending.outside()
    }

    pub(super) fn map(&self) -> &IovaMap {
        &self.map
    }

    /// Starts the log for all the aperture; `ram` is what is wanted of it, by GPA.
    pub(super) fn start(&mut self, ram: &[IovaRange]) -> Result<(), DirtyError> {
        self.phase = Phase::Off;
        self.pending
            .restart(ram)
            .map_err(|error| self.failed("start", error.into()))?;
        self.log.start(self.map.aperture())?;
        let page = self.log.granularity();
        match IovaBitmap::new(Iova(0), self.window_bytes(page), page) {
            Ok(buffer) => {
                self.phase = Phase::On(buffer);
                Ok(())
            }
            Err(error) => {
                // The first error is the one to tell.
                let _ = self.log.stop();
                Err(self.failed("start", error.into()))
            }
        }
    }

    pub(super) fn stop(&mut self) -> Result<(), DirtyError> {
        self.phase = Phase::Off;
        self.log.stop()
    }

    /// Reads the log's next window at or after `from` and keeps the guest pages it names: where to go
    /// on, or `None` at the end of all mappings.
    pub(super) fn read_next(&mut self, from: Iova) -> Result<Option<Iova>, DirtyError> {
        self.check_on()?;
        self.read_window(from, IovaRange::ALL.last(), Learn::Ask)
    }

    /// Moves what is kept of `window`, by GPA, to `bitmap`: how many pages of it those were, and
    /// where the window that follows starts.
    pub(super) fn give_out(
        &mut self,
        window: IovaRange,
        bitmap: &mut IovaBitmap,
    ) -> Result<(u64, Option<Iova>), DirtyError> {
        self.check_on()?;
        self.pending
            .give_out(window, bitmap)
            .ok_or_else(|| DirtyError::not_tracked(self.log.id(), window))
    }

    /// Adds `mapping`, which `install` then makes for the device.
    pub(super) fn add<E>(
        &mut self,
        mapping: Mapping,
        install: impl FnOnce() -> Result<(), E>,
    ) -> Result<(), ChangeError<E>> {
        self.map.check(mapping)?;
        // Known before the device can write to it.
        self.map.insert(mapping);
        install().map_err(|error| {
            // It may have been there for a moment. That error is the one to tell; one of the log is
            // told by its next report.
            let _ = self.forget(mapping.iova());
            ChangeError::Device(error)
        })
    }

    /// Takes the mappings in `range` away, which `remove` did for the device.
    pub(super) fn remove<E>(
        &mut self,
        range: IovaRange,
        remove: impl FnOnce() -> Result<(), E>,
    ) -> Result<(), ChangeError<E>> {
        self.map.check_whole(range)?;
        if let Err(error) = remove() {
            // Some of it may be gone all the same, and what a log knew of it.
            if self.log.after_unmap() == AfterUnmap::Forgotten {
                let _ = self.read_unmapped(range);
            }
            return Err(ChangeError::Device(error));
        }
        self.forget(range).map_err(ChangeError::Log)
    }

    /// Takes the mappings in `range` out of the table, to which the device writes no more, and keeps
    /// what it wrote.
    fn forget(&mut self, range: IovaRange) -> Result<(), DirtyError> {
        let read = self.read_unmapped(range);
        self.map.remove(range);
        read
    }

    /// Keeps what was written by the mappings in `range`, if a log runs.
    fn read_unmapped(&mut self, range: IovaRange) -> Result<(), DirtyError> {
        let learn = match self.log.after_unmap() {
            AfterUnmap::Kept => Learn::Ask,
            AfterUnmap::Forgotten => Learn::Assume,
        };
        let mut from = Some(range.first());
        while let Some(at) = from {
            from = match self.phase {
                Phase::On(_) => self.read_window(at, range.last(), learn)?,
                // Nobody wants to know, or all is dirty as it is.
                Phase::Off | Phase::Lost => None,
            };
        }
        Ok(())
    }

    /// Keeps the guest pages written in the next window of the log at or after `from`, up to `until`:
    /// where to go on. After an error the log is [lost](Phase::Lost).
    fn read_window(
        &mut self,
        from: Iova,
        until: Iova,
        learn: Learn,
    ) -> Result<Option<Iova>, DirtyError> {
        let page = self.log.granularity();
        let most = self.window_bytes(page);
        let Some(window) = self.map.stretch(from, until, page, most) else {
            return Ok(None);
        };
        let read = self.read(window, learn);
        if read.is_err() {
            self.phase = Phase::Lost;
        }
        read.map(|()| window.last().0.checked_add(1).map(Iova))
    }

    fn read(&mut self, window: IovaRange, learn: Learn) -> Result<(), DirtyError> {
        let Phase::On(buffer) = &mut self.phase else {
            return self.check_on();
        };
        if let Err(error) = buffer.retarget(window) {
            return Err(self.failed("report", error.into()));
        }
        match learn {
            Learn::Ask => {
                self.log.report(window, buffer)?;
            }
            Learn::Assume => buffer.set_all(),
        }
        for mapping in self.map.touching(window) {
            self.pending.add(buffer, mapping);
        }
        Ok(())
    }

    /// The largest window to read of a log with pages of this size: whole pages, one at least.
    fn window_bytes(&self, page: PageSize) -> u64 {
        let most = page.bytes().saturating_mul(WINDOW_PAGES).min(self.most);
        (most & !(page.bytes() - 1)).max(page.bytes())
    }

    fn check_on(&self) -> Result<(), DirtyError> {
        match self.phase {
            Phase::On(_) => Ok(()),
            Phase::Off => Err(self.failed("report", TranslateError::NotStarted)),
            Phase::Lost => Err(self.failed("report", TranslateError::Lost)),
        }
    }

    fn failed(&self, operation: &'static str, cause: TranslateError) -> DirtyError {
        DirtyError::backend(self.log.id(), operation, cause)
    }
}
