//! The events, their names and their properties.

use std::borrow::Cow;
use std::fmt::Display;

use serde::{Serialize, Serializer};

/// Which end of a migration speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Side {
    /// The one the VM leaves.
    Source,
    /// The one the VM comes to.
    Destination,
}

/// Something that happened. The fields of a variant are its properties, written as text.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum Event {
    /// `vmm: starting`: the process is up.
    VmmStarting,
    /// `vmm: shutdown`: the process is about to end.
    VmmShutdown,
    /// `vm: booting`: devices and memory are being made.
    Booting,
    /// `vm: booted`: the vCPUs run.
    Booted,
    /// `vm: pausing`.
    Pausing,
    /// `vm: paused`: vCPUs and devices stand still.
    Paused,
    /// `vm: resuming`.
    Resuming,
    /// `vm: resumed`: vCPUs and devices run again.
    Resumed,
    /// `vm: shutdown`: the VM is off, by request or by the guest.
    Shutdown,
    /// `vm: deleted`: its configuration is gone.
    Deleted,
    /// `vm: device-lost`: a device's backend is gone; the guest sees a dead device.
    DeviceLost {
        /// The device.
        id: String,
        /// Why.
        reason: String,
    },
    /// `vm: device-added`: a device came while the VM runs, and the guest is told of it.
    DeviceAdded {
        /// The device.
        id: String,
        /// Where it is on the guest's PCI bus (`0000:00:05.0`).
        bdf: String,
    },
    /// `vm: device-removed`: the guest has ejected a device, or the VM was switched off before it
    /// did; the device is closed, its slot and whatever served it are free.
    DeviceRemoved {
        /// The device.
        id: String,
    },
    /// `vm: device-removal-overdue`: the guest was asked to eject a device and did not yet; nothing
    /// is taken from it before it does.
    DeviceRemovalOverdue {
        /// The device.
        id: String,
    },
    /// `vm: device-removal-requested`: the host waits for a passthrough device to be let go of, which
    /// its removal does, or the end of the VM. Told again while it lasts.
    DeviceRemovalRequested {
        /// The device.
        id: String,
    },
    /// `vm: migration-started`, at the source.
    MigrationStarted,
    /// `vm: migration-dirty-source`, at the source: where the migration that starts learns which
    /// pages a passthrough device writes.
    MigrationDirtySource {
        /// The device.
        id: String,
        /// The rung of the ladder, as `dirty_source` in `vm.info`.
        source: String,
        /// Why that one.
        why: String,
    },
    /// `vm: migration-memory-iteration`, at the source: one round of precopy is over.
    MigrationMemoryIteration {
        /// The round, from 0.
        #[serde(serialize_with = "text")]
        id: u64,
        /// Bytes of memory sent in it.
        #[serde(serialize_with = "text")]
        bytes: u64,
        /// Pages found dirty at its end.
        #[serde(serialize_with = "text")]
        dirty_pages: u64,
        /// How long it took, in milliseconds.
        #[serde(serialize_with = "text")]
        took_ms: u64,
    },
    /// `vm: migration-dirty-log-restarted`, at the source: a writer's dirty log failed and was
    /// started anew; all memory is sent again.
    MigrationDirtyLogRestarted {
        /// The dirty source: `vcpu`, `vmm`, or a device's id.
        id: String,
        /// Why.
        reason: String,
    },
    /// `vm: migration-device-reset`, at the source: the migration failed, and a device did not come
    /// back and was reset. It runs; its driver in the guest has to set it up anew.
    MigrationDeviceReset {
        /// The device's id.
        id: String,
        /// Why it did not come back.
        reason: String,
    },
    /// `vm: migration-finished`, at the source: the VM runs at the destination.
    MigrationFinished,
    /// `vm: migration-failed`, at the source: the VM runs on here, unless the reason says else.
    MigrationFailed {
        /// The error and its sources.
        reason: String,
    },
    /// `vm: migration-receive-ready`, at the destination: it listens.
    MigrationReceiveReady,
    /// `vm: migration-receive-started`, at the destination: a source has connected.
    MigrationReceiveStarted,
    /// `vm: migration-receive-finished`, at the destination: the VM runs here.
    MigrationReceiveFinished,
    /// `vm: migration-receive-failed`, at the destination: there is no VM here.
    MigrationReceiveFailed {
        /// The error and its sources.
        reason: String,
    },
    /// `vm: migration-phase`: a migration enters a phase.
    MigrationPhase {
        /// Which end.
        side: Side,
        /// The phase's name.
        phase: Cow<'static, str>,
    },
    /// `virtio-device: activated`: the guest's driver took the device.
    VirtioActivated {
        /// The device.
        id: String,
    },
    /// `virtio-device: reset`: the guest's driver reset the device.
    VirtioReset {
        /// The device.
        id: String,
    },
    /// `virtio-device: hash-backend-fallback`: the kernel reported a wrong hash for a packet, and
    /// Ferry hashes by itself until the guest's driver resets the device.
    HashBackendFallback {
        /// The device.
        id: String,
        /// What was wrong.
        reason: String,
    },
    /// `event-monitor: events-dropped`: the reader was too slow. Told by the writer itself.
    Dropped {
        /// How many events were lost just before this line.
        #[serde(serialize_with = "text")]
        count: u64,
    },
}

