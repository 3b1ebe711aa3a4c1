//! Devices of the host, passed through by the kernel's VFIO.

use std::fmt;
use std::path::PathBuf;
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
    pub path: PathBuf,
    /// What a migration does if nobody can tell which pages the device wrote.
    #[serde(default, skip_serializing_if = "DirtyConfig::is_default")]
    pub dirty: DirtyConfig,
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
        let keys = OptionString::parse("--device", &["id", "path", "dirty"], text)?;
        Ok(Self {
            id: keys.text("id")?.unwrap_or_default().to_owned(),
            path: PathBuf::from(keys.required("path")?),
            dirty: keys
                .parsed("dirty", "auto or all", DirtyConfig::from_name)?
                .unwrap_or_default(),
        })
    }
}

impl fmt::Display for DeviceConfig {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = self.path.to_string_lossy();
        write!(out, "path={},dirty={}", quote(&path), self.dirty)?;
        if self.id.is_empty() {
            return Ok(());
        }
        write!(out, ",id={}", quote(&self.id))
    }
}

impl DeviceConfig {
    pub(super) fn validate(&self) -> Result<(), ConfigError> {
        if self.path.as_os_str().is_empty() {
            return Err(ConfigError::EmptyPath {
                option: "--device (devices.path)",
            });
        }
        Ok(())
    }
}
