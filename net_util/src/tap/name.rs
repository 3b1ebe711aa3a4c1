//! Names of interfaces.

use std::fmt;

use rustix::io::Errno;

use super::{Attach, TapError};

/// The name of a network interface, as the kernel takes it (`dev_valid_name`, `net/core/dev.c`).
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct TapName {
    /// Padded with zeros; the last byte is always 0.
    bytes: [u8; TapName::MAX_BYTES + 1],
}

impl TapName {
    /// Bytes of the longest name (`IFNAMSIZ` of uapi `linux/if.h`, less the terminator).
    pub const MAX_BYTES: usize = 15;

    /// `name`, which may have one `%d` in it: the kernel then picks the first free number.
    ///
    /// # Errors
    /// It is empty, too long, `.` or `..`, or holds whitespace, control characters, `/`, `:`,
    /// or a `%` other than that.
    pub fn new(name: &str) -> Result<Self, TapError> {
        let without_number = name.replacen("%d", "", 1);
        let bad = |c: char| c.is_whitespace() || c.is_control() || "/:%".contains(c);
        let mut bytes = [0; Self::MAX_BYTES + 1];
        match bytes.get_mut(..name.len()) {
            Some(place)
                if name.len() <= Self::MAX_BYTES
                    && !["", ".", ".."].contains(&name)
                    && !without_number.contains(bad) =>
            {
                place.copy_from_slice(name.as_bytes());
                Ok(Self { bytes })
            }
            _ => Err(TapError::BadName {
                name: name.to_owned(),
            }),
        }
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        let len = self
            .bytes
            .iter()
            .position(|byte| *byte == 0)
            .unwrap_or(self.bytes.len());
        // It was made of a `str`, cut at its end.
        std::str::from_utf8(&self.bytes[..len]).unwrap_or_default()
    }

    /// The name as `struct ifreq` holds it.
    pub(super) const fn padded(&self) -> [u8; Self::MAX_BYTES + 1] {
        self.bytes
    }

    /// The name from a `struct ifreq` the kernel filled in.
    pub(super) fn from_padded(bytes: [u8; Self::MAX_BYTES + 1]) -> Option<Self> {
        let name = bytes.split(|byte| *byte == 0).next()?;
        Self::new(std::str::from_utf8(name).ok()?).ok()
    }

    /// The error of an operation on this tap.
    pub(super) fn failed(&self, operation: &'static str, errno: Errno) -> TapError {
        TapError::Failed {
            tap: self.clone(),
            operation,
            source: errno.into(),
        }
    }

    /// The error of opening a queue of this tap.
    pub(super) fn refused(&self, error: Attach) -> TapError {
        let tap = self.clone();
        match error {
            Attach::Device(errno) => TapError::NoTunDevice {
                source: errno.into(),
            },
            Attach::Refused(Errno::BUSY) => TapError::InUse { tap },
            Attach::Refused(Errno::PERM) => TapError::NeedsAdmin { tap },
            Attach::Refused(errno) => self.failed("opening a queue", errno),
        }
    }
}

impl fmt::Display for TapName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Debug for TapName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self.as_str(), f)
    }
}
