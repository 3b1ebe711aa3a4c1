//! Memory whose physical addresses are known and stay: huge pages, as the guest's kernel maps them.

use std::fs;
use std::os::unix::fs::FileExt;
use std::ptr::NonNull;

use anyhow::{Context, ensure};

/// Bytes of a huge page.
pub(super) const HUGE_BYTES: usize = 2 << 20;
const HUGE_PAGES: &str = "/proc/sys/vm/nr_hugepages";

/// Memory that somebody else writes as well, in 64-bit words.
#[derive(Clone, Copy, Debug)]
pub(super) struct Words {
    start: NonNull<u64>,
    count: usize,
}

impl Words {
    /// `count` words from `start` on.
    ///
    /// # Safety
    ///
    /// They must be mapped for as long as the value is used.
    pub(super) const unsafe fn new(start: NonNull<u64>, count: usize) -> Self {
        Self { start, count }
    }

    /// A part of them.
    pub(super) fn part(self, at: usize, count: usize) -> Option<Self> {
        if at.checked_add(count)? > self.count {
            return None;
        }
        // SAFETY: just checked to be within the words that there are.
        let start = unsafe { self.start.add(at) };
        Some(Self { start, count })
    }

    /// Reads a word, as it is now; beyond the end 0.
    pub(super) fn get(self, at: usize) -> u64 {
        if at >= self.count {
            return 0;
        }
        // SAFETY: within the words that there are. Volatile, for the device writes them as well.
        unsafe { self.start.add(at).read_volatile() }
    }

    /// Writes a word; beyond the end nothing.
    pub(super) fn set(self, at: usize, value: u64) {
        if at < self.count {
            // SAFETY: as in `get`.
            unsafe { self.start.add(at).write_volatile(value) }
        }
    }
}

/// A huge page that is the program's until it ends.
#[derive(Debug)]
pub(super) struct HugePage {
    /// All of it.
    pub(super) words: Words,
    /// Its guest physical address.
    pub(super) address: u64,
}

/// Takes `count` huge pages more than are in use. They are never given back: a device writes to them.
pub(super) fn huge_pages(count: usize) -> anyhow::Result<Vec<HugePage>> {
    let have: usize = fs::read_to_string(HUGE_PAGES)
        .context("this kernel has no huge pages")?
        .trim()
        .parse()?;
    fs::write(HUGE_PAGES, (have + count).to_string())
        .with_context(|| format!("cannot set {HUGE_PAGES}: run as root"))?;
    (0..count).map(|_| huge_page()).collect()
}

fn huge_page() -> anyhow::Result<HugePage> {
    let flags = libc::MAP_PRIVATE
        | libc::MAP_ANONYMOUS
        | libc::MAP_HUGETLB
        | libc::MAP_POPULATE
        | libc::MAP_LOCKED;
    // SAFETY: a new mapping of memory, at no address in use.
    let start = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            HUGE_BYTES,
            libc::PROT_READ | libc::PROT_WRITE,
            flags,
            -1,
            0,
        )
    };
    ensure!(
        start != libc::MAP_FAILED,
        "no huge page is to be had ({}): give the guest more memory",
        std::io::Error::last_os_error()
    );
    let start = NonNull::new(start.cast::<u64>()).context("a mapping at address 0")?;
    // SAFETY: the whole mapping, which is never taken away.
    let words = unsafe { Words::new(start, HUGE_BYTES / 8) };
    words.set(0, 0);
    Ok(HugePage {
        words,
        address: physical_address(start.addr().get())?,
    })
}

/// Where the kernel has put the page at `address` (Documentation/admin-guide/mm/pagemap.rst).
fn physical_address(address: usize) -> anyhow::Result<u64> {
    const PRESENT: u64 = 1 << 63;
    const FRAME: u64 = (1 << 55) - 1;
    let mut entry = [0; 8];
    let at = u64::try_from(address / 4096)? * 8;
    fs::File::open("/proc/self/pagemap")
        .and_then(|map| map.read_exact_at(&mut entry, at))
        .context("cannot read /proc/self/pagemap")?;
    let entry = u64::from_le_bytes(entry);
    ensure!(
        entry & PRESENT != 0 && entry & FRAME != 0,
        "the kernel does not tell physical addresses: run as root"
    );
    Ok((entry & FRAME) * 4096)
}
