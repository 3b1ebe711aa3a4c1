//! Tests of guest memory and its write log.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vm_memory::{Bytes, VolatileSlice};

use super::*;
use crate::addr::{Iova, IovaRange, PageSize};
use iova_bitmap::IovaBitmap;

const PAGE: u64 = 4096;

/// Two regions with a hole: 1 MiB at 0 and 512 KiB at 2 MiB.
fn two_regions() -> GuestMemory {
    map_ram(vec![
        RamMapping {
            gpa: Gpa(0),
            len: 0x10_0000,
            backing: Backing::Anonymous,
        },
        RamMapping {
            gpa: Gpa(0x20_0000),
            len: 0x8_0000,
            backing: Backing::Anonymous,
        },
    ])
    .unwrap()
}

fn range(first: u64, len: u64) -> IovaRange {
    IovaRange::new(Iova(first), len).unwrap()
}

/// Drains `window` and gives the first addresses of the pages that were set.
fn drained(memory: &GuestMemory, window: IovaRange) -> Vec<u64> {
    let mut bitmap = IovaBitmap::over(window, LOG_PAGE).unwrap();
    drain_writes(memory, window, &mut bitmap).unwrap();
    pages(&bitmap)
}

fn pages(bitmap: &IovaBitmap) -> Vec<u64> {
    bitmap
        .runs()
        .flat_map(|run| (run.first().0..=run.last().0).step_by(4096))
        .collect()
}

#[test]
fn writes_through_vm_memory_are_logged_to_their_last_byte() {
    let memory = two_regions();
    let all = range(0, 0x40_0000);
    memory.write_slice(&[1, 2], GuestAddress(0x1fff)).unwrap();
    memory.write_obj(7u64, GuestAddress(0x20_0000)).unwrap();
    assert_eq!(drained(&memory, all), [0x1000, 0x2000, 0x20_0000]);
    assert_eq!(
        drained(&memory, all),
        [] as [u64; 0],
        "a drain takes the bits"
    );
    memory.read_obj::<u64>(GuestAddress(0x3000)).unwrap();
    assert_eq!(drained(&memory, all), [] as [u64; 0], "a read is no write");
}

#[test]
fn a_slice_marks_where_it_lies() {
    let memory = two_regions();
    let slice: VolatileSlice<'_, _> = memory.get_slice(GuestAddress(0x5000), 0x2000).unwrap();
    slice.write_obj(1u8, 0x1000).unwrap();
    assert_eq!(drained(&memory, range(0, 0x10_0000)), [0x6000]);
}

#[test]
fn mark_written_spans_regions_and_leaves_out_holes() {
    let memory = two_regions();
    mark_written(&memory, GuestAddress(0xf_f000), 0x10_2001);
    mark_written(&memory, GuestAddress(0x3000), 0);
    mark_written(&memory, GuestAddress(0x30_0000), 5);
    mark_written(&memory, GuestAddress(u64::MAX), 2);
    let all = range(0, 0x40_0000);
    assert_eq!(drained(&memory, all), [0xf_f000, 0x20_0000, 0x20_1000]);
    mark_written(&memory, GuestAddress(0x27_ffff), 1);
    assert_eq!(drained(&memory, all), [0x27_f000], "a region's last byte");
    mark_written(&memory, GuestAddress(0x27_ffff), usize::MAX);
    assert_eq!(drained(&memory, all), [] as [u64; 0], "no such range");
}

#[test]
fn a_drain_leaves_what_is_outside_its_window() {
    let memory = two_regions();
    mark_written(&memory, GuestAddress(0), 0x10_0000);
    // From the middle of one word to the middle of another.
    let window = range(3 * PAGE, 100 * PAGE);
    let mut bitmap = IovaBitmap::over(window, LOG_PAGE).unwrap();
    drain_writes(&memory, window, &mut bitmap).unwrap();
    assert_eq!(bitmap.count(), 100);
    let rest = drained(&memory, range(0, 0x10_0000));
    assert_eq!(rest.len(), 256 - 100);
    assert!(
        rest.iter()
            .all(|page| !(3 * PAGE..103 * PAGE).contains(page))
    );
}

#[test]
fn a_drain_that_would_lose_pages_is_refused_and_takes_nothing() {
    let memory = two_regions();
    mark_written(&memory, GuestAddress(0x1000), 1);
    let mut small = IovaBitmap::new(Iova(0x1000), 0x1000, LOG_PAGE).unwrap();
    let window = range(0, 0x10_0000);
    assert!(matches!(
        drain_writes(&memory, window, &mut small),
        Err(DrainError::NotCovered { .. })
    ));
    assert_eq!(drained(&memory, window), [0x1000]);

    let odd = GuestMemory::from_ranges(&[(GuestAddress(0x800), 0x2000)]).unwrap();
    mark_written(&odd, GuestAddress(0x800), 1);
    let mut bitmap = IovaBitmap::new(Iova(0), 0x10_0000, LOG_PAGE).unwrap();
    assert!(matches!(
        drain_writes(&odd, window, &mut bitmap),
        Err(DrainError::RegionMisaligned(Gpa(0x800)))
    ));
    assert!(bitmap.is_empty());
}

