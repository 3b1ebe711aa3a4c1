//! Random histories of a migration against a naive model of it, and against real threads.
//!
//! The model knows each page's version: a write makes a new one, a run carries the version it was
//! taken with, an acknowledgement delivers it. Nothing is lost if at the end the destination has
//! the last version of every page.

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;
use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

use super::fakes::{FakeSource, Script};
use super::*;
use crate::memory::{Backing, MemoryHandle, RamMapping, map_ram, ram_regions};

const PAGE: u64 = 4096;
/// Two regions, neither a whole number of words; the second where a guest's RAM above the hole is.
const REGIONS: [RamRegion; 2] = [
    RamRegion {
        gpa: Gpa(0),
        len: 100 * PAGE,
    },
    RamRegion {
        gpa: Gpa(0x1_0000_0000),
        len: 70 * PAGE,
    },
];
/// Page sizes of the sources in pages of the host: two exact, one coarse that reaches over the end
/// of both regions, and the one that clears only when told to.
const GRANULES: [u64; SOURCES] = [1, 1, 8, 1];
const SOURCES: usize = 4;
const DEFERRED: usize = 3;

/// The pages of both regions by GPA.
fn all_pages() -> impl Iterator<Item = u64> {
    REGIONS
        .iter()
        .flat_map(|region| (region.gpa.0..region.gpa.0 + region.len).step_by(4096))
}

/// The start of the region that has `page`.
fn region_of(page: u64) -> u64 {
    REGIONS
        .iter()
        .rfind(|region| region.gpa.0 <= page)
        .unwrap()
        .gpa
        .0
}

#[derive(Clone, Debug)]
enum Step {
    /// A source's writer writes some pages from one on.
    Write(usize, proptest::sample::Index, u64),
    /// On so many threads.
    Collect(usize),
    /// A collect in which a source fails at a region, and perhaps is started anew.
    FailedCollect(usize, usize, bool),
    NextRun(u64),
    Acknowledge,
    PutBack,
    MarkAll,
}

fn step() -> impl Strategy<Value = Step> {
    let source = 0..GRANULES.len();
    prop_oneof![
        8 => (source.clone(), any::<proptest::sample::Index>(), 1u64..90)
            .prop_map(|(source, page, count)| Step::Write(source, page, count)),
        4 => (1usize..4).prop_map(Step::Collect),
        1 => (source, 0..REGIONS.len(), any::<bool>())
            .prop_map(|(s, region, restart)| Step::FailedCollect(s, region, restart)),
        8 => (0u64..80).prop_map(Step::NextRun),
        2 => Just(Step::Acknowledge),
        2 => Just(Step::PutBack),
        1 => Just(Step::MarkAll),
    ]
}

type Versions = std::collections::BTreeMap<u64, u32>;

/// The naive model; every set is of GPAs of pages.
struct Model {
    version: Versions,
    /// Not yet reported, per source; of the deferred one: not yet cleared.
    pending: [BTreeSet<u64>; SOURCES],
    dirty: BTreeSet<u64>,
    /// Of `dirty`, those of the chunk being handed out: cleared at the deferred source.
    chunk: BTreeSet<u64>,
    in_flight: BTreeSet<u64>,
    /// Page and version of each page given out and not confirmed.
    sent: Vec<(u64, u32)>,
    delivered: Versions,
    given_this_round: BTreeSet<u64>,
}

impl Model {
    fn new() -> Self {
        let zero: Versions = all_pages().map(|page| (page, 0)).collect();
        Self {
            version: zero.clone(),
            pending: Default::default(),
            dirty: BTreeSet::new(),
            chunk: BTreeSet::new(),
            in_flight: BTreeSet::new(),
            sent: Vec::new(),
            delivered: zero,
            given_this_round: BTreeSet::new(),
        }
    }

    fn write(&mut self, source: usize, first: u64, count: u64) {
        for page in all_pages()
            .filter(|page| *page >= first)
            .take(usize::try_from(count).unwrap())
        {
            *self.version.get_mut(&page).unwrap() += 1;
            let granule = GRANULES[source] * PAGE;
            let whole = page - page % granule;
            let touched = all_pages().filter(|page| (whole..whole + granule).contains(page));
            self.pending[source].extend(touched);
        }
    }

    fn collect(&mut self) {
        for (index, pending) in self.pending.iter_mut().enumerate() {
            self.dirty.extend(pending.iter());
            if index != DEFERRED {
                pending.clear();
            }
        }
        self.new_round();
    }

