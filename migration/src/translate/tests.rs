//! Tests of translation by example.

use super::fakes::{Device, FakeLog, PAGE, mapping, range, refusal};
use super::*;
use crate::addr::{Gpa, Iova};
use crate::dirty::{Collect, GuestDirty, WINDOW_BYTES};
use crate::error_chain::ErrorChain;
use crate::memory::RamRegion;
use crate::source::DirtySource;

/// RAM of 256 pages, and 64 more above 4 GiB.
const LOW: u64 = 256;
const HIGH: u64 = 64;
const HIGH_GPA: u64 = 1 << 32;

fn ram() -> [IovaRange; 2] {
    [range(0, LOW), range(HIGH_GPA, HIGH)]
}

/// What the device's side of a change does when it works.
fn done() -> Result<(), DirtyError> {
    Ok(())
}

fn refused() -> Result<(), DirtyError> {
    Err(refusal())
}

/// A started log of pages of `page` bytes under `map`.
fn started(page: u64, map: IovaMap) -> (FakeLog, Translated<FakeLog>, MapHandle) {
    let log = FakeLog::new(page);
    let (mut source, handle) = Translated::mapped(log.clone(), map);
    source.start(&ram()).unwrap();
    (log, source, handle)
}

/// A round in windows of 64 pages: the pages reported.
fn round(source: &mut dyn DirtySource) -> Result<Vec<u64>, DirtyError> {
    let mut pages = Vec::new();
    for ram in ram() {
        for first in (ram.first().0..ram.last().0).step_by(64 * 4096) {
            let window = range(first, 64);
            let mut bitmap = IovaBitmap::over(window, PageSize::SIZE_4K).unwrap();
            let reported = source.report(window, &mut bitmap)?;
            assert_eq!(reported.pages, Some(bitmap.count()));
            for run in bitmap.runs() {
                pages.extend((run.first().0..run.last().0).step_by(4096));
            }
        }
    }
    Ok(pages)
}

fn ranges(mappings: &[Mapping]) -> IovaMap {
    IovaMap::ranges(mappings).unwrap()
}

fn write(log: &FakeLog, iovas: &[u64]) {
    let mut device = log.0.lock();
    for iova in iovas {
        Device::write(&mut device, *iova);
    }
}

#[test]
fn maps_that_cannot_be_are_refused() {
    let new = |iova, gpa, len| Mapping::new(Iova(iova), Gpa(gpa), len);
    let top = u64::MAX - PAGE + 1;
    assert!(matches!(new(0, 0, 0), Err(MapError::BadIova { .. })));
    assert!(matches!(
        new(top, 0, 2 * PAGE),
        Err(MapError::BadIova { .. })
    ));
    assert!(matches!(
        new(0, top, 2 * PAGE),
        Err(MapError::BadGpa { .. })
    ));
    for (iova, gpa, len) in [(1, 0, PAGE), (0, 1, PAGE), (0, 0, PAGE + 1)] {
        assert!(matches!(
            new(iova, gpa, len),
            Err(MapError::Misaligned { .. })
        ));
    }
    assert!(new(top, top, PAGE).is_ok());

    let overlapping = [mapping(0, 0, 4), mapping(3 * PAGE, 0, 1)];
    assert_eq!(
        IovaMap::ranges(&overlapping).err(),
        Some(MapError::Overlap {
            first: Iova(0),
            last: Iova(4 * PAGE - 1)
        })
    );
    assert_eq!(IovaMap::ranges(&[]).err(), Some(MapError::Empty));
    assert_eq!(IovaMap::live(&[]).err(), Some(MapError::Empty));
}

#[test]
fn the_aperture_of_a_list_is_its_addresses_merged() {
    let top = u64::MAX - PAGE + 1;
    let map = ranges(&[
        mapping(top, 0, 1),
        mapping(PAGE, 0, 1),
        mapping(0, 9 * PAGE, 1),
        mapping(3 * PAGE, 0, 1),
    ]);
    assert_eq!(
        map.aperture(),
        [range(0, 2), range(3 * PAGE, 1), range(top, 1)]
    );
    let (log, ..) = started(4096, map);
    assert_eq!(
        log.0.lock().started.clone().unwrap(),
        [range(0, 2), range(3 * PAGE, 1), range(top, 1)]
    );
}

