//! Reports are complete or errors.

use vfio_user::MigrationFlags;
use vm_migration::dirty::{Collect, GuestDirty};
use vm_migration::{DirtySource, ErrorChain, Gpa, RamRegion, Translated};

use super::*;
use crate::fake::{FakeBackend, device};

const LOW: (u64, u64) = (0, 0x10_0000);
const HIGH: (u64, u64) = (1 << 32, 0x20_0000);

fn range((first, len): (u64, u64)) -> IovaRange {
    IovaRange::new(Iova(first), len).unwrap()
}

fn source(regions: &[(u64, u64)]) -> (Arc<FakeBackend>, Translated<PassthroughDirty>) {
    let backend = FakeBackend::new(Some(MigrationFlags::all()));
    let (nic, _) = device(&backend);
    for (gpa, len) in regions {
        nic.inner.map_for_test(RamRegion {
            gpa: Gpa(*gpa),
            len: *len,
        });
    }
    (
        backend,
        Translated::identity(PassthroughDirty::new(nic.inner)),
    )
}

fn bitmap(of: (u64, u64)) -> IovaBitmap {
    IovaBitmap::over(range(of), PageSize::SIZE_4K).unwrap()
}

#[test]
fn each_mapped_region_is_reported_by_itself_and_once() {
    let (backend, mut source) = source(&[HIGH, LOW]);
    source.start(&[range(LOW), range(HIGH)]).unwrap();
    backend.seen.lock().dirty = vec![0x3000, (1 << 32) + 0x1f_f000];
    let mut low = bitmap(LOW);
    source.report(range(LOW), &mut low).unwrap();
    assert!(low.contains(Iova(0x3000)) && low.count() == 1);
    let mut high = bitmap(HIGH);
    source.report(range(HIGH), &mut high).unwrap();
    assert!(high.contains(Iova((1 << 32) + 0x1f_f000)) && high.count() == 1);
    assert_eq!(backend.seen.lock().reports, [range(LOW), range(HIGH)]);
    // What was reported is not again, and reports are ORed.
    source.report(range(LOW), &mut low).unwrap();
    assert_eq!(low.count(), 1);
    source.stop().unwrap();
    source.stop().unwrap();
    assert!(backend.seen.lock().log.is_none());
}

#[test]
fn a_window_may_span_regions() {
    let (_, mut source) = source(&[(0, 0x1000), (0x1000, 0x1000)]);
    source.start(&[range((0, 0x2000))]).unwrap();
    let mut both = bitmap((0, 0x2000));
    source.report(range((0, 0x2000)), &mut both).unwrap();
}

#[test]
fn a_region_is_asked_for_whole_and_given_out_window_by_window() {
    let (backend, mut source) = source(&[LOW]);
    source.start(&[range(LOW)]).unwrap();
    let windows = [(0, 0x4_0000), (0x4_0000, 0x4_0000), (0x8_0000, 0x8_0000)];
    for round in 0..2 {
        backend.seen.lock().dirty = vec![0x3000, 0x4_0000, 0xf_f000];
        for (window, page) in windows.into_iter().zip([0x3000, 0x4_0000, 0xf_f000]) {
            let mut map = bitmap(window);
            let reported = source.report(range(window), &mut map).unwrap();
            assert_eq!((reported.pages, map.count()), (Some(1), 1), "{window:x?}");
            assert!(map.contains(Iova(page)));
        }
        assert_eq!(backend.seen.lock().reports.len(), round + 1);
    }
    // A round that ended early: what was not given out is in the next.
    backend.seen.lock().dirty = vec![0xf_f000];
    source
        .report(range(windows[0]), &mut bitmap(windows[0]))
        .unwrap();
    let mut all = bitmap(LOW);
    source.report(range(LOW), &mut all).unwrap();
    assert!(all.contains(Iova(0xf_f000)));
}

#[test]
fn a_larger_page_of_the_device_becomes_many() {
    let (backend, mut source) = source(&[LOW]);
    backend.seen.lock().log_page = PageSize::new(0x1_0000).unwrap();
    source.start(&[range(LOW)]).unwrap();
    assert_eq!(source.granularity().bytes(), 0x1_0000);
    backend.seen.lock().dirty = vec![0x2_3000];
    let mut map = bitmap(LOW);
    source.report(range(LOW), &mut map).unwrap();
    assert_eq!(map.count(), 16);
    assert!(map.contains(Iova(0x2_0000)) && map.contains(Iova(0x2_f000)));
}

#[test]
fn a_failed_report_holds_until_a_new_start() {
    let (backend, mut source) = source(&[LOW]);
    source.start(&[range(LOW)]).unwrap();
    backend.seen.lock().lose_log = true;
    let mut map = bitmap(LOW);
    assert!(source.report(range(LOW), &mut map).is_err());
    backend.seen.lock().lose_log = false;
    assert!(
        source.report(range(LOW), &mut map).is_err(),
        "what was lost must not look clean"
    );
    source.start(&[range(LOW)]).unwrap();
    source.report(range(LOW), &mut map).unwrap();
}

