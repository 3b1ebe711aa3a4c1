//! The first message: protocol version and capabilities.

use serde::{Deserialize, Serialize};
use zerocopy::IntoBytes;

use crate::wire::{
    DEFAULT_MSG_FDS, MAX_DATA_XFER, MAX_MSG_FDS, MAX_VERSION_DATA, VERSION_MAJOR, VERSION_MINOR,
    VersionMsg, split,
};

/// Why two ends cannot talk.
#[derive(Debug, thiserror::Error)]
pub enum VersionError {
    /// The message is too short, too long, or not what it should be.
    #[error("malformed VERSION message: {0}")]
    Malformed(&'static str),
    /// The capabilities are not JSON of the expected shape.
    #[error("malformed capabilities in VERSION message")]
    Json(#[source] serde_json::Error),
    /// Another major version, or a minor version above the one proposed.
    #[error(
        "the peer speaks vfio-user {major}.{minor}, this end {VERSION_MAJOR}.0 to \
         {VERSION_MAJOR}.{VERSION_MINOR}"
    )]
    Unsupported {
        /// The peer's major version.
        major: u16,
        /// The peer's minor version.
        minor: u16,
    },
}

/// What an end says of itself; what it leaves out has the default of the specification.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Capabilities {
    /// Descriptors it takes in one message.
    #[serde(default = "default_fds")]
    pub max_msg_fds: u64,
    /// Data bytes it takes in one read or write message.
    #[serde(default = "default_xfer")]
    pub max_data_xfer_size: u64,
    /// DMA mappings it takes at a time.
    #[serde(default = "default_maps")]
    pub max_dma_maps: u64,
    /// Page sizes of DMA mappings, OR-ed.
    #[serde(default = "default_pgsizes")]
    pub pgsizes: u64,
    /// Early servers put the page size of dirty tracking here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub migration: Option<MigrationCapability>,
    /// Whether it takes REGION_WRITE_MULTI.
    #[serde(default)]
    pub write_multiple: bool,
}

/// The `migration` capability of protocol texts before migration v2.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct MigrationCapability {
    /// Smallest page size of its dirty tracking.
    #[serde(default = "default_pgsizes")]
    pub pgsize: u64,
}

const fn default_fds() -> u64 {
    DEFAULT_MSG_FDS as u64
}

const fn default_xfer() -> u64 {
    MAX_DATA_XFER as u64
}

const fn default_maps() -> u64 {
    65535
}

const fn default_pgsizes() -> u64 {
    4096
}

impl Default for Capabilities {
    /// What a peer has that says nothing.
    fn default() -> Self {
        Self {
            max_msg_fds: default_fds(),
            max_data_xfer_size: default_xfer(),
            max_dma_maps: default_maps(),
            pgsizes: default_pgsizes(),
            migration: None,
            write_multiple: false,
        }
    }
}

impl Capabilities {
    /// What this crate offers.
    pub fn ours() -> Self {
        Self {
            max_msg_fds: MAX_MSG_FDS as u64,
            migration: Some(MigrationCapability {
                pgsize: default_pgsizes(),
            }),
            write_multiple: true,
            ..Self::default()
        }
    }

    /// Descriptors that may be sent to this peer in one message.
    pub fn fds(&self) -> usize {
        usize::try_from(self.max_msg_fds)
            .unwrap_or(MAX_MSG_FDS)
            .min(MAX_MSG_FDS)
    }

    /// Data bytes that may go to or come from this peer in one message.
    pub fn data_xfer(&self) -> usize {
        usize::try_from(self.max_data_xfer_size)
            .unwrap_or(MAX_DATA_XFER)
            .min(MAX_DATA_XFER)
    }
}

#[derive(Serialize, Deserialize, Default)]
struct VersionData {
    #[serde(default)]
    capabilities: Capabilities,
}

/// A VERSION payload of `minor` and `capabilities`.
pub(crate) fn encode(minor: u16, capabilities: &Capabilities) -> Vec<u8> {
    let message = VersionMsg {
        major: VERSION_MAJOR,
        minor,
    };
    let data = serde_json::json!({ "capabilities": capabilities });
    let mut payload = message.as_bytes().to_vec();
    payload.extend_from_slice(data.to_string().as_bytes());
    payload.push(0);
    payload
}

