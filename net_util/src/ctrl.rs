//! Bodies of the control queue's commands, checked.
//!
//! Source: VIRTIO 1.4 §5.1.6.5 "Control Virtqueue"; uapi `linux/virtio_net.h`.
//!
//! A command is a [`CommandHeader`] and a body in readable descriptors, answered by one byte in a
//! writable one: [`ACK_OK`] or [`ACK_ERR`]. The driver may cut the body into descriptors as it
//! likes (Linux cuts the RSS body in two), so the device gathers it first, at most
//! [`MAX_MQ_BODY_BYTES`] for the class handled here. Bytes behind the body are ignored.
//!
//! The commands of [`CLASS_MQ`] exclude each other: the last one that succeeded holds.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::config::{RSS_MAX_KEY_BYTES, RSS_MAX_TABLE_ENTRIES};
use crate::hash::{HashConfig, HashKey, HashReport, HashTypes};
use crate::toeplitz::PacketHash;

mod rss;

pub use rss::{RssConfig, RssError};

/// The command was carried out.
pub const ACK_OK: u8 = 0;
/// The command was refused and nothing changed.
pub const ACK_ERR: u8 = 1;

/// Receive filter modes.
pub const CLASS_RX: u8 = 0;
/// Hardware addresses.
pub const CLASS_MAC: u8 = 1;
/// VLAN filter.
pub const CLASS_VLAN: u8 = 2;
/// Acknowledgement of an announcement.
pub const CLASS_ANNOUNCE: u8 = 3;
/// Number of queues, RSS and hash reports.
pub const CLASS_MQ: u8 = 4;
/// Which large packets the driver takes.
pub const CLASS_GUEST_OFFLOADS: u8 = 5;

/// Sets the number of queue pairs; of [`CLASS_MQ`].
pub const MQ_VQ_PAIRS_SET: u8 = 0;
/// Sets hash types, key and indirection table; of [`CLASS_MQ`].
pub const MQ_RSS_CONFIG: u8 = 1;
/// Sets hash types and key; of [`CLASS_MQ`].
pub const MQ_HASH_CONFIG: u8 = 2;
/// Sets the offloads; of [`CLASS_GUEST_OFFLOADS`].
pub const GUEST_OFFLOADS_SET: u8 = 0;

/// Bytes of the longest body of a [`CLASS_MQ`] command that is acceptable.
pub const MAX_MQ_BODY_BYTES: usize =
    8 + 2 * RSS_MAX_TABLE_ENTRIES as usize + 3 + RSS_MAX_KEY_BYTES as usize;

/// What every command starts with.
#[derive(
    Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct CommandHeader {
    /// `CLASS_*`.
    pub class: u8,
    /// Which command of the class.
    pub command: u8,
}

/// Why a command is answered with [`ACK_ERR`].
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum CtrlError {
    /// The body ends before its last field.
    #[error("the body of {len} bytes ends before {field}")]
    Short {
        /// Bytes there are.
        len: usize,
        /// The field that is cut off or missing.
        field: &'static str,
    },
    /// The command does not exist, or its feature was not negotiated.
    #[error("command {command} of class {class} is not available with the negotiated features")]
    Unavailable {
        /// The command's class.
        class: u8,
        /// The command.
        command: u8,
    },
    /// The number of queue pairs is 0 or more than there are.
    #[error("{pairs} queue pairs were asked for, 1 to {max} are possible")]
    Pairs {
        /// Asked for.
        pairs: u16,
        /// Possible.
        max: u16,
    },
    /// Hash types that the device did not offer.
    #[error("hash types {asked:?} are not all among the supported {supported:?}")]
    HashTypes {
        /// Asked for.
        asked: HashTypes,
        /// Offered.
        supported: HashTypes,
    },
    /// The key is longer than the device said it takes.
    #[error("the hash key has {len} bytes, at most {RSS_MAX_KEY_BYTES} are possible")]
    KeyLength {
        /// The key's length in bytes.
        len: u8,
    },
    /// Hash types are on, but there is no key.
    #[error("hash types {asked:?} were asked for with an empty key")]
    NoKey {
        /// Asked for.
        asked: HashTypes,
    },
    /// The indirection table or what belongs to it is unsound.
    #[error("the RSS configuration is unsound")]
    Rss(#[from] RssError),
    /// Offloads that were not negotiated.
    #[error("guest offloads {asked:#x} are not all among the negotiated {negotiated:#x}")]
    Offloads {
        /// Asked for, as feature bits.
        asked: u64,
        /// Negotiated, as feature bits.
        negotiated: u64,
    },
}

/// What commands of [`CLASS_MQ`] may ask for: what was offered and negotiated.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MqLimits {
    /// `max_virtqueue_pairs` of the device configuration.
    pub max_pairs: u16,
    /// `supported_hash_types` of the device configuration.
    pub hash_types: HashTypes,
    /// `VIRTIO_NET_F_MQ` was negotiated.
    pub multi_queue: bool,
    /// `VIRTIO_NET_F_RSS` was negotiated.
    pub rss: bool,
    /// `VIRTIO_NET_F_HASH_REPORT` was negotiated.
    pub hash_report: bool,
}

