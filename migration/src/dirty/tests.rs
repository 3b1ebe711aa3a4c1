//! Tests of the guest's dirty pages by example.

use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

use super::fakes::FakeSource;
use super::*;
use crate::memory::{Backing, MemoryHandle, RamMapping, map_ram, mark_written, ram_regions};
use crate::source::Precision;

const PAGE: u64 = 4096;
const LOW: RamRegion = RamRegion {
    gpa: Gpa(0),
    len: 128 * PAGE,
};
const HIGH: RamRegion = RamRegion {
    gpa: Gpa(0x1_0000_0000),
    len: 70 * PAGE,
};

fn guest() -> GuestDirty {
    GuestDirty::new(&[LOW, HIGH], PageSize::SIZE_4K).unwrap()
}

fn run(gpa: u64, pages: u64) -> GpaRun {
    GpaRun {
        gpa: Gpa(gpa),
        len: pages * PAGE,
    }
}

fn page_range(gpa: u64, pages: u64) -> IovaRange {
    IovaRange::new(Iova(gpa), pages * PAGE).unwrap()
}

fn runs(dirty: &mut GuestDirty, max_bytes: u64) -> Vec<GpaRun> {
    std::iter::from_fn(|| dirty.next_run(max_bytes, &mut []).unwrap()).collect()
}

#[test]
fn layouts_that_are_no_guest_are_refused() {
    let new = |regions: &[RamRegion]| GuestDirty::new(regions, PageSize::SIZE_4K);
    assert!(matches!(new(&[]), Err(RamLayoutError::Empty)));
    assert!(matches!(
        new(&[HIGH, LOW]),
        Err(RamLayoutError::OutOfOrder { gpa: Gpa(0) })
    ));
    assert!(matches!(
        new(&[
            LOW,
            RamRegion {
                gpa: Gpa(127 * PAGE),
                len: PAGE
            }
        ]),
        Err(RamLayoutError::OutOfOrder { .. })
    ));
    for (gpa, len) in [(0x10, PAGE), (0, PAGE + 1)] {
        let region = RamRegion { gpa: Gpa(gpa), len };
        assert!(matches!(
            new(&[region]),
            Err(RamLayoutError::Misaligned { .. })
        ));
    }
    for (gpa, len) in [(0, 0), (0xffff_ffff_ffff_f000, 2 * PAGE)] {
        let region = RamRegion { gpa: Gpa(gpa), len };
        assert!(matches!(new(&[region]), Err(RamLayoutError::Bitmap { .. })));
    }
}

#[test]
fn a_round_gives_each_page_once_cut_to_size() {
    let mut dirty = guest();
    assert_eq!(dirty.total_pages(), 198);
    dirty.mark_all();
    assert_eq!(dirty.dirty_pages(), 198);
    let got = runs(&mut dirty, 100 * PAGE);
    assert_eq!(
        got,
        [run(0, 100), run(100 * PAGE, 28), run(HIGH.gpa.0, 70)],
        "no run spans regions"
    );
    assert_eq!((dirty.dirty_pages(), dirty.in_flight_pages()), (0, 198));
    assert_eq!(dirty.next_run(u64::MAX, &mut []).unwrap(), None);
    dirty.acknowledge();
    dirty.put_back();
    assert_eq!(
        dirty.dirty_pages(),
        0,
        "acknowledged pages do not come back"
    );
}

#[test]
fn a_limit_below_a_page_gives_a_page() {
    let mut dirty = guest();
    dirty.mark_all();
    assert_eq!(dirty.next_run(0, &mut []).unwrap(), Some(run(0, 1)));
    assert_eq!(
        dirty.next_run(PAGE + 1, &mut []).unwrap(),
        Some(run(PAGE, 1))
    );
}

#[test]
fn the_last_page_of_the_address_space_is_tracked() {
    let top = RamRegion {
        gpa: Gpa(u64::MAX - PAGE + 1),
        len: PAGE,
    };
    let mut dirty = GuestDirty::new(&[top], PageSize::SIZE_4K).unwrap();
    dirty.mark_all();
    assert_eq!(
        dirty.next_run(u64::MAX, &mut []).unwrap(),
        Some(run(top.gpa.0, 1))
    );
    assert_eq!(dirty.next_run(u64::MAX, &mut []).unwrap(), None);
}

#[test]
fn what_two_sources_wrote_is_sent_once() {
    let mut dirty = guest();
    let vcpu = FakeSource::new("vcpu", PageSize::SIZE_4K);
    let nic = FakeSource::new("nic0", PageSize::new(16 * PAGE).unwrap());
    vcpu.script().lock().writes.push(page_range(20 * PAGE, 2));
    nic.script().lock().writes.push(page_range(21 * PAGE, 1));
    let mut sources: Vec<Box<dyn DirtySource>> = vec![Box::new(vcpu), Box::new(nic)];
    let reports = dirty.collect(&mut sources, Collect::default()).unwrap();
    let said: Vec<_> = reports
        .iter()
        .map(|report| (report.id.as_str(), report.pages, report.granularity))
        .collect();
    assert_eq!(
        said,
        [("vcpu", Some(2), PAGE), ("nic0", Some(16), 16 * PAGE)]
    );
    assert_eq!(runs(&mut dirty, u64::MAX), [run(16 * PAGE, 16)]);
    assert!(
        dirty
            .collect(&mut sources, Collect::default())
            .unwrap()
            .iter()
            .all(|report| report.pages == Some(0))
    );
}

