//! The native guest with a card whose queues another process serves over vhost-user; here the
//! process of the tests plays it.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::ferry::Ferry;
use e2e::guest_output::Verify;
use e2e::host;
use e2e::migration::{Route, check_nothing_arrived};
use e2e::network::Network;
use e2e::process::wait_for;
use e2e::traffic::Traffic;
use e2e::vm::{Vm, VmSpec};
use serde_json::{Value, json};
use vhost_backend::{Backend, Faults, taps};

const LIMIT: Duration = Duration::from_secs(20);
/// Slow enough for a second or more of packets between a page's sending and the switchover.
const BYTES_PER_SECOND: u64 = 60 << 20;

/// A backend on one end's tap.
fn backend(dir: &Path, net: Network, end: usize, faults: Faults) -> Result<Backend> {
    let socket = dir.join(format!("vhost{end}"));
    Ok(Backend::start(&socket, taps(&net.tap(end), 1)?, faults)?)
}

/// The card as `vm.create` takes it.
fn device(net: Network, backend: &Backend) -> Value {
    json!({
        "id": net.id(),
        "vhost_user": true,
        "vhost_socket": backend.socket(),
        "mac": net.mac(),
    })
}

/// Its counterpart for `vm.receive-migration`.
fn received(net: Network, backend: &Backend) -> Value {
    json!({"net": [{"id": net.id(), "vhost_socket": backend.socket()}]})
}

/// A guest under packets, by a card on a backend.
struct Scene {
    here: Backend,
    vm: Vm,
    stream: Traffic,
}

impl Scene {
    /// A guest of `mib` that was told `words`, with its card on the first end of `net` and so many
    /// packets a second, the first `echoes` of which it has answered.
    fn start(
        dir: &Path,
        net: Network,
        faults: Faults,
        (mib, words): (u64, &str),
        (rate, echoes): (u32, u64),
    ) -> Result<Self> {
        let here = backend(dir, net, 0, faults)?;
        let mut spec = VmSpec::new(mib, words);
        spec.nets = vec![device(net, &here)];
        let vm = Vm::boot(dir, "source", &spec)?;
        let stream = net.traffic(rate)?;
        wait_echoes(&vm, &stream, echoes)?;
        Ok(Self { here, vm, stream })
    }
}

/// A guest that is moved slowly, or not at all.
const SLOW: (u64, &str) = (160, "mem=64 rate=20 irq=1 retain=4096");
/// A guest that stays.
const SMALL: (u64, &str) = (96, "mem=32 rate=20 irq=1");

fn wait_echoes(vm: &Vm, stream: &Traffic, count: u64) -> Result<()> {
    let enough = stream.counts().received + count;
    wait_for("echoes", LIMIT, || {
        Ok((stream.counts().received > enough).then_some(()))
    })
    .with_context(|| format!("{stream:?}\n{}", vm.ferry.last_words()))
}

/// To and fro between two backends while packets come and memory is dirtied.
#[test]
fn a_vhost_user_card_moves_under_packets() -> Result<()> {
    let Some(_turn) = host::network_turn("a_vhost_user_card_moves_under_packets")? else {
        return Ok(());
    };
    let dir = tempfile::tempdir()?;
    let net = Network::new(0)?;
    let busy = (256, "mem=96 rate=100 irq=1 retain=2048");
    let scene = Scene::start(dir.path(), net, Faults::default(), busy, (1000, 300))?;
    let Scene {
        mut here,
        mut vm,
        stream,
    } = scene;
    for number in 1..=4 {
        wait_echoes(&vm, &stream, 300)?;
        let there = backend(dir.path(), net, number, Faults::default())?;
        let destination = Ferry::start(dir.path(), &format!("host{number}"), &[])?;
        let route = Route::unix(dir.path()).receiving(received(net, &there));
        let (left, moved) = vm.migrate(destination, &route)?;
        left.shut_down()?;
        // Its tap is without a card from here on, so that the bridge forgets where the guest was.
        here = there;
        println!("{}", moved.line());
        wait_echoes(&vm, &stream, 1000)?;
        let found = vm.verify_clean()?;
        ensure!(found.rx_pages > 1000, "{found:?}");
    }
    let counts = stream.stop()?;
    println!("{counts:?}");
    ensure!(counts.bad == 0, "{counts:?}");
    let (left, _) = vm.power_off()?;
    left.shut_down()?;
    drop(here);
    Ok(())
}

