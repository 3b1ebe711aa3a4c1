//! Migrations that succeed.

use std::time::Duration;

use super::rig::*;
use crate::migrate::transport::connect;
use crate::migrate::*;

fn moves_over(pair: (Connection, Connection)) -> Outcome {
    let mut leaving = leaving(&Failures::default());
    let mut host = Host::new(&Failures::default());
    let thread = leaving.writer.run(&leaving.memory);
    std::thread::sleep(Duration::from_millis(20));
    let outcome = migrate(&mut leaving, &mut host, &MigrationParams::default(), pair);
    drop(thread);
    outcome.source.as_ref().unwrap();
    check(&mut leaving, &host, &outcome);
    outcome
}

#[test]
fn moves_over_a_socket_pair() {
    let outcome = moves_over(pair());
    let report = outcome.source.unwrap();
    assert!(report.rounds >= 1);
    assert_eq!(report.device_bytes, 700 + (3 << 20) + 100_000);
    assert!(report.zero_pages > 0 && report.zero_pages < report.pages);
    assert!(report.pages >= 2048);
    assert!(report.downtime.total > 0 && report.downtime.total < 5_000_000);
    assert_eq!(report.warnings, Vec::<String>::new());
    assert_eq!(report.sources[0].id, "writer");
    assert!(report.sources[0].total_pages > 0);
    let arrived = outcome.destination.unwrap();
    assert_eq!(arrived.pages, report.pages);
    assert_eq!(arrived.zero_pages, report.zero_pages);
    assert_eq!(arrived.device_bytes, report.device_bytes);
    assert!(arrived.acknowledged);
    let mut phases = Vec::new();
    for event in &outcome.events {
        if let MigrationEvent::Phase(Side::Source(phase)) = event
            && phases.last() != Some(&phase.name())
        {
            phases.push(phase.name());
        }
    }
    assert_eq!(
        phases,
        [
            "preflight",
            "setup",
            "precopy",
            "switchover",
            "finalize",
            "done"
        ]
    );
}

#[test]
fn moves_over_unix() {
    let dir = tempfile::tempdir().unwrap();
    moves_over_transport(&Address::Unix(dir.path().join("s")));
}

#[test]
fn moves_over_tcp() {
    moves_over_transport(&"tcp:127.0.0.1:0".parse().unwrap());
}

fn moves_over_transport(address: &Address) {
    let listener = Listener::bind(address).unwrap();
    let cancel = CancelHandle::new().unwrap();
    let to = connect(listener.address(), &cancel).unwrap();
    let from = listener
        .accept(None, &CancelHandle::new().unwrap())
        .unwrap();
    moves_over((to, from));
}

#[test]
fn a_lost_write_would_be_seen() {
    let mut leaving = leaving(&Failures::default());
    leaving.writer.lose_reports();
    let mut host = Host::new(&Failures::default());
    let outcome = migrate(&mut leaving, &mut host, &MigrationParams::default(), pair());
    outcome.source.unwrap();
    // What the devices wrote in their last moments is missing.
    assert!(!super::fakes::differences(&leaving.memory, &host.memory).is_empty());
}

#[test]
fn a_destination_that_takes_its_time_is_waited_for() {
    let mut leaving = leaving(&Failures::default());
    let mut host = Host::new(&Failures::default());
    host.delay = SHORT.idle * 3;
    // The next device's state does not fit the socket: the source cannot even write meanwhile.
    host.load_delay = SHORT.idle * 3;
    let outcome = migrate(
        &mut leaving,
        &mut host,
        &MigrationParams::default(),
        impatient(pair()),
    );
    outcome.source.as_ref().unwrap();
    check(&mut leaving, &host, &outcome);
}

#[test]
fn the_bandwidth_limit_holds() {
    let mut leaving = leaving(&Failures::default());
    let mut host = Host::new(&Failures::default());
    let params = MigrationParams {
        max_bandwidth: Some(16 << 20),
        ..MigrationParams::default()
    };
    let outcome = migrate(&mut leaving, &mut host, &params, pair());
    check(&mut leaving, &host, &outcome);
    let report = outcome.source.unwrap();
    // About 5.3 MiB of pages and 2 MiB of device state go in the first round.
    assert!(
        (400..3000).contains(&report.total_ms),
        "{}",
        report.total_ms
    );
    let bandwidth = report.bandwidth.unwrap();
    assert!(bandwidth < 20 << 20, "{bandwidth}");
}

#[test]
fn the_status_is_json_with_side_and_phase() {
    let outcome = moves_over(pair());
    let json = serde_json::to_value(&outcome.source_status).unwrap();
    assert_eq!(json["side"], "source");
    assert_eq!(json["phase"]["name"], "done");
    assert!(json["downtime"]["total"].as_u64().unwrap() > 0);
    assert_eq!(json["sources"][0]["precision"], "exact");
    let json = serde_json::to_value(&outcome.destination_status).unwrap();
    assert_eq!(json["side"], "destination");
    assert_eq!(json["phase"]["name"], "running");
}
