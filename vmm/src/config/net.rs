//! Network devices: virtio-net on a tap or a vhost-user backend, and passthrough devices over
//! vfio-user.

use std::collections::hash_map::RandomState;
use std::fmt;
use std::hash::BuildHasher;
use std::path::PathBuf;
use std::str::FromStr;

use net_util::hash::HashTypes;
use serde::{Deserialize, Serialize};

use super::error::ConfigError;
use super::hash::{HashBackend, HashTypeSet, Offer};
use super::option::{OptionString, quote};

/// The most virtqueues of one NIC, receive and transmit together: what the card takes.
pub const MAX_NET_QUEUES: u16 = virtio_devices::net::MAX_PAIRS * 2;
/// The longest virtqueue. Virtio allows 32768; 1024 is what a tap's batch can use.
pub const MAX_QUEUE_SIZE: u16 = 1024;
/// `ETH_MIN_MTU` of Linux, which virtio-net's `mtu` field also starts at.
const MIN_MTU: u16 = 68;
/// `ETH_MAX_MTU` of Linux.
const MAX_MTU: u16 = 65535;
/// `IFNAMSIZ` less the NUL.
const MAX_IFNAME_BYTES: usize = 15;

/// The address of a network card, written `aa:bb:cc:dd:ee:ff`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MacAddress(pub [u8; 6]);

impl MacAddress {
    /// An address drawn at random from the locally administered ones.
    pub fn random_local() -> Self {
        // The standard library seeds each `RandomState` from the kernel's generator.
        let [a, b, c, d, e, f, ..] = RandomState::new()
            .hash_one(std::process::id())
            .to_le_bytes();
        // IEEE 802: bit 0 of the first byte is "group", bit 1 is "locally administered".
        Self([(a & 0xfc) | 0x02, b, c, d, e, f])
    }

    /// Whether one station may have it: not a group address, not all zeroes.
    pub fn is_station(&self) -> bool {
        self.0[0] & 1 == 0 && self.0 != [0; 6]
    }
}

impl FromStr for MacAddress {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let bad = || ConfigError::InvalidValue {
            option: "--net",
            key: "mac",
            value: text.to_owned(),
            expected: "an address such as 52:54:00:12:34:56",
        };
        let mut bytes = [0u8; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().ok_or_else(bad)?;
            if part.len() != 2 || !part.bytes().all(|digit| digit.is_ascii_hexdigit()) {
                return Err(bad());
            }
            *byte = u8::from_str_radix(part, 16).map_err(|_| bad())?;
        }
        match parts.next() {
            None => Ok(Self(bytes)),
            Some(_) => Err(bad()),
        }
    }
}

impl TryFrom<String> for MacAddress {
    type Error = ConfigError;

    fn try_from(text: String) -> Result<Self, ConfigError> {
        text.parse()
    }
}

impl From<MacAddress> for String {
    fn from(mac: MacAddress) -> Self {
        mac.to_string()
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, f] = self.0;
        write!(out, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}")
    }
}

/// `--net`: one virtio-net device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetConfig {
    /// The device's name in the API and in a migration; `_netN` if left empty.
    #[serde(default)]
    pub id: String,
    /// The tap interface; made if it does not exist.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tap: Option<String>,
    /// Open tap descriptors that ferry inherits, one per queue pair, instead of `tap`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub fds: Vec<i32>,
    /// The queues are served by another process over vhost-user, instead of a tap.
    #[serde(default, skip_serializing_if = "super::is_off")]
    pub vhost_user: bool,
    /// The unix socket that process listens on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vhost_socket: Option<PathBuf>,
    /// The guest's address; [`VmConfig::validate`] draws one if not given.
    ///
    /// [`VmConfig::validate`]: super::VmConfig::validate
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<MacAddress>,
    /// The MTU the device tells the guest, in bytes; not told if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u16>,
    /// Virtqueues, receive and transmit together, without the control queue.
    #[serde(default = "default_num_queues")]
    pub num_queues: u16,
    /// Descriptors per virtqueue.
    #[serde(default = "default_queue_size")]
    pub queue_size: u16,
    /// Offer the guest the hash of each received packet (`VIRTIO_NET_F_HASH_REPORT`).
    #[serde(default)]
    pub hash_report: Offer,
    /// Offer the guest to steer packets by their hashes (`VIRTIO_NET_F_RSS`).
    #[serde(default, skip_serializing_if = "super::is_off")]
    pub rss: bool,
    /// The types of hashes offered with either; all if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hash_types: Option<HashTypeSet>,
    /// Its slot on the guest's PCI bus; the lowest that is free if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pci_device_id: Option<u8>,
    /// Who calculates hashes and steers by them.
    #[serde(default, skip_serializing_if = "HashBackend::is_auto")]
    pub hash_backend: HashBackend,
}