#[test]
fn under_the_identity_map_a_window_goes_straight_to_the_log() {
    let log = FakeLog::new(4096);
    let mut source = Translated::identity(log.clone());
    source.start(&ram()).unwrap();
    assert_eq!(log.0.lock().started.clone().unwrap(), ram());
    write(&log, &[0, 5 * PAGE, HIGH_GPA + 63 * PAGE]);
    assert_eq!(
        round(&mut source).unwrap(),
        [0, 5 * PAGE, HIGH_GPA + 63 * PAGE]
    );
    let windows = log.0.lock().windows.clone();
    assert_eq!(windows.len(), 5);
    assert_eq!(windows.last(), Some(&range(HIGH_GPA, HIGH)));
}

#[test]
fn every_alias_and_every_range_of_ram_is_reached() {
    // Two ways to the same pages, the last page of all IOVAs, and one across the end of low RAM.
    let top = u64::MAX - PAGE + 1;
    let (log, mut source, handle) = started(
        4096,
        ranges(&[
            mapping(0x10_0000, 0, 8),
            mapping(0x20_0000, 4 * PAGE, 8),
            mapping(0x30_0000, (LOW - 2) * PAGE, 4),
            mapping(top, HIGH_GPA, 1),
        ]),
    );
    write(&log, &[0x10_0000 + 5 * PAGE, 0x20_0000 + PAGE, top]);
    assert_eq!(round(&mut source).unwrap(), [5 * PAGE, HIGH_GPA]);
    write(&log, &[0x20_0000 + 3 * PAGE, 0x10_0000]);
    assert_eq!(round(&mut source).unwrap(), [0, 7 * PAGE]);
    assert_eq!(handle.pages_outside_ram(), 0);
    write(&log, &[0, 1, 2, 3].map(|page| 0x30_0000 + page * PAGE));
    assert_eq!(
        round(&mut source).unwrap(),
        [(LOW - 2) * PAGE, (LOW - 1) * PAGE]
    );
    assert_eq!(handle.pages_outside_ram(), 2);
    // Where nothing is mapped nothing can be written, and nobody asks.
    write(&log, &[0x40_0000]);
    assert_eq!(round(&mut source).unwrap(), [0u64; 0]);
}

#[test]
fn a_page_of_the_log_over_several_mappings_names_all_of_them() {
    let (log, mut source, _) = started(
        0x4000,
        ranges(&[mapping(PAGE, 9 * PAGE, 1), mapping(2 * PAGE, 3 * PAGE, 4)]),
    );
    assert_eq!(source.precision(), Precision::Coarse);
    write(&log, &[2 * PAGE]);
    assert_eq!(round(&mut source).unwrap(), [3, 4, 9].map(|n| n * PAGE));
    // The first of them goes: what the page says of the others must not go with it.
    let (log, mut source, handle) = started(
        0x4000,
        ranges(&[mapping(PAGE, 9 * PAGE, 1), mapping(2 * PAGE, 3 * PAGE, 4)]),
    );
    write(&log, &[2 * PAGE]);
    handle.unmap(range(PAGE, 1), done).unwrap();
    assert_eq!(round(&mut source).unwrap(), [3, 4, 9].map(|n| n * PAGE));
}

#[test]
fn neighbours_are_read_at_once_and_never_more_than_a_window() {
    let apart = 1 << 40;
    let (log, mut source, _) = started(
        4096,
        ranges(&[
            mapping(0, 0, 4),
            mapping(4 * PAGE, 32 * PAGE, 4),
            mapping(apart, 0, 2 * WINDOW_BYTES / PAGE + 1),
        ]),
    );
    write(&log, &[3 * PAGE, 4 * PAGE, apart + 7 * PAGE]);
    assert_eq!(round(&mut source).unwrap(), [3, 7, 32].map(|n| n * PAGE));
    let window = WINDOW_BYTES / PAGE;
    assert_eq!(
        log.0.lock().windows,
        [
            range(0, 8),
            range(apart, window),
            range(apart + WINDOW_BYTES, window),
            range(apart + 2 * WINDOW_BYTES, 1)
        ]
    );
}

