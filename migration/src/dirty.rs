//! Which pages of the guest are still to be sent.
//!
//! Every writer of guest memory has its [`DirtySource`]. [`GuestDirty`] asks them all and keeps
//! the union, so that a page written by a vCPU and by a NIC is sent once. Each page of RAM is in
//! one of these places:
//!
//! ```text
//!                   collect                next_run                acknowledge
//!   at its source ───────────►   dirty   ────────────► in flight ──────────────► with the
//!        ▲                         ▲                       │                     destination
//!        │ written                 └───────────────────────┘                         │
//!        └─────────────────────────────   put_back         ◄─────────────────────────┘
//! ```
//!
//! A report clears at the source, so from [`GuestDirty::collect`] on the bits here are the only
//! record of those writes. They are kept until the destination is known to have the pages: a
//! connection that breaks, a cancelled or a retried migration calls [`GuestDirty::put_back`] and
//! nothing is lost. A page may be in flight and dirty at once: it was written after it was taken.
//!
//! # When a source fails
//!
//! What it had not reported is unknown, and may have been cleared. "Clean" is never concluded from an
//! error: [`GuestDirty::collect`] either starts the source anew and then marks *every* page dirty, or
//! marks every page dirty and returns the error, as [`Collect::restarts`] says. Whoever tries again
//! with the same `GuestDirty` sends everything.
//!
//! # Windows
//!
//! A guest's RAM is a few regions with holes between. They are cut into windows of at most
//! [`WINDOW_BYTES`], each with a bitmap at the host's page size of what is dirty and one of what is
//! in flight; both live as long as the migration, so that a round allocates nothing. Sources report
//! straight into the bitmap of what is dirty, all of them into one window before the next. It is
//! brought into the cache first, in order, and counted at the end while it is there. Or several
//! report at a time, each into a bitmap of its thread, which is then ORed in under the window's lock
//! ([`Collect::threads`]).
//!
//! # Two steps
//!
//! Some sources do not clear with the report but when told to ([`Clearing::BeforeSend`]). Pages are
//! handed out of chunks of 64 MiB: the dirty pages of a chunk are taken out of its window, then such
//! sources clear just these, and only then is the first of them handed out. So a page is read after
//! its record is cleared, and a write that this read misses is reported again.
//!
//! # How it is tested
//!
//! `dirty/model.rs` holds random histories against a naive model, one step after the other. The test
//! `schedules` (`tests/schedules`) runs writers, collections, the sending of pages and a connection
//! that breaks side by side, under a scheduler that chooses at random who goes on.

mod chunk;
mod collect;
#[cfg(test)]
mod fakes;
mod layout;
#[cfg(test)]
mod model;
#[cfg(test)]
mod tests;
mod vmm_writes;

use std::time::{Duration, Instant};

use iova_bitmap::IovaBitmap;

use crate::addr::{Gpa, Iova, IovaRange, PageSize};
use crate::memory::RamRegion;
use crate::source::{Clearing, DirtyError, DirtySource};
use crate::sync::Mutex;
use chunk::Chunk;
use layout::Window;

pub use collect::{Collect, SourceReport};
pub use layout::RamLayoutError;
pub use vmm_writes::{VMM_SOURCE_ID, VmmWriteSource};

/// The largest window of a report, in bytes of guest memory: its bitmap at 4 KiB pages, 512 KiB,
/// stays in a core's own cache while all sources set bits in it. Well below what a kernel before
/// 6.11 reports at a time (64 GiB: 512 pages of bitmap, drivers/vfio/iova_bitmap.c).
pub const WINDOW_BYTES: u64 = 16 << 30;

/// Pages next to each other, to be sent in one go.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct GpaRun {
    /// Where they start.
    pub gpa: Gpa,
    /// Length in bytes, whole host pages.
    pub len: u64,
}

/// The pages of a guest that are dirty, or on their way; see the [module](self).
#[derive(Debug)]
pub struct GuestDirty {
    page: PageSize,
    ranges: Vec<IovaRange>,
    /// Of all ranges, in rising order. Locked only while several threads collect.
    windows: Vec<Mutex<Window>>,
    /// What [`Self::next_run`] hands out.
    chunk: Chunk,
    /// Where the next chunk is looked for: a window's index and an address, before which the window
    /// has nothing dirty.
    cursor: (usize, Iova),
    /// Bitmaps of the threads that collect, made when first needed.
    scratch: Vec<IovaBitmap>,
    tracking_time: Duration,
}

/// Where a round starts.
const START: (usize, Iova) = (0, Iova(0));

impl GuestDirty {
    /// Tracks `regions`, which are in rising order, at the host's page size `page`. All is clean.
    ///
    /// # Errors
    /// If there is no region, if one is not whole pages, or overlaps another, or memory for its
    /// bitmaps is short.
    pub fn new(regions: &[RamRegion], page: PageSize) -> Result<Self, RamLayoutError> {
        Self::with_window(regions, page, WINDOW_BYTES)
    }

