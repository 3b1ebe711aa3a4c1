//! Device states of migration v2 and the ways between them.
//!
//! A device is in one [`DeviceState`]. A state asked for is reached over arcs ([`StateArc`]) that a
//! device implements one by one; which arc comes next is the kernel's table
//! (`vfio_mig_get_next_state`), kept here for both ends: a server walks it with [`Machine`], a
//! client can ask [`path`] what a request will do.

mod arcs;

use bitflags::bitflags;
use rustix::io::Errno;

pub use arcs::{DataSession, StateArc};

/// Migration state (`enum vfio_device_mig_state`).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u32)]
pub enum DeviceState {
    /// Broken until reset.
    Error = 0,
    /// Stands still: no state change, no DMA, no interrupts.
    Stop = 1,
    /// Runs.
    Running = 2,
    /// Stands still; its state is read.
    StopCopy = 3,
    /// Stands still; its state is written.
    Resuming = 4,
    /// Runs but starts no peer-to-peer DMA.
    RunningP2p = 5,
    /// Runs; its state is read already.
    PreCopy = 6,
    /// Both of the last two.
    PreCopyP2p = 7,
}

impl DeviceState {
    /// Every state, in the order of the numbers.
    pub const ALL: [Self; 8] = [
        Self::Error,
        Self::Stop,
        Self::Running,
        Self::StopCopy,
        Self::Resuming,
        Self::RunningP2p,
        Self::PreCopy,
        Self::PreCopyP2p,
    ];

    /// The state of `number`.
    pub const fn from_number(number: u32) -> Option<Self> {
        Some(match number {
            0 => Self::Error,
            1 => Self::Stop,
            2 => Self::Running,
            3 => Self::StopCopy,
            4 => Self::Resuming,
            5 => Self::RunningP2p,
            6 => Self::PreCopy,
            7 => Self::PreCopyP2p,
            _ => return None,
        })
    }

    /// Its number on the wire.
    pub const fn number(self) -> u32 {
        self as u32
    }

    /// Whether migration data can be read in it.
    pub const fn is_saving(self) -> bool {
        matches!(self, Self::StopCopy | Self::PreCopy | Self::PreCopyP2p)
    }

    /// Whether the device may act on its own (DMA, interrupts) in it.
    pub const fn is_running(self) -> bool {
        match self {
            Self::Running | Self::RunningP2p | Self::PreCopy | Self::PreCopyP2p => true,
            Self::Error | Self::Stop | Self::StopCopy | Self::Resuming => false,
        }
    }

    /// The features a device must have to be in it.
    const fn needs(self) -> MigrationFlags {
        match self {
            Self::Error | Self::Stop | Self::Running | Self::StopCopy | Self::Resuming => {
                MigrationFlags::STOP_COPY
            }
            Self::RunningP2p => MigrationFlags::STOP_COPY.union(MigrationFlags::P2P),
            Self::PreCopy => MigrationFlags::STOP_COPY.union(MigrationFlags::PRE_COPY),
            Self::PreCopyP2p => MigrationFlags::all(),
        }
    }
}

impl std::fmt::Display for DeviceState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Error => "ERROR",
            Self::Stop => "STOP",
            Self::Running => "RUNNING",
            Self::StopCopy => "STOP_COPY",
            Self::Resuming => "RESUMING",
            Self::RunningP2p => "RUNNING_P2P",
            Self::PreCopy => "PRE_COPY",
            Self::PreCopyP2p => "PRE_COPY_P2P",
        })
    }
}

bitflags! {
    /// What a device's migration can do (`VFIO_MIGRATION_*`). Legal are `STOP_COPY` alone and
    /// with either or both of the others.
    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    pub struct MigrationFlags: u64 {
        /// STOP, STOP_COPY, RESUMING.
        const STOP_COPY = 1;
        /// RUNNING_P2P.
        const P2P = 2;
        /// PRE_COPY.
        const PRE_COPY = 4;
    }
}

impl MigrationFlags {
    /// The four sets of features that a device can have.
    pub const LEGAL: [Self; 4] = [
        Self::STOP_COPY,
        Self::STOP_COPY.union(Self::P2P),
        Self::STOP_COPY.union(Self::PRE_COPY),
        Self::all(),
    ];
}

/// What there is to read of a device in PRE_COPY (`struct vfio_precopy_info`).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct PrecopyInfo {
    /// Bytes left of what the destination should have before the device is stopped.
    pub initial_bytes: u64,
    /// Bytes besides, which changed after they were read.
    pub dirty_bytes: u64,
    /// Since the last question the device has begun anew: there are initial bytes again.
    pub reinit: bool,
}

/// Why a state cannot be reached.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum StateError {
    /// No way leads there (EINVAL on the wire).
    #[error("no migration path from {from} to {to} with {flags:?}")]
    NoPath {
        /// State now.
        from: DeviceState,
        /// State asked for.
        to: DeviceState,
        /// What the device can.
        flags: MigrationFlags,
    },
    /// The device failed on the way; it is in `at`.
    #[error("the device failed between {at} and {to}")]
    Arc {
        /// Where it was left.
        at: DeviceState,
        /// The next state, which it could not enter.
        to: DeviceState,
        /// What it said.
        #[source]
        errno: Errno,
    },
}

impl StateError {
    /// What to answer the peer.
    pub const fn errno(self) -> Errno {
        match self {
            Self::NoPath { .. } => Errno::INVAL,
            Self::Arc { errno, .. } => errno,
        }
    }
}

