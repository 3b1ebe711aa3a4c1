//! Dirtying pages at a rate, and knowing what each must contain.
//!
//! Every CPU has a contiguous share of the pages and walks through it, pass
//! after pass. A page's generation is then a function of its number and of
//! where the walk is: nothing about single pages needs to be remembered, and a
//! page that lost a write is seen at the next visit or by an audit.

use core::sync::atomic::{AtomicU64, Ordering::Relaxed, Ordering::SeqCst};

use guest_logic::pattern::{PAGE_BYTES, fill, is_intact, is_stamped, stamp};

use crate::audit::Audit;
use crate::clock::{beat, reset_gaps, tsc_khz};
use crate::cpu::halt;
use crate::lapic;
use crate::memory::{Pages, address_of};
use crate::serial::say;
use crate::smp::MAX_CPUS;
use crate::sync::SpinLock;

/// Pages dirtied between two looks at the clock, the network and the serial port.
const BATCH: u64 = 16;
/// Pages audited in one step.
const AUDIT_BATCH: u64 = 64;
/// Errors reported in full; the rest are only counted.
const MAX_REPORTS: u64 = 16;
/// The generation [`fill_share`] leaves.
const FIRST_GENERATION: u64 = 1;

/// What a CPU publishes about its work.
pub(crate) struct Progress {
    /// Pages dirtied so far.
    pub(crate) pages: AtomicU64,
    /// Pass the walk is in, from 1.
    pub(crate) pass: AtomicU64,
    /// Pages found wrong at a visit, and walks found to have jumped.
    pub(crate) errors: AtomicU64,
    /// Pass and position, kept twice (here and in the walk) to notice when
    /// the guest's own bookkeeping is a stale page.
    position: AtomicU64,
}

static PROGRESS: [Progress; MAX_CPUS] = [const {
    Progress {
        pages: AtomicU64::new(0),
        pass: AtomicU64::new(0),
        errors: AtomicU64::new(0),
        position: AtomicU64::new(0),
    }
}; MAX_CPUS];

static REPORTS: AtomicU64 = AtomicU64::new(0);

/// A CPU's published progress.
pub(crate) fn progress(cpu: usize) -> &'static Progress {
    &PROGRESS[cpu]
}

/// What a CPU shall do; handed over to it at its start.
#[derive(Clone, Copy)]
pub(crate) struct Share {
    pub(crate) pages: Pages,
    /// First page of the share.
    pub(crate) first: u64,
    /// One beyond its last page.
    pub(crate) end: u64,
    /// One beyond the last page that is dirtied; the rest keep generation 1.
    pub(crate) hot_end: u64,
    pub(crate) rate: Rate,
    /// Timer period for halting while there is nothing to do; 0 spins.
    pub(crate) idle_us: u32,
}

/// How fast to dirty.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Rate {
    /// As fast as the CPU can.
    Max,
    /// Bytes per second; 0 dirties nothing.
    BytesPerSecond(u64),
}

static SHARES: [SpinLock<Option<Share>>; MAX_CPUS] = [const { SpinLock::new(None) }; MAX_CPUS];

/// Gives a waiting CPU its share.
pub(crate) fn assign(cpu: usize, share: Share) {
    *SHARES[cpu].lock() = Some(share);
}

/// A further CPU's life: waits for its share, then works on it.
pub(crate) fn work_forever(cpu: usize) -> ! {
    let share = loop {
        let assigned = *SHARES[cpu].lock();
        if let Some(share) = assigned {
            break share;
        }
        core::hint::spin_loop();
    };
    let mut worker = Worker::new(cpu, share);
    loop {
        let now = beat(cpu);
        if !worker.step(now) {
            worker.rest();
        }
    }
}

/// Writes every page's first content.
pub(crate) fn fill_share(pages: &Pages) {
    let mut next = 0;
    loop {
        let run = pages.run(next, u64::MAX);
        if run.is_empty() {
            break;
        }
        for page in run {
            fill(page, address_of(page), FIRST_GENERATION);
        }
        next += run.len() as u64;
    }
}

/// Lets batches through at a rate.
struct Pacer {
    cycles_per_batch: Option<u64>,
    due: u64,
}

impl Pacer {
    fn new(rate: Rate, now: u64) -> Self {
        let cycles_per_batch = match rate {
            Rate::Max => Some(0),
            Rate::BytesPerSecond(bytes) => {
                (BATCH * PAGE_BYTES * tsc_khz() * 1000).checked_div(bytes)
            }
        };
        Self {
            cycles_per_batch,
            due: now,
        }
    }

