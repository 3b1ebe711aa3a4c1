//! All kinds of frames.

use crate::Transport::{Tcp, Udp};
use crate::ip::{Body, V4, V6, unicast_v6};
use crate::{Random, Transport};

/// Makes a frame of a kind.
pub(crate) type Make = fn(&mut Random) -> Body;

// Protocols: IANA "Assigned Internet Protocol Numbers".
const HOP_BY_HOP: u8 = 0;
const ICMP: u8 = 1;
const IPV4: u8 = 4;
const IPV6: u8 = 41;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const GRE: u8 = 47;
pub(crate) const ESP: u8 = 50;
const AUTHENTICATION: u8 = 51;
const ICMPV6: u8 = 58;
const NOTHING: u8 = 59;
const DESTINATION: u8 = 60;
const SCTP: u8 = 132;
const MOBILITY: u8 = 135;
const HIP: u8 = 139;
const SHIM6: u8 = 140;

/// Name, how often, and how.
pub(crate) const KINDS: &[(&str, u16, Make)] = &[
    ("tcp4", 10, |r| v4(r, Tcp).body(Some(Tcp))),
    ("udp4", 10, |r| v4(r, Udp).body(Some(Udp))),
    ("other4", 6, other_v4),
    ("tcp4 options", 4, |r| with_options(r, Tcp)),
    ("udp4 options", 4, |r| with_options(r, Udp)),
    ("tcp4 fragment", 3, |r| fragment_v4(r, Tcp)),
    ("udp4 fragment", 3, |r| fragment_v4(r, Udp)),
    ("tcp6", 10, |r| v6(r, Tcp).body(Some(Tcp))),
    ("udp6", 10, |r| v6(r, Udp).body(Some(Udp))),
    ("other6", 6, other_v6),
    ("tcp6 extended", 6, |r| extended(r, Tcp)),
    ("udp6 extended", 6, |r| extended(r, Udp)),
    ("other6 extended", 4, other_extended),
    ("tcp6 home address", 4, |r| home_address(r, Tcp)),
    ("udp6 home address", 4, |r| home_address(r, Udp)),
    ("tcp6 routing type 2", 4, |r| routing_2(r, Tcp)),
    ("udp6 routing type 2", 4, |r| routing_2(r, Udp)),
    ("tcp6 mobile", 3, |r| mobile(r, Tcp)),
    ("udp6 mobile", 3, |r| mobile(r, Udp)),
    ("tcp6 fragment", 3, |r| fragment_v6(r, Tcp)),
    ("udp6 fragment", 3, |r| fragment_v6(r, Udp)),
    ("tunnel4", 4, tunnel_v4),
    ("tunnel6", 4, tunnel_v6),
    ("padded", 3, padded),
    ("ports cut off", 3, ports_cut_off),
    ("header just there", 2, header_just_there),
    ("broken ipv4", 5, broken_v4),
    ("broken ipv6", 5, broken_v6),
    ("broken chain", 5, broken_chain),
    ("not ip", 5, not_ip),
    ("nothing", 1, |_| Body {
        ether_type: 0x0800,
        bytes: Vec::new(),
        flow: None,
    }),
];

fn either(random: &mut Random) -> Transport {
    *random.pick(&[Tcp, Udp])
}

/// Ports and what follows them; mostly short.
fn segment(random: &mut Random) -> Vec<u8> {
    let longest = if random.one_in(4) { 1300 } else { 64 };
    let length = usize::from(random.below(longest));
    random.vec(20 + length)
}

fn v4(random: &mut Random, transport: Transport) -> V4 {
    let payload = segment(random);
    V4::new(random, transport.protocol(), payload)
}

fn v6(random: &mut Random, transport: Transport) -> V6 {
    let payload = segment(random);
    V6::new(random, transport.protocol(), payload)
}

/// Protocols without ports, or with such that are not hashed.
fn other_v4(random: &mut Random) -> Body {
    let protocol = *random.pick(&[ICMP, ESP, AUTHENTICATION, SCTP, NOTHING, 255]);
    let payload = segment(random);
    V4::new(random, protocol, payload).body(None)
}

