//! What can be asked of the VMM, and what it answers. The JSON keys are Cloud Hypervisor's.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use vm_migration::migrate::{Address, MigrationParams, MigrationStatus, TimeoutStrategy};

use super::counters::{Counters, Facts};
use crate::config::{
    ConfigError, ConsoleConfig, DeviceConfig, DirtyLogConfig, NetConfig, NewDevice, PlatformConfig,
    VmConfig, check_id, check_ifname, check_place,
};

/// One request to the VMM's control loop. The comments name the endpoint and the answer.
#[derive(Debug)]
pub enum ApiRequest {
    /// `GET vmm.ping`: [`ApiReply::Ping`].
    VmmPing,
    /// `PUT vmm.shutdown`: [`ApiReply::Empty`], then the process ends.
    VmmShutdown,
    /// `PUT vm.create` with a validated configuration: [`ApiReply::Empty`].
    VmCreate(Box<VmConfig>),
    /// `PUT vm.boot`: [`ApiReply::Empty`].
    VmBoot,
    /// `GET vm.info`: [`ApiReply::Info`].
    VmInfo,
    /// `GET vm.counters`: [`ApiReply::Counters`].
    VmCounters,
    /// `PUT vm.pause`: [`ApiReply::Empty`].
    VmPause,
    /// `PUT vm.resume`: [`ApiReply::Empty`].
    VmResume,
    /// `PUT vm.shutdown`: [`ApiReply::Empty`]; the VM may be booted again.
    VmShutdown,
    /// `PUT vm.delete`: [`ApiReply::Empty`].
    VmDelete,
    /// `PUT vm.add-device`, `vm.add-user-device`, `vm.add-net`: [`ApiReply::Device`], or
    /// [`ApiReply::Empty`] if the VM is off and has the device when it is booted.
    VmAddDevice(Box<NewDevice>),
    /// `PUT vm.remove-device`: [`ApiReply::Empty`] once the guest is asked to eject the device,
    /// again if it was before; that it is gone is an event.
    VmRemoveDevice(RemoveDeviceConfig),
    /// `PUT vm.send-migration`, once it has started: [`ApiReply::Sending`] if there are passthrough
    /// devices, else [`ApiReply::Empty`]; the outcome is an event and in `vm.migration`.
    VmSendMigration(Box<SendMigrationConfig>),
    /// `PUT vm.receive-migration`: [`ApiReply::Empty`] once ferry listens; the outcome is an event
    /// and in `vm.migration`.
    VmReceiveMigration(Box<ReceiveMigrationConfig>),
    /// `GET vm.migration`: [`ApiReply::Migration`].
    VmMigration,
    /// `PUT vm.cancel-migration`: [`ApiReply::Empty`] once the cancellation is on its way.
    VmCancelMigration,
    /// `GET vm.metrics`: [`ApiReply::Metrics`].
    VmMetrics,
}

impl ApiRequest {
    /// The endpoint's name.
    pub fn endpoint(&self) -> &'static str {
        match self {
            Self::VmmPing => "vmm.ping",
            Self::VmmShutdown => "vmm.shutdown",
            Self::VmCreate(_) => "vm.create",
            Self::VmBoot => "vm.boot",
            Self::VmInfo => "vm.info",
            Self::VmCounters => "vm.counters",
            Self::VmPause => "vm.pause",
            Self::VmResume => "vm.resume",
            Self::VmShutdown => "vm.shutdown",
            Self::VmDelete => "vm.delete",
            Self::VmAddDevice(device) => match **device {
                NewDevice::Host(_) => "vm.add-device",
                NewDevice::User(_) => "vm.add-user-device",
                NewDevice::Net(_) => "vm.add-net",
            },
            Self::VmRemoveDevice(_) => "vm.remove-device",
            Self::VmSendMigration(_) => "vm.send-migration",
            Self::VmReceiveMigration(_) => "vm.receive-migration",
            Self::VmMigration => "vm.migration",
            Self::VmCancelMigration => "vm.cancel-migration",
            Self::VmMetrics => "vm.metrics",
        }
    }
}

