//! Rounds of a migration over the memory of a device, as the engine makes them.

use std::collections::BTreeSet;
use std::os::fd::AsFd;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vm_memory::GuestAddressSpace;
use vm_migration::addr::Gpa;
use vm_migration::dirty::{Collect, GuestDirty, VmmWriteSource};
use vm_migration::memory::{Backing, MemoryHandle, RamMapping, map_ram, ram_regions};
use vm_migration::{DirtySource, PageSize};

use super::RAM;

/// The same guest memory twice: as the device's process has it, and as the driver does. Only what
/// the device writes is in the log of the first.
pub(crate) fn two_views() -> (MemoryHandle, MemoryHandle) {
    let file = memfd_create("ram", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&file, RAM).unwrap();
    let view = || {
        let mapping = RamMapping {
            gpa: Gpa(0),
            len: RAM,
            backing: Backing::File {
                file: file.as_fd().try_clone_to_owned().unwrap().into(),
                offset: 0,
            },
        };
        MemoryHandle::new(map_ram(vec![mapping]).unwrap())
    };
    (view(), view())
}

/// What a migration would send, round by round.
pub(crate) struct Rounds {
    dirty: GuestDirty,
    sources: Vec<Box<dyn DirtySource>>,
}

impl Rounds {
    /// Starts the log of what this process writes to `memory`; all is clean.
    pub(crate) fn start(memory: &MemoryHandle) -> Self {
        let dirty = GuestDirty::new(&ram_regions(&memory.memory()), PageSize::SIZE_4K).unwrap();
        let mut source = VmmWriteSource::new(memory.clone());
        source.start(dirty.ranges()).unwrap();
        Self {
            dirty,
            sources: vec![Box::new(source)],
        }
    }

    /// The pages of the next round, all of which arrive.
    pub(crate) fn next(&mut self) -> BTreeSet<u64> {
        let how = Collect::default();
        self.dirty.collect(&mut self.sources, how).unwrap();
        let mut pages = BTreeSet::new();
        while let Some(run) = self.dirty.next_run(u64::MAX, &mut self.sources).unwrap() {
            pages.extend((run.gpa.0..run.gpa.0 + run.len).step_by(0x1000));
        }
        self.dirty.acknowledge();
        pages
    }
}

/// The pages of these, for comparing.
pub(crate) fn pages<const N: usize>(pages: [u64; N]) -> BTreeSet<u64> {
    pages.into()
}