#[test]
fn pages_in_flight_come_back() {
    let mut dirty = guest();
    let vcpu = FakeSource::new("vcpu", PageSize::SIZE_4K);
    let script = vcpu.script();
    let mut sources: Vec<Box<dyn DirtySource>> = vec![Box::new(vcpu)];
    script.lock().writes.push(page_range(0, 3));
    dirty.collect(&mut sources, Collect::default()).unwrap();
    assert_eq!(dirty.next_run(PAGE, &mut []).unwrap(), Some(run(0, 1)));
    // Written again while in flight: dirty and in flight.
    script.lock().writes.push(page_range(0, 1));
    dirty.collect(&mut sources, Collect::default()).unwrap();
    assert_eq!((dirty.dirty_pages(), dirty.in_flight_pages()), (3, 1));
    dirty.next_run(2 * PAGE, &mut []).unwrap();
    dirty.put_back();
    assert_eq!((dirty.dirty_pages(), dirty.in_flight_pages()), (3, 0));
    assert_eq!(runs(&mut dirty, u64::MAX), [run(0, 3)]);
}

#[test]
fn a_failed_report_makes_everything_dirty() {
    let mut dirty = guest();
    let broken = FakeSource::new("nic0", PageSize::SIZE_4K);
    broken.script().lock().fail_at = Some(Iova(HIGH.gpa.0));
    broken.script().lock().writes.push(page_range(0, 1));
    let other = FakeSource::new("vcpu", PageSize::SIZE_4K);
    let asked = other.script();
    asked.lock().writes.push(page_range(PAGE, 1));
    let mut sources: Vec<Box<dyn DirtySource>> = vec![Box::new(broken), Box::new(other)];
    let error = dirty.collect(&mut sources, Collect::default()).unwrap_err();
    assert!(matches!(error, DirtyError::Backend { source_id, .. } if source_id == "nic0"));
    assert_eq!(dirty.dirty_pages(), dirty.total_pages());
    assert!(asked.lock().writes.is_empty(), "all sources are asked");
}

#[test]
fn a_failed_source_is_started_anew_and_everything_is_sent() {
    let mut dirty = guest();
    let broken = FakeSource::new("nic0", PageSize::SIZE_4K);
    let script = broken.script();
    script.lock().fail_at = Some(Iova(LOW.gpa.0));
    let mut sources: Vec<Box<dyn DirtySource>> = vec![Box::new(broken)];
    let once = Collect {
        restarts: 1,
        ..Collect::default()
    };
    let report = dirty.collect(&mut sources, once).unwrap().remove(0);
    assert_eq!(report.precision, Precision::Everything);
    assert!(report.failure.unwrap().contains("unplugged"));
    assert_eq!(dirty.dirty_pages(), dirty.total_pages());
    assert_eq!(script.lock().starts, 1);
    assert_eq!(runs(&mut dirty, u64::MAX).len(), 2);
    dirty.acknowledge();
    // It reports again from then on.
    script.lock().writes.push(page_range(PAGE, 1));
    let report = dirty.collect(&mut sources, once).unwrap().remove(0);
    assert_eq!((report.pages, report.failure), (Some(1), None));
    assert_eq!(runs(&mut dirty, u64::MAX), [run(PAGE, 1)]);
}

#[test]
fn a_source_that_cannot_be_started_anew_is_an_error() {
    let mut dirty = guest();
    let broken = FakeSource::new("nic0", PageSize::SIZE_4K);
    broken.script().lock().fail_at = Some(Iova(LOW.gpa.0));
    broken.script().lock().fail_start = true;
    let mut sources: Vec<Box<dyn DirtySource>> = vec![Box::new(broken)];
    let once = Collect {
        restarts: 1,
        ..Collect::default()
    };
    let error = dirty.collect(&mut sources, once).unwrap_err();
    assert!(matches!(
        error,
        DirtyError::Backend {
            operation: "start",
            ..
        }
    ));
    assert_eq!(dirty.dirty_pages(), dirty.total_pages());
}

#[test]
fn windows_are_asked_for_in_rising_order_and_in_whole_words() {
    let regions = [LOW, HIGH];
    let mut dirty = GuestDirty::with_window(&regions, PageSize::SIZE_4K, 65 * PAGE).unwrap();
    let source = FakeSource::new("vcpu", PageSize::SIZE_4K);
    let script = source.script();
    let mut sources: Vec<Box<dyn DirtySource>> = vec![Box::new(source)];
    for threads in [1, 2] {
        let how = Collect {
            threads,
            ..Collect::default()
        };
        script.lock().windows.clear();
        dirty.collect(&mut sources, how).unwrap();
        assert_eq!(
            script.lock().windows,
            [
                page_range(0, 64),
                page_range(64 * PAGE, 64),
                page_range(HIGH.gpa.0, 64),
                page_range(HIGH.gpa.0 + 64 * PAGE, 6),
            ]
        );
    }
}

