//! Pausing a device and letting it go on, outside of a migration.
//!
//! With several devices both go by steps, as devices may do DMA to each other: all come to rest,
//! all stop; all wake, all go on.

use vfio_user::{DeviceState, MigrationFlags};
use vm_migration::{Pause, StateError};

use crate::device::Passthrough;

impl Passthrough {
    /// The device is about to be paused: it starts no more peer-to-peer DMA, if it can be told so
    /// (RUNNING_P2P). All devices that can come to rest before the first is paused.
    ///
    /// # Errors
    /// [`StateError::Unsupported`] if it cannot be paused; the device's.
    pub fn quiesce(&self) -> Result<(), StateError> {
        if !self.inner.flags()?.contains(MigrationFlags::P2P) {
            return Ok(());
        }
        let quiet = self.inner.change_state(DeviceState::RunningP2p, "quiesce");
        if quiet.is_err() {
            self.inner.bring_back(DeviceState::Running, "quiesce")?;
        }
        quiet
    }

    /// The device is about to go on: it acts, but for peer-to-peer DMA, if it can be told so. All
    /// devices that can wake before the first goes on. What fails here, [`Pause::resume`] mends or
    /// tells.
    pub fn wake(&self) {
        if self.inner.has(MigrationFlags::P2P) {
            // The log has it.
            let _ = self.inner.change_state(DeviceState::RunningP2p, "wake");
        }
    }
}

impl Pause for Passthrough {
    /// A device that cannot be stopped runs on.
    fn pause(&mut self) -> Result<(), StateError> {
        self.inner.flags()?;
        let stopped = self.inner.change_state(DeviceState::Stop, "pause");
        if stopped.is_err() {
            self.inner.bring_back(DeviceState::Running, "pause")?;
        }
        stopped
    }

    fn resume(&mut self) -> Result<(), StateError> {
        // One that cannot be stopped runs.
        if self.inner.profile.migration.is_none() {
            return Ok(());
        }
        match self.inner.bring_back(DeviceState::Running, "resume") {
            // It runs, and the log has it: that it was reset keeps no VM from running.
            Err(StateError::Reset { .. }) => Ok(()),
            other => other,
        }
    }
}
