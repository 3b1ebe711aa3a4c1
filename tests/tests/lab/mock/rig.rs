//! A stock guest whose mock devices write its memory, and two processes between which it goes.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use e2e::ferry::{Ferry, phase_name};
use e2e::linux::{Kernel, Linux, LinuxConfig, console_path};
use e2e::migration::Route;
use e2e::process::wait_for;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::device::{DEVICES, Mock};

/// How long a migration may take here: half a GiB of state takes minutes on a host that does more.
pub(super) const LIMIT: Duration = Duration::from_secs(900);
/// The name of the guest's job that drives the devices.
const JOB: &str = "dma";
/// Pages that each device writes, over and over.
const PAGES: u32 = 1000;
/// The processes' names.
const NAMES: [&str; 2] = ["a", "b"];

/// What a guest's devices are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Shape {
    /// `VFIO_MIGRATION_*` flags: STOP_COPY 1, P2P 2, PRE_COPY 4.
    pub(super) flags: u8,
    /// How many.
    pub(super) devices: usize,
    /// Whether they log their DMA.
    pub(super) dirty_log: bool,
}

impl Shape {
    /// One device that logs, with these flags.
    pub(super) const fn one(flags: u8) -> Self {
        Self {
            flags,
            devices: 1,
            dirty_log: true,
        }
    }

    /// Its flags in words.
    pub(super) fn flags_name(self) -> String {
        let names = [(1, "STOP_COPY"), (2, "P2P"), (4, "PRE_COPY")];
        let has = names.into_iter().filter(|(bit, _)| self.flags & bit != 0);
        let names: Vec<_> = has.map(|(_, name)| name).collect();
        match names.is_empty() {
            true => "none".to_owned(),
            false => names.join("+"),
        }
    }

    /// The dirty source in the words of `vm.info`.
    pub(super) const fn dirty_source(self) -> &'static str {
        match self.dirty_log {
            true => "device DMA log",
            false => "VFIO container bitmaps",
        }
    }
}

/// A migration that was.
#[derive(Clone, Debug)]
pub(super) struct Moved {
    /// What the source said last.
    pub(super) status: Value,
    /// What the guest found when it had arrived.
    pub(super) arrival: Value,
}

impl Moved {
    /// Pages and words that are not as the devices wrote them.
    pub(super) fn corrupt(&self) -> u64 {
        wrong(&self.arrival)
    }

    /// A time of the downtime's breakdown.
    pub(super) fn downtime(&self, part: &str) -> Duration {
        Duration::from_micros(number(&self.status["downtime"], part))
    }

    /// From the start to the end.
    pub(super) fn total(&self) -> Duration {
        Duration::from_millis(number(&self.status, "elapsed_ms"))
    }
}

/// How many things a line of the checker's calls wrong.
pub(super) fn wrong(line: &Value) -> u64 {
    let keys = [
        "stale",
        "foreign",
        "torn",
        "trespassed",
        "doorbells_wrong",
        "peer_wrong",
    ];
    keys.iter().map(|key| number(line, key)).sum()
}

pub(super) fn number(value: &Value, key: &str) -> u64 {
    value[key].as_u64().unwrap_or_default()
}

/// How a migration ended.
#[derive(Clone, Debug)]
pub(super) enum End {
    /// It was refused or failed: why, by the source. The guest is still here.
    Failed(String),
    /// The guest is at the destination.
    Moved(Box<Moved>),
}

/// A running guest.
pub(super) struct Rig {
    /// The guest, where it is.
    pub(super) linux: Linux,
    /// The process where it is not.
    pub(super) spare: Option<Ferry>,
    /// What its devices are.
    pub(super) shape: Shape,
    dir: TempDir,
    /// Which half of the host's devices it has.
    side: usize,
    /// How often its checker has arrived somewhere.
    arrivals: u64,
}

