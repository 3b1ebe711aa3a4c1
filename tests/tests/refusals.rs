//! What cannot move is refused before anything is changed, and the refusal names what and why.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::channel_proxy::{Frame, Judge, Verdict, at};
use e2e::ferry::{Ferry, Nic};
use e2e::host;
use e2e::migration::{Route, check_nothing_arrived};
use e2e::network::Network;
use e2e::vm::{Vm, VmSpec};
use hyper::Method;
use serde_json::json;
use vm_migration::migrate::Manifest;
use vm_migration::migrate::frame::Kind;

const LIMIT: Duration = Duration::from_secs(20);

/// A migration that must be refused, with words that name what is wrong, before the source did
/// anything.
fn refused(vm: &mut Vm, destination: &mut Ferry, route: &Route, words: &[&str]) -> Result<()> {
    let phases = vm.ferry.phases().len();
    vm.pull()?;
    vm.reset_gap()?;
    let why = vm.migrate_in_vain(destination, route, LIMIT)?;
    println!("{why}");
    for word in words {
        ensure!(why.contains(word), "no {word:?} in: {why}");
    }
    // It has told of no phase between these two, in which the guest might have noticed something.
    let phases = vm.ferry.phases().split_off(phases);
    ensure!(phases == ["preflight", "aborted"], "{phases:?}");
    check_nothing_arrived(destination)
}

/// A judge that changes the manifest on its way.
fn tamper(change: impl Fn(&mut Manifest) + Send + 'static) -> Judge {
    at(Kind::Manifest, 1, move |frame| {
        let changed = postcard::from_bytes(frame.payload())
            .context("no manifest")
            .and_then(|mut manifest| {
                change(&mut manifest);
                frame.set_payload(&postcard::to_stdvec(&manifest)?)
            });
        match changed {
            Ok(()) => Verdict::Pass,
            Err(error) => {
                eprintln!("cannot tamper: {error:#}");
                Verdict::CutBefore
            }
        }
    })
}

/// A judge that makes the source speak another version.
fn another_version() -> Judge {
    at(Kind::Manifest, 1, |frame: &mut Frame| {
        if let Some(version) = frame.bytes_mut().get_mut(4..6) {
            version.copy_from_slice(&7u16.to_le_bytes());
        }
        Verdict::Pass
    })
}

/// Each misfit that a tampered conversation can bring about, with the words that must name it.
fn misfits() -> Vec<(Judge, &'static [&'static str])> {
    vec![
        (another_version(), &["protocol 7", "same release"]),
        (
            tamper(|manifest| manifest.protocol = 8),
            &["protocol", "version 8"],
        ),
        (
            tamper(|manifest| manifest.memory[0].len += 2 << 20),
            &["memory", "98 MiB at 0x0"],
        ),
        (
            tamper(|manifest| {
                let extra = manifest.memory[0];
                manifest.memory.push(vm_migration::migrate::MemoryRegion {
                    gpa: 8 << 30,
                    ..extra
                });
            }),
            &["memory", "0x200000000"],
        ),
        (
            tamper(|manifest| {
                for device in manifest.devices.iter_mut().filter(|one| one.id == "_rng") {
                    device.compat.insert("features".into(), "0x1234".into());
                }
            }),
            &["_rng", "features", "0x1234"],
        ),
        (
            tamper(|manifest| {
                for device in manifest.devices.iter_mut().filter(|one| one.id == "_rng") {
                    device.kind = "virtio-dice".into();
                }
            }),
            &["_rng", "virtio-dice"],
        ),
        (
            tamper(|manifest| manifest.devices.retain(|one| one.id != "_rng")),
            &["_rng"],
        ),
        (
            tamper(|manifest| {
                let mut extra = manifest.devices[0].clone();
                extra.id = "gpu0".into();
                manifest.devices.push(extra);
            }),
            &["gpu0", "no such device"],
        ),
        (
            tamper(|manifest| manifest.cpuid = vec![1, 2, 3]),
            &["cpuid"],
        ),
        (
            tamper(|manifest| manifest.config = b"{}".to_vec()),
            &["config", "payload"],
        ),
        (tamper(|manifest| manifest.vcpus = 3), &["vcpus"]),
        (
            tamper(|manifest| manifest.page_size = 1 << 30),
            &["page size"],
        ),
    ]
}

#[test]
fn what_does_not_fit_is_refused_and_named() -> Result<()> {
    let Some(_turn) = host::turn("what_does_not_fit_is_refused_and_named")? else {
        return Ok(());
    };
    let dir = tempfile::tempdir()?;
    let mut vm = Vm::boot(dir.path(), "source", &VmSpec::new(96, "mem=32 rate=50"))?;
    let mut destination = Ferry::start(dir.path(), "destination", &[])?;
    for (judge, words) in misfits() {
        let (route, _proxy) = Route::unix(dir.path()).through(dir.path(), judge)?;
        refused(&mut vm, &mut destination, &route, words)?;
    }
    // None of it has left a trace.
    vm.migrate(destination, &Route::unix(dir.path()))?;
    vm.verify_clean().map(drop)
}

