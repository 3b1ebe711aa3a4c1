//! DMA that is known to the byte: the lab's mock device writes pages, and this program, its driver,
//! knows from the device's own count what each of them must hold.
//!
//! Each huge page is half the device's, half not: what is written to the other half is found out, too.

use std::time::{Duration, Instant};

use anyhow::ensure;

use crate::Verdict;
use crate::args::Args;
use crate::json::Line;
use crate::pattern;
use crate::progress::{Gaps, Schedule};

mod device;
mod memory;
mod record;

use device::{Device, Engine, Register, Wide};
use memory::{HugePage, Words};
use record::{Fault, Order};

const PAGE_WORDS: usize = 512;
/// The device's pages of each huge page; as many are not its.
const PAGES_PER_HUGE: usize = 256;
/// Segments that the device can have.
const SEGMENTS_MAX: usize = 128;
/// Pages looked at between two looks at the device's count.
const BATCH: usize = 64;
/// How long a record may be under way before it counts as torn, and how many looks that takes at
/// least: on a busy host the guest may stand still between two of them, and a page be written anew.
const TEAR_PATIENCE: Duration = Duration::from_millis(200);
const TEAR_LOOKS: u32 = 50;

/// What was found so far.
#[derive(Clone, Copy, Default, Debug)]
struct Findings {
    checked: u64,
    stale: u64,
    foreign: u64,
    torn: u64,
    /// Words written that were not the device's to write.
    trespassed: u64,
    doorbells: u64,
    doorbells_wrong: u64,
    peer_checked: u64,
    peer_wrong: u64,
}

impl Findings {
    const fn add(&mut self, fault: Option<Fault>) {
        self.checked += 1;
        match fault {
            None => {}
            Some(Fault::Stale) => self.stale += 1,
            Some(Fault::Foreign) => self.foreign += 1,
            Some(Fault::Torn) => self.torn += 1,
        }
    }

    /// Takes in what was found besides.
    const fn include(&mut self, more: Self) {
        self.checked += more.checked;
        self.stale += more.stale;
        self.foreign += more.foreign;
        self.torn += more.torn;
        self.trespassed += more.trespassed;
        self.doorbells += more.doorbells;
        self.doorbells_wrong += more.doorbells_wrong;
        self.peer_checked += more.peer_checked;
        self.peer_wrong += more.peer_wrong;
    }

    const fn is_right(&self) -> bool {
        self.stale + self.foreign + self.torn + self.trespassed == 0
            && self.doorbells_wrong + self.peer_wrong == 0
    }
}

/// A device and the memory that it writes.
struct Driven {
    device: Device,
    memory: Vec<HugePage>,
    order: Order,
    engine: Engine,
    next: usize,
    /// What the count was at the last look.
    stamp: u64,
    /// Its number among its host's devices: a migration changes it.
    instance: u32,
    /// What that was at the last look.
    now: u32,
}

impl Driven {
    fn new(device: Device, pages: u32, engine: Engine) -> anyhow::Result<Self> {
        let huge = usize::try_from(pages)?.div_ceil(PAGES_PER_HUGE);
        ensure!(
            huge <= SEGMENTS_MAX,
            "--pages {pages} is more than a device can write"
        );
        let memory = memory::huge_pages(huge)?;
        let instance = device.get(Register::Instance);
        let driven = Self {
            device,
            memory,
            order: Order::new(pages, engine.step)?,
            engine,
            next: 0,
            stamp: 0,
            instance,
            now: instance,
        };
        for huge in &driven.memory {
            for at in 0..PAGES_PER_HUGE * PAGE_WORDS {
                huge.words.set(at, 0);
            }
            for (at, word) in foreign_words() {
                huge.words.set(at, word);
            }
        }
        Ok(driven)
    }

    /// The engine's segments: all of them full but the last.
    fn start(&self) {
        let mut left = self.order.pages();
        let segments: Vec<(u64, u32)> = self
            .memory
            .iter()
            .map(|huge| {
                let pages = left.min(PAGES_PER_HUGE);
                left -= pages;
                // At most 256.
                (huge.address, u32::try_from(pages).unwrap_or(0))
            })
            .collect();
        self.device.start(&segments, self.engine);
    }

    /// A page of the device.
    fn page(&self, number: usize) -> Option<Words> {
        let huge = self.memory.get(number / PAGES_PER_HUGE)?;
        let at = number % PAGES_PER_HUGE * PAGE_WORDS;
        huge.words.part(at, PAGE_WORDS)
    }

    /// Looks at the next pages in turn.
    fn check_some(&mut self, count: usize, findings: &mut Findings) {
        let before = self.device.get_wide(Wide::Stamp);
        let pages: Vec<usize> = (0..count)
            .map(|at| (self.next + at) % self.order.pages())
            .collect();
        self.next = (self.next + count) % self.order.pages();
        let seen: Vec<u64> = pages
            .iter()
            .map(|page| self.page(*page).map_or(0, |words| words.get(0)))
            .collect();
        let torn: Vec<bool> = pages.iter().map(|page| self.is_torn(*page)).collect();
        self.stamp = self.device.get_wide(Wide::Stamp);
        for ((page, seen), torn) in pages.into_iter().zip(seen).zip(torn) {
            let fault = record::judge(&self.order, page, seen, before, self.stamp);
            findings.add(fault.or(torn.then_some(Fault::Torn)));
        }
    }

