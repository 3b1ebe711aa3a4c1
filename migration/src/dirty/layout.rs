//! The RAM that is tracked, and the windows it is cut into.

use iova_bitmap::{BitmapError, IovaBitmap};

use crate::addr::{Gpa, Iova, IovaRange, PageSize};
use crate::memory::RamRegion;
use crate::sync::Mutex;

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

/// The bitmaps of one window, whose IOVAs are GPAs.
#[derive(Debug)]
pub(super) struct Window {
    /// Pages to be sent.
    pub(super) dirty: IovaBitmap,
    /// Bits of `dirty` that are set, as of the last [`recount`](Self::recount) less what was taken.
    pub(super) dirty_pages: u64,
    in_flight: IovaBitmap,
    /// Whether a bit of `in_flight` may be set.
    any_in_flight: bool,
}

impl Window {
    fn new(range: IovaRange, page: PageSize) -> Result<Self, BitmapError> {
        Ok(Self {
            dirty: IovaBitmap::over(range, page)?,
            dirty_pages: 0,
            in_flight: IovaBitmap::over(range, page)?,
            any_in_flight: false,
        })
    }

    /// The addresses it is about.
    pub(super) fn range(&self) -> IovaRange {
        self.dirty.range()
    }

    /// Pages in flight.
    pub(super) fn in_flight_pages(&self) -> u64 {
        self.in_flight_in(self.range())
    }

    /// Pages of `range` in flight.
    pub(super) fn in_flight_in(&self, range: IovaRange) -> u64 {
        if self.any_in_flight {
            self.in_flight.count_in(range)
        } else {
            0
        }
    }

    /// Brings the bits that sources are about to set into the cache. Read in order they come several
    /// times faster than a bit here and a bit there, as devices set them.
    pub(super) fn warm(&self) {
        std::hint::black_box(self.dirty.count());
    }

    /// Counts what is dirty, after others have set bits.
    pub(super) fn recount(&mut self) {
        self.dirty_pages = self.dirty.count();
    }

    /// Makes every page dirty.
    pub(super) fn mark_all(&mut self) {
        self.dirty.set_all();
        self.dirty_pages = self.dirty.pages();
    }

    /// Takes what is set in `pages`: it is in flight.
    pub(super) fn send(&mut self, pages: &mut IovaBitmap) {
        self.any_in_flight |= pages.take_into(&mut self.in_flight) > 0;
    }

    /// What is in flight has arrived.
    pub(super) fn acknowledge(&mut self) {
        if self.any_in_flight {
            self.in_flight.clear();
            self.any_in_flight = false;
        }
    }

    /// What is in flight may not have arrived: it is dirty again.
    pub(super) fn put_back(&mut self) {
        if self.any_in_flight {
            self.in_flight.take_into(&mut self.dirty);
            self.any_in_flight = false;
            self.recount();
        }
    }
}

/// The ranges of `regions`, which are in rising order and whole pages.
pub(super) fn ranges(
    regions: &[RamRegion],
    page: PageSize,
) -> Result<Vec<IovaRange>, RamLayoutError> {
    let mut ranges: Vec<IovaRange> = Vec::with_capacity(regions.len());
    for RamRegion { gpa, len } in regions.iter().copied() {
        if (gpa.0 | len) & (page.bytes() - 1) != 0 {
            return Err(RamLayoutError::Misaligned {
                gpa,
                len,
                page_bytes: page.bytes(),
            });
        }
        let base = Iova(gpa.0);
        let range = IovaRange::new(base, len).ok_or(RamLayoutError::Bitmap {
            gpa,
            source: BitmapError::BadRange { base, len },
        })?;
        if ranges
            .last()
            .is_some_and(|before| range.first() <= before.last())
        {
            return Err(RamLayoutError::OutOfOrder { gpa });
        }
        ranges.push(range);
    }
    if ranges.is_empty() {
        return Err(RamLayoutError::Empty);
    }
    Ok(ranges)
}

/// Cuts `ranges` into windows of `bytes`, rounded down to whole words of 64 pages but at least one.
pub(super) fn windows(
    ranges: &[IovaRange],
    page: PageSize,
    bytes: u64,
) -> Result<Vec<Mutex<Window>>, RamLayoutError> {
    let word_bytes = page.bytes().saturating_mul(64);
    let step = (bytes / word_bytes).max(1).saturating_mul(word_bytes);
    let mut windows = Vec::new();
    for range in ranges {
        let mut next = Some(range.first());
        while let Some(first) = next.filter(|first| *first <= range.last()) {
            let last = first.0.saturating_add(step - 1).min(range.last().0);
            next = last.checked_add(1).map(Iova);
            let Some(window) = IovaRange::from_ends(first, Iova(last)) else {
                break;
            };
            let window = Window::new(window, page).map_err(|source| RamLayoutError::Bitmap {
                gpa: Gpa(first.0),
                source,
            })?;
            windows.push(Mutex::new(window));
        }
    }
    Ok(windows)
}
