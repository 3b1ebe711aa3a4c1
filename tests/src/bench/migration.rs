//! Migrations of the native guest.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use serde::Serialize;

use super::contender::{Backing, Boot, Contender, Order, Said, Vmm, fresh, migrate};
use super::stats::Summary;
use super::warm::{HugePool, warm};
use crate::demo::Transport;
use crate::demo::report::ms;
use crate::guest;
use crate::guest_output::GuestLog;

/// Memory of the guest that is not dirtied: its image, and room for the VMM's tables.
pub(super) const SPARE_MIB: u64 = 128;
/// Beyond this a migration has not converged.
pub(super) const LIMIT: Duration = Duration::from_secs(60);
/// What the guest may take to write all its memory, or check it.
const GUEST_LIMIT: Duration = Duration::from_secs(120);
/// Reports of the guest, every 100 ms, before and after.
const TICKS_BEFORE: u32 = 5;
const TICKS_AFTER: u32 = 5;

/// One thing to measure, for all contenders.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Case {
    /// MiB/s that the guest dirties, or `max`.
    pub rate: &'static str,
    /// `unix` or `tcp`.
    pub transport: &'static str,
    /// What both VMMs are told the guest may stand still at most.
    pub downtime_target_ms: u64,
}

/// One migration.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Sample {
    /// What the VMM says it took.
    pub total_ms: f64,
    /// What the VMM says the guest stood still.
    pub downtime_ms: f64,
    /// What the guest says.
    pub gap_ms: f64,
    /// MiB on the wire.
    pub sent_mib: f64,
    /// CPU time that source and destination took, without the guest's own: what is left to compare
    /// where the machine is busy.
    pub cpu_ms: f64,
    /// Rounds of memory.
    pub rounds: u64,
    /// Pages found wrong, of all.
    pub corrupt: u64,
    /// Pages checked at the destination.
    pub verified: u64,
}

/// One case with one contender.
#[derive(Clone, Debug, Serialize)]
pub struct MigrationRow {
    /// Who.
    #[serde(flatten)]
    pub contender: Contender,
    /// What.
    #[serde(flatten)]
    pub case: Case,
    /// Each run that completed.
    pub samples: Vec<Sample>,
    /// Why others did not, one line each.
    pub failures: Vec<String>,
    /// Over the samples.
    pub total_ms: Option<Summary>,
    /// Over the samples.
    pub downtime_ms: Option<Summary>,
    /// Over the samples.
    pub gap_ms: Option<Summary>,
    /// Over the samples.
    pub sent_mib: Option<Summary>,
    /// Over the samples.
    pub cpu_ms: Option<Summary>,
}

impl MigrationRow {
    fn new(contender: Contender, case: Case) -> Self {
        Self {
            contender,
            case,
            samples: Vec::new(),
            failures: Vec::new(),
            total_ms: None,
            downtime_ms: None,
            gap_ms: None,
            sent_mib: None,
            cpu_ms: None,
        }
    }

    fn summarise(&mut self) {
        let of = |figure: fn(&Sample) -> f64| Summary::of(self.samples.iter().map(figure));
        self.total_ms = of(|sample| sample.total_ms);
        self.downtime_ms = of(|sample| sample.downtime_ms);
        self.gap_ms = of(|sample| sample.gap_ms);
        self.sent_mib = of(|sample| sample.sent_mib);
        self.cpu_ms = of(|sample| sample.cpu_ms);
    }
}

/// All that is to be measured.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    contenders: Vec<Contender>,
    cases: Vec<Case>,
    runs: u32,
    memory_mib: u64,
}

impl Plan {
    /// The full plan, or a short one.
    pub(super) fn new(quick: bool, runs: u32, memory_mib: u64) -> Self {
        let (transports, targets): (&[_], &[_]) = if quick {
            (&["unix"], &[100])
        } else {
            (&["unix", "tcp"], &[100, 300])
        };
        let mut cases = Vec::new();
        for &transport in transports {
            for &downtime_target_ms in targets {
                for rate in ["0", "100", "max"] {
                    cases.push(Case {
                        rate,
                        transport,
                        downtime_target_ms,
                    });
                }
            }
        }
        let mut contenders = Vec::new();
        for backing in [Backing::Memfd, Backing::Anon, Backing::Huge] {
            for vmm in [Vmm::Ferry, Vmm::Qemu] {
                contenders.push(Contender { vmm, backing });
            }
        }
        Self {
            contenders,
            cases,
            runs,
            memory_mib,
        }
    }
}

