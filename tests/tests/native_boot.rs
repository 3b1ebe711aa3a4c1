//! The native guest in one `ferry`: booting, and the life of a VM as the API rules it.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use e2e::ferry::{Ferry, Nic};
use e2e::guest_output::{GuestLog, Line};
use e2e::host::{self, HugePool};
use e2e::network::Network;
use e2e::process::wait_for;
use e2e::vm::{Ram, Vm, VmSpec};
use hyper::Method;
use serde_json::{Value, json};

const LIMIT: Duration = Duration::from_secs(20);

/// Boots as a command line does; gives the times from starting the process to the API's answer
/// and to the guest's first byte.
fn first_byte(dir: &Path, name: &str) -> Result<(Duration, Duration)> {
    let elf = e2e::guest::elf()?;
    let elf = elf.to_str().context("a path that is no text")?;
    let options = ["--memory", "size=256M", "--serial", "tty", "--console"];
    let rest = ["off", "--kernel", elf, "--cmdline", "mem=16 tick=100"];
    let begun = Instant::now();
    let ferry = Ferry::start(dir, name, &[&options[..], &rest].concat())?;
    wait_for("the first byte", LIMIT, || {
        Ok((!ferry.serial().is_empty()).then_some(()))
    })?;
    Ok((ferry.start_time, begun.elapsed()))
}

#[test]
fn boot_times() -> Result<()> {
    let Some(_turn) = host::turn("boot_times")? else {
        return Ok(());
    };
    let dir = tempfile::tempdir()?;
    let (mut api, mut byte) = (Vec::new(), Vec::new());
    for number in 0..5 {
        let (first, second) = first_byte(dir.path(), &format!("vm{number}"))?;
        api.push(first);
        byte.push(second);
    }
    let ferry = Ferry::start(dir.path(), "empty", &[])?;
    println!("process start to API ready, with a VM: {api:.1?}");
    println!(
        "process start to API ready, without: {:.1?}",
        ferry.start_time
    );
    println!("process start to the guest's first byte: {byte:.1?}");
    let median = e2e::migration::median(byte);
    // A bound that a loaded machine keeps; the benchmark measures.
    ensure!(median < Duration::from_secs(2), "{median:?}");
    Ok(())
}

#[test]
fn cpus_and_memory_of_every_kind() -> Result<()> {
    let Some(_turn) = host::turn("cpus_and_memory_of_every_kind")? else {
        return Ok(());
    };
    let dir = tempfile::tempdir()?;
    for cpus in [1, 2] {
        for ram in [Ram::Anonymous, Ram::Shared, Ram::Huge] {
            let pool = (ram == Ram::Huge).then(|| HugePool::new(128));
            if let Some(Err(error)) = &pool {
                println!("SKIP: cpus_and_memory_of_every_kind: huge pages: {error:#}");
                continue;
            }
            let name = format!("{ram:?}{cpus}");
            let words = "mem=64 rate=100 verify_every=1";
            let spec = VmSpec {
                ram,
                cpus,
                ..VmSpec::new(128, words)
            };
            let mut vm = Vm::boot(dir.path(), &name, &spec)?;
            let tick = vm.check_runs()?;
            ensure!(
                tick.cpus.len() + 1 == usize::try_from(cpus)?,
                "{name}: {tick:?}"
            );
            let found = vm.verify_clean()?;
            ensure!(found.pages == 64 << 8, "{name}: {found:?}");
            let info = vm.ferry.api.get("vm.info")?;
            ensure!(info["memory_actual_size"] == 128 << 20, "{info}");
            let (ferry, log) = vm.power_off()?;
            ensure!(
                log.lines().contains(&Line::Done),
                "{name}: {:?}",
                log.lines()
            );
            ensure!(ferry.state()? == "Shutdown");
            ferry.shut_down()?;
        }
    }
    Ok(())
}

/// A guest that powers off ends the process that was started for it.
#[test]
fn power_off_ends_the_process() -> Result<()> {
    let Some(_turn) = host::turn("power_off_ends_the_process")? else {
        return Ok(());
    };
    let dir = tempfile::tempdir()?;
    let elf = e2e::guest::elf()?;
    let elf = elf.to_str().context("a path that is no text")?;
    let words = "mode=smoke poweroff_port=0x600 poweroff_value=0x34";
    let options = [
        "--memory",
        "size=64M",
        "--serial",
        "tty",
        "--console",
        "off",
    ];
    let rest = ["--kernel", elf, "--cmdline", words];
    let mut ferry = Ferry::start(dir.path(), "vm", &[&options[..], &rest].concat())?;
    let status = ferry.process.wait(LIMIT)?;
    let mut log = GuestLog::default();
    log.feed(&ferry.take_serial()?)?;
    ensure!(status.success(), "{status}: {}", ferry.last_words());
    ensure!(log.complaints().is_empty(), "{:?}", log.complaints());
    let passed = Line::Check {
        passed: true,
        what: "smoke".to_owned(),
    };
    ensure!(log.lines().contains(&passed), "{:?}", log.lines());
    Ok(())
}

