//! Warm memory: pages that an outer host has backed already.

use std::fs;
use std::io;
use std::path::Path;

use anyhow::{Context, Result, bail};

/// The kernel's pool of 2 MiB pages.
const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";
/// Its page size in MiB.
const HUGE_MIB: u64 = 2;
const PAGE: usize = 4096;

/// Touches `mib` MiB of fresh memory and gives them back, for others to take within seconds. With
/// `huge` in transparent huge pages, as those come from elsewhere than small ones.
///
/// # Errors
/// When there is not so much memory.
pub(super) fn warm(mib: u64, huge: bool) -> Result<()> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    touch(mib, flags, huge).context("cannot warm memory")
}

fn touch(mib: u64, flags: i32, huge: bool) -> io::Result<()> {
    let bytes =
        usize::try_from(mib << 20).map_err(|_| io::Error::from_raw_os_error(libc::ENOMEM))?;
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a new mapping that overlaps nothing.
    let at = unsafe { libc::mmap(std::ptr::null_mut(), bytes, protection, flags, -1, 0) };
    if at == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    let advice = if huge {
        libc::MADV_HUGEPAGE
    } else {
        libc::MADV_NOHUGEPAGE
    };
    // A kernel without transparent huge pages refuses, and has none either.
    // SAFETY: the mapping made above.
    unsafe { libc::madvise(at, bytes, advice) };
    let start = at.cast::<u8>();
    for offset in (0..bytes).step_by(PAGE) {
        // SAFETY: within the mapping made above, which only this function knows.
        unsafe { start.add(offset).write_volatile(1) };
    }
    // SAFETY: the mapping made above, of which nothing is used any more.
    unsafe { libc::munmap(at, bytes) };
    Ok(())
}

/// A pool of huge pages, touched once so that it is warm for good. Goes back to what it was when
/// dropped.
#[derive(Debug)]
pub(super) struct HugePool {
    before: String,
}

impl HugePool {
    /// Enlarges the pool so that `mib` MiB are free in it.
    ///
    /// # Errors
    /// When the machine has no such pool, or not enough memory that is not in pieces.
    pub(super) fn reserve(mib: u64) -> Result<Self> {
        if !Path::new(POOL).exists() {
            bail!("this kernel has no pool of 2 MiB pages");
        }
        let before = fs::read_to_string(POOL)?.trim().to_owned();
        let pool = Self { before };
        let old: u64 = pool.before.parse().unwrap_or(0);
        let wanted = old + mib.div_ceil(HUGE_MIB);
        fs::write(POOL, wanted.to_string()).context("cannot enlarge the pool of 2 MiB pages")?;
        let got: u64 = fs::read_to_string(POOL)?.trim().parse().unwrap_or(0);
        if got < wanted {
            bail!("the pool of 2 MiB pages has {got} of {wanted} pages");
        }
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB;
        touch(mib, flags, false).context("cannot touch the pool of 2 MiB pages")?;
        Ok(pool)
    }
}

impl Drop for HugePool {
    fn drop(&mut self) {
        if let Err(error) = fs::write(POOL, &self.before) {
            eprintln!("bench: cannot give back {POOL} ({}): {error}", self.before);
        }
    }
}
