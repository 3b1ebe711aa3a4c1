//! The dirty log, a bit for each page, set byte by byte.

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicU8, Ordering};

use vm_memory::{FileOffset, MmapRegion, VolatileMemory};

/// `VHOST_LOG_PAGE`.
const PAGE: u64 = 4096;

/// The front end's log.
pub(crate) struct Log(MmapRegion);

impl Log {
    pub(crate) fn map(file: File, offset: u64, len: u64) -> io::Result<Self> {
        let len = usize::try_from(len).map_err(io::Error::other)?;
        MmapRegion::from_file(FileOffset::new(file, offset), len)
            .map(Self)
            .map_err(io::Error::other)
    }

    /// `len` bytes from GPA `gpa` were written.
    pub(crate) fn mark(&self, gpa: u64, len: u64) {
        let last = gpa.saturating_add(len.saturating_sub(1));
        for page in gpa / PAGE..=last / PAGE {
            let place = usize::try_from(page / 8).unwrap_or(usize::MAX);
            match self.0.get_atomic_ref::<AtomicU8>(place) {
                Ok(byte) => {
                    byte.fetch_or(1 << (page % 8), Ordering::Release);
                }
                Err(error) => tracing::error!(%error, page, "the log is too short"),
            }
        }
    }
}