/// What the control loop answers when all went well.
#[derive(Debug)]
pub enum ApiReply {
    /// Done, nothing to say (204).
    Empty,
    /// Who is there.
    Ping(VmmPing),
    /// Where a new device is.
    Device(PciDeviceInfo),
    /// What a migration that has started learns devices' writes from.
    Sending(SendMigrationInfo),
    /// The VM.
    Info(Box<VmInfo>),
    /// The devices' counters.
    Counters(Counters),
    /// The migration that is running or ran last.
    Migration(Box<MigrationStatus>),
    /// Metrics as Prometheus text.
    Metrics(String),
}

/// The answer to `vm.add-device` and its like.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PciDeviceInfo {
    /// The device's identifier.
    pub id: String,
    /// Where it is on the guest's PCI bus (`0000:00:05.0`).
    pub bdf: String,
}

/// The body of `vm.remove-device`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RemoveDeviceConfig {
    /// The device's identifier.
    pub id: String,
}

/// The answer to `vmm.ping`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmmPing {
    /// The version with its build, for people.
    pub build_version: String,
    /// The version, `major.minor.patch`.
    pub version: String,
    /// The process.
    pub pid: u32,
    /// Optional features compiled in.
    pub features: Vec<String>,
}

/// What a VM is doing, in the words of Cloud Hypervisor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum VmState {
    /// Configured, not booted.
    Created,
    /// Its vCPUs run.
    Running,
    /// Its vCPUs and devices stand still.
    Paused,
    /// It was running and is switched off.
    Shutdown,
}

/// The answer to `vm.info`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmInfo {
    /// The configuration, with what validation filled in.
    pub config: VmConfig,
    /// What the VM is doing.
    pub state: VmState,
    /// Guest RAM in bytes.
    pub memory_actual_size: u64,
    /// Facts about each device by its id: what serves it and why, ptys, backends.
    #[serde(default)]
    pub devices: Facts,
    /// How this host's KVM keeps the dirty log: what `config.memory.dirty_log` asks for, as far as
    /// KVM has it. Only of a VM that is built.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dirty_log: Option<DirtyLogConfig>,
}

/// The body of `vm.send-migration`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SendMigrationConfig {
    /// Where the receiver listens: `unix:PATH` or `tcp:HOST:PORT`.
    pub destination_url: String,
    /// The longest the guest shall stand still, in milliseconds.
    #[serde(default = "default_downtime_ms")]
    pub downtime_ms: u64,
    /// The longest memory may be copied before the strategy decides, in seconds.
    #[serde(default = "default_timeout_s")]
    pub timeout_s: u64,
    /// What then.
    #[serde(default)]
    pub timeout_strategy: TimeoutStrategy,
    /// The most to send while the guest runs, in bytes per second; no limit if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_bandwidth: Option<u64>,
    /// How often a dirty log that fails is started anew, all memory being sent again, before the
    /// migration fails.
    #[serde(default = "default_dirty_log_restarts")]
    pub dirty_log_restarts: u32,
}

fn default_dirty_log_restarts() -> u32 {
    MigrationParams::default().dirty_log_restarts
}

fn default_downtime_ms() -> u64 {
    300
}

fn default_timeout_s() -> u64 {
    3600
}

impl SendMigrationConfig {
    /// A migration to `destination_url` with Cloud Hypervisor's defaults.
    pub fn new(destination_url: impl Into<String>) -> Self {
        Self {
            destination_url: destination_url.into(),
            downtime_ms: default_downtime_ms(),
            timeout_s: default_timeout_s(),
            timeout_strategy: TimeoutStrategy::default(),
            max_bandwidth: None,
            dirty_log_restarts: default_dirty_log_restarts(),
        }
    }

    /// Where to send the VM.
    ///
    /// # Errors
    /// [`ConfigError::MigrationUrl`] if the URL is no address.
    pub fn destination(&self) -> Result<Address, ConfigError> {
        address("destination_url", &self.destination_url)
    }

