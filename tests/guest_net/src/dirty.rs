//! Memory that is written all the time and must never change by itself.
//!
//! Each page holds a pattern made of its number and of how often it was written. How often is
//! also kept aside, so that an old copy of a page, sound in itself, is found out; and the sum over
//! all pages is kept in a third place.

use std::time::{Duration, Instant};

use anyhow::{Context, ensure};

use crate::Verdict;
use crate::args::Args;
use crate::json::Line;
use crate::pattern;
use crate::progress::{Gaps, Schedule};

/// 64-bit words of a page.
const PAGE_WORDS: usize = 512;
const PAGE_BYTES: usize = PAGE_WORDS * 8;
/// Pages of one MiB.
const MIB_PAGES: u64 = 256;
/// Most pages written or checked before time and signals are looked at again.
const BATCH: u64 = 256;

/// The memory under test.
pub(crate) struct Memory {
    words: Vec<u64>,
    /// Where the first whole page starts in `words`.
    start: usize,
    /// How often each page was written.
    generations: Vec<u64>,
    /// The sum of `generations`.
    writes: u64,
    /// Which page comes next, in a fixed random order.
    next_write: u64,
    next_check: u64,
}

impl Memory {
    /// Takes `pages` of memory and writes each once.
    pub(crate) fn new(pages: usize) -> anyhow::Result<Self> {
        let words = pages
            .checked_add(1)
            .and_then(|pages| pages.checked_mul(PAGE_WORDS));
        let mut memory = Self {
            words: vec![0; words.context("that is more memory than there can be")?],
            start: 0,
            generations: vec![0; pages],
            writes: 0,
            next_write: 0,
            next_check: 0,
        };
        let misaligned = memory.words.as_ptr().addr() % PAGE_BYTES;
        memory.start = (PAGE_BYTES - misaligned) % PAGE_BYTES / 8;
        for page in 0..pages {
            memory.write(page);
        }
        Ok(memory)
    }

    /// How many pages there are.
    fn pages(&self) -> usize {
        self.generations.len()
    }

    fn page(&self, page: usize) -> &[u64] {
        &self.words[self.start + page * PAGE_WORDS..][..PAGE_WORDS]
    }

    fn write(&mut self, page: usize) {
        let generation = self.generations[page] + 1;
        let words = &mut self.words[self.start + page * PAGE_WORDS..][..PAGE_WORDS];
        for (word, index) in words.iter_mut().zip(0..) {
            *word = pattern::word(seed(page, generation), index);
        }
        self.generations[page] = generation;
        self.writes += 1;
    }

    /// Writes `count` pages.
    pub(crate) fn write_some(&mut self, count: u64) {
        for _ in 0..count {
            let page = pick(pattern::word(0, self.next_write), self.pages());
            self.next_write += 1;
            self.write(page);
        }
    }

    /// Whether the page holds what was last written to it.
    fn is_right(&self, page: usize) -> bool {
        let seed = seed(page, self.generations[page]);
        self.page(page)
            .iter()
            .zip(0..)
            .all(|(word, index)| *word == pattern::word(seed, index))
    }

    /// How many of the next `count` pages in turn are wrong.
    pub(crate) fn check_some(&mut self, count: u64) -> u64 {
        let mut wrong = 0;
        for _ in 0..count {
            let page = pick(self.next_check, self.pages());
            self.next_check += 1;
            wrong += u64::from(!self.is_right(page));
        }
        wrong
    }

    /// How many of all pages are wrong.
    pub(crate) fn check_all(&self) -> u64 {
        let wrong = (0..self.pages())
            .filter(|page| !self.is_right(*page))
            .count();
        u64::try_from(wrong).unwrap_or(u64::MAX)
    }

    /// Whether no write has been forgotten.
    pub(crate) fn counts_are_right(&self) -> bool {
        self.generations
            .iter()
            .fold(0_u64, |sum, count| sum.wrapping_add(*count))
            == self.writes
    }
}

/// What a page holds after it was written `generation` times.
fn seed(page: usize, generation: u64) -> u64 {
    // A page's number fits in 64 bits.
    pattern::word(generation, u64::try_from(page).unwrap_or(0))
}

/// One of `pages`.
fn pick(number: u64, pages: usize) -> usize {
    let pages = u64::try_from(pages).unwrap_or(u64::MAX);
    usize::try_from(number % pages.max(1)).unwrap_or(0)
}

/// `dirty`.
pub(crate) fn run(mut args: Args) -> anyhow::Result<Verdict> {
    let mib: u64 = args.required("mib")?;
    let rate = args.option("rate")?.unwrap_or(mib);
    let seconds = args.option("seconds")?;
    args.finish()?;
    let pages = mib
        .checked_mul(MIB_PAGES)
        .and_then(|pages| usize::try_from(pages).ok());
    let pages = pages.filter(|pages| *pages > 0);
    let mut memory = Memory::new(pages.with_context(|| format!("--mib {mib} is not possible"))?)?;
    let pages_per_second = rate.checked_mul(MIB_PAGES);
    ensure!(pages_per_second.is_some(), "--rate {rate} is not possible");
    run_on(
        &mut memory,
        Schedule::new(seconds),
        pages_per_second.unwrap_or(0),
    )
}

fn run_on(memory: &mut Memory, mut schedule: Schedule, rate: u64) -> anyhow::Result<Verdict> {
    let (mut handled, mut verified, mut corrupt) = (0_u64, 0_u64, 0_u64);
    let mut gaps = Gaps::new();
    Line::new("ready")
        .number("pages", u64::try_from(memory.pages())?)
        .print()?;
    while !schedule.is_over(Instant::now()) {
        let now = Instant::now();
        gaps.event(now);
        let due = schedule.due(rate, now).saturating_sub(handled);
        // What is late is not made up for: a pause must not be followed by a storm.
        handled += due;
        memory.write_some(due.min(BATCH));
        corrupt += memory.check_some(BATCH / 4);
        verified += BATCH / 4;
        if schedule.report_is_due(now) {
            Line::new("progress")
                .number("writes", memory.writes)
                .number("verified", verified)
                .number("corrupt", corrupt)
                .number("longest_gap_ms", gaps.longest_ms(Instant::now()))
                .print()?;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    corrupt += memory.check_all();
    verified += u64::try_from(memory.pages())?;
    let counts = memory.counts_are_right();
    Line::new("done")
        .number("writes", memory.writes)
        .number("verified", verified)
        .number("corrupt", corrupt)
        .truth("counts_right", counts)
        .number("longest_gap_ms", gaps.longest_ms(Instant::now()))
        .print()?;
    Ok(Verdict::of(corrupt == 0 && counts))
}

#[cfg(test)]
mod tests;
