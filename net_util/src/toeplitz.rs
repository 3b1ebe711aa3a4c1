//! The Toeplitz hash, and the rule which type of hash a packet gets.
//!
//! Source: VIRTIO 1.4 §5.1.6.4.3; the hash itself is Microsoft's "RSS hashing functions".
//!
//! The hash of a bit string is the XOR, over each bit that is set, of the 32 bits of the key that
//! start at that bit's index. [`hash_bitwise`] says just that. [`Toeplitz`] gives the same by one
//! of several [`Method`]s, of which it takes the fastest that the CPU has when the key is set, so
//! that nothing is asked per packet.

mod carry_less;
mod table;

use std::net::Ipv6Addr;

use crate::flow::{self, Flow, FlowV4, FlowV6, Packet, Protocol, Transport};
use crate::hash::{HashConfig, HashKey, HashReport, HashTypes, KEY_BYTES};
use carry_less::{CarryLess, Wide};
pub(crate) use table::Table;

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

/// A way to calculate the hash. All give the same.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Method {
    /// One load from a table of 36 KiB for each byte of input: any CPU.
    Table,
    /// One carry-less multiplication for each 4 bytes: x86-64 with PCLMULQDQ.
    CarryLess,
    /// The same for two packets at a time where there are many: x86-64 with VPCLMULQDQ and AVX2.
    WideCarryLess,
}

impl Method {
    /// All of them, the slowest first.
    pub const ALL: [Self; 3] = [Self::Table, Self::CarryLess, Self::WideCarryLess];

    /// Its name, for people.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Table => "table",
            Self::CarryLess => "carry-less",
            Self::WideCarryLess => "wide-carry-less",
        }
    }
}

/// A key made ready.
#[derive(Clone)]
pub struct Toeplitz {
    form: Form,
}

/// The key as each method wants it.
#[derive(Clone)]
enum Form {
    Table(Box<Table>),
    CarryLess(CarryLess),
    Wide(Wide),
}

impl Toeplitz {
    /// Makes `key` ready for the fastest method of this CPU.
    pub fn new(key: &HashKey) -> Self {
        let fastest = Method::ALL
            .iter()
            .rev()
            .find_map(|method| Self::with_method(key, *method));
        fastest.unwrap_or_else(|| Self {
            form: Form::Table(Box::new(Table::new(key))),
        })
    }

    /// Makes `key` ready for `method`; `None` if this CPU does not have it.
    pub fn with_method(key: &HashKey, method: Method) -> Option<Self> {
        let form = match method {
            Method::Table => Form::Table(Box::new(Table::new(key))),
            Method::CarryLess => Form::CarryLess(CarryLess::new(key)?),
            Method::WideCarryLess => Form::Wide(Wide::new(key)?),
        };
        Some(Self { form })
    }

    /// How it calculates.
    pub const fn method(&self) -> Method {
        match self.form {
            Form::Table(_) => Method::Table,
            Form::CarryLess(_) => Method::CarryLess,
            Form::Wide(_) => Method::WideCarryLess,
        }
    }

    /// The hash of `input`; bytes past [`MAX_INPUT_BYTES`] do not count.
    pub fn hash(&self, input: &[u8]) -> u32 {
        match &self.form {
            Form::Table(table) => table.hash(input),
            Form::CarryLess(key) | Form::Wide(Wide { one: key, .. }) => {
                let mut padded = [0; MAX_INPUT_BYTES];
                for (to, from) in padded.iter_mut().zip(input) {
                    *to = *from;
                }
                key.hash(&padded)
            }
        }
    }

    /// The hash of an input whose length is known, as those of the specification are.
    #[inline]
    pub fn hash_array<const N: usize>(&self, input: &[u8; N]) -> u32 {
        match &self.form {
            Form::Table(table) => table.hash(input),
            Form::CarryLess(key) | Form::Wide(Wide { one: key, .. }) => key.hash(input),
        }
    }

    /// The hash of 12 bytes, given as big-endian numbers of 8 and of 4: what is in registers does not
    /// take the detour by way of memory.
    #[inline]
    fn hash_12(&self, first: u64, last: u32) -> u32 {
        match &self.form {
            Form::Table(table) => {
                let [a, b, c, d, e, f, g, h] = first.to_be_bytes();
                let [i, j, k, l] = last.to_be_bytes();
                table.hash(&[a, b, c, d, e, f, g, h, i, j, k, l])
            }
            Form::CarryLess(key) | Form::Wide(Wide { one: key, .. }) => key.hash_12(first, last),
        }
    }

