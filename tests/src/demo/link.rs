//! The network of the demo: for each NIC a bridge with the host's addresses, and two taps, of
//! which the one of the side that has the guest is in the bridge.

use std::fs;
use std::io::Write;
use std::net::IpAddr;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};

use crate::netns::{add_tap, ip};
use crate::traffic::{Traffic, TrafficConfig};

/// How often the link's mover looks for the event.
const WATCH: Duration = Duration::from_millis(1);
/// The event by which the destination says that the guest runs there.
const ARRIVED: &str = "migration-receive-finished";

/// One end of the migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// Where the guest was.
    Source,
    /// Where it goes.
    Destination,
}

/// The link of one NIC.
#[derive(Clone, Copy, Debug)]
pub(super) struct Link {
    index: u8,
}

impl Link {
    /// Makes the bridge and taps; the source's is connected.
    pub(super) fn new(index: u8) -> Result<Self> {
        let link = Self { index };
        let bridge = link.bridge();
        // An address of its own: one borrowed from a port would change with the ports, and the
        // kernel forgets all neighbours of an interface whose address changes.
        let own = format!("52:54:00:fe:01:{index:02x}");
        ip(&["link", "add", &bridge, "address", &own, "type", "bridge"])?;
        ip(&[
            "addr",
            "add",
            &format!("{}/24", link.host4()),
            "dev",
            &bridge,
        ])?;
        let six = format!("{}/64", link.host6());
        ip(&["addr", "add", &six, "dev", &bridge, "nodad"])?;
        ip(&["link", "set", &bridge, "up"])?;
        for end in [End::Source, End::Destination] {
            add_tap(&link.tap(end), 1, &[])?;
        }
        ip(&["link", "set", &link.tap(End::Source), "master", &bridge])?;
        Ok(link)
    }

    /// The bridge; the host's end.
    pub(super) fn bridge(self) -> String {
        format!("demo{}", self.index)
    }

    /// The tap of one end.
    pub(super) fn tap(self, end: End) -> String {
        let end = match end {
            End::Source => "src",
            End::Destination => "dst",
        };
        format!("demo{}{end}", self.index)
    }

    /// The guest's hardware address.
    pub(super) fn mac(self) -> String {
        format!("52:54:00:fe:00:{:02x}", self.index + 1)
    }

    pub(super) fn host4(self) -> String {
        format!("10.80.{}.1", self.index)
    }

    pub(super) fn guest4(self) -> String {
        format!("10.80.{}.2", self.index)
    }

    pub(super) fn host6(self) -> String {
        format!("fd80:{}::1", self.index)
    }

    pub(super) fn guest6(self) -> String {
        format!("fd80:{}::2", self.index)
    }

    /// Starts numbered packets, IPv4 and IPv6 in turn, that the native guest echoes.
    pub(super) fn start_traffic(self, packets_per_second: u32) -> Result<Traffic> {
        let address = |text: String| text.parse::<IpAddr>();
        Traffic::start(&TrafficConfig {
            interface: self.bridge(),
            guest_mac: self.mac(),
            addresses: vec![
                (address(self.host4())?, address(self.guest4())?),
                (address(self.host6())?, address(self.guest6())?),
            ],
            flows: 4,
            payload: 900,
            packets_per_second,
        })
    }
}

/// Moves links to the destination, all with one run of `ip`.
fn move_links(links: &[Link]) -> Result<()> {
    let mut orders = String::new();
    for link in links {
        let (bridge, from, to) = (
            link.bridge(),
            link.tap(End::Source),
            link.tap(End::Destination),
        );
        // In this order, so that the bridge always has a carrier.
        orders += &format!("link set {to} master {bridge}\nlink set {from} nomaster\n");
    }
    let mut child = Command::new("ip")
        .args(["-batch", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .context("cannot run ip (iproute2)")?;
    if let Some(mut input) = child.stdin.take() {
        input.write_all(orders.as_bytes())?;
    }
    let status = child.wait()?;
    if !status.success() {
        bail!("ip cannot move the links: {status}");
    }
    Ok(())
}

/// Plays the network's part in a migration: moves the links as soon as the destination says in its
/// events that the guest runs there.
pub(super) struct LinkMover {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl LinkMover {
    /// Watches `events`, the destination's event file, from now on.
    pub(super) fn start(links: Vec<Link>, events: PathBuf) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let asked = Arc::clone(&stop);
        let thread = thread::Builder::new()
            .name("link-mover".to_owned())
            .spawn(move || {
                while !asked.load(Ordering::Relaxed) {
                    // Events come line by line, and there are few.
                    if fs::read_to_string(&events).is_ok_and(|text| text.contains(ARRIVED)) {
                        return move_links(&links);
                    }
                    thread::sleep(WATCH);
                }
                bail!("the guest arrived without an event {ARRIVED}")
            })?;
        Ok(Self {
            stop,
            thread: Some(thread),
        })
    }

    /// To be called once the guest has arrived: waits until the links have moved.
    pub(super) fn finish(mut self) -> Result<()> {
        let Some(thread) = self.thread.take() else {
            return Ok(());
        };
        // The event may be written a moment after the status says so.
        for _ in 0..1000 {
            if thread.is_finished() {
                break;
            }
            thread::sleep(WATCH);
        }
        self.stop.store(true, Ordering::Relaxed);
        thread
            .join()
            .map_err(|_| anyhow!("the link's mover panicked"))?
    }
}

impl Drop for LinkMover {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}
