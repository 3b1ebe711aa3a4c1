//! virtio-net with stock drivers: hashes of received packets, and streams, on one queue and more.

use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::linux::{Kernel, Linux, LinuxConfig, in_lab, wait_reachable};
use e2e::netns;

use crate::hashes;
use crate::streams::{Direction, Stream};

/// `VIRTIO_NET_F_MQ` and `VIRTIO_NET_F_HASH_REPORT` (virtio 1.3, 5.1.3).
const F_MQ: usize = 22;
const F_HASH_REPORT: usize = 57;

/// A NIC of the test's.
struct Nic {
    /// Its place, which is in its addresses.
    index: u8,
    /// Its tap and the rest of `--net`.
    queues: u16,
    options: &'static str,
}

impl Nic {
    fn tap(&self) -> String {
        format!("ln{}", self.index)
    }

    fn mac(&self) -> String {
        format!("52:54:00:78:00:0{}", self.index)
    }

    /// The host's or guest's (`end` 1 or 2) addresses.
    fn addresses(&self, end: u8) -> [String; 2] {
        let index = self.index;
        [
            format!("10.78.{index}.{end}"),
            format!("fd78:{index}::{end}"),
        ]
    }

    fn with_prefixes(&self, end: u8) -> [String; 2] {
        let [v4, v6] = self.addresses(end);
        [format!("{v4}/24"), format!("{v6}/64")]
    }

    /// Makes its tap; gives its `--net`.
    fn add(&self) -> Result<String> {
        let addresses = self.with_prefixes(1);
        netns::add_tap(
            &self.tap(),
            self.queues,
            &addresses.each_ref().map(String::as_str),
        )?;
        let (tap, mac, queues) = (self.tap(), self.mac(), 2 * self.queues);
        Ok(format!(
            "tap={tap},mac={mac},num_queues={queues},{}",
            self.options
        ))
    }

    /// Gives it its addresses in the guest; its name there.
    fn configure(&self, linux: &mut Linux) -> Result<String> {
        let addresses = self.with_prefixes(2);
        let name = linux.add_interface(&self.mac(), &addresses.each_ref().map(String::as_str))?;
        for address in self.guest()? {
            wait_reachable(address, Duration::from_secs(20))?;
        }
        Ok(name)
    }

    fn guest(&self) -> Result<[IpAddr; 2]> {
        let [v4, v6] = self.addresses(2);
        Ok([v4.parse()?, v6.parse()?])
    }
}

/// Whether the driver of `interface` and the device agreed on a feature.
fn has_feature(linux: &mut Linux, interface: &str, feature: usize) -> Result<bool> {
    let features = linux
        .shell
        .ask(&format!("cat /sys/class/net/{interface}/device/features"))?;
    Ok(features
        .as_bytes()
        .get(feature)
        .context("no such feature")?
        == &b'1')
}

/// Streams both ways at once, over IPv4 and IPv6.
fn check_streams(linux: &mut Linux, dir: &Path, nic: &Nic) -> Result<()> {
    let ([guest4, guest6], [host4, host6]) = (nic.addresses(2), nic.addresses(1));
    let streams = [
        ("in4", Direction::In, format!("{guest4}:7004")),
        ("in6", Direction::In, format!("[{guest6}]:7006")),
        ("out4", Direction::Out, format!("{host4}:7014")),
        ("out6", Direction::Out, format!("[{host6}]:7016")),
    ];
    let mut running = Vec::new();
    for (name, direction, receiver) in &streams {
        let name = format!("{}-{name}", nic.tap());
        running.push(Stream::start(
            linux,
            dir,
            &name,
            *direction,
            receiver,
            "--bytes 2000000",
        )?);
    }
    for stream in running {
        let sum = stream.finish(linux)?;
        ensure!(sum.bytes == 2_000_000, "{sum:?}");
    }
    Ok(())
}

/// Switches the hash on, compares that of each packet, and switches it off again.
fn check_hashes(linux: &mut Linux, interface: &str, nic: &Nic) -> Result<()> {
    ensure!(
        has_feature(linux, interface, F_HASH_REPORT)?,
        "no hash reports"
    );
    let settings = hashes::settings(linux, interface, "on")?;
    let seen = hashes::check(linux, interface, &nic.guest()?, &settings)?;
    println!("{}: {:?}", nic.tap(), seen.kinds);
    let queues = u64::from(nic.queues);
    ensure!(
        seen.queues.iter().copied().eq(0..queues),
        "{:?}",
        seen.queues
    );
    ensure!(!hashes::settings(linux, interface, "off")?.on, "not off");
    Ok(())
}

/// One guest with a NIC of each sort.
fn check_nics(test: &str, kernel: Kernel) -> Result<()> {
    if !in_lab(test) {
        return Ok(());
    }
    netns::isolate()?;
    let nics = [
        Nic {
            index: 0,
            queues: 1,
            options: "hash_report=on",
        },
        Nic {
            index: 1,
            queues: 2,
            options: "hash_report=on",
        },
        Nic {
            index: 2,
            queues: 1,
            options: "hash_report=off",
        },
        Nic {
            index: 3,
            queues: 2,
            options: "hash_report=off,mtu=1400",
        },
    ];
    let mut config = LinuxConfig::new(kernel).vcpus(2);
    for nic in &nics {
        config = config.options(&["--net", &nic.add()?]);
    }
    let dir = tempfile::tempdir()?;
    let mut linux = Linux::boot(dir.path(), "linux", &config)?;
    for nic in &nics {
        let interface = nic.configure(&mut linux)?;
        let queues = linux.shell.ask(&format!(
            "ls /sys/class/net/{interface}/queues | grep -c rx"
        ))?;
        ensure!(queues.trim() == nic.queues.to_string(), "{queues} queues");
        let many = has_feature(&mut linux, &interface, F_MQ)?;
        ensure!(
            many == (nic.queues > 1),
            "{}: VIRTIO_NET_F_MQ {many}",
            nic.tap()
        );
        if nic.options.contains("hash_report=on") {
            check_hashes(&mut linux, &interface, nic)?;
        } else {
            let offered = has_feature(&mut linux, &interface, F_HASH_REPORT)?;
            ensure!(!offered, "hash reports that nobody asked for");
        }
        if nic.options.contains("mtu") {
            let mtu = linux
                .shell
                .ask(&format!("cat /sys/class/net/{interface}/mtu"))?;
            ensure!(mtu.trim() == "1400", "MTU {mtu}");
        }
        check_streams(&mut linux, dir.path(), nic)?;
    }
    linux.power_off()
}

#[test]
fn debian_6_1_gets_hashes_and_streams_on_one_queue_and_more() -> Result<()> {
    check_nics(
        "debian_6_1_gets_hashes_and_streams_on_one_queue_and_more",
        Kernel::Cloud6_1,
    )
}

#[test]
fn debian_6_12_gets_hashes_and_streams_on_one_queue_and_more() -> Result<()> {
    check_nics(
        "debian_6_12_gets_hashes_and_streams_on_one_queue_and_more",
        Kernel::Cloud6_12,
    )
}
