//! A device that fails, at either side, at each step of its migration: the guest runs on at the
//! source with its memory as it was, or is at the destination with its memory as it was, or the
//! operator is told plainly. Nobody waits for ever, and the next migration works.

mod rows;

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use e2e::ferry::phase_name;
use e2e::process::wait_for;
use serde_json::{Value, json};

use super::device::can_run;
use super::report::{is_wanted, ms, record, table};
use super::rig::{End, Rig, Shape, wrong};
use rows::{Ends, Row, Side, When, rows};

/// The longest that a migration with a fault may take: 10 s for a device that is not ready, and what
/// the slow host takes.
const LIMIT: Duration = Duration::from_secs(120);

/// How a migration with a fault ended.
struct Outcome {
    ends: Ends,
    why: String,
    took: Duration,
}

/// Sets a device's files.
fn set(rig: &Rig, side: Side, files: &[(&str, &str)]) -> Result<()> {
    let mocks = match side {
        Side::Source => rig.here(),
        Side::Destination => rig.there(),
    };
    for mock in mocks {
        for (file, value) in files {
            mock.set(file, value)?;
        }
    }
    Ok(())
}

/// Waits until the source is in pre-copy, or over it.
fn wait_precopy(rig: &Rig) -> Result<()> {
    wait_for("pre-copy", LIMIT, || {
        let status = rig.linux.ferry.migration()?;
        let before = matches!(phase_name(&status), "preflight" | "setup" | "");
        Ok((!before).then_some(()))
    })
}

/// Events of this name at the source.
fn count_events(rig: &Rig, name: &str) -> usize {
    let names = rig.linux.ferry.event_names();
    names.iter().filter(|event| *event == name).count()
}

/// A migration with the fault.
fn provoke(rig: &mut Rig, row: &Row) -> Result<Outcome> {
    // Asks for the dirty source, which tries a log once: that report is not one of the migration's.
    rig.linux.ferry.api.get("vm.info")?;
    let resets = count_events(rig, "migration-device-reset");
    let other = match row.side {
        Side::Source => Side::Destination,
        Side::Destination => Side::Source,
    };
    set(rig, other, row.beside)?;
    if row.when == When::Before {
        set(rig, row.side, row.files)?;
    }
    let began = Instant::now();
    let started = rig.start(row.parameters())?;
    if started.is_ok() && row.when == When::InPrecopy {
        wait_precopy(rig)?;
        set(rig, row.side, row.files)?;
    }
    let end = match started {
        Ok(()) => rig.end_of_migration(LIMIT)?,
        Err(why) => End::Failed(why),
    };
    let took = began.elapsed();
    let (ends, why) = match end {
        End::Moved(moved) => {
            ensure!(moved.corrupt() == 0, "wrong memory: {}", moved.arrival);
            (Ends::Moves, String::new())
        }
        End::Failed(why) if why.contains("refuses the migration") => (Ends::Refused, why),
        End::Failed(why) if rig.linux.ferry.state()? == "Paused" => (Ends::Stranded, why),
        End::Failed(why) if why.contains("resetting it") => (Ends::Lost, why),
        End::Failed(why) => {
            let now = count_events(rig, "migration-device-reset");
            match now > resets {
                true => (Ends::StaysAfterReset, why),
                false => (Ends::Stays, why),
            }
        }
    };
    Ok(Outcome { ends, why, took })
}

/// The guest goes on as its outcome has it.
fn goes_on(rig: &mut Rig, ends: Ends) -> Result<()> {
    match ends {
        Ends::Moves | Ends::Refused | Ends::Stays => {}
        Ends::Stranded => {
            rig.linux.ferry.api.put("vm.resume", None)?;
        }
        Ends::StaysAfterReset => {
            // The guest's driver notices, and sets the device up anew.
            ensure!(!rig.rest()?, "a device that was reset went on as before");
            rig.drive()?;
        }
        Ends::Lost => return Ok(()),
    }
    let line = rig.goes_on()?;
    ensure!(wrong(&line) == 0, "wrong memory at the source: {line}");
    ensure!(rig.linux.ferry.state()? == "Running", "it does not run");
    Ok(())
}

