//! The memory in which a backend logs the pages that it writes.
//!
//! Bit `n % 8` of byte `n / 8` is the 4 KiB page at GPA `n * 4096` (vhost-user.rst, section
//! "Migration"), from 0 to the end of RAM, holes included, whatever the host's page size. On this
//! little-endian machine bit `n % 64` of the 64-bit word `n / 64` is the same bit. The file is
//! sealed at its size, so that no access faults, whatever the backend does to it; its pages are
//! there from the start, so that a shortage of memory is an error then and not a signal later.
//!
//! # Why a taker misses nothing
//!
//! The backend writes to a page, *then* sets its bit by an atomic OR; whoever takes the bit reads
//! the page after. Both touch the bit by a locked read-modify-write of the same cache line, so these
//! are in one order, be they of a byte on one side and of a word on the other. If the OR came
//! first, the taker gets the bit, and sees the write when it reads the page: the OR is not before
//! the write in the order of the backend's stores (on x86 no store passes an earlier one, and a
//! locked instruction waits for all), and the take is an acquire, which keeps the reads of the page
//! behind it. If it came second, the bit is there for the next take. Before the last take of a
//! migration the rings were stopped, and the backend's answer to that came through a socket, which
//! orders all that it did before.
//!
//! A log that is started anew is a new one, and a stopped one is dropped here. The protocol has no
//! word for taking a log away: the backend keeps the old one mapped until it gets another or the
//! connection ends.
//!
//! # What the backend can do with it
//!
//! Nothing but mark pages: a set bit costs the sending of a page of RAM, bits of holes cost nothing,
//! and a bit that is missing is a page that the backend did not log, which nobody can tell. It has
//! all of the guest's memory anyway.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::AtomicU64;

use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags};
use vm_memory::{FileOffset, MmapRegion};
use vm_migration::memory;
use vm_migration::{BitmapError, Iova, IovaBitmap, IovaRange, PageSize};

use super::message::LogArea;

/// `VHOST_LOG_PAGE`: the page size of the log.
pub(super) const LOG_PAGE: PageSize = PageSize::SIZE_4K;
/// Pages of a word.
const WORD_PAGES: u64 = 64;
/// Bytes of a word.
const WORD_BYTES: u64 = 8;