#[test]
fn a_round_reads_the_log_once_and_one_that_ended_early_loses_nothing() {
    let (log, mut source, _) = started(4096, ranges(&[mapping(0, 0, LOW)]));
    write(&log, &[0, 200 * PAGE]);
    let window = range(0, 64);
    let mut bitmap = IovaBitmap::over(window, PageSize::SIZE_4K).unwrap();
    source.report(window, &mut bitmap).unwrap();
    assert_eq!(bitmap.count(), 1);
    assert_eq!(round(&mut source).unwrap(), [200 * PAGE]);
    assert_eq!(log.0.lock().windows.len(), 2);
}

#[test]
fn what_was_written_goes_before_its_mapping() {
    let (log, mut source, handle) = started(4096, IovaMap::live(&[range(0, 64)]).unwrap());
    handle.map(mapping(0, 8 * PAGE, 2), done).unwrap();
    write(&log, &[PAGE]);
    // The device writes until the very end.
    handle
        .unmap(range(0, 2), || {
            write(&log, &[0]);
            done()
        })
        .unwrap();
    // The same address leads elsewhere now.
    handle.map(mapping(0, 100 * PAGE, 1), done).unwrap();
    write(&log, &[0]);
    assert_eq!(round(&mut source).unwrap(), [8, 9, 100].map(|n| n * PAGE));
    assert_eq!(handle.current().touching(range(0, 64)).count(), 1);
}

#[test]
fn an_unmap_without_a_log_asks_nobody() {
    let log = FakeLog::new(4096);
    let map = IovaMap::live(&[range(0, 64)]).unwrap();
    let (mut source, handle) = Translated::mapped(log.clone(), map);
    handle.map(mapping(0, 0, 1), done).unwrap();
    handle.unmap(range(0, 64), done).unwrap();
    assert!(round(&mut source).is_err(), "not started");
    source.start(&ram()).unwrap();
    source.stop().unwrap();
    source.stop().unwrap();
    handle.map(mapping(0, 0, 1), done).unwrap();
    handle.unmap(range(0, 1), done).unwrap();
    assert!(round(&mut source).is_err(), "stopped");
    assert!(log.0.lock().windows.is_empty());
}

#[test]
fn a_change_that_cannot_be_touches_nothing() {
    let (_, _, handle) = started(4096, IovaMap::live(&[range(0, 64)]).unwrap());
    handle.map(mapping(0, 0, 4), done).unwrap();
    let never = || -> Result<(), DirtyError> { unreachable!("the device was touched") };
    let outside = handle.map(mapping(63 * PAGE, 0, 2), never).unwrap_err();
    assert!(matches!(
        outside,
        ChangeError::Map(MapError::OutsideAperture { .. })
    ));
    let twice = handle.map(mapping(3 * PAGE, 0, 2), never).unwrap_err();
    assert!(matches!(twice, ChangeError::Map(MapError::Overlap { .. })));
    for cut in [range(PAGE, 9), range(0, 3)] {
        let split = handle.unmap(cut, never).unwrap_err();
        assert!(matches!(split, ChangeError::Map(MapError::Splits { .. })));
    }
    assert_eq!(handle.current().touching(range(0, 64)).count(), 1);
}

#[test]
fn a_device_that_refuses_leaves_the_table_as_it_was() {
    let (log, mut source, handle) = started(4096, IovaMap::live(&[range(0, 64)]).unwrap());
    // It was mapped for a moment.
    let error = handle
        .map(mapping(0, 3 * PAGE, 1), || {
            write(&log, &[0]);
            refused()
        })
        .unwrap_err();
    assert!(matches!(error, ChangeError::Device(_)));
    assert_eq!(handle.current().touching(range(0, 64)).count(), 0);
    assert_eq!(round(&mut source).unwrap(), [3 * PAGE]);

    handle.map(mapping(0, 5 * PAGE, 1), done).unwrap();
    let error = handle.unmap(range(0, 1), refused).unwrap_err();
    assert!(matches!(error, ChangeError::Device(_)));
    write(&log, &[0]);
    assert_eq!(round(&mut source).unwrap(), [5 * PAGE], "still mapped");
}