fn other_v6(random: &mut Random) -> Body {
    let protocol = *random.pick(&[ICMPV6, ESP, SCTP, NOTHING, 255]);
    let payload = segment(random);
    V6::new(random, protocol, payload).body(None)
}

fn with_options(random: &mut Random, transport: Transport) -> Body {
    let mut packet = v4(random, transport);
    let words = usize::from(1 + random.below(10));
    packet.options = random.vec(4 * words);
    packet.body(Some(transport))
}

/// The first one, which has ports, a middle one or the last one.
fn fragment_v4(random: &mut Random, transport: Transport) -> Body {
    let mut packet = v4(random, transport);
    let offset = 1 + random.below(0x1fff);
    packet.fragment = *random.pick(&[0x2000, 0x2000 | offset, offset, 0x4000 | offset]);
    packet.body(None)
}

/// An extension header of `units` times 8 bytes behind the first 8, with this at its start.
fn header(start: &[u8], units: u8) -> Vec<u8> {
    let mut header = [&[units], start].concat();
    header.resize(8 * (usize::from(units) + 1) - 1, 0);
    header
}

/// Options that fill a header but for its first two bytes: padding and one that is unknown.
fn options(random: &mut Random, units: u8) -> Vec<u8> {
    let room = 8 * (units + 1) - 2;
    let length = u8::try_from(random.below(u16::from(room) - 1))
        .unwrap_or(0)
        .min(room - 2);
    let mut options = vec![0x1e, length];
    options.extend(random.vec(usize::from(length)));
    // Pad1 to the end.
    options.resize(usize::from(room), 0);
    options
}

fn option_header(random: &mut Random) -> Vec<u8> {
    let units = u8::try_from(random.below(4)).unwrap_or(0);
    header(&options(random, units), units)
}

/// A header that holds no address that matters.
fn plain_header(random: &mut Random) -> (u8, Vec<u8>) {
    let kind = *random.pick(&[DESTINATION, ROUTING, AUTHENTICATION, MOBILITY, HIP, SHIM6]);
    let rest = match kind {
        DESTINATION => option_header(random),
        // Types 0 (obsolete) and 3 and 4 (none of whose addresses is a home address), none left.
        ROUTING => {
            let kind = *random.pick(&[0, 3, 4]);
            header(&[[kind, 0].as_slice(), &random.vec(20)].concat(), 2)
        }
        // Its length counts units of 4 bytes, less 2.
        AUTHENTICATION => {
            let units = u8::try_from(1 + random.below(6)).unwrap_or(1);
            [vec![units], random.vec(4 * (usize::from(units) + 2) - 2)].concat()
        }
        _ => {
            let units = u8::try_from(random.below(4)).unwrap_or(0);
            [vec![units], random.vec(8 * (usize::from(units) + 1) - 2)].concat()
        }
    };
    (kind, rest)
}

/// Up to four headers, the first of which may be of hop-by-hop options.
fn plain_chain(random: &mut Random) -> Vec<(u8, Vec<u8>)> {
    let mut chain = Vec::new();
    if random.one_in(2) {
        // Router alert (RFC 2711), or some others.
        let alert = header(&[5, 2, 0, 0, 1, 0], 0);
        chain.push((
            HOP_BY_HOP,
            if random.one_in(2) {
                alert
            } else {
                option_header(random)
            },
        ));
    }
    for _ in chain.len()..usize::from(1 + random.below(3)) {
        chain.push(plain_header(random));
    }
    chain
}

fn extended(random: &mut Random, transport: Transport) -> Body {
    let mut packet = v6(random, transport);
    packet.chain = plain_chain(random);
    packet.body(Some(transport))
}

fn other_extended(random: &mut Random) -> Body {
    let protocol = *random.pick(&[ICMPV6, ESP, NOTHING, SCTP]);
    let payload = segment(random);
    let mut packet = V6::new(random, protocol, payload);
    packet.chain = plain_chain(random);
    let which = random.below(3);
    if which != 0 {
        add_home_address(random, &mut packet);
    }
    if which == 2 {
        add_routing_2(random, &mut packet);
    }
    packet.body(None)
}

