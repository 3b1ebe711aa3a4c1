//! How patient a side is.

use std::time::Duration;

/// Bounds in time on what the peer may do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Limits {
    /// Longest silence of the peer, and longest time in which it takes nothing of what is
    /// written to it.
    pub idle: Duration,
    /// The same for the source while its guest stands still and has not been handed over: after
    /// so much silence the guest goes on where it is. A dead connection costs the guest about
    /// this. The source alone gives up so soon: before the commit that is always safe, and a
    /// destination that gave up with the commit on its way would leave no guest running.
    pub standstill: Duration,
    /// Longest time for the peer to answer a question, be it ever so lively meanwhile: preparing
    /// the destination, loading the state, committing.
    pub answer: Duration,
    /// Silence of this side after which it says that it is still there; well below the peer's
    /// `idle` and `standstill`.
    pub beat: Duration,
}

impl Default for Limits {
    /// 10 s of silence, but 2 s while the guest stands still; 120 s for an answer (a destination
    /// pins all its memory in one of them); a sign of life each 150 ms, so that a lost packet and
    /// a busy host do not add up to 2 s.
    fn default() -> Self {
        Self {
            idle: Duration::from_secs(10),
            standstill: Duration::from_secs(2),
            answer: Duration::from_secs(120),
            beat: Duration::from_millis(150),
        }
    }
}