/// Both ways of resetting: the FADT's reset register, and the keyboard controller.
#[test]
fn a_reset_boots_again() -> Result<()> {
    let Some(_turn) = host::turn("a_reset_boots_again")? else {
        return Ok(());
    };
    let dir = tempfile::tempdir()?;
    for (name, words) in [
        ("acpi", "poweroff_port=0x602 poweroff_value=1"),
        // Nothing is at the power-off port of other machines, after which the guest tries this.
        ("i8042", "poweroff_port=0x604 poweroff_value=0x2000"),
    ] {
        let spec = VmSpec::new(64, &format!("mem=16 {words}"));
        let mut vm = Vm::boot(dir.path(), name, &spec)?;
        vm.ferry.type_in(b"q")?;
        let ups = |log: &GuestLog| log.lines().iter().filter(|line| **line == Line::Up).count();
        vm.wait_log("a second boot", |log| ups(log) == 2)?;
        let ready = |line: &&Line| matches!(line, Line::Ready(_));
        vm.wait_log("a second READY", |log| {
            log.lines().iter().filter(ready).count() == 2
        })?;
        ensure!(vm.ferry.state()? == "Running", "{name}");
        ensure!(
            vm.ferry
                .events()
                .iter()
                .filter(|event| event["event"] == "booted")
                .count()
                == 2
        );
    }
    Ok(())
}

fn refused(ferry: &Ferry, name: &str, body: Option<&Value>, status: u16) -> Result<String> {
    let answer = ferry.api.request(Method::PUT, name, body)?;
    ensure!(answer.status == status, "{name}: {answer:?}");
    let chain = answer.body.as_array().context("an error is a list")?;
    let text = chain.iter().map(|part| part.as_str().unwrap_or_default());
    let text = text.collect::<Vec<_>>().join(": ");
    ensure!(!text.is_empty(), "{name}: an error without words");
    Ok(text)
}

#[test]
fn the_life_of_a_vm() -> Result<()> {
    let Some(_turn) = host::turn("the_life_of_a_vm")? else {
        return Ok(());
    };
    let dir = tempfile::tempdir()?;
    let ferry = Ferry::start(dir.path(), "vm", &[])?;
    let spec = VmSpec::new(64, "mem=16 rate=50");
    let config = spec.config()?;

    ensure!(!ferry.has_vm()?);
    ensure!(refused(&ferry, "vm.boot", None, 404)?.contains("vm.create"));
    ensure!(refused(&ferry, "vm.pause", None, 404)?.contains("no VM"));
    ensure!(refused(&ferry, "vm.create", Some(&json!({"cpu": 1})), 400)?.contains("cpu"));
    ferry.api.put("vm.create", Some(&config))?;
    ensure!(ferry.state()? == "Created");
    ensure!(refused(&ferry, "vm.create", Some(&config), 409)?.contains("delete"));
    ensure!(refused(&ferry, "vm.resume", None, 409)?.contains("not booted"));
    ferry.api.put("vm.delete", None)?;

    let mut vm = Vm::boot_in(ferry, &spec)?;
    let counters = vm.ferry.api.get("vm.counters")?;
    ensure!(counters.is_object(), "{counters}");
    vm.wait_ticks(2)?;
    vm.ferry.api.put("vm.pause", None)?;
    ensure!(vm.ferry.state()? == "Paused");
    ensure!(refused(&vm.ferry, "vm.pause", None, 409)?.contains("paused"));
    vm.pull()?;
    let before = vm.last_tick()?.n;
    std::thread::sleep(Duration::from_millis(500));
    vm.pull()?;
    ensure!(vm.last_tick()?.n == before, "it went on while paused");
    vm.ferry.api.put("vm.resume", None)?;
    let after = vm.wait_ticks(2)?;
    ensure!(after.max_gap_us >= 450_000, "it felt no pause: {after:?}");
    vm.verify_clean()?;

    vm.ferry.api.put("vm.shutdown", None)?;
    ensure!(vm.ferry.state()? == "Shutdown");
    vm.ferry.api.put("vm.boot", None)?;
    let ready = |line: &&Line| matches!(line, Line::Ready(_));
    vm.wait_log("READY", |log| log.lines().iter().filter(ready).count() == 2)?;
    vm.ferry.api.put("vm.delete", None)?;
    ensure!(!vm.ferry.has_vm()?);

    let events = vm.ferry.event_names();
    let wanted = [
        "starting", "booting", "booted", "pausing", "paused", "resuming", "resumed", "shutdown",
        "booting", "booted", "deleted",
    ];
    let told: Vec<&str> = events
        .iter()
        .map(String::as_str)
        .filter(|e| wanted.contains(e))
        .collect();
    ensure!(in_order(&told, &wanted), "{events:?}");
    vm.ferry.shut_down()
}

