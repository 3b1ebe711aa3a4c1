//! What devices can do, times the page of their log, times the size of their state, times how many
//! there are: no page may be lost, in any number of migrations.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::device::can_run;
use super::report::{is_wanted, median_and_most, ms, record, runs, table};
use super::rig::{Moved, Rig, Shape, number, wrong};

const MIB: u64 = 1 << 20;

/// A case: migrations that are alike.
#[derive(Clone, Copy, Debug)]
struct Case {
    shape: Shape,
    /// Bytes of a page of the devices' logs.
    log_page: u64,
    /// Bytes of each device's opaque state.
    state_bytes: u64,
}

impl Case {
    /// What it is called, by which it can be asked for.
    fn name(self) -> String {
        let Shape {
            flags,
            devices,
            dirty_log,
        } = self.shape;
        let source = match dirty_log {
            true => format!("log {} KiB", self.log_page >> 10),
            false => "container".to_owned(),
        };
        let state = self.state_bytes / MIB;
        format!("flags {flags}, {source}, state {state} MiB, devices {devices}")
    }

    /// Whether it is one of the few that run each time: a case for each flag set, each log page,
    /// each size, two devices, and both sources.
    fn is_of_few(self) -> bool {
        let Shape {
            flags,
            devices,
            dirty_log,
        } = self.shape;
        let few = [
            (1, 4096, 0, 1, true),
            (5, 65536, 256 * MIB, 1, true),
            (7, 4096, 0, 2, true),
            (7, 65536, MIB, 2, true),
            (3, 4096, MIB, 1, false),
        ];
        few.contains(&(flags, self.log_page, self.state_bytes, devices, dirty_log))
    }

    /// What the operator asks for: a downtime that takes at least one round of pre-copy.
    fn parameters(self) -> Value {
        let at_once = self.shape.flags & 4 == 0 && self.state_bytes > MIB;
        match at_once {
            // All of the state moves while the guest stands still.
            true => json!({"downtime_ms": 200_000}),
            false => json!({"downtime_ms": 1000, "timeout_s": 300, "timeout_strategy": "ignore"}),
        }
    }

    /// Migrations to and fro.
    fn run(self, rig: &mut Rig, runs: usize) -> Result<Vec<Moved>> {
        for mock in rig.all() {
            mock.set("config/log_page_min", self.log_page)?;
            mock.set("config/state_bytes", self.state_bytes)?;
        }
        (0..runs).map(|_| self.migrate(rig)).collect()
    }

    fn migrate(self, rig: &mut Rig) -> Result<Moved> {
        let moved = rig.migrate(self.parameters())?;
        let sources = moved.status["sources"].as_array();
        let of_devices = sources
            .into_iter()
            .flatten()
            .filter(|source| source["id"].as_str().is_some_and(|id| id.contains("mock")));
        let mut count = 0;
        for source in of_devices {
            ensure!(
                number(source, "granularity") == self.log_page,
                "{}: {source}",
                self.name()
            );
            count += 1;
        }
        let logs = match self.shape.dirty_log {
            true => self.shape.devices,
            false => 1,
        };
        ensure!(count == logs, "{count} sources instead of {logs}");
        Ok(moved)
    }
}

/// All cases, those of a shape together, for they share a guest.
fn cases() -> Vec<Vec<Case>> {
    let mut all = Vec::new();
    for dirty_log in [true, false] {
        // Of several devices each has to come to rest before one stops, so it must be able to.
        for (flags, devices) in [(1, 1), (3, 1), (5, 1), (7, 1), (3, 2), (7, 2)] {
            let shape = Shape {
                flags,
                devices,
                dirty_log,
            };
            let pages: &[u64] = if dirty_log { &[4096, 65536] } else { &[4096] };
            let of_page = |log_page: &u64| {
                [0, MIB, 256 * MIB].map(|state_bytes| Case {
                    shape,
                    log_page: *log_page,
                    state_bytes,
                })
            };
            all.push(pages.iter().flat_map(of_page).collect());
        }
    }
    all
}

/// What came of a case.
fn row(case: Case, moves: &[Moved]) -> Vec<String> {
    let sum = |key: &str| -> u64 { moves.iter().map(|m| number(&m.arrival, key)).sum() };
    let corrupt: u64 = moves.iter().map(Moved::corrupt).sum();
    let downtimes = moves.iter().map(|m| m.downtime("total")).collect();
    let (median, most) = median_and_most(downtimes);
    let (total, _) = median_and_most(moves.iter().map(Moved::total).collect());
    let rounds: u64 = moves.iter().map(|m| number(&m.status, "rounds")).sum();
    vec![
        case.shape.flags_name(),
        match case.shape.dirty_log {
            true => format!("{} KiB", case.log_page >> 10),
            false => "container".to_owned(),
        },
        format!("{}", case.state_bytes / MIB),
        case.shape.devices.to_string(),
        moves.len().to_string(),
        corrupt.to_string(),
        sum("checked").to_string(),
        rounds.to_string(),
        ms(median),
        ms(most),
        ms(total),
    ]
}

const HEAD: [&str; 11] = [
    "flags",
    "log page",
    "state MiB",
    "devices",
    "runs",
    "corrupt",
    "pages checked",
    "rounds",
    "downtime ms, median",
    "most",
    "migration ms, median",
];