#[test]
fn requests_that_make_no_sense_are_refused_at_once() -> Result<()> {
    let Some(_turn) = host::turn("requests_that_make_no_sense_are_refused_at_once")? else {
        return Ok(());
    };
    let dir = tempfile::tempdir()?;
    let mut vm = Vm::boot(dir.path(), "source", &VmSpec::new(64, "mem=16 rate=50"))?;
    let empty = Ferry::start(dir.path(), "empty", &[])?;
    let url = |key: &str, url: &str| json!({ key: url });
    let here = format!("unix:{}", dir.path().join("m").display());
    for (ferry, endpoint, body, status, word) in [
        (
            &vm.ferry,
            "vm.send-migration",
            url("destination_url", "http://x"),
            400,
            "destination_url",
        ),
        (
            &vm.ferry,
            "vm.send-migration",
            json!({}),
            400,
            "destination_url",
        ),
        (
            &vm.ferry,
            "vm.receive-migration",
            url("receiver_url", &here),
            409,
            "exists",
        ),
        (
            &empty,
            "vm.send-migration",
            url("destination_url", &here),
            404,
            "no VM",
        ),
        (
            &empty,
            "vm.receive-migration",
            url("receiver_url", "unix:/no/such/dir/s"),
            409,
            "/no/such/dir",
        ),
        (
            &empty,
            "vm.cancel-migration",
            json!({}),
            409,
            "no migration",
        ),
    ] {
        let answer = ferry.api.request(Method::PUT, endpoint, Some(&body))?;
        let text = answer.body.to_string();
        ensure!(
            answer.status == status && text.contains(word),
            "{endpoint} {body}: {answer:?}"
        );
    }
    // Nobody listens: told in the migration's status.
    vm.ferry
        .api
        .put("vm.send-migration", Some(&url("destination_url", &here)))?;
    let why = vm.stays(LIMIT)?;
    ensure!(why.contains("is the destination waiting"), "{why}");
    Ok(())
}

fn card(dir: &Path, name: &str, card: Network, end: usize, options: &[&str]) -> Result<Nic> {
    let mac = card.mac();
    let options = [&["--mac", &mac], options].concat();
    Nic::start(dir, name, &card.tap(end), &options)
}

const HASHING: [&str; 2] = ["--hash-report", "on"];

/// Options of a card that is not the same as one that hashes, with what must be named.
const OTHER_CARDS: [(&[&str], &[&str]); 3] = [
    (
        &["--hash-report", "off"],
        &["virtio_features", "feature bits 57 are missing"],
    ),
    (
        &["--hash-report", "on", "--queue-size", "128"],
        &["queue_sizes", "2 x 128"],
    ),
    (&["--hash-report", "on", "--mtu", "1400"], &["mtu", "1400"]),
];

#[test]
fn a_device_that_is_not_there_is_named() -> Result<()> {
    let Some(_turn) = host::network_turn("a_device_that_is_not_there_is_named")? else {
        return Ok(());
    };
    let dir = tempfile::tempdir()?;
    let (net, nic) = (Network::new(0)?, Network::new(1)?);
    let source_card = card(dir.path(), "card0", nic, 0, &HASHING)?;
    let mut spec = VmSpec::new(96, "mem=32 rate=50 hash=1 retain=512");
    spec.nets = vec![net.device(0)];
    spec.user_devices = vec![json!({"id": nic.id(), "socket": source_card.socket})];
    let mut vm = Vm::boot(dir.path(), "source", &spec)?;
    let mut destination = Ferry::start(dir.path(), "destination", &[])?;
    let route = Route::unix(dir.path());

    // Nothing listens where the card's server should be.
    let absent = dir.path().join("absent");
    let there = json!({
        "net": [net.received(1)],
        "user_devices": [{"id": nic.id(), "socket": absent}],
    });
    let absent = absent.display().to_string();
    refused(
        &mut vm,
        &mut destination,
        &route.clone().receiving(there),
        &[&nic.id(), &absent],
    )?;

    // A device that the VM does not have is named for the destination.
    let there = json!({"net": [{"id": "net7", "tap": net.tap(1)}]});
    refused(
        &mut vm,
        &mut destination,
        &route.clone().receiving(there),
        &["net7"],
    )?;

    // The tap is in use: the destination was not told of another.
    let spare = card(dir.path(), "card1", nic, 1, &HASHING)?;
    let there = json!({"user_devices": [{"id": nic.id(), "socket": spare.socket}]});
    refused(
        &mut vm,
        &mut destination,
        &route.clone().receiving(there),
        &[&net.id()],
    )?;
    drop(spare);

    // A card that is not like the one at the source.
    for (number, (options, words)) in OTHER_CARDS.into_iter().enumerate() {
        let other = card(dir.path(), &format!("other{number}"), nic, 1, options)?;
        let there = json!({
            "net": [net.received(1)],
            "user_devices": [{"id": nic.id(), "socket": other.socket}],
        });
        let id = nic.id();
        let words = [&[id.as_str(), "same options"], words].concat();
        refused(
            &mut vm,
            &mut destination,
            &route.clone().receiving(there),
            &words,
        )?;
    }

    // With everything there it moves.
    let good = card(dir.path(), "card3", nic, 1, &HASHING)?;
    let there = json!({
        "net": [net.received(1)],
        "user_devices": [{"id": nic.id(), "socket": good.socket}],
    });
    vm.migrate(destination, &route.receiving(there))?;
    vm.verify_clean().map(drop)
}
