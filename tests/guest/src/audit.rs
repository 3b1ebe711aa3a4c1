//! An audit: every CPU checks each of its pages in full, while it goes on
//! with its other work, and the last one to finish completes the result.

use core::sync::atomic::{AtomicU64, Ordering::SeqCst};

/// How many audits were asked for. A CPU that has seen fewer starts one.
static ASKED: AtomicU64 = AtomicU64::new(0);
static FINISHED_CPUS: AtomicU64 = AtomicU64::new(0);
static PAGES: AtomicU64 = AtomicU64::new(0);
static CORRUPT: AtomicU64 = AtomicU64::new(0);

/// Asks all CPUs for an audit. The one before must be complete.
pub(crate) fn ask() {
    for counter in [&FINISHED_CPUS, &PAGES, &CORRUPT] {
        counter.store(0, SeqCst);
    }
    ASKED.fetch_add(1, SeqCst);
}

/// Pages checked and found corrupt, once all `cpus` have finished.
pub(crate) fn result(cpus: u64) -> Option<(u64, u64)> {
    (FINISHED_CPUS.load(SeqCst) >= cpus).then(|| (PAGES.load(SeqCst), CORRUPT.load(SeqCst)))
}

/// One CPU's part in audits.
pub(crate) struct Audit {
    seen: u64,
    position: Option<u64>,
    corrupt: u64,
    pages: u64,
}

impl Audit {
    /// No audit under way.
    pub(crate) const fn new() -> Self {
        Self {
            seen: 0,
            position: None,
            corrupt: 0,
            pages: 0,
        }
    }

    /// The next page to check, starting at `first`; `None` when no audit is
    /// under way.
    pub(crate) fn position(&mut self, first: u64) -> Option<u64> {
        let asked = ASKED.load(SeqCst);
        if asked != self.seen {
            *self = Self {
                seen: asked,
                position: Some(first),
                corrupt: 0,
                pages: 0,
            };
        }
        self.position
    }

    /// Notes that `pages` were checked; `last` ends this CPU's part.
    pub(crate) fn advance(&mut self, pages: u64, corrupt: u64, last: bool) {
        self.pages += pages;
        self.corrupt += corrupt;
        self.position = self
            .position
            .map(|position| position + pages)
            .filter(|_| !last);
        if last {
            PAGES.fetch_add(self.pages, SeqCst);
            CORRUPT.fetch_add(self.corrupt, SeqCst);
            FINISHED_CPUS.fetch_add(1, SeqCst);
        }
    }
}
