//! Why a migration failed.

use super::link::LinkError;
use super::pages::NoSuchMemory;
use super::protocol::Refusal;
use crate::dirty::RamLayoutError;
use crate::error_chain::ErrorChain;
use crate::source::DirtyError;
use crate::state::StateError;

/// Why a migration failed. Unless [`guest_is_paused`](Self::guest_is_paused), the source's guest
/// runs on as if there had been none, and nothing runs at the destination.
#[derive(Debug, thiserror::Error)]
pub enum MigrationError {
    /// The VM cannot move, and nothing was changed.
    #[error("{by} refuses the migration: {}", list(refusals))]
    Refused {
        /// Which side: the peer's name, or `this host`.
        by: String,
        /// Every reason found.
        refusals: Vec<Refusal>,
    },
    /// The conversation with the peer failed, or the peer or the operator ended it.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// A writer of guest memory cannot say what it wrote.
    #[error("tracking dirty memory failed")]
    Dirty(#[from] DirtyError),
    /// The guest's RAM cannot be tracked.
    #[error("the guest's memory cannot be tracked")]
    Layout(#[from] RamLayoutError),
    /// A device failed to save, send, load or run.
    #[error("a device failed while {doing}")]
    Device {
        /// What was going on.
        doing: &'static str,
        /// Which device, and why.
        #[source]
        cause: StateError,
    },
    /// The vCPUs could not be stopped or started.
    #[error("the vCPUs could not be {done}")]
    Vcpus {
        /// `paused` or `resumed`.
        done: &'static str,
        /// Why.
        #[source]
        cause: StateError,
    },
    /// Memory was named that the guest does not have.
    #[error("the page data does not fit the guest's memory")]
    Memory(#[from] NoSuchMemory),
    /// A device's state is longer than its manifest allowed.
    #[error("{id}: more than {limit} bytes of state, which is the most it said it has")]
    StateTooLong {
        /// Which device.
        id: String,
        /// The limit of its manifest.
        limit: u64,
    },
    /// A device's state arrived incomplete, changed, twice, or was for none.
    #[error("{id}: the state that arrived is not the state that was sent: {reason}")]
    StateBroken {
        /// Which device, or its number.
        id: String,
        /// What is wrong.
        reason: &'static str,
    },
    /// The two sides count differently; memory got lost.
    #[error("the source sent {sent} bytes of memory, {received} arrived")]
    MemoryMissing {
        /// What the source says.
        sent: u64,
        /// What the destination has.
        received: u64,
    },
    /// The guest dirtied memory faster than it could be sent.
    #[error(
        "no switchover within {timeout_s} s: {remaining_pages} pages are dirty and moving now \
         would stop the guest for {estimate_ms} ms; allow a longer downtime_ms or timeout_s, or \
         set timeout_strategy=ignore"
    )]
    TimedOut {
        /// The time allowed.
        timeout_s: u64,
        /// What is left.
        remaining_pages: u64,
        /// What it would take.
        estimate_ms: u64,
    },
    /// A device had not sent in time what the destination should have before the guest stops.
    #[error(
        "no switchover within {timeout_s} s: {ids} have not sent yet what the destination must have \
         before the guest stops; allow a longer timeout_s, or set timeout_strategy=ignore"
    )]
    DevicesNotReady {
        /// The time allowed.
        timeout_s: u64,
        /// Which.
        ids: String,
    },
    /// The destination was told to run the guest, and has not said that it does. It may run
    /// there: the guest here stays paused. If it is certain that it does not run there, resume it
    /// here by hand.
    #[error(
        "the guest was handed over to {peer}, which did not confirm that it runs it: the guest \
         stays paused here; look at {peer}, and resume the VM here only if it does not run there"
    )]
    CommitUnacknowledged {
        /// To whom.
        peer: String,
        /// What went wrong.
        #[source]
        cause: Box<MigrationError>,
    },
    /// The destination was told to run the guest and said that it failed to. The guest here stays
    /// paused.
    #[error(
        "{peer} took over the guest and could not run it: {reason}: the guest stays paused here; \
         resume the VM here if nothing runs there"
    )]
    DestinationFailed {
        /// Who.
        peer: String,
        /// What it said.
        reason: String,
    },
    /// The migration failed, and so did a part of putting things back.
    #[error("not all could be put back ({}) after the migration failed", problems.join("; "))]
    RollBack {
        /// Why it failed.
        #[source]
        cause: Box<MigrationError>,
        /// What else went wrong.
        problems: Vec<String>,
    },
    /// A thread, an event or a socket could not be had.
    #[error("the system lacks something the migration needs")]
    System(#[source] std::io::Error),
}

fn list(refusals: &[Refusal]) -> String {
    let all: Vec<String> = refusals.iter().map(Refusal::to_string).collect();
    all.join("; ")
}

impl MigrationError {
    /// Why the migration failed in the first place, without what failed after it.
    pub fn root(&self) -> &Self {
        match self {
            Self::RollBack { cause, .. } => cause.root(),
            other => other,
        }
    }

    /// Whether the source's guest must stay paused, because it may run at the destination.
    pub fn guest_is_paused(&self) -> bool {
        matches!(
            self.root(),
            Self::CommitUnacknowledged { .. } | Self::DestinationFailed { .. }
        )
    }

    /// Whether somebody cancelled it on this side.
    pub fn is_cancelled(&self) -> bool {
        matches!(self.root(), Self::Link(LinkError::Cancelled))
    }

    /// The whole chain of errors in one line.
    pub fn chain(&self) -> String {
        ErrorChain(self).to_string()
    }
}
