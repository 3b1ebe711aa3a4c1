//! Just enough of Ethernet, ARP, IP and UDP to answer and to check hashes.

/// Bytes of an Ethernet header.
pub const ETHERNET_BYTES: usize = 14;

const ETHERTYPE_IPV4: [u8; 2] = [0x08, 0x00];
const ETHERTYPE_ARP: [u8; 2] = [0x08, 0x06];
const ETHERTYPE_IPV6: [u8; 2] = [0x86, 0xdd];

/// Bytes of an ARP frame for IPv4 over Ethernet.
pub const ARP_BYTES: usize = 42;
/// Hardware Ethernet, protocol IPv4, their address lengths, operation request.
const ARP_REQUEST: [u8; 8] = [0, 1, 8, 0, 6, 4, 0, 1];

/// TCP's protocol number.
pub const TCP: u8 = 6;
/// UDP's protocol number.
pub const UDP: u8 = 17;
const UDP_BYTES: usize = 8;

/// IP version and where its addresses lie: source, then destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Network {
    /// 4-byte addresses.
    V4,
    /// 16-byte addresses.
    V6,
}

/// What an IP frame's headers say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Headers {
    /// IP version.
    pub network: Network,
    /// Protocol after the fixed IP header (IPv6: it may be an extension's).
    pub protocol: u8,
    /// Offset of what follows the IP header.
    pub transport: usize,
    /// One past the IP packet's last byte: frames may be padded.
    pub end: usize,
    /// IPv4: part of a fragmented packet.
    pub fragment: bool,
}

/// Reads an IP frame's headers; `None` when it is no IP frame or its lengths
/// do not fit.
#[must_use]
pub fn headers(frame: &[u8]) -> Option<Headers> {
    let packet = frame.get(ETHERNET_BYTES..)?;
    let be16 = |at: usize| Some(u16::from_be_bytes([*packet.get(at)?, *packet.get(at + 1)?]));
    let found = if frame[12..14] == ETHERTYPE_IPV4 {
        let header = usize::from(packet.first()? & 15) * 4;
        Headers {
            network: Network::V4,
            protocol: *packet.get(9)?,
            transport: ETHERNET_BYTES + header.max(20),
            end: ETHERNET_BYTES + usize::from(be16(2)?),
            fragment: be16(6)? & 0x3fff != 0,
        }
    } else if frame[12..14] == ETHERTYPE_IPV6 {
        Headers {
            network: Network::V6,
            protocol: *packet.get(6)?,
            transport: ETHERNET_BYTES + 40,
            end: ETHERNET_BYTES + 40 + usize::from(be16(4)?),
            fragment: false,
        }
    } else {
        return None;
    };
    (found.transport <= found.end && found.end <= frame.len()).then_some(found)
}

impl Headers {
    /// The addresses' bytes, source then destination.
    #[must_use]
    pub fn addresses<'a>(&self, frame: &'a [u8]) -> &'a [u8] {
        match self.network {
            Network::V4 => &frame[ETHERNET_BYTES + 12..ETHERNET_BYTES + 20],
            Network::V6 => &frame[ETHERNET_BYTES + 8..ETHERNET_BYTES + 40],
        }
    }

    /// The ports' bytes when TCP or UDP follows at once and whole.
    #[must_use]
    pub fn ports<'a>(&self, frame: &'a [u8]) -> Option<&'a [u8]> {
        let has_ports = !self.fragment && matches!(self.protocol, TCP | UDP);
        has_ports
            .then(|| frame[..self.end].get(self.transport..self.transport + 4))
            .flatten()
    }

    /// A UDP packet's payload.
    #[must_use]
    pub fn udp_payload<'a>(&self, frame: &'a [u8]) -> Option<&'a [u8]> {
        let is_udp = !self.fragment && self.protocol == UDP;
        is_udp
            .then(|| frame[..self.end].get(self.transport + UDP_BYTES..))
            .flatten()
    }

    /// Turns a UDP frame back to its sender: addresses and ports change
    /// places, which keeps all checksums right.
    pub fn turn_back(&self, frame: &mut [u8], own_mac: [u8; 6]) {
        frame.copy_within(6..12, 0);
        frame[6..12].copy_from_slice(&own_mac);
        let (at, len) = match self.network {
            Network::V4 => (ETHERNET_BYTES + 12, 4),
            Network::V6 => (ETHERNET_BYTES + 8, 16),
        };
        swap(frame, at, len);
        swap(frame, self.transport, 2);
    }
}

/// Exchanges `len` bytes at `at` with the `len` after them.
fn swap(frame: &mut [u8], at: usize, len: usize) {
    if let Some(both) = frame.get_mut(at..at + 2 * len) {
        both.rotate_left(len);
    }
}

