//! How fast it goes, how long the guest would stand still, and not going faster than allowed.

use std::time::{Duration, Instant};

/// Bandwidth assumed until some was measured, in bytes per second: low, so that a first guess
/// never switches over too early.
const ASSUMED_BANDWIDTH: u64 = 64 << 20;

/// Fewer bytes than this say nothing about the bandwidth: they only measure latency.
const LEAST_SAMPLE: u64 = 1 << 20;

/// The bandwidth of the way to the destination, its memory included: bytes count when the
/// destination has acknowledged them.
#[derive(Debug, Default)]
pub(super) struct Bandwidth {
    measured: Option<u64>,
    bytes: u64,
    busy: Duration,
}

impl Bandwidth {
    /// So many bytes were sent, which took so long (reading them from guest memory included).
    pub(super) fn sent(&mut self, bytes: u64, took: Duration) {
        self.bytes = self.bytes.saturating_add(bytes);
        self.busy = self.busy.saturating_add(took);
    }

    /// What was sent is acknowledged, after a wait for it.
    pub(super) fn acknowledged(&mut self, waited: Duration) {
        let busy = self.busy.saturating_add(waited).as_nanos().max(1);
        if self.bytes >= LEAST_SAMPLE {
            let rate = u128::from(self.bytes).saturating_mul(1_000_000_000) / busy;
            let rate = u64::try_from(rate).unwrap_or(u64::MAX).max(1);
            // Half old, half new: follows the network in a few rounds, and one bad round does
            // not decide.
            self.measured = Some(match self.measured {
                Some(old) => old / 2 + rate / 2,
                None => rate,
            });
        }
        self.bytes = 0;
        self.busy = Duration::ZERO;
    }

    /// Bytes per second, if measured.
    pub(super) fn measured(&self) -> Option<u64> {
        self.measured
    }

    /// Time to move so many bytes.
    pub(super) fn time_for(&self, bytes: u64) -> Duration {
        let rate = self.measured.unwrap_or(ASSUMED_BANDWIDTH).max(1);
        let nanos = u128::from(bytes).saturating_mul(1_000_000_000) / u128::from(rate);
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }

    /// Bytes that move in so much time.
    pub(super) fn bytes_in(&self, time: Duration) -> u64 {
        let rate = u128::from(self.measured.unwrap_or(ASSUMED_BANDWIDTH));
        let bytes = rate.saturating_mul(time.as_nanos()) / 1_000_000_000;
        u64::try_from(bytes).unwrap_or(u64::MAX)
    }
}

/// Holds the sender to a number of bytes per second.
#[derive(Debug)]
pub(super) struct Pacer {
    limit: Option<u64>,
    /// When what was sent so far is paid for.
    due: Option<Instant>,
}

impl Pacer {
    /// A pacer for this many bytes per second.
    pub(super) fn new(limit: Option<u64>) -> Self {
        Self { limit, due: None }
    }

    /// Most bytes to send at once: a tenth of a second's worth, so that the flow stays even.
    pub(super) fn burst(&self) -> usize {
        self.limit.map_or(usize::MAX, |limit| {
            usize::try_from(limit / 10).unwrap_or(usize::MAX)
        })
    }

    /// So many bytes were sent now: how long to wait before the next.
    pub(super) fn pay(&mut self, bytes: u64, now: Instant) -> Duration {
        let Some(limit) = self.limit else {
            return Duration::ZERO;
        };
        let nanos = u128::from(bytes).saturating_mul(1_000_000_000) / u128::from(limit.max(1));
        let cost = Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
        // Idle time is not saved up.
        let from = self.due.map_or(now, |due| due.max(now));
        match from.checked_add(cost) {
            Some(due) => {
                self.due = Some(due);
                due.saturating_duration_since(now)
            }
            None => cost,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bandwidth_counts_acknowledged_bytes_and_ignores_small_rounds() {
        let mut bandwidth = Bandwidth::default();
        assert_eq!(
            bandwidth.time_for(ASSUMED_BANDWIDTH),
            Duration::from_secs(1)
        );
        bandwidth.sent(LEAST_SAMPLE - 1, Duration::from_secs(1));
        bandwidth.acknowledged(Duration::ZERO);
        assert_eq!(bandwidth.measured(), None);
        bandwidth.sent(200 << 20, Duration::from_millis(500));
        bandwidth.acknowledged(Duration::from_millis(500));
        assert_eq!(bandwidth.measured(), Some(200 << 20));
        bandwidth.sent(100 << 20, Duration::from_secs(1));
        bandwidth.acknowledged(Duration::ZERO);
        assert_eq!(bandwidth.measured(), Some(150 << 20));
        assert_eq!(bandwidth.time_for(15 << 20), Duration::from_millis(100));
        assert_eq!(bandwidth.bytes_in(Duration::from_millis(100)), 15 << 20);
    }

    #[test]
    fn extremes_do_not_overflow() {
        let mut bandwidth = Bandwidth::default();
        bandwidth.sent(u64::MAX, Duration::ZERO);
        bandwidth.acknowledged(Duration::ZERO);
        assert!(bandwidth.time_for(u64::MAX) > Duration::ZERO);
        let mut pacer = Pacer::new(Some(1));
        assert!(pacer.pay(u64::MAX, Instant::now()) > Duration::from_secs(1 << 30));
    }

    #[test]
    fn pacing_adds_up_and_saves_nothing() {
        let start = Instant::now();
        let mut pacer = Pacer::new(Some(1000));
        assert_eq!(pacer.pay(100, start), Duration::from_millis(100));
        assert_eq!(pacer.pay(100, start), Duration::from_millis(200));
        let later = start + Duration::from_secs(10);
        assert_eq!(pacer.pay(100, later), Duration::from_millis(100));
        assert_eq!(Pacer::new(None).pay(1 << 40, start), Duration::ZERO);
        assert_eq!(pacer.burst(), 100);
    }
}
