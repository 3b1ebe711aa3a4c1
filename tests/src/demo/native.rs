//! The demo with the native guest.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::json;
use vm_migration::migrate::MigrationStatus;

use super::link::{End, Link, LinkMover};
use super::report::{
    GuestOutcome, HashOutcome, MigrationOutcome, NicOutcome, Outcome, ms, traffic_problem,
};
use super::{Options, Progress};
use crate::ferry::Nic;
use crate::guest;
use crate::guest_output::{GuestLog, Line, Tick, Verify};
use crate::traffic::{Traffic, TrafficCounts};
use crate::vmm_process::FerryConsole;

/// How long the guest may take to write all of its memory for the first time, which may be cold.
const BOOT_LIMIT: Duration = Duration::from_secs(120);
const MIGRATION_LIMIT: Duration = Duration::from_secs(120);
const AUDIT_LIMIT: Duration = Duration::from_secs(60);
const TICK_LIMIT: Duration = Duration::from_secs(30);
/// How often the source is asked how it is doing.
const POLL: Duration = Duration::from_millis(50);
/// What the NICs are called in report and configuration: the VMM's own, and the passthrough one.
pub(super) const NICS: [&str; 2] = ["net0", "nic0"];

/// Everything that runs.
struct Stage {
    source: FerryConsole,
    destination: FerryConsole,
    // Held so that they live as long.
    _cards: [Nic; 2],
    links: [Link; 2],
    log: GuestLog,
}

/// Runs the demo. The caller is in a network namespace of its own; files go to `dir`.
///
/// # Errors
/// When something does not work at all. What works and is wrong is in the outcome.
pub fn run(dir: &Path, options: &Options, progress: &mut Progress) -> Result<Outcome> {
    let mut stage = Stage::start(dir, options, progress)?;
    progress.step("sending packets through both NICs");
    let streams = [
        stage.links[0].start_traffic(options.packets_per_second)?,
        stage.links[1].start_traffic(options.packets_per_second)?,
    ];
    stage.settle(options.seconds)?;
    stage.check_flowing(&streams)?;

    progress.step("migrating the guest to the second process");
    let status = stage.migrate(dir, options, progress)?;
    progress.step("guest runs at the destination; letting it work");
    let destination = &mut stage.destination.console;
    let resumed = destination.next_tick(&mut stage.log, TICK_LIMIT)?;
    for _ in 0..ticks(options.seconds) {
        destination.next_tick(&mut stage.log, TICK_LIMIT)?;
    }
    let moved = stage.log.ticks().next_back().cloned().unwrap_or(resumed);
    progress.step("checking every page at the destination");
    let verify = destination.verify(&mut stage.log, AUDIT_LIMIT)?;
    let [emulated, passthrough] = streams;
    let counts = [emulated.stop()?, passthrough.stop()?];
    let last = destination.next_tick(&mut stage.log, TICK_LIMIT)?;
    let backend = hash_backend(&stage.destination)?;
    let findings = Findings {
        moved,
        last,
        verify,
        counts,
        backend,
    };
    Ok(findings.outcome(options, MigrationOutcome::new(&status), &stage.log))
}

/// Reports of the guest in so many seconds.
fn ticks(seconds: u64) -> u64 {
    seconds.max(1) * 1000 / TICK_MS
}

/// Milliseconds between the guest's reports.
const TICK_MS: u64 = 200;

impl Stage {
    fn start(dir: &Path, options: &Options, progress: &Progress) -> Result<Self> {
        progress.step("building the native guest");
        let elf = guest::elf()?;
        progress.step("starting two ferry and two ferry-nic processes");
        let links = [Link::new(0)?, Link::new(1)?];
        let cards = start_cards(dir, links[1])?;
        let mut arguments = vec![
            "--kernel".to_owned(),
            elf.display().to_string(),
            "--cmdline".to_owned(),
            command_line(options, links),
        ];
        arguments.extend(machine_arguments(options.memory_mib, dir, links));
        let destination = FerryConsole::start(dir, "destination", &[])?;
        let mut source = FerryConsole::start(dir, "source", &arguments)?;
        progress.step("booting the guest; it writes all of its memory once");
        let mut log = GuestLog::default();
        source
            .console
            .read_until(&mut log, "a ready guest", BOOT_LIMIT, |log| {
                log.is_ready().then_some(())
            })?;
        let stage = Self {
            source,
            destination,
            _cards: cards,
            links,
            log,
        };
        stage.check_cards()?;
        Ok(stage)
    }

    /// The guest drives both NICs, the first with hash reports.
    fn check_cards(&self) -> Result<()> {
        let nics: Vec<_> = self
            .log
            .lines()
            .iter()
            .filter_map(|line| match line {
                Line::Nic(nic) => Some(nic),
                _ => None,
            })
            .collect();
        ensure!(
            nics.len() == 2 && nics[0].hash_types != 0,
            "the guest should have two NICs, the first with hash reports: {nics:?}; {}",
            self.source.console.words()
        );
        Ok(())
    }

    fn settle(&mut self, seconds: u64) -> Result<()> {
        for _ in 0..ticks(seconds) {
            self.source.console.next_tick(&mut self.log, TICK_LIMIT)?;
        }
        Ok(())
    }

