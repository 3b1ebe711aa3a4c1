//! Guest memory, with a log of what this process writes to it.
//!
//! A vCPU's writes are logged by KVM and a device's DMA by the device; what the VMM itself writes
//! (virtio rings and buffers, firmware tables, restored state) it must log itself. It does so
//! always, not only during a migration: every region of a [`GuestMemory`] carries a [`WriteLog`],
//! in which each write through `vm-memory` sets the bits of its pages. That costs an atomic OR per
//! write, and there is no moment at which logging is being turned on and a write slips by.
//!
//! `vm-memory` sees only writes made through it. Who writes through a raw pointer (a `readv` into
//! guest buffers, io_uring, another library) calls [`mark_written`] *after* the write is complete
//! and before the guest is told of it.
//!
//! # Why a reader of the log misses nothing
//!
//! A writer writes, then sets the bit; the migration loop takes the bit ([`WriteLog::drain`]), then
//! reads the page. Both touch the bit's word with an atomic read-modify-write, so these are in one
//! order. If the writer's came first, the drain gets the bit, and by release and acquire sees the
//! write when it reads the page. If it came second, the bit stays for the next drain.
//!
//! That holds only because the OR is unconditional. To skip it when the bit is found set is
//! tempting and loses writes: the load that finds it may run while the write still sits in the CPU's
//! store buffer (a store followed by a load of another address is the one reordering x86 does). The
//! loop then takes the bit and reads the page, both before the write arrives, and nothing tells of
//! it any more.

use std::fs::File;
use std::sync::atomic::{AtomicU64, Ordering};

use vm_memory::bitmap::{Bitmap, NewBitmap, RefSlice, WithBitmapSlice};
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryAtomic, GuestMemoryBackend, GuestMemoryMmap,
    GuestMemoryRegion, GuestRegionMmap, MmapRegion,
};

use crate::addr::{Gpa, Iova, IovaRange, PageSize};
use crate::iova_bitmap::{BitmapError, IovaBitmap};

/// All of a guest's RAM, mapped into this process, with a [`WriteLog`] for each region.
pub type GuestMemory = GuestMemoryMmap<WriteLog>;

/// A shared handle on guest memory whose regions can be replaced (memory hotplug).
pub type MemoryHandle = GuestMemoryAtomic<GuestMemory>;

/// The page size of a [`WriteLog`].
pub const LOG_PAGE: PageSize = PageSize::SIZE_4K;

/// Pages that one word of the log stands for.
const WORD_PAGES: usize = 64;

/// Bytes that one word of the log stands for.
const WORD_BYTES: usize = WORD_PAGES << LOG_PAGE.shift();

