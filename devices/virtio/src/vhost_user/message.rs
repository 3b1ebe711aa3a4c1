//! Messages of vhost-user, as the front end sends them: QEMU's `docs/interop/vhost-user.rst`, of
//! which sections are named here. Numbers are in the machine's byte order.

use std::fmt;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// `VHOST_USER_F_PROTOCOL_FEATURES`: protocol features can be negotiated, and rings start disabled.
pub(super) const F_PROTOCOL_FEATURES: u64 = 1 << 30;
/// `VHOST_F_LOG_ALL` (uapi `linux/vhost.h`): the backend logs the pages that it writes.
pub(super) const F_LOG_ALL: u64 = 1 << 26;

/// Protocol features (section "Protocol features").
pub(super) mod protocol {
    /// `VHOST_USER_PROTOCOL_F_MQ`: the backend tells how many queues it has.
    pub(in super::super) const MQ: u64 = 1 << 0;
    /// `VHOST_USER_PROTOCOL_F_LOG_SHMFD`: the dirty log is memory that the front end gives.
    pub(in super::super) const LOG_SHMFD: u64 = 1 << 1;
    /// `VHOST_USER_PROTOCOL_F_RARP`: the backend announces a guest that has moved.
    pub(in super::super) const RARP: u64 = 1 << 2;
    /// `VHOST_USER_PROTOCOL_F_REPLY_ACK`: requests without an answer are acknowledged.
    pub(in super::super) const REPLY_ACK: u64 = 1 << 3;
    /// `VHOST_USER_PROTOCOL_F_MTU`: the backend takes the MTU.
    pub(in super::super) const MTU: u64 = 1 << 4;
    /// `VHOST_USER_PROTOCOL_F_CONFIG`: the backend has a configuration space.
    pub(in super::super) const CONFIG: u64 = 1 << 9;
    /// What this front end makes use of.
    pub(in super::super) const KNOWN: u64 = MQ | LOG_SHMFD | RARP | REPLY_ACK | MTU | CONFIG;
}

/// Flags of a header: the protocol's version.
pub(super) const VERSION: u32 = 1;
/// Flags of a header: the bits of the version.
pub(super) const VERSION_MASK: u32 = 3;
/// Flags of a header: a reply.
pub(super) const REPLY: u32 = 1 << 2;
/// Flags of a header: an acknowledgement is wanted.
pub(super) const NEED_REPLY: u32 = 1 << 3;

/// Most regions of a memory table (`VHOST_MEMORY_BASELINE_NREGIONS`), and so most descriptors of
/// a message.
pub(super) const MAX_REGIONS: usize = 8;

/// `VHOST_VRING_F_LOG` (uapi `linux/vhost_types.h`): writes of the used ring are logged.
pub(super) const VRING_F_LOG: u32 = 1;

/// What is asked of a backend (section "Front-end message types").
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum Request {
    /// The features it has.
    GetFeatures = 1,
    /// The features it is to use.
    SetFeatures = 2,
    /// This connection owns it.
    SetOwner = 3,
    /// Where guest memory is.
    SetMemTable = 5,
    /// Where it logs the pages that it writes.
    SetLogBase = 6,
    /// A ring's size.
    SetVringNum = 8,
    /// Where a ring is.
    SetVringAddr = 9,
    /// The ring's next available entry.
    SetVringBase = 10,
    /// Stops a ring; answers its next available entry.
    GetVringBase = 11,
    /// The eventfd of the driver's kicks; starts a ring.
    SetVringKick = 12,
    /// The eventfd of the ring's interrupt.
    SetVringCall = 13,
    /// The eventfd of the ring's errors.
    SetVringErr = 14,
    /// The protocol features it has.
    GetProtocolFeatures = 15,
    /// The protocol features it is to use.
    SetProtocolFeatures = 16,
    /// How many queues it has.
    GetQueueNum = 17,
    /// Enables or disables a ring.
    SetVringEnable = 18,
    /// Announces the guest to the network.
    SendRarp = 19,
    /// The MTU the guest was told.
    NetSetMtu = 20,
    /// Reads its configuration space.
    GetConfig = 24,
}

impl Request {
    /// The number on the wire.
    pub(super) const fn code(self) -> u32 {
        self as u32
    }

    const fn name(self) -> &'static str {
        match self {
            Self::GetFeatures => "GET_FEATURES",
            Self::SetFeatures => "SET_FEATURES",
            Self::SetOwner => "SET_OWNER",
            Self::SetMemTable => "SET_MEM_TABLE",
            Self::SetLogBase => "SET_LOG_BASE",
            Self::SetVringNum => "SET_VRING_NUM",
            Self::SetVringAddr => "SET_VRING_ADDR",
            Self::SetVringBase => "SET_VRING_BASE",
            Self::GetVringBase => "GET_VRING_BASE",
            Self::SetVringKick => "SET_VRING_KICK",
            Self::SetVringCall => "SET_VRING_CALL",
            Self::SetVringErr => "SET_VRING_ERR",
            Self::GetProtocolFeatures => "GET_PROTOCOL_FEATURES",
            Self::SetProtocolFeatures => "SET_PROTOCOL_FEATURES",
            Self::GetQueueNum => "GET_QUEUE_NUM",
            Self::SetVringEnable => "SET_VRING_ENABLE",
            Self::SendRarp => "SEND_RARP",
            Self::NetSetMtu => "NET_SET_MTU",
            Self::GetConfig => "GET_CONFIG",
        }
    }
}

impl fmt::Display for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What every message begins with.
#[derive(Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct Header {
    pub(super) request: u32,
    pub(super) flags: u32,
    /// Bytes that follow.
    pub(super) size: u32,
}

/// A ring and a number.
#[derive(Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct VringState {
    pub(super) index: u32,
    pub(super) value: u32,
}

/// Where a ring is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, IntoBytes, Immutable)]
#[repr(C)]
pub(super) struct VringAddr {
    pub(super) index: u32,
    pub(super) flags: u32,
    pub(super) descriptors: u64,
    pub(super) used: u64,
    pub(super) available: u64,
    /// GPA of the used ring, for the log.
    pub(super) log: u64,
}

/// A region of guest memory; a descriptor comes with it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, IntoBytes, Immutable)]
#[repr(C)]
pub(super) struct MemRegion {
    pub(super) gpa: u64,
    pub(super) len: u64,
    /// The address by which [`VringAddr`] speaks of its first byte.
    pub(super) user: u64,
    /// Where in the file it begins.
    pub(super) offset: u64,
}

/// What the regions of guest memory follow.
#[derive(Clone, Copy, PartialEq, Eq, Debug, IntoBytes, Immutable)]
#[repr(C)]
pub(super) struct MemTable {
    pub(super) regions: u32,
    pub(super) padding: u32,
}

/// The memory of the dirty log; a descriptor comes with it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, IntoBytes, Immutable)]
#[repr(C)]
pub(super) struct LogArea {
    pub(super) len: u64,
    pub(super) offset: u64,
}

/// Longest answer to `SET_LOG_BASE`. The specification does not say what it holds: QEMU's library
/// sends 8 bytes, DPDK none, rust-vmm repeats the request's 16.
pub(super) const LOG_REPLY_MAX: usize = 16;

/// A part of the configuration space: as many bytes as it has room for.
#[derive(Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct ConfigPart {
    pub(super) offset: u32,
    pub(super) size: u32,
    pub(super) flags: u32,
    pub(super) bytes: [u8; CONFIG_BYTES],
}

/// Bytes of the configuration space that are read: all up to `mtu`.
pub(super) const CONFIG_BYTES: usize = 12;
