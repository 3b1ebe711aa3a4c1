//! The Toeplitz hash, and the rule which type of hash a packet gets.
//!
//! Source: VIRTIO 1.4 §5.1.6.4.3; the hash itself is Microsoft's "RSS hashing functions".
//!
//! The hash of a bit string is the XOR, over each bit that is set, of the 32 bits of the key that
//! start at that bit's index. [`hash_bitwise`] says just that. [`Toeplitz`] gives the same from a
//! table with one row per byte of input: the XOR over the set bits of a byte depends only on the
//! byte's value and place.

use std::net::{Ipv4Addr, Ipv6Addr};

use crate::flow::{self, Flow, FlowV4, FlowV6, Protocol, Transport};
use crate::hash::{HashConfig, HashKey, HashReport, HashTypes, KEY_BYTES};

/// Bytes of the longest hash input: two IPv6 addresses and two ports.
pub const MAX_INPUT_BYTES: usize = 36;

/// The 32 bits of `key` that start at bit `index` (0 is the highest bit of the first byte); bits
/// past the end are 0.
fn key_window(key: &[u8; KEY_BYTES], index: usize) -> u32 {
    let byte = |i: usize| u64::from(key.get(i).copied().unwrap_or(0));
    let first = index / 8;
    let wide = (0..5).fold(0, |bits, i| bits << 8 | byte(first + i));
    let window = wide >> (8 - index % 8) & u64::from(u32::MAX);
    u32::try_from(window).unwrap_or(0)
}

/// The hash by its definition, bit by bit: the slow reference for tests, fuzzing and benches.
///
/// Input past [`MAX_INPUT_BYTES`] meets the zeros after the key's end and fades out.
pub fn hash_bitwise(key: &HashKey, input: &[u8]) -> u32 {
    let mut hash = 0;
    for (i, byte) in input.iter().enumerate() {
        for bit in 0..8 {
            if byte & 0x80 >> bit != 0 {
                hash ^= key_window(key.as_bytes(), i * 8 + bit);
            }
        }
    }
    hash
}

/// A key made ready: 36 KiB of table, one load and XOR per byte of input.
#[derive(Clone)]
pub struct Toeplitz {
    rows: Box<[[u32; 256]; MAX_INPUT_BYTES]>,
}

impl Toeplitz {
    /// Makes the table for `key`.
    pub fn new(key: &HashKey) -> Self {
        let mut rows = Box::new([[0; 256]; MAX_INPUT_BYTES]);
        for (place, row) in rows.iter_mut().enumerate() {
            // A value's hash is that of its highest set bit and that of the rest, which is a
            // smaller value and so already in the row.
            for bit in (0..8).rev() {
                let window = key_window(key.as_bytes(), place * 8 + bit);
                let (known, new) = row.split_at_mut(0x80 >> bit);
                for (hash, rest) in new.iter_mut().zip(known) {
                    *hash = *rest ^ window;
                }
            }
        }
        Self { rows }
    }

    /// The hash of `input`; bytes past [`MAX_INPUT_BYTES`] do not count.
    pub fn hash(&self, input: &[u8]) -> u32 {
        let rows = self.rows.iter().zip(input);
        rows.fold(0, |hash, (row, byte)| hash ^ row[usize::from(*byte)])
    }
}

impl std::fmt::Debug for Toeplitz {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The table is the key.
        f.write_str("Toeplitz(..)")
    }
}

/// A packet's hash as the header reports it; the default says that there is none.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct PacketHash {
    /// The hash; 0 if there is none.
    pub value: u32,
    /// By which type it was calculated.
    pub report: HashReport,
}

/// Hashes packets by a guest's [`HashConfig`].
#[derive(Clone, Debug)]
pub struct PacketHasher {
    types: HashTypes,
    toeplitz: Toeplitz,
}

impl PacketHasher {
    /// Makes the table for the key of `config`; done once per command, not per packet.
    pub fn new(config: &HashConfig) -> Self {
        Self {
            types: config.types,
            toeplitz: Toeplitz::new(&config.key),
        }
    }

    /// The types that are on.
    pub const fn types(&self) -> HashTypes {
        self.types
    }