/// Why guest memory could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// A region is empty, too large for this host, not made of whole 4 KiB pages, or runs past the
    /// end of the address space.
    #[error(
        "RAM of {len:#x} bytes at GPA {gpa} cannot be mapped: it must be whole 4 KiB pages within \
         the address space"
    )]
    BadRegion {
        /// Where the region starts.
        gpa: Gpa,
        /// Its length in bytes.
        len: u64,
    },
    /// A region's mapping failed.
    #[error(
        "cannot map {len:#x} bytes of RAM for GPA {gpa}: check free memory and the file's size"
    )]
    Map {
        /// Where the region starts.
        gpa: Gpa,
        /// Its length in bytes.
        len: u64,
        /// What failed.
        #[source]
        source: vm_memory::mmap::MmapRegionError,
    },
    /// A regular file ends before the region does; touching the rest would kill the process.
    #[error(
        "the file for GPA {gpa} has {file_bytes:#x} bytes but the region needs {needed:#x}: \
         extend it first"
    )]
    FileTooShort {
        /// Where the region starts.
        gpa: Gpa,
        /// Size of the file in bytes.
        file_bytes: u64,
        /// Offset in the file and length of the region together (at most `u64::MAX`).
        needed: u64,
    },
    /// A file's size could not be read.
    #[error("cannot read the size of the file for GPA {gpa}")]
    FileSize {
        /// Where the region starts.
        gpa: Gpa,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
    /// The regions are not in rising order, or overlap, or there are none.
    #[error("the RAM regions do not make up a guest's memory: sort them and let none overlap")]
    Layout(#[source] vm_memory::GuestRegionCollectionError),
}

/// What a region of guest memory is made of.
#[derive(Debug)]
pub enum Backing {
    /// Private pages of this process.
    Anonymous,
    /// A file (a memfd, hugetlbfs, another process's memory), mapped shared so that others who map
    /// it see the same bytes.
    File {
        /// The file.
        file: File,
        /// Where in the file the region starts, in bytes.
        offset: u64,
    },
}

/// One region of guest RAM to be mapped.
#[derive(Debug)]
pub struct RamMapping {
    /// Where it is in guest physical memory, a multiple of 4 KiB.
    pub gpa: Gpa,
    /// Length in bytes, a multiple of 4 KiB.
    pub len: u64,
    /// What it is made of.
    pub backing: Backing,
}

/// Maps guest RAM readable and writable into this process; `mappings` are in rising order of GPA.
///
/// # Errors
/// If a region is not made of whole pages, cannot be mapped (a file too short included), or
/// overlaps another.
pub fn map_ram(mappings: Vec<RamMapping>) -> Result<GuestMemory, MemoryError> {
    let regions = mappings
        .into_iter()
        .map(map_region)
        .collect::<Result<Vec<_>, _>>()?;
    GuestMemory::from_regions(regions).map_err(MemoryError::Layout)
}

fn map_region(mapping: RamMapping) -> Result<GuestRegionMmap<WriteLog>, MemoryError> {
    let RamMapping { gpa, len, backing } = mapping;
    let bad = || MemoryError::BadRegion { gpa, len };
    if len == 0 || (gpa.0 | len) & (LOG_PAGE.bytes() - 1) != 0 {
        return Err(bad());
    }
    let size = usize::try_from(len).map_err(|_| bad())?;
    let mapped = match backing {
        Backing::Anonymous => MmapRegion::new(size),
        Backing::File { file, offset } => {
            check_file(gpa, len, &file, offset)?;
            MmapRegion::from_file(FileOffset::new(file, offset), size)
        }
    }
    .map_err(|source| MemoryError::Map { gpa, len, source })?;
    GuestRegionMmap::new(mapped, GuestAddress(gpa.0)).ok_or_else(bad)
}

/// A contiguous piece of guest RAM.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RamRegion {
    /// Where it starts.
    pub gpa: Gpa,
    /// Length in bytes, a multiple of the host's page size.
    pub len: u64,
}

/// The RAM regions of `memory` in rising order, for [`GuestDirty`](crate::dirty::GuestDirty).
pub fn ram_regions(memory: &GuestMemory) -> Vec<RamRegion> {
    memory
        .iter()
        .map(|region| RamRegion {
            gpa: Gpa(region.start_addr().0),
            len: region.len(),
        })
        .collect()
}

/// Whether every byte of `range` is RAM.
pub fn is_ram(memory: &GuestMemory, range: IovaRange) -> bool {
    let ram = parts(memory, range).map(|part| u64::try_from(part.len).unwrap_or(0));
    range.len() == Some(ram.sum())
}

/// `mmap` takes a file that is too short, and the access then gets SIGBUS; so it is checked here.
/// Device files have no size to check.
fn check_file(gpa: Gpa, len: u64, file: &File, offset: u64) -> Result<(), MemoryError> {
    let metadata = file
        .metadata()
        .map_err(|source| MemoryError::FileSize { gpa, source })?;
    let needed = offset.saturating_add(len);
    if metadata.is_file() && metadata.len() < needed {
        return Err(MemoryError::FileTooShort {
            gpa,
            file_bytes: metadata.len(),
            needed,
        });
    }
    Ok(())
}

/// Logs that `len` bytes from `start` were written by this process other than through `vm-memory`.
///
/// Call it when the write is complete and before the guest is told of it (see the
/// [module](self) for why in this order). What is not RAM is left out.
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
/// What of the window is not RAM adds nothing; what is outside the window stays in the log.
///
/// # Errors
/// If `bitmap` does not cover the window, whose pages would then be lost, or a region does not
/// start at a page. Nothing was taken then.
pub fn drain_writes(
    memory: &GuestMemory,
    window: IovaRange,
    bitmap: &mut IovaBitmap,
) -> Result<(), DrainError> {
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
    for part in parts(memory, window) {
        let base = Iova(part.region.start_addr().0);
        log_of(part.region).drain(part.offset, part.len, base, bitmap)?;
    }
    Ok(())
}

