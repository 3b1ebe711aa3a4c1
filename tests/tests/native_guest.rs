//! The native guest against QEMU: what it says about a VMM is worth something only if it has
//! nothing to say about one that is right, and speaks up about one that is wrong.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use e2e::guest;
use e2e::guest_output::{GuestLog, Line, Verify};
use e2e::netns;
use e2e::process::{Process, wait_for};
use e2e::traffic::{Traffic, TrafficConfig};
use serde_json::{Value, json};

/// Bytes before a test packet's payload in a receive buffer: virtio-net header with hash,
/// Ethernet, IPv4, UDP.
const PAYLOAD_OFFSET: usize = 20 + 14 + 20 + 8;
const PAGE: usize = 4096;
const MIB: u64 = 1 << 20;

/// A QEMU with the native guest in it.
struct Qemu {
    process: Process,
    serial: UnixStream,
    qmp: PathBuf,
}

impl Qemu {
    fn start(dir: &Path, name: &str, command_line: &str, extra: &[&str]) -> Result<Self> {
        let (serial, qmp) = (
            dir.join(format!("{name}.serial")),
            dir.join(format!("{name}.qmp")),
        );
        let listener = UnixListener::bind(&serial)?;
        let mut command = Command::new("qemu-system-x86_64");
        // arch-capabilities: some hosts offer the MSR but refuse to have it written.
        let accelerator: &[&str] = if Path::new("/dev/kvm").exists() {
            &["-accel", "kvm", "-cpu", "host,-arch-capabilities"]
        } else {
            &["-accel", "tcg"]
        };
        command
            .args(accelerator)
            .args([
                "-machine",
                "q35",
                "-bios",
                "qboot.rom",
                "-nodefaults",
                "-no-user-config",
            ])
            .args(["-display", "none", "-no-reboot"])
            .args(["-append", command_line])
            .arg("-kernel")
            .arg(guest::elf()?)
            .arg("-qmp")
            .arg(format!("unix:{},server=on,wait=off", qmp.display()))
            .arg("-chardev")
            .arg(format!("socket,id=serial,path={}", serial.display()))
            .args(["-serial", "chardev:serial"])
            .args(extra);
        let mut process = Process::start(name, command, &dir.join(format!("{name}.log")))?;
        listener.set_nonblocking(true)?;
        let serial = wait_for("QEMU's serial port", Duration::from_secs(10), || {
            process.check()?;
            match listener.accept() {
                Ok((stream, _)) => Ok(Some(stream)),
                Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(None),
                Err(error) => Err(error.into()),
            }
        })?;
        serial.set_nonblocking(true)?;
        Ok(Self {
            process,
            serial,
            qmp,
        })
    }

