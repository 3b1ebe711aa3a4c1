//! Whatever goes wrong with a migration, the guest runs in exactly one place and has lost nothing.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use e2e::channel_proxy::{Frame, Judge, Verdict, at};
use e2e::ferry::{Ferry, phase_name};
use e2e::host;
use e2e::migration::{Route, check_nothing_arrived};
use e2e::process::wait_for;
use e2e::vm::{Vm, VmSpec};
use hyper::Method;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;
use vm_migration::migrate::frame::Kind;

/// For faults that are noticed at once.
const SOON: Duration = Duration::from_secs(30);

/// Where harm is done: at which frame, and whether that still arrives.
const PLACES: [(Kind, u32, Verdict); 10] = [
    (Kind::Manifest, 1, Verdict::CutBefore),
    (Kind::Manifest, 1, Verdict::CutAfter),
    (Kind::Accept, 1, Verdict::CutBefore),
    (Kind::Accept, 1, Verdict::CutAfter),
    // Well within the first round.
    (Kind::Pages, 5, Verdict::CutBefore),
    (Kind::RoundEnd, 1, Verdict::CutBefore),
    (Kind::RoundAck, 1, Verdict::CutBefore),
    // Nothing in these VMs sends state before they stop.
    (Kind::DeviceChunk, 1, Verdict::CutBefore),
    (Kind::Complete, 1, Verdict::CutBefore),
    // The destination has everything and may not run it.
    (Kind::Ready, 1, Verdict::CutBefore),
];

fn spec() -> VmSpec {
    VmSpec::new(96, "mem=48 rate=50 verify_every=4")
}

/// A guest and a supply of destinations.
struct Scene {
    dir: tempfile::TempDir,
    vm: Vm,
    started: u32,
}

impl Scene {
    fn new() -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let vm = Vm::boot(dir.path(), "first", &spec())?;
        Ok(Self {
            dir,
            vm,
            started: 0,
        })
    }

    fn dir(&self) -> &Path {
        self.dir.path()
    }

    fn destination(&mut self) -> Result<Ferry> {
        self.started += 1;
        Ferry::start(self.dir.path(), &format!("host{}", self.started), &[])
    }

    fn unix(&self) -> Route {
        Route::unix(self.dir.path())
    }

    /// The guest moves to `destination` in peace.
    fn migrate(&mut self, destination: Ferry) -> Result<()> {
        let route = self.unix();
        let (left, _) = self.vm.migrate(destination, &route)?;
        left.shut_down()?;
        self.vm.verify_clean().map(drop)
    }
}

/// The connection is cut at each place; then the guest moves to the same destination.
fn cut_everywhere(scene: &mut Scene, route: impl Fn(&Path) -> Result<Route>) -> Result<()> {
    for (kind, nth, verdict) in PLACES {
        let place = format!("{verdict:?} {kind:?} {nth}");
        let mut destination = scene.destination()?;
        let cut = at(kind, nth, move |_| verdict);
        let (route, _proxy) = route(scene.dir())?.through(scene.dir(), cut)?;
        let why = scene.vm.migrate_in_vain(&destination, &route, SOON);
        println!("{place}: {}", why.with_context(|| place.clone())?);
        check_nothing_arrived(&mut destination).with_context(|| place.clone())?;
        scene.migrate(destination).with_context(|| place.clone())?;
    }
    Ok(())
}

#[test]
fn a_cut_connection_on_a_unix_socket() -> Result<()> {
    let Some(_turn) = host::turn("a_cut_connection_on_a_unix_socket")? else {
        return Ok(());
    };
    cut_everywhere(&mut Scene::new()?, |dir| Ok(Route::unix(dir)))
}

#[test]
fn a_cut_connection_over_tcp() -> Result<()> {
    let Some(_turn) = host::turn("a_cut_connection_over_tcp")? else {
        return Ok(());
    };
    cut_everywhere(&mut Scene::new()?, |_| Route::tcp())
}

/// A judge that kills a process at a frame, which still goes on to whoever is left.
fn kill_at(kind: Kind, nth: u32, pid: u32) -> Result<Judge> {
    let pid = Pid::from_raw(i32::try_from(pid)?).context("no process")?;
    Ok(at(kind, nth, move |_| {
        // Gone already is as good.
        let _ = kill_process(pid, Signal::KILL);
        Verdict::Pass
    }))
}

