//! A guest behind a bridge, to which frames are sent and which looks at each of them.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::ferry::Ferry;
use e2e::linux::{Kernel, Linux, LinuxConfig, console_path};
use e2e::migration::{Route, ensure_moved};
use e2e::netns;
use e2e::process::wait_for;
use serde_json::{Value, json};
use test_packets::packet;

use super::sender::{Frames, Sender, Taken};

const BRIDGE: &str = "mixed";
const TAPS: [&str; 2] = ["mixeda", "mixedb"];
const MAC: &str = "52:54:00:79:00:01";
const MAC_BYTES: [u8; 6] = [0x52, 0x54, 0x00, 0x79, 0x00, 0x01];
/// How long a migration may take here.
const MIGRATION: Duration = Duration::from_secs(240);

/// What the guest looks at, as `guest_net reports` has it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum View {
    /// The hash that the driver gave the kernel.
    Skb,
    /// The device's header.
    Xdp,
}

/// One stream of frames.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Run<'a> {
    pub(crate) view: View,
    pub(crate) seed: u64,
    pub(crate) count: u32,
    pub(crate) per_second: u32,
    /// Changes of settings; see `guest_net --help`.
    pub(crate) plan: &'a str,
}

/// What came of a stream.
#[derive(Debug)]
pub(crate) struct Outcome {
    /// The guest's last line.
    pub(crate) done: Value,
    /// Its lines about wrong frames and changes.
    pub(crate) about: String,
    /// Frames that were sent.
    pub(crate) sent: u64,
    /// Of these, those that the guest could see.
    pub(crate) visible: u64,
    /// What each tap did with them.
    pub(crate) taken: [Taken; 2],
}

impl Outcome {
    /// A number of the guest's last line.
    pub(crate) fn number(&self, name: &str) -> u64 {
        self.done[name].as_u64().unwrap_or(u64::MAX)
    }

    /// Numbers of the guest's last line.
    pub(crate) fn numbers(&self, name: &str) -> Vec<u64> {
        let numbers = self.done[name].as_array().into_iter().flatten();
        numbers.filter_map(Value::as_u64).collect()
    }

    /// All reports were right, and no frame that a VMM took from its tap was lost.
    pub(crate) fn check(&self) -> Result<()> {
        let about = || format!("{self:?}");
        ensure!(
            self.number("wrong") == 0 && self.number("steps_left") == 0,
            about()
        );
        let arrived = self.number("seen") + self.number("foreign");
        let invisible = self.sent - self.visible;
        let read = self.taken[0].read + self.taken[1].read;
        ensure!((arrived..=arrived + invisible).contains(&read), about());
        // A tap loses what it has no room for, and what is in it when its reader leaves.
        let moved = self.taken.iter().all(|taken| taken.read > 0);
        let dropped = self.taken.iter().any(|taken| taken.dropped > 0);
        ensure!(
            moved || dropped || self.number("seen") == self.visible,
            about()
        );
        Ok(())
    }
}

/// A bridge with a tap for each end of a migration; they go with this, for a `tun` with taps stays loaded.
struct Network;

impl Network {
    fn new(queues: u16) -> Result<Self> {
        netns::isolate()?;
        // The host has nothing to say here, so that each packet is a test's.
        std::fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1")?;
        netns::ip(&[
            "link",
            "add",
            BRIDGE,
            "type",
            "bridge",
            "mcast_snooping",
            "0",
        ])?;
        netns::ip(&["link", "set", BRIDGE, "up"])?;
        let this = Self;
        for tap in TAPS {
            netns::add_tap(tap, queues, &[])?;
            netns::ip(&["link", "set", tap, "master", BRIDGE])?;
        }
        Ok(this)
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for tap in TAPS {
            // One that was not made yet cannot be removed, and need not be.
            let _ = netns::ip(&["link", "del", tap]);
        }
    }
}

/// A guest with one card, whose tap is on a bridge.
pub(crate) struct Scene {
    linux: Linux,
    // Behind the guest, which has its tap open.
    _network: Network,
    interface: String,
    end: usize,
}

impl Scene {
    /// Boots the guest. `options` are more of `--net`.
    pub(crate) fn new(dir: &Path, kernel: Kernel, pairs: u8, options: &str) -> Result<Self> {
        let network = Network::new(pairs.into())?;
        let net = format!(
            "id=net0,tap={},mac={MAC},num_queues={},{options}",
            TAPS[0],
            2 * pairs
        );
        let config = LinuxConfig::new(kernel)
            .vcpus(pairs)
            .options(&["--net", &net]);
        let mut linux = Linux::boot(dir, "a", &config)?;
        let interface = linux
            .shell
            .ask(&format!("cd /sys/class/net && grep -l {MAC} */address"))?;
        let interface = interface.trim().trim_end_matches("/address").to_owned();
        linux.shell.ask(&format!(
            "echo 1 > /proc/sys/net/ipv6/conf/{interface}/disable_ipv6 && \
             ip link set {interface} up && ip addr add 10.79.0.2/24 dev {interface}"
        ))?;
        let scene = Self {
            linux,
            _network: network,
            interface,
            end: 0,
        };
        scene.expect_guest_at(0)?;
        Ok(scene)
    }

    /// Has the bridge know where the guest is, until the guest says otherwise.
    fn expect_guest_at(&self, end: usize) -> Result<()> {
        let arguments = ["fdb", "replace", MAC, "dev", TAPS[end], "master", "dynamic"];
        let status = std::process::Command::new("bridge")
            .args(arguments)
            .status()?;
        ensure!(status.success(), "bridge {}", arguments.join(" "));
        Ok(())
    }

