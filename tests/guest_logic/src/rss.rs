//! An independent judge of the hash a device reports for a packet.
//!
//! The Toeplitz hash is written here bit by bit, straight from its definition,
//! and shares nothing with the VMM's: it exists to disagree with it.

use crate::frame::{Headers, Network, TCP, UDP, headers};

/// The key of Microsoft's RSS verification suite.
pub const KEY: [u8; 40] = [
    0x6d, 0x5a, 0x56, 0xda, 0x25, 0x5b, 0x0e, 0xc2, 0x41, 0x67, 0x25, 0x3d, 0x43, 0xa3, 0x8f, 0xb0,
    0xd0, 0xca, 0x2b, 0xcb, 0xae, 0x7b, 0x30, 0xb4, 0x77, 0xcb, 0x2d, 0xa3, 0x80, 0x30, 0xf2, 0x0c,
    0x6a, 0x42, 0xb7, 0x3b, 0xbe, 0xac, 0x01, 0xfa,
];

// VIRTIO_NET_HASH_TYPE_* (virtio 1.2, 5.1.6.4.3.1). A report names a type by
// its bit's number plus one (VIRTIO_NET_HASH_REPORT_*, 5.1.6.4.4).
const TYPE_IPV4: u32 = 1 << 0;
const TYPE_TCPV4: u32 = 1 << 1;
const TYPE_UDPV4: u32 = 1 << 2;
const TYPE_IPV6: u32 = 1 << 3;
const TYPE_TCPV6: u32 = 1 << 4;
const TYPE_UDPV6: u32 = 1 << 5;
const TYPE_IP_EX: u32 = 1 << 6;
const TYPE_TCP_EX: u32 = 1 << 7;
const TYPE_UDP_EX: u32 = 1 << 8;
const REPORT_NONE: u16 = 0;

/// IPv6 extension headers a packet may start with: hop-by-hop, routing,
/// fragment, authentication, destination options, mobility, HIP, Shim6.
const EXTENSIONS: [u8; 8] = [0, 43, 44, 51, 60, 135, 139, 140];

/// The hash of `input` under `key`: for each bit set in the input, the 32 key
/// bits from that position on.
#[must_use]
pub fn toeplitz(key: &[u8], input: &[u8]) -> u32 {
    let key_bit = |at: usize| {
        key.get(at / 8)
            .map_or(0, |byte| u32::from(byte >> (7 - at % 8) & 1))
    };
    let mut hash = 0;
    for (byte, first) in input.iter().zip((0..).step_by(8)) {
        for bit in (0..8).filter(|bit| byte >> (7 - bit) & 1 != 0) {
            hash ^= (0..32).fold(0, |window, at| window << 1 | key_bit(first + bit + at));
        }
    }
    hash
}

/// What a device's report about a packet is worth.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Kind and value are right.
    Matched,
    /// Kind or value is wrong, or a report is missing or should be.
    Mismatched,
    /// Rightly none: nothing in the packet is hashed under these types.
    None,
    /// Not judged: IPv6 extension headers.
    Unjudged,
}

/// Judges a report for a frame, under the hash types the device was told.
#[must_use]
pub fn judge(frame: &[u8], types: u32, kind: u16, value: u32) -> Verdict {
    let Some(headers) = headers(frame) else {
        return if kind == REPORT_NONE {
            Verdict::None
        } else {
            Verdict::Mismatched
        };
    };
    if headers.network == Network::V6 && EXTENSIONS.contains(&headers.protocol) {
        return Verdict::Unjudged;
    }
    let with_ports = headers
        .ports(frame)
        .map(|ports| (layer4_types(&headers), ports));
    let (allowed, ports) = match with_ports {
        Some((wanted, ports)) if wanted & types != 0 => (wanted & types, ports),
        _ => (layer3_types(&headers) & types, &[][..]),
    };
    if allowed == 0 {
        return if kind == REPORT_NONE {
            Verdict::None
        } else {
            Verdict::Mismatched
        };
    }
    let addresses = headers.addresses(frame);
    let mut input = [0; 36];
    input[..addresses.len()].copy_from_slice(addresses);
    input[addresses.len()..addresses.len() + ports.len()].copy_from_slice(ports);
    let hash = toeplitz(&KEY, &input[..addresses.len() + ports.len()]);
    // A packet without extension headers hashes alike under the plain and the
    // extended type; devices differ in which they name.
    let named = kind != REPORT_NONE && kind <= 9 && allowed >> (kind - 1) & 1 != 0;
    if named && hash == value {
        Verdict::Matched
    } else {
        Verdict::Mismatched
    }
}