    /// The engine's parameters.
    pub fn params(&self) -> MigrationParams {
        MigrationParams {
            downtime_ms: self.downtime_ms,
            timeout_s: self.timeout_s,
            timeout_strategy: self.timeout_strategy,
            max_bandwidth: self.max_bandwidth,
            dirty_log_restarts: self.dirty_log_restarts,
        }
    }

    /// Checks the address.
    ///
    /// # Errors
    /// As [`SendMigrationConfig::destination`].
    pub fn validate(self) -> Result<Self, ConfigError> {
        self.destination()?;
        Ok(self)
    }
}

/// The answer to `vm.send-migration` of a VM with passthrough devices.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SendMigrationInfo {
    /// Where the migration learns which pages each of them writes.
    pub dirty_sources: Vec<DirtySourceInfo>,
}

/// Where a migration learns which pages a passthrough device writes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DirtySourceInfo {
    /// The device.
    pub id: String,
    /// The rung of the ladder, `none` if the device keeps the VM from moving.
    pub source: String,
    /// Why that one.
    pub why: String,
}

/// The body of `vm.receive-migration`: where to listen, and which of the devices' host resources
/// are called differently here than at the source.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReceiveMigrationConfig {
    /// Where to listen: `unix:PATH` or `tcp:HOST:PORT`.
    pub receiver_url: String,
    /// Taps and vhost-user backends of virtio-net devices.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub net: Vec<ReceiveNetConfig>,
    /// Devices of the host.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub devices: Vec<ReceiveDeviceConfig>,
    /// Servers of passthrough devices.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub user_devices: Vec<ReceiveUserDeviceConfig>,
    /// How devices of this host are opened, instead of as at the source.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub platform: Option<PlatformConfig>,
    /// The serial port, instead of the source's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial: Option<ConsoleConfig>,
    /// The virtio console, instead of the source's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub console: Option<ConsoleConfig>,
}

/// What a virtio-net device is connected to on the receiving host.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReceiveNetConfig {
    /// The device.
    pub id: String,
    /// Its tap here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tap: Option<String>,
    /// Its open tap descriptors here, which the receiving ferry inherits, instead.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub fds: Vec<i32>,
    /// The socket of its vhost-user backend here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vhost_socket: Option<PathBuf>,
}

impl ReceiveNetConfig {
    fn validate(&self) -> Result<(), ConfigError> {
        check_id(&self.id)?;
        match (&self.tap, self.fds.is_empty(), &self.vhost_socket) {
            (Some(tap), true, None) => check_ifname(&self.id, tap),
            (None, false, None) | (None, true, Some(_)) => Ok(()),
            _ => Err(ConfigError::ReceivedBackend {
                id: self.id.clone(),
            }),
        }
    }

    fn apply_to(&self, net: &mut NetConfig) -> Result<(), ConfigError> {
        let other = |there, key| ConfigError::OtherBackend {
            id: self.id.clone(),
            there,
            key,
        };
        if net.vhost_user {
            let Some(socket) = &self.vhost_socket else {
                return Err(other("a vhost-user backend", "vhost_socket"));
            };
            net.vhost_socket = Some(socket.clone());
            return Ok(());
        }
        if self.vhost_socket.is_some() {
            return Err(other("a tap", "tap` or its `fds"));
        }
        net.tap.clone_from(&self.tap);
        net.fds.clone_from(&self.fds);
        Ok(())
    }
}

/// The device of the receiving host that takes the place of one at the source.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReceiveDeviceConfig {
    /// The device.
    pub id: String,
    /// Its folder in sysfs here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// Its open file, which the receiving ferry inherits, instead.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fd: Option<i32>,
}

impl ReceiveDeviceConfig {
    fn validate(&self) -> Result<(), ConfigError> {
        let path = self.path.as_deref().unwrap_or(Path::new(""));
        check_place(&self.id, path, self.fd)
    }

    fn apply_to(&self, device: &mut DeviceConfig) {
        device.path = self.path.clone().unwrap_or_default();
        device.fd = self.fd;
    }
}

