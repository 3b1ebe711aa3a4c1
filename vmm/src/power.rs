//! What the guest asks of the machine, on its way to the control loop.

use devices::acpi::PowerRequests;

use crate::notice::{ExitReason, ExitSender};

/// Sends the guest's requests to the control loop.
pub struct PowerButton(pub ExitSender);

impl PowerRequests for PowerButton {
    fn reset(&self) {
        self.0.send(ExitReason::Reset);
    }

    fn power_off(&self) {
        self.0.send(ExitReason::PowerOff);
    }
}
