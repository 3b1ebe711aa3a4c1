//! Hash types, hash reports and keys as virtio-net numbers them.
//!
//! Source: VIRTIO 1.4 §5.1.6.4.3 "Hash calculation for incoming packets"; uapi
//! `linux/virtio_net.h`, `VIRTIO_NET_RSS_HASH_TYPE_*` and `VIRTIO_NET_HASH_REPORT_*`.

use std::fmt;
use std::ops::BitOr;

use serde::{Deserialize, Serialize};

/// Bytes of a full hash key; shorter ones are padded with zeros.
///
/// The longest hash input is 36 bytes (two IPv6 addresses and two ports), and the hash of the
/// last bit takes 32 bits of the key: 36 + 4 bytes.
pub const KEY_BYTES: usize = 40;

/// A set of hash types: which packets get a hash, and over what.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct HashTypes(u32);

impl HashTypes {
    /// No hash at all: the state after reset.
    pub const NONE: Self = Self(0);
    /// IPv4 addresses.
    pub const IPV4: Self = Self(1 << 0);
    /// IPv4 addresses and TCP ports.
    pub const TCPV4: Self = Self(1 << 1);
    /// IPv4 addresses and UDP ports.
    pub const UDPV4: Self = Self(1 << 2);
    /// IPv6 addresses.
    pub const IPV6: Self = Self(1 << 3);
    /// IPv6 addresses and TCP ports.
    pub const TCPV6: Self = Self(1 << 4);
    /// IPv6 addresses and UDP ports.
    pub const UDPV6: Self = Self(1 << 5);
    /// IPv6 addresses of a packet with extension headers, home addresses preferred.
    pub const IP_EX: Self = Self(1 << 6);
    /// As [`IP_EX`](Self::IP_EX), and TCP ports.
    pub const TCP_EX: Self = Self(1 << 7);
    /// As [`IP_EX`](Self::IP_EX), and UDP ports.
    pub const UDP_EX: Self = Self(1 << 8);
    /// Every type this crate calculates.
    pub const ALL: Self = Self(0x1ff);

    /// The set with these bits, whatever they are; what they may be is the device's to check with
    /// [`is_subset_of`](Self::is_subset_of).
    pub const fn from_bits(bits: u32) -> Self {
        Self(bits)
    }

    /// The bits as on the wire (little-endian there).
    pub const fn bits(self) -> u32 {
        self.0
    }

    /// Whether no type is in the set.
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Whether all of `other` is in the set.
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// Whether all of the set is in `other`.
    pub const fn is_subset_of(self, other: Self) -> bool {
        other.contains(self)
    }
}

impl BitOr for HashTypes {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

impl fmt::Debug for HashTypes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "HashTypes({:#x})", self.0)
    }
}

/// What the header says about the hash in it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
#[repr(u16)]
pub enum HashReport {
    /// There is no hash.
    #[default]
    None = 0,
    /// By [`HashTypes::IPV4`].
    IpV4 = 1,
    /// By [`HashTypes::TCPV4`].
    TcpV4 = 2,
    /// By [`HashTypes::UDPV4`].
    UdpV4 = 3,
    /// By [`HashTypes::IPV6`].
    IpV6 = 4,
    /// By [`HashTypes::TCPV6`].
    TcpV6 = 5,
    /// By [`HashTypes::UDPV6`].
    UdpV6 = 6,
    /// By [`HashTypes::IP_EX`].
    IpV6Ex = 7,
    /// By [`HashTypes::TCP_EX`].
    TcpV6Ex = 8,
    /// By [`HashTypes::UDP_EX`].
    UdpV6Ex = 9,
}

impl HashReport {
    /// All of them, in the order of their numbers.
    pub const ALL: [Self; 10] = [
        Self::None,
        Self::IpV4,
        Self::TcpV4,
        Self::UdpV4,
        Self::IpV6,
        Self::TcpV6,
        Self::UdpV6,
        Self::IpV6Ex,
        Self::TcpV6Ex,
        Self::UdpV6Ex,
    ];

    /// What it is called in options and counters: the name of its type, or `none`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::IpV4 => "ipv4",
            Self::TcpV4 => "tcpv4",
            Self::UdpV4 => "udpv4",
            Self::IpV6 => "ipv6",
            Self::TcpV6 => "tcpv6",
            Self::UdpV6 => "udpv6",
            Self::IpV6Ex => "ip_ex",
            Self::TcpV6Ex => "tcp_ex",
            Self::UdpV6Ex => "udp_ex",
        }
    }

    /// The type of hash that it tells of; none for [`HashReport::None`].
    pub const fn hash_type(self) -> Option<HashTypes> {
        // Reports are numbered as the bits of their types, from 1 on.
        match self.code().checked_sub(1) {
            Some(bit) => Some(HashTypes::from_bits(1 << bit)),
            None => None,
        }
    }

    /// The number on the wire (little-endian there).
    pub const fn code(self) -> u16 {
        match self {
            Self::None => 0,
            Self::IpV4 => 1,
            Self::TcpV4 => 2,
            Self::UdpV4 => 3,
            Self::IpV6 => 4,
            Self::TcpV6 => 5,
            Self::UdpV6 => 6,
            Self::IpV6Ex => 7,
            Self::TcpV6Ex => 8,
            Self::UdpV6Ex => 9,
        }
    }
}

/// A hash key of [`KEY_BYTES`] bytes.
///
/// It is the guest's secret against hash flooding: `Debug` does not show it.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "([u8; 32], [u8; 8])", into = "([u8; 32], [u8; 8])")]
pub struct HashKey([u8; KEY_BYTES]);

impl HashKey {
    /// The key of zeros: every hash is 0.
    pub const ZERO: Self = Self([0; KEY_BYTES]);