/// Runs the wanted cases of a shape with one guest; `rows` gets what came of them.
fn run_shape(cases: &[Case], rows: &mut Vec<Vec<String>>) -> Result<()> {
    let wanted = |case: &&Case| is_wanted(&case.name(), case.is_of_few());
    let cases: Vec<&Case> = cases.iter().filter(wanted).collect();
    let Some(first) = cases.first() else {
        return Ok(());
    };
    let runs = runs()?;
    let mut rig = Rig::boot(first.shape)?;
    let info = rig.linux.ferry.api.get("vm.info")?;
    let source = &info["devices"]["mock0"]["dirty_source"];
    ensure!(
        source == first.shape.dirty_source(),
        "another dirty source: {source}"
    );
    for case in cases {
        let moves = case.run(&mut rig, runs).with_context(|| case.name())?;
        let row = row(*case, &moves);
        println!("{}: {}", case.name(), row.join(" "));
        for moved in &moves {
            record(
                &json!({"case": case.name(), "status": moved.status, "arrival": moved.arrival}),
            )?;
        }
        let breakdown = moves.last().map(|moved| &moved.status["downtime"]);
        println!("  a downtime in µs: {}", breakdown.unwrap_or(&Value::Null));
        rows.push(row);
    }
    rig.finish()
}

#[test]
fn devices_that_move_under_dma_lose_no_page() -> Result<()> {
    if !can_run("devices_that_move_under_dma_lose_no_page") {
        return Ok(());
    }
    let mut rows = Vec::new();
    let mut failures = Vec::new();
    for cases in cases() {
        if let Err(error) = run_shape(&cases, &mut rows) {
            failures.push(format!("{error:#}"));
        }
    }
    println!("{}", table(&HEAD, &rows));
    let corrupt: Vec<_> = rows.iter().filter(|row| row[5] != "0").collect();
    ensure!(corrupt.is_empty(), "corrupt pages: {corrupt:?}");
    ensure!(failures.is_empty(), "{}", failures.join("\n"));
    Ok(())
}

/// Reports that are dropped on purpose: the check above must be able to fail.
#[test]
fn a_device_that_forgets_what_it_wrote_is_found_out() -> Result<()> {
    if !can_run("a_device_that_forgets_what_it_wrote_is_found_out") {
        return Ok(());
    }
    let case = Case {
        shape: Shape::one(7),
        log_page: 4096,
        state_bytes: MIB,
    };
    let mut rig = Rig::boot(case.shape)?;
    for mock in rig.here() {
        mock.set("faults/lose_log", 1)?;
    }
    let moves = case.run(&mut rig, 1)?;
    let arrival = moves.last().map(|moved| moved.arrival.clone());
    let arrival = arrival.unwrap_or_default();
    println!("every report lost: {arrival}");
    record(&json!({"case": "lose_log", "arrival": arrival}))?;
    ensure!(
        number(&arrival, "stale") > 0 && arrival["right"] == false,
        "{arrival}"
    );
    ensure!(wrong(&arrival) == number(&arrival, "stale"), "{arrival}");
    // What it has told once is wrong for good.
    ensure!(!rig.rest()?, "the checker forgot what it found");
    rig.end()
}

#[test]
fn what_cannot_move_is_refused_and_runs_on() -> Result<()> {
    if !can_run("what_cannot_move_is_refused_and_runs_on") {
        return Ok(());
    }
    for (flags, devices, reason, few) in [
        (0, 1, "mock0: migration is not supported", true),
        (1, 2, "mock0: it is one of 2 passthrough devices", false),
        (5, 2, "mock1: it is one of 2 passthrough devices", true),
    ] {
        if !is_wanted(&format!("refused, flags {flags}"), few) {
            continue;
        }
        let mut rig = Rig::boot(Shape {
            flags,
            devices,
            dirty_log: true,
        })?;
        let arcs = |rig: &Rig| -> Result<Vec<String>> {
            let all = rig.here().into_iter();
            all.map(|mock| mock.get("stats/arcs")).collect()
        };
        let before = arcs(&rig)?;
        let why = match rig.start(json!({}))? {
            Ok(()) => String::from("it was not refused"),
            Err(why) => why,
        };
        println!("flags {flags}, {devices} devices: {why}");
        ensure!(why.contains(reason), "no {reason:?} in {why}");
        ensure!(arcs(&rig)? == before, "a device was touched");
        ensure!(rig.linux.ferry.state()? == "Running", "it does not run");
        ensure!(wrong(&rig.goes_on()?) == 0, "wrong data");
        rig.finish()?;
    }
    Ok(())
}

#[test]
fn cases_have_names_of_their_own_and_few_are_few() {
    let all: Vec<Case> = cases().into_iter().flatten().collect();
    let mut names: Vec<String> = all.iter().map(|case| case.name()).collect();
    names.sort();
    names.dedup();
    assert_eq!(names.len(), all.len());
    assert_eq!(all.len(), 36 + 18);
    assert_eq!(all.iter().filter(|case| case.is_of_few()).count(), 5);
    let (median, most) = median_and_most([3, 1, 2].map(Duration::from_secs).to_vec());
    assert_eq!((median.as_secs(), most.as_secs()), (2, 3));
}