    /// Adds what the guest said to `log`.
    fn read_into(&mut self, log: &mut GuestLog) -> Result<()> {
        let mut buffer = [0; 4096];
        loop {
            match self.serial.read(&mut buffer) {
                Ok(0) => return Ok(()),
                Ok(len) => log.feed(&buffer[..len])?,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Reads until `seen` is true of the log.
    fn read_until(
        &mut self,
        log: &mut GuestLog,
        what: &str,
        seen: impl Fn(&GuestLog) -> bool,
    ) -> Result<()> {
        wait_for(what, Duration::from_secs(30), || {
            self.read_into(log)?;
            Ok(seen(log).then_some(()))
        })
        .with_context(|| format!("{:?}", log.lines()))
    }

    /// Audits the guest's memory.
    fn verify(&mut self, log: &mut GuestLog) -> Result<Verify> {
        let before = log.verifies().count();
        self.serial.write_all(b"v")?;
        self.read_until(log, "VERIFY", |log| log.verifies().count() > before)?;
        log.verifies().next_back().copied().context("no audit")
    }

    /// Ends the guest, whose last report is then in `log`.
    fn quit(mut self, log: &mut GuestLog) -> Result<()> {
        self.serial.write_all(b"q")?;
        self.read_until(log, "DONE", |log| log.lines().contains(&Line::Done))?;
        self.process.wait(Duration::from_secs(10))?;
        Ok(())
    }

    fn qmp(&self) -> Result<Qmp> {
        let stream = UnixStream::connect(&self.qmp)?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        let mut qmp = Qmp {
            writer: stream.try_clone()?,
            reader: BufReader::new(stream),
        };
        qmp.line()?;
        qmp.execute(&json!({"execute": "qmp_capabilities"}))?;
        Ok(qmp)
    }
}

/// QEMU's control socket.
struct Qmp {
    writer: UnixStream,
    reader: BufReader<UnixStream>,
}

impl Qmp {
    fn line(&mut self) -> Result<Value> {
        let mut line = String::new();
        self.reader.read_line(&mut line)?;
        Ok(serde_json::from_str(&line)?)
    }

    fn execute(&mut self, command: &Value) -> Result<Value> {
        writeln!(self.writer, "{command}")?;
        loop {
            let answer = self.line()?;
            if let Some(error) = answer.get("error") {
                bail!("QEMU refuses {command}: {error}");
            }
            if let Some(value) = answer.get("return") {
                return Ok(value.clone());
            }
        }
    }
}

/// Whether this host can run `test`; says why not.
fn can_run(test: &str) -> bool {
    let qemu = Command::new("qemu-system-x86_64").arg("--version").output();
    if qemu.is_err() {
        println!("SKIP: {test}: no qemu-system-x86_64 (apt-get install qemu-system-x86)");
    }
    qemu.is_ok()
}

/// The same for tests with taps; enters a network namespace of the test's own.
fn can_network(test: &str) -> bool {
    if !can_run(test) {
        return false;
    }
    let isolated = netns::isolate().and_then(|()| netns::add_tap("probe", 1, &[]));
    if let Err(error) = &isolated {
        println!("SKIP: {test}: no taps: {error:#}");
    }
    isolated.is_ok()
}

/// QEMU's arguments for a NIC on a tap.
fn nic(index: usize, tap: &str) -> [String; 4] {
    [
        "-netdev".to_owned(),
        format!("tap,id=net{index},ifname={tap},script=no,downscript=no,vhost=off"),
        "-device".to_owned(),
        format!(
            "virtio-net-pci,netdev=net{index},mac=52:54:00:77:00:0{index},disable-legacy=on,hash=on,rss=on"
        ),
    ]
}

/// Four flows, IPv4 and IPv6, to NIC `index` through `interface`.
fn traffic(index: usize, interface: &str, packets_per_second: u32) -> Result<Traffic> {
    Traffic::start(&TrafficConfig {
        interface: interface.to_owned(),
        guest_mac: format!("52:54:00:77:00:0{index}"),
        addresses: vec![
            (
                format!("10.77.{index}.1").parse()?,
                format!("10.77.{index}.2").parse()?,
            ),
            (
                format!("fd77:{index}::1").parse()?,
                format!("fd77:{index}::2").parse()?,
            ),
        ],
        flows: 4,
        payload: 900,
        packets_per_second,
    })
}

/// The host's addresses towards NIC `index`.
fn addresses(index: usize) -> [String; 2] {
    [format!("10.77.{index}.1/24"), format!("fd77:{index}::1/64")]
}

/// A tap towards NIC `index`.
fn add_tap(index: usize) -> Result<String> {
    let tap = format!("gt{index}");
    let addresses = addresses(index);
    netns::add_tap(&tap, 1, &addresses.each_ref().map(String::as_str))?;
    Ok(tap)
}

fn borrow(arguments: &[String]) -> Vec<&str> {
    arguments.iter().map(String::as_str).collect()
}

#[test]
fn machine_is_what_the_guest_builds_on() -> Result<()> {
    if !can_run("machine_is_what_the_guest_builds_on") {
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    let mut log = GuestLog::default();
    let mut qemu = Qemu::start(dir.path(), "smoke", "mode=smoke", &["-m", "64M"])?;
    let passed = Line::Check {
        passed: true,
        what: "smoke".to_owned(),
    };
    qemu.read_until(&mut log, "PASS smoke", |log| log.lines().contains(&passed))?;
    ensure!(
        qemu.process.wait(Duration::from_secs(10))?.success(),
        "no clean power-off"
    );
    ensure!(log.complaints().is_empty(), "{:?}", log.complaints());
    Ok(())
}

#[test]
fn an_exception_is_reported() -> Result<()> {
    if !can_run("an_exception_is_reported") {
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    let mut log = GuestLog::default();
    let mut qemu = Qemu::start(dir.path(), "crash", "mode=crash", &["-m", "64M"])?;
    qemu.read_until(&mut log, "TRAP", |log| !log.complaints().is_empty())?;
    let complaint = log.complaints().concat();
    let named = complaint.contains("\"vector\":14") && complaint.contains("0x7fffdeadb000");
    ensure!(named, "{complaint}");
    Ok(())
}

#[test]
fn two_cpus_and_two_nics_without_a_complaint() -> Result<()> {
    if !can_network("two_cpus_and_two_nics_without_a_complaint") {
        return Ok(());
    }
    for mode in [
        "irq=1 idle=1000",
        "irq=0 rxbuf=512",
        "irq=1 evidx=0 mrg=0 retain=64",
    ] {
        let dir = tempfile::tempdir()?;
        let taps = if netns::ip(&["link", "show", "gt0"]).is_ok() {
            ["gt0".to_owned(), "gt1".to_owned()]
        } else {
            [add_tap(0)?, add_tap(1)?]
        };
        let extra = [nic(0, &taps[0]), nic(1, &taps[1])].concat();
        let machine = [&borrow(&extra)[..], &["-m", "160M", "-smp", "2"]].concat();
        let line = format!("mem=64 rate=40 smp=2 hash=1 tick=100 {mode}");
        let mut log = GuestLog::default();
        let mut qemu = Qemu::start(dir.path(), "guest", &line, &machine)?;
        qemu.read_until(&mut log, "READY", GuestLog::is_ready)?;
        let streams = [traffic(0, &taps[0], 1000)?, traffic(1, &taps[1], 500)?];
        std::thread::sleep(Duration::from_millis(1500));
        let counts = streams
            .into_iter()
            .map(Traffic::stop)
            .collect::<Result<Vec<_>>>()?;
        let verify = qemu.verify(&mut log)?;
        qemu.quit(&mut log)?;
        let last = log.ticks().next_back().context("no report")?;
        ensure!(
            log.complaints().is_empty(),
            "{mode}: {:?}",
            log.complaints()
        );
        ensure!(
            verify.pages == 64 * MIB / 4096 && verify.rx_pages > 60,
            "{mode}: {verify:?}"
        );
        ensure!(
            last.pages > 5000 && last.cpus.len() == 1,
            "{mode}: {last:?}"
        );
        for (nic, counts) in last.nics.iter().zip(&counts) {
            ensure!(counts.sent > 300 && counts.bad == 0, "{mode}: {counts:?}");
            ensure!(
                counts.lost() == 0 && nic.rx_lost == 0,
                "{mode}: {counts:?} {nic:?}"
            );
            ensure!(
                nic.rx == counts.sent && nic.rx == counts.received,
                "{mode}: {counts:?} {nic:?}"
            );
            ensure!(nic.hash_matched >= nic.rx, "{mode}: {nic:?}");
            ensure!((nic.irqs > 0) == mode.contains("irq=1"), "{mode}: {nic:?}");
        }
    }
    Ok(())
}

/// Guest memory as a file, in which the test changes what no VMM may change.
#[test]
fn a_changed_byte_is_found_wherever_it_is() -> Result<()> {
    if !can_network("a_changed_byte_is_found_wherever_it_is") {
        return Ok(());
    }
    let dir = tempfile::tempdir_in("/dev/shm")?;
    let path = dir.path().join("ram");
    let backing = format!(
        "memory-backend-file,id=ram,size=128M,mem-path={},share=on",
        path.display()
    );
    let extra = nic(0, &add_tap(0)?);
    let machine = [&borrow(&extra)[..], &["-m", "128M", "-object", &backing]].concat();
    let machine = [&machine[..], &["-machine", "memory-backend=ram"]].concat();
    let mut log = GuestLog::default();
    let mut qemu = Qemu::start(
        dir.path(),
        "guest",
        "mem=32 hash=1 tick=100 retain=300",
        &machine,
    )?;
    qemu.read_until(&mut log, "READY", GuestLog::is_ready)?;
    let counts = {
        let stream = traffic(0, "gt0", 500)?;
        std::thread::sleep(Duration::from_millis(400));
        stream.stop()?
    };
    ensure!(counts.received > 50, "{counts:?}");
    let clean = qemu.verify(&mut log)?;
    ensure!(
        clean.corrupt + clean.rx_pages_corrupt == 0 && clean.rx_pages > 50,
        "{clean:?}"
    );
    ensure!(log.complaints().is_empty(), "{:?}", log.complaints());

    let ram = OpenOptions::new().read(true).write(true).open(&path)?;
    // Memory starts at 16 MiB; one byte of filler, one stale generation.
    flip(&ram, 20 * MIB + 2049)?;
    flip(&ram, 21 * MIB)?;
    flip(&ram, received_page(&ram)? + 200)?;
    let found = qemu.verify(&mut log)?;
    ensure!(
        found.corrupt == 2 && found.rx_pages_corrupt == 1,
        "{found:?}"
    );
    let named = log
        .lines()
        .iter()
        .filter(|line| matches!(line, Line::Trouble(_)))
        .count();
    ensure!(named == 3, "{:?}", log.lines());
    qemu.quit(&mut log)
}

fn flip(ram: &File, at: u64) -> Result<()> {
    let mut byte = [0];
    ram.read_exact_at(&mut byte, at)?;
    ram.write_all_at(&[byte[0] ^ 0x10], at)?;
    Ok(())
}

/// The address of a page that holds a received test packet and nothing else does.
fn received_page(ram: &File) -> Result<u64> {
    let magic = guest_logic::packet::MAGIC.to_le_bytes();
    let mut page = [0; PAGE];
    // Above the verified pages; buffers are at the end of RAM.
    for at in (64 * MIB..128 * MIB).step_by(PAGE) {
        ram.read_exact_at(&mut page, at)?;
        // Transmit buffers start with a zero header, receive buffers have a hash in it.
        if page[PAYLOAD_OFFSET..PAYLOAD_OFFSET + 4] == magic && page[12..16] != [0; 4] {
            return Ok(at);
        }
    }
    bail!("no received packet in memory")
}

/// A bridge with the host's addresses and two taps, one for each end of a migration.
fn add_bridge() -> Result<()> {
    netns::ip(&["link", "add", "gtbr", "type", "bridge"])?;
    netns::ip(&["link", "set", "gtbr", "up"])?;
    for tap in ["gts", "gtd"] {
        netns::add_tap(tap, 1, &[])?;
        netns::ip(&["link", "set", tap, "master", "gtbr"])?;
    }
    let [v4, v6] = addresses(0);
    netns::ip(&["addr", "add", &v4, "dev", "gtbr"])?;
    netns::ip(&["addr", "add", &v6, "dev", "gtbr", "nodad"])
}

/// Moves the guest; gives QEMU's account of it.
fn migrate(source: &mut Qemu, channel: &str, log: &mut GuestLog) -> Result<Value> {
    let mut qmp = source.qmp()?;
    let limits = json!({"max-bandwidth": 4_000_000_000_u64, "downtime-limit": 50});
    qmp.execute(&json!({"execute": "migrate-set-parameters", "arguments": limits}))?;
    qmp.execute(&json!({"execute": "migrate", "arguments": {"uri": channel}}))?;
    let result = wait_for("the migration", Duration::from_secs(60), || {
        source.read_into(log)?;
        let state = qmp.execute(&json!({"execute": "query-migrate"}))?;
        match state["status"].as_str() {
            Some("completed") => Ok(Some(state)),
            Some("failed" | "cancelled") => bail!("{state}"),
            _ => Ok(None),
        }
    })?;
    source.read_into(log)?;
    Ok(result)
}

/// The guest moves from one QEMU to another under traffic.
#[test]
fn a_correct_migration_gives_no_complaint() -> Result<()> {
    if !can_network("a_correct_migration_gives_no_complaint") {
        return Ok(());
    }
    add_bridge()?;
    for line in [
        "mem=192 rate=60 hash=1 irq=1 tick=100",
        "mem=96 rate=max hot=8 smp=2 hash=1 tick=100",
    ] {
        let dir = tempfile::tempdir()?;
        let socket = dir.path().join("migration");
        let channel = format!("unix:{}", socket.display());
        let machine = |tap| {
            let rest = ["-m", "300M", "-smp", "2"].map(str::to_owned);
            [&nic(0, tap)[..], &rest].concat()
        };
        let mut log = GuestLog::default();
        let mut source = Qemu::start(dir.path(), "source", line, &borrow(&machine("gts")))?;
        source.read_until(&mut log, "READY", GuestLog::is_ready)?;
        let incoming = ["-incoming".to_owned(), channel.clone()];
        let incoming = [&machine("gtd")[..], &incoming].concat();
        let mut destination = Qemu::start(dir.path(), "destination", line, &borrow(&incoming))?;
        let there = || Ok(socket.exists().then_some(()));
        wait_for("the destination", Duration::from_secs(10), there)?;
        let stream = traffic(0, "gtbr", 500)?;
        let flowing = || Ok((stream.counts().received > 350).then_some(()));
        wait_for("350 echoes", Duration::from_secs(20), flowing)?;

        let result = migrate(&mut source, &channel, &mut log)?;
        let enough = log.ticks().count() + 5;
        let seen = |log: &GuestLog| log.ticks().count() > enough;
        destination.read_until(&mut log, "five more reports", seen)?;
        let counts = stream.stop()?;
        let verify = destination.verify(&mut log)?;
        destination.quit(&mut log)?;
        let last = log.ticks().next_back().context("no report")?;
        println!(
            "{line}: QEMU: total {} ms, downtime {} ms; guest: longest gap {} us; {counts:?}",
            result["total-time"], result["downtime"], last.max_gap_us
        );
        ensure!(
            log.complaints().is_empty(),
            "{line}: {:?}",
            log.complaints()
        );
        let corrupt = verify.corrupt + verify.rx_pages_corrupt;
        ensure!(corrupt == 0 && verify.rx_pages > 300, "{line}: {verify:?}");
        ensure!(
            counts.bad == 0 && counts.received > 400,
            "{line}: {counts:?}"
        );
        let nic = last.nics[0];
        ensure!(nic.hash_matched >= nic.rx, "{line}: {nic:?}");
    }
    Ok(())
}