/// A sound command of [`CLASS_MQ`].
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum MqCommand {
    /// Use this many queue pairs, and let the device steer.
    Pairs(u16),
    /// Steer by hash; report it too if `VIRTIO_NET_F_HASH_REPORT` was negotiated.
    Rss(RssConfig),
    /// Report the hash.
    Hash(HashConfig),
}

impl MqCommand {
    /// Parses and checks the body of `command`.
    ///
    /// # Errors
    /// [`CtrlError`]: answer [`ACK_ERR`] and change nothing.
    pub fn parse(command: u8, body: &[u8], limits: &MqLimits) -> Result<Self, CtrlError> {
        match command {
            MQ_VQ_PAIRS_SET if limits.multi_queue => parse_pairs(body, limits).map(Self::Pairs),
            MQ_RSS_CONFIG if limits.rss => rss::parse(body, limits).map(Self::Rss),
            // With RSS the driver has to use RSS_CONFIG, whose hash types serve the report too.
            MQ_HASH_CONFIG if limits.hash_report => parse_hash_config(body, limits).map(Self::Hash),
            _ => Err(CtrlError::Unavailable {
                class: CLASS_MQ,
                command,
            }),
        }
    }
}

/// Parses the body of [`GUEST_OFFLOADS_SET`]: the offloads that stay on, as feature bits.
///
/// # Errors
/// The body is short or asks for more than `negotiated`.
pub fn parse_guest_offloads(body: &[u8], negotiated: u64) -> Result<u64, CtrlError> {
    let asked = u64::from_le_bytes(Body::new(body).take("offloads")?);
    if asked & !negotiated == 0 {
        Ok(asked)
    } else {
        Err(CtrlError::Offloads { asked, negotiated })
    }
}

fn parse_pairs(body: &[u8], limits: &MqLimits) -> Result<u16, CtrlError> {
    let pairs = Body::new(body).le16("virtqueue_pairs")?;
    check_pairs(pairs, limits)
}

fn check_pairs(pairs: u16, limits: &MqLimits) -> Result<u16, CtrlError> {
    let max = limits.max_pairs;
    if (1..=max).contains(&pairs) {
        Ok(pairs)
    } else {
        Err(CtrlError::Pairs { pairs, max })
    }
}

fn parse_hash_config(body: &[u8], limits: &MqLimits) -> Result<HashConfig, CtrlError> {
    let mut body = Body::new(body);
    let types = body.hash_types(limits)?;
    // Linux puts max_tx_vq into the last of them, so they are not checked to be zero.
    let _reserved: [u8; 8] = body.take("reserved")?;
    body.hash_key(types)
}

/// A cursor over a command's body.
struct Body<'a> {
    rest: &'a [u8],
    len: usize,
}

impl<'a> Body<'a> {
    fn new(body: &'a [u8]) -> Self {
        Self {
            rest: body,
            len: body.len(),
        }
    }

    fn bytes(&mut self, len: usize, field: &'static str) -> Result<&'a [u8], CtrlError> {
        let short = CtrlError::Short {
            len: self.len,
            field,
        };
        let (head, rest) = self.rest.split_at_checked(len).ok_or(short)?;
        self.rest = rest;
        Ok(head)
    }

    fn take<const N: usize>(&mut self, field: &'static str) -> Result<[u8; N], CtrlError> {
        let mut taken = [0; N];
        taken.copy_from_slice(self.bytes(N, field)?);
        Ok(taken)
    }

    fn le16(&mut self, field: &'static str) -> Result<u16, CtrlError> {
        self.take(field).map(u16::from_le_bytes)
    }

    /// The hash types at the start of both bodies.
    fn hash_types(&mut self, limits: &MqLimits) -> Result<HashTypes, CtrlError> {
        let asked = HashTypes::from_bits(u32::from_le_bytes(self.take("hash_types")?));
        if asked.is_subset_of(limits.hash_types) {
            Ok(asked)
        } else {
            Err(CtrlError::HashTypes {
                asked,
                supported: limits.hash_types,
            })
        }
    }

    /// The key and its length at the end of both bodies.
    fn hash_key(&mut self, types: HashTypes) -> Result<HashConfig, CtrlError> {
        let [len] = self.take("hash_key_length")?;
        if len > RSS_MAX_KEY_BYTES {
            return Err(CtrlError::KeyLength { len });
        }
        if len == 0 && !types.is_empty() {
            return Err(CtrlError::NoKey { asked: types });
        }
        let key = self.bytes(usize::from(len), "hash_key_data")?;
        let key = HashKey::padded(key).ok_or(CtrlError::KeyLength { len })?;
        Ok(HashConfig { types, key })
    }
}

/// Whether a packet got a hash that RSS can steer by.
const fn is_classified(hash: PacketHash) -> bool {
    !matches!(hash.report, HashReport::None)
}

#[cfg(test)]
mod tests;
