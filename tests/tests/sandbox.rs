//! System-call filters in real processes: who has them, and what they must not get in the way of.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::ferry::{Ferry, Nic, program};
use e2e::host;
use e2e::network::Network;
use e2e::process::wait_for;
use e2e::vm::{Vm, VmSpec};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, tcgetattr};
use serde_json::json;

const LIMIT: Duration = Duration::from_secs(20);

/// The name and the seccomp mode (2: filter) of each thread.
fn filters(pid: u32) -> Result<Vec<(String, String)>> {
    let mut all = Vec::new();
    for task in std::fs::read_dir(format!("/proc/{pid}/task"))? {
        let status = std::fs::read_to_string(task?.path().join("status"))?;
        let field = |key: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(key));
            line.unwrap_or_default().trim().to_owned()
        };
        all.push((field("Name:"), field("Seccomp:")));
    }
    Ok(all)
}

/// Both programs with `options`, of which the one has a VM with two cards and the other a client.
/// Gives the filters of their threads, and ends the card's process as an administrator does.
fn both(networks: [Network; 2], options: &[&str]) -> Result<[Vec<(String, String)>; 2]> {
    let dir = tempfile::tempdir()?;
    let [net, card] = networks;
    let mac = card.mac();
    let arguments = [&["--mac", &mac], options].concat();
    let mut nic = Nic::start(dir.path(), "card", &card.tap(0), &arguments)?;
    // Enough vCPUs that a card's thread is not among a process's first few.
    let mut spec = VmSpec::new(64, "mem=16");
    spec.cpus = 6;
    spec.nets = vec![net.device(0)];
    spec.user_devices = vec![json!({"id": card.id(), "socket": nic.socket})];
    let vm = Vm::boot_in(Ferry::start(dir.path(), "vm", options)?, &spec)?;
    let found = [filters(vm.ferry.process.id())?, filters(nic.process.id())?];
    nic.process.terminate()?;
    let status = nic.process.wait(LIMIT)?;
    ensure!(status.success(), "{status}: {}", nic.process.output());
    ensure!(!nic.socket.exists(), "the card's socket is left");
    // The VM lives on without its card, and its ferry ends in order.
    vm.ferry.shut_down()?;
    Ok(found)
}

#[test]
fn every_thread_is_filtered_unless_switched_off() -> Result<()> {
    let Some(_turn) = host::network_turn("every_thread_is_filtered_unless_switched_off")? else {
        return Ok(());
    };
    let cases = [(0, &[][..], "2"), (2, &["--seccomp", "false"], "0")];
    for (number, options, expected) in cases {
        let networks = [Network::new(number)?, Network::new(number + 1)?];
        let [ferry, nic] = both(networks, options)?;
        // Main thread, API, events, serial port, vfio-user, vCPUs, a card; main thread, signals, a
        // card.
        ensure!(ferry.len() >= 12 && nic.len() >= 3, "{ferry:?} {nic:?}");
        let right = |threads: &[(String, String)]| threads.iter().all(|(_, m)| m == expected);
        ensure!(right(&ferry) && right(&nic), "{ferry:?} {nic:?}");
    }
    Ok(())
}

/// A terminal is made raw for the guest, carries its output, and is put back at the end.
#[test]
fn a_terminal_is_set_up_and_put_back() -> Result<()> {
    let Some(_turn) = host::turn("a_terminal_is_set_up_and_put_back")? else {
        return Ok(());
    };
    let main = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY)?;
    grantpt(&main)?;
    unlockpt(&main)?;
    let name = ptsname(&main, Vec::new())?;
    let terminal = File::options()
        .read(true)
        .write(true)
        .open(name.to_str()?)?;
    let is_raw = || -> Result<bool> {
        let settings = tcgetattr(&terminal)?;
        Ok(!settings.local_modes.contains(LocalModes::ICANON))
    };
    ensure!(!is_raw()?, "a new terminal is raw");
    let elf = e2e::guest::elf()?;
    let end = "mem=16 tick=100 poweroff_port=0x600 poweroff_value=0x34";
    let mut ferry = Command::new(program("ferry")?)
        .args([
            "--memory",
            "size=256M",
            "--serial",
            "tty",
            "--console",
            "off",
        ])
        .arg("--kernel")
        .arg(elf)
        .args(["--cmdline", end])
        .stdin(Stdio::from(terminal.try_clone()?))
        .stdout(Stdio::from(terminal.try_clone()?))
        .stderr(Stdio::piped())
        .spawn()?;
    // Reading the main side, here so that the guest's output never waits.
    let mut typed = File::from(main.try_clone()?);
    let (heard, hear) = std::sync::mpsc::channel();
    std::thread::spawn(move || listen(main, &heard));
    hear.recv_timeout(LIMIT).context("the guest is silent")?;
    ensure!(is_raw()?, "the terminal is not raw");
    typed.write_all(b"q")?;
    let ended = wait_for("an end", LIMIT, || Ok(ferry.try_wait()?));
    if ended.is_err() {
        ferry.kill()?;
    }
    let output = ferry.wait_with_output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(ended?.success(), "{said}");
    ensure!(!is_raw()?, "the terminal is still raw");
    Ok(())
}

/// Reads until the end, and tells of the guest's first tick.
fn listen(main: OwnedFd, heard: &std::sync::mpsc::Sender<()>) {
    let mut text = Vec::new();
    let mut main = File::from(main);
    let mut piece = [0; 4096];
    while let Ok(count @ 1..) = main.read(&mut piece) {
        text.extend_from_slice(&piece[..count]);
        if text.windows(4).any(|word| word == b"TICK") {
            // Who waits may have given up.
            let _ = heard.send(());
        }
    }
}
