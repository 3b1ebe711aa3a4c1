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
//! What it had not reported is unknown, and may have been cleared. [`GuestDirty::collect`] then
//! marks *every* page dirty and returns the error: the engine fails this migration, and whoever
//! tries again with the same `GuestDirty` sends everything. "Clean" is never concluded from an
//! error.
//!
//! A guest's RAM is a few regions with holes between; each has a bitmap at the host's page size for
//! what is dirty, one for what is in flight, and one into which sources report, reused so that a
//! round allocates nothing.

#[cfg(test)]
mod fakes;
#[cfg(test)]
mod model;
#[cfg(test)]
mod tests;
mod vmm_writes;

use std::time::{Duration, Instant};

use crate::addr::{Gpa, Iova, IovaRange, PageSize};
use crate::iova_bitmap::{BitmapError, IovaBitmap};
use crate::memory::RamRegion;
use crate::source::{DirtyError, DirtySource, Precision};

pub use vmm_writes::{VMM_SOURCE_ID, VmmWriteSource};

/// Pages next to each other, to be sent in one go.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct GpaRun {
    /// Where they start.
    pub gpa: Gpa,
    /// Length in bytes, whole host pages.
    pub len: u64,
}

/// What one source said in one [`GuestDirty::collect`].
#[derive(Clone, PartialEq, Eq, Debug, serde::Serialize)]
pub struct SourceReport {
    /// The source's [`DirtySource::id`].
    pub id: String,
    /// Host pages it reported, whether or not another source reported them too.
    pub pages: u64,
    /// How exact it is.
    pub precision: Precision,
    /// The page size it tracks at, in bytes.
    pub granularity: u64,
    /// How long its report took, all regions together.
    pub took: Duration,
}

/// Why dirty tracking of a guest cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum RamLayoutError {
    /// There is no RAM to track.
    #[error("the guest has no RAM region: give at least one")]
    Empty,
    /// A region does not consist of whole pages.
    #[error(
        "RAM of {len:#x} bytes at GPA {gpa} is not whole pages of {page_bytes:#x} bytes: align both"
    )]
    Misaligned {
        /// Where the region starts.
        gpa: Gpa,
        /// Its length in bytes.
        len: u64,
        /// The host's page size in bytes.
        page_bytes: u64,
    },
    /// Regions overlap or are not in rising order.
    #[error("the RAM region at GPA {gpa} starts before the end of the one before it: sort them")]
    OutOfOrder {
        /// Where the later region starts.
        gpa: Gpa,
    },
    /// A region's bitmaps cannot be made.
    #[error("no dirty bitmaps for the RAM at GPA {gpa}")]
    Bitmap {
        /// Where the region starts.
        gpa: Gpa,
        /// What was wrong.
        #[source]
        source: BitmapError,
    },
}

/// The bitmaps of one RAM region, whose IOVAs are GPAs.
#[derive(Debug)]
struct Region {
    dirty: IovaBitmap,
    in_flight: IovaBitmap,
    /// Clean but while a source reports.
    report: IovaBitmap,
}

impl Region {
    fn new(region: RamRegion, page: PageSize) -> Result<Self, RamLayoutError> {
        let RamRegion { gpa, len } = region;
        if (gpa.0 | len) & (page.bytes() - 1) != 0 {
            return Err(RamLayoutError::Misaligned {
                gpa,
                len,
                page_bytes: page.bytes(),
            });
        }
        let bitmap = || {
            IovaBitmap::new(Iova(gpa.0), len, page)
                .map_err(|source| RamLayoutError::Bitmap { gpa, source })
        };
        Ok(Self {
            dirty: bitmap()?,
            in_flight: bitmap()?,
            report: bitmap()?,
        })
    }
}