#[test]
fn drains_into_coarser_pages() {
    let memory = two_regions();
    mark_written(&memory, GuestAddress(0x1_2000), 1);
    let window = range(0, 0x10_0000);
    let mut bitmap = IovaBitmap::over(window, PageSize::new(0x1_0000).unwrap()).unwrap();
    drain_writes(&memory, window, &mut bitmap).unwrap();
    let runs: Vec<_> = bitmap.runs().collect();
    assert_eq!(runs, [range(0x1_0000, 0x1_0000)]);
}

#[test]
fn forgotten_writes_are_not_reported() {
    let memory = two_regions();
    mark_written(&memory, GuestAddress(0), 0x10_0000);
    forget_writes(&memory, range(0, 0xf_f000));
    assert_eq!(drained(&memory, range(0, 0x10_0000)), [0xf_f000]);
}

/// Lets two threads go on together: each calls it with the same `step`, counting from 1.
fn meet(arrived: &AtomicU32, step: u32) {
    arrived.fetch_add(1, Ordering::AcqRel);
    let mut spins = 0u32;
    while arrived.load(Ordering::Acquire) < 2 * step {
        spins += 1;
        if spins.is_multiple_of(1000) {
            std::thread::yield_now();
        }
    }
}

#[test]
fn no_write_is_lost_between_a_writer_and_a_drain() {
    // What the unconditional OR is for. In each round the bit is set already when, at the same
    // time, one thread writes a new value and the other takes the bit and reads the value. Unless
    // it reads the new one, the bit must be set again. (With the OR skipped for a set bit, a
    // release build of this loses some 200 of the 40,000 writes on two cores; a debug build is too
    // slow between the write and the load to show it.)
    const ROUNDS: u32 = 40_000;
    let memory = two_regions();
    let at = GuestAddress(0x4000);
    let window = range(at.0, PAGE);
    let mut bitmap = IovaBitmap::over(window, LOG_PAGE).unwrap();
    let arrived = AtomicU32::new(0);
    let mut lost = 0;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for round in 1..=ROUNDS {
                // Marked here so that the writer's core has the bit at hand.
                mark_written(&memory, at, 1);
                meet(&arrived, 3 * round - 2);
                memory.store(round, at, Ordering::Relaxed).unwrap();
                meet(&arrived, 3 * round - 1);
                meet(&arrived, 3 * round);
            }
        });
        for round in 1..=ROUNDS {
            meet(&arrived, 3 * round - 2);
            // From before the write to after it, as rounds go by.
            for delay in 0..round % 512 {
                std::hint::black_box(delay);
            }
            drain_writes(&memory, window, &mut bitmap).unwrap();
            let read: u32 = memory.load(at, Ordering::Relaxed).unwrap();
            meet(&arrived, 3 * round - 1);
            bitmap.clear();
            drain_writes(&memory, window, &mut bitmap).unwrap();
            lost += u32::from(read != round && bitmap.is_empty());
            bitmap.clear();
            meet(&arrived, 3 * round);
        }
    });
    assert_eq!(lost, 0, "writes read too early and not marked again");
}

#[test]
fn a_file_is_mapped_shared_at_its_offset() {
    let fd: OwnedFd = memfd_create("ferry-test", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&fd, 0x3000).unwrap();
    let other = fd.try_clone().unwrap();
    let map = |fd: OwnedFd, offset, len| {
        map_ram(vec![RamMapping {
            gpa: Gpa(0x10_0000),
            len,
            backing: Backing::File {
                file: File::from(fd),
                offset,
            },
        }])
    };
    let one = map(fd.try_clone().unwrap(), 0, 0x3000).unwrap();
    let two = map(fd, 0x1000, 0x2000).unwrap();
    one.write_obj(0x55u8, GuestAddress(0x10_1000)).unwrap();
    assert_eq!(two.read_obj::<u8>(GuestAddress(0x10_0000)).unwrap(), 0x55);
    assert!(matches!(
        map(other, 0x2000, 0x2000),
        Err(MemoryError::FileTooShort { needed: 0x4000, .. })
    ));
}

#[test]
fn bad_layouts_are_refused() {
    let anonymous = |gpa, len| RamMapping {
        gpa: Gpa(gpa),
        len,
        backing: Backing::Anonymous,
    };
    for (gpa, len) in [
        (0, 0),
        (0x800, 0x1000),
        (0, 0x1800),
        (u64::MAX - 0xfff, 0x2000),
    ] {
        assert!(
            matches!(
                map_ram(vec![anonymous(gpa, len)]),
                Err(MemoryError::BadRegion { .. })
            ),
            "{gpa:#x}+{len:#x}"
        );
    }
    assert!(matches!(map_ram(vec![]), Err(MemoryError::Layout(_))));
    assert!(matches!(
        map_ram(vec![anonymous(0, 0x2000), anonymous(0x1000, 0x1000)]),
        Err(MemoryError::Layout(_))
    ));
}