    /// Whether a page is not all of one record, and does not become so.
    fn is_torn(&self, page: usize) -> bool {
        let Some(words) = self.page(page) else {
            return true;
        };
        let began = Instant::now();
        let mut looks = 0;
        while !is_whole(words, self.engine) {
            looks += 1;
            if looks >= TEAR_LOOKS && began.elapsed() > TEAR_PATIENCE {
                return true;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        false
    }

    /// Whether it has become another device since the last look: a migration was.
    fn has_arrived(&mut self) -> bool {
        let before = std::mem::replace(&mut self.now, self.device.get(Register::Instance));
        self.now != before
    }

    /// Looks at all that is not the device's.
    fn check_foreign(&self, findings: &mut Findings) {
        for huge in &self.memory {
            let wrong = foreign_words().filter(|(at, word)| huge.words.get(*at) != *word);
            findings.trespassed += u64::try_from(wrong.count()).unwrap_or(u64::MAX);
        }
    }

    /// Has the device write once, where nothing else is written, and looks at it.
    fn check_doorbell(&self, findings: &mut Findings) {
        const BYTES: u32 = 4096;
        let Some(huge) = self.memory.first() else {
            return;
        };
        let at = doorbell_word();
        // Any number that is another each time.
        let pattern = u32::try_from(findings.doorbells & 0xffff).unwrap_or(0) | 0xd00d_0000;
        // Words of a huge page are few.
        let offset = u64::try_from(at * 8).unwrap_or(0);
        let status = self.device.ring(huge.address + offset, BYTES, pattern);
        let want = u64::from(pattern) << 32 | u64::from(pattern);
        let written = (0..PAGE_WORDS).all(|word| huge.words.get(at + word) == want);
        findings.doorbells += 1;
        findings.doorbells_wrong += u64::from(status != 0 || !written);
    }
}

/// Whether a page holds one record and nothing else, or nothing at all.
fn is_whole(words: Words, engine: Engine) -> bool {
    let stamp = words.get(0);
    let length = usize::try_from(engine.bytes / 8).unwrap_or(0);
    (0..PAGE_WORDS).zip(0..).all(|(at, index)| {
        let want = match at < length && stamp != 0 {
            true => record::word(stamp, engine.pattern, index),
            false => 0,
        };
        words.get(at) == want
    }) && words.get(0) == stamp
}

/// The first word of the page that doorbells write: the last of a huge page.
const fn doorbell_word() -> usize {
    (2 * PAGES_PER_HUGE - 1) * PAGE_WORDS
}

/// The words of a huge page that no device writes, and what they hold.
fn foreign_words() -> impl Iterator<Item = (usize, u64)> {
    (PAGES_PER_HUGE * PAGE_WORDS..doorbell_word())
        .zip(0..)
        .map(|(at, index)| (at, pattern::word(0xf0e1, index)))
}

/// Each device writes to the mailbox of the next one, in a word of its own.
struct Peers(bool);

impl Peers {
    fn start(&self, all: &[Driven]) {
        for (from, to, slot) in self.pairs(all) {
            // A mailbox has 512 words.
            let offset = u64::try_from(slot * 8).unwrap_or(0);
            from.device
                .set_wide(Wide::PeerAddress, to.device.mailbox_address + offset);
        }
    }

    fn check(&self, all: &[Driven], findings: &mut Findings) {
        for (from, to, slot) in self.pairs(all) {
            let before = from.device.get_wide(Wide::PeerStamp);
            let seen = to.device.mailbox.get(slot);
            let after = from.device.get_wide(Wide::PeerStamp);
            findings.peer_checked += 1;
            findings.peer_wrong += u64::from(seen < before || seen > after);
        }
    }

    fn pairs<'a>(
        &self,
        all: &'a [Driven],
    ) -> impl Iterator<Item = (&'a Driven, &'a Driven, usize)> {
        let count = if self.0 { all.len() } else { 0 };
        (0..count).map(move |at| (&all[at], &all[(at + 1) % count], at))
    }
}

/// `mock-dma`.
pub(crate) fn run(mut args: Args) -> anyhow::Result<Verdict> {
    let pages = args.option("pages")?.unwrap_or(1024);
    let rate = args.option("rate")?.unwrap_or(2000);
    let bytes = args.option("record")?.unwrap_or(64);
    let step = args.option("step")?.unwrap_or(1);
    let devices: Option<usize> = args.option("devices")?;
    let peers = Peers(args.option("peers")?.unwrap_or(false));
    let pause = Duration::from_millis(args.option("pause")?.unwrap_or(1));
    let seconds = args.option("seconds")?;
    args.finish()?;
    ensure!(pages > 0, "--pages 0 leaves nothing to check");
    ensure!(
        (8..=4096).contains(&bytes) && bytes % 8 == 0,
        "--record {bytes} is not 8 to 4096 in steps of 8"
    );
    let found = Device::all()?;
    let count = devices.unwrap_or(found.len());
    ensure!(
        count > 0 && count <= found.len(),
        "there are {} mock devices, not {count}",
        found.len()
    );
    let mut all = Vec::new();
    for (device, number) in found.into_iter().take(count).zip(1..) {
        let pattern = pattern::word(0xd3a, number);
        let engine = Engine {
            rate,
            bytes,
            step,
            pattern,
        };
        all.push(Driven::new(device, pages, engine)?);
    }
    run_on(&mut all, &peers, Schedule::new(seconds), pause)
}

/// Looks at some pages of each device, again and again, with pauses of that length.
fn run_on(
    all: &mut [Driven],
    peers: &Peers,
    mut schedule: Schedule,
    pause: Duration,
) -> anyhow::Result<Verdict> {
    let mut findings = Findings::default();
    let mut gaps = Gaps::new();
    peers.start(all);
    for driven in &*all {
        driven.check_doorbell(&mut findings);
        driven.start();
    }
    line("ready", all, &findings)?.print()?;
    let mut arrivals = 0_u64;
    while !schedule.is_over(Instant::now()) {
        if any_arrived(all) {
            arrivals += 1;
            let arrival = check_arrival(all, peers);
            line("arrived", all, &arrival)?
                .number("arrivals", arrivals)
                .truth("right", arrival.is_right())
                .print()?;
            findings.include(arrival);
        }
        for driven in &mut *all {
            let before = driven.stamp;
            driven.check_some(BATCH, &mut findings);
            if driven.stamp > before {
                gaps.event(Instant::now());
            }
        }
        peers.check(all, &mut findings);
        if schedule.report_is_due(Instant::now()) {
            for driven in &*all {
                driven.check_doorbell(&mut findings);
            }
            line("progress", all, &findings)?
                .number("longest_gap_ms", gaps.longest_ms(Instant::now()))
                .print()?;
        }
        std::thread::sleep(pause);
    }
    finish(all, peers, findings, &gaps)
}

/// Whether a migration was since the last look. All devices are looked at: they move together.
fn any_arrived(all: &mut [Driven]) -> bool {
    let mut any = false;
    for driven in all {
        any |= driven.has_arrived();
    }
    any
}

/// Everything, just after a migration. The devices rest since they stopped at the source, as
/// [`Device::resume`] asked them to: else they would write over what was lost.
fn check_arrival(all: &mut [Driven], peers: &Peers) -> Findings {
    let mut findings = Findings::default();
    for driven in &mut *all {
        driven.check_some(driven.order.pages(), &mut findings);
        driven.check_foreign(&mut findings);
        driven.check_doorbell(&mut findings);
    }
    peers.check(all, &mut findings);
    for driven in &*all {
        driven.device.resume();
    }
    findings
}

/// Everything once more, with the devices at rest: now each page must be exact.
fn finish(
    all: &mut [Driven],
    peers: &Peers,
    mut findings: Findings,
    gaps: &Gaps,
) -> anyhow::Result<Verdict> {
    let longest = gaps.longest_ms(Instant::now());
    for driven in &mut *all {
        driven.device.stop();
        driven.check_some(driven.order.pages(), &mut findings);
        driven.check_foreign(&mut findings);
    }
    peers.check(all, &mut findings);
    let failures: u32 = all.iter().map(|d| d.device.get(Register::Failures)).sum();
    let refused: u64 = all
        .iter()
        .map(|d| d.device.get_wide(Wide::PeerRefused))
        .sum();
    let idle = all.iter().any(|driven| driven.stamp == 0);
    let right = findings.is_right() && failures == 0 && refused == 0 && !idle;
    line("done", all, &findings)?
        .number("failures", failures)
        .number("peer_refused", refused)
        .number("longest_gap_ms", longest)
        .truth("right", right)
        .print()?;
    Ok(Verdict::of(right))
}

fn line(event: &str, all: &[Driven], findings: &Findings) -> anyhow::Result<Line> {
    let instances: Vec<u32> = all
        .iter()
        .map(|d| d.device.get(Register::Instance))
        .collect();
    let moved = all
        .iter()
        .zip(&instances)
        .filter(|(d, now)| d.instance != **now);
    let pages: usize = all.iter().map(|driven| driven.order.pages()).sum();
    Ok(Line::new(event)
        .numbers("instances", &instances)
        .number("moved", u64::try_from(moved.count())?)
        .number("pages", u64::try_from(pages)?)
        .number(
            "records",
            all.iter().map(|driven| driven.stamp).sum::<u64>(),
        )
        .number("checked", findings.checked)
        .number("stale", findings.stale)
        .number("foreign", findings.foreign)
        .number("torn", findings.torn)
        .number("trespassed", findings.trespassed)
        .number("doorbells", findings.doorbells)
        .number("doorbells_wrong", findings.doorbells_wrong)
        .number("peer_checked", findings.peer_checked)
        .number("peer_wrong", findings.peer_wrong))
}

#[cfg(test)]
mod tests;
