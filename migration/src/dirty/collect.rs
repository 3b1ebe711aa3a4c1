//! Asking all sources what was written.

use std::time::{Duration, Instant};

use iova_bitmap::IovaBitmap;

use super::GuestDirty;
use super::layout::Window;
use crate::addr::{Iova, IovaRange};
use crate::error_chain::ErrorChain;
use crate::source::{DirtyError, DirtySource, Precision, Reported};
use crate::sync::{self, Mutex};

/// How sources are asked.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Collect {
    /// How many sources that fail are started anew, everything being dirty then, before an error
    /// fails the whole. Where sending everything again would take too long, 0.
    pub restarts: u32,
    /// Threads that ask, each another source; 1 for this thread only. More are worth it where
    /// sources wait for something else (a device's firmware, another process).
    pub threads: usize,
}

impl Default for Collect {
    /// On this thread, and a failure is an error.
    fn default() -> Self {
        Self {
            restarts: 0,
            threads: 1,
        }
    }
}

/// What one source said in one [`GuestDirty::collect`].
#[derive(Clone, PartialEq, Eq, Debug, serde::Serialize)]
pub struct SourceReport {
    /// The source's [`DirtySource::id`].
    pub id: String,
    /// Host pages it reported, whether or not another source reported them too; `None` if nobody
    /// counted.
    pub pages: Option<u64>,
    /// How exact it is; [`Precision::Everything`] if it failed.
    pub precision: Precision,
    /// The page size it tracks at, in bytes.
    pub granularity: u64,
    /// How long its report took, all windows together.
    pub took: Duration,
    /// Why it had to be started anew, if it had.
    pub failure: Option<String>,
}

/// What came of asking one source.
struct Outcome {
    pages: Option<u64>,
    took: Duration,
    failure: Option<DirtyError>,
}

impl Outcome {
    const fn new() -> Self {
        Self {
            pages: Some(0),
            took: Duration::ZERO,
            failure: None,
        }
    }

    /// Asks `source` for one window, unless it failed before.
    fn ask(&mut self, source: &mut dyn DirtySource, window: IovaRange, into: &mut IovaBitmap) {
        if self.failure.is_some() {
            return;
        }
        let began = Instant::now();
        let reported = source.report(window, into);
        self.took = self.took.saturating_add(began.elapsed());
        match reported {
            Ok(Reported { pages }) => {
                self.pages = self
                    .pages
                    .zip(pages)
                    .map(|(sum, more)| sum.saturating_add(more));
            }
            Err(error) => self.failure = Some(error),
        }
    }
}

impl GuestDirty {
    /// Takes what every source has to report, and starts a new round: [`next_run`](Self::next_run)
    /// begins anew at the lowest page.
    ///
    /// All sources are asked, whichever fail.
    ///
    /// # Errors
    /// Of a source that failed and was not, or could not be, started anew. Every page is dirty
    /// then.
    pub fn collect(
        &mut self,
        sources: &mut [Box<dyn DirtySource>],
        how: Collect,
    ) -> Result<Vec<SourceReport>, DirtyError> {
        let began = Instant::now();
        self.give_back();
        let threads = self.threads(how.threads.min(sources.len()));
        let outcomes = if threads > 1 {
            self.ask_together(sources, threads)
        } else {
            self.ask_in_turn(sources)
        };
        let reports = self.settle(sources, outcomes, how.restarts);
        self.tracking_time = self.tracking_time.saturating_add(began.elapsed());
        reports
    }

    /// All sources for one window before the next; counts what is dirty.
    fn ask_in_turn(&mut self, sources: &mut [Box<dyn DirtySource>]) -> Vec<Outcome> {
        let mut outcomes: Vec<Outcome> = sources.iter().map(|_| Outcome::new()).collect();
        for window in &mut self.windows {
            let window = window.get_mut();
            let range = window.range();
            if sources.len() > 1 {
                window.warm();
            }
            for (source, outcome) in sources.iter_mut().zip(&mut outcomes) {
                outcome.ask(source.as_mut(), range, &mut window.dirty);
            }
            // While it is in the cache.
            window.recount();
        }
        outcomes
    }

