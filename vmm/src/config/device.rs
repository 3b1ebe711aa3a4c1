//! Devices of the host, passed through by the kernel's VFIO.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::error::ConfigError;
use super::option::{OptionString, quote};

/// `--device`: one PCI device of the host.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceConfig {
    /// The device's name in the API and in a migration; `_vfioN` if left empty.
    #[serde(default)]
    pub id: String,
    /// Its folder in sysfs (`/sys/bus/pci/devices/0000:01:00.0`).
    #[serde(default, skip_serializing_if = "is_empty")]
    pub path: PathBuf,
    /// Its open file (`/dev/vfio/devices/…`), which ferry inherits, instead of `path`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fd: Option<i32>,
    /// What a migration does if nobody can tell which pages the device wrote.
    #[serde(default, skip_serializing_if = "DirtyConfig::is_default")]
    pub dirty: DirtyConfig,
    /// Whether the guest is asked to eject it when the host wants it back.
    #[serde(default, skip_serializing_if = "super::is_off")]
    pub give_back: bool,
    /// Its slot on the guest's PCI bus; the lowest that is free if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pci_device_id: Option<u8>,
}

/// Whether a path was left out.
fn is_empty(path: &Path) -> bool {
    path.as_os_str().is_empty()
}

/// What a migration does about a device whose writes nobody logs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DirtyConfig {
    /// It is refused.
    #[default]
    Auto,
    /// All memory is copied while the guest stands still.
    All,
}

impl DirtyConfig {
    fn is_default(&self) -> bool {
        *self == Self::default()
    }

    fn from_name(name: &str) -> Option<Self> {
        match name {
            "auto" => Some(Self::Auto),
            "all" => Some(Self::All),
            _ => None,
        }
    }
}

impl fmt::Display for DirtyConfig {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(match self {
            Self::Auto => "auto",
            Self::All => "all",
        })
    }
}

impl FromStr for DeviceConfig {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let allowed = &["id", "path", "fd", "dirty", "give_back", "pci_device_id"];
        let keys = OptionString::parse("--device", allowed, text)?;
        Ok(Self {
            id: keys.text("id")?.unwrap_or_default().to_owned(),
            path: keys.path("path")?.unwrap_or_default(),
            fd: keys.number("fd")?,
            dirty: keys
                .parsed("dirty", "auto or all", DirtyConfig::from_name)?
                .unwrap_or_default(),
            give_back: keys.toggle("give_back")?.unwrap_or(false),
            pci_device_id: keys.number("pci_device_id")?,
        })
    }
}

impl fmt::Display for DeviceConfig {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !is_empty(&self.path) {
            write!(out, "path={},", quote(&self.path.to_string_lossy()))?;
        }
        if let Some(fd) = self.fd {
            write!(out, "fd={fd},")?;
        }
        write!(out, "dirty={}", self.dirty)?;
        if self.give_back {
            write!(out, ",give_back=on")?;
        }
        super::write_slot(out, self.pci_device_id)?;
        if self.id.is_empty() {
            return Ok(());
        }
        write!(out, ",id={}", quote(&self.id))
    }
}

impl DeviceConfig {
    pub(super) fn validate(&self) -> Result<(), ConfigError> {
        check_place(&self.id, &self.path, self.fd)
    }
}

/// Checks that there is one way to a device of the host.
pub(crate) fn check_place(id: &str, path: &Path, fd: Option<i32>) -> Result<(), ConfigError> {
    match fd {
        Some(fd @ ..=2) => Err(ConfigError::FdNumber {
            option: "--device",
            id: id.to_owned(),
            fd,
        }),
        Some(_) if is_empty(path) => Ok(()),
        None if !is_empty(path) => Ok(()),
        Some(_) | None => Err(ConfigError::DevicePlace { id: id.to_owned() }),
    }
}