/// One fault from its beginning to the migration after it; what goes into the table.
fn run_row(rig: &mut Rig, row: &Row) -> Result<Vec<String>> {
    rig.restore()?;
    let outcome = provoke(rig, row).context("with the fault")?;
    rig.restore()?;
    println!("{}: {:?} {}", row.name(), outcome.ends, outcome.why);
    ensure!(
        row.ends == outcome.ends && outcome.why.contains(row.why),
        "it should have ended {:?} with {:?}",
        row.ends,
        row.why
    );
    if let Some(event) = row.event {
        let told = rig.linux.ferry.event_names();
        let told = [told, rig.spare_events()].concat();
        ensure!(
            told.iter().any(|name| name == event),
            "no {event}: {told:?}"
        );
    }
    goes_on(rig, outcome.ends).context("after the fault")?;
    let second = match outcome.ends {
        Ends::Lost => "-".to_owned(),
        _ => {
            let moved = rig.migrate(json!({"downtime_ms": 5000}));
            let moved = moved.context("the migration after the fault")?;
            ensure!(moved.corrupt() == 0, "then wrong memory: {}", moved.arrival);
            "well".to_owned()
        }
    };
    let result = json!({
        "fault": row.name(), "ends": format!("{:?}", outcome.ends), "why": outcome.why,
        "ms": u64::try_from(outcome.took.as_millis())?, "second": second,
    });
    record(&result)?;
    Ok(vec![
        format!("{:?}", row.side),
        row.fault.to_owned(),
        row.phase.to_owned(),
        Shape::one(row.flags).flags_name(),
        row.ends.in_words().to_owned(),
        ms(outcome.took),
        second,
    ])
}

/// Runs these rows with as few guests as will do: after a row that failed, another.
fn run_rows(rows: &[Row], done: &mut Vec<Vec<String>>, failures: &mut Vec<String>) {
    let mut rig: Option<Rig> = None;
    for row in rows {
        let fresh = rig.take().filter(|rig| rig.shape == Shape::one(row.flags));
        let ran = fresh
            .map_or_else(|| Rig::boot(Shape::one(row.flags)), Ok)
            .and_then(|mut fresh| {
                let cells = run_row(&mut fresh, row)?;
                Ok((fresh, cells))
            });
        match ran {
            Ok((used, cells)) => {
                done.push(cells);
                if row.ends != Ends::Lost {
                    rig = Some(used);
                }
            }
            Err(error) => {
                let failure = format!("{}: {error:#}", row.name());
                println!("FAILED {failure}");
                let told = record(&json!({"fault": row.name(), "failure": failure}));
                failures.push(failure);
                failures.extend(told.err().map(|error| error.to_string()));
            }
        }
    }
}

const HEAD: [&str; 7] = [
    "side",
    "fault",
    "when",
    "flags",
    "ends",
    "ms",
    "the next migration",
];

#[test]
fn every_fault_ends_as_promised() -> Result<()> {
    if !can_run("every_fault_ends_as_promised") {
        return Ok(());
    }
    let wanted = |row: &Row| is_wanted(&row.name(), row.few);
    let rows: Vec<Row> = rows().into_iter().filter(wanted).collect();
    let (mut done, mut failures) = (Vec::new(), Vec::new());
    run_rows(&rows, &mut done, &mut failures);
    println!("{}", table(&HEAD, &done));
    if !failures.is_empty() {
        bail!(
            "{} of {}:\n{}",
            failures.len(),
            rows.len(),
            failures.join("\n")
        );
    }
    Ok(())
}

#[test]
fn faults_have_names_of_their_own_and_few_are_few() {
    let mut names: Vec<String> = rows().iter().map(Row::name).collect();
    let count = names.len();
    names.sort();
    names.dedup();
    assert_eq!(names.len(), count);
    assert!((4..10).contains(&rows().iter().filter(|row| row.few).count()));
    assert!(rows().iter().all(|row| row.parameters() != Value::Null));
}
