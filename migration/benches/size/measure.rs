//! What a sample is.
//!
//! - *sync*: one [`GuestDirty::collect`] on one thread, from the first source's first report to the
//!   number of dirty pages. The *reports* in it, the time in the sources themselves, are told apart:
//!   here they are simulated, in a VM they are system calls and messages. The rest is *own*.
//! - *walk*: all runs taken by [`GuestDirty::next_run`] as the sender takes them, nothing being sent.
//! - *acknowledge*: [`GuestDirty::acknowledge`] of all that was taken.
//!
//! Before each sample the caches are swept, as they are by the memory that a round sends.

use std::time::{Duration, Instant};

use serde::Serialize;
use vm_migration::dirty::{Collect, GuestDirty};
use vm_migration::{DirtyError, DirtySource, IovaRange};

use crate::fill::Fill;
use crate::layout::{self, PAGE};

/// A run is cut to what one message carries.
const RUN_BYTES: u64 = 1 << 20;

/// Twice the caches of most hosts.
const SWEEP_BYTES: usize = 64 << 20;

/// After this long a row makes do with [`FEW`] samples.
const LONG: Duration = Duration::from_secs(6);

/// The fewest samples of a row.
const FEW: usize = 3;

/// What several samples gave, in milliseconds.
#[derive(Clone, Copy, PartialEq, Debug, Default, Serialize)]
pub(crate) struct Summary {
    /// The middle one, or the lower of the two.
    pub(crate) median: f64,
    /// The smallest.
    pub(crate) min: f64,
    /// The largest.
    pub(crate) max: f64,
}

impl Summary {
    fn of(samples: &[Sample], figure: impl Fn(&Sample) -> Duration) -> Self {
        let mut sorted: Vec<f64> = samples
            .iter()
            .map(|sample| figure(sample).as_secs_f64() * 1000.0)
            .collect();
        sorted.sort_by(f64::total_cmp);
        let at = |index: usize| sorted.get(index).copied().unwrap_or_default();
        Self {
            median: at(sorted.len().saturating_sub(1) / 2),
            min: at(0),
            max: at(sorted.len().saturating_sub(1)),
        }
    }
}

/// One measured case.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Row {
    /// The guest's size.
    pub(crate) gib: u64,
    /// How many sources there are.
    pub(crate) sources: usize,
    /// What they are, if not just devices of 4 KiB.
    pub(crate) who: String,
    /// Which pages are dirty.
    pub(crate) fill: Fill,
    /// How many are.
    pub(crate) dirty_pages: u64,
    /// In how many runs of at most 1 MiB.
    pub(crate) runs: u64,
    /// How many samples were taken.
    pub(crate) samples: usize,
    /// A sync.
    pub(crate) sync_ms: Summary,
    /// Of it, in the sources' reports.
    pub(crate) reports_ms: Summary,
    /// Of it, the rest.
    pub(crate) own_ms: Summary,
    /// The walk over all runs.
    pub(crate) walk_ms: Summary,
    /// The acknowledgement.
    pub(crate) acknowledge_ms: Summary,
    /// By how much the process grew by the guest's bitmaps.
    pub(crate) bitmap_bytes: u64,
    /// What was not as it must be.
    pub(crate) wrong: Option<String>,
}

struct Sample {
    sync: Duration,
    reports: Duration,
    walk: Duration,
    acknowledge: Duration,
    /// Pages that the sync counted.
    dirty: u64,
    /// Pages and runs that the walk gave.
    walked: (u64, u64),
}

/// Who reports.
pub(crate) struct Sources {
    /// What they are, if not just devices of 4 KiB.
    pub(crate) who: String,
    pub(crate) all: Vec<Box<dyn DirtySource>>,
    /// Done before each sample.
    pub(crate) prepare: Box<dyn Fn()>,
}

/// A guest that samples are taken of.
pub(crate) struct Guest {
    gib: u64,
    dirty: GuestDirty,
    bitmap_bytes: u64,
    sweep: Vec<u64>,
}

/// Memory of this process that is present, in bytes.
fn resident() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages = statm.split(' ').nth(1).and_then(|pages| pages.parse().ok());
    let page = u64::try_from(rustix::param::page_size()).unwrap_or(0);
    pages.unwrap_or(0u64).saturating_mul(page)
}