    /// Sources are dealt out to `threads` threads, this one among them; counts what is dirty.
    fn ask_together(
        &mut self,
        sources: &mut [Box<dyn DirtySource>],
        threads: usize,
    ) -> Vec<Outcome> {
        let mut outcomes: Vec<Outcome> = sources.iter().map(|_| Outcome::new()).collect();
        let windows = &self.windows;
        let queue = Mutex::new(sources.iter_mut().zip(&mut outcomes));
        let work = |scratch: &mut IovaBitmap| {
            // The lock is held for the taking only, not while the source is asked.
            let next = || queue.lock().next();
            while let Some((source, outcome)) = next() {
                ask_apart(source.as_mut(), outcome, windows, scratch);
            }
        };
        let mut scratch = self.scratch.iter_mut().take(threads);
        let own = scratch.next();
        sync::thread::scope(|scope| {
            for scratch in scratch {
                // A thread that cannot be had leaves its share to the others.
                sync::spawn_scoped(scope, "dirty-report", || work(scratch));
            }
            if let Some(own) = own {
                work(own);
            }
        });
        for window in &mut self.windows {
            window.get_mut().recount();
        }
        outcomes
    }

    /// How many threads may ask at once, `wanted` or as many as have a bitmap of their own.
    fn threads(&mut self, wanted: usize) -> usize {
        if wanted <= 1 {
            return 1;
        }
        let largest = self
            .windows
            .iter_mut()
            .map(|window| window.get_mut().dirty.pages());
        let bytes = largest.max().unwrap_or(0).saturating_mul(self.page.bytes());
        while self.scratch.len() < wanted {
            match IovaBitmap::new(Iova(0), bytes, self.page) {
                Ok(bitmap) => self.scratch.push(bitmap),
                // Memory is short; the reports are complete all the same.
                Err(_) => break,
            }
        }
        self.scratch.len().clamp(1, wanted)
    }

    /// Starts anew what failed, and says how it went.
    fn settle(
        &mut self,
        sources: &mut [Box<dyn DirtySource>],
        outcomes: Vec<Outcome>,
        mut restarts: u32,
    ) -> Result<Vec<SourceReport>, DirtyError> {
        let mut reports = Vec::with_capacity(outcomes.len());
        let mut error = None;
        let mut everything = false;
        for (source, outcome) in sources.iter_mut().zip(outcomes) {
            let mut report = SourceReport {
                id: source.id().to_owned(),
                pages: outcome.pages,
                precision: source.precision(),
                granularity: source.granularity().bytes(),
                took: outcome.took,
                failure: None,
            };
            if let Some(failure) = outcome.failure {
                everything = true;
                report.precision = Precision::Everything;
                report.failure = Some(ErrorChain(&failure).to_string());
                let restarted = match restarts.checked_sub(1) {
                    None => Err(failure),
                    Some(left) => {
                        restarts = left;
                        // What cannot be stopped may still be started; if not, that is the error.
                        let _ = source.stop();
                        source.start(&self.ranges)
                    }
                };
                error = error.or(restarted.err());
            }
            reports.push(report);
        }
        // After the restarts, so that no write falls between.
        if everything {
            self.mark_all();
        }
        error.map_or(Ok(reports), Err)
    }
}

/// Asks one source for all windows by way of `scratch`.
fn ask_apart(
    source: &mut dyn DirtySource,
    outcome: &mut Outcome,
    windows: &[Mutex<Window>],
    scratch: &mut IovaBitmap,
) {
    for window in windows {
        let range = window.lock().range();
        if scratch.retarget(range).is_err() {
            // Cannot be: it was made for the largest window. Unknown is dirty.
            window.lock().mark_all();
            continue;
        }
        outcome.ask(source, range, scratch);
        scratch.take_into(&mut window.lock().dirty);
    }
}
