//! A stock guest moves, with streams through a virtio-net card and a passthrough one.

use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::arp_watch::ArpWatch;
use e2e::ferry::{Ferry, Nic};
use e2e::linux::{Kernel, Linux, LinuxConfig, console_path, in_lab, wait_reachable};
use e2e::migration::{Route, ensure_moved};
use e2e::netns;
use e2e::network::Network;
use serde_json::json;

use crate::hashes::{self, Settings};
use crate::streams::{Direction, Stream};

/// How long a migration may take here.
const LIMIT: Duration = Duration::from_secs(240);

/// The passthrough card at one end.
fn start_nic(dir: &Path, name: &str, network: Network, end: usize) -> Result<Nic> {
    let mac = network.mac();
    let options = ["--mac", &mac, "--hash-report", "on"];
    Nic::start(dir, name, &network.tap(end), &options)
}

/// The guest's addresses on a network.
fn addresses(network: Network) -> Result<[IpAddr; 2]> {
    let index = network.index;
    Ok([
        format!("10.77.{index}.2").parse()?,
        format!("fd77:{index}::2").parse()?,
    ])
}

/// Gives the guest its addresses on a network, and its hashes; interface and settings.
fn configure(linux: &mut Linux, network: Network) -> Result<(String, Settings)> {
    let [v4, v6] = addresses(network)?;
    let with_prefixes = [format!("{v4}/24"), format!("{v6}/64")];
    let interface = linux.add_interface(
        &network.mac(),
        &with_prefixes.each_ref().map(String::as_str),
    )?;
    for address in [v4, v6] {
        wait_reachable(address, Duration::from_secs(20))?;
    }
    let settings = hashes::settings(linux, &interface, "on")?;
    hashes::check(linux, &interface, &[v4, v6], &settings).context(network.id())?;
    Ok((interface, settings))
}

/// Four streams: both ways through both cards.
fn start_streams(linux: &mut Linux, dir: &Path, networks: [Network; 2]) -> Result<Vec<Stream>> {
    let mut streams = Vec::new();
    for network in networks {
        let index = network.index;
        let ends = [
            (
                format!("in{index}"),
                Direction::In,
                format!("10.77.{index}.2:7001"),
            ),
            (
                format!("out{index}"),
                Direction::Out,
                format!("[fd77:{index}::1]:7002"),
            ),
        ];
        for (name, direction, receiver) in ends {
            streams.push(Stream::start(
                linux,
                dir,
                &name,
                direction,
                &receiver,
                "--rate 100000",
            )?);
        }
    }
    flow(&mut streams)?;
    Ok(streams)
}

/// Waits until all streams have moved on.
fn flow(streams: &mut [Stream]) -> Result<()> {
    let limit = Duration::from_secs(60);
    streams
        .iter_mut()
        .try_for_each(|stream| stream.wait_flow(150_000, limit))
}

/// Moves the guest to a new process called `name`; the one it left.
fn migrate(linux: &mut Linux, dir: &Path, name: &str, route: &Route) -> Result<Ferry> {
    let destination = Ferry::start(dir, name, &[])?;
    route.open(&destination)?;
    route.go(&linux.ferry)?;
    let about = || {
        let sides = [&linux.ferry, &destination].map(|side| side.migration().unwrap_or_default());
        let said = destination.process.output();
        format!("source: {}\ndestination: {}\n{said}", sides[0], sides[1])
    };
    let waited = linux.ferry.wait_migration(LIMIT);
    let status = waited.with_context(about)?;
    let there = destination.wait_migration(LIMIT)?;
    ensure_moved((&linux.ferry, &status), (&destination, &there))?;
    println!(
        "to {name} by {}: {} ms, downtime {} µs, {} rounds, {} bytes",
        route.send_to,
        status["elapsed_ms"],
        status["downtime"]["total"],
        status["rounds"],
        status["bytes"]
    );
    linux.follow(dir, destination)
}