fn layer4_types(headers: &Headers) -> u32 {
    match (headers.network, headers.protocol) {
        (Network::V4, TCP) => TYPE_TCPV4,
        (Network::V4, UDP) => TYPE_UDPV4,
        (Network::V6, TCP) => TYPE_TCPV6 | TYPE_TCP_EX,
        (Network::V6, UDP) => TYPE_UDPV6 | TYPE_UDP_EX,
        _ => 0,
    }
}

fn layer3_types(headers: &Headers) -> u32 {
    match headers.network {
        Network::V4 => TYPE_IPV4,
        Network::V6 => TYPE_IPV6 | TYPE_IP_EX,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::tests::{ip6, udp4};

    /// Microsoft's verification suite: 161.142.100.80:1766 from
    /// 66.9.149.187:2794, hash over addresses 0x323e8fc2, with ports 0x51ccc178.
    #[test]
    fn microsofts_vectors() {
        let input = [66, 9, 149, 187, 161, 142, 100, 80, 0x0a, 0xea, 0x06, 0xe6];
        assert_eq!(toeplitz(&KEY, &input), 0x51cc_c178);
        assert_eq!(toeplitz(&KEY, &input[..8]), 0x323e_8fc2);
        // 3ffe:2501:200:3::1 port 1766, from 3ffe:2501:200:1fff::7 port 2794.
        let mut six = [0; 36];
        six[..8].copy_from_slice(&[0x3f, 0xfe, 0x25, 0x01, 0x02, 0x00, 0x1f, 0xff]);
        six[15] = 7;
        six[16..24].copy_from_slice(&[0x3f, 0xfe, 0x25, 0x01, 0x02, 0x00, 0x00, 0x03]);
        six[31] = 1;
        six[32..36].copy_from_slice(&[0x0a, 0xea, 0x06, 0xe6]);
        assert_eq!(toeplitz(&KEY, &six), 0x4020_7d3d);
        assert_eq!(toeplitz(&KEY, &six[..32]), 0x2cc1_8cd5);
    }

    #[test]
    fn value_and_kind_must_both_be_right() {
        let frame = udp4(
            [66, 9, 149, 187],
            [161, 142, 100, 80],
            [0x0a, 0xea, 0x06, 0xe6],
        );
        assert_eq!(judge(&frame, 0x1ff, 3, 0x51cc_c178), Verdict::Matched);
        assert_eq!(judge(&frame, 0x1ff, 2, 0x51cc_c178), Verdict::Mismatched);
        assert_eq!(judge(&frame, 0x1ff, 3, 0x51cc_c179), Verdict::Mismatched);
        assert_eq!(judge(&frame, 0x1ff, 0, 0), Verdict::Mismatched);
        assert_eq!(judge(&frame, TYPE_IPV4, 1, 0x323e_8fc2), Verdict::Matched);
        assert_eq!(judge(&frame, TYPE_TCPV4, 0, 0), Verdict::None);
        assert_eq!(
            judge(&frame, TYPE_TCPV4, 1, 0x323e_8fc2),
            Verdict::Mismatched
        );
    }

    #[test]
    fn fragments_hash_over_addresses() {
        let mut frame = udp4(
            [66, 9, 149, 187],
            [161, 142, 100, 80],
            [0x0a, 0xea, 0x06, 0xe6],
        );
        frame[20] = 0x20;
        assert_eq!(judge(&frame, 0x1ff, 1, 0x323e_8fc2), Verdict::Matched);
    }

    #[test]
    fn six_may_be_named_plain_or_extended_as_configured() {
        let frame = ip6(UDP, &[3; 32], [1, 2, 3, 4]);
        let mut input = [3; 36];
        input[32..].copy_from_slice(&[1, 2, 3, 4]);
        let hash = toeplitz(&KEY, &input);
        assert_eq!(judge(&frame, 0x1ff, 6, hash), Verdict::Matched);
        assert_eq!(judge(&frame, 0x1ff, 9, hash), Verdict::Matched);
        assert_eq!(judge(&frame, 0x3f, 9, hash), Verdict::Mismatched);
        assert_eq!(
            judge(&ip6(60, &[3; 32], [0; 4]), 0x1ff, 4, 0),
            Verdict::Unjudged
        );
        assert_eq!(judge(&[0xff; 64], 0x1ff, 0, 0), Verdict::None);
    }
}
