//! A device that writes, a vIOMMU that changes its map and a migration, each on a thread.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::Mutex;

use super::fakes::{FakeLog, PAGE, mapping, range};
use super::*;
use crate::addr::Gpa;
use crate::dirty::{Collect, GuestDirty};
use crate::memory::RamRegion;
use crate::source::DirtySource;

const PAGES: u64 = 320;
/// Places for mappings, of this many pages each; four of them share a page of the log.
const SLOTS: u64 = 24;
const SLOT_PAGES: u64 = 8;
const LOG_PAGE: u64 = 32 * PAGE;
/// What must have happened before the threads may stop.
const WRITES: u64 = 30_000;
const CHANGES: u64 = 3000;

/// Guest memory of which only the number of each page's last write is kept, and a device with a map
/// of its own, by which it writes.
struct Machine {
    version: Vec<AtomicU64>,
    mapped: Mutex<BTreeMap<u64, u64>>,
    log: FakeLog,
    writes: AtomicU64,
    changes: AtomicU64,
    stop: AtomicBool,
}

/// A step of xorshift64.
fn random(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

impl Machine {
    fn page(&self, number: u64) -> &AtomicU64 {
        &self.version[usize::try_from(number).unwrap()]
    }

    /// Writes by whatever is mapped.
    fn device(&self) {
        let mut state = 0x9e37_79b9_7f4a_7c15;
        while !self.stop.load(Ordering::Relaxed) {
            let mapped = self.mapped.lock();
            let from = random(&mut state) % (SLOTS * SLOT_PAGES);
            if let Some((iova, gpa)) = mapped.range(from..).next() {
                self.page(*gpa).fetch_add(1, Ordering::Relaxed);
                self.log.0.lock().write(iova * PAGE);
                self.writes.fetch_add(1, Ordering::Relaxed);
            }
            drop(mapped);
            std::hint::spin_loop();
        }
    }

    /// Maps what is not mapped and unmaps what is.
    fn iommu(&self, handle: &MapHandle) {
        let mut state = 0x2545_f491_4f6c_dd1d;
        while !self.stop.load(Ordering::Relaxed) {
            self.changes.fetch_add(1, Ordering::Relaxed);
            let first = random(&mut state) % SLOTS * SLOT_PAGES;
            let slot = range(first * PAGE, SLOT_PAGES);
            let pages = first..first + SLOT_PAGES;
            let is_mapped = self.mapped.lock().range(pages.clone()).next().is_some();
            if is_mapped {
                let removed = handle.unmap(slot, || {
                    self.mapped.lock().retain(|page, _| !pages.contains(page));
                    Ok::<(), DirtyError>(())
                });
                assert!(matches!(removed, Ok(()) | Err(ChangeError::Log(_))));
                continue;
            }
            let len = random(&mut state) % SLOT_PAGES + 1;
            let gpa = random(&mut state) % (PAGES - SLOT_PAGES);
            let new = mapping(first * PAGE, gpa * PAGE, len);
            handle
                .map(new, || {
                    let pages = (first..first + len).zip(gpa..);
                    self.mapped.lock().extend(pages);
                    Ok::<(), DirtyError>(())
                })
                .unwrap();
        }
    }
}

/// However the three meet, and though the log fails now and then, the copy is the memory in the end.
#[test]
fn a_copy_under_a_changing_map_becomes_equal() {
    let machine = Machine {
        version: (0..PAGES).map(|_| AtomicU64::new(0)).collect(),
        mapped: Mutex::default(),
        log: FakeLog::new(LOG_PAGE),
        writes: AtomicU64::new(0),
        changes: AtomicU64::new(0),
        stop: AtomicBool::new(false),
    };
    let aperture = IovaMap::live(&[range(0, SLOTS * SLOT_PAGES)]).unwrap();
    let window = 2 * LOG_PAGE;
    let (mut source, handle) = Translated::with_window(machine.log.clone(), aperture, window);
    let ram = RamRegion {
        gpa: Gpa(0),
        len: PAGES * PAGE,
    };
    let mut guest = GuestDirty::with_window(&[ram], PageSize::SIZE_4K, 64 * PAGE).unwrap();
    source.start(guest.ranges()).unwrap();
    let mut sources: Vec<Box<dyn DirtySource>> = vec![Box::new(source)];
    let how = Collect {
        restarts: 1,
        threads: 1,
    };
    let mut copy = vec![0; usize::try_from(PAGES).unwrap()];
    std::thread::scope(|scope| {
        let mut threads = vec![
            scope.spawn(|| machine.device()),
            scope.spawn(|| machine.iommu(&handle)),
        ];
        for round in 0u32.. {
            let writes = machine.writes.load(Ordering::Relaxed);
            let last = writes >= WRITES && machine.changes.load(Ordering::Relaxed) >= CHANGES;
            if last {
                machine.stop.store(true, Ordering::Relaxed);
                for thread in threads.drain(..) {
                    thread.join().unwrap();
                }
            } else if round % 50 == 49 && writes < WRITES / 2 {
                // Not to the end: a log that is started anew hides what was lost before.
                machine.log.0.lock().fail_report = Some(round % 3);
            }
            guest.collect(&mut sources, how).unwrap();
            while let Some(run) = guest.next_run(u64::MAX, &mut []).unwrap() {
                for page in run.gpa.0 / PAGE..(run.gpa.0 + run.len) / PAGE {
                    let version = machine.page(page).load(Ordering::Relaxed);
                    copy[usize::try_from(page).unwrap()] = version;
                }
            }
            guest.acknowledge();
            if last {
                break;
            }
        }
    });
    let memory: Vec<u64> = machine
        .version
        .iter()
        .map(|version| version.load(Ordering::Relaxed))
        .collect();
    let lost = (0..copy.len()).filter(|page| copy[*page] != memory[*page]);
    assert_eq!(lost.count(), 0, "pages were written and not sent");
}