    /// Whether a batch is due. Arrears of more than 100 ms are dropped, so a
    /// pause is not followed by a burst.
    fn admit(&mut self, now: u64) -> bool {
        let Some(cycles) = self.cycles_per_batch else {
            return false;
        };
        if now < self.due {
            return false;
        }
        self.due = (self.due + cycles).max(now.saturating_sub(100 * tsc_khz()));
        true
    }
}

/// One CPU's work.
pub(crate) struct Worker {
    cpu: usize,
    share: Share,
    pacer: Pacer,
    pass: u64,
    next: u64,
    audit: Audit,
}

impl Worker {
    /// Starts the walk at the share's first page.
    pub(crate) fn new(cpu: usize, share: Share) -> Self {
        if share.idle_us != 0 {
            lapic::start_timer(share.idle_us);
        }
        reset_gaps(cpu);
        let worker = Self {
            cpu,
            pacer: Pacer::new(share.rate, crate::cpu::tsc()),
            pass: FIRST_GENERATION,
            next: share.first,
            audit: Audit::new(),
            share,
        };
        worker.publish(0);
        worker
    }

    /// Does what is due: a batch of the walk, a batch of an audit. False when
    /// nothing was.
    pub(crate) fn step(&mut self, now: u64) -> bool {
        let walked = self.share.first < self.share.hot_end && self.pacer.admit(now);
        if walked {
            self.walk();
        }
        self.audit_step() || walked
    }

    /// Waits a little: halts when a timer runs, else spins once.
    pub(crate) fn rest(&self) {
        if self.share.idle_us == 0 {
            core::hint::spin_loop();
        } else {
            halt();
        }
    }

    fn position(&self) -> u64 {
        self.pass << 32 | self.next
    }

    fn publish(&self, pages: u64) {
        let progress = &PROGRESS[self.cpu];
        progress.pages.fetch_add(pages, Relaxed);
        progress.pass.store(self.pass, Relaxed);
        progress.position.store(self.position(), Relaxed);
    }

    fn error(&self, what: &str, address: u64, want: u64, got: u64) {
        PROGRESS[self.cpu].errors.fetch_add(1, Relaxed);
        if REPORTS.fetch_add(1, Relaxed) < MAX_REPORTS {
            say!(
                "ERROR {{\"cpu\":{},\"what\":\"{what}\",\"gpa\":\"{address:#x}\",\"want\":{want},\"got\":{got}}}",
                self.cpu
            );
        }
    }

    fn walk(&mut self) {
        let published = PROGRESS[self.cpu].position.load(Relaxed);
        if published != self.position() {
            let at = core::ptr::from_ref(&PROGRESS[self.cpu]).addr() as u64;
            self.error("position", at, self.position(), published);
        }
        let mut left = BATCH;
        while left > 0 {
            if self.next >= self.share.hot_end {
                self.next = self.share.first;
                self.pass += 1;
            }
            let run = self
                .share
                .pages
                .run(self.next, left.min(self.share.hot_end - self.next));
            for page in run {
                let address = address_of(page);
                if !is_stamped(page, address, self.pass) {
                    self.error("page", address, self.pass, page[0].load(Relaxed));
                }
                stamp(page, address, self.pass + 1);
            }
            let len = run.len() as u64;
            if len == 0 {
                break;
            }
            self.next += len;
            left -= len;
        }
        self.publish(BATCH - left);
    }

    /// The generation a page of the share must have now.
    fn generation(&self, number: u64) -> u64 {
        if number >= self.share.hot_end {
            FIRST_GENERATION
        } else if number < self.next {
            self.pass + 1
        } else {
            self.pass
        }
    }

    /// Checks some pages in full when an audit is under way; false when none is.
    fn audit_step(&mut self) -> bool {
        let Some(from) = self.audit.position(self.share.first) else {
            return false;
        };
        let run = self
            .share
            .pages
            .run(from, AUDIT_BATCH.min(self.share.end.saturating_sub(from)));
        let mut corrupt = 0;
        for (page, number) in run.iter().zip(from..) {
            let (address, generation) = (address_of(page), self.generation(number));
            if !is_intact(page, address, generation) {
                corrupt += 1;
                self.error("content", address, generation, page[0].load(SeqCst));
            }
            beat(self.cpu);
        }
        self.audit.advance(
            run.len() as u64,
            corrupt,
            from + run.len() as u64 >= self.share.end,
        );
        true
    }
}
