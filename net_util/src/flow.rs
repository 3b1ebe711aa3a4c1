//! From an Ethernet frame to what of it is hashed.
//!
//! [`parse`] takes the start of a frame, without the virtio-net header. It need not be the whole
//! frame: [`HEAD_BYTES`] hold every usual stack of headers, so a caller whose frame lies in many
//! pieces linearises only so much.
//!
//! What it finds, and what it does not. VIRTIO 1.4 §5.1.6.4.3 says which of it is hashed, and
//! leaves open what a packet "has"; where it does, this goes by the RFCs and, where they do not
//! decide, by the flow dissector of Linux:
//! - VLAN tags (802.1Q, 802.1ad) are skipped. A packet with more than [`MAX_HEADERS`] tags and
//!   extension headers together is no flow.
//! - Ports are found if TCP or UDP is next and its first 4 bytes are in the packet. The length in
//!   the IP header counts, so that the padding of a short frame is not taken for ports; a packet
//!   that by that length ends before its ports has none, and is a flow of its addresses.
//! - A fragment has no usable transport header, the first one neither: all fragments of a
//!   datagram get the same hash, over the addresses. An IPv6 fragment header with neither offset
//!   nor more-fragments counts as a fragment too.
//! - IPv6 extension headers are those of RFC 8200 §4 and of the protocols that add to them
//!   (mobility, HIP, Shim6). They are walked to the end, or to one behind which nothing can be
//!   read: a fragment's, or an encrypted payload. A home address option and a routing header of
//!   type 2 are noted ([`FlowV6::extended`]).
//! - Tunnels are not entered: an outer header's addresses are hashed. Nor is anything between
//!   Ethernet and IP but VLAN tags (PPPoE, MPLS, LLC).
//! - A malformed or truncated IP header or chain of extension headers is no flow, and nor is a
//!   packet whose ports should be there by its length, and are not. Checksums are not looked at.
//!
//! From this follows what a caller with too short a head can rely on: it gets the flow of the
//! whole frame, or none.
//!
//! Linux's dissector, whose hash a tap may report, differs in what a well-formed packet seldom has:
//! it does not look behind an authentication header, HIP or Shim6 for ports, does enter tunnels
//! and PPPoE, and does not look at the lengths in IP headers.

use std::net::{Ipv4Addr, Ipv6Addr};

/// Bytes of a frame that suffice for every usual stack of headers.
///
/// Ethernet 14, two VLAN tags 8, IPv6 40, hop-by-hop with router alert 8, destination options
/// with home address 24, routing header type 2 24, ports 4: 122. The rest is room.
pub const HEAD_BYTES: usize = 256;

/// Most VLAN tags and IPv6 extension headers of a packet, together: `MAX_FLOW_DISSECT_HDRS` of
/// Linux's flow dissector.
pub const MAX_HEADERS: usize = 15;

pub(crate) const ETHERTYPE_IPV4: u16 = 0x0800;
pub(crate) const ETHERTYPE_IPV6: u16 = 0x86dd;
pub(crate) const ETHERTYPE_VLAN: u16 = 0x8100;
pub(crate) const ETHERTYPE_QINQ: u16 = 0x88a8;

// Protocol numbers: IANA "Assigned Internet Protocol Numbers".
const PROTO_HOP_BY_HOP: u8 = 0;
pub(crate) const PROTO_TCP: u8 = 6;
pub(crate) const PROTO_UDP: u8 = 17;
pub(crate) const PROTO_ROUTING: u8 = 43;
pub(crate) const PROTO_FRAGMENT: u8 = 44;
pub(crate) const PROTO_ENCRYPTED: u8 = 50;
pub(crate) const PROTO_AUTHENTICATION: u8 = 51;
pub(crate) const PROTO_DESTINATION: u8 = 60;
const PROTO_MOBILITY: u8 = 135;
const PROTO_HIP: u8 = 139;
const PROTO_SHIM6: u8 = 140;

/// Type of the routing header that carries a mobile node's home address (RFC 6275 §6.4).
const ROUTING_TYPE_2: u8 = 2;
/// Pad1, the only option of one byte (RFC 8200 §4.2).
const OPTION_PAD1: u8 = 0;
/// The home address option (RFC 6275 §6.3).
pub(crate) const OPTION_HOME_ADDRESS: u8 = 0xc9;

/// What identifies a packet's flow.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Flow {
    /// An IPv4 packet.
    V4(FlowV4),
    /// An IPv6 packet.
    V6(FlowV6),
}

/// Addresses and ports of an IPv4 packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FlowV4 {
    /// Who sent it.
    pub source: Ipv4Addr,
    /// To whom.
    pub destination: Ipv4Addr,
    /// The ports, if it is TCP or UDP and not a fragment.
    pub transport: Option<Transport>,
}

