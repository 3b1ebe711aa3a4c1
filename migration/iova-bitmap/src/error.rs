//! What can be wrong with the making and the use of a bitmap.

use crate::addr::Iova;
use crate::bitmap::MAX_PAGES;

/// Why a bitmap cannot be made or used so.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum BitmapError {
    /// The range is empty or runs past the end of the 64-bit space.
    #[error("{len:#x} bytes from IOVA {base} are not a range: give 1 byte or more, within 2^64")]
    BadRange {
        /// First address asked for.
        base: Iova,
        /// Length asked for, in bytes.
        len: u64,
    },
    /// A bitmap's first address is not at the start of a page.
    #[error("IOVA {base} is not a multiple of the page size {page_bytes:#x}: round it down")]
    Misaligned {
        /// First address asked for.
        base: Iova,
        /// Page size in bytes.
        page_bytes: u64,
    },
    /// The range has more than [`MAX_PAGES`] pages.
    #[error(
        "a bitmap of {pages} pages of {page_bytes:#x} bytes is over the limit of {MAX_PAGES}: \
         use larger pages or several bitmaps"
    )]
    TooManyPages {
        /// Pages asked for (at most `u64::MAX`).
        pages: u64,
        /// Page size in bytes.
        page_bytes: u64,
    },
    /// The bitmap's buffer is too small to stand for another range.
    #[error("{pages} pages do not fit a buffer for {room}: make the bitmap for the largest range")]
    TooSmall {
        /// Pages asked for.
        pages: u64,
        /// Pages the buffer has room for.
        room: u64,
    },
    /// The memory for the bits could not be had.
    #[error("cannot get present memory for a bitmap of {words} words: free some memory")]
    Memory {
        /// Words of 8 bytes asked for.
        words: usize,
        /// What was wrong.
        #[source]
        source: NoMemory,
    },
}

/// Why memory for a bitmap could not be had.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum NoMemory {
    /// The allocator, or the address space, has no room.
    #[error("out of memory")]
    Exhausted,
    /// The kernel refused to map memory or to make it present.
    #[cfg(feature = "std")]
    #[error("the kernel refused")]
    Kernel(#[source] rustix::io::Errno),
}
