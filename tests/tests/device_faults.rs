//! Faults of a migration with a passthrough card, whose server is a process of its own.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::channel_proxy::{Judge, Verdict, at};
use e2e::ferry::{Ferry, Nic, phase_name};
use e2e::host;
use e2e::migration::{Route, check_nothing_arrived};
use e2e::network::Network;
use e2e::nic_proxy::{LogFault, NicProxy};
use e2e::process::wait_for;
use e2e::traffic::Traffic;
use e2e::vm::{Vm, VmSpec};
use serde_json::json;
use vm_migration::migrate::frame::Kind;

const LIMIT: Duration = Duration::from_secs(30);

/// A guest whose card is under traffic.
struct Scene {
    dir: tempfile::TempDir,
    card: Network,
    nic: Nic,
    /// Between the first process and its card's server.
    proxy: NicProxy,
    vm: Vm,
    stream: Traffic,
    /// Whose tap the guest's card is on.
    end: usize,
    started: usize,
}

/// Where it may go.
struct Target {
    ferry: Ferry,
    nic: Nic,
}

fn start_nic(dir: &Path, card: Network, number: usize, end: usize) -> Result<Nic> {
    let mac = card.mac();
    let options = ["--mac", &mac, "--hash-report", "on"];
    Nic::start(dir, &format!("card{number}"), &card.tap(end), &options)
}

impl Scene {
    fn new() -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let card = Network::new(0)?;
        let nic = start_nic(dir.path(), card, 0, 0)?;
        let proxy = NicProxy::start(&dir.path().join("proxy"), &nic.socket)?;
        let mut spec = VmSpec::new(128, "mem=48 rate=50 hash=1 irq=1 retain=1024");
        spec.user_devices = vec![json!({"id": card.id(), "socket": proxy.socket})];
        let vm = Vm::boot(dir.path(), "host0", &spec)?;
        let stream = card.traffic(500)?;
        let this = Self {
            dir,
            card,
            nic,
            proxy,
            vm,
            stream,
            end: 0,
            started: 0,
        };
        this.wait_echoes()?;
        Ok(this)
    }

    /// Waits for a few hundred more packets to come back.
    fn wait_echoes(&self) -> Result<()> {
        let enough = self.stream.counts().received + 300;
        wait_for("echoes", LIMIT, || {
            Ok((self.stream.counts().received > enough).then_some(()))
        })
        .with_context(|| self.vm.ferry.last_words())
    }

    /// A destination on the other tap than the guest is on.
    fn target(&mut self) -> Result<Target> {
        self.started += 1;
        let nic = start_nic(self.dir.path(), self.card, self.started, self.end + 1)?;
        let ferry = Ferry::start(self.dir.path(), &format!("host{}", self.started), &[])?;
        Ok(Target { ferry, nic })
    }

    fn route(&self, target: &Target) -> Route {
        let device = json!({"id": self.card.id(), "socket": target.nic.socket});
        Route::unix(self.dir.path()).receiving(json!({"user_devices": [device]}))
    }

    /// The guest moves, and its packets come there.
    fn migrate(&mut self, target: Target) -> Result<()> {
        let route = self.route(&target);
        let (left, _) = self.vm.migrate(target.ferry, &route)?;
        left.shut_down()?;
        self.nic = target.nic;
        self.end += 1;
        self.wait_echoes()?;
        self.vm.verify_clean().map(drop)
    }

    /// A migration that comes to harm, after which packets flow as before.
    fn fail(&mut self, target: &mut Target, judge: Judge) -> Result<String> {
        let (route, _proxy) = self.route(target).through(self.dir.path(), judge)?;
        let why = self.vm.migrate_in_vain(&target.ferry, &route, LIMIT)?;
        check_nothing_arrived(&mut target.ferry)?;
        self.wait_echoes()?;
        Ok(why)
    }
}

/// The card goes back to work, and its dirty log can be started again.
#[test]
fn a_cut_connection_leaves_the_card_working() -> Result<()> {
    let Some(_turn) = host::network_turn("a_cut_connection_leaves_the_card_working")? else {
        return Ok(());
    };
    let mut scene = Scene::new()?;
    for (kind, nth) in [
        (Kind::Pages, 5),
        // The card's first cut of its state comes while the guest runs.
        (Kind::DeviceChunk, 1),
        (Kind::DeviceEnd, 1),
        (Kind::DeviceEnd, 4),
        (Kind::Ready, 1),
    ] {
        let mut target = scene.target()?;
        let judge = at(kind, nth, |_| Verdict::CutBefore);
        let why = scene
            .fail(&mut target, judge)
            .with_context(|| format!("{kind:?}"))?;
        println!("cut at {kind:?} {nth}: {why}");
        scene
            .migrate(target)
            .with_context(|| format!("after {kind:?} {nth}"))?;
    }
    let counts = scene.stream.stop()?;
    ensure!(counts.bad == 0, "{counts:?}");
    Ok(())
}