    /// As [`new`](Self::new), with windows of `bytes`, rounded down to whole words of 64 pages.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn with_window(
        regions: &[RamRegion],
        page: PageSize,
        bytes: u64,
    ) -> Result<Self, RamLayoutError> {
        let ranges = layout::ranges(regions, page)?;
        let windows = layout::windows(&ranges, page, bytes.min(WINDOW_BYTES))?;
        let chunk = Chunk::new(page).map_err(|source| RamLayoutError::Bitmap {
            gpa: Gpa::default(),
            source,
        })?;
        Ok(Self {
            page,
            ranges,
            windows,
            chunk,
            cursor: START,
            scratch: Vec::new(),
            tracking_time: Duration::ZERO,
        })
    }

    /// The page size things are counted in.
    pub fn page_size(&self) -> PageSize {
        self.page
    }

    /// The RAM tracked, as [`DirtySource::start`] wants it.
    pub fn ranges(&self) -> &[IovaRange] {
        &self.ranges
    }

    /// How many pages of RAM there are.
    pub fn total_pages(&self) -> u64 {
        self.sum(|window| window.dirty.pages())
    }

    /// How many pages are dirty, those only in flight not counted.
    pub fn dirty_pages(&self) -> u64 {
        self.chunk.left() + self.sum(|window| window.dirty_pages)
    }

    /// How many pages are in flight.
    pub fn in_flight_pages(&self) -> u64 {
        let chunk = self
            .chunk
            .window()
            .and_then(|index| self.windows.get(index));
        let beside = chunk.map_or(0, |window| self.chunk.in_flight_beside(&window.lock()));
        beside + self.sum(Window::in_flight_pages)
    }

    /// How long this has spent on finding dirty pages since it was made: reports, merging, clearing
    /// at the sources; not on reading or sending pages.
    pub fn tracking_time(&self) -> Duration {
        self.tracking_time
    }

    /// Makes every page dirty: the first round, or nothing is known.
    pub fn mark_all(&mut self) {
        self.give_back();
        for window in &mut self.windows {
            window.get_mut().mark_all();
        }
    }

    /// The next pages to send, in rising order and at most `max_bytes` (but at least one page);
    /// they are in flight from now on. `None` ends the round.
    ///
    /// In a round no page is given twice. `sources` are those whose records must be cleared first
    /// ([`Clearing::BeforeSend`]); none once nothing writes any more, as then nothing is written
    /// after the read.
    ///
    /// # Errors
    /// A source's that fails to clear. Every page is dirty then.
    pub fn next_run(
        &mut self,
        max_bytes: u64,
        sources: &mut [Box<dyn DirtySource>],
    ) -> Result<Option<GpaRun>, DirtyError> {
        loop {
            if let Some(run) = self.chunk.next_run(max_bytes) {
                // A window's length is a `u64`, so that of a run in it is too.
                return Ok(run.len().map(|len| GpaRun {
                    gpa: Gpa(run.first().0),
                    len,
                }));
            }
            let began = Instant::now();
            let taken = self.next_chunk(sources);
            self.tracking_time = self.tracking_time.saturating_add(began.elapsed());
            match taken {
                Ok(true) => {}
                Ok(false) => return Ok(None),
                Err(error) => {
                    self.mark_all();
                    return Err(error);
                }
            }
        }
    }

    /// Takes the dirty pages of the next chunk that has some out of its window and has them cleared
    /// at the sources; false if no page is dirty.
    fn next_chunk(&mut self, sources: &mut [Box<dyn DirtySource>]) -> Result<bool, DirtyError> {
        self.empty_chunk();
        let (mut index, mut from) = self.cursor;
        while let Some(window) = self.windows.get_mut(index) {
            if let Some(range) = self.chunk.take_from(index, window.get_mut(), from) {
                self.cursor = match range.last().0.checked_add(1) {
                    Some(next) => (index, Iova(next)),
                    None => (index + 1, Iova(0)),
                };
                for source in sources {
                    if let Clearing::BeforeSend(log) = source.clearing() {
                        log.clear(range, self.chunk.pages())?;
                    }
                }
                return Ok(true);
            }
            (index, from) = (index + 1, Iova(0));
            self.cursor = (index, from);
        }
        Ok(false)
    }

    /// What of the chunk was handed out is in flight, the rest dirty as before.
    fn empty_chunk(&mut self) {
        if let Some(index) = self.chunk.window()
            && let Some(window) = self.windows.get_mut(index)
        {
            self.chunk.give_back(window.get_mut());
        }
    }

    /// A new round begins; what of the chunk was not handed out is in it.
    fn give_back(&mut self) {
        self.empty_chunk();
        self.cursor = START;
    }

    /// The destination has every page given out so far: none is in flight any more.
    ///
    /// Call it only when all runs since the last `acknowledge` or `put_back` are confirmed.
    pub fn acknowledge(&mut self) {
        self.chunk.acknowledge();
        for window in &mut self.windows {
            window.get_mut().acknowledge();
        }
    }

    /// Makes the pages in flight dirty again: whether the destination has them is not known.
    /// The round starts anew.
    pub fn put_back(&mut self) {
        self.give_back();
        for window in &mut self.windows {
            window.get_mut().put_back();
        }
    }

    fn sum(&self, count: impl Fn(&Window) -> u64) -> u64 {
        self.windows
            .iter()
            .map(|window| count(&window.lock()))
            .sum()
    }
}
