//! Devices that come and go while the guest runs.
//!
//! A removal is a request to the guest. It is over when the guest has ejected the device; until then
//! nothing is taken from it, and a migration carries the request along. What the guest ejects during
//! a migration is taken away after it, here or at the destination.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::Control;
use super::guest::{Guest, Pace};
use crate::api::{ApiError, ApiReply, ApiStatus, PciDeviceInfo};
use crate::config::NewDevice;
use crate::machine::{Host, MachineError};
use event_monitor::Event;
use rustix::event::Timespec;

/// How long a guest may take to eject a device before that is told. Linux waits 5 seconds for a
/// driver's last timers at most; a guest in its boot takes longer.
const PATIENCE: Duration = Duration::from_secs(30);

/// The devices that the guest was asked to eject, with the time after which that is told.
#[derive(Default)]
pub(super) struct Removals(BTreeMap<String, Instant>);

impl Removals {
    /// The guest was asked, now, to eject device `id`.
    pub(super) fn asked(&mut self, id: String) {
        self.0.insert(id, Instant::now() + PATIENCE);
    }

    /// How long until the next is late; `None` if none was asked for.
    pub(super) fn patience(&self) -> Option<Timespec> {
        let next = self.0.values().min()?;
        let left = next.saturating_duration_since(Instant::now());
        // A little more, so that it is late when the wait is over.
        (left + Duration::from_millis(1)).try_into().ok()
    }

    /// Takes out those that are late at `now`.
    fn take_late(&mut self, now: Instant) -> Vec<String> {
        let late = self.0.iter().filter(|(_, due)| **due <= now);
        let late: Vec<String> = late.map(|(id, _)| id.clone()).collect();
        for id in &late {
            self.0.remove(id);
        }
        late
    }
}

impl Control {
    /// `vm.add-device` and its like.
    pub(super) fn add_device(&mut self, device: NewDevice) -> Result<ApiReply, ApiError> {
        let Some(info) = self.guest.add_device(device, &self.host)? else {
            return Ok(ApiReply::Empty);
        };
        self.host.events.tell(Event::DeviceAdded {
            id: info.id.clone(),
            bdf: info.bdf.clone(),
        });
        Ok(ApiReply::Device(info))
    }

    /// `vm.remove-device`.
    pub(super) fn remove_device(&mut self, id: &str) -> Result<(), ApiError> {
        if self.guest.remove_device(id)? {
            self.removals.asked(id.to_owned());
        }
        Ok(())
    }

    /// A device is dead. The guest, which reads all ones of it, is asked to eject it, if it can.
    pub(super) fn lost(&mut self, id: &str) {
        if self.guest.passes_through(id) {
            self.ask(id);
        }
    }

    /// The host wants a device back: the guest is asked to eject it, if the operator lets it.
    pub(super) fn wanted(&mut self, id: &str) {
        // It is told again and again; the guest is asked once.
        if self.guest.gives_back(id) && !self.guest.asked_to_go().iter().any(|asked| asked == id) {
            self.ask(id);
        }
    }

    fn ask(&mut self, id: &str) {
        match self.guest.remove_device(id) {
            Ok(_) => self.removals.asked(id.to_owned()),
            Err(error) => tracing::error!(id, %error, "the guest is not asked to eject it"),
        }
    }

    /// Takes away what the guest has ejected, unless a migration needs it as it is.
    pub(super) fn take_ejected(&mut self) {
        if self.is_migrating() {
            return;
        }
        for id in self.guest.take_ejected() {
            self.removals.0.remove(&id);
            tracing::info!(id, "a device was ejected and is gone");
            self.host.events.tell(Event::DeviceRemoved { id });
        }
    }

