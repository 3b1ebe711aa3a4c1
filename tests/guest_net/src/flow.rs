//! Addresses and ports of a packet, for the eye.
//!
//! Deliberately not Ferry's own parser: what this program prints is compared with what that one
//! found. A test that wants more has the packet's first bytes.

use std::net::IpAddr;

/// The flow of a packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct FiveTuple {
    pub(crate) source: IpAddr,
    pub(crate) destination: IpAddr,
    /// IANA number of what follows the IP header.
    pub(crate) protocol: u8,
    /// Source and destination port, if TCP or UDP follows at once.
    pub(crate) ports: Option<(u16, u16)>,
}

impl FiveTuple {
    /// The flow of an Ethernet frame, if it is IP without a VLAN tag.
    pub(crate) fn parse(frame: &[u8]) -> Option<Self> {
        let kind = frame.get(12..14)?;
        let packet = frame.get(14..)?;
        let (source, destination, protocol, payload) = match kind {
            [0x08, 0x00] => {
                let header = usize::from(packet.first()? & 0xf) * 4;
                let fragment = u16::from_be_bytes([*packet.get(6)?, *packet.get(7)?]) & 0x3fff != 0;
                let payload = packet.get(header..).filter(|_| !fragment);
                let source = <[u8; 4]>::try_from(packet.get(12..16)?).ok()?;
                let destination = <[u8; 4]>::try_from(packet.get(16..20)?).ok()?;
                (source.into(), destination.into(), *packet.get(9)?, payload)
            }
            [0x86, 0xdd] => {
                let source = <[u8; 16]>::try_from(packet.get(8..24)?).ok()?;
                let destination = <[u8; 16]>::try_from(packet.get(24..40)?).ok()?;
                (
                    source.into(),
                    destination.into(),
                    *packet.get(6)?,
                    packet.get(40..),
                )
            }
            _ => return None,
        };
        let ports = match (protocol, payload) {
            (6 | 17, Some([a, b, c, d, ..])) => {
                Some((u16::from_be_bytes([*a, *b]), u16::from_be_bytes([*c, *d])))
            }
            _ => None,
        };
        Some(Self {
            source,
            destination,
            protocol,
            ports,
        })
    }

    /// 4 or 6.
    pub(crate) const fn version(&self) -> u8 {
        if self.source.is_ipv4() { 4 } else { 6 }
    }

    /// Whether one of the ports is `port`.
    pub(crate) fn has_port(&self, port: u16) -> bool {
        self.ports
            .is_some_and(|(source, destination)| source == port || destination == port)
    }
}
