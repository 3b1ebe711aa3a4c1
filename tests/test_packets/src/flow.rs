//! What of a packet can be hashed.

/// Source and destination address, as they follow one another in the packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Addresses {
    /// Of IPv4.
    V4([u8; 8]),
    /// Of IPv6.
    V6([u8; 32]),
}

impl Addresses {
    /// As hash input.
    pub const fn as_bytes(&self) -> &[u8] {
        match self {
            Self::V4(bytes) => bytes,
            Self::V6(bytes) => bytes,
        }
    }
}

/// Whose ports are hashed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Transport {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

impl Transport {
    /// IANA's protocol number.
    pub const fn protocol(self) -> u8 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
        }
    }
}

/// A packet's flow.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Flow {
    /// The addresses in the IP header.
    pub addresses: Addresses,
    /// With IPv6 extension headers: the addresses with those of a home address option and a routing header of
    /// type 2 in the place of the header's.
    pub extended: Option<[u8; 32]>,
    /// Source and destination port, as in the packet.
    pub ports: Option<(Transport, [u8; 4])>,
}