/// The option behind its padding, so that the address is aligned as RFC 6275 §6.3 has it.
fn add_home_address(random: &mut Random, packet: &mut V6) {
    let home = unicast_v6(random);
    let padding: &[u8] = if random.one_in(2) {
        &[1, 2, 0, 0]
    } else {
        &[0, 0, 0, 0]
    };
    let rest = header(&[padding, &[0xc9, 16], &home].concat(), 2);
    packet.chain.push((DESTINATION, rest));
    packet.home = Some(home);
}

fn add_routing_2(random: &mut Random, packet: &mut V6) {
    let routed = unicast_v6(random);
    packet.chain.push((
        ROUTING,
        header(&[&[2, 1, 0, 0, 0, 0], &routed[..]].concat(), 2),
    ));
    packet.routed = Some(routed);
}

fn home_address(random: &mut Random, transport: Transport) -> Body {
    let mut packet = v6(random, transport);
    add_home_address(random, &mut packet);
    packet.body(Some(transport))
}

fn routing_2(random: &mut Random, transport: Transport) -> Body {
    let mut packet = v6(random, transport);
    add_routing_2(random, &mut packet);
    packet.body(Some(transport))
}

/// Both, among other headers.
fn mobile(random: &mut Random, transport: Transport) -> Body {
    let mut packet = v6(random, transport);
    packet.chain = plain_chain(random);
    add_routing_2(random, &mut packet);
    add_home_address(random, &mut packet);
    packet.body(Some(transport))
}

/// A fragment header: offset and flag, behind a reserved byte.
fn fragment_header(random: &mut Random) -> (u8, Vec<u8>) {
    let offset = random.below(0x1fff) << 3;
    // Of the whole datagram at once (RFC 6946), the first, or any.
    let field = *random.pick(&[0, 1, offset | 1, offset]);
    (
        FRAGMENT,
        [&[0][..], &field.to_be_bytes(), &random.bytes::<4>()].concat(),
    )
}

fn fragment_v6(random: &mut Random, transport: Transport) -> Body {
    let mut packet = v6(random, transport);
    if random.one_in(2) {
        packet.chain = plain_chain(random);
    }
    if random.one_in(3) {
        add_routing_2(random, &mut packet);
    }
    packet.chain.push(fragment_header(random));
    packet.body(None)
}

/// A packet in another one: only the outer one's addresses are hashed.
fn inner(random: &mut Random) -> (u8, Vec<u8>) {
    let transport = either(random);
    if random.one_in(2) {
        (IPV4, v4(random, transport).body(None).bytes)
    } else {
        (IPV6, v6(random, transport).body(None).bytes)
    }
}

/// In IP as such, or behind a GRE header.
fn tunnelled(random: &mut Random) -> (u8, Vec<u8>) {
    let (protocol, packet) = inner(random);
    if random.one_in(2) {
        return (protocol, packet);
    }
    let kind = if protocol == IPV4 {
        [0x08, 0x00]
    } else {
        [0x86, 0xdd]
    };
    (GRE, [&[0, 0][..], &kind, &packet].concat())
}

fn tunnel_v4(random: &mut Random) -> Body {
    let (protocol, packet) = tunnelled(random);
    V4::new(random, protocol, packet).body(None)
}

fn tunnel_v6(random: &mut Random) -> Body {
    let (protocol, packet) = tunnelled(random);
    V6::new(random, protocol, packet).body(None)
}

/// Bytes behind the packet's end, as a short frame has: no ports, though they would fit.
fn padded(random: &mut Random) -> Body {
    let transport = either(random);
    let payload = random.vec(26);
    let there = random.below(8);
    let with_ports = (there >= 4).then_some(transport);
    if random.one_in(2) {
        let mut packet = V4::new(random, transport.protocol(), payload);
        packet.total = Some(20 + there);
        packet.body(with_ports)
    } else {
        let mut packet = V6::new(random, transport.protocol(), payload);
        // A length of 0 has another meaning.
        packet.length = Some(there.max(1));
        packet.body(with_ports)
    }
}