#[test]
fn pages_are_cleared_at_their_source_before_they_are_handed_out() {
    let mut dirty = guest();
    let source = FakeSource::deferred("vcpu");
    let script = source.script();
    let mut sources: Vec<Box<dyn DirtySource>> = vec![Box::new(source)];
    let written = [page_range(3 * PAGE, 2), page_range(HIGH.gpa.0, 1)];
    script.lock().writes.extend(written);
    dirty.collect(&mut sources, Collect::default()).unwrap();
    assert_eq!(script.lock().writes, written, "the report clears nothing");
    let first = dirty.next_run(PAGE, &mut sources).unwrap();
    assert_eq!(first, Some(run(3 * PAGE, 1)));
    assert_eq!(
        script.lock().writes,
        [written[1]],
        "of the chunk everything, of the next nothing"
    );
    // Written again before it was handed out: it goes, and comes again.
    script.lock().writes.push(page_range(4 * PAGE, 1));
    let rest: Vec<_> = std::iter::from_fn(|| dirty.next_run(PAGE, &mut sources).unwrap()).collect();
    assert_eq!(rest, [run(4 * PAGE, 1), run(HIGH.gpa.0, 1)]);
    dirty.acknowledge();
    dirty.collect(&mut sources, Collect::default()).unwrap();
    assert_eq!(runs(&mut dirty, u64::MAX), [run(4 * PAGE, 1)]);

    script.lock().fail_clear = true;
    dirty.collect(&mut sources, Collect::default()).unwrap();
    assert!(matches!(
        dirty.next_run(PAGE, &mut sources),
        Err(DirtyError::Backend {
            operation: "clear",
            ..
        })
    ));
    assert_eq!(dirty.dirty_pages(), dirty.total_pages());
}

#[test]
fn what_of_a_chunk_was_not_handed_out_stays_dirty() {
    let mut dirty = guest();
    let mut sources: Vec<Box<dyn DirtySource>> = vec![Box::new(FakeSource::deferred("vcpu"))];
    dirty.mark_all();
    dirty.next_run(10 * PAGE, &mut sources).unwrap();
    assert_eq!((dirty.dirty_pages(), dirty.in_flight_pages()), (188, 10));
    dirty.collect(&mut sources, Collect::default()).unwrap();
    assert_eq!((dirty.dirty_pages(), dirty.in_flight_pages()), (188, 10));
    dirty.put_back();
    assert_eq!((dirty.dirty_pages(), dirty.in_flight_pages()), (198, 0));
    assert_eq!(runs(&mut dirty, u64::MAX).len(), 2);
}

#[test]
fn the_vmm_source_reports_its_own_writes() {
    let mapping = |region: RamRegion| RamMapping {
        gpa: region.gpa,
        len: region.len,
        backing: Backing::Anonymous,
    };
    let memory = MemoryHandle::new(map_ram(vec![mapping(LOW), mapping(HIGH)]).unwrap());
    let guest_memory = memory.memory();
    let mut dirty = GuestDirty::new(&ram_regions(&guest_memory), PageSize::SIZE_4K).unwrap();
    assert_eq!(
        dirty.ranges(),
        [page_range(0, 128), page_range(HIGH.gpa.0, 70)]
    );
    guest_memory.write_obj(1u8, GuestAddress(0x3000)).unwrap();

    let mut source = VmmWriteSource::new(memory.clone());
    let ranges = dirty.ranges().to_vec();
    let mut bitmap = IovaBitmap::over(ranges[0], PageSize::SIZE_4K).unwrap();
    assert!(matches!(
        source.report(ranges[0], &mut bitmap),
        Err(DirtyError::NotTracked { .. })
    ));
    let hole = IovaRange::new(Iova(0), HIGH.gpa.0 + PAGE).unwrap();
    assert!(matches!(
        source.start(&[hole]),
        Err(DirtyError::NotTracked { .. })
    ));

    source.start(&ranges).unwrap();
    let mut sources: Vec<Box<dyn DirtySource>> = vec![Box::new(source)];
    dirty.collect(&mut sources, Collect::default()).unwrap();
    assert_eq!(
        dirty.dirty_pages(),
        0,
        "what was written before the start is not reported"
    );
    guest_memory.write_obj(1u8, GuestAddress(0x5000)).unwrap();
    mark_written(&guest_memory, GuestAddress(HIGH.gpa.0 + 69 * PAGE), 1);
    let report = dirty
        .collect(&mut sources, Collect::default())
        .unwrap()
        .remove(0);
    assert_eq!((report.id.as_str(), report.pages), (VMM_SOURCE_ID, Some(2)));
    assert_eq!(
        runs(&mut dirty, u64::MAX),
        [run(0x5000, 1), run(HIGH.gpa.0 + 69 * PAGE, 1)]
    );
    sources[0].stop().unwrap();
    assert!(dirty.collect(&mut sources, Collect::default()).is_err());
}