/// A migration that is cancelled half-way ends the logging and nothing else; the next one loses
/// nothing.
#[test]
fn a_cancelled_migration_ends_a_vhost_user_log() -> Result<()> {
    let Some(_turn) = host::network_turn("a_cancelled_migration_ends_a_vhost_user_log")? else {
        return Ok(());
    };
    let dir = tempfile::tempdir()?;
    let net = Network::new(0)?;
    let there = backend(dir.path(), net, 1, Faults::default())?;
    let scene = Scene::start(dir.path(), net, Faults::default(), SLOW, (800, 500))?;
    let Scene {
        here,
        mut vm,
        stream,
    } = scene;
    let mut destination = Ferry::start(dir.path(), "destination", &[])?;
    let route = Route::unix(dir.path()).receiving(received(net, &there));
    let slowly = route.clone().sending(json!({"max_bandwidth": 20 << 20}));
    for _ in 0..2 {
        ensure!(!here.is_logging(), "it logs before the migration");
        slowly.open(&destination)?;
        slowly.go(&vm.ferry)?;
        wait_for("logging", LIMIT, || Ok(here.is_logging().then_some(())))?;
        wait_echoes(&vm, &stream, 500)?;
        vm.ferry.api.put("vm.cancel-migration", None)?;
        let why = vm.stays(LIMIT)?;
        ensure!(why.contains("cancel"), "{why}");
        ensure!(!here.is_logging(), "it logs after the migration");
        check_nothing_arrived(&mut destination)?;
        wait_echoes(&vm, &stream, 500)?;
    }
    let (left, moved) = vm.migrate(destination, &route)?;
    println!("{}", moved.line());
    left.shut_down()?;
    drop(here);
    wait_echoes(&vm, &stream, 500)?;
    ensure!(!there.is_logging(), "it logs at the destination");
    vm.verify_clean()?;
    let counts = stream.stop()?;
    ensure!(counts.bad == 0, "{counts:?}");
    Ok(())
}

/// Migrates slowly from a backend with `faults`; gives the audit at the destination.
fn migrate_slowly(net: Network, faults: Faults) -> Result<Verify> {
    let dir = tempfile::tempdir()?;
    let there = backend(dir.path(), net, 1, Faults::default())?;
    let scene = Scene::start(dir.path(), net, faults, SLOW, (800, 500))?;
    let Scene {
        here: _here,
        mut vm,
        stream,
    } = scene;
    let destination = Ferry::start(dir.path(), "destination", &[])?;
    let route = Route::unix(dir.path())
        .sending(json!({"max_bandwidth": BYTES_PER_SECOND, "downtime_ms": 100}))
        .receiving(received(net, &there));
    vm.reset_gap()?;
    route.open(&destination)?;
    route.go(&vm.ferry)?;
    let status = vm.ferry.wait_migration(Duration::from_secs(60))?;
    ensure!(status["aborted"].is_null(), "{status}");
    destination.wait_migration(Duration::from_secs(10))?;
    vm.follow(destination)?;
    let found = vm.verify()?;
    println!("{faults:?}: {found:?}, {:?}", stream.stop()?);
    Ok(found)
}

/// What made the difference is the log: a backend that keeps it loses nothing.
#[test]
fn a_vhost_user_log_that_forgets_is_noticed() -> Result<()> {
    let Some(_turn) = host::network_turn("a_vhost_user_log_that_forgets_is_noticed")? else {
        return Ok(());
    };
    let forgetful = Faults {
        forgets_buffers: true,
        ..Faults::default()
    };
    let found = migrate_slowly(Network::new(0)?, forgetful)?;
    ensure!(found.rx_pages_corrupt > 0, "nobody noticed: {found:?}");
    let found = migrate_slowly(Network::new(1)?, Faults::default())?;
    ensure!(found.rx_pages > 500, "{found:?}");
    ensure!(
        found.corrupt == 0 && found.rx_pages_corrupt == 0,
        "{found:?}"
    );
    Ok(())
}

