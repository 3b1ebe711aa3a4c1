//! Where the serial port and the virtio console go.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::error::ConfigError;
use super::option::{OptionString, quote};

/// `--serial` or `--console`: where one console's bytes go and come from.
///
/// In JSON it is an object as Cloud Hypervisor has it: `{"mode": "File", "file": "/tmp/log"}`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "ConsoleWire", into = "ConsoleWire")]
pub enum ConsoleConfig {
    /// The guest has no such device.
    Off,
    /// The device is there; its output is thrown away and there is no input.
    Null,
    /// The terminal ferry was started on.
    Tty,
    /// A new pseudo-terminal, named in `vm.info`.
    Pty,
    /// Output is written to this file, made anew; there is no input.
    File(PathBuf),
    /// A unix socket ferry listens on; one client at a time.
    Socket(PathBuf),
}

/// The names of the modes in JSON, as Cloud Hypervisor writes them.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
enum Mode {
    Off,
    Null,
    Tty,
    Pty,
    File,
    Socket,
}

impl Mode {
    fn name(self) -> &'static str {
        match self {
            Self::Off => "Off",
            Self::Null => "Null",
            Self::Tty => "Tty",
            Self::Pty => "Pty",
            Self::File => "File",
            Self::Socket => "Socket",
        }
    }
}

/// [`ConsoleConfig`] as JSON has it.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ConsoleWire {
    mode: Mode,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    file: Option<PathBuf>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    socket: Option<PathBuf>,
}

impl TryFrom<ConsoleWire> for ConsoleConfig {
    type Error = ConfigError;

    fn try_from(wire: ConsoleWire) -> Result<Self, ConfigError> {
        let mode = wire.mode.name();
        let unused = |key| Err(ConfigError::ConsolePathUnused { mode, key });
        let missing = |key| ConfigError::ConsolePathMissing {
            option: "console or serial",
            mode,
            key,
        };
        match (wire.mode, wire.file, wire.socket) {
            (Mode::File, Some(file), None) => Ok(Self::File(file)),
            (Mode::Socket, None, Some(socket)) => Ok(Self::Socket(socket)),
            (Mode::File, None, _) => Err(missing("file")),
            (Mode::Socket, _, None) => Err(missing("socket")),
            (_, Some(_), None) | (Mode::Socket, Some(_), _) => unused("file"),
            (_, _, Some(_)) => unused("socket"),
            (Mode::Off, None, None) => Ok(Self::Off),
            (Mode::Null, None, None) => Ok(Self::Null),
            (Mode::Tty, None, None) => Ok(Self::Tty),
            (Mode::Pty, None, None) => Ok(Self::Pty),
        }
    }
}

impl From<ConsoleConfig> for ConsoleWire {
    fn from(config: ConsoleConfig) -> Self {
        let plain = |mode| Self {
            mode,
            file: None,
            socket: None,
        };
        match config {
            ConsoleConfig::Off => plain(Mode::Off),
            ConsoleConfig::Null => plain(Mode::Null),
            ConsoleConfig::Tty => plain(Mode::Tty),
            ConsoleConfig::Pty => plain(Mode::Pty),
            ConsoleConfig::File(file) => Self {
                file: Some(file),
                ..plain(Mode::File)
            },
            ConsoleConfig::Socket(socket) => Self {
                socket: Some(socket),
                ..plain(Mode::Socket)
            },
        }
    }
}

/// The words and keys of an option string, in one place for parser and messages.
const KEYS: &[&str] = &["off", "null", "tty", "pty", "file", "socket"];

impl ConsoleConfig {
    /// Reads the argument of `option`, which is `--serial` or `--console`.
    ///
    /// # Errors
    /// [`ConfigError`] naming `option` if the text is not one of the modes.
    pub fn parse(option: &'static str, text: &str) -> Result<Self, ConfigError> {
        let keys = OptionString::parse(option, KEYS, text)?;
        let bad = || ConfigError::InvalidValue {
            option,
            key: "mode",
            value: text.to_owned(),
            expected: "one of off, null, tty, pty, file=PATH, socket=PATH",
        };
        if keys.len() != 1 {
            return Err(bad());
        }
        for (word, mode) in [
            ("off", Self::Off),
            ("null", Self::Null),
            ("tty", Self::Tty),
            ("pty", Self::Pty),
        ] {
            if keys.flag(word) {
                return Ok(mode);
            }
        }
        if let Some(file) = keys.path("file")? {
            return Ok(Self::File(file));
        }
        if let Some(socket) = keys.path("socket")? {
            return Ok(Self::Socket(socket));
        }
        Err(bad())
    }

    /// The file or socket it uses, if any.
    pub fn path(&self) -> Option<&Path> {
        match self {
            Self::File(path) | Self::Socket(path) => Some(path),
            Self::Off | Self::Null | Self::Tty | Self::Pty => None,
        }
    }

    /// Whether the guest has the device at all.
    pub fn is_present(&self) -> bool {
        !matches!(self, Self::Off)
    }

    pub(super) fn validate(&self, option: &'static str) -> Result<(), ConfigError> {
        match self.path() {
            Some(path) if path.as_os_str().is_empty() => Err(ConfigError::EmptyPath { option }),
            _ => Ok(()),
        }
    }
}

impl FromStr for ConsoleConfig {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        Self::parse("--serial/--console", text)
    }
}

impl fmt::Display for ConsoleConfig {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Off => out.write_str("off"),
            Self::Null => out.write_str("null"),
            Self::Tty => out.write_str("tty"),
            Self::Pty => out.write_str("pty"),
            Self::File(path) => write!(out, "file={}", quote(&path.to_string_lossy())),
            Self::Socket(path) => write!(out, "socket={}", quote(&path.to_string_lossy())),
        }
    }
}
