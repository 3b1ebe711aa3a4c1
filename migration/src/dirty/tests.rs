//! Tests of the guest's dirty pages by example.

use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

use super::fakes::FakeSource;
use super::*;
use crate::memory::{Backing, MemoryHandle, RamMapping, map_ram, mark_written, ram_regions};

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
    std::iter::from_fn(|| dirty.next_run(max_bytes)).collect()
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
    assert_eq!(dirty.next_run(u64::MAX), None);
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
    assert_eq!(dirty.next_run(0), Some(run(0, 1)));
    assert_eq!(dirty.next_run(PAGE + 1), Some(run(PAGE, 1)));
}

#[test]
fn the_last_page_of_the_address_space_is_tracked() {
    let top = RamRegion {
        gpa: Gpa(u64::MAX - PAGE + 1),
        len: PAGE,
    };
    let mut dirty = GuestDirty::new(&[top], PageSize::SIZE_4K).unwrap();
    dirty.mark_all();
    assert_eq!(dirty.next_run(u64::MAX), Some(run(top.gpa.0, 1)));
    assert_eq!(dirty.next_run(u64::MAX), None);
}

#[test]
fn what_two_sources_wrote_is_sent_once() {
    let mut dirty = guest();
    let vcpu = FakeSource::new("vcpu", PageSize::SIZE_4K);
    let nic = FakeSource::new("nic0", PageSize::new(16 * PAGE).unwrap());
    vcpu.script().lock().writes.push(page_range(20 * PAGE, 2));
    nic.script().lock().writes.push(page_range(21 * PAGE, 1));
    let mut sources: Vec<Box<dyn DirtySource>> = vec![Box::new(vcpu), Box::new(nic)];
    let reports = dirty.collect(&mut sources).unwrap();
    let said: Vec<_> = reports
        .iter()
        .map(|report| (report.id.as_str(), report.pages, report.granularity))
        .collect();
    assert_eq!(said, [("vcpu", 2, PAGE), ("nic0", 16, 16 * PAGE)]);
    assert_eq!(runs(&mut dirty, u64::MAX), [run(16 * PAGE, 16)]);
    assert!(
        dirty
            .collect(&mut sources)
            .unwrap()
            .iter()
            .all(|report| report.pages == 0)
    );
}

#[test]
fn pages_in_flight_come_back() {
    let mut dirty = guest();
    let vcpu = FakeSource::new("vcpu", PageSize::SIZE_4K);
    let script = vcpu.script();
    let mut sources: Vec<Box<dyn DirtySource>> = vec![Box::new(vcpu)];
    script.lock().writes.push(page_range(0, 3));
    dirty.collect(&mut sources).unwrap();
    assert_eq!(dirty.next_run(PAGE), Some(run(0, 1)));
    // Written again while in flight: dirty and in flight.
    script.lock().writes.push(page_range(0, 1));
    dirty.collect(&mut sources).unwrap();
    assert_eq!((dirty.dirty_pages(), dirty.in_flight_pages()), (3, 1));
    dirty.next_run(2 * PAGE);
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
    let unasked = other.script();
    unasked.lock().writes.push(page_range(PAGE, 1));
    let mut sources: Vec<Box<dyn DirtySource>> = vec![Box::new(broken), Box::new(other)];
    let error = dirty.collect(&mut sources).unwrap_err();
    assert!(matches!(error, DirtyError::Backend { source_id, .. } if source_id == "nic0"));
    assert_eq!(dirty.dirty_pages(), dirty.total_pages());
    assert_eq!(
        unasked.lock().writes.len(),
        1,
        "what was not asked is still at its source"
    );
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
    let ranges = dirty.ranges();
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
    dirty.collect(&mut sources).unwrap();
    assert_eq!(
        dirty.dirty_pages(),
        0,
        "what was written before the start is not reported"
    );
    guest_memory.write_obj(1u8, GuestAddress(0x5000)).unwrap();
    mark_written(&guest_memory, GuestAddress(HIGH.gpa.0 + 69 * PAGE), 1);
    let report = dirty.collect(&mut sources).unwrap().remove(0);
    assert_eq!((report.id.as_str(), report.pages), (VMM_SOURCE_ID, 2));
    assert_eq!(
        runs(&mut dirty, u64::MAX),
        [run(0x5000, 1), run(HIGH.gpa.0 + 69 * PAGE, 1)]
    );
    sources[0].stop().unwrap();
    assert!(dirty.collect(&mut sources).is_err());
}