/// The pages of a guest that are dirty, or on their way; see the [module](self).
#[derive(Debug)]
pub struct GuestDirty {
    page: PageSize,
    regions: Vec<Region>,
    /// Where [`Self::next_run`] goes on: a region's index and an address, before which the region
    /// has nothing dirty.
    cursor: (usize, Iova),
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
        let mut made: Vec<Region> = Vec::with_capacity(regions.len());
        for region in regions {
            let next = Region::new(*region, page)?;
            if let Some(previous) = made.last()
                && next.dirty.range().first() <= previous.dirty.range().last()
            {
                return Err(RamLayoutError::OutOfOrder { gpa: region.gpa });
            }
            made.push(next);
        }
        if made.is_empty() {
            return Err(RamLayoutError::Empty);
        }
        Ok(Self {
            page,
            regions: made,
            cursor: START,
        })
    }

    /// The page size things are counted in.
    pub fn page_size(&self) -> PageSize {
        self.page
    }

    /// The RAM tracked, as [`DirtySource::start`] wants it.
    pub fn ranges(&self) -> Vec<IovaRange> {
        self.regions
            .iter()
            .map(|region| region.dirty.range())
            .collect()
    }

    /// How many pages of RAM there are.
    pub fn total_pages(&self) -> u64 {
        self.sum(|region| region.dirty.pages())
    }

    /// How many pages are dirty, those only in flight not counted.
    pub fn dirty_pages(&self) -> u64 {
        self.sum(|region| region.dirty.count())
    }

    /// How many pages are in flight.
    pub fn in_flight_pages(&self) -> u64 {
        self.sum(|region| region.in_flight.count())
    }

    /// Makes every page dirty: the first round, or nothing is known.
    pub fn mark_all(&mut self) {
        for region in &mut self.regions {
            region.dirty.set_all();
        }
        self.cursor = START;
    }

    /// Takes what every source has to report, and starts a new round: [`next_run`](Self::next_run)
    /// begins anew at the lowest page.
    ///
    /// # Errors
    /// The first source's that fails. Every page is dirty then; the sources behind it were not
    /// asked.
    pub fn collect(
        &mut self,
        sources: &mut [Box<dyn DirtySource>],
    ) -> Result<Vec<SourceReport>, DirtyError> {
        self.cursor = START;
        let mut reports = Vec::with_capacity(sources.len());
        for source in sources {
            match self.collect_one(source.as_mut()) {
                Ok(report) => reports.push(report),
                Err(error) => {
                    self.mark_all();
                    return Err(error);
                }
            }
        }
        Ok(reports)
    }

    fn collect_one(&mut self, source: &mut dyn DirtySource) -> Result<SourceReport, DirtyError> {
        let mut took = Duration::ZERO;
        let mut pages = 0;
        for region in &mut self.regions {
            let window = region.report.range();
            let started = Instant::now();
            let reported = source.report(window, &mut region.report);
            took += started.elapsed();
            pages += region.report.count();
            // On an error too: the report must be clean for the next one.
            region.report.take_into(&mut region.dirty);
            reported?;
        }
        Ok(SourceReport {
            id: source.id().to_owned(),
            pages,
            precision: source.precision(),
            granularity: source.granularity().bytes(),
            took,
        })
    }

    /// The next pages to send, in rising order and at most `max_bytes` (but at least one page);
    /// they are in flight from now on. `None` ends the round.
    ///
    /// In a round no page is given twice.
    pub fn next_run(&mut self, max_bytes: u64) -> Option<GpaRun> {
        loop {
            let (index, from) = self.cursor;
            let region = self.regions.get_mut(index)?;
            let Some(run) = region.dirty.next_run(from, max_bytes) else {
                self.cursor = (index + 1, Iova(0));
                continue;
            };
            region.dirty.clear_range(run);
            region.in_flight.set_range(run);
            self.cursor = match run.last().0.checked_add(1) {
                Some(next) => (index, Iova(next)),
                None => (index + 1, Iova(0)),
            };
            // A region's length is a `u64`, so that of a run in it is too.
            let len = run.len()?;
            return Some(GpaRun {
                gpa: Gpa(run.first().0),
                len,
            });
        }
    }

    /// The destination has every page given out so far: none is in flight any more.
    ///
    /// Call it only when all runs since the last `acknowledge` or `put_back` are confirmed.
    pub fn acknowledge(&mut self) {
        for region in &mut self.regions {
            region.in_flight.clear();
        }
    }

    /// Makes the pages in flight dirty again: whether the destination has them is not known.
    /// The round starts anew.
    pub fn put_back(&mut self) {
        for region in &mut self.regions {
            region.in_flight.take_into(&mut region.dirty);
        }
        self.cursor = START;
    }

    fn sum(&self, count: impl Fn(&Region) -> u64) -> u64 {
        self.regions.iter().map(count).sum()
    }
}