    /// All other sources were asked; the failing one lost what it had for the regions up to the
    /// failing one, and then all of it if it was started anew.
    fn failed_collect(&mut self, source: usize, region: usize, restarted: bool) {
        for (index, pending) in self.pending.iter_mut().enumerate() {
            if index == source && restarted {
                pending.clear();
            } else if index != DEFERRED {
                let kept = REGIONS[region].gpa.0;
                pending.retain(|page| index == source && region_of(*page) > kept);
            }
        }
        self.mark_all();
    }

    fn new_round(&mut self) {
        self.chunk.clear();
        self.given_this_round.clear();
    }

    fn mark_all(&mut self) {
        self.dirty.extend(all_pages());
        self.new_round();
    }

    fn next_run(&mut self, max_pages: u64) -> Option<GpaRun> {
        if self.chunk.is_empty() {
            // A region is smaller than a chunk.
            let region = region_of(*self.dirty.first()?);
            let dirty = self.dirty.iter().copied();
            self.chunk = dirty.filter(|page| region_of(*page) == region).collect();
            self.pending[DEFERRED].retain(|page| !self.chunk.contains(page));
        }
        let first = *self.chunk.first()?;
        let mut len = 0;
        while len < max_pages.max(1) * PAGE && self.chunk.contains(&(first + len)) {
            let page = first + len;
            self.chunk.remove(&page);
            self.dirty.remove(&page);
            self.in_flight.insert(page);
            self.sent.push((page, self.version[&page]));
            assert!(
                self.given_this_round.insert(page),
                "{page:#x} given twice in a round"
            );
            len += PAGE;
        }
        Some(GpaRun {
            gpa: Gpa(first),
            len,
        })
    }

    fn acknowledge(&mut self) {
        for (page, version) in self.sent.drain(..) {
            self.delivered.insert(page, version);
        }
        self.in_flight.clear();
    }

    fn put_back(&mut self) {
        self.sent.clear();
        self.dirty.append(&mut self.in_flight);
        self.new_round();
    }
}

/// The thing tested beside its model.
struct Bench {
    model: Model,
    dirty: GuestDirty,
    sources: Vec<Box<dyn DirtySource>>,
    scripts: Vec<Arc<Mutex<Script>>>,
}

impl Bench {
    fn new() -> Self {
        let fakes: Vec<_> = GRANULES
            .iter()
            .enumerate()
            .map(|(index, pages)| {
                let id = format!("source{index}");
                if index == DEFERRED {
                    return FakeSource::deferred(&id);
                }
                FakeSource::new(&id, PageSize::new(pages * PAGE).unwrap())
            })
            .collect();
        Self {
            model: Model::new(),
            dirty: GuestDirty::new(&REGIONS, PageSize::SIZE_4K).unwrap(),
            scripts: fakes.iter().map(FakeSource::script).collect(),
            sources: fakes
                .into_iter()
                .map(|fake| Box::new(fake) as Box<dyn DirtySource>)
                .collect(),
        }
    }

