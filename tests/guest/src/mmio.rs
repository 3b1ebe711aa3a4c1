//! Memory shared with devices: registers and DMA buffers, at physical addresses.

use core::ptr::{
    copy_nonoverlapping, read_volatile, without_provenance, without_provenance_mut, write_volatile,
};
use core::sync::atomic::{Ordering, compiler_fence};

use crate::boot_info::usize_of;

/// A stretch of memory that a device reads or writes, mapped for ever.
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

    /// Where it lies.
    pub(crate) const fn base(&self) -> u64 {
        self.base
    }

    /// The part from `offset` on.
    pub(crate) fn part(&self, offset: u64, len: u64) -> Self {
        self.checked(offset, len);
        Self {
            base: self.base + offset,
            len,
        }
    }

    fn checked(&self, offset: u64, len: u64) -> usize {
        let fits = offset.checked_add(len).is_some_and(|end| end <= self.len);
        assert!(fits, "{len} bytes at {offset:#x} beyond {:#x}", self.len);
        usize_of(self.base + offset)
    }

    fn address<T: Register>(&self, offset: u64) -> usize {
        self.checked(offset, size_of::<T>() as u64)
    }

    /// Copies bytes out, as they are now.
    pub(crate) fn copy_out(&self, offset: u64, into: &mut [u8]) {
        let from = without_provenance(self.checked(offset, into.len() as u64));
        compiler_fence(Ordering::SeqCst);
        // SAFETY: in range (checked), mapped and not a Rust object (`new`), so
        // it does not overlap `into`.
        unsafe { copy_nonoverlapping(from, into.as_mut_ptr(), into.len()) }
    }

    /// Copies bytes in.
    pub(crate) fn copy_in(&self, offset: u64, from: &[u8]) {
        let into = without_provenance_mut(self.checked(offset, from.len() as u64));
        // SAFETY: as in `copy_out`.
        unsafe { copy_nonoverlapping(from.as_ptr(), into, from.len()) }
        compiler_fence(Ordering::SeqCst);
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