#[test]
fn what_is_not_mapped_is_refused() {
    let (_, mut source) = source(&[LOW]);
    let mut map = bitmap(LOW);
    assert!(source.report(range(LOW), &mut map).is_err(), "not started");
    assert!(matches!(
        source.start(&[range(LOW), range(HIGH)]),
        Err(DirtyError::NotTracked { .. })
    ));
    // A bitmap that would lose pages.
    source.start(&[range(LOW)]).unwrap();
    let mut small = bitmap((0, 0x1000));
    assert!(source.report(range(LOW), &mut small).is_err());
}

#[test]
fn ranges_beyond_the_devices_limit_are_merged_over_the_smallest_gap() {
    let regions = [(0, 0x1000), (0x10_0000, 0x1000), (0x10_3000, 0x1000)];
    let (backend, mut source) = source(&regions);
    source.start(&regions.map(range)).unwrap();
    assert_eq!(
        backend.seen.lock().log.clone().unwrap(),
        [range((0, 0x1000)), range((0x10_0000, 0x4000))]
    );
}

/// Collections of a migration; the error if one fails, and the pages dirty then.
struct Attempt {
    dirty: GuestDirty,
    sources: Vec<Box<dyn DirtySource>>,
}

const PAGES: u64 = (LOW.1 + HIGH.1) / 0x1000;

impl Attempt {
    fn new() -> (Arc<FakeBackend>, Self) {
        let (backend, source) = source(&[LOW, HIGH]);
        let regions = [LOW, HIGH].map(|(gpa, len)| RamRegion { gpa: Gpa(gpa), len });
        let this = Self {
            dirty: GuestDirty::new(&regions, PageSize::SIZE_4K).unwrap(),
            sources: vec![Box::new(source)],
        };
        (backend, this)
    }

    /// Three rounds, in each of which a page of each region is written; the pages that are sent.
    fn run(&mut self, backend: &FakeBackend, how: Collect) -> Result<Vec<u64>, DirtyError> {
        let mut sent = Vec::new();
        self.sources[0].start(self.dirty.ranges())?;
        for round in 0..3 {
            let written = [LOW.0, HIGH.0].map(|base| base + round * 0x1000);
            backend.seen.lock().dirty = written.to_vec();
            self.dirty.collect(&mut self.sources, how)?;
            sent.push(self.dirty.dirty_pages());
            while self.dirty.next_run(u64::MAX, &mut self.sources)?.is_some() {}
            self.dirty.acknowledge();
        }
        Ok(sent)
    }
}

#[test]
fn a_log_that_fails_anywhere_is_an_error_and_can_be_tried_again() {
    let none = Collect::default();
    // Two reports a round: the first, those between, the last.
    for number in 0..6 {
        let (backend, mut attempt) = Attempt::new();
        backend.seen.lock().fail_report = Some(number);
        let error = attempt.run(&backend, none).unwrap_err();
        let text = ErrorChain(&error).to_string();
        assert!(text.contains("nic0: dirty log report failed"), "{text}");
        assert_eq!(attempt.dirty.dirty_pages(), PAGES, "report {number}");
        // The engine stops what it started; then a second migration is as any other.
        attempt.sources[0].stop().unwrap();
        assert!(backend.seen.lock().log.is_none());
        attempt.dirty.acknowledge();
        let sent = attempt.run(&backend, none).unwrap();
        assert_eq!(sent, [PAGES, 2, 2], "the first sends everything");
    }
    for started in [false, true] {
        let (backend, mut attempt) = Attempt::new();
        backend.seen.lock().fail_start = Some(started);
        let error = attempt.run(&backend, none).unwrap_err();
        let text = ErrorChain(&error).to_string();
        assert!(text.contains("nic0: dirty log start failed"), "{text}");
        attempt.sources[0].stop().unwrap();
        assert!(backend.seen.lock().log.is_none(), "nobody reads it");
        attempt.run(&backend, none).unwrap();
    }
}

#[test]
fn a_log_that_fails_is_started_anew_and_everything_is_sent_again() {
    let how = Collect {
        restarts: 1,
        ..Collect::default()
    };
    for number in 0..6 {
        let (backend, mut attempt) = Attempt::new();
        backend.seen.lock().fail_report = Some(number);
        let sent = attempt.run(&backend, how).unwrap();
        let expected: Vec<_> = (0..3)
            .map(|round| if round == number / 2 { PAGES } else { 2 })
            .collect();
        assert_eq!(sent, expected, "report {number}");
    }
}
