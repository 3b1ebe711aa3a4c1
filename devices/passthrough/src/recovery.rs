//! Getting a device back whose migration state did not become what it should.
//!
//! A failed change leaves the device anywhere on the way, or broken. So the state is asked for
//! anew, then the state to go back to is tried from there, and as the last resort the device is
//! reset and set up again as the VMM has it.

use vfio_user::DeviceState;
use vm_migration::{ErrorChain, StateError};

use crate::backend::BackendError;
use crate::device::Inner;

impl Inner {
    /// Has the device go to `state`; on failure says in the log where it is now.
    pub(crate) fn change_state(
        &self,
        state: DeviceState,
        operation: &'static str,
    ) -> Result<(), StateError> {
        self.backend.set_state(state).map_err(|cause| {
            let now = match self.backend.state() {
                Ok(now) => now.to_string(),
                Err(error) => format!("unknown: {}", ErrorChain(&error)),
            };
            let error = ErrorChain(&cause).to_string();
            tracing::warn!(device = self.id, wanted = %state, now, error, "migration state not reached");
            self.failed(operation, cause)
        })
    }

    /// Brings the device to `home` (RUNNING, or STOP of a paused guest), whatever state it is in,
    /// by way of a reset if it must be.
    ///
    /// # Errors
    /// [`StateError::Reset`] if it was reset and is there now; [`StateError::Failed`] if it is
    /// lost.
    pub(crate) fn bring_back(
        &self,
        home: DeviceState,
        operation: &'static str,
    ) -> Result<(), StateError> {
        let Err(first) = self.backend.set_state(home) else {
            return Ok(());
        };
        if first.is_gone() {
            return Err(self.failed(operation, first));
        }
        match self.backend.state() {
            Ok(now) if now == home => return Ok(()),
            // A second try from wherever the first one ended.
            Ok(now) if now != DeviceState::Error && self.backend.set_state(home).is_ok() => {
                tracing::warn!(device = self.id, from = %now, to = %home, "device came back at the second try");
                return Ok(());
            }
            Ok(_) | Err(_) => {}
        }
        let why = ErrorChain(&first).to_string();
        if let Err(cause) = self.start_over(home) {
            tracing::error!(device = self.id, why, "device does not come back");
            return Err(self.failed("resetting it", cause));
        }
        tracing::error!(device = self.id, why, "device was reset to get it back");
        Err(StateError::Reset {
            id: self.id.clone(),
            operation,
            cause: Box::new(first),
        })
    }

    /// Resets the device and sets it up as the front says: its interrupts, command register and
    /// MSI-X control. Mappings of memory outlast a reset.
    fn start_over(&self, home: DeviceState) -> Result<(), BackendError> {
        self.backend.reset()?;
        // Whether interrupts outlast a reset is the device's affair.
        self.silence()?;
        self.follow_irqs()?;
        self.send_front();
        match home {
            DeviceState::Running => Ok(()),
            home => self.backend.set_state(home),
        }
    }
}