fn default_num_queues() -> u16 {
    2
}

fn default_queue_size() -> u16 {
    256
}

impl Default for NetConfig {
    fn default() -> Self {
        Self {
            id: String::new(),
            tap: None,
            fds: Vec::new(),
            vhost_user: false,
            vhost_socket: None,
            mac: None,
            mtu: None,
            num_queues: default_num_queues(),
            queue_size: default_queue_size(),
            hash_report: Offer::Off,
            rss: false,
            hash_types: None,
            pci_device_id: None,
            hash_backend: HashBackend::Auto,
        }
    }
}

impl FromStr for NetConfig {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let allowed = &[
            "id",
            "tap",
            "fd",
            "vhost_user",
            "socket",
            "mac",
            "mtu",
            "num_queues",
            "queue_size",
            "hash_report",
            "rss",
            "hash_types",
            "pci_device_id",
            "hash_backend",
        ];
        let keys = OptionString::parse("--net", allowed, text)?;
        Ok(Self {
            id: keys.text("id")?.unwrap_or_default().to_owned(),
            tap: keys.text("tap")?.map(str::to_owned),
            fds: keys.list("fd")?.unwrap_or_default(),
            vhost_user: keys.toggle("vhost_user")?.unwrap_or(false),
            vhost_socket: keys.path("socket")?,
            mac: keys.text("mac")?.map(str::parse).transpose()?,
            mtu: keys.number("mtu")?,
            num_queues: keys
                .number("num_queues")?
                .unwrap_or_else(default_num_queues),
            queue_size: keys
                .number("queue_size")?
                .unwrap_or_else(default_queue_size),
            hash_report: keys
                .parsed("hash_report", "on, off or auto", Offer::parse)?
                .unwrap_or_default(),
            rss: keys.toggle("rss")?.unwrap_or(false),
            hash_types: keys.parsed("hash_types", HashTypeSet::EXPECTED, |text| {
                text.parse().ok()
            })?,
            pci_device_id: keys.number("pci_device_id")?,
            hash_backend: keys
                .parsed(
                    "hash_backend",
                    "auto, kernel or software",
                    HashBackend::parse,
                )?
                .unwrap_or_default(),
        })
    }
}

impl fmt::Display for NetConfig {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(tap) = &self.tap {
            write!(out, "tap={},", quote(tap))?;
        }
        if !self.fds.is_empty() {
            let fds: Vec<String> = self.fds.iter().map(i32::to_string).collect();
            write!(out, "fd=[{}],", fds.join(","))?;
        }
        if self.vhost_user {
            write!(out, "vhost_user=on,")?;
        }
        if let Some(socket) = &self.vhost_socket {
            write!(out, "socket={},", quote(&socket.to_string_lossy()))?;
        }
        if !self.id.is_empty() {
            write!(out, "id={},", quote(&self.id))?;
        }
        if let Some(mac) = self.mac {
            write!(out, "mac={mac},")?;
        }
        if let Some(mtu) = self.mtu {
            write!(out, "mtu={mtu},")?;
        }
        write!(
            out,
            "num_queues={},queue_size={},hash_report={}",
            self.num_queues, self.queue_size, self.hash_report
        )?;
        if self.rss {
            write!(out, ",rss=on")?;
        }
        if let Some(types) = self.hash_types {
            write!(out, ",hash_types={types}")?;
        }
        if self.hash_backend != HashBackend::Auto {
            write!(out, ",hash_backend={}", self.hash_backend)?;
        }
        super::write_slot(out, self.pci_device_id)
    }
}

impl NetConfig {
    /// Queue pairs: half of `num_queues`.
    pub fn queue_pairs(&self) -> u16 {
        self.num_queues / 2
    }

    /// Whether the guest is offered hash reports.
    pub fn reports_hashes(&self) -> bool {
        match self.hash_report {
            Offer::Off => false,
            Offer::On => true,
            Offer::Auto => !self.vhost_user,
        }
    }

    /// The types of hashes that are offered if any are.
    pub fn offered_hash_types(&self) -> HashTypes {
        self.hash_types.map_or(HashTypes::ALL, HashTypeSet::types)
    }

    pub(super) fn validate(&self) -> Result<(), ConfigError> {
        let id = || self.id.clone();
        self.check_backend()?;
        self.check_hashes()?;
        if self.num_queues == 0
            || !self.num_queues.is_multiple_of(2)
            || self.num_queues > MAX_NET_QUEUES
        {
            return Err(ConfigError::NetQueues {
                id: id(),
                queues: self.num_queues,
                limit: MAX_NET_QUEUES,
            });
        }
        let size = self.queue_size;
        if !size.is_power_of_two() || !(2..=MAX_QUEUE_SIZE).contains(&size) {
            return Err(ConfigError::NetQueueSize {
                id: id(),
                size,
                limit: MAX_QUEUE_SIZE,
            });
        }
        if let Some(mac) = self.mac.filter(|mac| !mac.is_station()) {
            return Err(ConfigError::MacGroup {
                id: id(),
                mac: mac.to_string(),
            });
        }
        match self.mtu {
            Some(mtu) if mtu < MIN_MTU => Err(ConfigError::Mtu {
                id: id(),
                mtu,
                min: MIN_MTU,
                max: MAX_MTU,
            }),
            _ => Ok(()),
        }
    }

