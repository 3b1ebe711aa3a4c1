//! Random histories of a device and its changing map against a naive model of them, page by page.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use proptest::sample::Index;

use super::fakes::{FakeLog, PAGE, mapping, range, refusal};
use super::*;
use crate::addr::Iova;
use crate::source::DirtySource;

/// Pages of RAM, and of RAM above 4 GiB; what is between and behind is none.
const LOW: u64 = 1024;
const HIGH: u64 = 512;
const HIGH_PAGE: u64 = 1 << 20;
/// Pages a device can use from 0, and up to the last byte of the address space.
const BOTTOM: u64 = 2048;
const TOP: u64 = 256;
const TOP_PAGE: u64 = (u64::MAX >> 12) - TOP + 1;

fn is_ram(gpa_page: u64) -> bool {
    gpa_page < LOW || (HIGH_PAGE..HIGH_PAGE + HIGH).contains(&gpa_page)
}

/// What is the same in all of a history.
#[derive(Clone, Copy, Debug)]
struct World {
    /// Sizes of the log's pages and the host's, as shifts.
    log: u32,
    host: u32,
    /// Windows of the guest in words of 64 host pages, and of the log in bytes.
    window_words: u64,
    log_window: u64,
    after_unmap: AfterUnmap,
}

fn world() -> impl Strategy<Value = World> {
    let forgets = prop_oneof![
        3 => Just(AfterUnmap::Kept),
        1 => Just(AfterUnmap::Forgotten),
    ];
    (12u32..=21, 12u32..=16, 1u64..5, 12u32..24, forgets).prop_map(
        |(log, host, window_words, window, after_unmap)| World {
            log,
            host,
            window_words,
            log_window: 3 << (window - 1),
            after_unmap,
        },
    )
}

/// How a change of the map goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Outcome {
    Works,
    DeviceRefuses,
    LogFails,
}

#[derive(Clone, Debug)]
enum Step {
    /// The device writes so many mapped pages from one on.
    Write(Index, usize),
    /// IOVA and GPA, as indexes into what there is, and pages.
    Map(Index, Index, u64, Outcome),
    /// From one mapping to another.
    Unmap(Index, Index, Outcome),
    /// Asks for so many further windows; behind the last comes the first.
    Windows(usize),
    /// The next window is the first.
    NewRound,
    /// A round in which a report fails, after so many that do not.
    FailedRound(u32),
    Restart,
}

fn step() -> impl Strategy<Value = Step> {
    let index = any::<Index>;
    let outcome = prop_oneof![
        8 => Just(Outcome::Works),
        2 => Just(Outcome::DeviceRefuses),
        1 => Just(Outcome::LogFails),
    ];
    prop_oneof![
        12 => (index(), 1usize..40).prop_map(|(page, count)| Step::Write(page, count)),
        10 => (index(), index(), prop_oneof![1u64..9, 1u64..700], outcome.clone())
            .prop_map(|(iova, gpa, pages, how)| Step::Map(iova, gpa, pages, how)),
        5 => (index(), index(), outcome)
            .prop_map(|(first, last, how)| Step::Unmap(first, last, how)),
        8 => (1usize..9).prop_map(Step::Windows),
        2 => Just(Step::NewRound),
        1 => (0u32..3).prop_map(Step::FailedRound),
        1 => Just(Step::Restart),
    ]
}

/// The naive model; all pages are of 4 KiB and named by their numbers.
#[derive(Default)]
struct Model {
    mappings: Vec<Mapping>,
    /// Where each mapped page leads.
    table: BTreeMap<u64, u64>,
    /// Written pages, by numbers of the log's pages.
    log: BTreeSet<u64>,
    pending: BTreeSet<u64>,
    outside: u64,
    lost: bool,
    /// Counts writes and reads.
    clock: u64,
    /// When each page of the log was last read.
    read_at: BTreeMap<u64, u64>,
    /// By which page of the log, and when, each page of RAM was last written, unless it was given out
    /// after that was read.
    owed: BTreeMap<u64, (u64, u64)>,
}

struct Bench {
    world: World,
    model: Model,
    device: FakeLog,
    source: Translated<FakeLog>,
    handle: MapHandle,
    windows: Vec<IovaRange>,
    /// The window to ask for next.
    next: usize,
}

