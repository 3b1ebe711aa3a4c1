//! A guest with two passthrough cards, each in a process of its own, both with pre-copy and
//! peer-to-peer states.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::ferry::{Ferry, Nic};
use e2e::host;
use e2e::migration::{Moved, Route, check_nothing_arrived};
use e2e::network::Network;
use e2e::nic_proxy::{NicProxy, StateFault};
use e2e::process::wait_for;
use e2e::traffic::Traffic;
use e2e::vm::{Vm, VmSpec};
use serde_json::{Value, json};
use vfio_user::DeviceState;

const LIMIT: Duration = Duration::from_secs(30);

/// The processes of both cards at one end of a migration, each with a proxy before it.
struct Cards {
    end: usize,
    nics: Vec<Nic>,
    proxies: Vec<NicProxy>,
}

impl Cards {
    fn start(dir: &Path, networks: &[Network], number: usize, end: usize) -> Result<Self> {
        let (mut nics, mut proxies) = (Vec::new(), Vec::new());
        for card in networks {
            let mac = card.mac();
            let options = ["--mac", &mac, "--hash-report", "on"];
            let name = format!("{}-{number}", card.id());
            let nic = Nic::start(dir, &name, &card.tap(end), &options)?;
            proxies.push(NicProxy::start(
                &dir.join(format!("{name}.proxy")),
                &nic.socket,
            )?);
            nics.push(nic);
        }
        Ok(Self { end, nics, proxies })
    }

    fn devices(&self, networks: &[Network]) -> Value {
        let pairs = networks.iter().zip(&self.proxies);
        pairs
            .map(|(card, proxy)| json!({"id": card.id(), "socket": proxy.socket}))
            .collect()
    }
}

/// The guest, under traffic through both cards.
struct Scene {
    dir: tempfile::TempDir,
    networks: [Network; 2],
    cards: Cards,
    vm: Vm,
    streams: [Traffic; 2],
    started: usize,
}

impl Scene {
    fn new() -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let networks = [Network::new(0)?, Network::new(1)?];
        let cards = Cards::start(dir.path(), &networks, 0, 0)?;
        let mut spec = VmSpec::new(160, "mem=64 rate=50 hash=1 irq=1 retain=1024");
        let devices = cards.devices(&networks);
        spec.user_devices = devices.as_array().cloned().unwrap_or_default();
        let vm = Vm::boot(dir.path(), "host0", &spec)?;
        let streams = [networks[0].traffic(500)?, networks[1].traffic(500)?];
        let this = Self {
            dir,
            networks,
            cards,
            vm,
            streams,
            started: 0,
        };
        this.wait_echoes()?;
        Ok(this)
    }

    /// Waits for a few hundred more packets to come back through each card.
    fn wait_echoes(&self) -> Result<()> {
        let now = || {
            self.streams
                .each_ref()
                .map(|stream| stream.counts().received)
        };
        let before = now();
        wait_for("echoes through both cards", LIMIT, || {
            let flowing = now()
                .iter()
                .zip(before)
                .all(|(now, before)| *now > before + 300);
            Ok(flowing.then_some(()))
        })
        .with_context(|| format!("{:?}\n{}", now(), self.vm.ferry.last_words()))
    }

    /// A process to go to, with cards on the other taps.
    fn target(&mut self) -> Result<(Ferry, Cards)> {
        self.started += 1;
        let end = self.cards.end + 1;
        let cards = Cards::start(self.dir.path(), &self.networks, self.started, end)?;
        let ferry = Ferry::start(self.dir.path(), &format!("host{}", self.started), &[])?;
        Ok((ferry, cards))
    }

    fn route(&self, cards: &Cards) -> Route {
        let devices = cards.devices(&self.networks);
        Route::unix(self.dir.path()).receiving(json!({"user_devices": devices}))
    }

    fn migrate(&mut self, (ferry, cards): (Ferry, Cards)) -> Result<Moved> {
        let route = self.route(&cards);
        let (left, moved) = self.vm.migrate(ferry, &route)?;
        left.shut_down()?;
        self.cards = cards;
        self.wait_echoes()?;
        let found = self.vm.verify_clean()?;
        ensure!(found.rx_pages > 100, "{found:?}");
        Ok(moved)
    }

    fn finish(mut self) -> Result<()> {
        for nic in &mut self.cards.nics {
            nic.process.check()?;
        }
        for stream in self.streams {
            let counts = stream.stop()?;
            ensure!(counts.bad == 0, "{counts:?}");
        }
        Ok(())
    }
}

