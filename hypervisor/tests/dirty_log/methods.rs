//! What each method tells, and what it refuses.

use std::collections::BTreeSet;
use std::sync::Arc;

use hypervisor::{DirtyLogChoice, DirtyLogMethod, Error, Hypervisor, SlotFlags};
use vm_memory::GuestAddress;
use vm_memory::mmap::MmapRegion;

use crate::common::{PAGES, SMALL_RING, manual, methods, read, ring};
use crate::ring3::{DATA, Guest, PAGE, host};

#[test]
fn every_method_tells_exactly_the_pages_written() {
    let test = "every_method_tells_exactly_the_pages_written";
    let Some(host) = host(test) else {
        return;
    };
    for choice in methods(&host, test) {
        let mut guest = Guest::new(&host, choice, PAGES).unwrap();
        println!("{choice:?}: {:?}", guest.vm.dirty_log_method());
        guest.write(0, PAGES, 1);
        let off = read(&*guest.vm, guest.slot);
        assert!(matches!(off, Err(Error::DirtyLogOff { .. })), "{off:?}");
        guest.log();
        assert_eq!(guest.dirty(), BTreeSet::new(), "{choice:?}: nothing yet");
        for (first, count, stride) in [
            (0, 1, 1),
            (PAGES - 1, 1, 1),
            (63, 2, 1),
            (0, PAGES, 1),
            (1, PAGES / 3, 3),
            (7, 2, 100),
        ] {
            let wanted = (0..count).map(|n| first + n * stride).collect();
            guest.write(first, count, stride);
            guest.pass();
            assert_eq!(guest.dirty(), wanted, "{choice:?}");
            assert_eq!(guest.dirty(), BTreeSet::new(), "{choice:?}: it is cleared");
        }
        guest.write(0, PAGES, 1);
        guest.log();
        assert_eq!(guest.dirty(), BTreeSet::new(), "{choice:?}: forgotten");
        guest.vm.set_dirty_logging(guest.slot, false).unwrap();
        guest.vm.set_dirty_logging(guest.slot, false).unwrap();
        guest.write(0, PAGES, 1);
        guest.log();
        assert_eq!(guest.dirty(), BTreeSet::new(), "{choice:?}: was off");
        let short = guest.vm.read_dirty_log(guest.slot, &mut [0; 3]);
        let expected = matches!(
            short,
            Err(Error::DirtyLogBuffer {
                wanted: 4,
                given: 3,
                ..
            })
        );
        assert!(expected, "{short:?}");
    }
}

#[test]
fn a_slot_that_goes_leaves_nothing_behind() {
    let test = "a_slot_that_goes_leaves_nothing_behind";
    let Some(host) = host(test) else {
        return;
    };
    for choice in methods(&host, test) {
        let mut guest = Guest::new(&host, choice, PAGES).unwrap();
        guest.log();
        guest.write(0, PAGES, 1);
        guest.vm.remove_memory(guest.slot).unwrap();
        let gone = read(&*guest.vm, guest.slot);
        assert!(matches!(gone, Err(Error::UnknownSlot { .. })), "{gone:?}");
        let small = Arc::new(MmapRegion::<()>::new(70 * PAGE).unwrap());
        let again = guest
            .vm
            .add_memory(GuestAddress(DATA), small.clone(), SlotFlags::default())
            .unwrap();
        assert_eq!(again, guest.slot, "numbers are used again");
        guest.data = small;
        let off = read(&*guest.vm, guest.slot);
        assert!(matches!(off, Err(Error::DirtyLogOff { .. })), "{off:?}");
        guest.log();
        assert_eq!(guest.dirty(), BTreeSet::new(), "{choice:?}");
        guest.write(69, 1, 1);
        assert_eq!(guest.dirty(), BTreeSet::from([69]), "{choice:?}");
    }
}

#[test]
fn logging_may_start_with_everything_dirty() {
    let Some(mut guest) = manual("logging_may_start_with_everything_dirty", PAGES) else {
        return;
    };
    let DirtyLogMethod::BitmapManualClear { initially_set } = guest.vm.dirty_log_method() else {
        return;
    };
    for _ in 0..2 {
        guest.vm.set_dirty_logging(guest.slot, true).unwrap();
        let all = (0..PAGES).filter(|_| initially_set).collect();
        assert_eq!(read(&*guest.vm, guest.slot).unwrap(), all);
        guest.write(5, 3, 1);
        guest.clear(0, &[u64::MAX]);
        guest.write(9, 2, 1);
        let dirty = read(&*guest.vm, guest.slot).unwrap();
        let wanted: BTreeSet<_> = all.into_iter().filter(|page| *page >= 64).collect();
        assert_eq!(dirty, &wanted | &BTreeSet::from([9, 10]));
    }
}

