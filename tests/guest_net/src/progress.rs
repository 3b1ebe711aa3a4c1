//! When to report, when to end, and how long nothing happened.

use std::time::{Duration, Instant};

use crate::stop;

/// How long a blocking call may last before signals and reports are looked at again.
pub(crate) const PATIENCE: Duration = Duration::from_millis(100);

/// The longest time between two events.
#[derive(Debug)]
pub(crate) struct Gaps {
    last: Option<Instant>,
    longest: Duration,
}

impl Gaps {
    /// Nothing happened yet; time counts from the first event.
    pub(crate) const fn new() -> Self {
        Self {
            last: None,
            longest: Duration::ZERO,
        }
    }

    /// Something happened.
    pub(crate) fn event(&mut self, now: Instant) {
        self.longest = self.longest(now);
        self.last = Some(now);
    }

    /// The longest gap, the current one included.
    pub(crate) fn longest(&self, now: Instant) -> Duration {
        let current = self.last.map(|last| now.saturating_duration_since(last));
        self.longest.max(current.unwrap_or_default())
    }

    /// [`longest`](Self::longest) in milliseconds.
    pub(crate) fn longest_ms(&self, now: Instant) -> u64 {
        u64::try_from(self.longest(now).as_millis()).unwrap_or(u64::MAX)
    }

    /// How long nothing has happened; `None` before the first event.
    pub(crate) fn idle(&self, now: Instant) -> Option<Duration> {
        self.last.map(|last| now.saturating_duration_since(last))
    }
}

/// When to report, and when to end.
#[derive(Debug)]
pub(crate) struct Schedule {
    start: Instant,
    next_report: Instant,
    limit: Option<Duration>,
}

impl Schedule {
    const REPORTS: Duration = Duration::from_secs(1);

    /// Starts now and ends after `seconds`, if that is given.
    pub(crate) fn new(seconds: Option<u64>) -> Self {
        let start = Instant::now();
        Self {
            start,
            next_report: start + Self::REPORTS,
            limit: seconds.map(Duration::from_secs),
        }
    }

    /// Whether time is up or a signal asked to end.
    pub(crate) fn is_over(&self, now: Instant) -> bool {
        let over = self
            .limit
            .is_some_and(|limit| now.duration_since(self.start) >= limit);
        over || stop::requested()
    }

    /// Whether a report is due; after a pause one, not one for each second of it.
    pub(crate) fn report_is_due(&mut self, now: Instant) -> bool {
        let due = now >= self.next_report;
        if due {
            self.next_report = now + Self::REPORTS;
        }
        due
    }

    /// How many of `per_second` events are due until `now`.
    pub(crate) fn due(&self, per_second: u64, now: Instant) -> u64 {
        let elapsed = now.duration_since(self.start).as_micros();
        let due = elapsed.saturating_mul(u128::from(per_second)) / 1_000_000;
        u64::try_from(due).unwrap_or(u64::MAX)
    }
}