#[test]
fn a_killed_destination() -> Result<()> {
    let Some(_turn) = host::turn("a_killed_destination")? else {
        return Ok(());
    };
    let mut scene = Scene::new()?;
    for (kind, nth, _) in PLACES {
        let mut destination = scene.destination()?;
        let judge = kill_at(kind, nth, destination.process.id())?;
        // A Ready that arrived would be answered by a commit, of which nobody knows who heard it.
        let judge = if kind == Kind::Ready {
            and_cut(judge, kind)
        } else {
            judge
        };
        let (route, _proxy) = scene.unix().through(scene.dir(), judge)?;
        let why = scene.vm.migrate_in_vain(&destination, &route, SOON);
        println!(
            "killed at {kind:?}: {}",
            why.with_context(|| format!("{kind:?}"))?
        );
        destination.process.wait(SOON)?;
        let destination = scene.destination()?;
        scene
            .migrate(destination)
            .with_context(|| format!("{kind:?}"))?;
    }
    Ok(())
}

/// The same judge, but frames of a kind do not arrive.
fn and_cut(mut judge: Judge, kind: Kind) -> Judge {
    Box::new(move |frame: &mut Frame| match judge(frame) {
        Verdict::Pass if frame.kind == kind => Verdict::CutBefore,
        verdict => verdict,
    })
}

/// A source that dies before the commit takes its guest with it: nothing runs at the destination.
#[test]
fn a_killed_source() -> Result<()> {
    let Some(_turn) = host::turn("a_killed_source")? else {
        return Ok(());
    };
    for (kind, nth) in [
        (Kind::Accept, 1),
        (Kind::Pages, 5),
        (Kind::DeviceChunk, 1),
        (Kind::Ready, 1),
    ] {
        let mut scene = Scene::new()?;
        let mut destination = scene.destination()?;
        let judge = kill_at(kind, nth, scene.vm.ferry.process.id())?;
        let (route, _proxy) = scene.unix().through(scene.dir(), judge)?;
        route.open(&destination)?;
        route.go(&scene.vm.ferry)?;
        scene.vm.ferry.process.wait(SOON)?;
        check_nothing_arrived(&mut destination).with_context(|| format!("{kind:?}"))?;
        destination.shut_down()?;
    }
    Ok(())
}

/// The one point at which no protocol can know: the guest may stand still, but not run twice.
#[test]
fn a_lost_commit_never_makes_two() -> Result<()> {
    let Some(_turn) = host::turn("a_lost_commit_never_makes_two")? else {
        return Ok(());
    };
    let mut scene = Scene::new()?;
    let mut destination = scene.destination()?;
    let cut = at(Kind::Commit, 1, |_| Verdict::CutBefore);
    let (route, _proxy) = scene.unix().through(scene.dir(), cut)?;
    route.open(&destination)?;
    route.go(&scene.vm.ferry)?;
    let status = scene.vm.ferry.wait_migration(SOON)?;
    ensure!(
        status["aborted"].to_string().contains("stays paused"),
        "{status}"
    );
    ensure!(scene.vm.ferry.state()? == "Paused");
    check_nothing_arrived(&mut destination)?;

    // The operator has looked, and lets it go on where it is; later it moves all the same.
    scene.vm.ferry.api.put("vm.resume", None)?;
    scene.vm.check_runs()?;
    scene.vm.verify_clean()?;
    scene.migrate(destination)
}

#[test]
fn a_lost_confirmation_leaves_the_guest_at_the_destination() -> Result<()> {
    let Some(_turn) = host::turn("a_lost_confirmation_leaves_the_guest_at_the_destination")? else {
        return Ok(());
    };
    let mut scene = Scene::new()?;
    let destination = scene.destination()?;
    let cut = at(Kind::Running, 1, |_| Verdict::CutBefore);
    let (route, _proxy) = scene.unix().through(scene.dir(), cut)?;
    route.open(&destination)?;
    route.go(&scene.vm.ferry)?;
    let status = scene.vm.ferry.wait_migration(SOON)?;
    ensure!(
        status["aborted"].to_string().contains("stays paused"),
        "{status}"
    );
    ensure!(scene.vm.ferry.state()? == "Paused");
    let there = destination.wait_migration(SOON)?;
    ensure!(phase_name(&there) == "running", "{there}");
    let left = scene.vm.follow(destination)?;
    scene.vm.check_runs()?;
    scene.vm.verify_clean()?;
    ensure!(left.state()? == "Paused");
    left.api.put("vm.delete", None)?;
    ensure!(!left.has_vm()?);
    left.shut_down()
}

