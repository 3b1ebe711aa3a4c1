//! The log of what this process writes to guest memory; the why is told in
//! [`memory`](crate::memory).

use std::sync::atomic::Ordering;

use vm_memory::bitmap::{Bitmap, NewBitmap, RefSlice, WithBitmapSlice};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap, MmapRegion};

use super::GuestMemory;
use super::bits::{self, WORD_PAGES};
use crate::addr::{Gpa, Iova, IovaRange, PageSize};
use crate::sync::AtomicU64;
use iova_bitmap::{BitmapError, IovaBitmap};

/// The page size of a [`WriteLog`].
pub const LOG_PAGE: PageSize = PageSize::SIZE_4K;

/// Bytes that one word of the log stands for.
const WORD_BYTES: usize = WORD_PAGES << LOG_PAGE.shift();

/// Why the log of this process's writes could not be drained.
#[derive(Debug, thiserror::Error)]
pub enum DrainError {
    /// The bitmap to drain into would lose pages.
    #[error("the bitmap does not cover the window {first}..={last}: give one that does")]
    NotCovered {
        /// The window's first address.
        first: Iova,
        /// The window's last address.
        last: Iova,
    },
    /// A RAM region does not start at a page, so its pages have no addresses.
    #[error("the RAM region at GPA {0} does not start at a 4 KiB page: align it")]
    RegionMisaligned(Gpa),
    /// The bitmap refused the bits.
    #[error("the bitmap refused the log's bits")]
    Bitmap(#[from] BitmapError),
}

/// Logs that `len` bytes from `start` were written by this process other than through `vm-memory`.
///
/// Call it when the write is complete and before the guest is told of it (see
/// [`memory`](crate::memory) for why in this order). What is not RAM is left out.
pub fn mark_written(memory: &GuestMemory, start: GuestAddress, len: usize) {
    // A buffer nearly always lies in one region: find that by search, and go through all of them
    // only if it does not.
    if let Some((region, offset)) = memory.to_region_addr(start)
        && let Ok(offset) = usize::try_from(offset.0)
        && offset
            .checked_add(len)
            .is_some_and(|end| end <= region.size())
    {
        return log_of(region).mark(offset, len);
    }
    if let Some(range) = range_from(start.0, len) {
        for part in parts(memory, range) {
            log_of(part.region).mark(part.offset, part.len);
        }
    }
}

/// Moves what the logs of `memory` have for `window` into `bitmap`, whose IOVAs are GPAs.
///
/// What of the window is not RAM adds nothing; what is outside the window stays in the log. Returns
/// how many pages of `bitmap` were named.
///
/// # Errors
/// If `bitmap` does not cover the window, whose pages would then be lost, or a region does not
/// start at a page. Nothing was taken then.
pub fn drain_writes(
    memory: &GuestMemory,
    window: IovaRange,
    bitmap: &mut IovaBitmap,
) -> Result<u64, DrainError> {
    if !bitmap.covers(window) {
        return Err(DrainError::NotCovered {
            first: window.first(),
            last: window.last(),
        });
    }
    for region in memory.iter() {
        if region.start_addr().0 % LOG_PAGE.bytes() != 0 {
            return Err(DrainError::RegionMisaligned(Gpa(region.start_addr().0)));
        }
    }
    let mut named = 0;
    for part in parts(memory, window) {
        let base = Iova(part.region.start_addr().0);
        named += log_of(part.region).drain(part.offset, part.len, base, bitmap)?;
    }
    Ok(named)
}

/// Forgets what the logs of `memory` have for `window`.
pub fn forget_writes(memory: &GuestMemory, window: IovaRange) {
    for part in parts(memory, window) {
        log_of(part.region).forget(part.offset, part.len);
    }
}

/// Whether every byte of `range` is RAM.
pub fn is_ram(memory: &GuestMemory, range: IovaRange) -> bool {
    let ram = parts(memory, range).map(|part| u64::try_from(part.len).unwrap_or(0));
    range.len() == Some(ram.sum())
}

/// What of a region lies in a range of GPAs.
struct Part<'a> {
    region: &'a GuestRegionMmap<WriteLog>,
    /// In bytes from the region's start.
    offset: usize,
    /// In bytes.
    len: usize,
}