    /// `bytes` padded with zeros; `None` if they are more than [`KEY_BYTES`].
    pub fn padded(bytes: &[u8]) -> Option<Self> {
        let mut key = [0; KEY_BYTES];
        key.get_mut(..bytes.len())?.copy_from_slice(bytes);
        Some(Self(key))
    }

    /// The key.
    pub const fn as_bytes(&self) -> &[u8; KEY_BYTES] {
        &self.0
    }
}

impl From<[u8; KEY_BYTES]> for HashKey {
    fn from(key: [u8; KEY_BYTES]) -> Self {
        Self(key)
    }
}

impl From<([u8; 32], [u8; 8])> for HashKey {
    fn from((head, tail): ([u8; 32], [u8; 8])) -> Self {
        let mut key = [0; KEY_BYTES];
        key[..32].copy_from_slice(&head);
        key[32..].copy_from_slice(&tail);
        Self(key)
    }
}

impl From<HashKey> for ([u8; 32], [u8; 8]) {
    fn from(HashKey(key): HashKey) -> Self {
        let (mut head, mut tail) = ([0; 32], [0; 8]);
        head.copy_from_slice(&key[..32]);
        tail.copy_from_slice(&key[32..]);
        (head, tail)
    }
}

impl Default for HashKey {
    fn default() -> Self {
        Self::ZERO
    }
}

impl fmt::Debug for HashKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("HashKey(..)")
    }
}

/// What the guest asked to be hashed, and with which key; the default is the state after reset.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct HashConfig {
    /// Types of hash that are on.
    pub types: HashTypes,
    /// The key, padded.
    pub key: HashKey,
}

#[cfg(test)]
mod tests {
    use virtio_bindings::virtio_net as uapi;

    use super::*;

    #[test]
    fn types_and_reports_are_those_of_the_uapi() {
        let pairs = [
            (
                HashTypes::IPV4,
                uapi::VIRTIO_NET_RSS_HASH_TYPE_IPv4,
                HashReport::IpV4,
                uapi::VIRTIO_NET_HASH_REPORT_IPv4,
            ),
            (
                HashTypes::TCPV4,
                uapi::VIRTIO_NET_RSS_HASH_TYPE_TCPv4,
                HashReport::TcpV4,
                uapi::VIRTIO_NET_HASH_REPORT_TCPv4,
            ),
            (
                HashTypes::UDPV4,
                uapi::VIRTIO_NET_RSS_HASH_TYPE_UDPv4,
                HashReport::UdpV4,
                uapi::VIRTIO_NET_HASH_REPORT_UDPv4,
            ),
            (
                HashTypes::IPV6,
                uapi::VIRTIO_NET_RSS_HASH_TYPE_IPv6,
                HashReport::IpV6,
                uapi::VIRTIO_NET_HASH_REPORT_IPv6,
            ),
            (
                HashTypes::TCPV6,
                uapi::VIRTIO_NET_RSS_HASH_TYPE_TCPv6,
                HashReport::TcpV6,
                uapi::VIRTIO_NET_HASH_REPORT_TCPv6,
            ),
            (
                HashTypes::UDPV6,
                uapi::VIRTIO_NET_RSS_HASH_TYPE_UDPv6,
                HashReport::UdpV6,
                uapi::VIRTIO_NET_HASH_REPORT_UDPv6,
            ),
            (
                HashTypes::IP_EX,
                uapi::VIRTIO_NET_RSS_HASH_TYPE_IP_EX,
                HashReport::IpV6Ex,
                uapi::VIRTIO_NET_HASH_REPORT_IPv6_EX,
            ),
            (
                HashTypes::TCP_EX,
                uapi::VIRTIO_NET_RSS_HASH_TYPE_TCP_EX,
                HashReport::TcpV6Ex,
                uapi::VIRTIO_NET_HASH_REPORT_TCPv6_EX,
            ),
            (
                HashTypes::UDP_EX,
                uapi::VIRTIO_NET_RSS_HASH_TYPE_UDP_EX,
                HashReport::UdpV6Ex,
                uapi::VIRTIO_NET_HASH_REPORT_UDPv6_EX,
            ),
        ];
        let mut all = HashTypes::NONE;
        for (types, type_bits, report, report_code) in pairs {
            assert_eq!(types.bits(), type_bits);
            assert_eq!(u32::from(report.code()), report_code);
            assert_eq!(1 << (report.code() - 1), types.bits());
            assert_eq!(report.hash_type(), Some(types));
            all = all | types;
        }
        assert_eq!(all, HashTypes::ALL);
        assert_eq!(
            u32::from(HashReport::None.code()),
            uapi::VIRTIO_NET_HASH_REPORT_NONE
        );
    }

    #[test]
    fn keys_are_padded_and_bounded() {
        assert_eq!(HashKey::padded(&[]), Some(HashKey::ZERO));
        let mut full = [0; KEY_BYTES];
        full[..3].copy_from_slice(&[1, 2, 3]);
        assert_eq!(HashKey::padded(&[1, 2, 3]), Some(HashKey::from(full)));
        assert!(HashKey::padded(&[0; 40]).is_some());
        assert!(HashKey::padded(&[0; 41]).is_none());
    }

    #[test]
    fn keys_survive_the_serialised_form() {
        let key = HashKey::from(std::array::from_fn(|i| u8::try_from(i).unwrap()));
        assert_eq!(HashKey::from(<([u8; 32], [u8; 8])>::from(key)), key);
    }

    #[test]
    fn keys_do_not_reach_logs() {
        assert_eq!(format!("{:?}", HashKey::from([0xab; 40])), "HashKey(..)");
    }
}
