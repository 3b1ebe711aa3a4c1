use proptest::prelude::*;
use vm_memory::Bytes;
use vm_memory::bitmap::Bitmap;

use super::*;
use crate::memory::{Backing, RamMapping, map_ram};

const PAGES: u64 = 600;
const BASE: u64 = 0x10_0000;

fn memory() -> GuestMemory {
    let mapping = RamMapping {
        gpa: Gpa(BASE),
        len: PAGES * 4096,
        backing: Backing::Anonymous,
    };
    map_ram(vec![mapping]).unwrap()
}

fn all(memory: &GuestMemory) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(PAGES).unwrap() * 4096];
    memory.read_slice(&mut bytes, GuestAddress(BASE)).unwrap();
    bytes
}

/// Sends runs of pages from one memory to another; gives how many frames it took and what they
/// told.
fn send(from: &GuestMemory, to: &GuestMemory, runs: &[(u64, u64)], limit: usize) -> (usize, Tally) {
    let mut batch = PageBatch::new(PageSize::SIZE_4K, limit);
    let (mut frames, mut total) = (0, Tally::default());
    let mut flush = |batch: &mut PageBatch| {
        if batch.is_empty() {
            return;
        }
        let (frame, sent) = batch.finish();
        assert!(frame.payload().len() <= Kind::Pages.limit());
        let got = Pages::open(frame.payload()).unwrap().apply(to).unwrap();
        assert_eq!(got, sent);
        frames += 1;
        total.memory_bytes += sent.memory_bytes;
        total.zero_bytes += sent.zero_bytes;
        batch.reset();
    };
    for (first, count) in runs {
        let (mut gpa, mut left) = (BASE + first * 4096, usize::try_from(count * 4096).unwrap());
        while left > 0 {
            let now = left.min(batch.room());
            if now == 0 {
                flush(&mut batch);
                continue;
            }
            batch.append(from, Gpa(gpa), now).unwrap();
            gpa += u64::try_from(now).unwrap();
            left -= now;
        }
    }
    flush(&mut batch);
    (frames, total)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Whatever pages are sent, the destination has the same; others are untouched.
    #[test]
    fn what_is_sent_arrives(
        writes in prop::collection::vec((0..PAGES * 4096, 1u8..), 0..200),
        stale in prop::collection::vec(0..PAGES, 0..50),
        cuts in prop::collection::btree_set(0..PAGES, 1..40),
        limit in 4096usize..2_000_000,
    ) {
        let (from, to) = (memory(), memory());
        for (at, byte) in &writes {
            from.write_obj(*byte, GuestAddress(BASE + at)).unwrap();
        }
        // What an earlier round left there must go, also where it is zero now.
        for page in &stale {
            to.write_obj(0xeeu8, GuestAddress(BASE + page * 4096 + 17)).unwrap();
        }
        let before = all(&to);
        // Runs between cuts, every other one.
        let cuts: Vec<u64> = cuts.into_iter().collect();
        let runs: Vec<(u64, u64)> = cuts.chunks_exact(2).map(|cut| (cut[0], cut[1] - cut[0])).collect();
        let (_, tally) = send(&from, &to, &runs, limit);
        let (source, after) = (all(&from), all(&to));
        let mut zero = 0;
        for page in 0..PAGES {
            let sent = runs.iter().any(|(first, count)| (*first..first + count).contains(&page));
            let range = usize::try_from(page).unwrap() * 4096..usize::try_from(page + 1).unwrap() * 4096;
            let expected = if sent { &source[range.clone()] } else { &before[range.clone()] };
            prop_assert!(after[range.clone()] == *expected, "page {}", page);
            zero += u64::from(sent && source[range].iter().all(|byte| *byte == 0)) * 4096;
        }
        prop_assert_eq!(tally.memory_bytes, runs.iter().map(|run| run.1 * 4096).sum::<u64>());
        prop_assert_eq!(tally.zero_bytes, zero);
    }

    #[test]
    fn any_payload_is_survived(payload in prop::collection::vec(any::<u8>(), 0..200)) {
        let to = memory();
        if let Ok(pages) = Pages::open(&payload) {
            let _ = pages.apply(&to);
        }
    }

    #[test]
    fn zero_is_told_from_not(length in 0usize..5000, place: prop::sample::Index, byte in 1u8..) {
        let mut bytes = vec![0; length];
        prop_assert!(is_zero(&bytes));
        if length > 0 {
            bytes[place.index(length)] = byte;
            prop_assert!(!is_zero(&bytes));
        }
    }
}

#[test]
fn frames_are_full_and_zero_pages_cost_nothing() {
    let (from, to) = (memory(), memory());
    // All zero: one frame, and nothing is written to the destination.
    let (frames, tally) = send(&from, &to, &[(0, PAGES)], usize::MAX);
    assert_eq!(frames, 1);
    assert_eq!(tally.zero_bytes, PAGES * 4096);
    let slice = slice_of(&to, Gpa(BASE), 4096).unwrap();
    assert!(!slice.bitmap().dirty_at(0));
    // All data: 240 pages to a frame.
    for page in 0..PAGES {
        from.write_obj(1u8, GuestAddress(BASE + page * 4096 + 4095))
            .unwrap();
    }
    let (frames, tally) = send(&from, &to, &[(0, PAGES)], usize::MAX);
    assert_eq!(frames, 3);
    assert_eq!(tally.zero_bytes, 0);
    // A limit makes them smaller.
    let (frames, _) = send(&from, &to, &[(0, PAGES)], 40_000);
    assert_eq!(frames, 67);
}

#[test]
fn memory_that_is_not_there_is_named() {
    let memory = memory();
    let mut batch = PageBatch::new(PageSize::SIZE_4K, usize::MAX);
    let error = batch
        .append(&memory, Gpa(BASE + PAGES * 4096), 4096)
        .unwrap_err();
    assert!(error.to_string().contains("0x358000"), "{error}");
}