    /// Tells of devices that the guest does not eject.
    pub(super) fn tell_overdue(&mut self) {
        let late = self.removals.take_late(Instant::now());
        if late.is_empty() {
            return;
        }
        let asked = self.guest.asked_to_go();
        for id in late.into_iter().filter(|id| asked.contains(id)) {
            tracing::warn!(id, "the guest was asked to eject a device and did not yet");
            self.host.events.tell(Event::DeviceRemovalOverdue { id });
        }
    }
}

impl Guest {
    /// Adds a device; says where it is, if there is a guest that is told of it.
    fn add_device(
        &mut self,
        device: NewDevice,
        host: &Host,
    ) -> Result<Option<PciDeviceInfo>, ApiError> {
        let refused = |error| ApiError::bad_request(&error).context("the configuration is refused");
        match self {
            Self::Off { config, .. } => {
                let (with, _) = config.clone().with_device(device).map_err(refused)?;
                **config = with;
                Ok(None)
            }
            Self::On {
                pace: Pace::Running,
                config,
                machine,
            } => {
                let (mut with, device) = config.clone().with_device(device).map_err(refused)?;
                let plugged = match &device {
                    NewDevice::Host(new) => machine.add_device(new, host),
                    NewDevice::User(new) => machine.add_user_device(new, host),
                    NewDevice::Net(new) => machine.add_net(new, host),
                };
                let plugged = plugged.map_err(|error| ApiError::internal(&error))?;
                machine.pin_slots(&mut with);
                **config = with;
                Ok(Some(plugged))
            }
            Self::None | Self::On { .. } => Err(self.cannot("add a device to")),
        }
    }

    /// Removes a device; says whether a guest was asked to, and has to eject it first.
    fn remove_device(&mut self, id: &str) -> Result<bool, ApiError> {
        let unknown = || MachineError::UnknownDevice { id: id.to_owned() };
        match self {
            Self::Off { config, .. } => match config.remove_device(id) {
                true => Ok(false),
                false => Err(ApiError::new(ApiStatus::NotFound, &unknown())),
            },
            // A guest that stands still is asked when it goes on.
            Self::On {
                pace: Pace::Running | Pace::Paused,
                machine,
                ..
            } => machine
                .devices()
                .ask_to_go(id)
                .map(|()| true)
                .map_err(refusal),
            Self::None | Self::On { .. } => Err(self.cannot("remove a device from")),
        }
    }

    /// Takes away what the guest has ejected; gives the identifiers.
    fn take_ejected(&mut self) -> Vec<String> {
        let Self::On {
            // What a migration left in the dark it still holds.
            pace: Pace::Running | Pace::Paused,
            config,
            machine,
        } = self
        else {
            return Vec::new();
        };
        let gone = machine.take_ejected();
        for id in &gone {
            config.remove_device(id);
        }
        if !gone.is_empty() {
            machine.pin_slots(config);
        }
        gone
    }

    /// The devices that the guest was asked to eject, and did not yet.
    pub(super) fn asked_to_go(&self) -> Vec<String> {
        match self {
            Self::On { machine, .. } => machine.devices().asked_to_go(),
            Self::None | Self::Off { .. } => Vec::new(),
        }
    }

    fn passes_through(&self, id: &str) -> bool {
        match self {
            Self::On { machine, .. } => {
                let mut functions = machine.devices().passthrough().iter();
                functions.any(|function| function.id == id)
            }
            Self::None | Self::Off { .. } => false,
        }
    }

    fn gives_back(&self, id: &str) -> bool {
        match self {
            Self::On { config, .. } => {
                let mut devices = config.devices.iter();
                devices.any(|device| device.id == id && device.give_back)
            }
            Self::None | Self::Off { .. } => false,
        }
    }
}

fn refusal(error: MachineError) -> ApiError {
    use pci::HotPlugError::Fixed;
    let status = match &error {
        MachineError::UnknownDevice { .. } => ApiStatus::NotFound,
        MachineError::HotPlug {
            cause: Fixed { .. },
            ..
        } => ApiStatus::Conflict,
        _ => ApiStatus::Internal,
    };
    ApiError::new(status, &error)
}
