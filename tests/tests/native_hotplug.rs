//! Cards come to the native guest and go again. It ejects when it is told to, over its serial port,
//! so that each test chooses the moment.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::ferry::{Ferry, Nic};
use e2e::host;
use e2e::migration::Route;
use e2e::network::Network;
use e2e::process::wait_for;
use e2e::traffic::Traffic;
use e2e::vm::{Vm, VmSpec};
use hyper::Method;
use serde_json::{Value, json};

const LIMIT: Duration = Duration::from_secs(30);

/// A card's process at one end of a migration.
fn start_nic(dir: &Path, network: Network, end: usize) -> Result<Nic> {
    let (name, mac) = (format!("{}-{end}", network.id()), network.mac());
    Nic::start(dir, &name, &network.tap(end), &["--mac", &mac])
}

fn user_device(network: Network, nic: &Nic) -> Value {
    json!({"id": network.id(), "socket": nic.socket})
}

/// A guest that drives a card, whose packets it returns.
struct Scene {
    dir: tempfile::TempDir,
    network: Network,
    nic: Nic,
    vm: Vm,
    packets: Traffic,
}

impl Scene {
    fn new() -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let network = Network::new(0)?;
        let nic = start_nic(dir.path(), network, 0)?;
        let mut spec = VmSpec::new(160, "mem=64 rate=50 irq=1 retain=1024");
        spec.user_devices = vec![user_device(network, &nic)];
        let vm = Vm::boot(dir.path(), "first", &spec)?;
        let packets = network.traffic(500)?;
        let this = Self {
            dir,
            network,
            nic,
            vm,
            packets,
        };
        this.wait_echoes()?;
        Ok(this)
    }

    fn wait_echoes(&self) -> Result<()> {
        let before = self.packets.counts().received;
        wait_for("echoes", LIMIT, || {
            Ok((self.packets.counts().received > before + 200).then_some(()))
        })
        .with_context(|| self.vm.ferry.last_words())
    }

    /// Asks for the card's removal; what the API says.
    fn ask(&self) -> Result<(u16, String)> {
        let body = json!({"id": self.network.id()});
        let api = &self.vm.ferry.api;
        let answer = api.request(Method::PUT, "vm.remove-device", Some(&body))?;
        Ok((answer.status.as_u16(), answer.body.to_string()))
    }

    /// What `vm.info` says of the card's removal.
    fn removal(&self) -> Result<Option<String>> {
        let info = self.vm.ferry.api.get("vm.info")?;
        let removal = &info["devices"][self.network.id()]["removal"];
        Ok(removal.as_str().map(str::to_owned))
    }

    /// The guest ejects what it was asked for.
    fn eject(&mut self) -> Result<()> {
        self.vm.ferry.type_in(b"h")?;
        Ok(())
    }

    /// Waits until the card is gone here: for the guest, in the configuration, and for its server.
    fn wait_removed(&mut self, nic: &Nic) -> Result<()> {
        let event = self.vm.ferry.wait_event("device-removed", LIMIT)?;
        ensure!(event["properties"]["id"] == self.network.id(), "{event}");
        let config = self.vm.ferry.api.get("vm.info")?["config"].clone();
        ensure!(config["user_devices"] == json!([]), "{config}");
        wait_for("the end of the connection", LIMIT, || {
            Ok(nic
                .process
                .output()
                .contains("client disconnected")
                .then_some(()))
        })?;
        self.vm.verify_clean()?;
        Ok(())
    }

    fn route(&self, nic: &Nic) -> Route {
        let devices = json!([user_device(self.network, nic)]);
        Route::unix(self.dir.path()).receiving(json!({"user_devices": devices}))
    }
}

