//! Cards come to a running stock guest and go again, and it moves with them.

use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use e2e::ferry::{Ferry, Nic};
use e2e::linux::{Kernel, Linux, LinuxConfig, console_path, in_lab, wait_reachable};
use e2e::migration::{Route, ensure_moved};
use e2e::netns;
use e2e::network::Network;
use e2e::process::wait_for;
use hyper::Method;
use serde_json::{Value, json};

use crate::streams::{Direction, Stream};

/// Bytes of each stream.
const BYTES: u64 = 4 << 20;

/// How long the guest may take to set a card up, or to let go of it.
const LIMIT: Duration = Duration::from_secs(60);

/// Asks for a card and waits until it answers in the guest; where it is.
fn plug(linux: &mut Linux, network: Network, request: &str, body: &Value) -> Result<String> {
    let place = linux.ferry.api.put(request, Some(body))?;
    ensure!(place["id"] == network.id(), "{place}");
    let bdf = place["bdf"].as_str().context("no place")?.to_owned();
    wait_for("the event of it", LIMIT, || {
        let mut events = linux.ferry.events().into_iter();
        let told = |event: &Value| event["event"] == "device-added" && event["properties"] == place;
        Ok(events.find(told))
    })?;
    configure(linux, network)?;
    let vendor = format!("cat /sys/bus/pci/devices/{bdf}/vendor");
    let vendor = linux.shell.ask(&vendor)?;
    ensure!(vendor.trim() == "0x1af4", "{vendor}");
    Ok(bdf)
}

/// Waits for the card of `network` in the guest, and gives it its address.
fn configure(linux: &mut Linux, network: Network) -> Result<()> {
    let there = format!("grep -l {} /sys/class/net/*/address", network.mac());
    wait_for("the card in the guest", LIMIT, || {
        let found = linux.shell.run(&there, Duration::from_secs(30))?;
        Ok((found.status == 0).then_some(()))
    })
    .with_context(|| linux.ferry.last_words())?;
    let index = network.index;
    linux.add_interface(&network.mac(), &[&format!("10.77.{index}.2/24")])?;
    let address: IpAddr = format!("10.77.{index}.2").parse()?;
    wait_reachable(address, LIMIT)
}

/// Each byte and the checksum are compared, both ways.
fn stream(linux: &mut Linux, dir: &Path, network: Network, when: &str) -> Result<()> {
    let index = network.index;
    for (direction, receiver) in [
        (Direction::In, format!("10.77.{index}.2:7001")),
        (Direction::Out, format!("10.77.{index}.1:7002")),
    ] {
        let (name, limits) = (
            format!("{}-{when}-{direction:?}", network.id()),
            format!("--bytes {BYTES}"),
        );
        let stream = Stream::start(linux, dir, &name, direction, &receiver, &limits)?;
        let sum = stream.finish(linux)?;
        ensure!(sum.bytes == BYTES, "{name}: {sum:?}");
    }
    println!("{} {when}: {BYTES} bytes each way", network.id());
    Ok(())
}

/// How many events of this name there were.
fn count(ferry: &Ferry, name: &str) -> usize {
    let names = ferry.event_names();
    names.iter().filter(|told| *told == name).count()
}

/// Does what lets the card at `bdf` go, and waits until it is gone for guest and host.
fn unplug(
    linux: &mut Linux,
    bdf: &str,
    start: impl FnOnce(&mut Linux) -> Result<()>,
) -> Result<()> {
    let before = count(&linux.ferry, "device-removed");
    start(linux)?;
    wait_for("the end of the card", LIMIT, || {
        Ok((count(&linux.ferry, "device-removed") > before).then_some(()))
    })
    .with_context(|| linux.ferry.last_words())?;
    let left =
        format!("ls /sys/bus/pci/devices; dmesg | tail -n 5; ! test -e /sys/bus/pci/devices/{bdf}");
    linux.shell.ask(&left)?;
    Ok(())
}

fn remove(linux: &Linux, network: Network) -> Result<()> {
    let id = json!({"id": network.id()});
    linux.ferry.api.put("vm.remove-device", Some(&id)).map(drop)
}

/// The identifiers of cards in the configuration.
fn cards(ferry: &Ferry) -> Result<Vec<String>> {
    let info = ferry.api.get("vm.info")?;
    let lists = ["net", "user_devices"].map(|key| info["config"][key].as_array().cloned());
    let cards = lists.into_iter().flatten().flatten();
    let ids = cards.filter_map(|card| Some(card["id"].as_str()?.to_owned()));
    Ok(ids.collect())
}

/// What the API says to a removal that is not possible.
fn refusal(ferry: &Ferry, id: &str) -> Result<(u16, String)> {
    let body = json!({"id": id});
    let answer = ferry
        .api
        .request(Method::PUT, "vm.remove-device", Some(&body))?;
    Ok((answer.status.as_u16(), answer.body.to_string()))
}

