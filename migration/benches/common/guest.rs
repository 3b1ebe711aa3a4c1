//! Guests without a machine.

use vm_migration::memory::{Backing, RamMapping, map_ram};
use vm_migration::{Gpa, MemoryHandle, Pause, StateError};

/// So many bytes of RAM, from GPA 0 on.
pub(crate) fn memory(len: u64) -> MemoryHandle {
    let mapping = RamMapping {
        gpa: Gpa(0),
        len,
        backing: Backing::Anonymous,
    };
    MemoryHandle::new(map_ram(vec![mapping]).expect("memory for the benchmark"))
}

/// vCPUs that do nothing.
pub(crate) struct Vcpus;

impl Pause for Vcpus {
    fn pause(&mut self) -> Result<(), StateError> {
        Ok(())
    }

    fn resume(&mut self) -> Result<(), StateError> {
        Ok(())
    }
}