impl Rig {
    /// Boots a guest and has its devices write.
    pub(super) fn boot(shape: Shape) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let mut devices = Vec::new();
        restore(shape)?;
        for (number, mock) in half(0, shape.devices).enumerate() {
            devices.push("--device".to_owned());
            devices.push(format!("path={},id=mock{number}", mock.path().display()));
        }
        let options: Vec<&str> = devices.iter().map(String::as_str).collect();
        let config = LinuxConfig::new(Kernel::Cloud6_12)
            .memory_mib(80 + 16 * u32::try_from(shape.devices)?)
            // What is free is zero, so that it costs little to move.
            .cmdline("init_on_free=1")
            .options(&options);
        let linux = Linux::boot(dir.path(), NAMES[0], &config)?;
        let mut rig = Self {
            linux,
            spare: Some(Ferry::start(dir.path(), NAMES[1], &[])?),
            shape,
            dir,
            side: 0,
            arrivals: 0,
        };
        rig.drive()?;
        Ok(rig)
    }

    /// Starts the guest's checker, which sets the devices up afresh.
    pub(super) fn drive(&mut self) -> Result<()> {
        let devices = self.shape.devices;
        // The checker leaves its huge pages to devices that may still write; these do not.
        self.linux
            .shell
            .ask("echo 0 > /proc/sys/vm/nr_hugepages; rm -f /tmp/dma.*")?;
        self.linux.shell.start_job(
            JOB,
            &format!(
                "guest_net mock-dma --pages {PAGES} --step 7 --rate 600 --record 256 \
                 --devices {devices} --pause 200"
            ),
        )?;
        self.arrivals = 0;
        let ready = Duration::from_secs(60);
        self.linux.shell.wait_job_says(JOB, "\"ready\"", ready)
    }

    /// Has the checker end; whether it found everything right.
    pub(super) fn rest(&mut self) -> Result<bool> {
        self.linux.shell.stop_job(JOB)?;
        let end = self.linux.shell.end_job(JOB, Duration::from_secs(60))?;
        match end.status {
            0 => Ok(true),
            1 => Ok(false),
            status => bail!("the checker ended with {status}: {}", end.output),
        }
    }

    /// The checker must have found everything right; switches the guest off.
    pub(super) fn finish(mut self) -> Result<()> {
        let log = self.linux.shell.ask("tail -n 2 /tmp/dma.log")?;
        ensure!(self.rest()?, "the guest's checker found wrong data: {log}");
        self.end()
    }

    /// Switches the guest off.
    pub(super) fn end(self) -> Result<()> {
        let mut linux = self.linux;
        linux.shell.send("exit 0")?;
        // Where it was booted the process ends with it, elsewhere not.
        let ended = wait_for("the guest's end", Duration::from_secs(60), || {
            let told = linux.ferry.event_names().iter().any(|e| e == "shutdown");
            Ok((told || !linux.ferry.process.is_running()).then_some(()))
        });
        ended.with_context(|| linux.ferry.last_words())
    }

    /// The devices that the guest has.
    pub(super) fn here(&self) -> Vec<Mock> {
        half(self.side, self.shape.devices).collect()
    }

    /// Those that it gets when it moves.
    pub(super) fn there(&self) -> Vec<Mock> {
        half(1 - self.side, self.shape.devices).collect()
    }

    /// No device shall do wrong any more.
    pub(super) fn restore(&self) -> Result<()> {
        restore(self.shape)
    }

    /// The names of the events of the process where the guest is not.
    pub(super) fn spare_events(&self) -> Vec<String> {
        self.spare
            .as_ref()
            .map_or_else(Vec::new, Ferry::event_names)
    }

    /// Both.
    pub(super) fn all(&self) -> Vec<Mock> {
        [self.here(), self.there()].concat()
    }

    /// Where it goes next, over TCP, with these properties of `vm.send-migration`.
    fn route(&self, send: Value) -> Result<Route> {
        let name = NAMES[1 - self.side];
        let devices: Vec<Value> = (self.there().iter().enumerate())
            .map(|(number, mock)| json!({"id": format!("mock{number}"), "path": mock.path()}))
            .collect();
        let console = console_path(self.dir.path(), name);
        Ok(Route::tcp()?.sending(send).receiving(json!({
            "devices": devices,
            "console": {"mode": "Socket", "socket": console},
        })))
    }

    /// Starts a migration; the error of `vm.send-migration` if it is refused at once.
    pub(super) fn start(&mut self, send: Value) -> Result<Result<(), String>> {
        let route = self.route(send)?;
        let spare = self.spare.as_ref().context("no other process")?;
        route.open(spare)?;
        Ok(route
            .go(&self.linux.ferry)
            .map_err(|error| format!("{error:#}")))
    }

    /// Waits for the end of a migration that was started.
    pub(super) fn end_of_migration(&mut self, limit: Duration) -> Result<End> {
        let status = self.linux.ferry.wait_migration(limit);
        let status = status.with_context(|| self.about())?;
        if phase_name(&status) != "done" {
            let why = status["aborted"].as_str().context("no reason")?;
            return Ok(End::Failed(why.to_owned()));
        }
        let spare = self.spare.take().context("no other process")?;
        let there = spare.wait_migration(limit)?;
        ensure!(phase_name(&there) == "running", "destination: {there}");
        let left = self.linux.follow(self.dir.path(), spare)?;
        ensure!(!left.has_vm()?, "the source still has a VM");
        self.spare = Some(left);
        self.side = 1 - self.side;
        let arrival = self.arrival()?;
        Ok(End::Moved(Box::new(Moved { status, arrival })))
    }

    /// Moves the guest, which must succeed.
    pub(super) fn migrate(&mut self, send: Value) -> Result<Moved> {
        if let Err(why) = self.start(send)? {
            bail!("refused: {why}");
        }
        match self.end_of_migration(LIMIT)? {
            End::Moved(moved) => Ok(*moved),
            End::Failed(why) => bail!("{why}\n{}", self.about()),
        }
    }

    /// What both processes say.
    fn about(&self) -> String {
        let spare = self.spare.as_ref();
        let there = spare.map_or_else(String::new, |spare| {
            let status = spare.migration().unwrap_or_default();
            format!("destination: {status}\n{}", spare.process.output())
        });
        let here = self.linux.ferry.migration().unwrap_or_default();
        format!("source: {here}\n{}\n{there}", self.linux.ferry.last_words())
    }

    /// What the checker says when it has arrived once more.
    fn arrival(&mut self) -> Result<Value> {
        self.arrivals += 1;
        let wanted = self.arrivals;
        let line = wait_for("the guest's arrival", Duration::from_secs(60), || {
            let line = self.last_line("arrived")?;
            Ok(line.filter(|line| number(line, "arrivals") >= wanted))
        });
        let line = line.with_context(|| self.about())?;
        let pages = u64::from(PAGES) * u64::try_from(self.shape.devices)?;
        ensure!(
            number(&line, "checked") == pages && number(&line, "arrivals") == wanted,
            "not every page was looked at, once: {line}"
        );
        Ok(line)
    }

    /// The checker's last line about `event`.
    fn last_line(&mut self, event: &str) -> Result<Option<Value>> {
        let command = format!("grep -F '\"event\":\"{event}\"' /tmp/dma.log | tail -n 1");
        let line = self.linux.shell.ask(&command)?;
        // One that is being written comes whole the next time.
        Ok(serde_json::from_str(line.trim()).ok())
    }

    /// Waits until the devices have gone on writing for a while; what the checker says then.
    pub(super) fn goes_on(&mut self) -> Result<Value> {
        let before = self.last_line("progress")?.unwrap_or_default();
        let began = Instant::now();
        wait_for("the devices' DMA", Duration::from_secs(60), || {
            let line = self.last_line("progress")?.unwrap_or_default();
            // A second line, so that one of them began after now.
            let more = number(&line, "checked") > number(&before, "checked");
            let later = began.elapsed() > Duration::from_secs(2);
            Ok((more && later).then_some(line))
        })
    }
}

/// Has all devices of the host be as `shape` says, and do no wrong.
fn restore(shape: Shape) -> Result<()> {
    for mock in (0..2).flat_map(|side| half(side, DEVICES)) {
        mock.restore()?;
        mock.set("config/migration_flags", shape.flags)?;
        mock.set("config/dirty_log", u8::from(shape.dirty_log))?;
    }
    Ok(())
}

/// One process' devices, the first `count` of them.
fn half(side: usize, count: usize) -> impl Iterator<Item = Mock> {
    (side * DEVICES..).map(Mock).take(count.min(DEVICES))
}
