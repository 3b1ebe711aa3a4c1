//! Devices that take their time, and the order in which devices are told things.

use std::time::Duration;

use super::fakes::*;
use super::rig::*;
use crate::migrate::*;

const SLOW: Duration = Duration::from_millis(200);

fn moved(failures: &Failures, params: &MigrationParams) -> (Host, Outcome) {
    let mut leaving = leaving(failures);
    let mut host = Host::new(failures);
    let outcome = migrate(&mut leaving, &mut host, params, pair());
    check(&mut leaving, &host, &outcome);
    (host, outcome)
}

/// Each step is taken by all before the next by any.
fn in_step(events: &Events, steps: &[&str]) {
    let events = events.lock();
    let of_steps = events.iter().filter(|event| steps.contains(&event.1));
    let taken: Vec<&str> = of_steps.map(|event| event.1).collect();
    let expected: Vec<&str> = steps.iter().flat_map(|step| [*step; 3]).collect();
    assert_eq!(taken, expected);
}

#[test]
fn all_devices_rest_before_any_stops_and_wake_before_any_runs() {
    let failures = Failures::default();
    let (_, outcome) = moved(&failures, &MigrationParams::default());
    outcome.source.unwrap();
    in_step(&failures.source_events, &["quiesce", "stop"]);
    in_step(&failures.sink_events, &["wake", "run"]);
    // So on the way back.
    let failures = Failures {
        sink: Failure(Some("finish_load")),
        ..Failures::default()
    };
    let (_, outcome) = moved(&failures, &MigrationParams::default());
    outcome.source.unwrap_err();
    in_step(
        &failures.source_events,
        &["quiesce", "stop", "wake", "abort"],
    );
    let events = failures.source_events.lock();
    let order = |step| {
        let of_step = events.iter().filter(move |event| event.1 == step);
        of_step.map(|event| event.0.clone()).collect::<Vec<_>>()
    };
    assert_eq!(order("stop"), ["vcpu", "nic", "disk"]);
    assert_eq!(order("abort"), ["disk", "nic", "vcpu"]);
}

#[test]
fn memory_does_not_wait_for_a_slow_device() {
    let failures = Failures {
        pace: Pace {
            each: SLOW,
            first: SLOW * 4,
        },
        ..Failures::default()
    };
    let mut leaving = leaving(&failures);
    let mut host = Host::new(&failures);
    let thread = leaving.writer.run(&leaving.memory);
    // At its pace the rest takes half a second.
    let params = MigrationParams {
        downtime_ms: 1000,
        ..MigrationParams::default()
    };
    let outcome = migrate(&mut leaving, &mut host, &params, pair());
    drop(thread);
    check(&mut leaving, &host, &outcome);
    let report = outcome.source.unwrap();
    // Its 2 MiB of initial data come in four reads, the first of 1 s: rounds go on beside it.
    assert!(report.rounds > 8, "{}", report.rounds);
    let rounds = outcome.events.iter().filter_map(|event| match event {
        MigrationEvent::Round(round) => Some(round.took_us),
        _ => None,
    });
    // The destination, which is as slow, holds up one round at most: each waits for what came
    // in it to be taken in.
    let longest = rounds.clone().filter(|took| *took > 150_000).count();
    assert!(longest <= 6, "{:?}", rounds.collect::<Vec<_>>());
}

#[test]
fn the_guest_does_not_stop_before_the_initial_data_has_been_taken_in() {
    let failures = Failures {
        pace: Pace {
            each: Duration::ZERO,
            first: SLOW * 3,
        },
        ..Failures::default()
    };
    let (_, outcome) = moved(&failures, &MigrationParams::default());
    let report = outcome.source.unwrap();
    // A first read and a first write of 600 ms each were before the downtime, not in it.
    assert!(report.total_ms > 1200, "{}", report.total_ms);
    assert!(report.downtime.total < 500_000, "{:?}", report.downtime);
    let nic = &report.downtime.devices[1];
    assert_eq!((nic.id.as_str(), nic.bytes), ("nic", 1 << 20));
    assert!(nic.load < 500_000, "{nic:?}");
}

#[test]
fn initial_data_that_does_not_come_in_time_is_named() {
    let failures = Failures {
        pace: Pace {
            each: Duration::ZERO,
            first: Duration::from_secs(3),
        },
        ..Failures::default()
    };
    let params = MigrationParams {
        timeout_s: 1,
        ..MigrationParams::default()
    };
    let (_, outcome) = moved(&failures, &params);
    let error = outcome.source.unwrap_err();
    assert!(
        matches!(error, MigrationError::DevicesNotReady { .. }),
        "{error}"
    );
    assert!(error.to_string().contains("1 s: nic have"), "{error}");
    // Or it moves all the same, once the device has ended its read.
    let params = MigrationParams {
        timeout_strategy: TimeoutStrategy::Ignore,
        ..params
    };
    let (_, outcome) = moved(&failures, &params);
    outcome.source.unwrap();
}

#[test]
fn the_last_data_of_devices_is_taken_in_at_once_and_loaded_in_order() {
    let failures = Failures::default();
    let (_, outcome) = moved(&failures, &MigrationParams::default());
    outcome.source.unwrap();
    let events = failures.sink_events.lock();
    let place = |id: &str, what| {
        let mut events = events.iter();
        events.position(|event| event.0 == id && event.1 == what)
    };
    // What is not streamed is loaded before what comes after it.
    assert!(place("vcpu", "loaded") < place("nic", "load"));
    assert!(place("vcpu", "loaded") < place("disk", "load"));
}

#[test]
fn a_downtime_is_broken_down_by_devices() {
    let pace = Pace {
        each: Duration::from_millis(30),
        first: Duration::ZERO,
    };
    let failures = Failures {
        pace,
        ..Failures::default()
    };
    let (_, outcome) = moved(&failures, &MigrationParams::default());
    let downtime = outcome.source.unwrap().downtime;
    let ids: Vec<&str> = downtime.devices.iter().map(|one| one.id.as_str()).collect();
    assert_eq!(ids, ["vcpu", "nic", "disk"]);
    let bytes: Vec<u64> = downtime.devices.iter().map(|one| one.bytes).collect();
    assert_eq!(bytes, [700, 1 << 20, 50_000]);
    let [_, nic, _] = &downtime.devices[..] else {
        panic!("three devices");
    };
    // Two chunks and the end to read, two chunks to take in.
    assert!(nic.read >= 90_000 && nic.load >= 60_000, "{nic:?}");
    assert!(nic.send > 0, "{nic:?}");
    assert_eq!(
        outcome.source_status.downtime,
        Some(downtime.clone()),
        "the status has it too"
    );
}

#[test]
fn a_device_that_was_reset_is_told_of() {
    let failures = Failures {
        device: Failure(Some("reset")),
        sink: Failure(Some("finish_load")),
        ..Failures::default()
    };
    let (_, outcome) = moved(&failures, &MigrationParams::default());
    let error = outcome.source.unwrap_err().chain();
    assert!(
        error.contains("nic: going on failed and the device had to be reset"),
        "{error}"
    );
    let told = outcome.events.iter().any(|event| {
        matches!(event, MigrationEvent::DeviceReset { device, why } if device == "nic" && why.contains("told to"))
    });
    assert!(told, "{:?}", outcome.events);
}
