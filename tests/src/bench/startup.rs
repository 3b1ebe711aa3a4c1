//! Start-up times, and what a VMM needs besides its guest's memory.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde::Serialize;
use serde_json::json;

use super::contender::{Backing, Boot, Contender, Running, Vmm, fresh, qmp_option};
use super::qmp::Qmp;
use super::stats::Summary;
use crate::console::Console;
use crate::ferry::program;
use crate::guest;
use crate::guest_output::GuestLog;
use crate::process::wait_for;
use crate::vmm_process::FerryConsole;

const LIMIT: Duration = Duration::from_secs(30);
/// The guest of these measurements.
const MEMORY_MIB: u64 = 128;
/// It uses little memory and halts when nothing is due.
const COMMAND_LINE: &str = "mode=dirty mem=16 rate=0 idle=10000 tick=200";

/// One thing measured.
#[derive(Clone, Debug, Serialize)]
pub struct StartupRow {
    /// What, in words.
    pub what: &'static str,
    /// `ms` or `MiB`.
    pub unit: &'static str,
    /// Ferry's figures.
    pub ferry: Option<Summary>,
    /// QEMU's, where it has such a thing.
    pub qemu: Option<Summary>,
}

/// Measures everything `runs` times, contenders taking turns.
pub(super) fn measure(dir: &Path, runs: u32) -> Result<Vec<StartupRow>> {
    let elf = guest::elf()?;
    let boot = Boot {
        elf: &elf,
        command_line: COMMAND_LINE,
        memory_mib: MEMORY_MIB,
    };
    type Measure = fn(&Path, &Boot<'_>, Vmm) -> Result<Option<f64>>;
    let all: [(&'static str, &'static str, Measure); 4] = [
        (
            "start of the process to the guest's first byte",
            "ms",
            first_byte,
        ),
        (
            "start of the process to its control socket answering",
            "ms",
            control_ready,
        ),
        (
            "resident, a VM created and not booted",
            "MiB",
            resident_created,
        ),
        (
            "resident besides guest RAM, an idle guest of 128 MiB",
            "MiB",
            resident_booted,
        ),
    ];
    let mut rows = Vec::new();
    for (what, unit, measure) in all {
        let mut figures = [Vec::new(), Vec::new()];
        for _ in 0..runs {
            for (figures, vmm) in figures.iter_mut().zip([Vmm::Ferry, Vmm::Qemu]) {
                let dir = tempfile::tempdir_in(dir)?;
                let found = measure(dir.path(), &boot, vmm);
                figures.extend(found.with_context(|| format!("{vmm:?}: {what}"))?);
            }
        }
        let [ferry, qemu] = figures.map(Summary::of);
        let show = |summary: Option<Summary>| summary.map_or("-".to_owned(), |it| it.show());
        eprintln!(
            "{what}: Ferry {} {unit}, QEMU {} {unit}",
            show(ferry),
            show(qemu)
        );
        rows.push(StartupRow {
            what,
            unit,
            ferry,
            qemu,
        });
    }
    Ok(rows)
}

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}

fn contender(vmm: Vmm) -> Contender {
    Contender {
        vmm,
        backing: Backing::Anon,
    }
}

/// `ferry` alone, as a user starts it; QEMU likewise.
fn first_byte(dir: &Path, boot: &Boot<'_>, vmm: Vmm) -> Result<Option<f64>> {
    let command = match vmm {
        Vmm::Ferry => {
            let mut command = Command::new(program("ferry")?);
            command.args(contender(vmm).ferry_arguments(boot));
            command
        }
        Vmm::Qemu => contender(vmm).qemu_command(boot),
    };
    let mut console = Console::start("boot", command, &dir.join("boot.log"))?;
    let took = wait_for("the guest's first byte", LIMIT, || {
        let first = console.first_byte();
        if first.is_none() {
            console.check()?;
        }
        Ok(first)
    })?;
    Ok(Some(ms(took)))
}

