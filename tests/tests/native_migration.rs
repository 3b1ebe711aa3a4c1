//! The native guest moves between `ferry` processes.
//!
//! `FERRY_MIGRATIONS` is how often in a row (default 4).

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::ferry::{Ferry, Nic};
use e2e::host::{self, HugePool};
use e2e::migration::{Moved, Route, median};
use e2e::network::Network;
use e2e::poller::Poller;
use e2e::vm::{Ram, Vm, VmSpec};
use serde_json::json;

/// How often in a row the guest moves.
fn migrations() -> Result<usize> {
    match std::env::var("FERRY_MIGRATIONS") {
        Ok(text) => text.parse().context("FERRY_MIGRATIONS is no number"),
        Err(_) => Ok(4),
    }
}

/// Prints what migrations cost, and their medians.
fn report(what: &str, moves: &[Moved]) {
    for moved in moves {
        println!("{what}: {}", moved.line());
    }
    let median = |of: fn(&Moved) -> Duration| median(moves.iter().map(of).collect());
    println!(
        "{what}: medians of {}: total {:.0?}, downtime {:.1?}, guest's gap {:.1?}",
        moves.len(),
        median(|moved| moved.total),
        median(|moved| moved.downtime),
        median(|moved| moved.gap)
    );
}

/// Moves the guest `count` times, each time to a fresh process called `name` and a number, verifying
/// all its memory each time.
fn migrate_n(
    vm: &mut Vm,
    (dir, name): (&Path, &str),
    count: usize,
    route: &Route,
) -> Result<Vec<Moved>> {
    let mut moves = Vec::new();
    for number in 0..count {
        let destination = Ferry::start(dir, &format!("{name}{number}"), &[])?;
        let (left, moved) = vm.migrate(destination, route)?;
        ensure!(!left.has_vm()?, "the source still has a VM");
        left.shut_down()?;
        vm.verify_clean()
            .with_context(|| format!("migration {number}"))?;
        moves.push(moved);
    }
    Ok(moves)
}

/// 1 GiB, at a rate a network would keep up with and flat out, over both transports.
#[test]
fn a_busy_guest_moves_on() -> Result<()> {
    let Some(_turn) = host::turn("a_busy_guest_moves_on")? else {
        return Ok(());
    };
    let each = migrations()?.div_ceil(2);
    for (what, words) in [
        ("100 MiB/s", "mem=768 rate=100"),
        ("flat out", "mem=768 rate=max"),
    ] {
        let dir = tempfile::tempdir()?;
        let mut vm = Vm::boot(dir.path(), "first", &VmSpec::new(1024, words))?;
        for (transport, route) in [("unix", Route::unix(dir.path())), ("tcp", Route::tcp()?)] {
            let moves = migrate_n(&mut vm, (dir.path(), transport), each, &route)?;
            report(&format!("1 GiB, {what}, {transport}"), &moves);
        }
    }
    Ok(())
}

/// Two processes hand the guest to and fro: what one leaves behind does not disturb its return.
#[test]
fn ping_pong() -> Result<()> {
    let Some(_turn) = host::turn("ping_pong")? else {
        return Ok(());
    };
    let dir = tempfile::tempdir()?;
    let route = Route::unix(dir.path());
    for ram in [Ram::Anonymous, Ram::Shared, Ram::Huge] {
        let pool = (ram == Ram::Huge).then(|| HugePool::new(2 * 160));
        if let Some(Err(error)) = &pool {
            println!("SKIP: ping_pong: huge pages: {error:#}");
            continue;
        }
        let words = "mem=96 rate=max smp=2 verify_every=2";
        let spec = VmSpec {
            ram,
            cpus: 2,
            ..VmSpec::new(160, words)
        };
        let mut vm = Vm::boot(dir.path(), &format!("left-{ram:?}"), &spec)?;
        let mut other = Ferry::start(dir.path(), &format!("right-{ram:?}"), &[])?;
        let mut moves = Vec::new();
        for _ in 0..migrations()? {
            let (left, moved) = vm.migrate(other, &route)?;
            vm.verify_clean()?;
            (other, _) = (left, moves.push(moved));
        }
        report(&format!("ping-pong, {ram:?}"), &moves);
    }
    Ok(())
}