fn ram() -> [IovaRange; 2] {
    [range(0, LOW), range(HIGH_PAGE * PAGE, HIGH)]
}

fn page_of(address: Iova) -> u64 {
    address.0 / PAGE
}

impl Bench {
    fn new(world: World) -> Self {
        let device = FakeLog::new(1 << world.log);
        device.0.lock().after_unmap = world.after_unmap;
        let map = IovaMap::live(&[range(TOP_PAGE * PAGE, TOP), range(0, BOTTOM)]).unwrap();
        let (mut source, handle) = Translated::with_window(device.clone(), map, world.log_window);
        source.start(&ram()).unwrap();
        let step = (world.window_words * 64) << world.host;
        let windows = ram().into_iter().flat_map(|ram| {
            let starts = (ram.first().0..=ram.last().0).step_by(usize::try_from(step).unwrap());
            starts.map(move |first| {
                let last = (first + step - 1).min(ram.last().0);
                IovaRange::from_ends(Iova(first), Iova(last)).unwrap()
            })
        });
        Self {
            world,
            model: Model::default(),
            device,
            source,
            handle,
            windows: windows.collect(),
            next: 0,
        }
    }

    /// Pages of 4 KiB in one of the log's, as a shift.
    fn log_shift(&self) -> u32 {
        self.world.log - 12
    }

    /// The device writes a mapped page.
    fn write(&mut self, iova_page: u64) {
        let gpa_page = self.model.table[&iova_page];
        self.device.0.lock().write(iova_page * PAGE + 5);
        let log_page = iova_page >> self.log_shift();
        self.model.log.insert(log_page);
        self.model.clock += 1;
        if is_ram(gpa_page) {
            let write = (log_page, self.model.clock);
            self.model.owed.insert(gpa_page, write);
        }
    }

    /// The log's pages of the mapped ones between these two.
    fn log_pages(&self, first: u64, last: u64) -> BTreeSet<u64> {
        let mapped = self.model.table.range(first..=last);
        mapped.map(|(page, _)| page >> self.log_shift()).collect()
    }

    /// What the log says of the mapped pages between these two is kept by GPA; or all it could say.
    fn read(&mut self, first: u64, last: u64, all: bool) {
        self.model.clock += 1;
        for page in self.log_pages(first, last) {
            self.model.read_at.insert(page, self.model.clock);
            if !self.model.log.remove(&page) && !all {
                continue;
            }
            let start = page << self.log_shift();
            let end = start + (1 << self.log_shift());
            for gpa_page in self.model.table.range(start..end).map(|(_, gpa)| *gpa) {
                if is_ram(gpa_page) {
                    self.model.pending.insert(gpa_page);
                } else {
                    self.model.outside += 1;
                }
            }
        }
    }

    /// The log failed: what it knew is gone.
    fn lose(&mut self) {
        self.model.log.clear();
        self.model.lost = true;
        let mut device = self.device.0.lock();
        device.logged.clear();
        device.fail_report = None;
    }

    /// What is unmapped between these two has been removed for the device.
    fn removed(&mut self, first: u64, last: u64) {
        if self.world.after_unmap == AfterUnmap::Forgotten {
            for page in self.log_pages(first, last) {
                let iova = page << self.world.log;
                self.device.0.lock().logged.remove(&iova);
            }
        }
    }

    /// A change reached the log after the device did its part.
    fn learn(&mut self, first: u64, last: u64, how: Outcome) {
        if self.model.lost {
            return;
        }
        match (self.world.after_unmap, how) {
            (AfterUnmap::Forgotten, _) => self.read(first, last, true),
            (AfterUnmap::Kept, Outcome::LogFails) => self.lose(),
            (AfterUnmap::Kept, _) => self.read(first, last, false),
        }
    }