    /// Sends frames, does `meanwhile` with the guest, and gives what the guest saw.
    pub(crate) fn run(
        &mut self,
        run: Run<'_>,
        meanwhile: impl FnOnce(&mut Self, &Sender) -> Result<()>,
    ) -> Result<Outcome> {
        let view = match run.view {
            View::Skb => "skb",
            View::Xdp => "xdp",
        };
        let plan = if run.plan.is_empty() {
            String::new()
        } else {
            format!("--plan {}", run.plan)
        };
        let command = format!(
            "guest_net reports --iface {} --seed {} --count {} --view {view} {plan}",
            self.interface, run.seed, run.count
        );
        self.linux.shell.start_job("reports", &command)?;
        let shell = &mut self.linux.shell;
        shell.wait_job_says("reports", "listening", Duration::from_secs(120))?;
        let frames = Frames {
            interface: BRIDGE.to_owned(),
            taps: TAPS.map(str::to_owned).to_vec(),
            seed: run.seed,
            count: run.count,
            mac: MAC_BYTES,
            per_second: run.per_second,
        };
        let before = taken()?;
        let sender = Sender::start(&frames)?;
        meanwhile(self, &sender)?;
        let sent = sender.finish()?;
        let output = self.end_of_reports()?;
        let after = taken()?;
        let (done, about) = read_report(&output)
            .with_context(|| format!("{output}\n{}", self.linux.ferry.last_words()))?;
        let is_visible = |number: &u32| match run.view {
            View::Skb => packet(run.seed, *number, MAC_BYTES).untagged().is_some(),
            View::Xdp => true,
        };
        Ok(Outcome {
            done,
            about,
            sent: sent.into(),
            visible: u64::try_from((0..sent).filter(is_visible).count())?,
            taken: [after[0].since(before[0]), after[1].since(before[1])],
        })
    }

    /// The guest has been sent all there is: gives what it says, without its reports of progress.
    fn end_of_reports(&mut self) -> Result<String> {
        let shell = &mut self.linux.shell;
        // Until it has looked at all that came.
        let mut last = String::new();
        loop {
            std::thread::sleep(Duration::from_secs(3));
            let now = shell.ask("tail -n 1 /tmp/reports.log")?;
            if now == last || now.contains("\"done\"") {
                break;
            }
            last = now;
        }
        // One that has seen all has ended.
        shell.run("kill $(cat /tmp/reports.pid)", Duration::from_secs(30))?;
        shell.wait_job("reports", Duration::from_secs(120))?;
        shell.ask("grep -v '\"progress\"' /tmp/reports.log")
    }

    /// Waits until the guest has taken so many steps of its plan.
    pub(crate) fn wait_steps(&mut self, steps: usize, limit: Duration) -> Result<()> {
        let shell = &mut self.linux.shell;
        let command = "grep -c '\"step\"' /tmp/reports.log";
        wait_for(&format!("{steps} changes of settings"), limit, || {
            let answer = shell.run(command, Duration::from_secs(60))?;
            let taken: usize = answer.output.trim().parse()?;
            Ok((taken >= steps).then_some(()))
        })
    }

    /// Its VMM, where it is now.
    pub(crate) const fn ferry(&self) -> &Ferry {
        &self.linux.ferry
    }

    /// Switches the guest off.
    pub(crate) fn end(self) -> Result<()> {
        self.linux.power_off()
    }

    /// Moves the guest to a process of its own called `name`, at the other tap.
    pub(crate) fn migrate(&mut self, dir: &Path, name: &str) -> Result<()> {
        let end = 1 - self.end;
        let destination = Ferry::start(dir, name, &[])?;
        let route = Route::unix(dir)
            .sending(json!({"downtime_ms": 2000}))
            .receiving(json!({
                "net": [{"id": "net0", "tap": TAPS[end]}],
                "console": {"mode": "Socket", "socket": console_path(dir, name)},
            }));
        route.open(&destination)?;
        route.go(&self.linux.ferry)?;
        let status = self.linux.ferry.wait_migration(MIGRATION)?;
        let there = destination.wait_migration(MIGRATION)?;
        ensure_moved((&self.linux.ferry, &status), (&destination, &there))?;
        println!(
            "moved: {} ms, downtime {} µs",
            status["elapsed_ms"], status["downtime"]["total"]
        );
        self.linux.follow(dir, destination)?.shut_down()?;
        self.end = end;
        Ok(())
    }
}

/// What became of packets for each tap, until now.
fn taken() -> Result<[Taken; 2]> {
    let of = |tap: &str| Taken::of(&[tap.to_owned()]);
    Ok([of(TAPS[0])?, of(TAPS[1])?])
}

/// The last line of what the guest said, and its lines about wrong frames and changes.
fn read_report(output: &str) -> Result<(Value, String)> {
    let lines = output.lines().filter(|line| line.starts_with('{'));
    let lines: Vec<Value> = lines.map(serde_json::from_str).collect::<Result<_, _>>()?;
    let done = lines.iter().find(|line| line["event"] == "done");
    let done = done.context("the guest did not come to an end")?.clone();
    let about = lines
        .iter()
        .filter(|line| line["event"] == "wrong" || line["event"] == "step");
    Ok((done, about.map(|line| format!("{line}\n")).collect()))
}