/// One place a guest with two NICs can be in: a virtio-net card's tap, and another card's process.
struct Place {
    end: usize,
    nic: Nic,
}

impl Place {
    fn new(dir: &Path, number: usize, card: Network) -> Result<Self> {
        let mac = card.mac();
        let options = ["--mac", &mac, "--hash-report", "on"];
        let nic = Nic::start(dir, &format!("card{number}"), &card.tap(number), &options)?;
        Ok(Self { end: number, nic })
    }
}

/// A virtio-net card and a passthrough card, both under traffic, while memory is dirtied too.
#[test]
fn packets_keep_coming() -> Result<()> {
    let Some(_turn) = host::network_turn("packets_keep_coming")? else {
        return Ok(());
    };
    let dir = tempfile::tempdir()?;
    let (net, card) = (Network::new(0)?, Network::new(1)?);
    let mut place = Place::new(dir.path(), 0, card)?;
    let mut spec = VmSpec::new(256, "mem=96 rate=100 hash=1 irq=1 retain=2048");
    spec.nets = vec![net.device(place.end)];
    spec.user_devices = vec![json!({"id": card.id(), "socket": place.nic.socket})];
    let mut vm = Vm::boot(dir.path(), "host0", &spec)?;
    let streams = [net.traffic(500)?, card.traffic(500)?];
    let mut moves = Vec::new();
    for number in 1..=migrations()? {
        let next = Place::new(dir.path(), number, card)?;
        let destination = Ferry::start(dir.path(), &format!("host{number}"), &[])?;
        let route = Route::unix(dir.path()).receiving(json!({
            "net": [net.received(next.end)],
            "user_devices": [{"id": card.id(), "socket": next.nic.socket}],
        }));
        let before = streams.each_ref().map(|stream| stream.counts().received);
        ensure!(
            before.iter().all(|count| *count > 0),
            "no echoes: {before:?}"
        );
        let (left, moved) = vm.migrate(destination, &route)?;
        left.shut_down()?;
        // Its tap is without a card from here on, so that the bridge forgets where the guest was.
        place = next;
        moves.push(moved);
        e2e::process::wait_for(
            "echoes after the migration",
            Duration::from_secs(20),
            || {
                let now = streams.each_ref().map(|stream| stream.counts().received);
                let flowing = now
                    .iter()
                    .zip(before)
                    .all(|(now, before)| *now > before + 500);
                Ok(flowing.then_some(()))
            },
        )
        .with_context(|| format!("{streams:?}\n{}", vm.ferry.last_words()))?;
        let found = vm.verify_clean()?;
        ensure!(found.rx_pages > 1000, "{found:?}");
        println!(
            "traffic: {:?}",
            streams.each_ref().map(|stream| stream.counts())
        );
    }
    report("virtio-net and passthrough cards, 1000 packets/s", &moves);
    for (stream, index) in streams.into_iter().zip([0, 1]) {
        let counts = stream.stop()?;
        ensure!(counts.bad == 0, "{counts:?}");
        let nic = vm.last_tick()?.nics.get(index).copied().context("no NIC")?;
        ensure!(nic.hash_matched >= nic.rx, "{nic:?}");
    }
    drop(place);
    Ok(())
}

/// Both ends answer at once, whatever the migration does.
#[test]
fn the_api_answers_during_a_migration() -> Result<()> {
    let Some(_turn) = host::turn("the_api_answers_during_a_migration")? else {
        return Ok(());
    };
    let dir = tempfile::tempdir()?;
    let mut vm = Vm::boot(dir.path(), "source", &VmSpec::new(640, "mem=512 rate=100"))?;
    let destination = Ferry::start(dir.path(), "destination", &[])?;
    let pollers = [&vm.ferry.api, &destination.api].map(Poller::start);
    let (_left, moved) = vm.migrate(destination, &Route::unix(dir.path()))?;
    println!("{}", moved.line());
    for (side, poller) in ["source", "destination"].into_iter().zip(pollers) {
        let latency = poller.stop()?;
        println!(
            "{side}: {} answers, mean {:.1?}, longest {:.1?} ({})",
            latency.answers,
            latency.mean(),
            latency.max,
            latency.slowest
        );
        ensure!(latency.answers > 10, "{side}: {latency:?}");
        ensure!(latency.max < Duration::from_secs(1), "{side}: {latency:?}");
    }
    Ok(())
}