    fn check_backend(&self) -> Result<(), ConfigError> {
        let id = || self.id.clone();
        match (&self.tap, self.fds.is_empty(), self.vhost_user) {
            (Some(name), true, false) => check_ifname(&self.id, name)?,
            (None, false, false) => self.check_fds()?,
            (None, true, true) => {}
            _ => return Err(ConfigError::NetBackend { id: id() }),
        }
        let socket = self.vhost_socket.as_ref();
        match (self.vhost_user, socket) {
            (false, None) => Ok(()),
            (true, Some(path)) if !path.as_os_str().is_empty() => Ok(()),
            _ => Err(ConfigError::VhostSocket { id: id() }),
        }
    }

    /// A vhost-user backend has no part in hashes, and types of hashes need a use.
    fn check_hashes(&self) -> Result<(), ConfigError> {
        let given = [
            ("hash_report=on", self.hash_report == Offer::On),
            ("rss=on", self.rss),
            ("hash_types", self.hash_types.is_some()),
            ("hash_backend", self.hash_backend != HashBackend::Auto),
        ];
        if let Some((option, _)) = given.iter().find(|(_, given)| *given && self.vhost_user) {
            return Err(ConfigError::VhostHash {
                id: self.id.clone(),
                option,
            });
        }
        if self.hash_types.is_some() && !self.rss && !self.reports_hashes() {
            return Err(ConfigError::HashTypesUnused {
                id: self.id.clone(),
            });
        }
        if self.hash_backend == HashBackend::Kernel && !(self.rss && self.queue_pairs() > 1) {
            return Err(ConfigError::KernelHash {
                id: self.id.clone(),
            });
        }
        Ok(())
    }

    /// Checks the numbers of descriptors that ferry inherits.
    pub(crate) fn check_fds(&self) -> Result<(), ConfigError> {
        // 0 to 2 are the standard streams.
        if let Some(&fd) = self.fds.iter().find(|&&fd| fd <= 2) {
            return Err(ConfigError::NetFdNumber {
                id: self.id.clone(),
                fd,
            });
        }
        let pairs = usize::from(self.queue_pairs());
        if self.fds.len() != pairs {
            return Err(ConfigError::NetFds {
                id: self.id.clone(),
                fds: self.fds.len(),
                pairs,
            });
        }
        Ok(())
    }
}

/// Checks what `dev_valid_name()` of Linux checks, and refuses `%`, which it expands.
pub(crate) fn check_ifname(id: &str, name: &str) -> Result<(), ConfigError> {
    let plain = |byte: u8| byte.is_ascii_graphic() && !matches!(byte, b'/' | b':' | b'%');
    let good = (1..=MAX_IFNAME_BYTES).contains(&name.len())
        && name != "."
        && name != ".."
        && name.bytes().all(plain);
    if good {
        return Ok(());
    }
    Err(ConfigError::TapName {
        id: id.to_owned(),
        name: name.to_owned(),
    })
}

/// `--user-device`: one passthrough PCI device served by another process over vfio-user.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UserDeviceConfig {
    /// The device's name in the API and in a migration; `_userN` if left empty.
    #[serde(default)]
    pub id: String,
    /// The unix socket of the device's server.
    pub socket: PathBuf,
    /// Its slot on the guest's PCI bus; the lowest that is free if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pci_device_id: Option<u8>,
}

impl FromStr for UserDeviceConfig {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let allowed = &["id", "socket", "pci_device_id"];
        let keys = OptionString::parse("--user-device", allowed, text)?;
        Ok(Self {
            id: keys.text("id")?.unwrap_or_default().to_owned(),
            socket: PathBuf::from(keys.required("socket")?),
            pci_device_id: keys.number("pci_device_id")?,
        })
    }
}

impl fmt::Display for UserDeviceConfig {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "socket={}", quote(&self.socket.to_string_lossy()))?;
        super::write_slot(out, self.pci_device_id)?;
        if self.id.is_empty() {
            return Ok(());
        }
        write!(out, ",id={}", quote(&self.id))
    }
}

impl UserDeviceConfig {
    pub(super) fn validate(&self) -> Result<(), ConfigError> {
        if self.socket.as_os_str().is_empty() {
            return Err(ConfigError::EmptyPath {
                option: "--user-device (user_devices.socket)",
            });
        }
        Ok(())
    }
}