/// Both move, there and back and there again; each one's share of the downtime is told.
#[test]
fn two_cards_with_pre_copy_move_under_traffic() -> Result<()> {
    let Some(_turn) = host::network_turn("two_cards_with_pre_copy_move_under_traffic")? else {
        return Ok(());
    };
    let mut scene = Scene::new()?;
    for _ in 0..3 {
        let target = scene.target()?;
        let moved = scene.migrate(target)?;
        println!("{}", moved.line());
        let devices = moved.status["downtime"]["devices"].as_array();
        let devices = devices.context("no devices in the downtime")?;
        for card in scene.networks {
            let share = devices.iter().find(|one| one["id"] == card.id().as_str());
            let share = share.with_context(|| format!("nothing of {}", card.id()))?;
            println!("{share}");
            ensure!(
                share["bytes"].as_u64().is_some_and(|bytes| bytes > 100),
                "{share}"
            );
            ensure!(
                share["load"].as_u64().is_some_and(|took| took > 0),
                "{share}"
            );
        }
    }
    for index in [0, 1] {
        let tick = scene.vm.last_tick()?;
        let nic = tick.nics.get(index).copied().context("no NIC")?;
        ensure!(nic.hash_matched >= nic.rx, "{nic:?}");
    }
    scene.finish()
}

/// One of two cards does not enter a state, or says that it did not: at the source, at the
/// destination, on the way and on the way back.
#[test]
fn a_state_that_is_not_reached_leaves_both_cards_working() -> Result<()> {
    use DeviceState as S;
    let test = "a_state_that_is_not_reached_leaves_both_cards_working";
    let Some(_turn) = host::network_turn(test)? else {
        return Ok(());
    };
    let mut scene = Scene::new()?;
    let (mut ferry, cards) = scene.target()?;
    for (at_source, state) in [
        (true, S::PreCopy),
        (true, S::PreCopyP2p),
        (true, S::StopCopy),
        (false, S::Resuming),
        (false, S::Stop),
    ] {
        for fault in [StateFault::Refused, StateFault::Denied] {
            let at = if at_source { &scene.cards } else { &cards };
            let states = std::sync::Arc::clone(&at.proxies[1].states);
            states.fail(state, fault);
            let route = scene.route(&cards);
            let why = scene.vm.migrate_in_vain(&ferry, &route, LIMIT)?;
            println!("{state} {fault:?}, at the source: {at_source}: {why}");
            ensure!(!states.is_to_fail(), "{state}: nothing failed");
            ensure!(why.contains(&scene.networks[1].id()), "{why}");
            check_nothing_arrived(&mut ferry)?;
            scene.wait_echoes()?;
        }
    }
    // The way back fails too: the first card does not wake, the second not at once.
    for (card, state) in [(0, S::RunningP2p), (1, S::Running)] {
        cards.proxies[1].states.fail(S::Stop, StateFault::Refused);
        let states = std::sync::Arc::clone(&scene.cards.proxies[card].states);
        states.fail(state, StateFault::Refused);
        let route = scene.route(&cards);
        let why = scene.vm.migrate_in_vain(&ferry, &route, LIMIT)?;
        println!("and on the way back {state}: {why}");
        ensure!(!states.is_to_fail(), "{state}: nothing failed");
        check_nothing_arrived(&mut ferry)?;
        scene.wait_echoes()?;
    }
    scene.migrate((ferry, cards))?;
    scene.finish()
}
