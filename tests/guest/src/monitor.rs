//! What the guest tells and hears over the serial port while it works.

use core::fmt::{self, Write};
use core::sync::atomic::Ordering::Relaxed;

use guest_logic::args::Args;

use crate::clock::{from_ms, reset_gaps, take_gaps, to_us, tsc_khz};
use crate::dirty::progress;
use crate::net::Nics;
use crate::serial::{heard, say, say_with};
use crate::{audit, hotplug, power};

/// Bytes dirtied per page: a page is what a dirty log sees.
const KIB_PER_PAGE: u64 = 4;

/// CPU 0's reporting.
pub(crate) struct Monitor<'a> {
    args: Args<'a>,
    cpus: usize,
    ticks: u64,
    next_tick: u64,
    last_tick: u64,
    next_listen: u64,
    pages_before: u64,
    audit_since: Option<u64>,
    /// Passes between audits; 0 for none.
    audit_every: u64,
    next_audit_pass: u64,
}

impl<'a> Monitor<'a> {
    /// Reports every `tick=` ms (1000), listens every `listen=` ms (20).
    pub(crate) fn new(args: Args<'a>, cpus: usize, now: u64) -> Self {
        let audit_every = args.number("verify_every", 0);
        Self {
            args,
            cpus,
            ticks: 0,
            next_tick: now + from_ms(args.number("tick", 1000)),
            last_tick: now,
            next_listen: now,
            pages_before: 0,
            audit_since: None,
            audit_every,
            next_audit_pass: 1 + audit_every,
        }
    }

    /// Does what is due at `now`.
    pub(crate) fn step(&mut self, now: u64, nics: &mut Nics) {
        if now >= self.next_tick {
            self.tick(now, nics);
            self.next_tick = now + from_ms(self.args.number("tick", 1000));
        }
        if now >= self.next_listen {
            self.next_listen = now + from_ms(self.args.number("listen", 20));
            if let Some(byte) = heard() {
                self.obey(byte, now, nics);
            }
        }
        self.watch_audit(now, nics);
    }

    /// `v` audits all memory, `r` forgets the longest gap, `h` serves hot plug, `q` ends.
    fn obey(&mut self, byte: u8, now: u64, nics: &mut Nics) {
        match byte {
            b'v' => self.start_audit(now, nics),
            b'r' => (0..self.cpus).for_each(reset_gaps),
            b'h' => hotplug::serve(nics),
            b'q' => {
                if now != self.last_tick {
                    self.tick(now, nics);
                }
                say!("DONE");
                power::off(&self.args);
            }
            _ => {}
        }
    }

    fn start_audit(&mut self, now: u64, nics: &mut Nics) {
        if self.audit_since.is_none() {
            self.audit_since = Some(now);
            nics.iter_mut().for_each(|nic| nic.pool().start_audit());
            audit::ask();
        }
    }

    fn watch_audit(&mut self, now: u64, nics: &mut Nics) {
        if let Some(since) = self.audit_since {
            // Not `any`: every NIC takes a step.
            let at_work = nics
                .iter_mut()
                .fold(false, |busy, nic| nic.pool().audit_step() | busy);
            let result = audit::result(self.cpus as u64);
            if let (false, Some((pages, corrupt))) = (at_work, result) {
                self.audit_since = None;
                let ms = to_us(now - since) / 1000;
                let kept: u64 = nics.iter_mut().map(|nic| nic.pool().audited).sum();
                let kept_corrupt: u64 = nics.iter_mut().map(|nic| nic.pool().corrupt).sum();
                say!(
                    "VERIFY {{\"pages\":{pages},\"corrupt\":{corrupt},\"rx_pages\":{kept},\"rx_pages_corrupt\":{kept_corrupt},\"ms\":{ms}}}"
                );
            }
        } else if self.audit_every != 0 && progress(0).pass.load(Relaxed) >= self.next_audit_pass {
            self.next_audit_pass += self.audit_every;
            self.start_audit(now, nics);
        }
    }

    fn tick(&mut self, now: u64, nics: &mut Nics) {
        self.ticks += 1;
        let pages: u64 = (0..self.cpus)
            .map(|cpu| progress(cpu).pages.load(Relaxed))
            .sum();
        let errors: u64 = (0..self.cpus)
            .map(|cpu| progress(cpu).errors.load(Relaxed))
            .sum();
        let kib = (pages - self.pages_before) * KIB_PER_PAGE;
        let rate = tenths_of_mib_per_second(kib, now - self.last_tick);
        let (gap, max_gap) = take_gaps(0);
        let ticks = self.ticks;
        let cpus = self.cpus;
        say_with(|line| {
            write!(
                line,
                "TICK {{\"n\":{ticks},\"tsc\":{now},\"pass\":{},\"pages\":{pages},\"rate_mib_s\":{}.{},\"gap_us\":{},\"max_gap_us\":{},\"errors\":{errors}",
                progress(0).pass.load(Relaxed),
                rate / 10,
                rate % 10,
                to_us(gap),
                to_us(max_gap),
            )?;
            write_cpus(line, cpus)?;
            write_nics(line, nics)?;
            write!(line, "}}")
        });
        self.pages_before = pages;
        self.last_tick = now;
    }
}

/// The other CPUs' gaps and errors, when there are any.
fn write_cpus(line: &mut dyn Write, cpus: usize) -> fmt::Result {
    if cpus < 2 {
        return Ok(());
    }
    write!(line, ",\"cpus\":[")?;
    for cpu in 1..cpus {
        let (gap, max_gap) = take_gaps(cpu);
        let separator = if cpu == 1 { "" } else { "," };
        let pages = progress(cpu).pages.load(Relaxed);
        let (gap, max_gap) = (to_us(gap), to_us(max_gap));
        write!(
            line,
            "{separator}{{\"cpu\":{cpu},\"pages\":{pages},\"gap_us\":{gap},\"max_gap_us\":{max_gap}}}"
        )?;
    }
    write!(line, "]")
}

fn write_nics(line: &mut dyn Write, nics: &mut Nics) -> fmt::Result {
    let mut opening = ",\"nics\":[";
    for nic in nics.iter_mut() {
        write!(line, "{opening}")?;
        nic.report(line)?;
        opening = ",";
    }
    if opening == "," {
        write!(line, "]")
    } else {
        Ok(())
    }
}

fn tenths_of_mib_per_second(kib: u64, cycles: u64) -> u64 {
    let kib_cycles = u128::from(kib) * 10 * 1000 * u128::from(tsc_khz());
    kib_cycles
        .checked_div(1024 * u128::from(cycles))
        .and_then(|rate| rate.try_into().ok())
        .unwrap_or(0)
}