/// Addresses and ports of an IPv6 packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FlowV6 {
    /// Who sent it, as in the IPv6 header.
    pub source: Ipv6Addr,
    /// To whom, as in the IPv6 header.
    pub destination: Ipv6Addr,
    /// What the `_EX` types hash, if the packet has any extension header.
    pub extended: Option<ExtendedAddresses>,
    /// The ports, if it is TCP or UDP and not a fragment.
    pub transport: Option<Transport>,
}

/// Addresses of an IPv6 packet with extension headers, home addresses preferred.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ExtendedAddresses {
    /// The home address option's address; that of the IPv6 header if there is none.
    pub source: Ipv6Addr,
    /// The address in the routing header of type 2; that of the IPv6 header if there is none.
    pub destination: Ipv6Addr,
}

/// A transport protocol whose ports are hashed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// Ports of a TCP or UDP packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Transport {
    /// Which protocol.
    pub protocol: Protocol,
    /// The sender's port.
    pub source: u16,
    /// The receiver's port.
    pub destination: u16,
}

impl Transport {
    /// Both ports, the sender's in the upper half: in big-endian bytes, what is on the wire and in the
    /// hash input.
    #[inline]
    pub const fn bits(self) -> u32 {
        (self.source as u32) << 16 | self.destination as u32
    }
}

/// What is left of a packet.
#[derive(Clone, Copy)]
struct Payload<'a> {
    /// The bytes that there are, no more than belong to the packet.
    bytes: &'a [u8],
    /// How many there should be by the IP header.
    length: usize,
}

impl<'a> Payload<'a> {
    fn new(bytes: &'a [u8], length: usize) -> Self {
        Self {
            bytes: bytes.get(..length).unwrap_or(bytes),
            length,
        }
    }

    /// The next `count` bytes, and what is behind them.
    fn split(self, count: usize) -> Option<(&'a [u8], Self)> {
        let (bytes, behind) = self.bytes.split_at_checked(count)?;
        let length = self.length.saturating_sub(count);
        Some((bytes, Self::new(behind, length)))
    }

    /// The ports, if it is TCP or UDP and long enough; `None` if they are cut off.
    #[inline]
    fn transport(self, protocol: u8) -> Option<Option<Transport>> {
        let protocol = match protocol {
            PROTO_TCP => Protocol::Tcp,
            PROTO_UDP => Protocol::Udp,
            _ => return Some(None),
        };
        if self.length < 4 {
            return Some(None);
        }
        let [a, b, c, d] = *self.bytes.first_chunk::<4>()?;
        Some(Some(Transport {
            protocol,
            source: u16::from_be_bytes([a, b]),
            destination: u16::from_be_bytes([c, d]),
        }))
    }
}

/// The flow of the frame that starts with `head`; `None` if it is not sound IPv4 or IPv6.
#[inline]
pub fn parse(head: &[u8]) -> Option<Flow> {
    match Packet::find(head)? {
        Packet::V4(packet) => parse_v4(packet).map(Flow::V4),
        Packet::V6(packet, headers) => parse_v6(packet, headers).map(Flow::V6),
    }
}