/// Measures everything in `plan`; contenders take turns.
pub(super) fn measure(dir: &Path, plan: &Plan) -> Result<Vec<MigrationRow>> {
    let elf = guest::elf()?;
    let mut plan = plan.clone();
    // Two guests, and one page for rounding up.
    let pool = HugePool::reserve(plan.memory_mib * 2 + 2);
    if let Err(error) = &pool {
        eprintln!("bench: no rows with 2 MiB pages: {error:#}");
        plan.contenders
            .retain(|contender| contender.backing != Backing::Huge);
    }
    let mut rows: Vec<MigrationRow> = plan
        .cases
        .iter()
        .flat_map(|&case| {
            plan.contenders
                .iter()
                .map(move |&contender| MigrationRow::new(contender, case))
        })
        .collect();
    for run in 1..=plan.runs {
        // Who comes second finds what the first left; so they change places.
        let order: Vec<&mut MigrationRow> = if run % 2 == 1 {
            rows.iter_mut().collect()
        } else {
            rows.iter_mut().rev().collect()
        };
        for row in order {
            let spec = Spec {
                contender: row.contender,
                case: row.case,
                elf: &elf,
                memory_mib: plan.memory_mib,
            };
            match spec.run(dir) {
                Ok(Some(sample)) => {
                    spec.tell(run, &sample);
                    row.samples.push(sample);
                }
                Ok(None) => row
                    .failures
                    .push(format!("not converged within {} s", LIMIT.as_secs())),
                Err(error) => {
                    let name = row.contender.name();
                    eprintln!("bench: {name}: {:?}: {error:#}", row.case);
                    row.failures.push(first_line(&error));
                }
            }
        }
    }
    drop(pool);
    rows.iter_mut().for_each(MigrationRow::summarise);
    Ok(rows)
}

pub(super) fn first_line(error: &anyhow::Error) -> String {
    let text = format!("{error:#}");
    text.lines().next().unwrap_or_default().to_owned()
}

/// One run.
struct Spec<'a> {
    contender: Contender,
    case: Case,
    elf: &'a Path,
    memory_mib: u64,
}

impl Spec<'_> {
    fn run(&self, dir: &Path) -> Result<Option<Sample>> {
        let dir = tempfile::tempdir_in(dir)?;
        let dir = dir.path();
        let mem = self.memory_mib.saturating_sub(SPARE_MIB);
        let line = format!(
            "mode=dirty mem={mem} rate={} tick=100 listen=5",
            self.case.rate
        );
        let boot = Boot {
            elf: self.elf,
            command_line: &line,
            memory_mib: self.memory_mib,
        };
        self.warm()?;
        let mut log = GuestLog::default();
        let mut source = self.contender.start(dir, "source", &boot)?;
        let ready = |log: &GuestLog| log.is_ready().then_some(());
        source
            .console()
            .read_until(&mut log, "a ready guest", GUEST_LIMIT, ready)?;
        let mut destination = self.contender.start_empty(dir, "destination", &boot)?;
        for _ in 0..TICKS_BEFORE {
            source.console().next_tick(&mut log, GUEST_LIMIT)?;
        }
        // As late as may be: what is free goes cold again.
        self.warm()?;
        // The longest gap shall be the migration's.
        source.console().say(b"r")?;
        source.console().next_tick(&mut log, GUEST_LIMIT)?;

        let url = self.url(dir);
        let order = Order {
            url: &url,
            downtime_ms: self.case.downtime_target_ms,
            limit: LIMIT,
        };
        let processes = [source.console().id(), destination.console().id()];
        let before = cpu_ms(&processes)?;
        let Some(said) = migrate(&mut source, &mut destination, order)? else {
            return Ok(None);
        };
        let cpu_ms = cpu_ms(&processes)? - before;
        let rest = source.console().take();
        log.feed(&rest)?;
        let console = destination.console();
        for _ in 0..TICKS_AFTER {
            console.next_tick(&mut log, GUEST_LIMIT)?;
        }
        let gap_us = log.ticks().next_back().map_or(0, |tick| tick.max_gap_us);
        let verify = console.verify(&mut log, GUEST_LIMIT)?;
        let complaints = log.complaints();
        Ok(Some(Sample {
            corrupt: verify.corrupt.max(u64::from(!complaints.is_empty())),
            verified: verify.pages,
            cpu_ms,
            ..sample(said, gap_us)
        }))
    }

    /// Has the pages ready that the next VMM takes; those of the pool always are.
    fn warm(&self) -> Result<()> {
        match self.contender.backing {
            Backing::Memfd => warm(self.memory_mib, false),
            Backing::Anon => warm(self.memory_mib, true),
            Backing::Huge => Ok(()),
        }
    }

    fn url(&self, dir: &Path) -> String {
        if self.case.transport == "tcp" {
            Transport::Tcp.url(dir)
        } else {
            format!("unix:{}", fresh(dir, "migration.sock").display())
        }
    }

    fn tell(&self, run: u32, sample: &Sample) {
        let Case {
            rate,
            transport,
            downtime_target_ms,
        } = self.case;
        eprintln!(
            "run {run} {:14} {transport:4} rate {rate:3} target {downtime_target_ms} ms: total {} ms, \
             downtime {} ms, gap {} ms, {} MiB, {} ms of CPU, {} rounds, {} wrong pages",
            self.contender.name(),
            sample.total_ms,
            sample.downtime_ms,
            sample.gap_ms,
            sample.sent_mib,
            sample.cpu_ms,
            sample.rounds,
            sample.corrupt
        );
    }
}

