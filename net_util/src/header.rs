//! The header in front of each packet on a virtio-net queue and on a tap with `IFF_VNET_HDR`.
//!
//! Source: VIRTIO 1.4 §5.1.6 "Device Operation", `struct virtio_net_hdr`; uapi
//! `linux/virtio_net.h`. All fields are little-endian, as the modern (non-transitional)
//! interface wants; a tap gives and takes them so only after
//! [`TapQueue::set_little_endian`](crate::tap::TapQueue::set_little_endian).
//!
//! A device uses one size for both directions: [`HeaderSize::V1Hash`] if
//! `VIRTIO_NET_F_HASH_REPORT` was negotiated, [`HeaderSize::V1`] otherwise.

use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::toeplitz::PacketHash;

/// Bits of [`HeaderV1::flags`].
pub mod flags {
    /// The checksum at `csum_start + csum_offset` is to be completed.
    pub const NEEDS_CSUM: u8 = 1;
    /// The checksums have been verified (towards the guest only).
    pub const DATA_VALID: u8 = 2;
    /// `csum_start` and `csum_offset` count coalesced segments and duplicate ACKs.
    pub const RSC_INFO: u8 = 4;
}

/// Values of [`HeaderV1::gso_type`].
pub mod gso {
    /// Not a large packet.
    pub const NONE: u8 = 0;
    /// TCP over IPv4 to be segmented.
    pub const TCPV4: u8 = 1;
    /// UDP over IPv4 to be fragmented.
    pub const UDP: u8 = 3;
    /// TCP over IPv6 to be segmented.
    pub const TCPV6: u8 = 4;
    /// UDP to be segmented into datagrams.
    pub const UDP_L4: u8 = 5;
    /// Flag: the TCP segments carry explicit congestion notification.
    pub const ECN: u8 = 0x80;
}

/// How many bytes of header precede each packet.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum HeaderSize {
    /// [`HeaderV1`], 12 bytes.
    V1,
    /// [`HeaderV1Hash`], 20 bytes.
    V1Hash,
}

impl HeaderSize {
    /// The largest header of all.
    pub const MAX_BYTES: usize = size_of::<HeaderV1Hash>();

    /// The size in bytes.
    pub const fn bytes(self) -> usize {
        match self {
            Self::V1 => size_of::<HeaderV1>(),
            Self::V1Hash => size_of::<HeaderV1Hash>(),
        }
    }
}

/// The header without a hash: `struct virtio_net_hdr_v1`.
#[derive(
    Clone,
    Copy,
    PartialEq,
    Eq,
    Debug,
    Default,
    FromBytes,
    IntoBytes,
    Immutable,
    KnownLayout,
    Unaligned,
)]
#[repr(C)]
pub struct HeaderV1 {
    /// [`flags`].
    pub flags: u8,
    /// [`gso`].
    pub gso_type: u8,
    /// Length in bytes of the headers that each segment repeats; a hint.
    pub hdr_len: U16,
    /// Payload bytes per segment.
    pub gso_size: U16,
    /// Where checksumming starts, in bytes from the start of the frame.
    pub csum_start: U16,
    /// Where the checksum goes, in bytes from `csum_start`.
    pub csum_offset: U16,
    /// Into how many receive buffers the packet was put; at least 1 towards the guest.
    ///
    /// Kernels before 6.18 leave these bytes of a tap reader's buffer as they were and later
    /// ones zero them, so the device must always write this field itself.
    pub num_buffers: U16,
}

/// The header with a hash report: `struct virtio_net_hdr_v1_hash`.
#[derive(
    Clone,
    Copy,
    PartialEq,
    Eq,
    Debug,
    Default,
    FromBytes,
    IntoBytes,
    Immutable,
    KnownLayout,
    Unaligned,
)]
#[repr(C)]
pub struct HeaderV1Hash {
    /// The part that both headers share.
    pub v1: HeaderV1,
    /// The hash; 0 if none was calculated.
    pub hash_value: U32,
    /// Which hash it is: a [`HashReport`](crate::hash::HashReport).
    pub hash_report: U16,
    /// Zero.
    pub padding: U16,
}

impl HeaderV1Hash {
    /// Where `hash_value` starts, in bytes: from here on the header says only what the device does.
    pub const HASH_OFFSET: usize = 12;

    /// Writes `hash` into the header.
    pub const fn set_hash(&mut self, hash: PacketHash) {
        self.hash_value = U32::new(hash.value);
        self.hash_report = U16::new(hash.report.code());
        self.padding = U16::ZERO;
    }
}

#[cfg(test)]
mod tests {
    use std::mem::offset_of;

    use virtio_bindings::virtio_net as uapi;

    use super::*;
    use crate::hash::HashReport;

    #[test]
    fn layouts_are_those_of_the_uapi() {
        assert_eq!(HeaderSize::V1.bytes(), 12);
        assert_eq!(HeaderSize::V1Hash.bytes(), 20);
        assert_eq!(size_of::<uapi::virtio_net_hdr_v1>(), HeaderSize::V1.bytes());
        assert_eq!(
            size_of::<uapi::virtio_net_hdr_v1_hash>(),
            HeaderSize::V1Hash.bytes()
        );
        assert_eq!(offset_of!(HeaderV1, num_buffers), 10);
        assert_eq!(
            offset_of!(HeaderV1Hash, hash_value),
            HeaderV1Hash::HASH_OFFSET
        );
        assert_eq!(offset_of!(HeaderV1Hash, hash_report), 16);
    }

    #[test]
    fn constants_are_those_of_the_uapi() {
        assert_eq!(
            u32::from(flags::NEEDS_CSUM),
            uapi::VIRTIO_NET_HDR_F_NEEDS_CSUM
        );
        assert_eq!(
            u32::from(flags::DATA_VALID),
            uapi::VIRTIO_NET_HDR_F_DATA_VALID
        );
        assert_eq!(u32::from(flags::RSC_INFO), uapi::VIRTIO_NET_HDR_F_RSC_INFO);
        assert_eq!(u32::from(gso::NONE), uapi::VIRTIO_NET_HDR_GSO_NONE);
        assert_eq!(u32::from(gso::TCPV4), uapi::VIRTIO_NET_HDR_GSO_TCPV4);
        assert_eq!(u32::from(gso::UDP), uapi::VIRTIO_NET_HDR_GSO_UDP);
        assert_eq!(u32::from(gso::TCPV6), uapi::VIRTIO_NET_HDR_GSO_TCPV6);
        assert_eq!(u32::from(gso::UDP_L4), uapi::VIRTIO_NET_HDR_GSO_UDP_L4);
        assert_eq!(u32::from(gso::ECN), uapi::VIRTIO_NET_HDR_GSO_ECN);
    }

    #[test]
    fn hash_is_little_endian_on_the_wire() {
        let mut header = HeaderV1Hash {
            padding: U16::new(0xffff),
            ..Default::default()
        };
        header.set_hash(PacketHash {
            value: 0x1234_5678,
            report: HashReport::UdpV6,
        });
        assert_eq!(
            header.as_bytes()[12..],
            [0x78, 0x56, 0x34, 0x12, 6, 0, 0, 0]
        );
    }
}
