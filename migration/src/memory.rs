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

mod bits;
mod log;
#[cfg(test)]
mod tests;

use std::fs::File;

use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryAtomic, GuestMemoryBackend, GuestMemoryMmap,
    GuestMemoryRegion, GuestRegionMmap, MmapRegion,
};

use crate::addr::Gpa;

pub use bits::take_bits;
pub use log::{DrainError, LOG_PAGE, WriteLog, drain_writes, forget_writes, is_ram, mark_written};

/// All of a guest's RAM, mapped into this process, with a [`WriteLog`] for each region.
pub type GuestMemory = GuestMemoryMmap<WriteLog>;

/// One region of a [`GuestMemory`].
pub type GuestRegion = GuestRegionMmap<WriteLog>;

/// A shared handle on guest memory whose regions can be replaced (memory hotplug).
pub type MemoryHandle = GuestMemoryAtomic<GuestMemory>;

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

fn map_region(mapping: RamMapping) -> Result<GuestRegion, MemoryError> {
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
    GuestRegion::new(mapped, GuestAddress(gpa.0)).ok_or_else(bad)
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