/// The server a passthrough device has on the receiving host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReceiveUserDeviceConfig {
    /// The device.
    pub id: String,
    /// Its server's socket here.
    pub socket: PathBuf,
}

impl ReceiveMigrationConfig {
    /// A receiver on `receiver_url` that takes everything else as the source has it.
    pub fn new(receiver_url: impl Into<String>) -> Self {
        Self {
            receiver_url: receiver_url.into(),
            ..Self::default()
        }
    }

    /// Where to listen.
    ///
    /// # Errors
    /// [`ConfigError::MigrationUrl`] if the URL is no address.
    pub fn receiver(&self) -> Result<Address, ConfigError> {
        address("receiver_url", &self.receiver_url)
    }

    /// Checks the address, names and ids, and that no device is named twice.
    ///
    /// # Errors
    /// What is wrong first, with the remedy.
    pub fn validate(self) -> Result<Self, ConfigError> {
        self.receiver()?;
        let mut seen = HashSet::new();
        for net in &self.net {
            net.validate()?;
        }
        for device in &self.devices {
            device.validate()?;
        }
        if let Some(platform) = &self.platform {
            platform.validate()?;
        }
        let nets = self.net.iter().map(|net| &net.id);
        let devices = self.devices.iter().map(|device| &device.id);
        let users = self.user_devices.iter().map(|device| &device.id);
        for id in nets.chain(devices).chain(users) {
            check_id(id)?;
            if !seen.insert(id) {
                return Err(ConfigError::RepeatedId { id: id.clone() });
            }
        }
        Ok(self)
    }

    /// Replaces the host resources in `config`, the source's configuration, by those named here.
    ///
    /// # Errors
    /// [`ConfigError::UnknownDevice`] if a named device is not in `config`,
    /// [`ConfigError::OtherBackend`] if it is of another kind there, [`ConfigError::ForeignFd`] if a
    /// device that is not named has a descriptor at the source.
    pub fn apply_to(&self, config: &mut VmConfig) -> Result<(), ConfigError> {
        for here in &self.net {
            let net = config.net.iter_mut().find(|net| net.id == here.id);
            here.apply_to(net.ok_or_else(|| unknown(&here.id))?)?;
        }
        let named = |id: &str| self.net.iter().any(|here| here.id == id);
        let mut nets = config.net.iter();
        if let Some(net) = nets.find(|net| !net.fds.is_empty() && !named(&net.id)) {
            return Err(ConfigError::ForeignFd {
                what: format!("net {}", net.id),
                key: "net",
            });
        }
        for here in &self.devices {
            let mut devices = config.devices.iter_mut();
            let device = devices.find(|device| device.id == here.id);
            here.apply_to(device.ok_or_else(|| unknown(&here.id))?);
        }
        let named = |id: &str| self.devices.iter().any(|here| here.id == id);
        let mut devices = config.devices.iter();
        if let Some(device) = devices.find(|device| device.fd.is_some() && !named(&device.id)) {
            return Err(ConfigError::ForeignFd {
                what: format!("device {}", device.id),
                key: "devices",
            });
        }
        if let Some(platform) = self.platform {
            config.platform = platform;
        } else if config.platform.iommufd_fd.is_some() {
            return Err(ConfigError::ForeignFd {
                what: "the iommufd".to_owned(),
                key: "platform",
            });
        }
        for here in &self.user_devices {
            let mut devices = config.user_devices.iter_mut();
            let device = devices.find(|device| device.id == here.id);
            device
                .ok_or_else(|| unknown(&here.id))?
                .socket
                .clone_from(&here.socket);
        }
        if let Some(serial) = &self.serial {
            config.serial = serial.clone();
        }
        if let Some(console) = &self.console {
            config.console = console.clone();
        }
        Ok(())
    }
}

fn unknown(id: &str) -> ConfigError {
    ConfigError::UnknownDevice { id: id.to_owned() }
}

fn address(key: &'static str, url: &str) -> Result<Address, ConfigError> {
    url.parse()
        .map_err(|source| ConfigError::MigrationUrl { key, source })
}