/// Why there is no log, or no answer from it.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The host has no memory for it.
    #[error("cannot {operation} {bytes} bytes of memory for the log")]
    Memory {
        /// What was tried.
        operation: &'static str,
        /// How many bytes.
        bytes: u64,
        /// What the host said.
        #[source]
        cause: io::Error,
    },
    /// The log cannot be mapped.
    #[error("cannot map the log's memory")]
    Map(#[source] vm_memory::mmap::MmapRegionError),
    /// The guest's memory ends where no log can reach.
    #[error("guest memory up to {end:#x} is more than a log can have bits for")]
    TooLong {
        /// The last GPA.
        end: u64,
    },
    /// It has no bits for some of these pages.
    #[error("the log ends before {last}")]
    Beyond {
        /// The last address asked for.
        last: Iova,
    },
    /// What it holds does not fit a bitmap.
    #[error("the log's bits do not fit the bitmap")]
    Bitmap(#[from] BitmapError),
}

/// A log that a backend shares.
#[derive(Debug)]
pub(super) struct SharedLog {
    file: File,
    mapping: MmapRegion,
    bytes: u64,
}

impl SharedLog {
    /// A clean log of all pages up to the one of GPA `last`.
    pub(super) fn new(last: u64) -> Result<Self, LogError> {
        let too_long = || LogError::TooLong { end: last };
        let words = (last >> LOG_PAGE.shift()) / WORD_PAGES + 1;
        let page = u64::try_from(rustix::param::page_size()).unwrap_or(LOG_PAGE.bytes());
        let bytes = (words * WORD_BYTES).next_multiple_of(page);
        let size = usize::try_from(bytes).map_err(|_| too_long())?;
        let failed = |operation| {
            move |cause: rustix::io::Errno| LogError::Memory {
                operation,
                bytes,
                cause: cause.into(),
            }
        };
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = rustix::fs::memfd_create("ferry-vhost-log", flags)
            .map_err(failed("make a file for"))?;
        rustix::fs::ftruncate(&file, bytes).map_err(failed("size a file for"))?;
        rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, bytes)
            .map_err(failed("reserve"))?;
        let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
        rustix::fs::fcntl_add_seals(&file, seals).map_err(failed("seal a file for"))?;
        let file = File::from(file);
        let shared = file.try_clone().map_err(|cause| LogError::Memory {
            operation: "share a file of",
            bytes,
            cause,
        })?;
        let mapping =
            MmapRegion::from_file(FileOffset::new(shared, 0), size).map_err(LogError::Map)?;
        Ok(Self {
            file,
            mapping,
            bytes,
        })
    }

    /// What the backend is told of it.
    pub(super) fn area(&self) -> (LogArea, BorrowedFd<'_>) {
        let area = LogArea {
            len: self.bytes,
            offset: 0,
        };
        (area, self.file.as_fd())
    }

    fn words(&self) -> &[AtomicU64] {
        let len = self.mapping.size() / size_of::<AtomicU64>();
        let start = self.mapping.as_ptr().cast::<AtomicU64>();
        // SAFETY: `mmap` gave `size` bytes from a page's start, readable and writable, which live as
        // long as `self`; the file cannot shrink below them. Whoever else writes to them does so
        // from outside of Rust's sight, and atomics may change at any time.
        unsafe { std::slice::from_raw_parts(start, len) }
    }

    /// Moves the bits of the pages of `window` into `bitmap`, which covers it; bits of other pages
    /// stay. How many of the bitmap's pages that named.
    pub(super) fn take(&self, window: IovaRange, bitmap: &mut IovaBitmap) -> Result<u64, LogError> {
        // No answer must never look like "clean".
        let last = window.last();
        if last.0 >> LOG_PAGE.shift() >= self.bytes.saturating_mul(8) {
            return Err(LogError::Beyond { last });
        }
        let page = |at: Iova| usize::try_from(at.0 >> LOG_PAGE.shift()).unwrap_or(usize::MAX);
        let pages = (page(window.first()), page(last));
        Ok(memory::take_bits(self.words(), pages, Iova(0), bitmap)?)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;
    use std::sync::atomic::Ordering;

    use super::*;

    fn window(first: u64, pages: u64) -> IovaRange {
        IovaRange::new(Iova(first << 12), pages << 12).unwrap()
    }

    fn taken(log: &SharedLog, window: IovaRange) -> Vec<u64> {
        let len = window.len().unwrap();
        let mut bitmap = IovaBitmap::new(window.first(), len, LOG_PAGE).unwrap();
        log.take(window, &mut bitmap).unwrap();
        bitmap
            .runs()
            .flat_map(|run| run.first().0 >> 12..=run.last().0 >> 12)
            .collect()
    }

    /// Sets bits as vhost-user.rst says, byte by byte, through the file.
    fn mark(log: &SharedLog, page: u64) {
        let mut byte = [0];
        log.file.read_exact_at(&mut byte, page / 8).unwrap();
        byte[0] |= 1 << (page % 8);
        log.file.write_all_at(&byte, page / 8).unwrap();
    }

    #[test]
    fn a_window_gets_its_own_pages_once() {
        let log = SharedLog::new((1 << 30) - 1).unwrap();
        let pages = [0, 1, 63, 64, 100, 159, 160, 161, 4095, 131_072, 262_143];
        for page in pages {
            mark(&log, page);
        }
        // A window whose ends lie within words.
        assert_eq!(taken(&log, window(100, 61)), [100, 159, 160]);
        assert_eq!(taken(&log, window(100, 61)), [0; 0]);
        assert_eq!(taken(&log, window(0, 100)), [0, 1, 63, 64]);
        assert_eq!(
            taken(&log, window(161, 262_144 - 161)),
            [161, 4095, 131_072, 262_143]
        );
        assert_eq!(taken(&log, window(0, 262_144)), [0; 0]);
    }

    #[test]
    fn its_end_is_the_end_of_ram() {
        let log = SharedLog::new(0x1234_5fff).unwrap();
        mark(&log, 0x12345);
        assert_eq!(taken(&log, window(0x12300, 0x46)), [0x12345]);
        // What lies beyond has no bits, and is not clean for that.
        for beyond in [window(1 << 30, 8), window(0, 1 << 30)] {
            let mut bitmap = IovaBitmap::over(beyond, LOG_PAGE).unwrap();
            let error = log.take(beyond, &mut bitmap).unwrap_err();
            assert!(matches!(error, LogError::Beyond { .. }), "{error}");
        }
    }

    #[test]
    fn a_backend_cannot_change_its_size() {
        let log = SharedLog::new(1 << 20).unwrap();
        let (area, fd) = log.area();
        assert_eq!((area.len, area.offset), (4096, 0));
        assert!(rustix::fs::ftruncate(fd, 0).is_err());
        assert!(rustix::fs::ftruncate(fd, 8192).is_err());
        assert!(rustix::fs::fcntl_add_seals(fd, SealFlags::FUTURE_WRITE).is_err());
    }

    /// A backend that writes, then marks, while another takes and then reads: what was taken last
    /// is never older than the mark.
    #[test]
    fn what_is_written_before_a_mark_is_seen_after_its_take() {
        use std::sync::Arc;
        use std::sync::atomic::AtomicBool;

        let log = Arc::new(SharedLog::new((64 << 12) - 1).unwrap());
        let cell = Arc::new(AtomicU64::new(0));
        let done = Arc::new(AtomicBool::new(false));
        let (theirs, page, over) = (Arc::clone(&log), Arc::clone(&cell), Arc::clone(&done));
        let writer = std::thread::spawn(move || {
            for value in 1..=200_000 {
                page.store(value, Ordering::Relaxed);
                theirs.words()[0].fetch_or(1 << 5, Ordering::Release);
            }
            over.store(true, Ordering::Release);
        });
        let mut copy = 0;
        loop {
            let last = done.load(Ordering::Acquire);
            if taken(&log, window(0, 64)) == [5] {
                copy = cell.load(Ordering::Relaxed);
            }
            if last {
                break;
            }
        }
        writer.join().unwrap();
        assert_eq!(copy, 200_000);
    }
}