/// The card's dirty log fails when it is started, in the first report, in one between and in the
/// last, while the guest stands still. The server has answered well, so what it reported is lost.
#[test]
fn a_dirty_log_that_fails_ends_the_migration_and_nothing_else() -> Result<()> {
    let test = "a_dirty_log_that_fails_ends_the_migration_and_nothing_else";
    let Some(_turn) = host::network_turn(test)? else {
        return Ok(());
    };
    let mut scene = Scene::new()?;
    let mut target = scene.target()?;
    // A guest that writes 50 MiB/s does not move within 1 ms: rounds go on until the fault.
    let endless = json!({"dirty_log_restarts": 0, "downtime_ms": 1});
    let usual = json!({"dirty_log_restarts": 0});
    for (fault, operation, params) in [
        (LogFault::Start, "start", &usual),
        (LogFault::Report(1), "report", &usual),
        (LogFault::Report(3), "report", &endless),
        (LogFault::LastReport, "report", &usual),
    ] {
        scene.proxy.log.fail(fault);
        let phases = scene.vm.ferry.phases().len();
        let route = scene.route(&target).sending(params.clone());
        let why = scene.vm.migrate_in_vain(&target.ferry, &route, LIMIT)?;
        println!("{fault:?}: {why}");
        let words = format!("{}: dirty log {operation} failed", scene.card.id());
        ensure!(why.contains(&words), "{fault:?}: {why}");
        let phases = scene.vm.ferry.phases().split_off(phases);
        let stood_still = phases.contains(&"switchover".to_owned());
        ensure!(stood_still == (fault == LogFault::LastReport), "{phases:?}");
        check_nothing_arrived(&mut target.ferry)?;
        scene.wait_echoes()?;
    }
    // While the guest runs it can be mended: everything is sent again.
    scene.proxy.log.fail(LogFault::Report(1));
    scene.migrate(target)?;
    ensure!(!scene.proxy.log.is_to_fail(), "no report failed");
    let counts = scene.stream.stop()?;
    ensure!(counts.bad == 0, "{counts:?}");
    Ok(())
}

/// The guest loses its card, not its life.
#[test]
fn a_killed_card_is_named_and_the_guest_goes_on() -> Result<()> {
    let Some(_turn) = host::network_turn("a_killed_card_is_named_and_the_guest_goes_on")? else {
        return Ok(());
    };
    let mut scene = Scene::new()?;
    let mut target = scene.target()?;
    let route = scene
        .route(&target)
        .sending(json!({"max_bandwidth": 16 << 20}));
    route.open(&target.ferry)?;
    route.go(&scene.vm.ferry)?;
    wait_for("pages", LIMIT, || {
        let status = scene.vm.ferry.migration()?;
        let sent = status["pages"].as_u64().unwrap_or_default();
        Ok((phase_name(&status) == "precopy" && sent > 2000).then_some(()))
    })?;
    scene.nic.process.kill();
    let status = scene.vm.ferry.wait_migration(LIMIT)?;
    let why = status["aborted"].as_str().unwrap_or_default();
    println!("{why}");
    ensure!(
        phase_name(&status) == "aborted" && why.contains(&scene.card.id()),
        "{status}"
    );
    scene.vm.ferry.wait_event("device-lost", LIMIT)?;
    scene.vm.check_runs()?;
    scene.vm.verify_clean()?;
    check_nothing_arrived(&mut target.ferry)
}

/// The destination's card dies while the state is loaded: the source's goes on.
#[test]
fn a_killed_card_at_the_destination() -> Result<()> {
    let Some(_turn) = host::network_turn("a_killed_card_at_the_destination")? else {
        return Ok(());
    };
    let mut scene = Scene::new()?;
    let mut target = scene.target()?;
    let pid = i32::try_from(target.nic.process.id())?;
    let pid = rustix::process::Pid::from_raw(pid).context("no process")?;
    let judge = at(Kind::RoundEnd, 1, move |_| {
        // Gone already is as good.
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        Verdict::Pass
    });
    let why = scene.fail(&mut target, judge)?;
    println!("{why}");
    ensure!(why.contains(&scene.card.id()), "{why}");
    drop(target.nic);
    let fresh = scene.target()?;
    scene.migrate(fresh)
}

/// The commit is lost, so the guest stands still with its card; the operator resumes it.
#[test]
fn a_lost_commit_and_the_way_back() -> Result<()> {
    let Some(_turn) = host::network_turn("a_lost_commit_and_the_way_back")? else {
        return Ok(());
    };
    let mut scene = Scene::new()?;
    let mut target = scene.target()?;
    let cut = at(Kind::Commit, 1, |_| Verdict::CutBefore);
    let (route, _proxy) = scene.route(&target).through(scene.dir.path(), cut)?;
    route.open(&target.ferry)?;
    route.go(&scene.vm.ferry)?;
    let status = scene.vm.ferry.wait_migration(LIMIT)?;
    ensure!(
        status["aborted"].to_string().contains("stays paused"),
        "{status}"
    );
    ensure!(scene.vm.ferry.state()? == "Paused");
    check_nothing_arrived(&mut target.ferry)?;
    scene.vm.ferry.api.put("vm.resume", None)?;
    scene.vm.check_runs()?;
    scene.wait_echoes()?;
    scene.vm.verify_clean()?;
    scene.migrate(target)
}