    fn map(&mut self, new: Mapping, how: Outcome) -> Result<(), TestCaseError> {
        let (first, last) = (page_of(new.iova().first()), page_of(new.iova().last()));
        if self.model.table.range(first..=last).next().is_some() {
            let never = || -> Result<(), DirtyError> { unreachable!() };
            let refused = self.handle.map(new, never);
            let overlaps = matches!(refused, Err(ChangeError::Map(MapError::Overlap { .. })));
            prop_assert!(overlaps);
            return Ok(());
        }
        let gpa_page = new.gpa().0 / PAGE;
        self.model.table.extend((first..=last).zip(gpa_page..));
        let handle = self.handle.clone();
        if how == Outcome::Works {
            handle.map(new, || Ok::<(), DirtyError>(())).unwrap();
            self.model.mappings.push(new);
            return Ok(());
        }
        if how == Outcome::LogFails {
            self.device.0.lock().fail_report = Some(0);
        }
        let refused = handle.map(new, || {
            self.write(last);
            self.removed(first, last);
            Err(refusal())
        });
        prop_assert!(matches!(refused, Err(ChangeError::Device(_))));
        self.learn(first, last, how);
        self.model
            .table
            .retain(|page, _| !(first..=last).contains(page));
        self.device.0.lock().fail_report = None;
        Ok(())
    }

    fn unmap(&mut self, goes: IovaRange, how: Outcome) -> Result<(), TestCaseError> {
        let (first, last) = (page_of(goes.first()), page_of(goes.last()));
        if how == Outcome::LogFails {
            self.device.0.lock().fail_report = Some(0);
        }
        let handle = self.handle.clone();
        let lost = self.model.lost;
        let done = handle.unmap(goes, || {
            // It writes to the last moment.
            self.write(first);
            self.removed(first, last);
            match how {
                Outcome::DeviceRefuses => Err(refusal()),
                Outcome::Works | Outcome::LogFails => Ok(()),
            }
        });
        self.device.0.lock().fail_report = None;
        match how {
            Outcome::DeviceRefuses => {
                prop_assert!(matches!(done, Err(ChangeError::Device(_))));
                if self.world.after_unmap == AfterUnmap::Forgotten {
                    self.learn(first, last, how);
                }
                return Ok(());
            }
            Outcome::LogFails if !lost && self.world.after_unmap == AfterUnmap::Kept => {
                prop_assert!(matches!(done, Err(ChangeError::Log(_))));
            }
            Outcome::Works | Outcome::LogFails => prop_assert!(done.is_ok()),
        }
        self.learn(first, last, how);
        let model = &mut self.model;
        model.table.retain(|page, _| !(first..=last).contains(page));
        model
            .mappings
            .retain(|mapping| mapping.iova().intersection(goes).is_none());
        Ok(())
    }

    /// Asks for the next window, which must have exactly what the model has.
    fn window(&mut self) -> Result<(), TestCaseError> {
        let window = self.windows[self.next];
        let page = PageSize::new(1 << self.world.host).unwrap();
        let mut bitmap = IovaBitmap::over(window, page).unwrap();
        let reported = self.source.report(window, &mut bitmap);
        if self.model.lost {
            prop_assert!(reported.is_err());
            return self.restart();
        }
        if self.next == 0 {
            self.read(0, u64::MAX, false);
        }
        let pages = page_of(window.first())..=page_of(window.last());
        let shift = self.world.host - 12;
        let given: BTreeSet<u64> = self
            .model
            .pending
            .range(pages.clone())
            .map(|page| page >> shift)
            .collect();
        self.model.pending.retain(|page| !pages.contains(page));
        let got: BTreeSet<u64> = bitmap
            .runs()
            .flat_map(|run| run.first().0 >> self.world.host..=run.last().0 >> self.world.host)
            .collect();
        prop_assert_eq!(&got, &given);
        prop_assert_eq!(reported.unwrap().pages, Some(given.len() as u64));
        let model = &mut self.model;
        model.owed.retain(|page, (log_page, written)| {
            let read = model.read_at.get(log_page);
            read.is_none_or(|read| *read < *written) || !given.contains(&(*page >> shift))
        });
        self.next = (self.next + 1) % self.windows.len();
        prop_assert_eq!(self.handle.pages_outside_ram(), self.model.outside);
        Ok(())
    }

    /// Whoever starts anew takes every page as dirty.
    fn restart(&mut self) -> Result<(), TestCaseError> {
        self.source.start(&ram()).unwrap();
        let model = &mut self.model;
        model.log.clear();
        model.pending.clear();
        model.owed.clear();
        model.lost = false;
        self.next = 0;
        Ok(())
    }

