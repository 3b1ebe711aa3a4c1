//! How patient a side is.

use std::time::Duration;

/// Bounds in time on what the peer may do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Limits {
    /// Longest silence of the peer, and longest time in which it takes nothing of what is
    /// written to it.
    pub idle: Duration,
    /// Longest time for the peer to answer a question, be it ever so lively meanwhile: preparing
    /// the destination, loading the state, committing.
    pub answer: Duration,
    /// Silence of this side after which it says that it is still there; well below the peer's
    /// `idle`.
    pub beat: Duration,
}

impl Default for Limits {
    /// 10 s of silence, 120 s for an answer (a destination pins all its memory in one of them),
    /// a sign of life each second.
    fn default() -> Self {
        Self {
            idle: Duration::from_secs(10),
            answer: Duration::from_secs(120),
            beat: Duration::from_secs(1),
        }
    }
}
