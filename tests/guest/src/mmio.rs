//! Device registers at physical addresses.

use core::ptr::{read_volatile, without_provenance, without_provenance_mut, write_volatile};

use crate::boot_info::usize_of;

/// A stretch of device memory, mapped for ever.
#[derive(Clone, Copy)]
pub(crate) struct Mmio {
    base: u64,
    len: u64,
}

/// What may be read from and written to a device in one access.
pub(crate) trait Register: Copy {}
impl Register for u8 {}
impl Register for u16 {}
impl Register for u32 {}
impl Register for u64 {}

impl Mmio {
    /// # Safety
    /// `[base, base + len)` must be mapped (see `paging::map`), must hold
    /// device registers or memory that no Rust object occupies, and must stay
    /// so for ever.
    pub(crate) const unsafe fn new(base: u64, len: u64) -> Self {
        Self { base, len }
    }

    fn address<T: Register>(&self, offset: u64) -> usize {
        let size = size_of::<T>() as u64;
        let fits = offset.checked_add(size).is_some_and(|end| end <= self.len);
        assert!(fits, "register {offset:#x} beyond {:#x}", self.len);
        usize_of(self.base + offset)
    }

    /// Reads the register at `offset`.
    pub(crate) fn read<T: Register>(&self, offset: u64) -> T {
        let address = without_provenance(self.address::<T>(offset));
        // SAFETY: in range (checked above), mapped and not a Rust object (`new`).
        unsafe { read_volatile(address) }
    }

    /// Writes the register at `offset`.
    pub(crate) fn write<T: Register>(&self, offset: u64, value: T) {
        let address = without_provenance_mut(self.address::<T>(offset));
        // SAFETY: as in `read`.
        unsafe { write_volatile(address, value) }
    }
}