    fn check_flowing(&self, streams: &[Traffic; 2]) -> Result<()> {
        for (name, stream) in NICS.iter().zip(streams) {
            ensure!(
                stream.counts().received > 0,
                "no packets come back through {name}: {}",
                self.source.console.words()
            );
        }
        Ok(())
    }

    fn migrate(
        &mut self,
        dir: &Path,
        options: &Options,
        progress: &mut Progress,
    ) -> Result<MigrationStatus> {
        let url = options.transport.url(dir);
        let receive = receive_body(&url, dir, self.links);
        self.destination
            .api
            .put("vm.receive-migration", Some(&receive))?;
        let mover = LinkMover::start(self.links.to_vec(), dir.join("destination.events"))?;
        // The longest gap shall be the migration's, not the boot's.
        self.source.console.say(b"r")?;
        self.source.console.next_tick(&mut self.log, TICK_LIMIT)?;
        self.source.send(&url, options.downtime_ms)?;
        let result = self
            .source
            .follow(&mut self.destination, (POLL, MIGRATION_LIMIT), |status| {
                progress.migration(status)
            });
        progress.migration_over();
        let status = result?;
        mover.finish()?;
        // The destination's output goes on where the source's ended.
        let rest = self.source.console.take();
        self.log.feed(&rest)?;
        Ok(status)
    }
}

/// One ferry-nic for each end.
pub(super) fn start_cards(dir: &Path, link: Link) -> Result<[Nic; 2]> {
    let start = |end, name| Nic::start(dir, name, &link.tap(end), &["--mac", &link.mac()]);
    Ok([
        start(End::Source, "source-nic")?,
        start(End::Destination, "destination-nic")?,
    ])
}

/// The source's options for memory, CPUs, console and NICs.
pub(super) fn machine_arguments(memory_mib: u64, dir: &Path, links: [Link; 2]) -> Vec<String> {
    let [emulated, passthrough] = NICS;
    let [first, _] = links;
    [
        "--cpus",
        "boot=1",
        "--memory",
        &format!("size={memory_mib}M,shared=on"),
        "--serial",
        "tty",
        "--console",
        "off",
        "--net",
        &format!(
            "id={emulated},tap={},mac={},hash_report=on",
            first.tap(End::Source),
            first.mac()
        ),
        "--user-device",
        &format!(
            "id={passthrough},socket={}",
            dir.join("source-nic.nic").display()
        ),
    ]
    .map(str::to_owned)
    .to_vec()
}

/// What the destination calls differently.
pub(super) fn receive_body(url: &str, dir: &Path, links: [Link; 2]) -> serde_json::Value {
    let [emulated, passthrough] = NICS;
    json!({
        "receiver_url": url,
        "net": [{"id": emulated, "tap": links[0].tap(End::Destination)}],
        "user_devices": [{"id": passthrough, "socket": dir.join("destination-nic.nic")}],
    })
}

fn command_line(options: &Options, links: [Link; 2]) -> String {
    format!(
        "mode=dirty rate={} tick={TICK_MS} hash=1 ip0={} ip1={}",
        options.rate,
        links[0].guest4(),
        links[1].guest4()
    )
}

/// Who computes the hashes of the first NIC, as `vm.info` has it.
pub(super) fn hash_backend(ferry: &FerryConsole) -> Result<String> {
    let info = ferry.api.get("vm.info")?;
    info["devices"][NICS[0]]["hash_backend"]
        .as_str()
        .map(str::to_owned)
        .with_context(|| format!("vm.info does not say who computes hashes: {info}"))
}

/// What was seen.
struct Findings {
    /// The guest's last report before the audit, which takes CPU time from it.
    moved: Tick,
    last: Tick,
    verify: Verify,
    counts: [TrafficCounts; 2],
    backend: String,
}

impl Findings {
    fn outcome(self, options: &Options, migration: MigrationOutcome, log: &GuestLog) -> Outcome {
        let Self {
            moved,
            last,
            verify,
            counts,
            backend,
        } = self;
        let hashed = last.nics.first().copied().unwrap_or_default();
        let sum = |of: fn(&TrafficCounts) -> u64| counts.iter().map(of).sum();
        let mut problems = log.complaints();
        problems.extend(NICS.iter().zip(&counts).filter_map(|(name, counts)| {
            traffic_problem(name, options.packets_per_second, counts)
        }));
        Outcome {
            guest: GuestOutcome {
                kind: "native".to_owned(),
                memory_mib: options.memory_mib,
                pages_verified: verify.pages + verify.rx_pages,
                pages_corrupt: verify.corrupt + verify.rx_pages_corrupt,
                max_gap_ms: ms(moved.max_gap_us),
            },
            migration,
            hash: HashOutcome {
                packets: hashed.hash_packets,
                matched: hashed.hash_matched,
                mismatched: hashed.hash_mismatched,
                backend,
            },
            nic: NicOutcome {
                sent: sum(|counts| counts.sent),
                received: sum(|counts| counts.received),
                lost: sum(TrafficCounts::lost),
            },
            lab: None,
            problems,
            notes: NICS
                .iter()
                .zip(&counts)
                .map(|(name, counts)| traffic_note(name, counts))
                .collect(),
        }
    }
}

fn traffic_note(name: &str, counts: &TrafficCounts) -> String {
    format!(
        "{name}: {} of {} packets echoed, longest silence {} ms",
        counts.received,
        counts.sent,
        counts.max_gap.as_millis()
    )
}