/// Watches for announcements at one end of each network, before a guest goes there.
fn watch(networks: [Network; 2], end: usize) -> Result<Vec<(Network, ArpWatch)>> {
    let watch = |network: Network| Ok((network, ArpWatch::start(&network.tap(end))?));
    networks.into_iter().map(watch).collect()
}

#[test]
fn debian_6_12_moves_with_streams_through_virtio_and_passthrough_cards() -> Result<()> {
    if !in_lab("debian_6_12_moves_with_streams_through_virtio_and_passthrough_cards") {
        return Ok(());
    }
    netns::isolate()?;
    let networks = [Network::new(0)?, Network::new(1)?];
    let [virtio, passthrough] = networks;
    let dir = tempfile::tempdir()?;
    let dir = dir.path();
    let nic = start_nic(dir, "nic-a", passthrough, 0)?;
    let net = format!(
        "id={},tap={},mac={},hash_report=on",
        virtio.id(),
        virtio.tap(0),
        virtio.mac()
    );
    let user_device = format!("socket={},id={}", nic.socket.display(), passthrough.id());
    let config = LinuxConfig::new(Kernel::Cloud6_12).vcpus(1).options(&[
        "--net",
        &net,
        "--user-device",
        &user_device,
    ]);
    let mut linux = Linux::boot(dir, "a", &config)?;
    let cards = [
        configure(&mut linux, virtio)?,
        configure(&mut linux, passthrough)?,
    ];
    linux
        .shell
        .start_job("dirty", "guest_net dirty --mib 16 --rate 1")?;
    let ready = Duration::from_secs(60);
    linux.shell.wait_job_says("dirty", "ready", ready)?;
    let mut streams = start_streams(&mut linux, dir, networks)?;

    let mut nic = Some(nic);
    for (name, end, route) in [("b", 1, Route::unix(dir)), ("c", 2, Route::tcp()?)] {
        let next = start_nic(dir, &format!("nic-{name}"), passthrough, end)?;
        let console = json!({"mode": "Socket", "socket": console_path(dir, name)});
        let route = route
            .sending(json!({"downtime_ms": 2000}))
            .receiving(json!({
                "net": [virtio.received(end)],
                "user_devices": [{"id": passthrough.id(), "socket": next.socket}],
                "console": console,
            }));
        let (there, here) = (watch(networks, end)?, watch(networks, end + 1)?);
        let left = migrate(&mut linux, dir, name, &route)?;
        // The bridges learn where it is from the guest, for both of its cards, and only there.
        for (network, watch) in there {
            watch.wait_announcement(&network.mac(), Duration::from_secs(60))?;
        }
        for (network, watch) in here {
            let said = watch.take_announcement(&network.mac())?;
            ensure!(!said, "{} announced itself at the source", network.id());
        }
        ensure!(!left.has_vm()?, "the source still has a VM");
        left.shut_down()?;
        drop(nic.replace(next));
        flow(&mut streams).with_context(|| linux.ferry.last_words())?;
        for (network, (interface, settings)) in networks.into_iter().zip(&cards) {
            let now = hashes::settings(&mut linux, interface, "show")?;
            ensure!(now == *settings, "{settings:?} has become {now:?}");
            let about = || format!("{} in {name}", network.id());
            hashes::check(&mut linux, interface, &addresses(network)?, &now).with_context(about)?;
        }
    }

    for stream in streams {
        let sum = stream.stop(&mut linux)?;
        println!(
            "{} bytes, gap {} ms",
            sum.bytes,
            sum.longest_gap.as_millis()
        );
        ensure!(sum.bytes > 500_000, "{sum:?}");
    }
    linux.shell.stop_job("dirty")?;
    let dirty = linux.shell.end_job("dirty", Duration::from_secs(60))?;
    ensure!(dirty.status == 0, "{}", dirty.output);
    linux.power_off()
}
