//! The guest's RAM: where it lies in the guest, what backs it on the host.

use std::fs::File;

use rustix::fs::{MemfdFlags, SealFlags};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestRegionMmap};
use vm_migration::memory::{
    Backing, GuestMemory, MemoryHandle, RamMapping, RamRegion, WriteLog, map_ram, ram_regions,
};
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
    /// The memory could not be mapped.
    #[error("cannot map guest RAM")]
    Map(#[source] vm_migration::memory::MemoryError),
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
        let mappings = split(config.size)
            .into_iter()
            .map(|(start, len)| {
                Ok(RamMapping {
                    gpa: Gpa(start.0),
                    len,
                    backing: backing(config, len)?,
                })
            })
            .collect::<Result<Vec<_>, MemoryError>>()?;
        let memory = map_ram(mappings).map_err(MemoryError::Map)?;
        if !config.hugepages {
            memory.iter().for_each(advise_huge);
        }
        let page = u64::try_from(rustix::param::page_size()).unwrap_or(0);
        let page_size = PageSize::new(page).unwrap_or(PageSize::SIZE_4K);
        Ok(Self {
            handle: MemoryHandle::new(memory),
            page_size,
        })
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
        ram_regions(&self.memory())
    }

    /// The memory as it is now.
    pub fn memory(&self) -> impl std::ops::Deref<Target = GuestMemory> + Clone + use<> {
        use vm_memory::GuestAddressSpace;
        self.handle.memory()
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

fn backing(config: &MemoryConfig, len: u64) -> Result<Backing, MemoryError> {
    if config.shared || config.hugepages {
        return Ok(Backing::File {
            file: memfd(config, len)?,
            offset: 0,
        });
    }
    Ok(Backing::Anonymous)
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
    let fd = rustix::fs::memfd_create("ferry-ram", flags).map_err(failed(
        "create a file for",
        ": does the host support that huge page size?",
    ))?;
    rustix::fs::ftruncate(&fd, size).map_err(failed("size a file for", ""))?;
    // Others map this file: it must not shrink under us.
    rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW)
        .map_err(failed("seal a file for", ""))?;
    if config.hugepages {
        // Without pages in the pool the first touch would be a SIGBUS, so take them now.
        rustix::fs::fallocate(&fd, rustix::fs::FallocateFlags::empty(), 0, size).map_err(
            failed(
                "take huge pages for",
                ": put enough pages into the pool (/proc/sys/vm/nr_hugepages)",
            ),
        )?;
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
fn advise_huge(region: &GuestRegionMmap<WriteLog>) {
    // SAFETY: the range is the region's own mapping; MADV_HUGEPAGE changes no content.
    let result = unsafe {
        rustix::mm::madvise(
            region.as_ptr().cast(),
            region.size(),
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