/// A frame's payload by its EtherType, not looked at yet.
pub(crate) enum Packet<'a> {
    /// For [`parse_v4`].
    V4(&'a [u8]),
    /// For [`parse_v6`], and how many extension headers there may be.
    V6(&'a [u8], usize),
}

impl<'a> Packet<'a> {
    /// Skips VLAN tags.
    #[inline]
    pub(crate) fn find(head: &'a [u8]) -> Option<Self> {
        let mut headers = MAX_HEADERS;
        let mut rest = head.get(12..)?;
        loop {
            let (kind, behind) = rest.split_first_chunk::<2>()?;
            match u16::from_be_bytes(*kind) {
                ETHERTYPE_IPV4 => return Some(Self::V4(behind)),
                ETHERTYPE_IPV6 => return Some(Self::V6(behind, headers)),
                ETHERTYPE_VLAN | ETHERTYPE_QINQ => {
                    headers = headers.checked_sub(1)?;
                    rest = behind.get(2..)?;
                }
                _ => return None,
            }
        }
    }
}

/// The flow of an IPv4 packet.
#[inline]
pub(crate) fn parse_v4(packet: &[u8]) -> Option<FlowV4> {
    let fixed = packet.first_chunk::<20>()?;
    let [version_and_length, _, t0, t1, _, _, f0, f1, _, protocol, ..] = *fixed;
    let [.., s0, s1, s2, s3, d0, d1, d2, d3] = *fixed;
    let header_bytes = usize::from(version_and_length & 0xf) * 4;
    if version_and_length >> 4 != 4 || header_bytes < 20 {
        return None;
    }
    let payload = packet.get(header_bytes..)?;
    let length = usize::from(u16::from_be_bytes([t0, t1])).checked_sub(header_bytes)?;
    // More-fragments and the offset; the reserved and don't-fragment bits do not matter.
    let fragment = u16::from_be_bytes([f0, f1]) & 0x3fff != 0;
    let transport = if fragment {
        None
    } else {
        Payload::new(payload, length).transport(protocol)?
    };
    Some(FlowV4 {
        source: Ipv4Addr::new(s0, s1, s2, s3),
        destination: Ipv4Addr::new(d0, d1, d2, d3),
        transport,
    })
}

/// The flow of an IPv6 packet with no more than `headers` extension headers.
pub(crate) fn parse_v6(packet: &[u8], headers: usize) -> Option<FlowV6> {
    let (fixed, payload) = packet.split_first_chunk::<40>()?;
    let [version, _, _, _, l0, l1, next, ..] = *fixed;
    if version >> 4 != 6 {
        return None;
    }
    let source = Ipv6Addr::from(array::<16>(fixed, 8)?);
    let destination = Ipv6Addr::from(array::<16>(fixed, 24)?);
    let length = usize::from(u16::from_be_bytes([l0, l1]));
    let chain = Chain::walk(next, Payload::new(payload, length), headers)?;
    let extended = chain.present.then(|| ExtendedAddresses {
        source: chain.home.unwrap_or(source),
        destination: chain.routed.unwrap_or(destination),
    });
    Some(FlowV6 {
        source,
        destination,
        extended,
        transport: chain.transport,
    })
}

/// Whether what an IPv6 header calls next is an extension header.
pub(crate) const fn is_extension(next: u8) -> bool {
    matches!(
        next,
        PROTO_HOP_BY_HOP
            | PROTO_ROUTING
            | PROTO_FRAGMENT
            | PROTO_ENCRYPTED
            | PROTO_AUTHENTICATION
            | PROTO_DESTINATION
            | PROTO_MOBILITY
            | PROTO_HIP
            | PROTO_SHIM6
    )
}

/// What a chain of IPv6 extension headers holds.
#[derive(Default)]
struct Chain {
    /// There is at least one.
    present: bool,
    /// The home address option.
    home: Option<Ipv6Addr>,
    /// The address in a routing header of type 2.
    routed: Option<Ipv6Addr>,
    /// What follows the chain.
    transport: Option<Transport>,
}

impl Chain {
    /// Walks the chain of at most `headers` whose first is of kind `next`.
    fn walk(mut next: u8, mut rest: Payload<'_>, mut headers: usize) -> Option<Self> {
        let mut chain = Self::default();
        while is_extension(next) {
            headers = headers.checked_sub(1)?;
            chain.present = true;
            // The second byte counts units of 8 bytes behind the first 8, but for some kinds.
            let length = || rest.bytes.get(1).copied().map(usize::from);
            let header_bytes = match next {
                PROTO_FRAGMENT | PROTO_ENCRYPTED => {
                    rest.split(8)?;
                    return Some(chain);
                }
                PROTO_AUTHENTICATION => (length()? + 2) * 4,
                _ => (length()? + 1) * 8,
            };
            let (header, behind) = rest.split(header_bytes)?;
            chain.note(next, header)?;
            next = *header.first()?;
            rest = behind;
        }
        chain.transport = rest.transport(next)?;
        Some(chain)
    }

    /// Takes from one header what the `_EX` types want; `None` if it is malformed.
    fn note(&mut self, kind: u8, header: &[u8]) -> Option<()> {
        match kind {
            PROTO_DESTINATION => {
                if let Some(home) = home_address(header.get(2..)?)? {
                    self.home = Some(home);
                }
            }
            // Two units of 8 bytes behind the first, one segment left (RFC 6275 §6.4.1).
            PROTO_ROUTING if header.get(1..4)? == [2, ROUTING_TYPE_2, 1] => {
                self.routed = Some(Ipv6Addr::from(array::<16>(header, 8)?));
            }
            _ => {}
        }
        Some(())
    }
}

/// The home address among destination `options`; `None` if they are malformed.
fn home_address(mut options: &[u8]) -> Option<Option<Ipv6Addr>> {
    while let Some((kind, behind)) = options.split_first() {
        if *kind == OPTION_PAD1 {
            options = behind;
            continue;
        }
        let (length, behind) = behind.split_first()?;
        let (data, behind) = behind.split_at_checked(usize::from(*length))?;
        if let (OPTION_HOME_ADDRESS, Ok(address)) = (*kind, <[u8; 16]>::try_from(data)) {
            return Some(Some(Ipv6Addr::from(address)));
        }
        options = behind;
    }
    Some(None)
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..)?.first_chunk::<N>().copied()
}

#[cfg(test)]
mod properties;
#[cfg(test)]
mod tests;
