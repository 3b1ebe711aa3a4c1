//! What pre-copy of device state, and devices that load at once, are worth.

use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use super::device::can_run;
use super::report::{median_and_most, ms, record, runs, table};
use super::rig::{Moved, Rig, Shape, number};

const MIB: u64 = 1 << 20;
/// State of a device whose downtimes are compared, unless `FERRY_MOCK_STATE_MIB` says otherwise.
const STATE_MIB: u64 = 16;
/// Most of the downtime without pre-copy that it may take with it, in percent.
const MOST_PERCENT: u128 = 30;
/// What each of several devices gives or takes in a second, far below what the lab's CPU can do.
const RATE: u64 = MIB;
/// Devices that load at once.
const TOGETHER: usize = 4;
/// State of each of them: some seconds' worth.
const TOGETHER_BYTES: u64 = 4 * MIB;

/// The parts of a downtime, in the order in which they come.
const PARTS: [&str; 9] = [
    "pause_vcpus",
    "quiesce",
    "stop",
    "final_sync",
    "memory",
    "device_state",
    "destination_load",
    "commit",
    "total",
];

/// Migrations of a guest of that shape, each device with so much state; no page may be lost.
fn migrations(shape: Shape, state_bytes: u64, rate: u64, count: usize) -> Result<Vec<Moved>> {
    let mut rig = Rig::boot(shape)?;
    for mock in rig.all() {
        mock.set("config/state_bytes", state_bytes)?;
        mock.set("config/save_rate", rate)?;
        mock.set("config/load_rate", rate)?;
    }
    let send = match shape.flags & 4 {
        // All of the state is left for when the guest stands still.
        0 => json!({"downtime_ms": 300_000}),
        _ => json!({"downtime_ms": 2000, "timeout_s": 600}),
    };
    let mut all = Vec::new();
    for _ in 0..count {
        let moved = rig.migrate(send.clone())?;
        ensure!(moved.corrupt() == 0, "wrong memory: {}", moved.arrival);
        all.push(moved);
    }
    rig.finish()?;
    Ok(all)
}

fn row(name: &str, moved: &Moved) -> Vec<String> {
    let parts = PARTS.iter().map(|part| ms(moved.downtime(part)));
    std::iter::once(name.to_owned()).chain(parts).collect()
}

fn head() -> Vec<&'static str> {
    std::iter::once("ms").chain(PARTS).collect()
}

/// The rows of the mock devices in a downtime's breakdown.
fn devices(moved: &Moved) -> Vec<&Value> {
    let all = moved.status["downtime"]["devices"].as_array();
    let is_mock = |device: &&Value| device["id"].as_str().is_some_and(|id| id.contains("mock"));
    all.into_iter().flatten().filter(is_mock).collect()
}

#[test]
fn initial_data_moves_before_the_guest_stops() -> Result<()> {
    if !can_run("initial_data_moves_before_the_guest_stops") {
        return Ok(());
    }
    let state = match std::env::var("FERRY_MOCK_STATE_MIB") {
        Ok(text) => text.parse()?,
        Err(_) => STATE_MIB,
    };
    let mut rows = Vec::new();
    let mut medians = Vec::new();
    for flags in [3, 7] {
        let shape = Shape::one(flags);
        let all = migrations(shape, state * MIB, 0, runs()?)?;
        for moved in &all {
            rows.push(row(&shape.flags_name(), moved));
            record(&json!({
                "figure": format!("{state} MiB, flags {flags}"), "status": moved.status,
            }))?;
        }
        let totals = all.iter().map(|moved| moved.downtime("total")).collect();
        medians.push(median_and_most(totals).0);
    }
    println!(
        "downtimes with {state} MiB of state:\n{}",
        table(&head(), &rows)
    );
    let [without, with] = medians[..] else {
        return Ok(());
    };
    let percent = with.as_micros() * 100 / without.as_micros().max(1);
    println!("with pre-copy: {percent} % of the downtime without");
    ensure!(percent <= MOST_PERCENT, "{percent} %");
    Ok(())
}

#[test]
fn four_devices_load_at_once() -> Result<()> {
    if !can_run("four_devices_load_at_once") {
        return Ok(());
    }
    let mut rows = Vec::new();
    let mut took = Vec::new();
    for devices_there in [1, TOGETHER] {
        let shape = Shape {
            devices: devices_there,
            ..Shape::one(3)
        };
        let mut times = Vec::new();
        for moved in migrations(shape, TOGETHER_BYTES, RATE, runs()?)? {
            rows.push(row(&format!("{devices_there} devices"), &moved));
            record(&json!({
                "figure": format!("{devices_there} devices at {RATE} bytes/s"),
                "status": moved.status,
            }))?;
            let each = devices(&moved);
            ensure!(each.len() == devices_there, "{} devices", each.len());
            for device in each {
                println!("  {device}");
            }
            times.push(moved.downtime("device_state") + moved.downtime("destination_load"));
            let loads = devices(&moved)
                .into_iter()
                .map(|device| number(device, "load"));
            let loads = Duration::from_micros(loads.sum());
            println!(
                "{devices_there} devices: their loads add up to {} ms",
                ms(loads)
            );
        }
        took.push(median_and_most(times).0);
    }
    println!(
        "{TOGETHER_BYTES} bytes each at {RATE} bytes/s:\n{}",
        table(&head(), &rows)
    );
    let [one, four] = took[..] else {
        return Ok(());
    };
    // One after the other they take as long as one of them, so many times.
    let serial = one * u32::try_from(TOGETHER)?;
    let gain = serial.as_secs_f64() / four.as_secs_f64().max(f64::EPSILON);
    println!(
        "{TOGETHER} devices: {} ms at once, {} ms one after the other: {gain:.2} times as fast",
        ms(four),
        ms(serial)
    );
    ensure!(gain >= 1.5, "only {gain:.2} times as fast");
    Ok(())
}
