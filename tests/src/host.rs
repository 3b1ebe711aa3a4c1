//! What a whole-VM test needs of its host, and taking turns on it.

use std::fs::{File, OpenOptions};

use anyhow::{Context, Result, ensure};
use rustix::fs::{FlockOperation, flock};

use crate::{ferry, netns};

/// A test's turn: one at a time, among all tests of these programs, in whatever processes. Their
/// times are measured, and their memory is real.
#[derive(Debug)]
pub struct Turn(#[expect(dead_code, reason = "its lock lasts until it is closed")] File);

/// Waits for this test's turn on a host with KVM; `None`, said, where there is none.
///
/// # Errors
/// When the lock file cannot be had.
pub fn turn(test: &str) -> Result<Option<Turn>> {
    if let Err(error) = OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        println!("SKIP: {test}: /dev/kvm: {error}");
        return Ok(None);
    }
    let path = ferry::bin_dir()?.join(".whole-vm-tests");
    let file = File::create(&path).with_context(|| format!("cannot make {}", path.display()))?;
    flock(&file, FlockOperation::LockExclusive)?;
    Ok(Some(Turn(file)))
}

/// The same for a test with taps, which enters a network namespace of its own.
///
/// # Errors
/// As [`turn`].
pub fn network_turn(test: &str) -> Result<Option<Turn>> {
    let Some(turn) = turn(test)? else {
        return Ok(None);
    };
    let isolated = netns::isolate().and_then(|()| netns::add_tap("probe", 1, &[]));
    if let Err(error) = isolated {
        println!("SKIP: {test}: no taps: {error:#}");
        return Ok(None);
    }
    Ok(Some(turn))
}

const HUGE_PAGES: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";

/// Huge pages of 2 MiB, given back on drop.
#[derive(Debug)]
pub struct HugePool {
    before: String,
}

impl HugePool {
    /// Adds `mib` MiB to the host's pool.
    ///
    /// # Errors
    /// When the host has none, or not enough memory in one piece.
    pub fn new(mib: u64) -> Result<Self> {
        let before = std::fs::read_to_string(HUGE_PAGES)?;
        let this = Self { before };
        let wanted = this.before.trim().parse::<u64>()? + mib.div_ceil(2);
        std::fs::write(HUGE_PAGES, wanted.to_string())?;
        let have: u64 = std::fs::read_to_string(HUGE_PAGES)?.trim().parse()?;
        ensure!(have >= wanted, "{have} of {wanted} are to be had");
        Ok(this)
    }
}

impl Drop for HugePool {
    fn drop(&mut self) {
        // Pages in use are given back when they are free.
        let _ = std::fs::write(HUGE_PAGES, self.before.trim());
    }
}