/// A frame that was changed on its way is noticed, at whichever side.
#[test]
fn a_damaged_frame() -> Result<()> {
    let Some(_turn) = host::turn("a_damaged_frame")? else {
        return Ok(());
    };
    let mut scene = Scene::new()?;
    for kind in [
        Kind::Manifest,
        Kind::Accept,
        Kind::Pages,
        Kind::RoundAck,
        Kind::DeviceChunk,
    ] {
        let mut destination = scene.destination()?;
        let damage = at(kind, 1, |frame| {
            if let Some(byte) = frame.bytes_mut().last_mut() {
                *byte ^= 1;
            }
            Verdict::Pass
        });
        let (route, _proxy) = scene.unix().through(scene.dir(), damage)?;
        let why = scene.vm.migrate_in_vain(&destination, &route, SOON);
        let why = why.with_context(|| format!("{kind:?}"))?;
        println!("damaged {kind:?}: {why}");
        let named = why.contains("corrupted") && why.contains(&format!("{kind:?}"));
        ensure!(named, "{kind:?}: {why}");
        check_nothing_arrived(&mut destination)?;
        destination.shut_down()?;
    }
    Ok(())
}

/// A peer that says nothing any more, without the connection's end, is given up in bounded time.
#[test]
fn silence_ends() -> Result<()> {
    let Some(_turn) = host::turn("silence_ends")? else {
        return Ok(());
    };
    let mut scene = Scene::new()?;
    // Before and after the guest stopped; how long it may have stood still. With the source's 2 s
    // of patience go scheduling on a loaded machine and the device states.
    for (kind, most) in [(Kind::Pages, None), (Kind::Complete, Some(4_000_000))] {
        let mut destination = scene.destination()?;
        let silence = at(kind, 1, |_| Verdict::Silence);
        let (route, proxy) = scene.unix().through(scene.dir(), silence)?;
        scene.vm.reset_gap()?;
        let begun = Instant::now();
        let why = scene.vm.migrate_in_vain(&destination, &route, SOON);
        let why = why.with_context(|| format!("{kind:?}"))?;
        let gap = scene.vm.last_tick()?.max_gap_us;
        println!(
            "silence at {kind:?}: after {:.1?}, the guest stood {gap} µs: {why}",
            begun.elapsed()
        );
        if let Some(most) = most {
            ensure!((1_500_000..most).contains(&gap), "{kind:?}: {gap} µs");
        }
        check_nothing_arrived(&mut destination)?;
        drop(proxy);
        scene.migrate(destination)?;
    }
    Ok(())
}

#[test]
fn cancelling_while_memory_is_copied() -> Result<()> {
    let Some(_turn) = host::turn("cancelling_while_memory_is_copied")? else {
        return Ok(());
    };
    let mut scene = Scene::new()?;
    let mut destination = scene.destination()?;
    // 48 MiB take some seconds.
    let route = scene.unix().sending(json!({"max_bandwidth": 8 << 20}));
    route.open(&destination)?;
    route.go(&scene.vm.ferry)?;
    wait_for("pages", SOON, || {
        let status = scene.vm.ferry.migration()?;
        let sent = status["pages"].as_u64().unwrap_or_default();
        Ok((phase_name(&status) == "precopy" && sent > 1000).then_some(()))
    })?;
    // Meanwhile nothing else may change the VM.
    let refused = scene.vm.ferry.api.request(Method::PUT, "vm.pause", None)?;
    ensure!(refused.status == 409, "{refused:?}");
    let asked = Instant::now();
    scene.vm.ferry.api.put("vm.cancel-migration", None)?;
    let status = scene.vm.ferry.wait_migration(SOON)?;
    let took = asked.elapsed();
    println!("cancelled within {took:.1?}: {}", status["aborted"]);
    ensure!(took < Duration::from_secs(2), "{took:?}");
    ensure!(status["aborted"].to_string().contains("cancel"), "{status}");
    let why = scene.vm.stays(SOON)?;
    ensure!(why.contains("cancel"), "{why}");
    check_nothing_arrived(&mut destination)?;
    scene.migrate(destination)
}