    fn step(&mut self, step: &Step) -> Result<(), TestCaseError> {
        match step {
            Step::Write(page, count) => {
                let mapped: Vec<u64> = self.model.table.keys().copied().collect();
                if !mapped.is_empty() {
                    for page in mapped.iter().skip(page.index(mapped.len())).take(*count) {
                        self.write(*page);
                    }
                }
            }
            Step::Map(iova, gpa, pages, how) => {
                let at = iova.index(usize::try_from(BOTTOM + TOP).unwrap()) as u64;
                let (at, room) = match at.checked_sub(BOTTOM) {
                    None => (at, BOTTOM - at),
                    Some(at) => (TOP_PAGE + at, TOP - at),
                };
                // To RAM, over its ends, and where there is none.
                let gpa = gpa.index(usize::try_from(LOW + HIGH + 100).unwrap()) as u64;
                let gpa = match gpa.checked_sub(LOW + 50) {
                    None => gpa,
                    Some(gpa) => HIGH_PAGE - 20 + gpa,
                };
                let pages = (*pages).min(room);
                self.map(mapping(at * PAGE, gpa * PAGE, pages), *how)?;
            }
            Step::Unmap(first, last, how) => {
                self.model
                    .mappings
                    .sort_unstable_by_key(|mapping| mapping.iova());
                if self.model.mappings.is_empty() {
                    return Ok(());
                }
                let (a, b) = (
                    first.get(&self.model.mappings).iova(),
                    last.get(&self.model.mappings).iova(),
                );
                let goes = IovaRange::from_ends(a.first().min(b.first()), a.last().max(b.last()));
                self.unmap(goes.unwrap(), *how)?;
            }
            Step::Windows(count) => {
                for _ in 0..*count {
                    self.window()?;
                }
            }
            Step::NewRound => self.next = 0,
            Step::FailedRound(after) => {
                self.next = 0;
                self.device.0.lock().fail_report = Some(*after);
                let window = self.windows[0];
                let mut bitmap = IovaBitmap::over(window, PageSize::SIZE_4K).unwrap();
                if self.source.report(window, &mut bitmap).is_err() {
                    self.lose();
                    // Not by itself any better.
                    let again = self.source.report(window, &mut bitmap);
                    prop_assert!(again.is_err());
                }
                self.restart()?;
                self.device.0.lock().fail_report = None;
                // What was read before it failed counts there, and is of no matter here.
                self.model.outside = self.handle.pages_outside_ram();
            }
            Step::Restart => self.restart()?,
        }
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn exactly_what_was_written_through_a_changing_map_is_reported(
        world in world(),
        steps in proptest::collection::vec(step(), 0..80),
    ) {
        let mut bench = Bench::new(world);
        for step in &steps {
            bench.step(step)?;
        }
        // The device stands still: one last round.
        if bench.model.lost {
            bench.restart()?;
        }
        bench.next = 0;
        for _ in 0..bench.windows.len() {
            bench.window()?;
        }
        prop_assert!(bench.model.owed.is_empty(), "lost: {:?}", bench.model.owed);
    }

    #[test]
    fn a_list_of_ranges_leads_where_a_walk_page_by_page_does(
        world in world(),
        maps in proptest::collection::vec((any::<Index>(), any::<Index>(), 1u64..300), 1..20),
        writes in proptest::collection::vec((any::<Index>(), 1usize..300), 0..20),
    ) {
        let mut bench = Bench::new(world);
        for (iova, gpa, pages) in maps {
            bench.step(&Step::Map(iova, gpa, pages, Outcome::Works))?;
        }
        let list = IovaMap::ranges(&bench.model.mappings).unwrap();
        (bench.source, bench.handle) =
            Translated::with_window(bench.device.clone(), list, world.log_window);
        bench.restart()?;
        for (page, count) in writes {
            bench.step(&Step::Write(page, count))?;
        }
        for _ in 0..bench.windows.len() {
            bench.window()?;
        }
        prop_assert!(bench.model.owed.is_empty() && bench.model.log.is_empty());
    }
}