/// What cannot move, or arrive, is refused and named, and the card works on.
#[test]
fn a_vhost_user_card_that_cannot_move_is_named() -> Result<()> {
    let Some(_turn) = host::network_turn("a_vhost_user_card_that_cannot_move_is_named")? else {
        return Ok(());
    };
    let cannot_log = Faults {
        cannot_log: true,
        ..Faults::default()
    };
    for (number, faults, words) in [
        (0, cannot_log, &["net0", "VHOST_F_LOG_ALL"][..]),
        (1, Faults::default(), &["net1", "is it running?"]),
    ] {
        let dir = tempfile::tempdir()?;
        let net = Network::new(number)?;
        let scene = Scene::start(dir.path(), net, faults, SMALL, (500, 300))?;
        let Scene {
            here: _here,
            mut vm,
            stream,
        } = scene;
        let mut destination = Ferry::start(dir.path(), "destination", &[])?;
        let nobody = json!({"net": [{"id": net.id(), "vhost_socket": dir.path().join("nobody")}]});
        let route = Route::unix(dir.path()).receiving(nobody);
        let why = if faults.cannot_log {
            // Before it even connects.
            route.open(&destination)?;
            let error = route.go(&vm.ferry).err().context("it went")?;
            format!("{error:#}")
        } else {
            let why = vm.migrate_in_vain(&destination, &route, LIMIT)?;
            check_nothing_arrived(&mut destination)?;
            why
        };
        for word in words {
            ensure!(why.contains(word), "no {word:?} in: {why}");
        }
        wait_echoes(&vm, &stream, 300)?;
        vm.verify_clean()?;
    }
    Ok(())
}

/// A backend that hangs, before the migration or in the middle of it, fails it within the backend's
/// limit, is named, and costs the guest its card and no more.
#[test]
fn a_vhost_user_backend_that_hangs_fails_the_migration_alone() -> Result<()> {
    let test = "a_vhost_user_backend_that_hangs_fails_the_migration_alone";
    let Some(_turn) = host::network_turn(test)? else {
        return Ok(());
    };
    for (number, hangs_at_once) in [(0, true), (1, false)] {
        let dir = tempfile::tempdir()?;
        let net = Network::new(number)?;
        let there = backend(dir.path(), net, 1, Faults::default())?;
        let scene = Scene::start(dir.path(), net, Faults::default(), SLOW, (800, 300))?;
        let Scene {
            here,
            mut vm,
            stream: _stream,
        } = scene;
        let mut destination = Ferry::start(dir.path(), "destination", &[])?;
        let route = Route::unix(dir.path())
            .sending(json!({"max_bandwidth": BYTES_PER_SECOND}))
            .receiving(received(net, &there));
        vm.pull()?;
        route.open(&destination)?;
        if hangs_at_once {
            here.hang();
        }
        route.go(&vm.ferry)?;
        if !hangs_at_once {
            wait_for("logging", LIMIT, || Ok(here.is_logging().then_some(())))?;
            here.hang();
        }
        let why = vm.stays(LIMIT)?;
        let request = if hangs_at_once {
            "SET_LOG_BASE"
        } else {
            "GET_VRING_BASE"
        };
        let told = format!("{request} within 5s");
        ensure!(why.contains(&told), "no {told:?} in: {why}");
        let event = vm.ferry.wait_event("device-lost", LIMIT)?;
        ensure!(event.to_string().contains(&net.id()), "{event}");
        println!("{why}; {:?}", vm.wait_ticks(2)?.max_gap_us);
        check_nothing_arrived(&mut destination)?;
    }
    Ok(())
}

/// A backend that goes is named, and the guest goes on without it.
#[test]
fn a_vhost_user_backend_that_dies_is_named_and_the_guest_goes_on() -> Result<()> {
    let test = "a_vhost_user_backend_that_dies_is_named_and_the_guest_goes_on";
    let Some(_turn) = host::network_turn(test)? else {
        return Ok(());
    };
    let dir = tempfile::tempdir()?;
    let net = Network::new(0)?;
    let scene = Scene::start(dir.path(), net, Faults::default(), SMALL, (500, 300))?;
    let Scene {
        here,
        mut vm,
        stream: _stream,
    } = scene;
    drop(here);
    let event = vm.ferry.wait_event("device-lost", LIMIT)?;
    ensure!(event.to_string().contains(&net.id()), "{event}");
    let tick = vm.wait_ticks(3)?;
    println!("{event}, {tick:?}");
    // It is paused and resumed as any other, but cannot be moved.
    vm.ferry.api.put("vm.pause", None)?;
    vm.ferry.api.put("vm.resume", None)?;
    vm.wait_ticks(3)?;
    let destination = Ferry::start(dir.path(), "destination", &[])?;
    let route = Route::unix(dir.path());
    route.open(&destination)?;
    let error = route.go(&vm.ferry).err().context("it went")?;
    ensure!(
        format!("{error:#}").contains("closed the connection"),
        "{error:#}"
    );
    vm.wait_ticks(3)?;
    Ok(())
}
