//! Packets of IPv4 and IPv6, right or deliberately not.

use crate::kinds::ESP;
use crate::{Addresses, Flow, Random, Transport};

/// What a frame carries.
pub(crate) struct Body {
    pub(crate) ether_type: u16,
    pub(crate) bytes: Vec<u8>,
    pub(crate) flow: Option<Flow>,
}

impl Body {
    /// Without the bytes from `length` on.
    pub(crate) fn cut(mut self, length: usize) -> Self {
        self.bytes.truncate(length);
        self
    }

    /// Without a flow: it is broken.
    pub(crate) fn broken(mut self) -> Self {
        self.flow = None;
        self
    }
}

fn low16(number: usize) -> u16 {
    u16::try_from(number & 0xffff).unwrap_or(0)
}

/// An IPv4 packet.
pub(crate) struct V4 {
    source: [u8; 4],
    destination: [u8; 4],
    identification: [u8; 2],
    pub(crate) options: Vec<u8>,
    /// Flags and offset.
    pub(crate) fragment: u16,
    pub(crate) protocol: u8,
    pub(crate) payload: Vec<u8>,
    /// Total length, if it is not what it should be.
    pub(crate) total: Option<u16>,
}

impl V4 {
    pub(crate) fn new(random: &mut Random, protocol: u8, payload: Vec<u8>) -> Self {
        Self {
            source: unicast_v4(random),
            destination: unicast_v4(random),
            identification: random.bytes(),
            options: Vec::new(),
            // Often "do not fragment", and sometimes the reserved bit: no fragment.
            fragment: *random.pick(&[0, 0x4000, 0x4000, 0x8000]),
            protocol,
            payload,
            total: None,
        }
    }

    fn header(&self) -> Vec<u8> {
        let length = 20 + self.options.len();
        let total = self.total.unwrap_or(low16(length + self.payload.len()));
        let mut header = vec![0x40 | u8::try_from(length / 4).unwrap_or(15), 0];
        header.extend(total.to_be_bytes());
        header.extend(self.identification);
        header.extend(self.fragment.to_be_bytes());
        header.extend([64, self.protocol, 0, 0]);
        header.extend(self.source);
        header.extend(self.destination);
        header.extend(&self.options);
        let sum = checksum(&header);
        header[10..12].copy_from_slice(&sum.to_be_bytes());
        header
    }

    /// The packet; its first ports are hashed if it has some of `transport`.
    pub(crate) fn body(self, transport: Option<Transport>) -> Body {
        let mut addresses = [0; 8];
        addresses[..4].copy_from_slice(&self.source);
        addresses[4..].copy_from_slice(&self.destination);
        Body {
            ether_type: 0x0800,
            bytes: [self.header(), self.payload.clone()].concat(),
            flow: Some(Flow {
                addresses: Addresses::V4(addresses),
                extended: None,
                ports: ports(transport, &self.payload),
            }),
        }
    }
}

/// An IPv6 packet.
pub(crate) struct V6 {
    source: [u8; 16],
    destination: [u8; 16],
    label: [u8; 3],
    /// Extension headers: their kinds, and what follows the byte that says what comes next.
    pub(crate) chain: Vec<(u8, Vec<u8>)>,
    /// What a home address option says.
    pub(crate) home: Option<[u8; 16]>,
    /// What a routing header of type 2 says.
    pub(crate) routed: Option<[u8; 16]>,
    pub(crate) protocol: u8,
    pub(crate) payload: Vec<u8>,
    /// Payload length, if it is not what it should be.
    pub(crate) length: Option<u16>,
}

impl V6 {
    pub(crate) fn new(random: &mut Random, protocol: u8, payload: Vec<u8>) -> Self {
        Self {
            source: unicast_v6(random),
            destination: unicast_v6(random),
            label: random.bytes(),
            chain: Vec::new(),
            home: None,
            routed: None,
            protocol,
            payload,
            length: None,
        }
    }

    /// The extension headers, each naming what follows it.
    fn headers(&self) -> Vec<u8> {
        let next = self
            .chain
            .iter()
            .skip(1)
            .map(|(kind, _)| *kind)
            .chain([self.protocol]);
        let with_next = self.chain.iter().zip(next);
        with_next
            .flat_map(|((_, rest), next)| [vec![next], rest.clone()].concat())
            .collect()
    }

    /// The packet; its first ports are hashed if it has some of `transport`.
    pub(crate) fn body(self, transport: Option<Transport>) -> Body {
        let join = |source: [u8; 16], destination: [u8; 16]| {
            let mut addresses = [0; 32];
            addresses[..16].copy_from_slice(&source);
            addresses[16..].copy_from_slice(&destination);
            addresses
        };
        let payload = [self.headers(), self.payload.clone()].concat();
        let first = self.chain.first().map_or(self.protocol, |(kind, _)| *kind);
        let length = self.length.unwrap_or(low16(payload.len()));
        let mut bytes = vec![
            0x60 | self.label[0] & 0xf,
            self.label[0],
            self.label[1],
            self.label[2],
        ];
        bytes.extend(length.to_be_bytes());
        bytes.extend([first, 64]);
        bytes.extend(self.source);
        bytes.extend(self.destination);
        bytes.extend(payload);
        let (home, routed) = (
            self.home.unwrap_or(self.source),
            self.routed.unwrap_or(self.destination),
        );
        Body {
            ether_type: 0x86dd,
            bytes,
            flow: Some(Flow {
                addresses: Addresses::V6(join(self.source, self.destination)),
                // An encrypted payload is behind an extension header too (RFC 8200 §4).
                extended: (!self.chain.is_empty() || self.protocol == ESP)
                    .then(|| join(home, routed)),
                ports: ports(transport, &self.payload),
            }),
        }
    }
}

fn ports(transport: Option<Transport>, payload: &[u8]) -> Option<(Transport, [u8; 4])> {
    Some((transport?, payload.first_chunk::<4>().copied()?))
}

/// An address that is neither loopback nor multicast: nobody on the way has an opinion about it.
fn unicast_v4(random: &mut Random) -> [u8; 4] {
    let mut address = random.bytes::<4>();
    address[0] = 1 + address[0] % 120;
    address
}

/// See [`unicast_v4`].
pub(crate) fn unicast_v6(random: &mut Random) -> [u8; 16] {
    let mut address = random.bytes::<16>();
    address[0] = 0x20 | address[0] & 0x1f;
    address
}

/// The Internet checksum (RFC 1071), over an even number of bytes.
fn checksum(header: &[u8]) -> u16 {
    let words = header
        .chunks_exact(2)
        .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap_or(0)
}