/// The parts of guest RAM that lie in `range`.
fn parts(memory: &GuestMemory, range: IovaRange) -> impl Iterator<Item = Part<'_>> {
    memory.iter().filter_map(move |region| {
        let start = region.start_addr().0;
        let common = range_from(start, region.size())?.intersection(range)?;
        Some(Part {
            region,
            offset: usize::try_from(common.first().0 - start).ok()?,
            len: usize::try_from(common.len()?).ok()?,
        })
    })
}

fn range_from(start: u64, len: usize) -> Option<IovaRange> {
    IovaRange::new(Iova(start), u64::try_from(len).ok()?)
}

/// The region's own log: the trait method of the same name gives a slice of it, which can only
/// mark.
fn log_of(region: &GuestRegionMmap<WriteLog>) -> &WriteLog {
    MmapRegion::bitmap(region)
}

/// Which 4 KiB pages of a region were written by this process since they were last drained.
///
/// See [`memory`](crate::memory) for how it is written and read without losing a write.
#[derive(Debug, Default)]
pub struct WriteLog {
    /// Bit `n % 64` of word `n / 64` is page `n` of the region.
    words: Box<[AtomicU64]>,
}

impl WriteLog {
    /// Sets the bits of the pages that `len` bytes at `offset` touch: one atomic OR per word,
    /// always done (see [`memory`](crate::memory) for why).
    fn mark(&self, offset: usize, len: usize) {
        for (word, mask) in self.span(offset, len) {
            // Release: whoever takes the bit by an acquire sees the write that came before this.
            word.fetch_or(mask, Ordering::Release);
        }
    }

    /// Moves the bits of the pages that `len` bytes at `offset` touch into `bitmap`; byte 0 of the
    /// log's region is at `base` there. Returns how many pages of `bitmap` were named.
    ///
    /// # Errors
    /// If `base` is not a multiple of 4 KiB, or the region runs past 2^64. Nothing was taken then.
    pub fn drain(
        &self,
        offset: usize,
        len: usize,
        base: Iova,
        bitmap: &mut IovaBitmap,
    ) -> Result<u64, BitmapError> {
        match pages(offset, len) {
            Some(pages) => bits::take_bits(&self.words, pages, base, bitmap),
            // A misaligned base is refused all the same.
            None => bitmap.or_words(base, LOG_PAGE, &[]),
        }
    }

    /// Takes the bits of the pages that `len` bytes at `offset` touch, and forgets them.
    fn forget(&self, offset: usize, len: usize) {
        for (word, mask) in self.span(offset, len) {
            bits::take_word(word, mask);
        }
    }

    /// The words that `len` bytes at `offset` touch, with the mask of the touched pages.
    fn span(&self, offset: usize, len: usize) -> impl Iterator<Item = (&AtomicU64, u64)> {
        let words = pages(offset, len).map(|(first, last)| bits::span(&self.words, first, last));
        words
            .into_iter()
            .flatten()
            .map(|(_, word, mask)| (word, mask))
    }
}

/// The first and the last page that `len` bytes at `offset` touch.
fn pages(offset: usize, len: usize) -> Option<(usize, usize)> {
    let last = offset.saturating_add(len.checked_sub(1)?);
    Some((offset >> LOG_PAGE.shift(), last >> LOG_PAGE.shift()))
}

impl<'a> WithBitmapSlice<'a> for WriteLog {
    type S = RefSlice<'a, Self>;
}

impl Bitmap for WriteLog {
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.mark(offset, len);
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.span(offset, 1)
            .any(|(word, mask)| word.load(Ordering::Acquire) & mask != 0)
    }

    fn slice_at(&self, offset: usize) -> RefSlice<'_, Self> {
        RefSlice::new(self, offset)
    }
}

impl NewBitmap for WriteLog {
    fn with_len(len: usize) -> Self {
        let words = len.div_ceil(WORD_BYTES);
        Self {
            words: (0..words).map(|_| AtomicU64::new(0)).collect(),
        }
    }
}
