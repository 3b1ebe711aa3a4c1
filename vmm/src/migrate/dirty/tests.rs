use std::collections::{BTreeMap, BTreeSet};

use hypervisor::Error;
use parking_lot::Mutex;
use proptest::collection::vec;
use proptest::prelude::*;
use vm_migration::dirty::Collect;
use vm_migration::{Gpa, GuestDirty};

use super::*;

const PAGE: u64 = 4096;
const MANUAL: DirtyLogMethod = DirtyLogMethod::BitmapManualClear {
    initially_set: false,
};
const METHODS: [DirtyLogMethod; 4] = [
    MANUAL,
    DirtyLogMethod::BitmapManualClear {
        initially_set: true,
    },
    DirtyLogMethod::BitmapAutoClear,
    DirtyLogMethod::Ring { entries: 4096 },
];
/// Two regions with a hole between; neither is whole words of the log.
const REGIONS: [RamRegion; 2] = [
    RamRegion {
        gpa: Gpa(0),
        len: 300 * PAGE,
    },
    RamRegion {
        gpa: Gpa(1 << 32),
        len: 130 * PAGE,
    },
];

/// A log in which no KVM is.
struct FakeLog {
    method: DirtyLogMethod,
    slots: Mutex<BTreeMap<u32, FakeSlot>>,
}

#[derive(Default)]
struct FakeSlot {
    pages: u64,
    on: bool,
    dirty: BTreeSet<u64>,
    reads: u32,
    /// What fails.
    broken: bool,
}

impl FakeLog {
    fn new(method: DirtyLogMethod) -> Arc<Self> {
        let slots = REGIONS.iter().zip(7..).map(|(region, number)| {
            let pages = region.len / PAGE;
            let slot = FakeSlot {
                pages,
                ..FakeSlot::default()
            };
            (number, slot)
        });
        Arc::new(Self {
            method,
            slots: Mutex::new(slots.collect()),
        })
    }

    fn source(self: &Arc<Self>) -> VcpuDirty {
        let slots = [7, 8].map(MemorySlot::new);
        VcpuDirty::new(Arc::clone(self) as _, &slots, &REGIONS)
    }

    /// A vCPU writes.
    fn write(&self, gpa: u64) {
        let index = usize::from(gpa >= REGIONS[1].gpa.0);
        let page = (gpa - REGIONS[index].gpa.0) / PAGE;
        self.with([7, 8][index], |slot| {
            if slot.on {
                slot.dirty.insert(page);
            }
        });
    }

    fn with<T>(&self, number: u32, action: impl FnOnce(&mut FakeSlot) -> T) -> T {
        action(self.slots.lock().get_mut(&number).unwrap())
    }

    fn working<T>(
        &self,
        slot: MemorySlot,
        action: impl FnOnce(&mut FakeSlot) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let number = slot.number();
        self.with(number, |slot| match slot.broken {
            true => Err(Error::UnknownSlot { slot: number }),
            false => action(slot),
        })
    }
}

impl DirtyLog for FakeLog {
    fn dirty_log_method(&self) -> DirtyLogMethod {
        self.method
    }

    fn set_dirty_logging(&self, slot: MemorySlot, on: bool) -> Result<(), Error> {
        self.working(slot, |slot| {
            slot.on = on;
            slot.dirty.clear();
            if let DirtyLogMethod::BitmapManualClear {
                initially_set: true,
            } = self.method
            {
                slot.dirty.extend(0..slot.pages);
            }
            Ok(())
        })
    }

    fn dirty_log_words(&self, slot: MemorySlot) -> Result<usize, Error> {
        self.working(slot, |slot| {
            Ok(usize::try_from(slot.pages.div_ceil(64)).unwrap())
        })
    }

    fn read_dirty_log(&self, slot: MemorySlot, words: &mut [u64]) -> Result<(), Error> {
        let number = slot.number();
        self.working(slot, |slot| {
            let wanted = usize::try_from(slot.pages.div_ceil(64)).unwrap();
            if !slot.on || words.len() != wanted {
                return Err(Error::DirtyLogOff { slot: number });
            }
            slot.reads += 1;
            words.fill(0);
            for page in &slot.dirty {
                words[usize::try_from(page / 64).unwrap()] |= 1 << (page % 64);
            }
            if !matches!(self.method, DirtyLogMethod::BitmapManualClear { .. }) {
                slot.dirty.clear();
            }
            Ok(())
        })
    }

    fn clear_dirty_log(
        &self,
        slot: MemorySlot,
        first_page: u64,
        words: &[u64],
    ) -> Result<(), Error> {
        assert!(matches!(
            self.method,
            DirtyLogMethod::BitmapManualClear { .. }
        ));
        self.working(slot, |slot| {
            assert!(slot.on && first_page.is_multiple_of(64));
            let reach = first_page + 64 * u64::try_from(words.len()).unwrap();
            assert!(reach < slot.pages + 64, "no word beyond the end");
            for (index, word) in (0_u64..).zip(words) {
                for bit in (0..64).filter(|bit| word >> bit & 1 != 0) {
                    slot.dirty.remove(&(first_page + index * 64 + bit));
                }
            }
            Ok(())
        })
    }

