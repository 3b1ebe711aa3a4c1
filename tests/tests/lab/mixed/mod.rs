//! Frames of all sorts, and the hash and queue of each, against what they were made as.
//!
//! The frames and what must be reported are those of `test-packets`; the guest's `guest_net reports`
//! compares. A case sends three streams: one while settings change, one of which the reported types are
//! looked at too, and one while the guest moves. On a tap whose kernel hashes, the kernel begins to be wrong
//! before the second, which Ferry has to notice.
//!
//! By default one guest, and few frames. The matrix of guests, queues and taps takes hours, and is run by
//! `scripts/test-lab matrix --ignored`; `FERRY_LAB_MATRIX` says words one of which is in a case's name,
//! `FERRY_LAB_FRAMES` how many frames a stream has, `FERRY_LAB_TIMEOUT` how many seconds all may take.

use anyhow::{Result, ensure};
use e2e::linux::{Kernel, in_lab};

mod case;
mod plan;
mod scene;
mod sender;
mod tap;

use case::{Case, Wish};
use tap::Tap;

/// All that the series does wrong.
const DEFECTS: &str = "automq,key,single_queue,tunnels";

/// A guest with two pairs of queues and RSS.
const CASE: Case = Case {
    kernel: Kernel::Cloud6_12,
    pairs: 2,
    wish: Wish::Rss,
    tap: Tap::Stock,
    frames: 5000,
    moves: true,
};

#[test]
fn debian_6_12_gets_the_right_hash_of_each_frame_on_the_right_queue() -> Result<()> {
    if !in_lab("debian_6_12_gets_the_right_hash_of_each_frame_on_the_right_queue") {
        return Ok(());
    }
    CASE.run()
}

#[test]
fn hashes_of_the_kernel_are_used_and_no_longer_when_one_is_wrong() -> Result<()> {
    if !in_lab("hashes_of_the_kernel_are_used_and_no_longer_when_one_is_wrong") {
        return Ok(());
    }
    let tap = Tap::Patched(12, DEFECTS);
    Case {
        tap,
        frames: 3000,
        moves: false,
        ..CASE
    }
    .run()
}

/// All cases: each guest, number of pairs and tap.
fn cases(frames: u32) -> Vec<Case> {
    let taps = [
        Tap::Stock,
        Tap::Patched(5, ""),
        Tap::Patched(12, ""),
        Tap::Patched(5, DEFECTS),
        Tap::Patched(12, DEFECTS),
    ];
    let mut cases = Vec::new();
    for tap in taps {
        for kernel in [Kernel::Cloud6_12, Kernel::Cloud6_1] {
            for pairs in [1, 2, 4] {
                for wish in [Wish::Rss, Wish::Reports] {
                    cases.push(Case {
                        kernel,
                        pairs,
                        wish,
                        tap,
                        frames,
                        moves: true,
                    });
                }
            }
        }
    }
    cases
}

#[test]
#[ignore = "it takes hours: scripts/test-lab matrix --ignored"]
fn matrix_of_guests_and_taps() -> Result<()> {
    if !in_lab("matrix_of_guests_and_taps") {
        return Ok(());
    }
    let words = std::env::var("FERRY_LAB_MATRIX").unwrap_or_default();
    let words: Vec<&str> = words.split_whitespace().collect();
    let is_wanted =
        |case: &Case| words.is_empty() || words.iter().any(|word| case.name().contains(word));
    let frames = match std::env::var("FERRY_LAB_FRAMES") {
        Ok(number) => number.parse()?,
        Err(_) => CASE.frames,
    };
    let mut failed = Vec::new();
    for case in cases(frames).into_iter().filter(is_wanted) {
        println!("== {}", case.name());
        // Each in a network namespace, and so a thread, of its own.
        match std::thread::spawn(move || case.run()).join() {
            Ok(Ok(())) => println!("== {} ok", case.name()),
            Ok(Err(error)) => failed.push(format!("{}: {error:#}", case.name())),
            Err(_) => failed.push(format!("{}: panicked", case.name())),
        }
    }
    ensure!(failed.is_empty(), "{}", failed.join("\n"));
    Ok(())
}
