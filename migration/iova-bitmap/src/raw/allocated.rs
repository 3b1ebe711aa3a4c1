//! The memory a bitmap lives in where there is no operating system to ask: aligned to 4 KiB and
//! zeroed, by the allocator.
//!
//! The invariant: a [`PageBuffer`] owns the allocation of `layout` at `start` alone, from `new`
//! until `drop`.

use alloc::alloc::{Layout, alloc_zeroed, dealloc};
use core::ptr::NonNull;
use core::slice;

use crate::error::NoMemory;

/// Alignment and granule in bytes, a common page size.
const PAGE: usize = 4096;

/// Zeroed `u64` words at the start of a page.
pub(crate) struct PageBuffer {
    start: NonNull<u64>,
    words: usize,
    layout: Layout,
}

impl PageBuffer {
    /// A buffer of `words` zero words.
    pub(crate) fn new(words: usize) -> Result<Self, NoMemory> {
        let layout = words
            .max(1)
            .checked_mul(size_of::<u64>())
            .and_then(|bytes| bytes.checked_next_multiple_of(PAGE))
            .and_then(|bytes| Layout::from_size_align(bytes, PAGE).ok())
            .ok_or(NoMemory::Exhausted)?;
        // SAFETY: the layout's size is not zero.
        let start = unsafe { alloc_zeroed(layout) };
        let start = NonNull::new(start.cast::<u64>()).ok_or(NoMemory::Exhausted)?;
        Ok(Self {
            start,
            words,
            layout,
        })
    }

    /// The words.
    pub(crate) fn as_slice(&self) -> &[u64] {
        // SAFETY: `start` is aligned and the allocation holds at least `words` initialised
        // (zeroed) words; `&self` excludes a `&mut` to them.
        unsafe { slice::from_raw_parts(self.start.as_ptr(), self.words) }
    }

    /// The words, to be written.
    pub(crate) fn as_mut_slice(&mut self) -> &mut [u64] {
        // SAFETY: as in `as_slice`; `&mut self` makes this the only reference.
        unsafe { slice::from_raw_parts_mut(self.start.as_ptr(), self.words) }
    }
}

impl Drop for PageBuffer {
    fn drop(&mut self) {
        // SAFETY: this buffer owns the allocation, made with the same layout, and every reference
        // into it borrowed from `self`.
        unsafe { dealloc(self.start.as_ptr().cast(), self.layout) }
    }
}

// SAFETY: the allocation is owned, not tied to a thread, and reached only through `&self` and
// `&mut self`, as with a `Box<[u64]>`.
unsafe impl Send for PageBuffer {}
// SAFETY: shared references only read.
unsafe impl Sync for PageBuffer {}
