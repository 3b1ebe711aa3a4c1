//! The arcs: what a device does between two neighbouring states.

use super::{DeviceState, MigrationFlags};

/// A step between two states that a device does as a whole (`linux/vfio.h`, "The device migration
/// state", which lists them).
///
/// Which of them a device has follows from its flags: see [`exists_with`](Self::exists_with).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum StateArc {
    /// STOP to RUNNING_P2P: acts again, but for peer-to-peer DMA.
    StopToRunningP2p,
    /// STOP to RUNNING, of a device without RUNNING_P2P.
    StopToRunning,
    /// STOP to STOP_COPY: its state can be read.
    StopToStopCopy,
    /// STOP to RESUMING: its state can be written.
    StopToResuming,
    /// RUNNING to RUNNING_P2P: no more peer-to-peer DMA.
    RunningToRunningP2p,
    /// RUNNING to STOP, of a device without RUNNING_P2P.
    RunningToStop,
    /// RUNNING to PRE_COPY: its state can be read while it runs.
    RunningToPreCopy,
    /// RUNNING_P2P to RUNNING.
    RunningP2pToRunning,
    /// RUNNING_P2P to STOP: acts no more.
    RunningP2pToStop,
    /// RUNNING_P2P to PRE_COPY_P2P: its state can be read while it runs.
    RunningP2pToPreCopyP2p,
    /// PRE_COPY to RUNNING: what was read is void.
    PreCopyToRunning,
    /// PRE_COPY to PRE_COPY_P2P: no more peer-to-peer DMA.
    PreCopyToPreCopyP2p,
    /// PRE_COPY to STOP_COPY, of a device without RUNNING_P2P.
    PreCopyToStopCopy,
    /// PRE_COPY_P2P to RUNNING_P2P: what was read is void.
    PreCopyP2pToRunningP2p,
    /// PRE_COPY_P2P to PRE_COPY.
    PreCopyP2pToPreCopy,
    /// PRE_COPY_P2P to STOP_COPY: acts no more; the rest of its state can be read.
    PreCopyP2pToStopCopy,
    /// STOP_COPY to STOP: its state has been read.
    StopCopyToStop,
    /// RESUMING to STOP: what was written is loaded.
    ResumingToStop,
}

/// What an arc does to the stream of migration data.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum DataSession {
    /// There is none.
    Absent,
    /// One begins: the kernel gives a new descriptor.
    Begins,
    /// It goes on, on the same descriptor.
    GoesOn,
    /// It ends: the descriptor gives and takes nothing any more.
    Ends,
}

impl StateArc {
    /// Every arc that any device has.
    pub const ALL: [Self; 18] = [
        Self::StopToRunningP2p,
        Self::StopToRunning,
        Self::StopToStopCopy,
        Self::StopToResuming,
        Self::RunningToRunningP2p,
        Self::RunningToStop,
        Self::RunningToPreCopy,
        Self::RunningP2pToRunning,
        Self::RunningP2pToStop,
        Self::RunningP2pToPreCopyP2p,
        Self::PreCopyToRunning,
        Self::PreCopyToPreCopyP2p,
        Self::PreCopyToStopCopy,
        Self::PreCopyP2pToRunningP2p,
        Self::PreCopyP2pToPreCopy,
        Self::PreCopyP2pToStopCopy,
        Self::StopCopyToStop,
        Self::ResumingToStop,
    ];

    /// The states it leads from and to.
    pub const fn ends(self) -> (DeviceState, DeviceState) {
        use DeviceState as S;
        match self {
            Self::StopToRunningP2p => (S::Stop, S::RunningP2p),
            Self::StopToRunning => (S::Stop, S::Running),
            Self::StopToStopCopy => (S::Stop, S::StopCopy),
            Self::StopToResuming => (S::Stop, S::Resuming),
            Self::RunningToRunningP2p => (S::Running, S::RunningP2p),
            Self::RunningToStop => (S::Running, S::Stop),
            Self::RunningToPreCopy => (S::Running, S::PreCopy),
            Self::RunningP2pToRunning => (S::RunningP2p, S::Running),
            Self::RunningP2pToStop => (S::RunningP2p, S::Stop),
            Self::RunningP2pToPreCopyP2p => (S::RunningP2p, S::PreCopyP2p),
            Self::PreCopyToRunning => (S::PreCopy, S::Running),
            Self::PreCopyToPreCopyP2p => (S::PreCopy, S::PreCopyP2p),
            Self::PreCopyToStopCopy => (S::PreCopy, S::StopCopy),
            Self::PreCopyP2pToRunningP2p => (S::PreCopyP2p, S::RunningP2p),
            Self::PreCopyP2pToPreCopy => (S::PreCopyP2p, S::PreCopy),
            Self::PreCopyP2pToStopCopy => (S::PreCopyP2p, S::StopCopy),
            Self::StopCopyToStop => (S::StopCopy, S::Stop),
            Self::ResumingToStop => (S::Resuming, S::Stop),
        }
    }

    /// The arc between two states, if they are neighbours for some device.
    pub fn between(from: DeviceState, to: DeviceState) -> Option<Self> {
        Self::ALL.into_iter().find(|arc| arc.ends() == (from, to))
    }

    /// Whether a device with these features has it: one that has both its states, unless there is
    /// a state between them that it has too.
    pub const fn exists_with(self, flags: MigrationFlags) -> bool {
        let (from, to) = self.ends();
        if !flags.contains(from.needs().union(to.needs())) {
            return false;
        }
        match self {
            Self::StopToRunning | Self::RunningToStop | Self::PreCopyToStopCopy => {
                !flags.contains(MigrationFlags::P2P)
            }
            Self::StopToRunningP2p
            | Self::StopToStopCopy
            | Self::StopToResuming
            | Self::RunningToRunningP2p
            | Self::RunningToPreCopy
            | Self::RunningP2pToRunning
            | Self::RunningP2pToStop
            | Self::RunningP2pToPreCopyP2p
            | Self::PreCopyToRunning
            | Self::PreCopyToPreCopyP2p
            | Self::PreCopyP2pToRunningP2p
            | Self::PreCopyP2pToPreCopy
            | Self::PreCopyP2pToStopCopy
            | Self::StopCopyToStop
            | Self::ResumingToStop => true,
        }
    }

    /// What it does to the stream of migration data.
    pub const fn session(self) -> DataSession {
        match self {
            Self::StopToStopCopy
            | Self::StopToResuming
            | Self::RunningToPreCopy
            | Self::RunningP2pToPreCopyP2p => DataSession::Begins,
            Self::PreCopyToPreCopyP2p
            | Self::PreCopyP2pToPreCopy
            | Self::PreCopyToStopCopy
            | Self::PreCopyP2pToStopCopy => DataSession::GoesOn,
            Self::PreCopyToRunning
            | Self::PreCopyP2pToRunningP2p
            | Self::StopCopyToStop
            | Self::ResumingToStop => DataSession::Ends,
            Self::StopToRunningP2p
            | Self::StopToRunning
            | Self::RunningToRunningP2p
            | Self::RunningToStop
            | Self::RunningP2pToRunning
            | Self::RunningP2pToStop => DataSession::Absent,
        }
    }
}

impl std::fmt::Display for StateArc {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (from, to) = self.ends();
        write!(f, "{from} to {to}")
    }
}
