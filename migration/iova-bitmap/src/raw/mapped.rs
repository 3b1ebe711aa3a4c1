//! The memory a bitmap lives in: whole pages, present before anybody is given their address.
//!
//! The invariant: a [`PageBuffer`] owns the anonymous mapping at `start` alone, from `new` until
//! `drop`.

use core::ptr::{self, NonNull};
use core::slice;

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};

use crate::error::NoMemory;

/// Zeroed `u64` words at the start of a page, backed by memory that is already there.
///
/// A kernel dirty report ORs into a user buffer by pinning its pages, and since Linux 6.11 a
/// failed pin inside `iova_bitmap_set()` is swallowed: the report succeeds and the bits are lost.
/// So the pages are made present here, where a failure can still be returned, and are kept out of
/// forked children, where copy-on-write could put another page under the same address.
pub(crate) struct PageBuffer {
    start: NonNull<u64>,
    words: usize,
    mapped_bytes: usize,
}

impl PageBuffer {
    /// A buffer of `words` zero words.
    pub(crate) fn new(words: usize) -> Result<Self, NoMemory> {
        let mapped_bytes = words
            .max(1)
            .checked_mul(size_of::<u64>())
            .and_then(|bytes| bytes.checked_next_multiple_of(rustix::param::page_size()))
            .ok_or(NoMemory::Exhausted)?;
        // SAFETY: a null hint without MAP_FIXED lets the kernel choose unused addresses, so no
        // existing mapping is touched.
        let address = unsafe {
            mmap_anonymous(
                ptr::null_mut(),
                mapped_bytes,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE | MapFlags::POPULATE,
            )
        }
        .map_err(NoMemory::Kernel)?;
        let start = NonNull::new(address.cast::<u64>()).ok_or(NoMemory::Exhausted)?;
        // From here on `drop` unmaps it, on the error returns below too.
        let buffer = Self {
            start,
            words,
            mapped_bytes,
        };
        buffer
            .advise(Advice::LinuxDontFork)
            .map_err(NoMemory::Kernel)?;
        // MAP_POPULATE hides its failures; this says them. Kernels before 5.14 do not know it and
        // must be content with MAP_POPULATE.
        match buffer.advise(Advice::LinuxPopulateWrite) {
            Ok(()) | Err(rustix::io::Errno::INVAL) => Ok(buffer),
            Err(errno) => Err(NoMemory::Kernel(errno)),
        }
    }

    fn advise(&self, advice: Advice) -> Result<(), rustix::io::Errno> {
        // SAFETY: the range is exactly the mapping this buffer owns, and neither advice used here
        // discards its contents.
        unsafe { madvise(self.start.as_ptr().cast(), self.mapped_bytes, advice) }
    }

    /// The words.
    pub(crate) fn as_slice(&self) -> &[u64] {
        // SAFETY: `start` is page-aligned and the mapping holds at least `words` initialised
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
        // SAFETY: this buffer owns the mapping, and every reference into it borrowed from `self`.
        let unmapped = unsafe { munmap(self.start.as_ptr().cast(), self.mapped_bytes) };
        debug_assert!(unmapped.is_ok(), "unmapping a bitmap's own pages");
    }
}

// SAFETY: the mapping is owned, not tied to a thread, and reached only through `&self` and
// `&mut self`, as with a `Box<[u64]>`.
unsafe impl Send for PageBuffer {}
// SAFETY: shared references only read.
unsafe impl Sync for PageBuffer {}