impl Event {
    /// The part of Ferry it happened in.
    pub fn source(&self) -> &'static str {
        match self {
            Self::VmmStarting | Self::VmmShutdown => "vmm",
            Self::Booting
            | Self::Booted
            | Self::Pausing
            | Self::Paused
            | Self::Resuming
            | Self::Resumed
            | Self::Shutdown
            | Self::Deleted
            | Self::DeviceLost { .. }
            | Self::DeviceAdded { .. }
            | Self::DeviceRemoved { .. }
            | Self::DeviceRemovalOverdue { .. }
            | Self::DeviceRemovalRequested { .. }
            | Self::MigrationDirtySource { .. }
            | Self::MigrationStarted
            | Self::MigrationMemoryIteration { .. }
            | Self::MigrationDirtyLogRestarted { .. }
            | Self::MigrationDeviceReset { .. }
            | Self::MigrationFinished
            | Self::MigrationFailed { .. }
            | Self::MigrationReceiveReady
            | Self::MigrationReceiveStarted
            | Self::MigrationReceiveFinished
            | Self::MigrationReceiveFailed { .. }
            | Self::MigrationPhase { .. } => "vm",
            Self::VirtioActivated { .. }
            | Self::VirtioReset { .. }
            | Self::HashBackendFallback { .. } => "virtio-device",
            Self::Dropped { .. } => "event-monitor",
        }
    }

    /// Its name, unique within its source.
    pub fn name(&self) -> &'static str {
        match self {
            Self::VmmStarting => "starting",
            Self::VmmShutdown | Self::Shutdown => "shutdown",
            Self::Booting => "booting",
            Self::Booted => "booted",
            Self::Pausing => "pausing",
            Self::Paused => "paused",
            Self::Resuming => "resuming",
            Self::Resumed => "resumed",
            Self::Deleted => "deleted",
            Self::DeviceLost { .. } => "device-lost",
            Self::DeviceAdded { .. } => "device-added",
            Self::DeviceRemoved { .. } => "device-removed",
            Self::DeviceRemovalOverdue { .. } => "device-removal-overdue",
            Self::MigrationDirtySource { .. } => "migration-dirty-source",
            Self::DeviceRemovalRequested { .. } => "device-removal-requested",
            Self::MigrationStarted => "migration-started",
            Self::MigrationMemoryIteration { .. } => "migration-memory-iteration",
            Self::MigrationDirtyLogRestarted { .. } => "migration-dirty-log-restarted",
            Self::MigrationDeviceReset { .. } => "migration-device-reset",
            Self::MigrationFinished => "migration-finished",
            Self::MigrationFailed { .. } => "migration-failed",
            Self::MigrationReceiveReady => "migration-receive-ready",
            Self::MigrationReceiveStarted => "migration-receive-started",
            Self::MigrationReceiveFinished => "migration-receive-finished",
            Self::MigrationReceiveFailed { .. } => "migration-receive-failed",
            Self::MigrationPhase { .. } => "migration-phase",
            Self::VirtioActivated { .. } => "activated",
            Self::VirtioReset { .. } => "reset",
            Self::HashBackendFallback { .. } => "hash-backend-fallback",
            Self::Dropped { .. } => "events-dropped",
        }
    }
}

/// Writes a number as text: Cloud Hypervisor's clients read properties as a map of strings.
fn text<T: Display, S: Serializer>(value: &T, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(value)
}
