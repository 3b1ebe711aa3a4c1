//! What dirty tracking costs: Ferry's share of a migration's time, and the guest's speed.
//!
//! The guest writes its memory at a rate of 1 GiB/s, or as fast as it can, and is moved by each way
//! that KVM has of keeping its dirty log. As it may write faster than is sent, it is moved after
//! a quarter of a minute whatever it does. Its speed before and meanwhile is its own count of
//! pages by its own time-stamp counter. Meanwhile it also shares the CPUs with both sides of the
//! migration, whatever the log; so the rows are to be compared with each other.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde::Serialize;
use serde_json::json;

use super::migration::{SPARE_MIB, first_line};
use super::stats::Summary;
use super::warm::warm;
use crate::demo::report::ms;
use crate::ferry::{Ferry, phase_name};
use crate::guest_output::Tick;
use crate::migration::Route;
use crate::vm::{Vm, VmSpec};

/// How long memory is sent while the guest runs, in seconds.
const PRECOPY_S: u64 = 15;
/// Reports of the guest before.
const TICKS_BEFORE: usize = 10;
/// What keeps the log, as `--memory dirty_log=` names it.
const LOGS: [&str; 3] = ["bitmap", "bitmap-auto-clear", "ring"];
/// MiB/s that the guest writes.
const RATES: [&str; 2] = ["1024", "max"];

/// One migration.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct TrackingSample {
    /// What it took, the guest's standstill at its end included.
    pub total_ms: f64,
    /// Of that, finding dirty pages: reports, merging, clearing at KVM.
    pub tracking_ms: f64,
    /// The same in percent of the total.
    pub tracking_percent: f64,
    /// Pages written per time while memory was sent, in percent of those before.
    pub guest_speed_percent: f64,
    /// MiB/s that the guest wrote before.
    pub guest_mib_s: f64,
    /// Pages found wrong, of all.
    pub corrupt: u64,
}

/// One log at one rate.
#[derive(Clone, Debug, Serialize)]
pub struct TrackingRow {
    /// `--memory dirty_log=`.
    pub dirty_log: &'static str,
    /// MiB/s that the guest writes, or `max`.
    pub rate: &'static str,
    /// Guest RAM in MiB.
    pub memory_mib: u64,
    /// Each run.
    pub samples: Vec<TrackingSample>,
    /// Why others failed, one line each.
    pub failures: Vec<String>,
}

impl TrackingRow {
    /// Over the samples.
    pub fn summary(&self, figure: fn(&TrackingSample) -> f64) -> Option<Summary> {
        Summary::of(self.samples.iter().map(figure))
    }

    fn run(&self, dir: &Path) -> Result<TrackingSample> {
        let dir = tempfile::tempdir_in(dir)?;
        let dir = dir.path();
        let mem = self.memory_mib.saturating_sub(SPARE_MIB);
        let spec = VmSpec {
            dirty_log: self.dirty_log,
            ..VmSpec::new(self.memory_mib, &format!("mem={mem} rate={}", self.rate))
        };
        warm(self.memory_mib, false)?;
        let mut vm = Vm::boot(dir, "source", &spec)?;
        let destination = Ferry::start(dir, "destination", &[])?;
        let before = vm.wait_ticks(1)?;
        let began = vm.wait_ticks(TICKS_BEFORE)?;
        warm(self.memory_mib, false)?;
        let started = vm.wait_ticks(1)?;
        let route = Route::unix(dir).sending(json!({
            "downtime_ms": 1,
            "timeout_s": PRECOPY_S,
            "timeout_strategy": "ignore",
        }));
        route.open(&destination)?;
        route.go(&vm.ferry)?;
        let status = vm.ferry.wait_migration(super::migration::LIMIT)?;
        ensure!(phase_name(&status) == "done", "{}", status["aborted"]);
        vm.pull()?;
        // The last of the source: while memory was sent the guest ran all the time.
        let ended = vm.last_tick()?.clone();
        vm.follow(destination)?.shut_down()?;
        let verify = vm.verify()?;
        let speed = |from: &Tick, to: &Tick| {
            let pages = to.pages.saturating_sub(from.pages);
            let cycles = to.tsc.saturating_sub(from.tsc);
            (cycles > 0).then(|| count(pages) / count(cycles))
        };
        let slow = speed(&started, &ended).context("the guest said nothing meanwhile")?;
        let fast = speed(&before, &began).context("the guest's clock stands still")?;
        let total_ms = ms(status["elapsed_ms"].as_u64().context("no elapsed_ms")? * 1000);
        let tracking_ms = ms(status["tracking_us"].as_u64().context("no tracking_us")?);
        let complaints = vm.log.complaints();
        Ok(TrackingSample {
            total_ms,
            tracking_ms,
            tracking_percent: 100.0 * tracking_ms / total_ms,
            guest_speed_percent: 100.0 * slow / fast,
            guest_mib_s: began.rate_mib_s,
            corrupt: verify.corrupt.max(u64::from(!complaints.is_empty())),
        })
    }

    fn tell(&self, run: u32, sample: &TrackingSample) {
        eprintln!(
            "run {run} dirty_log={:17} rate {:4}: total {} ms, tracking {} ms ({:.2} %), the guest \
             at {:.0} % of {:.0} MiB/s, {} wrong pages",
            self.dirty_log,
            self.rate,
            sample.total_ms,
            sample.tracking_ms,
            sample.tracking_percent,
            sample.guest_speed_percent,
            sample.guest_mib_s,
            sample.corrupt
        );
    }
}

/// As a float; what is counted here is far below 2^52.
#[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
fn count(value: u64) -> f64 {
    value as f64
}

/// Measures all logs in turn, `runs` times.
pub(super) fn measure(dir: &Path, runs: u32, memory_mib: u64) -> Vec<TrackingRow> {
    let mut rows: Vec<TrackingRow> = RATES
        .iter()
        .flat_map(|&rate| LOGS.iter().map(move |&dirty_log| (rate, dirty_log)))
        .map(|(rate, dirty_log)| TrackingRow {
            dirty_log,
            rate,
            memory_mib,
            samples: Vec::new(),
            failures: Vec::new(),
        })
        .collect();
    for run in 1..=runs {
        for row in &mut rows {
            match row.run(dir) {
                Ok(sample) => {
                    row.tell(run, &sample);
                    row.samples.push(sample);
                }
                Err(error) => {
                    eprintln!("bench: dirty_log={}: {error:#}", row.dirty_log);
                    row.failures.push(first_line(&error));
                }
            }
        }
    }
    rows
}