/// Forgets what the logs of `memory` have for `window`.
pub fn forget_writes(memory: &GuestMemory, window: IovaRange) {
    for part in parts(memory, window) {
        log_of(part.region).take(part.offset, part.len, |_, _| ());
    }
}

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
/// See the [module](self) for how it is written and read without losing a write.
#[derive(Debug, Default)]
pub struct WriteLog {
    /// Bit `n % 64` of word `n / 64` is page `n` of the region.
    words: Box<[AtomicU64]>,
}

impl WriteLog {
    /// Sets the bits of the pages that `len` bytes at `offset` touch: one atomic OR per word,
    /// always done (see the [module](self) for why).
    fn mark(&self, offset: usize, len: usize) {
        for (_, word, mask) in self.span(offset, len) {
            // Release: whoever takes the bit by an acquire sees the write that came before this.
            word.fetch_or(mask, Ordering::Release);
        }
    }

    /// Moves the bits of the pages that `len` bytes at `offset` touch into `bitmap`; byte 0 of the
    /// log's region is at `base` there.
    ///
    /// # Errors
    /// If `base` is not a multiple of 4 KiB, or the region runs past 2^64. Nothing was taken then.
    pub fn drain(
        &self,
        offset: usize,
        len: usize,
        base: Iova,
        bitmap: &mut IovaBitmap,
    ) -> Result<(), BitmapError> {
        // No bits are ORed, but a misaligned base is refused before any is taken.
        bitmap.or_words(base, LOG_PAGE, &[])?;
        let mut refused = Ok(());
        self.take(offset, len, |index, bits| {
            let start = index
                .checked_mul(WORD_BYTES)
                .and_then(|start| u64::try_from(start).ok())
                .and_then(|start| base.0.checked_add(start));
            // A word that starts beyond 2^64 stands for no address.
            if let Some(start) = start
                && let Err(error) = bitmap.or_words(Iova(start), LOG_PAGE, &[bits])
            {
                refused = Err(error);
            }
        });
        refused
    }

    /// Takes the bits of the pages that `len` bytes at `offset` touch and gives each word that had
    /// some to `got`, with its index.
    fn take(&self, offset: usize, len: usize, mut got: impl FnMut(usize, u64)) {
        for (index, word, mask) in self.span(offset, len) {
            // A clean word is not written to, so its cache line stays shared with the writers. A
            // bit set after this load is there for the next drain; before the last one the writers
            // have stopped, which whoever stopped them has synchronised with.
            if word.load(Ordering::Relaxed) & mask == 0 {
                continue;
            }
            // Acquire: see `mark`.
            let bits = if mask == u64::MAX {
                word.swap(0, Ordering::Acquire)
            } else {
                word.fetch_and(!mask, Ordering::Acquire) & mask
            };
            got(index, bits);
        }
    }

    /// The words that `len` bytes at `offset` touch, with their index and the mask of the touched
    /// pages.
    fn span(&self, offset: usize, len: usize) -> impl Iterator<Item = (usize, &AtomicU64, u64)> {
        let first = offset >> LOG_PAGE.shift();
        let last = offset.saturating_add(len.saturating_sub(1)) >> LOG_PAGE.shift();
        let (first_word, last_word) = (first / WORD_PAGES, last / WORD_PAGES);
        let end = last_word.saturating_add(1).min(self.words.len());
        let words = if len == 0 {
            None
        } else {
            self.words.get(first_word..end)
        };
        words
            .unwrap_or_default()
            .iter()
            .zip(first_word..)
            .map(move |(word, index)| {
                let mut mask = u64::MAX;
                if index == first_word {
                    mask &= u64::MAX << (first % WORD_PAGES);
                }
                if index == last_word {
                    mask &= u64::MAX >> (WORD_PAGES - 1 - last % WORD_PAGES);
                }
                (index, word, mask)
            })
    }
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
            .any(|(_, word, mask)| word.load(Ordering::Acquire) & mask != 0)
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

#[cfg(test)]
mod tests;
