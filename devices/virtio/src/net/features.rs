//! Feature bits of network devices (virtio 1.2, section 5.1.3) and what they need of each other.

use virtio_bindings::virtio_net as uapi;

/// `VIRTIO_NET_F_CSUM`: packets of the driver may lack their checksum.
pub const CSUM: u64 = 1 << uapi::VIRTIO_NET_F_CSUM;
/// `VIRTIO_NET_F_GUEST_CSUM`: packets for the driver may lack their checksum.
pub const GUEST_CSUM: u64 = 1 << uapi::VIRTIO_NET_F_GUEST_CSUM;
/// `VIRTIO_NET_F_CTRL_GUEST_OFFLOADS`: the driver may switch its offloads.
pub const CTRL_GUEST_OFFLOADS: u64 = 1 << uapi::VIRTIO_NET_F_CTRL_GUEST_OFFLOADS;
/// `VIRTIO_NET_F_MTU`: the configuration has the MTU.
pub const MTU: u64 = 1 << uapi::VIRTIO_NET_F_MTU;
/// `VIRTIO_NET_F_MAC`: the configuration has the hardware address.
pub const MAC: u64 = 1 << uapi::VIRTIO_NET_F_MAC;
/// `VIRTIO_NET_F_GUEST_TSO4`: the driver takes large TCP packets over IPv4.
pub const GUEST_TSO4: u64 = 1 << uapi::VIRTIO_NET_F_GUEST_TSO4;
/// `VIRTIO_NET_F_GUEST_TSO6`: the driver takes large TCP packets over IPv6.
pub const GUEST_TSO6: u64 = 1 << uapi::VIRTIO_NET_F_GUEST_TSO6;
/// `VIRTIO_NET_F_GUEST_ECN`: and with congestion notification.
pub const GUEST_ECN: u64 = 1 << uapi::VIRTIO_NET_F_GUEST_ECN;
/// `VIRTIO_NET_F_HOST_TSO4`: the device takes large TCP packets over IPv4.
pub const HOST_TSO4: u64 = 1 << uapi::VIRTIO_NET_F_HOST_TSO4;
/// `VIRTIO_NET_F_HOST_TSO6`: the device takes large TCP packets over IPv6.
pub const HOST_TSO6: u64 = 1 << uapi::VIRTIO_NET_F_HOST_TSO6;
/// `VIRTIO_NET_F_HOST_ECN`: and with congestion notification.
pub const HOST_ECN: u64 = 1 << uapi::VIRTIO_NET_F_HOST_ECN;
/// `VIRTIO_NET_F_MRG_RXBUF`: a packet may take several receive buffers.
pub const MRG_RXBUF: u64 = 1 << uapi::VIRTIO_NET_F_MRG_RXBUF;
/// `VIRTIO_NET_F_STATUS`: the configuration has the link's state.
pub const STATUS: u64 = 1 << uapi::VIRTIO_NET_F_STATUS;
/// `VIRTIO_NET_F_CTRL_VQ`: there is a control queue.
pub const CTRL_VQ: u64 = 1 << uapi::VIRTIO_NET_F_CTRL_VQ;
/// `VIRTIO_NET_F_GUEST_ANNOUNCE`: the driver announces itself when asked.
pub const GUEST_ANNOUNCE: u64 = 1 << uapi::VIRTIO_NET_F_GUEST_ANNOUNCE;
/// `VIRTIO_NET_F_MQ`: there are several queue pairs.
pub const MQ: u64 = 1 << uapi::VIRTIO_NET_F_MQ;
/// `VIRTIO_NET_F_HASH_REPORT`: headers have a hash.
pub const HASH_REPORT: u64 = 1 << uapi::VIRTIO_NET_F_HASH_REPORT;
/// `VIRTIO_NET_F_RSS`: the driver says by a table which queue a packet's hash goes to.
pub const RSS: u64 = 1 << uapi::VIRTIO_NET_F_RSS;

/// The features that large and unfinished packets need on the host's side.
pub(crate) const OFFLOADS: u64 = CSUM | HOST_TSO4 | HOST_TSO6 | HOST_ECN | GUEST_OFFLOADS;
/// The features that say what the driver takes, which are also the bits of
/// `VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET`.
pub(super) const GUEST_OFFLOADS: u64 = GUEST_CSUM | GUEST_TSO4 | GUEST_TSO6 | GUEST_ECN;

/// Section 5.1.3.1, feature bit requirements: (feature, one of these is needed, message).
const REQUIREMENTS: [(u64, u64, &str); 12] = [
    (GUEST_TSO4, GUEST_CSUM, "GUEST_TSO4 without GUEST_CSUM"),
    (GUEST_TSO6, GUEST_CSUM, "GUEST_TSO6 without GUEST_CSUM"),
    (
        GUEST_ECN,
        GUEST_TSO4 | GUEST_TSO6,
        "GUEST_ECN without GUEST_TSO",
    ),
    (HOST_TSO4, CSUM, "HOST_TSO4 without CSUM"),
    (HOST_TSO6, CSUM, "HOST_TSO6 without CSUM"),
    (HOST_ECN, HOST_TSO4 | HOST_TSO6, "HOST_ECN without HOST_TSO"),
    (MQ, CTRL_VQ, "MQ without CTRL_VQ"),
    (GUEST_ANNOUNCE, CTRL_VQ, "GUEST_ANNOUNCE without CTRL_VQ"),
    (
        CTRL_GUEST_OFFLOADS,
        CTRL_VQ,
        "CTRL_GUEST_OFFLOADS without CTRL_VQ",
    ),
    (HASH_REPORT, CTRL_VQ, "HASH_REPORT without CTRL_VQ"),
    (RSS, CTRL_VQ, "RSS without CTRL_VQ"),
    (GUEST_ANNOUNCE, STATUS, "GUEST_ANNOUNCE without STATUS"),
];

/// Whether the features have what they need of each other.
pub(crate) fn check(features: u64) -> Result<(), &'static str> {
    let broken = REQUIREMENTS
        .iter()
        .find(|(feature, needed, _)| features & feature != 0 && features & needed == 0);
    match broken {
        None => Ok(()),
        Some((_, _, message)) => Err(message),
    }
}
