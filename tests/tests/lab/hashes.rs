//! What a guest's driver gets as hash of each received packet, against an independent computation.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::linux::Linux;
use serde_json::Value;

use crate::toeplitz::{hash_input, toeplitz};

/// First destination port of test packets; nobody listens there.
const FIRST_PORT: u16 = 21000;
/// Flows of each kind.
const FLOWS: u16 = 8;

/// What the guest's driver has for the hash of received packets.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Settings {
    pub(crate) on: bool,
    key: Vec<u8>,
}

/// Asks for the settings of `interface`, or changes them: `verb` is `show`, `on` or `off`.
pub(crate) fn settings(linux: &mut Linux, interface: &str, verb: &str) -> Result<Settings> {
    let command = format!("guest_net ethtool-rxhash {verb} --iface {interface}");
    let line: Value = serde_json::from_str(&linux.shell.ask(&command)?)?;
    let key = line["key"].as_str().context("no key")?;
    let key = (0..key.len() / 2).map(|at| u8::from_str_radix(&key[2 * at..2 * at + 2], 16));
    Ok(Settings {
        on: line["on"].as_bool().context("no state")?,
        key: key.collect::<Result<_, _>>()?,
    })
}

/// What was seen of hashes.
#[derive(Debug)]
pub(crate) struct Seen {
    /// Packets by kind, `TCPv4` and so on.
    pub(crate) kinds: BTreeMap<String, usize>,
    /// Receive queues they came by.
    pub(crate) queues: BTreeSet<u64>,
}

/// Sends flows of TCP and UDP over each of `addresses`, which the guest has on `interface`, and
/// compares the hash of each packet that its driver got there with what `key` says.
pub(crate) fn check(
    linux: &mut Linux,
    interface: &str,
    addresses: &[IpAddr],
    settings: &Settings,
) -> Result<Seen> {
    ensure!(settings.on, "the hash is off");
    // The longest input is two IPv6 addresses and two ports, 36 bytes, and a window of 32 bits.
    ensure!(settings.key.len() >= 40, "a short key: {settings:?}");
    let command = format!("guest_net rxhash --iface {interface}");
    linux.shell.start_job("rxhash", &command)?;
    let listening = Duration::from_secs(30);
    linux
        .shell
        .wait_job_says("rxhash", "listening", listening)?;
    for address in addresses {
        send_udp(*address)?;
        send_tcp(*address);
    }
    // The guest's program looks at packets after its network has.
    std::thread::sleep(Duration::from_secs(1));
    linux.shell.stop_job("rxhash")?;
    let status = linux.shell.wait_job("rxhash", Duration::from_secs(60))?;
    // The console is slow: neither the packets of streams nor what is in the others.
    let output = linux.shell.ask(
        "grep -v -E '\"(source|destination)_port\":7[0-9]{3},' /tmp/rxhash.log | sed 's/,\"head\".*/}/'",
    )?;
    ensure!(status == 0, "{output}");
    compare(&output, &settings.key)
}

fn send_udp(to: IpAddr) -> Result<()> {
    let any: IpAddr = match to {
        IpAddr::V4(_) => [0; 4].into(),
        IpAddr::V6(_) => [0; 16].into(),
    };
    for flow in 0..FLOWS {
        let socket = UdpSocket::bind((any, 0))?;
        for size in [1, 100, 1400] {
            socket.send_to(&vec![0x5a; size], (to, FIRST_PORT + flow))?;
        }
    }
    Ok(())
}

/// Connections that the guest refuses: their first packets have come there when that is known here.
fn send_tcp(to: IpAddr) {
    for flow in 0..FLOWS {
        let to = SocketAddr::new(to, FIRST_PORT + flow);
        // Refused, as it must be; one that got lost is missed in the counts.
        let _ = TcpStream::connect_timeout(&to, Duration::from_secs(5));
    }
}

/// Compares what the guest's `rxhash` printed with what must be.
fn compare(output: &str, key: &[u8]) -> Result<Seen> {
    let mut seen = Seen {
        kinds: BTreeMap::new(),
        queues: BTreeSet::new(),
    };
    for line in output.lines() {
        let line: Value = serde_json::from_str(line).with_context(|| line.to_owned())?;
        if line["event"] == "done" {
            ensure!(line["missed"] == 0, "packets were not looked at: {line}");
        }
        if line["event"] != "packet" {
            continue;
        }
        let address = |name: &str| {
            line[name]
                .as_str()
                .context("no address")?
                .parse()
                .map_err(anyhow::Error::from)
        };
        let port = |name: &str| {
            line[name]
                .as_u64()
                .and_then(|port| u16::try_from(port).ok())
        };
        let ports = port("source_port").zip(port("destination_port"));
        let input = hash_input(address("source")?, address("destination")?, ports);
        let wanted = u64::from(toeplitz(key, &input));
        ensure!(line["hash"] == wanted, "not {wanted:#010x}: {line}");
        let protocol = match line["protocol"].as_u64() {
            Some(6) => "TCP",
            Some(17) => "UDP",
            _ => "IP",
        };
        *seen
            .kinds
            .entry(format!("{protocol}v{}", line["version"]))
            .or_default() += 1;
        seen.queues.extend(line["rx_queue"].as_u64());
    }
    let enough = usize::from(FLOWS);
    for kind in ["TCPv4", "TCPv6", "UDPv4", "UDPv6"] {
        let count = seen.kinds.get(kind).copied().unwrap_or(0);
        ensure!(count >= enough, "{count} packets of {kind}: {seen:?}");
    }
    Ok(seen)
}
