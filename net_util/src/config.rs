//! The device configuration space of virtio-net.
//!
//! Source: VIRTIO 1.4 §5.1.4 "Device configuration layout"; uapi `linux/virtio_net.h`,
//! `struct virtio_net_config`.

use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::hash::HashTypes;

/// The link is up; bit of [`NetConfig::status`].
pub const STATUS_LINK_UP: u16 = 1;
/// The driver is asked to announce itself; bit of [`NetConfig::status`].
pub const STATUS_ANNOUNCE: u16 = 2;

/// The largest hash key the device takes, in bytes.
///
/// The specification asks for at least 40; Linux 6.12 refuses a device that offers more.
pub const RSS_MAX_KEY_BYTES: u8 = 40;
/// The longest RSS indirection table the device takes, in entries.
///
/// The specification asks for at least 128; Linux derives its mask from this number, so it has
/// to be a power of two.
pub const RSS_MAX_TABLE_ENTRIES: u16 = 128;

/// What the driver reads at offset 0 of the device-specific configuration.
///
/// Fields whose feature was not offered stay zero.
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
pub struct NetConfig {
    /// Hardware address (`VIRTIO_NET_F_MAC`).
    pub mac: [u8; 6],
    /// [`STATUS_LINK_UP`], [`STATUS_ANNOUNCE`] (`VIRTIO_NET_F_STATUS`).
    pub status: U16,
    /// Most pairs of queues, 1 to 0x8000 (`VIRTIO_NET_F_MQ` or `VIRTIO_NET_F_RSS`).
    pub max_virtqueue_pairs: U16,
    /// Largest payload of a frame in bytes (`VIRTIO_NET_F_MTU`).
    pub mtu: U16,
    /// Speed in Mbit/s, `u32::MAX` if unknown (`VIRTIO_NET_F_SPEED_DUPLEX`).
    pub speed: U32,
    /// 0 half, 1 full, 255 unknown (`VIRTIO_NET_F_SPEED_DUPLEX`).
    pub duplex: u8,
    /// Largest hash key in bytes (`VIRTIO_NET_F_RSS` or `VIRTIO_NET_F_HASH_REPORT`).
    pub rss_max_key_size: u8,
    /// Longest indirection table in entries (`VIRTIO_NET_F_RSS`).
    pub rss_max_indirection_table_length: U16,
    /// [`HashTypes`] the device can calculate (`VIRTIO_NET_F_RSS` or `VIRTIO_NET_F_HASH_REPORT`).
    pub supported_hash_types: U32,
    /// Tunnels whose inner headers can be hashed (`VIRTIO_NET_F_HASH_TUNNEL`).
    pub supported_tunnel_types: U32,
}

impl NetConfig {
    /// Fills in the fields that `VIRTIO_NET_F_HASH_REPORT` and `VIRTIO_NET_F_RSS` add.
    pub const fn offer_hash(&mut self, types: HashTypes) {
        self.rss_max_key_size = RSS_MAX_KEY_BYTES;
        self.rss_max_indirection_table_length = U16::new(RSS_MAX_TABLE_ENTRIES);
        self.supported_hash_types = U32::new(types.bits());
    }
}

#[cfg(test)]
mod tests {
    use std::mem::offset_of;

    use virtio_bindings::virtio_net as uapi;

    use super::*;

    #[test]
    fn offsets_are_those_of_the_specification() {
        assert_eq!(offset_of!(NetConfig, mac), 0);
        assert_eq!(offset_of!(NetConfig, status), 6);
        assert_eq!(offset_of!(NetConfig, max_virtqueue_pairs), 8);
        assert_eq!(offset_of!(NetConfig, mtu), 10);
        assert_eq!(offset_of!(NetConfig, speed), 12);
        assert_eq!(offset_of!(NetConfig, duplex), 16);
        assert_eq!(offset_of!(NetConfig, rss_max_key_size), 17);
        assert_eq!(offset_of!(NetConfig, rss_max_indirection_table_length), 18);
        assert_eq!(offset_of!(NetConfig, supported_hash_types), 20);
        assert_eq!(offset_of!(NetConfig, supported_tunnel_types), 24);
        assert_eq!(size_of::<NetConfig>(), 28);
        // Linux' struct ends before the tunnel types.
        assert_eq!(size_of::<uapi::virtio_net_config>(), 24);
    }

    #[test]
    fn hash_offer_on_the_wire() {
        let mut config = NetConfig::default();
        config.offer_hash(HashTypes::ALL);
        assert_eq!(config.as_bytes()[17..24], [40, 128, 0, 0xff, 0x01, 0, 0]);
    }
}