impl Guest {
    /// A clean guest, reported by windows of so many bytes.
    pub(crate) fn new(
        gib: u64,
        window_bytes: u64,
    ) -> Result<Self, vm_migration::dirty::RamLayoutError> {
        let sweep = vec![1; SWEEP_BYTES / size_of::<u64>()];
        let before = resident();
        let dirty = GuestDirty::with_window(&layout::regions(gib), PAGE, window_bytes)?;
        Ok(Self {
            gib,
            dirty,
            bitmap_bytes: resident().saturating_sub(before),
            sweep,
        })
    }

    /// Its RAM.
    pub(crate) fn ranges(&self) -> &[IovaRange] {
        self.dirty.ranges()
    }

    /// The largest of its regions.
    pub(crate) fn largest(&self) -> IovaRange {
        let ranges = self.dirty.ranges().iter().copied();
        ranges
            .max_by_key(|range| range.len())
            .unwrap_or(IovaRange::ALL)
    }

    /// Samples of a case.
    pub(crate) fn measure(
        &mut self,
        fill: Fill,
        sources: &mut Sources,
        samples: u32,
    ) -> Result<Row, DirtyError> {
        let began = Instant::now();
        let mut taken: Vec<Sample> = Vec::new();
        let mut wrong = None;
        for _ in 0..samples {
            if taken.len() >= FEW && began.elapsed() > LONG {
                break;
            }
            (sources.prepare)();
            let sample = self.sample(&mut sources.all)?;
            wrong = wrong.or_else(|| self.check(fill, sources.all.len(), &sample));
            taken.push(sample);
        }
        let last = taken.last();
        Ok(Row {
            gib: self.gib,
            sources: sources.all.len(),
            who: sources.who.clone(),
            fill,
            dirty_pages: last.map_or(0, |sample| sample.dirty),
            runs: last.map_or(0, |sample| sample.walked.1),
            samples: taken.len(),
            sync_ms: Summary::of(&taken, |sample| sample.sync),
            reports_ms: Summary::of(&taken, |sample| sample.reports),
            own_ms: Summary::of(&taken, |sample| sample.sync.saturating_sub(sample.reports)),
            walk_ms: Summary::of(&taken, |sample| sample.walk),
            acknowledge_ms: Summary::of(&taken, |sample| sample.acknowledge),
            bitmap_bytes: self.bitmap_bytes,
            wrong,
        })
    }

    fn sample(&mut self, sources: &mut [Box<dyn DirtySource>]) -> Result<Sample, DirtyError> {
        for word in &mut self.sweep {
            *word = std::hint::black_box(*word).wrapping_add(1);
        }
        let began = Instant::now();
        let reports = self.dirty.collect(sources, Collect::default())?;
        let dirty = self.dirty.dirty_pages();
        let sync = began.elapsed();

        let began = Instant::now();
        let (mut bytes, mut runs) = (0u64, 0u64);
        while let Some(run) = self.dirty.next_run(RUN_BYTES, sources)? {
            bytes = bytes.saturating_add(run.len);
            runs += 1;
        }
        let walk = began.elapsed();

        let began = Instant::now();
        self.dirty.acknowledge();
        Ok(Sample {
            sync,
            reports: reports.iter().map(|report| report.took).sum(),
            walk,
            acknowledge: began.elapsed(),
            dirty,
            walked: (bytes >> PAGE.shift(), runs),
        })
    }

    /// What is not as it must be.
    fn check(&self, fill: Fill, sources: usize, sample: &Sample) -> Option<String> {
        let all = self.dirty.total_pages();
        let (dirty, (walked, _)) = (sample.dirty, sample.walked);
        if walked != dirty {
            return Some(format!(
                "{dirty} pages are dirty and {walked} were given out"
            ));
        }
        if self.dirty.dirty_pages() != 0 || self.dirty.in_flight_pages() != 0 {
            return Some("pages are left after the walk".to_owned());
        }
        let (least, most) = fill.bounds(all, sources);
        let range = least..=most;
        (!range.contains(&dirty))
            .then(|| format!("{dirty} pages of {all} are dirty, but {least} to {most} were to be"))
    }
}