/// Ferry answers a ping; QEMU greets on its control socket, with a machine but no guest.
fn control_ready(dir: &Path, boot: &Boot<'_>, vmm: Vmm) -> Result<Option<f64>> {
    let socket = fresh(dir, "control");
    let mut command = match vmm {
        Vmm::Ferry => {
            let mut command = Command::new(program("ferry")?);
            command.args(["--api-socket", &format!("path={}", socket.display())]);
            command
        }
        Vmm::Qemu => {
            let mut command = contender(vmm).qemu_command(boot);
            command.args(["-S", "-qmp", &qmp_option(&socket)]);
            command
        }
    };
    command.stdin(Stdio::null()).stderr(Stdio::null());
    let console = Console::start("ready", command, &dir.join("ready.log"))?;
    match vmm {
        Vmm::Ferry => ping(&socket)?,
        Vmm::Qemu => drop(Qmp::connect(&socket)?),
    }
    Ok(Some(ms(console.started().elapsed())))
}

/// One `vmm.ping` as soon as there is a socket, with nothing that takes time of its own.
fn ping(socket: &Path) -> Result<()> {
    let deadline = Instant::now() + LIMIT;
    let mut stream = loop {
        match UnixStream::connect(socket) {
            Ok(stream) => break stream,
            Err(error) if Instant::now() > deadline => return Err(error.into()),
            Err(_) => std::thread::sleep(Duration::from_micros(200)),
        }
    };
    stream.set_read_timeout(Some(LIMIT))?;
    stream.write_all(b"GET /api/v1/vmm.ping HTTP/1.1\r\nHost: localhost\r\n\r\n")?;
    let mut answer = [0; 512];
    let count = stream.read(&mut answer)?;
    let answer = String::from_utf8_lossy(answer.get(..count).unwrap_or_default()).into_owned();
    anyhow::ensure!(answer.contains(" 200 "), "vmm.ping: {answer}");
    Ok(())
}

/// Only Ferry has a process without a machine.
fn resident_created(dir: &Path, boot: &Boot<'_>, vmm: Vmm) -> Result<Option<f64>> {
    if vmm == Vmm::Qemu {
        return Ok(None);
    }
    let ferry = FerryConsole::start(dir, "created", &[])?;
    let config = json!({
        "payload": {"kernel": boot.elf, "cmdline": boot.command_line},
        "memory": {"size": boot.memory_mib << 20},
        "console": {"mode": "Off"},
        "serial": {"mode": "Null"},
    });
    ferry.api.put("vm.create", Some(&config))?;
    Ok(Some(resident(ferry.console.id(), 0)?))
}

fn resident_booted(dir: &Path, boot: &Boot<'_>, vmm: Vmm) -> Result<Option<f64>> {
    let mut running = contender(vmm).start(dir, "idle", boot)?;
    let mut log = GuestLog::default();
    let console = match &mut running {
        Running::Ferry(ferry) => &mut ferry.console,
        Running::Qemu(console, _) => console,
    };
    for _ in 0..3 {
        console.next_tick(&mut log, LIMIT)?;
    }
    Ok(Some(resident(console.id(), boot.memory_mib)?))
}

/// Resident memory of a process in MiB, without that of its mappings of `without_mib` or more.
fn resident(pid: u32, without_mib: u64) -> Result<f64> {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/smaps"))?;
    let kib = resident_kib(&maps, without_mib << 10);
    Ok(f64::from(u32::try_from(kib)?) / 1024.0)
}

fn resident_kib(smaps: &str, without_kib: u64) -> u64 {
    let (mut sum, mut size) = (0, 0);
    for line in smaps.lines() {
        let mut words = line.split_ascii_whitespace();
        let (Some(key), Some(value)) = (words.next(), words.next()) else {
            continue;
        };
        let value: u64 = value.parse().unwrap_or(0);
        match key {
            "Size:" => size = value,
            "Rss:" if without_kib == 0 || size < without_kib => sum += value,
            _ => {}
        }
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_memory_is_left_out() {
        let smaps = "7f00-7f01 rw-p 0 00:00 0 [heap]\nSize:  64 kB\nRss:  10 kB\nPss:  9 kB\n\
                     7f02-7f09 rw-s 0 00:01 2 /memfd:ram\nSize:  4096 kB\nRss:  300 kB\n";
        assert_eq!(resident_kib(smaps, 4096), 10);
        assert_eq!(resident_kib(smaps, 0), 310);
        assert!(resident(std::process::id(), 0).unwrap() > 0.5);
    }
}
