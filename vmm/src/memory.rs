//! The guest's RAM: where it lies in the guest, what backs it on the host.

use std::fs::File;
use std::sync::Arc;

use rustix::fs::{MemfdFlags, SealFlags};
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionCollectionError,
    GuestRegionMmap, MmapRegion,
};
use vm_migration::memory::{GuestMemory, MemoryHandle, RamRegion, WriteLog};
use vm_migration::{Gpa, PageSize};

use crate::config::MemoryConfig;
use crate::layout;

/// Why guest RAM could not be made.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The host would not give memory.
    #[error("cannot {operation} {size} bytes of guest RAM{hint}")]
    Allocate {
        /// What was tried.
        operation: &'static str,
        /// How many bytes.
        size: u64,
        /// What to do, or nothing.
        hint: &'static str,
        /// What the system said.
        #[source]
        cause: std::io::Error,
    },
    /// The mapping could not be made.
    #[error("cannot map {size} bytes of guest RAM")]
    Map {
        /// How many bytes.
        size: u64,
        /// What the mapping said.
        #[source]
        cause: vm_memory::mmap::MmapRegionError,
    },
    /// The regions do not make a guest memory.
    #[error("cannot arrange guest RAM")]
    Arrange(#[source] GuestRegionCollectionError),
    /// The size is not one this host can address.
    #[error("guest RAM of {0} bytes is more than this host can address")]
    TooLarge(u64),
}

/// Guest RAM with what is needed to hand it to KVM and to other processes.
#[derive(Clone)]
pub struct Ram {
    handle: MemoryHandle,
    page_size: PageSize,
}

impl Ram {
    /// Makes the RAM that `config` asks for.
    ///
    /// # Errors
    /// See [`MemoryError`].
    pub fn new(config: &MemoryConfig) -> Result<Self, MemoryError> {
        let mut regions = Vec::new();
        for (start, size) in split(config.size) {
            regions.push(Arc::new(map_region(config, start, size)?));
        }
        let memory = GuestMemory::from_arc_regions(regions).map_err(MemoryError::Arrange)?;
        let page = u64::try_from(rustix::param::page_size()).unwrap_or(0);
        let page_size = PageSize::new(page).unwrap_or(PageSize::SIZE_4K);
        Ok(Self { handle: MemoryHandle::new(memory), page_size })
    }

    /// The memory as devices hold it.
    pub fn handle(&self) -> &MemoryHandle {
        &self.handle
    }

    /// The host's page size, at which dirty pages are kept.
    pub fn page_size(&self) -> PageSize {
        self.page_size
    }

    /// The regions, in order.
    pub fn regions(&self) -> Vec<RamRegion> {
        use vm_memory::GuestAddressSpace;
        let memory = self.handle.memory();
        memory
            .iter()
            .map(|region| RamRegion { gpa: Gpa(region.start_addr().0), len: region.len() })
            .collect()
    }
}

/// The regions that `size` bytes of RAM make: below and above the 32-bit hole.
pub fn split(size: u64) -> Vec<(GuestAddress, u64)> {
    let low = size.min(layout::LOW_RAM_END);
    let mut regions = vec![(GuestAddress(0), low)];
    if size > low {
        regions.push((GuestAddress(layout::HIGH_RAM_START), size - low));
    }
    regions
}

fn map_region(
    config: &MemoryConfig,
    start: GuestAddress,
    size: u64,
) -> Result<GuestRegionMmap<WriteLog>, MemoryError> {
    let length = usize::try_from(size).map_err(|_| MemoryError::TooLarge(size))?;
    let file = if config.shared || config.hugepages {
        Some(FileOffset::new(memfd(config, size)?, 0))
    } else {
        None
    };
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    // Shared only if others are to see the pages; a private mapping of huge pages stays ours.
    let sharing = if config.shared || file.is_some() { libc::MAP_SHARED } else { libc::MAP_PRIVATE };
    let anonymous = if file.is_some() { 0 } else { libc::MAP_ANONYMOUS };
    let flags = sharing | anonymous | libc::MAP_NORESERVE;
    let mapping = MmapRegion::<WriteLog>::build(file, length, prot, flags)
        .map_err(|cause| MemoryError::Map { size, cause })?;
    if !config.hugepages {
        advise_huge(&mapping);
    }
    GuestRegionMmap::new(mapping, start).ok_or(MemoryError::TooLarge(size))
}

fn memfd(config: &MemoryConfig, size: u64) -> Result<File, MemoryError> {
    let failed = |operation, hint| {
        move |cause: rustix::io::Errno| MemoryError::Allocate {
            operation,
            size,
            hint,
            cause: cause.into(),
        }
    };
    let mut flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    if config.hugepages {
        flags |= MemfdFlags::HUGETLB | huge_flag(config.hugepage_size);
    }
    let fd = rustix::fs::memfd_create("ferry-ram", flags)
        .map_err(failed("create a file for", ": does the host support that huge page size?"))?;
    rustix::fs::ftruncate(&fd, size).map_err(failed("size a file for", ""))?;
    // Others map this file: it must not shrink under us.
    rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW)
        .map_err(failed("seal a file for", ""))?;
    if config.hugepages {
        // Without pages in the pool the first touch would be a SIGBUS, so take them now.
        rustix::fs::fallocate(&fd, rustix::fs::FallocateFlags::empty(), 0, size).map_err(failed(
            "take huge pages for",
            ": put enough pages into the pool (/proc/sys/vm/nr_hugepages)",
        ))?;
    }
    Ok(File::from(fd))
}

fn huge_flag(size: Option<u64>) -> MemfdFlags {
    match size {
        Some(bytes) if bytes == 1 << 30 => MemfdFlags::HUGE_1GB,
        Some(_) => MemfdFlags::HUGE_2MB,
        None => MemfdFlags::empty(),
    }
}

/// Asks for transparent huge pages; the host may not have them, which is no error.
fn advise_huge(mapping: &MmapRegion<WriteLog>) {
    // SAFETY: the range is the mapping just made; MADV_HUGEPAGE changes no content.
    let result = unsafe {
        rustix::mm::madvise(
            mapping.as_ptr().cast(),
            mapping.size(),
            rustix::mm::Advice::LinuxHugepage,
        )
    };
    if let Err(error) = result {
        tracing::debug!(%error, "no transparent huge pages for guest RAM");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_goes_around_the_hole() {
        assert_eq!(split(1 << 30), [(GuestAddress(0), 1 << 30)]);
        assert_eq!(
            split(5 << 30),
            [(GuestAddress(0), 3 << 30), (GuestAddress(4 << 30), 2 << 30)]
        );
    }
}