/// Moves the guest, whose cards are the first of `networks` on a tap, the second on `nic`.
fn migrate(linux: &mut Linux, dir: &Path, networks: [Network; 2], nic: &Nic) -> Result<()> {
    let [virtio, passthrough] = networks;
    let destination = Ferry::start(dir, "b", &[])?;
    let route = Route::unix(dir)
        .sending(json!({"downtime_ms": 2000}))
        .receiving(json!({
            "net": [virtio.received(1)],
            "user_devices": [{"id": passthrough.id(), "socket": nic.socket}],
            "console": {"mode": "Socket", "socket": console_path(dir, "b")},
        }));
    route.open(&destination)?;
    let mut body = route.send.clone();
    body["destination_url"] = json!(route.send_to);
    let answer = linux.ferry.api.put("vm.send-migration", Some(&body))?;
    let source = &answer["dirty_sources"][0];
    ensure!(source["id"] == passthrough.id(), "{answer}");
    ensure!(source["source"] == "device DMA log", "{answer}");
    let refused = refusal(&linux.ferry, &passthrough.id())?;
    ensure!(refused.0 == 409, "during a migration: {refused:?}");
    let (here, there) = (
        linux.ferry.wait_migration(Duration::from_secs(240))?,
        destination.wait_migration(Duration::from_secs(60))?,
    );
    ensure_moved((&linux.ferry, &here), (&destination, &there))?;
    let event = linux.ferry.wait_event("migration-dirty-source", LIMIT)?;
    ensure!(event["properties"] == *source, "{event}");
    linux.follow(dir, destination)?.shut_down()
}

/// Cards of both kinds come and go at `kernel`'s guest, which moves and reboots with them.
fn plugs(test: &str, kernel: Kernel) -> Result<()> {
    if !in_lab(test) {
        return Ok(());
    }
    netns::isolate()?;
    let networks = [Network::new(0)?, Network::new(1)?];
    let [virtio, passthrough] = networks;
    let dir = tempfile::tempdir()?;
    let dir = dir.path();
    let mut linux = Linux::boot(dir, "a", &LinuxConfig::new(kernel).vcpus(1))?;
    let fixed = refusal(&linux.ferry, "_console")?;
    ensure!(
        fixed.0 == 409 && fixed.1.contains("part of the machine"),
        "{fixed:?}"
    );
    let unknown = refusal(&linux.ferry, "nobody")?;
    ensure!(unknown.0 == 404, "{unknown:?}");

    let mac = passthrough.mac();
    let nics = ["nic-a", "nic-b"].into_iter().enumerate();
    let nics =
        nics.map(|(end, name)| Nic::start(dir, name, &passthrough.tap(end), &["--mac", &mac]));
    let nics = nics.collect::<Result<Vec<_>>>()?;
    let user = |nic: &Nic| json!({"id": passthrough.id(), "socket": nic.socket});
    let net = json!({"id": virtio.id(), "tap": virtio.tap(0), "mac": virtio.mac()});

    // Asked to go, and ejected by the guest's own wish.
    let bdf = plug(
        &mut linux,
        passthrough,
        "vm.add-user-device",
        &user(&nics[0]),
    )?;
    stream(&mut linux, dir, passthrough, "first")?;
    unplug(&mut linux, &bdf, |linux| remove(linux, passthrough))?;
    ensure!(
        cards(&linux.ferry)?.is_empty(),
        "{:?}",
        cards(&linux.ferry)?
    );
    let net_bdf = plug(&mut linux, virtio, "vm.add-net", &net)?;
    ensure!(net_bdf == bdf, "the slot was not free: {net_bdf}");
    stream(&mut linux, dir, virtio, "first")?;
    let user_bdf = plug(
        &mut linux,
        passthrough,
        "vm.add-user-device",
        &user(&nics[0]),
    )?;
    stream(&mut linux, dir, passthrough, "again")?;
    let slot = u8::from_str_radix(&net_bdf[8..10], 16)?;
    unplug(&mut linux, &net_bdf, |linux| {
        let power = format!("echo 0 > /sys/bus/pci/slots/{slot}/power");
        linux.shell.ask(&power).map(drop)
    })?;
    stream(&mut linux, dir, passthrough, "alone")?;
    plug(&mut linux, virtio, "vm.add-net", &net)?;
    stream(&mut linux, dir, virtio, "again")?;
    println!(
        "{}",
        linux
            .shell
            .ask("cat /proc/interrupts | grep -i -e acpi -e ged")?
    );

    migrate(&mut linux, dir, networks, &nics[1])?;
    for network in networks {
        stream(&mut linux, dir, network, "moved")?;
    }
    unplug(&mut linux, &user_bdf, |linux| remove(linux, passthrough))?;
    let bdf = plug(
        &mut linux,
        passthrough,
        "vm.add-user-device",
        &user(&nics[1]),
    )?;
    ensure!(bdf == user_bdf, "the slot was not free: {bdf}");
    stream(&mut linux, dir, passthrough, "replugged")?;

    // A backend that dies is as good as pulled out. Without its driver, which would wait for ever
    // for the end of a reset (`vp_reset` of Linux) and keep the guest from ejecting it.
    let [_, lost] = <[Nic; 2]>::try_from(nics).map_err(|_| anyhow!("two cards"))?;
    let unbind = format!("echo {user_bdf} > /sys/bus/pci/drivers/virtio-pci/unbind");
    linux.shell.ask(&unbind)?;
    unplug(&mut linux, &user_bdf, |_| {
        drop(lost);
        Ok(())
    })?;
    linux.ferry.wait_event("device-lost", LIMIT)?;
    let left = cards(&linux.ferry)?;
    ensure!(left == [virtio.id()], "{left:?}");
    stream(&mut linux, dir, virtio, "last")?;
    let said = linux.shell.ask("dmesg | grep -i 'ACPI.*error' || true")?;
    ensure!(said.trim().is_empty(), "{said}");
    linux.power_off()
}

#[test]
fn debian_6_1_gets_and_loses_cards_while_it_runs() -> Result<()> {
    plugs(
        "debian_6_1_gets_and_loses_cards_while_it_runs",
        Kernel::Cloud6_1,
    )
}

#[test]
fn debian_6_12_gets_and_loses_cards_while_it_runs() -> Result<()> {
    plugs(
        "debian_6_12_gets_and_loses_cards_while_it_runs",
        Kernel::Cloud6_12,
    )
}