/// The minor version and capabilities of a peer's VERSION payload.
pub(crate) fn decode(payload: &[u8]) -> Result<(u16, Capabilities), VersionError> {
    let (message, data) =
        split::<VersionMsg>(payload).ok_or(VersionError::Malformed("it is too short"))?;
    if message.major != VERSION_MAJOR {
        return Err(VersionError::Unsupported {
            major: message.major,
            minor: message.minor,
        });
    }
    if data.is_empty() {
        return Ok((message.minor, Capabilities::default()));
    }
    if data.len() > MAX_VERSION_DATA {
        return Err(VersionError::Malformed("its capabilities are too long"));
    }
    let (last, text) = data.split_last().unwrap_or((&0, &[]));
    if *last != 0 {
        return Err(VersionError::Malformed(
            "its capabilities have no NUL at the end",
        ));
    }
    let data: VersionData = serde_json::from_slice(text).map_err(VersionError::Json)?;
    if data.capabilities.max_data_xfer_size == 0 {
        return Err(VersionError::Malformed("its max_data_xfer_size is 0"));
    }
    Ok((message.minor, data.capabilities))
}

/// What a server answers to a client's VERSION payload, and the client's capabilities.
pub(crate) fn answer(payload: &[u8]) -> Result<(Vec<u8>, Capabilities), VersionError> {
    let (minor, capabilities) = decode(payload)?;
    Ok((
        encode(minor.min(VERSION_MINOR), &Capabilities::ours()),
        capabilities,
    ))
}

/// Checks a server's answer to our proposal.
pub(crate) fn accept(payload: &[u8]) -> Result<Capabilities, VersionError> {
    let (minor, capabilities) = decode(payload)?;
    if minor > VERSION_MINOR {
        return Err(VersionError::Unsupported {
            major: VERSION_MAJOR,
            minor,
        });
    }
    Ok(capabilities)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn payload(major: u16, minor: u16, text: &str) -> Vec<u8> {
        let mut bytes = VersionMsg { major, minor }.as_bytes().to_vec();
        bytes.extend_from_slice(text.as_bytes());
        bytes
    }

    #[test]
    fn both_ends_agree() {
        let ours = Capabilities::ours();
        let (reply, seen) = answer(&encode(VERSION_MINOR, &ours)).unwrap();
        assert_eq!(seen, ours);
        assert_eq!(accept(&reply).unwrap(), ours);
    }

    #[test]
    fn silence_means_the_defaults_of_the_specification() {
        for text in ["", "{}\0", "{\"capabilities\":{}}\0", "{\"other\":1}\0"] {
            let seen = accept(&payload(0, 1, text)).unwrap();
            assert_eq!(seen, Capabilities::default());
            assert_eq!((seen.fds(), seen.data_xfer()), (1, 1 << 20));
        }
    }

    #[test]
    fn limits_of_the_peer_are_kept_and_never_exceed_ours() {
        let seen = accept(&payload(
            0,
            0,
            "{\"capabilities\":{\"max_msg_fds\":8,\"max_data_xfer_size\":4096}}\0",
        ))
        .unwrap();
        assert_eq!((seen.fds(), seen.data_xfer()), (8, 4096));
        let seen = accept(&payload(
            0,
            0,
            "{\"capabilities\":{\"max_msg_fds\":9999999999,\"max_data_xfer_size\":99999999999}}\0",
        ))
        .unwrap();
        assert_eq!((seen.fds(), seen.data_xfer()), (MAX_MSG_FDS, MAX_DATA_XFER));
    }

    #[test]
    fn a_server_answers_a_newer_minor_with_its_own() {
        let (reply, _) = answer(&payload(0, 9, "")).unwrap();
        assert_eq!(decode(&reply).unwrap().0, VERSION_MINOR);
        assert!(accept(&payload(0, 9, "")).is_err());
    }

    #[test]
    fn nonsense_is_refused() {
        let long = format!("{}\0", " ".repeat(MAX_VERSION_DATA));
        for bad in [
            vec![],
            vec![0, 0, 1],
            payload(1, 0, ""),
            payload(0, 1, "{}"),
            payload(0, 1, "\0"),
            payload(0, 1, "7\0"),
            payload(0, 1, "{\"capabilities\":7}\0"),
            payload(0, 1, "{\"capabilities\":{\"max_msg_fds\":-1}}\0"),
            payload(0, 1, "{\"capabilities\":{\"max_data_xfer_size\":0}}\0"),
            payload(0, 1, &long),
        ] {
            assert!(answer(&bad).is_err(), "{bad:?}");
            assert!(accept(&bad).is_err(), "{bad:?}");
        }
    }
}
