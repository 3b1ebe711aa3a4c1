//! How the VM is tied to its host.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::error::ConfigError;
use super::option::OptionString;

/// `--platform`: which of the host's interfaces are used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlatformConfig {
    /// Whether devices of the host come by their own files and an iommufd, or by their groups.
    #[serde(default)]
    pub iommufd: IommufdConfig,
    /// An open `/dev/iommu` that ferry inherits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub iommufd_fd: Option<i32>,
}

/// By which of the kernel's interfaces devices of the host are opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum IommufdConfig {
    /// iommufd, where it and the device's own file can be opened; else groups.
    #[default]
    Auto,
    /// iommufd.
    On,
    /// Groups.
    Off,
}

impl IommufdConfig {
    fn from_name(name: &str) -> Option<Self> {
        match name {
            "auto" => Some(Self::Auto),
            "on" | "true" => Some(Self::On),
            "off" | "false" => Some(Self::Off),
            _ => None,
        }
    }
}

impl fmt::Display for IommufdConfig {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(match self {
            Self::Auto => "auto",
            Self::On => "on",
            Self::Off => "off",
        })
    }
}

impl FromStr for PlatformConfig {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let keys = OptionString::parse("--platform", &["iommufd", "iommufd_fd"], text)?;
        Ok(Self {
            iommufd: keys
                .parsed("iommufd", "on, off or auto", IommufdConfig::from_name)?
                .unwrap_or_default(),
            iommufd_fd: keys.number("iommufd_fd")?,
        })
    }
}

impl fmt::Display for PlatformConfig {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "iommufd={}", self.iommufd)?;
        match self.iommufd_fd {
            Some(fd) => write!(out, ",iommufd_fd={fd}"),
            None => Ok(()),
        }
    }
}

impl PlatformConfig {
    pub(super) fn is_default(&self) -> bool {
        *self == Self::default()
    }

    pub(crate) fn validate(&self) -> Result<(), ConfigError> {
        match (self.iommufd_fd, self.iommufd) {
            (Some(fd @ ..=2), _) => Err(ConfigError::FdNumber {
                option: "--platform iommufd_fd",
                id: "the VM".to_owned(),
                fd,
            }),
            (Some(_), IommufdConfig::Off) => Err(ConfigError::IommufdOff),
            _ => Ok(()),
        }
    }
}
