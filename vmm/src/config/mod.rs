//! What a VM is made of, as JSON (`vm.create`) and as command-line options.
//!
//! Both forms use Cloud Hypervisor's names and mean the same: each part parses from an option
//! string ([`std::str::FromStr`]) and prints one ([`std::fmt::Display`]), and each is a serde type
//! that refuses unknown keys. Parsing checks the form; [`VmConfig::validate`] then checks the sense
//! and fills in what was left open (device ids, MAC addresses). The VM is built from a validated
//! configuration only.

mod console;
mod device;
mod error;
mod hash;
mod machine;
mod net;
mod option;
mod platform;

#[cfg(test)]
mod tests;

use std::collections::HashSet;
use std::fmt;
use std::path::Path;

use serde::{Deserialize, Serialize};

pub use console::ConsoleConfig;
pub(crate) use device::check_place;
pub use device::{DeviceConfig, DirtyConfig};
pub use error::ConfigError;
pub use hash::{HashBackend, HashTypeSet, NoHashTypes, Offer};
pub use machine::{
    CpusConfig, DirtyLogConfig, MAX_CMDLINE_BYTES, MAX_VCPUS, MemoryConfig, PayloadConfig,
    RngConfig,
};
pub(crate) use net::check_ifname;
pub use net::{MAX_NET_QUEUES, MAX_QUEUE_SIZE, MacAddress, NetConfig, UserDeviceConfig};
pub use option::{format_size, parse_size};
pub use platform::{IommufdConfig, PlatformConfig};

/// The longest device id, in bytes.
pub const MAX_ID_BYTES: usize = 63;
/// Slots for configured devices on the one PCI bus: 32, less host bridge, console and rng.
pub const MAX_CONFIGURED_DEVICES: usize = 29;

/// A whole VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmConfig {
    /// Virtual CPUs.
    #[serde(default)]
    pub cpus: CpusConfig,
    /// Guest RAM.
    #[serde(default)]
    pub memory: MemoryConfig,
    /// What is booted.
    pub payload: PayloadConfig,
    /// How it is tied to its host.
    #[serde(default, skip_serializing_if = "PlatformConfig::is_default")]
    pub platform: PlatformConfig,
    /// virtio-net devices.
    #[serde(default)]
    pub net: Vec<NetConfig>,
    /// The entropy source.
    #[serde(default)]
    pub rng: RngConfig,
    /// The serial port.
    #[serde(default = "default_serial")]
    pub serial: ConsoleConfig,
    /// The virtio console.
    #[serde(default = "default_console")]
    pub console: ConsoleConfig,
    /// Devices of the host.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub devices: Vec<DeviceConfig>,
    /// Passthrough devices over vfio-user.
    #[serde(default)]
    pub user_devices: Vec<UserDeviceConfig>,
}

/// A device that is added to a VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NewDevice {
    /// Of the host.
    Host(DeviceConfig),
    /// Of another process, over vfio-user.
    User(UserDeviceConfig),
    /// A virtio-net card.
    Net(NetConfig),
}

/// The serial port if none is configured, as Cloud Hypervisor has it.
pub fn default_serial() -> ConsoleConfig {
    ConsoleConfig::Null
}

/// The virtio console if none is configured, as Cloud Hypervisor has it.
pub fn default_console() -> ConsoleConfig {
    ConsoleConfig::Tty
}

impl VmConfig {
    /// Checks that the parts make sense, alone and together, and fills in the ids and MAC addresses
    /// that were left open. Idempotent: a validated configuration comes back unchanged.
    ///
    /// # Errors
    /// The first thing that is wrong, naming the option and the remedy.
    pub fn validate(mut self) -> Result<Self, ConfigError> {
        self.name_devices()?;
        self.cpus.validate()?;
        self.memory.validate()?;
        self.payload.validate()?;
        self.platform.validate()?;
        self.rng.validate()?;
        self.validate_consoles()?;
        for net in &mut self.net {
            net.validate()?;
            net.mac.get_or_insert_with(MacAddress::random_local);
            if net.vhost_user {
                self.memory.require_shared("--net", &net.id)?;
            }
        }
        for device in &self.devices {
            device.validate()?;
        }
        for device in &self.user_devices {
            device.validate()?;
            self.memory.require_shared("--user-device", &device.id)?;
        }
        self.check_fds()?;
        self.check_shared_paths()?;
        self.check_slots()?;
        Ok(self)
    }

    /// The ids of all configured devices, in the order they are put on the PCI bus.
    pub fn device_ids(&self) -> impl Iterator<Item = &str> {
        let nets = self.net.iter().map(|net| net.id.as_str());
        let devices = self.devices.iter().map(|device| device.id.as_str());
        let users = self.user_devices.iter().map(|device| device.id.as_str());
        nets.chain(devices).chain(users)
    }

    /// The slots of configured devices that are not left to be found, with their ids.
    fn slots(&mut self) -> impl Iterator<Item = (&str, &mut Option<u8>)> {
        let nets = self.net.iter_mut();
        let nets = nets.map(|net| (net.id.as_str(), &mut net.pci_device_id));
        let devices = self.devices.iter_mut();
        let devices = devices.map(|device| (device.id.as_str(), &mut device.pci_device_id));
        let users = self.user_devices.iter_mut();
        let users = users.map(|device| (device.id.as_str(), &mut device.pci_device_id));
        nets.chain(devices).chain(users)
    }

    /// Writes down in which slot each device is: from here on none moves when another comes or
    /// goes.
    pub fn pin_slots(&mut self, slot_of: impl Fn(&str) -> Option<u8>) {
        for (id, slot) in self.slots() {
            *slot = slot_of(id).or(*slot);
        }
    }