/// Whether `wanted` comes in `told` in this order, with others between.
fn in_order(told: &[&str], wanted: &[&str]) -> bool {
    let mut told = told.iter();
    wanted.iter().all(|name| told.any(|other| other == name))
}

/// What a process holds: descriptors, threads, and MiB of memory mapped shared.
fn holdings(pid: u32) -> Result<[usize; 3]> {
    let count = |what: &str| -> Result<usize> {
        Ok(std::fs::read_dir(format!("/proc/{pid}/{what}"))?.count())
    };
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let shared = maps
        .lines()
        .filter(|line| line.contains("memfd"))
        .filter_map(|line| {
            let (first, end) = line.split_once(' ')?.0.split_once('-')?;
            let size = u64::from_str_radix(end, 16).ok()? - u64::from_str_radix(first, 16).ok()?;
            usize::try_from(size >> 20).ok()
        });
    Ok([count("fd")?, count("task")?, shared.sum()])
}

/// A VM that is gone leaves nothing behind in its process.
#[test]
fn nothing_is_left_of_a_vm() -> Result<()> {
    let Some(_turn) = host::network_turn("nothing_is_left_of_a_vm")? else {
        return Ok(());
    };
    let dir = tempfile::tempdir()?;
    let (net, card) = (Network::new(0)?, Network::new(1)?);
    let nic = Nic::start(dir.path(), "card", &card.tap(0), &["--mac", &card.mac()])?;
    let mut spec = VmSpec::new(64, "mem=16");
    spec.nets = vec![net.device(0)];
    spec.user_devices = vec![json!({"id": card.id(), "socket": nic.socket})];
    let mut ferry = Ferry::start(dir.path(), "vm", &[])?;
    let mut before = None;
    for _ in 0..4 {
        let vm = Vm::boot_in(ferry, &spec)?;
        vm.ferry.api.put("vm.delete", None)?;
        ferry = vm.ferry;
        let pid = ferry.process.id();
        ensure!(holdings(pid)?[2] == 0, "guest memory is still mapped");
        // The first VM leaves what all share. API connections take a moment to end.
        if let Some(before) = before {
            let same = || Ok((holdings(pid)? == before).then_some(()));
            wait_for("an end", Duration::from_secs(2), same)
                .with_context(|| format!("{before:?}, then {:?}", holdings(pid)))?;
        } else {
            std::thread::sleep(Duration::from_millis(200));
            before = Some(holdings(pid)?);
        }
    }
    ferry.shut_down()
}

/// A serial port on a socket takes clients as they come, and their bytes to the guest.
#[test]
fn the_serial_port_on_a_socket() -> Result<()> {
    let Some(_turn) = host::turn("the_serial_port_on_a_socket")? else {
        return Ok(());
    };
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("serial");
    let mut config = VmSpec::new(64, "mem=16").config()?;
    config["serial"] = json!({"mode": "Socket", "socket": path});
    let ferry = Ferry::start(dir.path(), "vm", &[])?;
    ferry.boot(&config)?;
    for client in 0..2 {
        let mut stream = UnixStream::connect(&path)?;
        stream.set_read_timeout(Some(LIMIT))?;
        read_until(&mut stream, "TICK")?;
        stream.write_all(b"v")?;
        let answer = read_until(&mut stream, "\"corrupt\":0")?;
        ensure!(answer.contains("VERIFY"), "client {client}: {answer}");
    }
    Ok(())
}

fn read_until(stream: &mut UnixStream, text: &str) -> Result<String> {
    let mut heard = String::new();
    let mut byte = [0];
    while !heard.contains(text) {
        stream
            .read_exact(&mut byte)
            .with_context(|| heard.clone())?;
        heard.push(char::from(byte[0]));
    }
    Ok(heard)
}
