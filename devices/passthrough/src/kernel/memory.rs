//! Guest RAM as a device reaches it, and keeps it.

use std::sync::Arc;

use vm_memory::{GuestMemoryRegion, MmapRegion};
use vm_migration::memory::GuestRegion;
use vm_migration::{Gpa, RamRegion, WriteLog};

/// A region of guest RAM that stays mapped here for as long as this lives.
pub struct PinnedRam {
    ram: RamRegion,
    mapping: Arc<MmapRegion<WriteLog>>,
}

impl PinnedRam {
    /// Keeps `region`.
    pub fn new(region: &GuestRegion) -> Self {
        Self {
            ram: RamRegion {
                gpa: Gpa(region.start_addr().0),
                len: region.len(),
            },
            mapping: region.get_mmap(),
        }
    }

    /// Where it is in the guest.
    pub fn ram(&self) -> RamRegion {
        self.ram
    }

    /// Where it is in this process.
    pub(crate) fn hva(&self) -> u64 {
        u64::try_from(self.mapping.as_ptr().addr()).unwrap_or(u64::MAX)
    }
}