#[test]
fn a_log_that_forgets_what_is_unmapped_makes_all_of_it_dirty() {
    for refuses in [false, true] {
        let (log, mut source, handle) = started(4096, IovaMap::live(&[range(0, 64)]).unwrap());
        log.0.lock().after_unmap = AfterUnmap::Forgotten;
        handle.map(mapping(0, 5 * PAGE, 2), done).unwrap();
        handle.map(mapping(2 * PAGE, PAGE, 1), done).unwrap();
        let remove = if refuses { refused } else { done };
        assert_eq!(handle.unmap(range(0, 2), remove).is_err(), refuses);
        assert!(log.0.lock().windows.is_empty(), "it would not know");
        assert_eq!(round(&mut source).unwrap(), [5, 6].map(|n| n * PAGE));
    }
}

#[test]
fn an_unmap_whose_report_fails_makes_everything_dirty() {
    let regions = [(0, LOW), (HIGH_GPA, HIGH)].map(|(gpa, pages)| RamRegion {
        gpa: Gpa(gpa),
        len: pages * PAGE,
    });
    let mut guest = GuestDirty::new(&regions, PageSize::SIZE_4K).unwrap();
    let (log, source, handle) = started(4096, IovaMap::live(&[range(0, 64)]).unwrap());
    let mut sources: Vec<Box<dyn DirtySource>> = vec![Box::new(source)];
    handle.map(mapping(0, 0, 2), done).unwrap();
    handle.map(mapping(8 * PAGE, 7 * PAGE, 2), done).unwrap();
    log.0.lock().fail_report = Some(0);
    let error = handle.unmap(range(0, 2), done).unwrap_err();
    assert!(matches!(error, ChangeError::Log(_)));
    let left = handle.current();
    assert_eq!(left.touching(range(0, 64)).count(), 1, "it is gone");
    // The log works again, but what it lost it has lost; a further unmap asks nobody.
    handle.unmap(range(8 * PAGE, 2), done).unwrap();
    let failed = guest.collect(&mut sources, Collect::default());
    let text = ErrorChain(&failed.unwrap_err()).to_string();
    assert!(text.contains("nic0: dirty log report failed: an earlier report"));
    assert_eq!(guest.dirty_pages(), LOW + HIGH);
    // Started anew it is as any other.
    let how = Collect {
        restarts: 1,
        threads: 1,
    };
    guest.collect(&mut sources, how).unwrap();
    while guest.next_run(u64::MAX, &mut []).unwrap().is_some() {}
    guest.acknowledge();
    handle.map(mapping(0, 9 * PAGE, 1), done).unwrap();
    write(&log, &[0]);
    guest.collect(&mut sources, Collect::default()).unwrap();
    assert_eq!(guest.dirty_pages(), 1);
}

#[test]
fn a_failed_report_holds_until_a_new_start() {
    let (log, mut source, _) = started(4096, ranges(&[mapping(0, 0, 2)]));
    log.0.lock().fail_report = Some(0);
    assert!(round(&mut source).is_err());
    assert!(round(&mut source).is_err());
    log.0.lock().fail_start = true;
    assert!(source.start(&ram()).is_err());
    assert!(round(&mut source).is_err());
    source.start(&ram()).unwrap();
    write(&log, &[PAGE]);
    assert_eq!(round(&mut source).unwrap(), [PAGE]);
}

#[test]
fn a_window_that_is_no_ram_is_refused() {
    let (_, mut source, _) = started(4096, ranges(&[mapping(0, 0, 2)]));
    let window = range((LOW - 1) * PAGE, 2);
    let mut bitmap = IovaBitmap::over(window, PageSize::SIZE_4K).unwrap();
    assert!(matches!(
        source.report(window, &mut bitmap),
        Err(DirtyError::NotTracked { .. })
    ));
    // A bitmap that would lose pages.
    let mut small = IovaBitmap::over(range(0, 1), PageSize::SIZE_4K).unwrap();
    assert!(source.report(range(0, 2), &mut small).is_err());
}