    fn step(&mut self, step: &Step) -> Result<(), TestCaseError> {
        match step {
            Step::Write(source, page, count) => {
                let pages: Vec<_> = all_pages().collect();
                let first = *page.get(&pages);
                self.model.write(*source, first, *count);
                let written = pages.iter().filter(|page| **page >= first);
                let ranges = written
                    .take(usize::try_from(*count).unwrap())
                    .map(|page| IovaRange::new(Iova(*page), PAGE).unwrap());
                self.scripts[*source].lock().writes.extend(ranges);
            }
            Step::Collect(threads) => {
                let how = Collect {
                    restarts: 0,
                    threads: *threads,
                };
                let reports = self.dirty.collect(&mut self.sources, how).unwrap();
                for (report, pending) in reports.iter().zip(&self.model.pending) {
                    prop_assert_eq!(report.pages, Some(pending.len() as u64));
                }
                self.model.collect();
            }
            Step::FailedCollect(source, region, restart) => {
                self.scripts[*source].lock().fail_at = Some(Iova(REGIONS[*region].gpa.0));
                let how = Collect {
                    restarts: u32::from(*restart),
                    threads: 1,
                };
                let collected = self.dirty.collect(&mut self.sources, how);
                prop_assert_eq!(collected.is_ok(), *restart);
                self.model.failed_collect(*source, *region, *restart);
            }
            Step::NextRun(pages) => {
                let run = self
                    .dirty
                    .next_run(pages * PAGE + 7, &mut self.sources)
                    .unwrap();
                prop_assert_eq!(run, self.model.next_run(*pages));
            }
            Step::Acknowledge => {
                self.dirty.acknowledge();
                self.model.acknowledge();
            }
            Step::PutBack => {
                self.dirty.put_back();
                self.model.put_back();
            }
            Step::MarkAll => {
                self.dirty.mark_all();
                self.model.mark_all();
            }
        }
        prop_assert_eq!(self.dirty.dirty_pages(), self.model.dirty.len() as u64);
        prop_assert_eq!(
            self.dirty.in_flight_pages(),
            self.model.in_flight.len() as u64
        );
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn no_page_is_lost_and_none_is_sent_twice(
        steps in proptest::collection::vec(step(), 0..60),
    ) {
        let mut bench = Bench::new();
        for step in &steps {
            bench.step(step)?;
        }
        // The guest stands still: one last round.
        bench.step(&Step::PutBack)?;
        bench.step(&Step::Collect(1))?;
        while !bench.model.dirty.is_empty() {
            bench.step(&Step::NextRun(33))?;
        }
        prop_assert_eq!(bench.dirty.next_run(u64::MAX, &mut []).unwrap(), None);
        bench.step(&Step::Acknowledge)?;
        prop_assert_eq!(&bench.model.delivered, &bench.model.version);
    }
}

/// Two threads write all over guest memory through `vm-memory` while it is copied, with
/// confirmations, lost connections and retries; when they stop, the last round makes the copy equal.
#[test]
fn a_copy_under_fire_becomes_equal() {
    let mappings = REGIONS.map(|region| RamMapping {
        gpa: region.gpa,
        len: region.len,
        backing: Backing::Anonymous,
    });
    let memory = MemoryHandle::new(map_ram(mappings.into()).unwrap());
    let mut dirty = GuestDirty::new(&ram_regions(&memory.memory()), PageSize::SIZE_4K).unwrap();
    let mut vmm = VmmWriteSource::new(memory.clone());
    vmm.start(dirty.ranges()).unwrap();
    let mut sources: Vec<Box<dyn DirtySource>> = vec![Box::new(vmm)];
    dirty.mark_all();

    let read = |page: u64| {
        let mut bytes = vec![0u8; 4096];
        memory
            .memory()
            .read_slice(&mut bytes, GuestAddress(page))
            .unwrap();
        bytes
    };
    let mut copy: std::collections::BTreeMap<u64, Vec<u8>> =
        all_pages().map(|page| (page, vec![])).collect();
    let mut on_the_way: VecDeque<(u64, Vec<u8>)> = VecDeque::new();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let mut writers: Vec<_> = (0..2u64)
            .map(|thread| {
                let (memory, stop) = (memory.clone(), &stop);
                scope.spawn(move || write_all_over(&memory, thread, stop))
            })
            .collect();
        for round in 0..300 {
            if round == 299 {
                stop.store(true, Ordering::Relaxed);
                for writer in writers.drain(..) {
                    writer.join().unwrap();
                }
            }
            dirty.collect(&mut sources, Collect::default()).unwrap();
            while let Some(run) = dirty.next_run(9 * PAGE, &mut []).unwrap() {
                for page in (run.gpa.0..run.gpa.0 + run.len).step_by(4096) {
                    on_the_way.push_back((page, read(page)));
                }
                // Now and then the connection breaks in the middle of a round.
                if round % 7 == 3 && on_the_way.len() > 20 {
                    break;
                }
            }
            if round % 7 == 3 {
                on_the_way.clear();
                dirty.put_back();
            } else {
                copy.extend(on_the_way.drain(..));
                dirty.acknowledge();
            }
        }
    });
    let different: Vec<_> = copy
        .iter()
        .filter(|(page, bytes)| **bytes != read(**page))
        .collect();
    assert!(different.is_empty(), "{} pages differ", different.len());
}

/// Writes to random pages in words, slices over page ends, and by raw reads marked later.
fn write_all_over(memory: &MemoryHandle, thread: u64, stop: &AtomicBool) {
    let pages: Vec<_> = all_pages().collect();
    let mut random = 0x9e37_79b9_7f4a_7c15 ^ thread;
    while !stop.load(Ordering::Relaxed) {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let page = pages[usize::try_from(random % pages.len() as u64).unwrap()];
        let at = GuestAddress(page + random % 509 * 8);
        let guest = memory.memory();
        if random.is_multiple_of(3) {
            // May run into the next page, or out of the region: then it is cut short.
            guest.write(&[random.to_le_bytes()[3]; 600], at).unwrap();
        } else {
            guest.write_obj(random, at).unwrap();
        }
    }
}