/// CPU time of these processes so far, in user and kernel, without what their guests took.
fn cpu_ms(processes: &[u32]) -> Result<f64> {
    let mut ticks = 0;
    for process in processes {
        let stat = std::fs::read_to_string(format!("/proc/{process}/stat"))?;
        ticks += own_ticks(&stat).with_context(|| format!("/proc/{process}/stat: {stat}"))?;
    }
    let per_second = u32::try_from(rustix::param::clock_ticks_per_second())?;
    Ok(f64::from(u32::try_from(ticks)?) * 1000.0 / f64::from(per_second))
}

/// `utime` (14th field of proc(5)) and `stime` (15th), less `guest_time` (43rd), which is in the
/// first.
fn own_ticks(stat: &str) -> Option<u64> {
    // The second field, in brackets, may have blanks in it.
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_ascii_whitespace().collect();
    let field = |number: usize| fields.get(number - 3)?.parse::<u64>().ok();
    Some((field(14)? + field(15)?).saturating_sub(field(43)?))
}

fn sample(said: Said, gap_us: u64) -> Sample {
    // In KiB, so that the division keeps a digit.
    let kib = u32::try_from(said.bytes >> 10).unwrap_or(u32::MAX);
    Sample {
        total_ms: said.total_ms,
        downtime_ms: said.downtime_ms,
        gap_ms: ms(gap_us),
        sent_mib: (f64::from(kib) / 1024.0).round(),
        cpu_ms: 0.0,
        rounds: said.rounds,
        corrupt: 0,
        verified: 0,
    }
}

/// Rows of `contender`'s rival on the same case.
pub(super) fn rival<'a>(rows: &'a [MigrationRow], row: &MigrationRow) -> Option<&'a MigrationRow> {
    rows.iter().find(|other| {
        other.case == row.case
            && other.contender.backing == row.contender.backing
            && other.contender.vmm != row.contender.vmm
    })
}

/// Ferry's median over its rival's.
pub(super) fn ratio(
    rows: &[MigrationRow],
    row: &MigrationRow,
    figure: fn(&MigrationRow) -> Option<Summary>,
) -> Option<f64> {
    let own = figure(row)?.median;
    let other = figure(rival(rows, row)?)?.median;
    (row.contender.vmm == Vmm::Ferry && other > 0.0).then(|| own / other)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_full_plan_has_every_combination_once() {
        let plan = Plan::new(false, 3, 1024);
        assert_eq!((plan.cases.len(), plan.contenders.len()), (12, 6));
        let quick = Plan::new(true, 1, 1024);
        assert_eq!(quick.cases.len(), 3);
    }

    #[test]
    fn cpu_time_is_without_the_guests() {
        let middle = "0 ".repeat(25);
        let stat = format!("7 (a) b) S 4 5 6 7 8 9 10 11 12 13 500 70 16 17 {middle}400 44");
        assert_eq!(own_ticks(&stat), Some(170));
        assert_eq!(own_ticks("7 (a) S 1"), None);
        assert!(cpu_ms(&[std::process::id()]).unwrap() >= 0.0);
    }

    #[test]
    fn a_row_is_compared_with_its_rival_only() -> Result<()> {
        let plan = Plan::new(true, 1, 64);
        let said = |total_ms| Said {
            total_ms,
            downtime_ms: 1.0,
            rounds: 1,
            bytes: 3 << 20,
        };
        let case = *plan.cases.first().context("no case")?;
        let mut rows: Vec<_> = plan
            .contenders
            .iter()
            .map(|&contender| MigrationRow::new(contender, case))
            .collect();
        for (row, total) in rows.iter_mut().zip([10.0, 40.0, 7.0]) {
            row.samples.push(sample(said(total), 1500));
            row.summarise();
        }
        let figure = |row: &MigrationRow| row.total_ms;
        assert_eq!(ratio(&rows, &rows[0], figure), Some(0.25));
        assert_eq!(ratio(&rows, &rows[1], figure), None);
        assert_eq!(ratio(&rows, &rows[2], figure), None);
        assert_eq!(rows[0].sent_mib.map(|sent| sent.median), Some(3.0));
        Ok(())
    }
}