    fn dirty_ring_full_exits(&self) -> u64 {
        0
    }
}

fn range(first_page: u64, pages: u64) -> IovaRange {
    IovaRange::new(Iova(first_page * PAGE), pages * PAGE).unwrap()
}

fn ranges() -> Vec<IovaRange> {
    let range = |region: &RamRegion| IovaRange::new(Iova(region.gpa.0), region.len).unwrap();
    REGIONS.iter().map(range).collect()
}

/// A report of one window: the pages, and how many the source counted.
fn report(source: &mut VcpuDirty, window: IovaRange) -> Result<(Vec<u64>, u64), DirtyError> {
    let mut bitmap = IovaBitmap::over(window, PageSize::SIZE_4K).unwrap();
    let reported = source.report(window, &mut bitmap)?;
    let pages = bitmap.runs().flat_map(|run| run.first().0..=run.last().0);
    let pages = pages.step_by(4096).map(|address| address / PAGE).collect();
    Ok((pages, reported.pages.unwrap()))
}

#[test]
fn a_slot_is_fetched_once_a_round_and_given_out_by_windows() {
    for method in METHODS {
        let log = FakeLog::new(method);
        let mut source = log.source();
        source.start(&ranges()).unwrap();
        let clear = |source: &mut VcpuDirty, window| {
            if let Clearing::BeforeSend(log) = source.clearing() {
                let mut all = IovaBitmap::over(window, PageSize::SIZE_4K).unwrap();
                all.set_all();
                log.clear(window, &all).unwrap();
            }
        };
        clear(&mut source, ranges()[0]);
        for page in [0, 127, 128, 255, 256, 299] {
            log.write(page * PAGE);
        }
        let first = report(&mut source, range(0, 128)).unwrap();
        assert_eq!(first, (vec![0, 127], 2));
        // After the fetch: for the next round.
        log.write(257 * PAGE);
        let second = report(&mut source, range(128, 128)).unwrap();
        assert_eq!(second, (vec![128, 255], 2));
        let third = report(&mut source, range(256, 44)).unwrap();
        assert_eq!(third, (vec![256, 299], 2));
        assert_eq!(log.with(7, |slot| slot.reads), 1, "{method:?}");
        assert_eq!(log.with(8, |slot| slot.reads), 0, "{method:?}");

        clear(&mut source, range(0, 256));
        let manual = matches!(method, DirtyLogMethod::BitmapManualClear { .. });
        let whole = report(&mut source, ranges()[0]).unwrap();
        let again: &[u64] = if manual { &[256, 257, 299] } else { &[257] };
        assert_eq!(whole, (again.to_vec(), 1), "only the new one counts");
    }
}

#[test]
fn what_kvm_calls_dirty_at_the_start_does_not_count_as_written() {
    let log = FakeLog::new(METHODS[1]);
    let mut source = log.source();
    source.start(&ranges()).unwrap();
    let (pages, counted) = report(&mut source, ranges()[0]).unwrap();
    assert_eq!((pages.len(), counted), (300, 0));
}

#[test]
fn windows_out_of_turn_are_refused() {
    for method in METHODS {
        let log = FakeLog::new(method);
        let mut source = log.source();
        let refused = |answer: Result<_, DirtyError>| {
            let failed: Result<(Vec<u64>, u64), _> = answer;
            matches!(failed, Err(DirtyError::Backend { .. }))
        };
        assert!(refused(report(&mut source, ranges()[0])), "not started");
        source.start(&ranges()).unwrap();
        assert!(refused(report(&mut source, range(64, 64))));
        report(&mut source, range(0, 64)).unwrap();
        assert!(refused(report(&mut source, range(128, 64))), "one missing");
        assert!(refused(report(&mut source, range(64, 64))), "too late");
        report(&mut source, range(0, 64)).unwrap();
        report(&mut source, range(64, 236)).unwrap();
        for window in [range(299, 2), range(400, 1)] {
            let answer = report(&mut source, window);
            assert!(matches!(answer, Err(DirtyError::NotTracked { .. })));
        }
        let hole = source.start(&[range(299, 2)]);
        assert!(matches!(hole, Err(DirtyError::NotTracked { .. })));
        source.stop().unwrap();
        assert!(refused(report(&mut source, ranges()[0])), "stopped");
    }
}

#[test]
fn it_starts_anew_and_stops_twice() {
    for method in METHODS {
        let log = FakeLog::new(method);
        let mut source = log.source();
        source.stop().unwrap();
        source.start(&ranges()).unwrap();
        log.write(5 * PAGE);
        source.start(&ranges()).unwrap();
        let (_, counted) = report(&mut source, ranges()[0]).unwrap();
        assert_eq!(counted, 0, "{method:?}");
        log.with(7, |slot| slot.broken = true);
        assert!(matches!(source.stop(), Err(DirtyError::Backend { .. })));
        assert!(!log.with(8, |slot| slot.on), "the others are stopped");
        assert!(matches!(
            report(&mut source, ranges()[0]),
            Err(DirtyError::Backend { .. })
        ));
        log.with(7, |slot| slot.broken = false);
        source.stop().unwrap();
        source.stop().unwrap();
        assert!(!log.with(7, |slot| slot.on));
    }
}