    /// The hash of the packet that starts with `head` (see [`flow::parse`]).
    pub fn hash_frame(&self, head: &[u8]) -> PacketHash {
        if self.types.is_empty() {
            return PacketHash::default();
        }
        flow::parse(head)
            .map(|flow| self.hash_flow(&flow))
            .unwrap_or_default()
    }

    /// The hash of a packet of `flow`.
    pub fn hash_flow(&self, flow: &Flow) -> PacketHash {
        match flow {
            Flow::V4(flow) => self.hash_v4(flow),
            Flow::V6(flow) => self.hash_v6(flow),
        }
    }

    fn hash_v4(&self, flow: &FlowV4) -> PacketHash {
        let hash =
            |ports, report| self.hash_addresses_v4(flow.source, flow.destination, ports, report);
        let on = |types| self.types.contains(types);
        match flow.transport {
            Some(t) if t.protocol == Protocol::Tcp && on(HashTypes::TCPV4) => {
                hash(Some(t), HashReport::TcpV4)
            }
            Some(t) if t.protocol == Protocol::Udp && on(HashTypes::UDPV4) => {
                hash(Some(t), HashReport::UdpV4)
            }
            _ if on(HashTypes::IPV4) => hash(None, HashReport::IpV4),
            _ => PacketHash::default(),
        }
    }

    fn hash_v6(&self, flow: &FlowV6) -> PacketHash {
        self.hash_v6_extended(flow)
            .unwrap_or_else(|| self.hash_v6_plain(flow))
    }

    /// The hash of a packet with extension headers by the `_EX` types, if one of them fits.
    fn hash_v6_extended(&self, flow: &FlowV6) -> Option<PacketHash> {
        let addresses = flow.extended?;
        let on = |types| self.types.contains(types);
        let (ports, report) = match flow.transport {
            Some(t) if t.protocol == Protocol::Tcp && on(HashTypes::TCP_EX) => {
                (Some(t), HashReport::TcpV6Ex)
            }
            Some(t) if t.protocol == Protocol::Udp && on(HashTypes::UDP_EX) => {
                (Some(t), HashReport::UdpV6Ex)
            }
            _ if on(HashTypes::IP_EX) => (None, HashReport::IpV6Ex),
            _ => return None,
        };
        Some(self.hash_addresses_v6(addresses.source, addresses.destination, ports, report))
    }

    fn hash_v6_plain(&self, flow: &FlowV6) -> PacketHash {
        let hash =
            |ports, report| self.hash_addresses_v6(flow.source, flow.destination, ports, report);
        let on = |types| self.types.contains(types);
        match flow.transport {
            Some(t) if t.protocol == Protocol::Tcp && on(HashTypes::TCPV6) => {
                hash(Some(t), HashReport::TcpV6)
            }
            Some(t) if t.protocol == Protocol::Udp && on(HashTypes::UDPV6) => {
                hash(Some(t), HashReport::UdpV6)
            }
            _ if on(HashTypes::IPV6) => hash(None, HashReport::IpV6),
            _ => PacketHash::default(),
        }
    }

    fn hash_addresses_v4(
        &self,
        source: Ipv4Addr,
        destination: Ipv4Addr,
        ports: Option<Transport>,
        report: HashReport,
    ) -> PacketHash {
        let mut input = [0; 12];
        input[..4].copy_from_slice(&source.octets());
        input[4..8].copy_from_slice(&destination.octets());
        let value = match ports {
            Some(ports) => {
                input[8..].copy_from_slice(&ports.octets());
                self.toeplitz.hash(&input)
            }
            None => self.toeplitz.hash(&input[..8]),
        };
        PacketHash { value, report }
    }

    fn hash_addresses_v6(
        &self,
        source: Ipv6Addr,
        destination: Ipv6Addr,
        ports: Option<Transport>,
        report: HashReport,
    ) -> PacketHash {
        let mut input = [0; MAX_INPUT_BYTES];
        input[..16].copy_from_slice(&source.octets());
        input[16..32].copy_from_slice(&destination.octets());
        let value = match ports {
            Some(ports) => {
                input[32..].copy_from_slice(&ports.octets());
                self.toeplitz.hash(&input)
            }
            None => self.toeplitz.hash(&input[..32]),
        };
        PacketHash { value, report }
    }
}

#[cfg(test)]
mod tests;
