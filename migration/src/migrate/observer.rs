//! Telling others as it happens.

use super::status::{Side, SourceStatus};

/// A round of memory that the destination has.
#[derive(Clone, PartialEq, Debug)]
pub struct RoundReport {
    /// Which, from 1.
    pub round: u32,
    /// Bytes of guest memory it told of.
    pub memory_bytes: u64,
    /// Of them, zero.
    pub zero_bytes: u64,
    /// Bytes it took on the wire, device state included.
    pub wire_bytes: u64,
    /// How long it took, in µs.
    pub took_us: u64,
    /// Pages dirty after it.
    pub dirty_pages: u64,
    /// What each source reported after it.
    pub sources: Vec<SourceStatus>,
    /// Measured bytes per second.
    pub bandwidth: Option<u64>,
    /// How long the guest would stand still if it moved now, in µs.
    pub downtime_estimate_us: u64,
}

/// Something happened.
#[derive(Clone, PartialEq, Debug)]
pub enum MigrationEvent {
    /// A phase was entered; the last one is `Done`, `Running` or `Aborted` with its reason.
    Phase(Side),
    /// A round is with the destination (source only).
    Round(RoundReport),
    /// A dirty log failed and was started anew; all memory is sent again (source only).
    DirtyLogRestarted {
        /// The source's identifier.
        source: String,
        /// Why it failed.
        why: String,
    },
    /// A device did not come back from a migration that failed and was reset: it runs, and its
    /// driver in the guest has to set it up anew (source only).
    DeviceReset {
        /// The device's identifier.
        device: String,
        /// Why it did not come back.
        why: String,
    },
}

/// Is told what happens. Called on the migration's thread, also while the guest stands still: it
/// must not block.
pub trait Observer {
    /// Something happened.
    fn event(&mut self, event: &MigrationEvent);
}

impl<F: FnMut(&MigrationEvent)> Observer for F {
    fn event(&mut self, event: &MigrationEvent) {
        self(event);
    }
}
