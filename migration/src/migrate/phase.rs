//! Where each side is.

use serde::{Deserialize, Serialize};

/// The phases of the source.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(tag = "name", rename_all = "kebab-case")]
pub enum SourcePhase {
    /// Asking the destination whether the VM can move there.
    #[default]
    Preflight,
    /// Starting dirty logs and devices' pre-copy.
    Setup,
    /// Sending memory while the guest runs.
    Precopy {
        /// Which round, from 1.
        round: u32,
    },
    /// The guest stands still; the rest is sent.
    Switchover,
    /// The destination owns the guest; cleaning up.
    Finalize,
    /// The guest runs at the destination.
    Done,
    /// The migration failed.
    Aborted {
        /// The chain of errors.
        why: String,
    },
}

/// The phases of the destination.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(tag = "name", rename_all = "kebab-case")]
pub enum DestinationPhase {
    /// Waiting for the manifest.
    #[default]
    Listening,
    /// All is opened, mapped and pinned.
    Prepared,
    /// Memory and state arrive.
    Loading,
    /// Everything is here; waiting for the commit.
    Ready,
    /// The guest runs here.
    Running,
    /// The migration failed; nothing runs here.
    Aborted {
        /// The chain of errors.
        why: String,
    },
}

impl SourcePhase {
    /// Short name for errors and events.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Preflight => "preflight",
            Self::Setup => "setup",
            Self::Precopy { .. } => "precopy",
            Self::Switchover => "switchover",
            Self::Finalize => "finalize",
            Self::Done => "done",
            Self::Aborted { .. } => "aborted",
        }
    }
}

impl DestinationPhase {
    /// Short name for errors and events.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Listening => "listening",
            Self::Prepared => "prepared",
            Self::Loading => "loading",
            Self::Ready => "ready",
            Self::Running => "running",
            Self::Aborted { .. } => "aborted",
        }
    }
}