/// The first arc on the way between two states for a device with every feature; `Error` where
/// there is none. (`vfio_from_fsm_table` of the kernel.)
const fn full_hop(from: DeviceState, to: DeviceState) -> DeviceState {
    use DeviceState as S;
    match from {
        S::Error => S::Error,
        S::Stop => match to {
            S::Stop => S::Stop,
            S::Running | S::PreCopy | S::PreCopyP2p | S::RunningP2p => S::RunningP2p,
            S::StopCopy => S::StopCopy,
            S::Resuming => S::Resuming,
            S::Error => S::Error,
        },
        S::Running => match to {
            S::Running => S::Running,
            S::PreCopy => S::PreCopy,
            S::Stop | S::PreCopyP2p | S::StopCopy | S::Resuming | S::RunningP2p => S::RunningP2p,
            S::Error => S::Error,
        },
        S::PreCopy => match to {
            S::PreCopy => S::PreCopy,
            S::PreCopyP2p | S::StopCopy => S::PreCopyP2p,
            S::Stop | S::Running | S::Resuming | S::RunningP2p => S::Running,
            S::Error => S::Error,
        },
        S::PreCopyP2p => match to {
            S::PreCopyP2p => S::PreCopyP2p,
            S::PreCopy => S::PreCopy,
            S::StopCopy => S::StopCopy,
            S::Stop | S::Running | S::Resuming | S::RunningP2p => S::RunningP2p,
            S::Error => S::Error,
        },
        S::StopCopy => match to {
            S::StopCopy => S::StopCopy,
            S::Stop | S::Running | S::Resuming | S::RunningP2p => S::Stop,
            S::PreCopy | S::PreCopyP2p | S::Error => S::Error,
        },
        S::Resuming => match to {
            S::Resuming => S::Resuming,
            S::Stop | S::Running | S::StopCopy | S::RunningP2p | S::PreCopy | S::PreCopyP2p => {
                S::Stop
            }
            S::Error => S::Error,
        },
        S::RunningP2p => match to {
            S::RunningP2p => S::RunningP2p,
            S::Running | S::PreCopy => S::Running,
            S::PreCopyP2p => S::PreCopyP2p,
            S::Stop | S::StopCopy | S::Resuming => S::Stop,
            S::Error => S::Error,
        },
    }
}

/// The next state on the way from `from` to `to`, skipping states the device does not have.
///
/// # Errors
/// [`StateError::NoPath`].
pub fn next_hop(
    from: DeviceState,
    to: DeviceState,
    flags: MigrationFlags,
) -> Result<DeviceState, StateError> {
    let refused = StateError::NoPath { from, to, flags };
    if !flags.contains(from.needs().union(to.needs())) {
        return Err(refused);
    }
    let mut next = full_hop(from, to);
    // A skipped state is passed through, so the walk ends as a walk over all states would.
    while !flags.contains(next.needs()) {
        next = full_hop(next, to);
    }
    match next {
        DeviceState::Error => Err(refused),
        next => Ok(next),
    }
}

/// All states entered on the way from `from` to `to`, the last being `to`; empty if equal.
///
/// # Errors
/// [`StateError::NoPath`].
pub fn path(
    from: DeviceState,
    to: DeviceState,
    flags: MigrationFlags,
) -> Result<Vec<DeviceState>, StateError> {
    // RUNNING with every feature is at most four arcs away from anything.
    let mut states = Vec::with_capacity(4);
    let mut at = from;
    while at != to {
        at = next_hop(at, to, flags)?;
        states.push(at);
    }
    Ok(states)
}

/// How an arc failed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ArcFailure {
    /// The device is as it was before the arc.
    Unchanged(Errno),
    /// The device is broken and must be reset.
    Broken(Errno),
}

/// The state of one device and its walk along arcs.
#[derive(Clone, Debug)]
pub struct Machine {
    flags: MigrationFlags,
    state: DeviceState,
}

impl Machine {
    /// A device that runs.
    pub const fn new(flags: MigrationFlags) -> Self {
        Self {
            flags,
            state: DeviceState::Running,
        }
    }

    /// Where the device is.
    pub const fn state(&self) -> DeviceState {
        self.state
    }

    /// What it can.
    pub const fn flags(&self) -> MigrationFlags {
        self.flags
    }

    /// The device was reset: it runs.
    pub const fn reset(&mut self) {
        self.state = DeviceState::Running;
    }

    /// Goes to `to`, calling `arc` for each step. On failure the device is where the last good arc
    /// left it, or in `Error`.
    ///
    /// # Errors
    /// [`StateError`].
    pub fn transition(
        &mut self,
        to: DeviceState,
        mut arc: impl FnMut(StateArc) -> Result<(), ArcFailure>,
    ) -> Result<(), StateError> {
        let refused = StateError::NoPath {
            from: self.state,
            to,
            flags: self.flags,
        };
        if to == DeviceState::Error || self.state == DeviceState::Error {
            return Err(refused);
        }
        while self.state != to {
            let next = next_hop(self.state, to, self.flags)?;
            let step = StateArc::between(self.state, next).ok_or(refused)?;
            match arc(step) {
                Ok(()) => self.state = next,
                Err(failure) => {
                    let errno = match failure {
                        ArcFailure::Unchanged(errno) => errno,
                        ArcFailure::Broken(errno) => {
                            self.state = DeviceState::Error;
                            errno
                        }
                    };
                    return Err(StateError::Arc {
                        at: self.state,
                        to: next,
                        errno,
                    });
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