/// The frame ends within the ports, which by the packet's length should be there.
fn ports_cut_off(random: &mut Random) -> Body {
    let transport = either(random);
    let there = usize::from(random.below(4));
    if random.one_in(2) {
        v4(random, transport).body(None).broken().cut(20 + there)
    } else {
        v6(random, transport).body(None).broken().cut(40 + there)
    }
}

/// The ports are there and nothing else.
fn header_just_there(random: &mut Random) -> Body {
    let transport = either(random);
    let there = usize::from(4 + random.below(4));
    if random.one_in(2) {
        v4(random, transport).body(Some(transport)).cut(20 + there)
    } else {
        v6(random, transport).body(Some(transport)).cut(40 + there)
    }
}

fn broken_v4(random: &mut Random) -> Body {
    let transport = either(random);
    let mut packet = v4(random, transport);
    packet.options = random.vec(8);
    let mut body = packet.body(None).broken();
    match random.below(5) {
        // Another version.
        0 => body.bytes[0] = *random.pick(&[0x07, 0x57, 0x67, 0xf7]),
        // A header shorter than any.
        1 => body.bytes[0] = *random.pick(&[0x40, 0x41, 0x44]),
        // A total length that ends in the header.
        2 => body.bytes[2..4].copy_from_slice(&(1 + random.below(27)).to_be_bytes()),
        // The frame ends in the header, or in its options.
        3 => body = body.cut(usize::from(random.below(20))),
        _ => body = body.cut(20 + usize::from(random.below(8))),
    }
    body
}

fn broken_v6(random: &mut Random) -> Body {
    let transport = either(random);
    let mut body = v6(random, transport).body(None).broken();
    if random.one_in(2) {
        body.bytes[0] = *random.pick(&[0x00, 0x45, 0x50, 0x70]);
    } else {
        body = body.cut(usize::from(random.below(40)));
    }
    body
}

/// An extension header that is not all there, or whose options are not.
fn broken_chain(random: &mut Random) -> Body {
    let transport = either(random);
    let mut packet = v6(random, transport);
    packet.payload.truncate(20);
    if random.one_in(2) {
        packet.chain = plain_chain(random);
    }
    let before = 40
        + packet
            .chain
            .iter()
            .map(|(_, rest)| 1 + rest.len())
            .sum::<usize>();
    match random.below(5) {
        // Longer than the packet.
        0 => packet.chain.push((DESTINATION, vec![30, 1, 4, 0, 0, 0, 0])),
        1 => packet
            .chain
            .push((AUTHENTICATION, [vec![60], random.vec(10)].concat())),
        // An option longer than its header.
        2 => packet
            .chain
            .push((DESTINATION, header(&[0x1e, 5, 0, 0, 0, 0], 0))),
        // The frame ends in a fragment header, or in the first bytes of another.
        3 => {
            packet.chain.push(fragment_header(random));
            return packet
                .body(None)
                .broken()
                .cut(before + usize::from(random.below(8)));
        }
        _ => {
            packet.chain.push((ROUTING, header(&[0, 0], 0)));
            return packet
                .body(None)
                .broken()
                .cut(before + usize::from(random.below(8)));
        }
    }
    packet.body(None).broken()
}

/// ARP, LLDP, PPPoE and MPLS with IP inside, 802.3 with a length, and what nobody knows.
fn not_ip(random: &mut Random) -> Body {
    let (_, packet) = inner(random);
    let length = usize::from(random.below(100));
    let (ether_type, bytes) = match random.below(7) {
        0 => (0x0806, random.vec(28)),
        1 => (0x88cc, random.vec(40)),
        2 => (
            0x8864,
            [&[0x11, 0, 0, 1, 0, 42, 0, 0x21][..], &packet].concat(),
        ),
        3 => (0x8847, [&[0, 0, 0x11, 64][..], &packet].concat()),
        4 => (60, random.vec(60)),
        // A tag from before 802.1ad, which is none any more.
        5 => (0x9100, [&[0, 7, 0x08, 0x00][..], &packet].concat()),
        _ => (0x88b5, random.vec(length)),
    };
    Body {
        ether_type,
        bytes,
        flow: None,
    }
}