#[test]
fn nothing_is_taken_from_a_guest_that_does_not_eject() -> Result<()> {
    let test = "nothing_is_taken_from_a_guest_that_does_not_eject";
    let Some(_turn) = host::network_turn(test)? else {
        return Ok(());
    };
    let mut scene = Scene::new()?;
    // To ask twice is to ask again.
    for _ in 0..2 {
        let (status, said) = scene.ask()?;
        ensure!(status == 204, "{status} {said}");
    }
    ensure!(scene.removal()?.as_deref() == Some("asked for"));
    let again = user_device(scene.network, &scene.nic);
    let answer = scene
        .vm
        .ferry
        .api
        .request(Method::PUT, "vm.add-user-device", Some(&again))?;
    ensure!(
        answer.status == 400,
        "the id is taken: {} {}",
        answer.status,
        answer.body
    );
    scene.wait_echoes()?;
    // It says so when it is late, and goes on.
    let late = Duration::from_secs(45);
    let overdue = scene.vm.ferry.wait_event("device-removal-overdue", late)?;
    ensure!(
        overdue["properties"]["id"] == scene.network.id(),
        "{overdue}"
    );
    scene.wait_echoes()?;

    // The request moves with the guest, which ejects there.
    let nic = start_nic(scene.dir.path(), scene.network, 1)?;
    let route = scene.route(&nic);
    let destination = Ferry::start(scene.dir.path(), "second", &[])?;
    let (left, _) = scene.vm.migrate(destination, &route)?;
    left.shut_down()?;
    ensure!(scene.removal()?.as_deref() == Some("asked for"));
    scene.wait_echoes()?;
    scene.eject()?;
    scene.wait_removed(&nic)?;
    ensure!(scene.ask()?.0 == 404, "there is no card any more");

    // Its slot is free; a card that comes moves too.
    let place = |vm: &Vm, nic: &Nic| {
        let device = user_device(scene.network, nic);
        vm.ferry.api.put("vm.add-user-device", Some(&device))
    };
    let first = place(&scene.vm, &nic)?;
    let destination = Ferry::start(scene.dir.path(), "third", &[])?;
    let other = scene.route(&scene.nic);
    let (left, _) = scene.vm.migrate(destination, &other)?;
    left.shut_down()?;
    let info = scene.vm.ferry.api.get("vm.info")?;
    let there = &info["devices"][scene.network.id()];
    ensure!(there["bdf"] == first["bdf"], "{first} {there}");
    // A guest that ends has ejected all.
    let (status, said) = scene.ask()?;
    ensure!(status == 204, "{status} {said}");
    let (ferry, _) = scene.vm.power_off()?;
    let removed = ferry.wait_event("device-removed", LIMIT)?;
    ensure!(
        removed["properties"]["id"] == scene.network.id(),
        "{removed}"
    );
    let config = ferry.api.get("vm.info")?["config"].clone();
    ensure!(config["user_devices"] == json!([]), "{config}");
    ferry.shut_down()
}

#[test]
fn what_is_ejected_during_a_migration_is_taken_away_after_it() -> Result<()> {
    let test = "what_is_ejected_during_a_migration_is_taken_away_after_it";
    let Some(_turn) = host::network_turn(test)? else {
        return Ok(());
    };
    let mut scene = Scene::new()?;
    let (status, said) = scene.ask()?;
    ensure!(status == 204, "{status} {said}");
    let nic = start_nic(scene.dir.path(), scene.network, 1)?;
    // Slow enough that the guest ejects in the middle.
    let slow = json!({"max_bandwidth": 30 << 20, "downtime_ms": 3000});
    let route = scene.route(&nic).sending(slow);
    let destination = Ferry::start(scene.dir.path(), "second", &[])?;
    route.open(&destination)?;
    route.go(&scene.vm.ferry)?;
    wait_for("the first round", LIMIT, || {
        let phases = scene.vm.ferry.phases();
        Ok(phases.iter().any(|phase| phase == "precopy").then_some(()))
    })?;
    scene.eject()?;
    wait_for("the eject", LIMIT, || {
        Ok((scene.removal()?.as_deref() == Some("ejected")).then_some(()))
    })?;
    let phases = scene.vm.ferry.phases();
    ensure!(
        phases.iter().all(|phase| phase != "switchover"),
        "too late: {phases:?}"
    );
    let (status, said) = scene.ask()?;
    ensure!(status == 409, "{status} {said}");
    let (left, _) = scene.vm.arrive(destination)?;
    let told = left.event_names();
    ensure!(
        !told.iter().any(|name| name == "device-removed"),
        "{told:?}"
    );
    left.shut_down()?;
    scene.wait_removed(&nic)
}
