//! What happens when a thread makes a system call it has no use for.

use std::fmt;
use std::str::FromStr;

use thiserror::Error;

/// `--seccomp`: what a forbidden system call does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SeccompMode {
    /// `true`: it ends the process with a message that names thread and call.
    #[default]
    Enforce,
    /// `false`: there are no filters.
    Off,
    /// `log`: it is written to the kernel's audit log, and done.
    Log,
}

/// The text is none of the modes.
#[derive(Debug, PartialEq, Eq, Error)]
#[error("`{0}` is no seccomp mode; write true, false or log")]
pub struct SeccompModeError(String);

impl FromStr for SeccompMode {
    type Err = SeccompModeError;

    fn from_str(text: &str) -> Result<Self, SeccompModeError> {
        match text {
            "true" | "on" => Ok(Self::Enforce),
            "false" | "off" => Ok(Self::Off),
            "log" => Ok(Self::Log),
            _ => Err(SeccompModeError(text.to_owned())),
        }
    }
}

impl fmt::Display for SeccompMode {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(match self {
            Self::Enforce => "true",
            Self::Off => "false",
            Self::Log => "log",
        })
    }
}