#[test]
fn what_is_not_cleared_is_told_again() {
    let Some(mut guest) = manual("what_is_not_cleared_is_told_again", PAGES) else {
        return;
    };
    guest.log();
    let dirty = |guest: &Guest| read(&*guest.vm, guest.slot).unwrap();
    guest.write(60, 8, 1);
    guest.write(PAGES - 1, 1, 1);
    let all: BTreeSet<_> = (60..68).chain([PAGES - 1]).collect();
    assert_eq!(dirty(&guest), all);
    assert_eq!(dirty(&guest), all, "a read clears nothing");

    // Pages 62 and 66, the last, and others that nobody wrote.
    guest.clear(0, &[1 << 62 | 0b1111, 1 << 2, 0]);
    let left: BTreeSet<_> = all
        .iter()
        .copied()
        .filter(|p| ![62, 66].contains(p))
        .collect();
    assert_eq!(dirty(&guest), left);
    guest.clear(192, &[u64::MAX]);
    let left: BTreeSet<_> = left.into_iter().filter(|p| *p != PAGES - 1).collect();
    assert_eq!(dirty(&guest), left);

    // Cleared pages are told again when they are written again, clean ones were not hurt.
    guest.write(62, 1, 1);
    guest.write(0, 2, 1);
    guest.write(PAGES - 1, 1, 1);
    let wanted: BTreeSet<_> = left.iter().copied().chain([0, 1, 62, PAGES - 1]).collect();
    assert_eq!(dirty(&guest), wanted);
    guest.clear(0, &[]);
    guest.clear(192, &[]);
    assert_eq!(dirty(&guest), wanted);
}

#[test]
fn a_piece_to_clear_is_checked() {
    let Some(guest) = manual("a_piece_to_clear_is_checked", PAGES) else {
        return;
    };
    let clear = |first, words: &[u64]| guest.vm.clear_dirty_log(guest.slot, first, words);
    let off = clear(0, &[1]);
    assert!(matches!(off, Err(Error::DirtyLogOff { .. })), "{off:?}");
    guest.log();
    for (first, words) in [
        (1, 1),
        (63, 1),
        (0, 5),
        (192, 2),
        (256, 0),
        (u64::MAX - 63, 1),
    ] {
        let refused = clear(first, &vec![1; words]);
        let expected = matches!(refused, Err(Error::DirtyLogPiece { .. }));
        assert!(expected, "{first} {words}: {refused:?}");
    }
    guest.vm.remove_memory(guest.slot).unwrap();
    let gone = clear(0, &[1]);
    assert!(matches!(gone, Err(Error::UnknownSlot { .. })), "{gone:?}");
    let Some(host) = host("a_piece_to_clear_is_checked") else {
        return;
    };
    let guest = Guest::new(&host, DirtyLogChoice::BitmapAutoClear, PAGES).unwrap();
    guest.log();
    let refused = guest.vm.clear_dirty_log(guest.slot, 0, &[1]);
    assert!(matches!(refused, Err(Error::Unsupported { .. })));
}

#[test]
fn a_ring_that_overflows_loses_nothing() {
    let pages = 20_000 + 17;
    let Some(mut guest) = ring("a_ring_that_overflows_loses_nothing", SMALL_RING, pages) else {
        return;
    };
    guest.log();
    for round in 1..=2 {
        guest.write(0, pages, 1);
        let exits = guest.vm.dirty_ring_full_exits();
        println!("{pages} pages, ring of 1024: {exits} exits");
        assert!(exits >= round * 19, "{exits} exits of a full ring");
        assert_eq!(guest.dirty(), (0..pages).collect());
    }
    // A ring that is full when logging stops does not keep the vCPU from running.
    guest.write(0, 900, 1);
    guest.vm.set_dirty_logging(guest.slot, false).unwrap();
    let before = guest.vm.dirty_ring_full_exits();
    guest.write(0, pages, 1);
    assert_eq!(guest.vm.dirty_ring_full_exits(), before);
    guest.log();
    guest.write(3, 1, 1);
    assert_eq!(guest.dirty(), BTreeSet::from([3]));
}

#[test]
fn rings_of_impossible_sizes_are_refused() {
    let test = "rings_of_impossible_sizes_are_refused";
    let Some(guest) = ring(test, SMALL_RING, PAGES) else {
        return;
    };
    let DirtyLogMethod::Ring { entries: 1024 } = guest.vm.dirty_log_method() else {
        panic!("{:?}", guest.vm.dirty_log_method());
    };
    let Some(host) = host(test) else {
        return;
    };
    let limit = host.capabilities().dirty_log.ring_entries;
    for wrong in [0, 3, 1000, limit + 1, limit * 2, u32::MAX] {
        let entries = Some(wrong);
        let refused = Guest::new(&host, DirtyLogChoice::Ring { entries }, PAGES).err();
        let expected = matches!(refused, Some(Error::DirtyRingEntries { .. }));
        assert!(expected, "{wrong}: {refused:?}");
    }
    // 16 entries are less than a page.
    for small in [1, 16] {
        let entries = Some(small);
        let refused = Guest::new(&host, DirtyLogChoice::Ring { entries }, PAGES).err();
        let expected = matches!(refused, Some(Error::DirtyRingRefused { .. }));
        assert!(expected, "{small}: {refused:?}");
    }
    let entries = Some(limit);
    Guest::new(&host, DirtyLogChoice::Ring { entries }, PAGES).unwrap();
}
