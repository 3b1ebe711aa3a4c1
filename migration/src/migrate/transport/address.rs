//! Addresses as the user writes them.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

/// Longest path of a unix socket in bytes: `sun_path` of `<linux/un.h>` less its NUL.
const MAX_UNIX_PATH: usize = 107;

/// Where a destination waits: `unix:PATH` or `tcp:HOST:PORT`.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Address {
    /// A unix stream socket.
    Unix(PathBuf),
    /// A TCP port.
    Tcp {
        /// A name, an IPv4 address, or an IPv6 address (here without its brackets).
        host: String,
        /// The port.
        port: u16,
    },
}

/// What is wrong with an address.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum AddressError {
    /// Neither `unix:` nor `tcp:`.
    #[error("{text:?} is no migration address: write unix:PATH or tcp:HOST:PORT")]
    UnknownScheme {
        /// What was given.
        text: String,
    },
    /// `unix:` with nothing after it.
    #[error("unix: needs the path of a socket after the colon")]
    EmptyPath,
    /// The kernel takes no path this long.
    #[error("the socket path has {length} bytes; a unix socket's path has at most 107")]
    PathTooLong {
        /// Its length in bytes.
        length: usize,
    },
    /// `tcp:` without a host.
    #[error("{text:?} has no host: write tcp:HOST:PORT (0.0.0.0 or [::] to listen everywhere)")]
    EmptyHost {
        /// What was given.
        text: String,
    },
    /// `tcp:` without a port.
    #[error("{text:?} has no port: write tcp:HOST:PORT")]
    NoPort {
        /// What was given.
        text: String,
    },
    /// The port is no number below 65536.
    #[error("{port:?} is no TCP port: it must be a number from 0 to 65535")]
    BadPort {
        /// What stands in its place.
        port: String,
    },
    /// An IPv6 address whose colons cannot be told from the port's.
    #[error("{text:?}: write an IPv6 address in brackets, as in tcp:[fe80::1]:4444")]
    Brackets {
        /// What was given.
        text: String,
    },
}

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        if let Some(path) = text.strip_prefix("unix:") {
            return match path.len() {
                0 => Err(AddressError::EmptyPath),
                1..=MAX_UNIX_PATH => Ok(Self::Unix(path.into())),
                length => Err(AddressError::PathTooLong { length }),
            };
        }
        let Some(rest) = text.strip_prefix("tcp:") else {
            return Err(AddressError::UnknownScheme { text: text.into() });
        };
        let text = text.to_owned();
        let (host, port) = match rest.strip_prefix('[') {
            Some(inner) => {
                let Some((host, after)) = inner.split_once(']') else {
                    return Err(AddressError::Brackets { text });
                };
                match after.strip_prefix(':') {
                    Some(port) => (host, port),
                    None => return Err(AddressError::NoPort { text }),
                }
            }
            None => match rest.rsplit_once(':') {
                Some((host, _)) if host.contains(':') => {
                    return Err(AddressError::Brackets { text });
                }
                Some(parts) => parts,
                None => return Err(AddressError::NoPort { text }),
            },
        };
        if host.is_empty() {
            return Err(AddressError::EmptyHost { text });
        }
        if port.is_empty() {
            return Err(AddressError::NoPort { text });
        }
        let number = port.parse().map_err(|_| AddressError::BadPort {
            port: port.to_owned(),
        })?;
        Ok(Self::Tcp {
            host: host.to_owned(),
            port: number,
        })
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp { host, port } if host.contains(':') => write!(f, "tcp:[{host}]:{port}"),
            Self::Tcp { host, port } => write!(f, "tcp:{host}:{port}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Address, AddressError> {
        text.parse()
    }

    #[test]
    fn good_addresses_round_trip() {
        for text in [
            "unix:/run/ferry.sock",
            "unix:relative",
            "tcp:host:1",
            "tcp:192.0.2.1:65535",
            "tcp:[::1]:4444",
            "tcp:[fe80::1%eth0]:4444",
        ] {
            assert_eq!(parse(text).unwrap().to_string(), text);
        }
        let (host, port) = ("::1".to_owned(), 4444);
        assert_eq!(parse("tcp:[::1]:4444"), Ok(Address::Tcp { host, port }));
    }

    #[test]
    fn bad_addresses_say_what_is_wrong() {
        for text in ["", "host:1", "file:///x", "TCP:host:1"] {
            let text = text.to_owned();
            assert_eq!(parse(&text), Err(AddressError::UnknownScheme { text }));
        }
        assert_eq!(parse("unix:"), Err(AddressError::EmptyPath));
        let long = format!("unix:{}", "x".repeat(108));
        assert_eq!(parse(&long), Err(AddressError::PathTooLong { length: 108 }));
        for text in ["tcp::1", "tcp:[]:1"] {
            let text = text.to_owned();
            assert_eq!(parse(&text), Err(AddressError::EmptyHost { text }));
        }
        for text in ["tcp:host", "tcp:host:", "tcp:[::1]", "tcp:[::1]4444"] {
            let text = text.to_owned();
            assert_eq!(parse(&text), Err(AddressError::NoPort { text }));
        }
        for text in ["tcp:::1:4444", "tcp:[::1:4444"] {
            let text = text.to_owned();
            assert_eq!(parse(&text), Err(AddressError::Brackets { text }));
        }
        for port in ["65536", "-1", "http"] {
            let port = port.to_owned();
            let text = format!("tcp:host:{port}");
            assert_eq!(parse(&text), Err(AddressError::BadPort { port }));
        }
    }
}
