//! From an Ethernet frame to what of it is hashed.
//!
//! [`parse`] takes the start of a frame, without the virtio-net header. It need not be the whole
//! frame: [`HEAD_BYTES`] hold every usual stack of headers, so a caller whose frame lies in many
//! pieces linearises only so much.
//!
//! What it finds, and what it does not (VIRTIO 1.4 §5.1.6.4.3 leaves most of this open; where it
//! does, this agrees with the flow dissector of Linux, so that a hash from a tap's kernel and
//! ours are the same):
//! - VLAN tags (802.1Q, 802.1ad, the older 0x9100) are skipped, however many.
//! - Ports are found if TCP or UDP is next and its first 4 bytes are in the packet; the length in
//!   the IP header counts, so that the padding of a short frame is not taken for ports.
//! - A fragment has no usable transport header, the first one neither: all fragments of a
//!   datagram get the same hash, over the addresses. An IPv6 fragment header with neither offset
//!   nor more-fragments counts as a fragment too.
//! - IPv6 extension headers are walked to the end; a home address option and a routing header of
//!   type 2 are noted ([`FlowV6::extended`]).
//! - Tunnels are not entered: an outer header's addresses are hashed.
//! - A malformed or truncated IP header or chain of extension headers is no flow. Neither is a
//!   chain that does not fit the slice: part of it could hold the home address.

use std::net::{Ipv4Addr, Ipv6Addr};

/// Bytes of a frame that suffice for every usual stack of headers.
///
/// Ethernet 14, two VLAN tags 8, IPv6 40, hop-by-hop with router alert 8, destination options
/// with home address 24, routing header type 2 24, ports 4: 122. The rest is room.
pub const HEAD_BYTES: usize = 256;

const ETHERTYPE_IPV4: u16 = 0x0800;
const ETHERTYPE_IPV6: u16 = 0x86dd;
const ETHERTYPE_VLAN: u16 = 0x8100;
const ETHERTYPE_QINQ: u16 = 0x88a8;
const ETHERTYPE_QINQ_OLD: u16 = 0x9100;

// Protocol numbers: IANA "Assigned Internet Protocol Numbers".
const PROTO_HOP_BY_HOP: u8 = 0;
const PROTO_TCP: u8 = 6;
const PROTO_UDP: u8 = 17;
const PROTO_ROUTING: u8 = 43;
const PROTO_FRAGMENT: u8 = 44;
const PROTO_AUTHENTICATION: u8 = 51;
const PROTO_DESTINATION: u8 = 60;
const PROTO_HIP: u8 = 139;
const PROTO_SHIM6: u8 = 140;

/// Type of the routing header that carries a mobile node's home address (RFC 6275 §6.4).
const ROUTING_TYPE_2: u8 = 2;
/// Pad1, the only option of one byte (RFC 8200 §4.2).
const OPTION_PAD1: u8 = 0;
/// The home address option (RFC 6275 §6.3).
const OPTION_HOME_ADDRESS: u8 = 0xc9;

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
    /// Both ports as on the wire and in the hash input.
    pub const fn octets(self) -> [u8; 4] {
        let (source, destination) = (self.source.to_be_bytes(), self.destination.to_be_bytes());
        [source[0], source[1], destination[0], destination[1]]
    }

    fn parse(protocol: u8, payload: &[u8]) -> Option<Self> {
        let protocol = match protocol {
            PROTO_TCP => Protocol::Tcp,
            PROTO_UDP => Protocol::Udp,
            _ => return None,
        };
        Some(Self {
            protocol,
            source: be16(payload, 0)?,
            destination: be16(payload, 2)?,
        })
    }
}

/// The flow of the frame that starts with `head`; `None` if it is not sound IPv4 or IPv6.
pub fn parse(head: &[u8]) -> Option<Flow> {
    let mut at = 12;
    loop {
        let packet = || head.get(at + 2..);
        match be16(head, at)? {
            ETHERTYPE_IPV4 => return parse_v4(packet()?).map(Flow::V4),
            ETHERTYPE_IPV6 => return parse_v6(packet()?).map(Flow::V6),
            ETHERTYPE_VLAN | ETHERTYPE_QINQ | ETHERTYPE_QINQ_OLD => at += 4,
            _ => return None,
        }
    }
}

fn parse_v4(packet: &[u8]) -> Option<FlowV4> {
    let version_and_length = *packet.first()?;
    let header_bytes = usize::from(version_and_length & 0xf) * 4;
    if version_and_length >> 4 != 4 || header_bytes < 20 || packet.len() < header_bytes {
        return None;
    }
    // A zero length is that of a segmentation-offload packet beyond 64 KiB.
    let packet = match usize::from(be16(packet, 2)?) {
        0 => packet,
        total if total < header_bytes => return None,
        total => packet.get(..total).unwrap_or(packet),
    };
    // More-fragments and the offset; the reserved and don't-fragment bits do not matter.
    let fragment = be16(packet, 6)? & 0x3fff != 0;
    let transport = if fragment {
        None
    } else {
        Transport::parse(*packet.get(9)?, packet.get(header_bytes..)?)
    };
    Some(FlowV4 {
        source: Ipv4Addr::from(array::<4>(packet, 12)?),
        destination: Ipv4Addr::from(array::<4>(packet, 16)?),
        transport,
    })
}

fn parse_v6(packet: &[u8]) -> Option<FlowV6> {
    if *packet.first()? >> 4 != 6 {
        return None;
    }
    let source = Ipv6Addr::from(array::<16>(packet, 8)?);
    let destination = Ipv6Addr::from(array::<16>(packet, 24)?);
    let payload = packet.get(40..)?;
    // A zero length is that of a jumbogram or a segmentation-offload packet beyond 64 KiB.
    let payload = match usize::from(be16(packet, 4)?) {
        0 => payload,
        length => payload.get(..length).unwrap_or(payload),
    };
    let chain = Chain::walk(*packet.get(6)?, payload)?;
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
    /// Walks the chain whose first header is of kind `next`; each step shortens `rest`.
    fn walk(mut next: u8, mut rest: &[u8]) -> Option<Self> {
        let mut chain = Self::default();
        loop {
            let header_bytes = match next {
                PROTO_HOP_BY_HOP | PROTO_ROUTING | PROTO_DESTINATION | PROTO_HIP | PROTO_SHIM6 => {
                    (usize::from(*rest.get(1)?) + 1) * 8
                }
                PROTO_AUTHENTICATION => (usize::from(*rest.get(1)?) + 2) * 4,
                PROTO_FRAGMENT => {
                    rest.get(..8)?;
                    chain.present = true;
                    return Some(chain);
                }
                _ => {
                    chain.transport = Transport::parse(next, rest);
                    return Some(chain);
                }
            };
            let (header, behind) = rest.split_at_checked(header_bytes)?;
            chain.present = true;
            chain.note(next, header)?;
            next = *header.first()?;
            rest = behind;
        }
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

fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    array(bytes, at).map(u16::from_be_bytes)
}

#[cfg(test)]
mod tests;
