//! The native guest: a bare-metal program that dirties and verifies its memory
//! and drives virtio-net, where no operating system runs at full speed.
//! `build.sh` builds it; its pure half is in `../guest_logic`.
//!
//! It enters by PVH and spends its life in ring 3 (`boot.s` says why), with
//! memory identity mapped. Each CPU loops: dirty some pages (`dirty`), and
//! CPU 0 also serves NICs (`net`), speaks and listens (`monitor`).
//!
//! # Command line
//! Words `key=value`:
//!
//! | key | default | meaning |
//! |---|---|---|
//! | `mode` | `dirty` | `dirty`; `smoke`: check the machine, print `PASS`/`FAIL`, end; `crash`: touch memory that is not there, for harnesses to see a `TRAP` |
//! | `mem` | all | MiB of verified memory |
//! | `rate` | 0 | MiB/s dirtied by all CPUs together, or `max` |
//! | `hot` | all | MiB dirtied again and again; the rest is written once |
//! | `smp` | 1 | CPUs, each with its share of memory and rate |
//! | `idle` | 0 | µs of a timer to halt by when nothing is due; 0 spins |
//! | `tick` | 1000 | ms between `TICK` lines |
//! | `listen` | 20 | ms between looks at the serial input |
//! | `verify_every` | 0 | passes between audits of all memory; 0 for none |
//! | `ecam` | ports | address of PCI ECAM to use instead of ports 0xcf8/0xcfc |
//! | `bars` | 0xf8000000 | where BARs are put that have no address |
//! | `irq` | 0 | 1: receive by MSI-X interrupts instead of polling |
//! | `hash` | 0 | 1: take HASH_REPORT if offered, and check every report |
//! | `mrg`, `evidx` | 1 | take MRG_RXBUF, EVENT_IDX if offered |
//! | `rxbuf` | 4096 | bytes of a receive buffer |
//! | `retain` | 4096 | received buffers kept and checked, per NIC |
//! | `echo` | 1 | send test packets back |
//! | `ip0` … `ip7` | none | IPv4 address for which NIC n answers ARP |
//! | `tsc` | found | MHz of the time-stamp counter |
//! | `poweroff_port`, `poweroff_value` | 0x604, 0x2000 | how to power off |
//! | `lo`, `ram` | 16, 64 | MiB: where memory starts; how much there is when the loader passes no map |
//!
//! # Output
//! `FERRY-GUEST up`, `CLOCK {…}`, `NIC {…}` each, `FILL {…}`, `READY {…}`, then a `TICK {…}` line per
//! tick: word, blank, JSON object. `VERIFY {…}` answers an audit, `ERROR {…}`
//! names a wrong page (the first 16), `TRAP {…}` an exception, `PANIC` a bug.
//!
//! # Input
//! One byte each: `v` audit all memory, `r` forget the longest gaps, `h` eject the
//! PCI devices that the machine wants back and say `HOTPLUG {…}`, `q` print a last
//! `TICK` and `DONE` and power off.
#![no_std]
#![no_main]

mod audit;
mod boot_info;
mod clock;
mod cpu;
mod dirty;
mod hotplug;
mod lapic;
mod memory;
mod mmio;
mod monitor;
mod net;
mod paging;
mod pci;
mod power;
mod serial;
mod smoke;
mod smp;
mod sync;
mod traps;

use core::fmt::Write;

use guest_logic::args::Args;

use crate::boot_info::{COMMAND_LINE_BYTES, StartInfo, usize_of};
use crate::dirty::{Rate, Share, Worker};
use crate::memory::{Pages, Ram};
use crate::monitor::Monitor;
use crate::net::Nics;
use crate::serial::say;

core::arch::global_asm!(include_str!("boot.s"), options(att_syntax));
core::arch::global_asm!(include_str!("trap.s"), options(att_syntax));

const PAGES_PER_MIB: u64 = 256;

/// Where `boot.s` arrives, in ring 3 with a stack.
#[unsafe(no_mangle)]
extern "C" fn guest_main() -> ! {
    serial::say_raw("FERRY-GUEST up\n");
    let started = cpu::tsc();
    traps::install();
    lapic::enable();
    let Some(info) = StartInfo::find() else {
        say!("FAIL no PVH start info");
        serial::flush();
        power::park()
    };
    let mut line = [0; COMMAND_LINE_BYTES];
    let args = Args::new(info.command_line(&mut line));
    let source = clock::calibrate(&args);
    say!(
        "CLOCK {{\"tsc\":{started},\"tsc_khz\":{},\"source\":\"{source}\"}}",
        clock::tsc_khz()
    );
    let mut ram = Ram::of(&info, &args);
    let mem = args.number("mem", 0) << 20;
    match args.text("mode") {
        Some("smoke") => smoke::run(&args, &ram.into_pages(mem)),
        Some("crash") => traps::crash(),
        _ => {
            let nics = Nics::find(&args, &mut ram);
            dirty(args, ram.into_pages(mem), nics)
        }
    }
}

/// `mode=dirty`.
fn dirty(args: Args<'_>, pages: Pages, mut nics: Nics) -> ! {
    let from = cpu::tsc();
    dirty::fill_share(&pages);
    let ms = clock::to_us(cpu::tsc() - from) / 1000;
    let count = pages.count();
    say!("FILL {{\"pages\":{count},\"ms\":{ms}}}");
    let cpus = smp::start(usize_of(args.number("smp", 1)));
    let share = |cpu| share_of(&args, &pages, cpu, cpus as u64);
    for (cpu, index) in (1..cpus).zip(1..) {
        dirty::assign(cpu, share(index));
    }
    let mut worker = Worker::new(0, share(0));
    nics.start();
    say!("READY {{\"pages\":{count},\"cpus\":{cpus}}}");
    let mut monitor = Monitor::new(args, cpus, cpu::tsc());
    loop {
        let now = clock::beat(0);
        let busy = worker.step(now) | nics.poll(now);
        monitor.step(now, &mut nics);
        if !serial::pump() && !busy {
            worker.rest();
        }
    }
}

/// The `index`-th of `cpus` equal shares.
fn share_of(args: &Args<'_>, pages: &Pages, index: u64, cpus: u64) -> Share {
    let (first, end) = (
        pages.count() * index / cpus,
        pages.count() * (index + 1) / cpus,
    );
    let hot = args.number("hot", 0) * PAGES_PER_MIB / cpus;
    let rate = match args.text("rate") {
        Some("max") => Rate::Max,
        _ => Rate::BytesPerSecond((args.number("rate", 0) << 20) / cpus),
    };
    Share {
        pages: *pages,
        first,
        end,
        hot_end: if hot == 0 { end } else { end.min(first + hot) },
        rate,
        idle_us: u32::try_from(args.number("idle", 0)).unwrap_or(u32::MAX),
    }
}

/// A panic is a bug of the guest: said without queue or lock, then silence.
#[panic_handler]
fn panic(info: &core::panic::PanicInfo<'_>) -> ! {
    let _ = writeln!(serial::Raw, "PANIC {info}");
    power::park()
}
