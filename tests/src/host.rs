//! What a whole-VM test needs of its host, and taking turns on it.

use std::fs::{File, OpenOptions};

use anyhow::{Context, Result};
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