    /// The configuration with `device`, validated; and the device as it is there.
    ///
    /// # Errors
    /// As [`validate`](Self::validate).
    pub fn with_device(mut self, device: NewDevice) -> Result<(Self, NewDevice), ConfigError> {
        match device.clone() {
            NewDevice::Host(new) => self.devices.push(new),
            NewDevice::User(new) => self.user_devices.push(new),
            NewDevice::Net(new) => self.net.push(new),
        }
        let valid = self.validate()?;
        // With the id and the address that were filled in.
        let added = match &device {
            NewDevice::Host(_) => valid.devices.last().cloned().map(NewDevice::Host),
            NewDevice::User(_) => valid.user_devices.last().cloned().map(NewDevice::User),
            NewDevice::Net(_) => valid.net.last().cloned().map(NewDevice::Net),
        };
        Ok((valid, added.unwrap_or(device)))
    }

    /// Takes device `id` out; says whether it was there.
    pub fn remove_device(&mut self, id: &str) -> bool {
        let before = self.device_ids().count();
        self.net.retain(|net| net.id != id);
        self.devices.retain(|device| device.id != id);
        self.user_devices.retain(|device| device.id != id);
        self.device_ids().count() != before
    }

    fn check_slots(&mut self) -> Result<(), ConfigError> {
        let mut taken = HashSet::new();
        for (id, slot) in self.slots() {
            let Some(slot) = *slot else { continue };
            let id = id.to_owned();
            // Slot 0 is the host bridge's.
            if slot == 0 || slot >= pci::SLOTS {
                return Err(ConfigError::Slot { id, slot });
            }
            if !taken.insert(slot) {
                return Err(ConfigError::RepeatedSlot { id, slot });
            }
        }
        Ok(())
    }

    fn name_devices(&mut self) -> Result<(), ConfigError> {
        let count = self.device_ids().count();
        if count > MAX_CONFIGURED_DEVICES {
            return Err(ConfigError::TooManyDevices {
                count,
                limit: MAX_CONFIGURED_DEVICES,
            });
        }
        let mut taken = HashSet::new();
        for id in self.device_ids().filter(|id| !id.is_empty()) {
            check_id(id)?;
            if !taken.insert(id.to_owned()) {
                return Err(ConfigError::RepeatedId { id: id.to_owned() });
            }
        }
        let nets = self.net.iter_mut().map(|net| &mut net.id);
        fill_ids("_net", nets, &mut taken);
        let devices = self.devices.iter_mut().map(|device| &mut device.id);
        fill_ids("_vfio", devices, &mut taken);
        let users = self.user_devices.iter_mut().map(|device| &mut device.id);
        fill_ids("_user", users, &mut taken);
        Ok(())
    }

    fn validate_consoles(&self) -> Result<(), ConfigError> {
        self.serial.validate("--serial (serial)")?;
        self.console.validate("--console (console)")?;
        match (&self.serial, &self.console) {
            (ConsoleConfig::Tty, ConsoleConfig::Tty) => Err(ConfigError::TwoTtys),
            _ => Ok(()),
        }
    }

    /// Refuses one descriptor for two devices of the host.
    fn check_fds(&self) -> Result<(), ConfigError> {
        let mut seen = HashSet::new();
        for device in &self.devices {
            match device.fd {
                Some(fd) if !seen.insert(fd) => {
                    let id = device.id.clone();
                    return Err(ConfigError::FdTwice { id, fd });
                }
                Some(_) | None => {}
            }
        }
        Ok(())
    }

    /// Refuses one path for two uses, where the second would silently take it from the first.
    fn check_shared_paths(&self) -> Result<(), ConfigError> {
        let consoles = [self.serial.path(), self.console.path()];
        let sockets = self
            .user_devices
            .iter()
            .map(|device| device.socket.as_path());
        let backends = self
            .net
            .iter()
            .filter_map(|net| net.vhost_socket.as_deref());
        let mut seen: HashSet<&Path> = HashSet::new();
        let devices = self.devices.iter();
        let devices = devices.filter(|device| device.fd.is_none());
        let devices = devices.map(|device| device.path.as_path());
        for path in consoles
            .into_iter()
            .flatten()
            .chain(sockets)
            .chain(backends)
            .chain(devices)
        {
            // Output to /dev/null and the like may be shared.
            if !path.starts_with("/dev") && !seen.insert(path) {
                return Err(ConfigError::PathTwice {
                    path: path.to_owned(),
                });
            }
        }
        Ok(())
    }
}

/// Checks that `id` can stand in a URL, a log line and an option string.
pub(crate) fn check_id(id: &str) -> Result<(), ConfigError> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-' | b'.');
    if (1..=MAX_ID_BYTES).contains(&id.len()) && id.bytes().all(plain) {
        return Ok(());
    }
    Err(ConfigError::DeviceId {
        id: id.to_owned(),
        limit: MAX_ID_BYTES,
    })
}

/// Whether a toggle has its usual value.
#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde gives a reference")]
fn is_off(toggle: &bool) -> bool {
    !toggle
}

/// Writes the slot of a device as its option string has it, if it has one.
fn write_slot(out: &mut fmt::Formatter<'_>, slot: Option<u8>) -> fmt::Result {
    match slot {
        Some(slot) => write!(out, ",pci_device_id={slot}"),
        None => Ok(()),
    }
}

/// Gives each empty id the first free of `prefix0`, `prefix1`, …
fn fill_ids<'a>(
    prefix: &str,
    ids: impl Iterator<Item = &'a mut String>,
    taken: &mut HashSet<String>,
) {
    let mut free = (0u32..).map(|number| format!("{prefix}{number}"));
    for id in ids.filter(|id| id.is_empty()) {
        if let Some(name) = free.find(|name| !taken.contains(name)) {
            taken.insert(name.clone());
            *id = name;
        }
    }
}
