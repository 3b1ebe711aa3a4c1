//! The seams between a part of the VM that has state and the migration loop.
//!
//! Small parts (vCPUs, interrupt chips, virtio devices) implement [`Pause`] and [`SaveRestore`];
//! parts whose state streams while the guest runs (passthrough devices) implement
//! [`StateSource`] and [`StateSink`] themselves. No method has a silent default.

/// Why state could not be saved, streamed or loaded.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// The part cannot do this at all.
    #[error("{id}: {operation} is not supported: {remedy}")]
    Unsupported {
        /// Which part.
        id: String,
        /// What was asked.
        operation: &'static str,
        /// What the operator can do.
        remedy: String,
    },
    /// The part tried and failed.
    #[error("{id}: {operation} failed")]
    Failed {
        /// Which part.
        id: String,
        /// What was asked.
        operation: &'static str,
        /// Why.
        #[source]
        cause: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The part failed and was reset to get it back: it runs, but what the guest's driver knows of
    /// it is not true any more.
    #[error(
        "{id}: {operation} failed and the device had to be reset: its driver in the guest must set \
         it up anew"
    )]
    Reset {
        /// Which part.
        id: String,
        /// What was asked.
        operation: &'static str,
        /// Why it failed.
        #[source]
        cause: Box<dyn std::error::Error + Send + Sync>,
    },
    /// State that came from elsewhere is malformed or does not fit this part.
    #[error("{id}: saved state is not acceptable: {reason}")]
    BadState {
        /// Which part.
        id: String,
        /// What is wrong with it.
        reason: String,
    },
}

/// A part that can stop writing guest memory and go on later.
pub trait Pause: Send {
    /// Stops all activity; on return the part writes no guest memory and its state is still.
    fn pause(&mut self) -> Result<(), StateError>;
    /// Goes on.
    fn resume(&mut self) -> Result<(), StateError>;
}

/// A part whose whole state is one bounded blob.
///
/// The blob carries its own version and is untrusted when it comes back.
pub trait SaveRestore: Send {
    /// Upper bound in bytes of what [`save`](Self::save) gives and [`restore`](Self::restore) takes.
    const MAX_STATE_BYTES: usize;
    /// About how many bytes [`save`](Self::save) will give, for the estimate of the downtime: too
    /// high a figure costs rounds of memory, too low a one costs downtime.
    fn expected_bytes(&self) -> usize;
    /// The state of a paused part.
    fn save(&mut self) -> Result<Vec<u8>, StateError>;
    /// Takes over saved state; the part is paused and stays so.
    fn restore(&mut self, state: &[u8]) -> Result<(), StateError>;
}

/// What is left to send of a part's state.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, serde::Serialize, serde::Deserialize)]
pub struct StateSize {
    /// Bytes that can be sent while the guest runs.
    pub precopy_bytes: u64,
    /// Of them, those that the destination should have before the guest stands still.
    pub initial_bytes: u64,
    /// Bytes besides, which can be sent only while the guest stands still.
    pub stop_copy_bytes: u64,
}

impl StateSize {
    /// Bytes that would have to be sent if the guest stood still now.
    pub const fn total(&self) -> u64 {
        self.precopy_bytes.saturating_add(self.stop_copy_bytes)
    }
}

/// One read of state while the guest runs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PrecopyRead {
    /// So many bytes were put into the buffer.
    Data(usize),
    /// Nothing now; there may be more later.
    Empty,
}

/// A part of the source VM whose state is sent.
///
/// Calls come in this order: `start_precopy`, any number of `read_precopy` and `size`, `quiesce`,
/// `stop`, `read_stop_copy` until 0, `finish`. [`wake`](Self::wake) and then [`abort`](Self::abort)
/// may come at any point before `finish` and leave the part running as if nothing had happened.
pub trait StateSource: Send {
    /// Stable identifier; the destination's sink of the same id gets the state.
    fn id(&self) -> &str;
    /// Whether its state comes from somewhere else and may be large: then a thread of its own
    /// reads it, so that nothing else waits. `read_precopy` is called only of such a part.
    fn is_streamed(&self) -> bool;
    /// What is left to send, for the downtime estimate.
    fn size(&mut self) -> Result<StateSize, StateError>;
    /// Enters the pre-copy phase; a part without one does nothing but must say so by its
    /// [`size`](Self::size).
    fn start_precopy(&mut self) -> Result<(), StateError>;
    /// Reads state while the guest runs.
    fn read_precopy(&mut self, buffer: &mut [u8]) -> Result<PrecopyRead, StateError>;
    /// The vCPUs stand still: starts no more peer-to-peer or guest-visible work (RUNNING_P2P).
    fn quiesce(&mut self) -> Result<(), StateError>;
    /// Every part is quiesced: stops entirely; on return no guest memory is written by it.
    fn stop(&mut self) -> Result<(), StateError>;
    /// Reads the rest of the state; 0 is the end.
    fn read_stop_copy(&mut self, buffer: &mut [u8]) -> Result<usize, StateError>;
    /// The migration failed: acts again, but starts nothing yet that another part could see
    /// (RUNNING_P2P). All parts wake before any runs on. What fails here is told by
    /// [`abort`](Self::abort), which follows in any case.
    fn wake(&mut self);
    /// All parts are awake: runs on. An error of kind [`StateError::Reset`] means that it does.
    fn abort(&mut self) -> Result<(), StateError>;
    /// The destination runs: releases what is held.
    fn finish(&mut self) -> Result<(), StateError>;
}

/// A part of the destination VM whose state is received.
///
/// Calls: `prepare`, `write` for each chunk in order, `finish_load`, `wake`, `run`; or `abort`.
pub trait StateSink: Send {
    /// Stable identifier.
    fn id(&self) -> &str;
    /// Whether its state goes to somewhere else and may be large: then a thread of its own takes
    /// it in, beside those of its neighbours of the same kind.
    fn is_streamed(&self) -> bool;
    /// Makes everything ready that can be before the source stops (open, map, enter RESUMING).
    fn prepare(&mut self) -> Result<(), StateError>;
    /// Takes the next chunk. The bytes are untrusted.
    fn write(&mut self, chunk: &[u8]) -> Result<(), StateError>;
    /// All chunks were given: checks and loads the state; the part still stands.
    fn finish_load(&mut self) -> Result<(), StateError>;
    /// The source has committed: acts, but starts nothing yet that another part could see
    /// (RUNNING_P2P). All parts wake before any runs.
    fn wake(&mut self) -> Result<(), StateError>;
    /// All parts are awake: runs.
    fn run(&mut self) -> Result<(), StateError>;
    /// The migration failed: drops everything loaded.
    fn abort(&mut self) -> Result<(), StateError>;
}