/// The answer to an ARP request for `own_ip`; `None` to anything else.
#[must_use]
pub fn arp_reply(frame: &[u8], own_mac: [u8; 6], own_ip: [u8; 4]) -> Option<[u8; ARP_BYTES]> {
    let request = frame.get(..ARP_BYTES)?;
    if request[12..14] != ETHERTYPE_ARP
        || request[14..22] != ARP_REQUEST
        || request[38..42] != own_ip
    {
        return None;
    }
    let mut reply = [0; ARP_BYTES];
    reply[0..6].copy_from_slice(&request[6..12]);
    reply[6..12].copy_from_slice(&own_mac);
    reply[12..21].copy_from_slice(&request[12..21]);
    reply[21] = 2;
    reply[22..28].copy_from_slice(&own_mac);
    reply[28..32].copy_from_slice(&own_ip);
    reply[32..42].copy_from_slice(&request[22..32]);
    Some(reply)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A UDP frame over IPv4 without checksums; 4 bytes of payload, padded.
    pub(crate) fn udp4(source: [u8; 4], destination: [u8; 4], ports: [u8; 4]) -> [u8; 60] {
        let mut frame = [0; 60];
        frame[0..12].copy_from_slice(&[1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2]);
        frame[12..14].copy_from_slice(&ETHERTYPE_IPV4);
        frame[14] = 0x45;
        frame[17] = 32;
        frame[23] = UDP;
        frame[26..30].copy_from_slice(&source);
        frame[30..34].copy_from_slice(&destination);
        frame[34..38].copy_from_slice(&ports);
        frame[42..46].copy_from_slice(b"data");
        frame
    }

    /// A frame over IPv6 with 12 bytes after its header.
    pub(crate) fn ip6(protocol: u8, addresses: &[u8; 32], ports: [u8; 4]) -> [u8; 66] {
        let mut frame = [0; 66];
        frame[12..14].copy_from_slice(&ETHERTYPE_IPV6);
        frame[14] = 0x60;
        frame[19] = 12;
        frame[20] = protocol;
        frame[22..54].copy_from_slice(addresses);
        frame[54..58].copy_from_slice(&ports);
        frame
    }

    #[test]
    fn udp_payload_ends_before_the_padding() {
        let frame = udp4([10, 0, 0, 1], [10, 0, 0, 2], [0, 9, 1, 0]);
        let headers = headers(&frame).unwrap();
        assert_eq!(headers.udp_payload(&frame), Some(&b"data"[..]));
        assert_eq!(headers.ports(&frame), Some(&[0, 9, 1, 0][..]));
        assert_eq!(headers.addresses(&frame), [10, 0, 0, 1, 10, 0, 0, 2]);
    }

    #[test]
    fn turning_back_twice_gives_the_frame_again() {
        let frame = udp4([10, 0, 0, 1], [10, 0, 0, 2], [0, 9, 1, 0]);
        let mut other = frame;
        headers(&other).unwrap().turn_back(&mut other, [1; 6]);
        assert_eq!(other, {
            let mut answer = udp4([10, 0, 0, 2], [10, 0, 0, 1], [1, 0, 0, 9]);
            answer[0..12].rotate_left(6);
            answer
        });
        headers(&other).unwrap().turn_back(&mut other, [2; 6]);
        assert_eq!(other, frame);
        let six = ip6(
            UDP,
            &core::array::from_fn(|n| u8::try_from(n).unwrap()),
            [1, 2, 3, 4],
        );
        let mut turned = six;
        headers(&six).unwrap().turn_back(&mut turned, [0; 6]);
        assert_eq!((turned[22], turned[38], turned[54]), (16, 0, 3));
    }

    #[test]
    fn truncated_frames_are_refused() {
        let frame = udp4([1; 4], [2; 4], [3; 4]);
        for len in 0..46 {
            assert_eq!(headers(&frame[..len]), None, "{len}");
        }
        let mut fragment = frame;
        fragment[20] = 0x20;
        let found = headers(&fragment).unwrap();
        assert!(found.fragment && found.ports(&fragment).is_none());
        assert!(found.udp_payload(&fragment).is_none());
    }

    #[test]
    fn answers_arp_for_its_own_address_only() {
        let mut request = [0; 60];
        request[0..6].fill(0xff);
        request[6..12].fill(5);
        request[12..14].copy_from_slice(&ETHERTYPE_ARP);
        request[14..22].copy_from_slice(&ARP_REQUEST);
        request[22..28].fill(5);
        request[28..32].copy_from_slice(&[10, 0, 0, 1]);
        request[38..42].copy_from_slice(&[10, 0, 0, 2]);
        assert_eq!(arp_reply(&request, [7; 6], [10, 0, 0, 3]), None);
        let reply = arp_reply(&request, [7; 6], [10, 0, 0, 2]).unwrap();
        assert_eq!(reply[0..12], [5, 5, 5, 5, 5, 5, 7, 7, 7, 7, 7, 7]);
        assert_eq!(reply[20..32], [0, 2, 7, 7, 7, 7, 7, 7, 10, 0, 0, 2]);
        assert_eq!(reply[32..42], [5, 5, 5, 5, 5, 5, 10, 0, 0, 1]);
        assert_eq!(
            arp_reply(&reply, [7; 6], [10, 0, 0, 1]),
            None,
            "a reply is no request"
        );
    }
}