#[test]
fn exactly_the_pages_named_are_cleared() {
    let log = FakeLog::new(MANUAL);
    let mut source = log.source();
    source.start(&ranges()).unwrap();
    let second = REGIONS[1].gpa.0;
    for page in [63, 64, 65, 127, 128, 129] {
        log.write(second + page * PAGE);
    }
    // Larger pages, from another base: those of the range only.
    let mut pages = IovaBitmap::new(Iova(0), 1 << 33, PageSize::new(64 << 10).unwrap()).unwrap();
    pages.set(Iova(second + 64 * PAGE), 1);
    pages.set(Iova(second + 128 * PAGE), 1);
    pages.set(Iova(second + 48 * PAGE), 1);
    let tail = IovaRange::new(Iova(second + 64 * PAGE), 66 * PAGE).unwrap();
    source.clear(tail, &pages).unwrap();
    let left = log.with(8, |slot| slot.dirty.clone());
    assert_eq!(left, BTreeSet::from([63, 127]));

    let odd = IovaRange::new(Iova(second + 65 * PAGE), 65 * PAGE).unwrap();
    let refused = source.clear(odd, &pages);
    assert!(matches!(refused, Err(DirtyError::Backend { .. })));
    let hole = source.clear(range(320, 64), &pages);
    assert!(matches!(hole, Err(DirtyError::NotTracked { .. })));
    log.with(8, |slot| slot.broken = true);
    let failed = source.clear(tail, &pages);
    let Err(DirtyError::Backend { operation, .. }) = failed else {
        panic!("{failed:?}");
    };
    assert_eq!(operation, "clear");
}

/// What happens between the start of a migration and its last report.
#[derive(Clone, Copy, Debug)]
enum Step {
    Write(u64),
    Send(u64),
    Collect,
    PutBack,
}

fn step() -> impl Strategy<Value = Step> {
    let pages = REGIONS.map(|region| region.len / PAGE);
    prop_oneof![
        6 => (0..pages[0]).prop_map(|page| Step::Write(page * PAGE)),
        3 => (0..pages[1]).prop_map(move |page| Step::Write(REGIONS[1].gpa.0 + page * PAGE)),
        6 => (1_u64..40).prop_map(Step::Send),
        1 => Just(Step::Collect),
        1 => Just(Step::PutBack),
    ]
}

/// A guest whose pages hold how often they were written, and its copy.
struct Model {
    log: Arc<FakeLog>,
    sources: Vec<Box<dyn DirtySource>>,
    dirty: GuestDirty,
    memory: BTreeMap<u64, u32>,
    copy: BTreeMap<u64, u32>,
}

impl Model {
    fn new(method: DirtyLogMethod) -> Self {
        let log = FakeLog::new(method);
        let mut sources: Vec<Box<dyn DirtySource>> = vec![Box::new(log.source())];
        let page = PageSize::SIZE_4K;
        let mut dirty = GuestDirty::with_window(&REGIONS, page, 128 * PAGE).unwrap();
        sources[0].start(dirty.ranges()).unwrap();
        dirty.mark_all();
        Self {
            log,
            sources,
            dirty,
            memory: BTreeMap::new(),
            copy: BTreeMap::new(),
        }
    }

    fn take(&mut self, step: Step) {
        match step {
            Step::Write(gpa) => {
                *self.memory.entry(gpa).or_default() += 1;
                self.log.write(gpa);
            }
            Step::Send(pages) => self.send(pages, false),
            Step::Collect => self.collect(),
            Step::PutBack => self.dirty.put_back(),
        }
    }

    fn collect(&mut self) {
        self.dirty
            .collect(&mut self.sources, Collect::default())
            .unwrap();
    }

    /// Copies at most so many pages; all of them once the guest stands still.
    fn send(&mut self, pages: u64, still: bool) {
        let sources = if still {
            &mut [][..]
        } else {
            &mut self.sources
        };
        while let Some(run) = self.dirty.next_run(pages * PAGE, sources).unwrap() {
            for gpa in (run.gpa.0..run.gpa.0 + run.len).step_by(4096) {
                let now = self.memory.get(&gpa).copied().unwrap_or_default();
                self.copy.insert(gpa, now);
            }
            if !still {
                break;
            }
        }
    }
}

proptest! {
    #[test]
    fn the_copy_is_what_was_written(
        which in 0..METHODS.len(),
        steps in vec(step(), 0..200),
    ) {
        let mut model = Model::new(METHODS[which]);
        for step in steps {
            model.take(step);
        }
        model.collect();
        model.send(u64::from(u32::MAX), true);
        for (gpa, written) in &model.memory {
            prop_assert_eq!(model.copy.get(gpa), Some(written), "page {:#x}", gpa);
        }
    }
}