    /// The hashes of many inputs of one length, into `hashes` in their order; as many as the
    /// shorter of both has.
    pub fn hash_many<const N: usize>(&self, inputs: &[[u8; N]], hashes: &mut [u32]) {
        let count = inputs.len().min(hashes.len());
        let (Some(inputs), Some(hashes)) = (inputs.get(..count), hashes.get_mut(..count)) else {
            return;
        };
        match &self.form {
            Form::Table(table) => {
                for (hash, input) in hashes.iter_mut().zip(inputs) {
                    *hash = table.hash(input);
                }
            }
            Form::CarryLess(key) => key.hash_many(inputs, hashes),
            Form::Wide(key) => key.hash_many(inputs, hashes),
        }
    }
}

impl std::fmt::Debug for Toeplitz {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // What was made of the key is the key.
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
    /// Makes the key of `config` ready; done once per command, not per packet.
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
        // Not by way of a `Flow`: to put one together would cost as much as the hash.
        let hash = match Packet::find(head) {
            Some(Packet::V4(packet)) => flow::parse_v4(packet).map(|flow| self.hash_v4(&flow)),
            Some(Packet::V6(packet, headers)) => {
                flow::parse_v6(packet, headers).map(|flow| self.hash_v6(&flow))
            }
            None => None,
        };
        hash.unwrap_or_default()
    }

    /// The hash of a packet of `flow`.
    pub fn hash_flow(&self, flow: &Flow) -> PacketHash {
        match flow {
            Flow::V4(flow) => self.hash_v4(flow),
            Flow::V6(flow) => self.hash_v6(flow),
        }
    }

    #[inline]
    fn hash_v4(&self, flow: &FlowV4) -> PacketHash {
        let on = |types| self.types.contains(types);
        let (ports, report) = match flow.transport {
            Some(t) if t.protocol == Protocol::Tcp && on(HashTypes::TCPV4) => {
                (Some(t), HashReport::TcpV4)
            }
            Some(t) if t.protocol == Protocol::Udp && on(HashTypes::UDPV4) => {
                (Some(t), HashReport::UdpV4)
            }
            _ if on(HashTypes::IPV4) => (None, HashReport::IpV4),
            _ => return PacketHash::default(),
        };
        let (source, destination) = (flow.source.to_bits(), flow.destination.to_bits());
        // Without ports the input ends earlier; zeros add nothing to the hash.
        let ports = ports.map_or(0, Transport::bits);
        let addresses = u64::from(source) << 32 | u64::from(destination);
        let value = self.toeplitz.hash_12(addresses, ports);
        PacketHash { value, report }
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
        let value = self.hash_addresses_v6(addresses.source, addresses.destination, ports);
        Some(PacketHash { value, report })
    }

    fn hash_v6_plain(&self, flow: &FlowV6) -> PacketHash {
        let on = |types| self.types.contains(types);
        let (ports, report) = match flow.transport {
            Some(t) if t.protocol == Protocol::Tcp && on(HashTypes::TCPV6) => {
                (Some(t), HashReport::TcpV6)
            }
            Some(t) if t.protocol == Protocol::Udp && on(HashTypes::UDPV6) => {
                (Some(t), HashReport::UdpV6)
            }
            _ if on(HashTypes::IPV6) => (None, HashReport::IpV6),
            _ => return PacketHash::default(),
        };
        let value = self.hash_addresses_v6(flow.source, flow.destination, ports);
        PacketHash { value, report }
    }

    fn hash_addresses_v6(
        &self,
        source: Ipv6Addr,
        destination: Ipv6Addr,
        ports: Option<Transport>,
    ) -> u32 {
        let mut input = [0; MAX_INPUT_BYTES];
        input[..16].copy_from_slice(&source.octets());
        input[16..32].copy_from_slice(&destination.octets());
        // Without ports the input ends earlier; zeros add nothing to the hash.
        input[32..].copy_from_slice(&ports.map_or(0, Transport::bits).to_be_bytes());
        self.toeplitz.hash_array(&input)
    }
}

#[cfg(test)]
mod tests;
