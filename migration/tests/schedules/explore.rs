//! The tests: how many schedules, which, and what happened in them.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use shuttle::scheduler::{PctScheduler, RandomScheduler, ReplayScheduler, Scheduler};
use shuttle::{Config, Runner};

use super::faults::{FAULTS, Fault};
use super::migration;
use super::writers;

/// What is counted over all schedules, to see that it happens at all.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Count {
    /// A collection on one thread.
    CollectInTurn,
    /// A collection on several threads.
    CollectTogether,
    /// A report that failed, its source started anew.
    FailureMended,
    /// A report or a clear that failed the migration.
    Failure,
    /// A connection that broke.
    Broken,
    /// A migration begun again after its stop-copy.
    Restart,
    /// A page handed out.
    Page,
}

const COUNTS: [Count; 7] = [
    Count::CollectInTurn,
    Count::CollectTogether,
    Count::FailureMended,
    Count::Failure,
    Count::Broken,
    Count::Restart,
    Count::Page,
];

/// How often each of [`COUNTS`] happened.
#[derive(Debug)]
pub(crate) struct Counts([AtomicU64; COUNTS.len()]);

impl Counts {
    const fn new() -> Self {
        Self([const { AtomicU64::new(0) }; COUNTS.len()])
    }

    pub(crate) fn count(&self, what: Count) {
        for (counted, which) in self.0.iter().zip(COUNTS) {
            if which == what {
                counted.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    /// Prints them; each must have happened, where there were enough schedules for that.
    fn tell(&self, schedules: usize) {
        for (counted, which) in self.0.iter().zip(COUNTS) {
            let counted = counted.load(Ordering::Relaxed);
            println!("    {which:?}: {counted}");
            assert!(counted > 0 || schedules < 100, "{which:?} never happened");
        }
    }
}

fn number(name: &str, otherwise: u64) -> u64 {
    match std::env::var(name) {
        Ok(text) => text.parse().expect("a number"),
        Err(_) => otherwise,
    }
}

/// How many schedules.
fn schedules() -> usize {
    let default = if cfg!(debug_assertions) { 1000 } else { 10_000 };
    usize::try_from(number("DIRTY_SCHEDULES", default)).unwrap()
}

fn seed() -> u64 {
    number("DIRTY_SCHEDULES_SEED", 0x5eed)
}

/// Runs `check` under each schedule of `scheduler`.
fn explore(scheduler: impl Scheduler + 'static, check: impl Fn() + Send + Sync + 'static) {
    vm_migration::on_fence(writers::fence);
    let mut config = Config::new();
    // An unoptimised build needs more than the default.
    config.stack_size = 0x4_0000;
    // That atomics are in one order is known and made up for; see the page of this test.
    config.silence_warnings = true;
    Runner::new(scheduler, config).run(check);
}

fn check(counts: &'static Counts) {
    if let Err(violation) = migration::run(None, counts) {
        panic!("{violation}");
    }
}

#[test]
fn no_schedule_loses_or_invents_a_page() {
    static COUNTS: Counts = Counts::new();
    if let Ok(schedule) = std::env::var("DIRTY_SCHEDULE") {
        let scheduler = ReplayScheduler::new_from_encoded(&schedule);
        return explore(scheduler, || check(&COUNTS));
    }
    let (schedules, began) = (schedules(), Instant::now());
    let scheduler = RandomScheduler::new_from_seed(seed(), schedules);
    explore(scheduler, || check(&COUNTS));
    println!("{schedules} random schedules in {:.1?}", began.elapsed());
    COUNTS.tell(schedules);
}

/// Threads that go on for long and are seldom interrupted: other schedules than those above.
#[test]
fn no_schedule_of_few_preemptions_loses_or_invents_a_page() {
    static COUNTS: Counts = Counts::new();
    let (schedules, began) = (schedules(), Instant::now());
    let scheduler = PctScheduler::new_from_seed(seed(), 4, schedules);
    explore(scheduler, || check(&COUNTS));
    let took = began.elapsed();
    println!("{schedules} schedules of at most 3 preemptions in {took:.1?}");
    COUNTS.tell(schedules);
}

/// A fault that was noticed in so many schedules is not looked for any longer.
const ENOUGH: usize = 3;

#[test]
fn every_fault_is_noticed() {
    static NOTICED: Mutex<Vec<String>> = Mutex::new(Vec::new());
    static RUNS: AtomicU64 = AtomicU64::new(0);
    let schedules = schedules().max(2000);
    for fault in FAULTS {
        NOTICED.lock().unwrap().clear();
        RUNS.store(0, Ordering::Relaxed);
        let scheduler = RandomScheduler::new_from_seed(seed(), schedules);
        explore(scheduler, move || try_fault(fault, &NOTICED, &RUNS));
        let noticed = NOTICED.lock().unwrap().clone();
        println!("{fault:?}:");
        noticed
            .iter()
            .for_each(|violation| println!("    {violation}"));
        assert!(!noticed.is_empty(), "{fault:?} was not noticed");
    }
}

fn try_fault(fault: Fault, noticed: &Mutex<Vec<String>>, runs: &AtomicU64) {
    static COUNTS: Counts = Counts::new();
    if noticed.lock().unwrap().len() >= ENOUGH {
        return;
    }
    let run = runs.fetch_add(1, Ordering::Relaxed) + 1;
    if let Err(violation) = migration::run(Some(fault), &COUNTS) {
        let mut noticed = noticed.lock().unwrap();
        noticed.push(format!("schedule {run}: {violation}"));
    }
}
