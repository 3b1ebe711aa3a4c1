//! One typed function per ioctl of taps and interfaces.
//!
//! Numbers: uapi `linux/if_tun.h` and `linux/sockios.h`. Many of the former say `int` where the
//! kernel takes a `struct ifreq`, so each is spelled out rather than derived from its argument.
#![expect(unsafe_code, reason = "ioctls are untyped; here each gets its type")]

use std::ffi::{c_int, c_uint};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use rustix::io::Result;
use rustix::ioctl::{Getter, IntegerSetter, Opcode, Setter, Updater, ioctl, opcode};

use super::TapName;
use super::vnet_hash::{CAP_BYTES, VnetHashArgument};
use crate::hash::HashTypes;

/// A tap, not a tun (uapi `linux/if_tun.h`).
pub(super) const IFF_TAP: u16 = 0x0002;
/// The interface may have several queues.
pub(super) const IFF_MULTI_QUEUE: u16 = 0x0100;
/// To `TUNSETQUEUE`: attach.
pub(super) const IFF_ATTACH_QUEUE: u16 = 0x0200;
/// To `TUNSETQUEUE`: detach. From `TUNGETIFF`: detached.
pub(super) const IFF_DETACH_QUEUE: u16 = 0x0400;
/// Packets have no protocol information in front.
pub(super) const IFF_NO_PI: u16 = 0x1000;
/// Packets have a virtio-net header in front.
pub(super) const IFF_VNET_HDR: u16 = 0x4000;
/// The interface is up (uapi `linux/if.h`).
pub(super) const IFF_UP: u16 = 0x0001;

const TUN_SET_IFF: Opcode = opcode::write::<c_int>(b'T', 202);
const TUN_GET_FEATURES: Opcode = opcode::read::<c_uint>(b'T', 207);
const TUN_SET_OFFLOAD: Opcode = opcode::write::<c_uint>(b'T', 208);
const TUN_GET_IFF: Opcode = opcode::read::<c_uint>(b'T', 210);
const TUN_GET_VNET_HDR_SZ: Opcode = opcode::read::<c_int>(b'T', 215);
const TUN_SET_VNET_HDR_SZ: Opcode = opcode::write::<c_int>(b'T', 216);
const TUN_SET_QUEUE: Opcode = opcode::write::<c_int>(b'T', 217);
const TUN_SET_VNET_LE: Opcode = opcode::write::<c_int>(b'T', 220);
const TUN_SET_STEERING_EBPF: Opcode = opcode::read::<c_int>(b'T', 224);
const SIOC_GIF_FLAGS: Opcode = 0x8913;
const SIOC_SIF_FLAGS: Opcode = 0x8914;
const SIOC_GIF_MTU: Opcode = 0x8921;
const SIOC_GIF_HWADDR: Opcode = 0x8927;

// Hash reports by the kernel, of which no released kernel knows any: the numbers are those of the
// two generations of a series of patches ("tun: Introduce virtio-net hashing feature"). Both call
// what the kernel reads `_IOR` or `_IOW` as it came; sizes are those of the argument's start.
const TUN_GET_VNET_HASH_CAP: Opcode = opcode::read::<[u8; CAP_BYTES]>(b'T', 228);
const TUN_SET_VNET_HASH: Opcode = opcode::write::<[u8; CAP_BYTES]>(b'T', 229);
const TUN_GET_VNET_HASH_TYPES: Opcode = opcode::read::<u32>(b'T', 228);
const TUN_SET_VNET_REPORTING_AUTOMQ: Opcode = opcode::read::<u32>(b'T', 229);
const TUN_SET_VNET_REPORTING_RSS: Opcode = opcode::read::<[u8; 8]>(b'T', 230);
const TUN_SET_VNET_RSS: Opcode = opcode::read::<[u8; 8]>(b'T', 231);

/// `struct ifreq` of uapi `linux/if.h`: a name, and 24 bytes whose meaning is the ioctl's.
#[derive(Clone)]
#[repr(C, align(8))]
pub(super) struct IfRequest {
    name: [u8; TapName::MAX_BYTES + 1],
    data: [u8; 24],
}

impl IfRequest {
    pub(super) const fn new(name: &TapName) -> Self {
        Self {
            name: name.padded(),
            data: [0; 24],
        }
    }

    /// The name, which the kernel may have filled in.
    pub(super) fn name(&self) -> Option<TapName> {
        TapName::from_padded(self.name)
    }

    /// `ifr_flags`.
    pub(super) const fn flags(&self) -> u16 {
        u16::from_ne_bytes([self.data[0], self.data[1]])
    }

    /// Sets `ifr_flags`.
    pub(super) const fn set_flags(&mut self, flags: u16) {
        [self.data[0], self.data[1]] = flags.to_ne_bytes();
    }

    /// `ifr_mtu`.
    pub(super) const fn int(&self) -> i32 {
        i32::from_ne_bytes([self.data[0], self.data[1], self.data[2], self.data[3]])
    }

    /// `ifr_hwaddr.sa_data`, behind the 2 bytes of the address family.
    pub(super) const fn hardware_address(&self) -> [u8; 6] {
        let d = &self.data;
        [d[2], d[3], d[4], d[5], d[6], d[7]]
    }
}

/// Makes `fd` a queue of the interface named in `request`; the kernel writes the name back.
pub(super) fn tun_set_iff(fd: impl AsFd, request: &mut IfRequest) -> Result<()> {
    // SAFETY: TUNSETIFF reads and writes one `struct ifreq`, which `IfRequest` is.
    unsafe { ioctl(fd, Updater::<TUN_SET_IFF, IfRequest>::new(request)) }
}

/// Name and flags of the interface that `fd` is a queue of.
pub(super) fn tun_get_iff(fd: impl AsFd) -> Result<IfRequest> {
    let mut request = IfRequest {
        name: [0; TapName::MAX_BYTES + 1],
        data: [0; 24],
    };
    // SAFETY: TUNGETIFF writes one `struct ifreq`, which `IfRequest` is.
    unsafe { ioctl(fd, Updater::<TUN_GET_IFF, IfRequest>::new(&mut request)) }?;
    Ok(request)
}

/// `IFF_*` bits that the kernel's taps know.
pub(super) fn tun_get_features(fd: impl AsFd) -> Result<c_uint> {
    // SAFETY: TUNGETFEATURES writes one unsigned int.
    unsafe { ioctl(fd, Getter::<TUN_GET_FEATURES, c_uint>::new()) }
}

/// Sets `TUN_F_*` bits.
pub(super) fn tun_set_offload(fd: impl AsFd, offloads: c_uint) -> Result<()> {
    // A u32 fits in every usize Linux knows.
    let offloads = usize::try_from(offloads).map_err(|_| rustix::io::Errno::INVAL)?;
    // SAFETY: TUNSETOFFLOAD takes its argument by value and touches no memory of ours.
    unsafe { ioctl(fd, IntegerSetter::<TUN_SET_OFFLOAD>::new_usize(offloads)) }
}

/// Bytes of header in front of each packet.
pub(super) fn tun_get_vnet_hdr_size(fd: impl AsFd) -> Result<c_int> {
    // SAFETY: TUNGETVNETHDRSZ writes one int.
    unsafe { ioctl(fd, Getter::<TUN_GET_VNET_HDR_SZ, c_int>::new()) }
}

/// Sets the bytes of header in front of each packet.
pub(super) fn tun_set_vnet_hdr_size(fd: impl AsFd, bytes: c_int) -> Result<()> {
    // SAFETY: TUNSETVNETHDRSZ reads one int.
    unsafe { ioctl(fd, Setter::<TUN_SET_VNET_HDR_SZ, c_int>::new(bytes)) }
}

/// Attaches or detaches the queue, by the flags in `request`.
pub(super) fn tun_set_queue(fd: impl AsFd, request: &IfRequest) -> Result<()> {
    // SAFETY: TUNSETQUEUE reads one `struct ifreq`, which `IfRequest` is.
    unsafe { ioctl(fd, Setter::<TUN_SET_QUEUE, IfRequest>::new(request.clone())) }
}

/// Sets whether the header's fields are little-endian.
pub(super) fn tun_set_vnet_le(fd: impl AsFd, little: bool) -> Result<()> {
    // SAFETY: TUNSETVNETLE reads one int.
    unsafe {
        ioctl(
            fd,
            Setter::<TUN_SET_VNET_LE, c_int>::new(c_int::from(little)),
        )
    }
}

/// Lets the program choose the queue of each packet the host sends; `None` takes it out.
pub(super) fn tun_set_steering_ebpf(fd: impl AsFd, program: Option<BorrowedFd<'_>>) -> Result<()> {
    let program = program.map_or(-1, |program| program.as_raw_fd());
    // SAFETY: TUNSETSTEERINGEBPF reads one int.
    unsafe { ioctl(fd, Setter::<TUN_SET_STEERING_EBPF, c_int>::new(program)) }
}

/// RFC v5: `struct tun_vnet_hash` of what the kernel can do, as bytes.
pub(super) fn tun_get_vnet_hash_cap(fd: impl AsFd) -> Result<[u8; CAP_BYTES]> {
    // SAFETY: TUNGETVNETHASHCAP writes `struct tun_vnet_hash`, which has that many bytes.
    unsafe { ioctl(fd, Getter::<TUN_GET_VNET_HASH_CAP, [u8; CAP_BYTES]>::new()) }
}

/// RFC v5: sets what is hashed, reported and steered.
pub(super) fn tun_set_vnet_hash(fd: impl AsFd, argument: &VnetHashArgument) -> Result<()> {
    // SAFETY: TUNSETVNETHASH reads `struct tun_vnet_hash` and, if its flags say RSS, what follows:
    // never more than a `VnetHashArgument` holds, whose table is as long as its mask says.
    unsafe {
        ioctl(
            fd,
            Setter::<TUN_SET_VNET_HASH, VnetHashArgument>::new(argument.clone()),
        )
    }
}

/// v12: the types of hash that the kernel can report.
pub(super) fn tun_get_vnet_hash_types(fd: impl AsFd) -> Result<u32> {
    // SAFETY: TUNGETVNETHASHTYPES writes one u32, and so would TUNGETQUEUEINDEX.
    unsafe { ioctl(fd, Getter::<TUN_GET_VNET_HASH_TYPES, u32>::new()) }
}

/// v12: steers without RSS and reports hashes of `types`; without any it ends reports and RSS.
pub(super) fn tun_set_vnet_reporting_automq(fd: impl AsFd, types: HashTypes) -> Result<()> {
    // SAFETY: TUNSETVNETREPORTINGAUTOMQ reads one u32.
    unsafe {
        ioctl(
            fd,
            Setter::<TUN_SET_VNET_REPORTING_AUTOMQ, u32>::new(types.bits()),
        )
    }
}

/// v12: steers by RSS and reports the hashes.
pub(super) fn tun_set_vnet_reporting_rss(fd: impl AsFd, argument: &VnetHashArgument) -> Result<()> {
    // SAFETY: TUNSETVNETREPORTINGRSS reads `struct tun_vnet_rss`, a table and a key: never more
    // than a `VnetHashArgument` holds, whose table is as long as its mask says.
    unsafe {
        ioctl(
            fd,
            Setter::<TUN_SET_VNET_REPORTING_RSS, VnetHashArgument>::new(argument.clone()),
        )
    }
}

/// v12: steers by RSS and reports nothing.
pub(super) fn tun_set_vnet_rss(fd: impl AsFd, argument: &VnetHashArgument) -> Result<()> {
    // SAFETY: as TUNSETVNETREPORTINGRSS.
    unsafe {
        ioctl(
            fd,
            Setter::<TUN_SET_VNET_RSS, VnetHashArgument>::new(argument.clone()),
        )
    }
}

/// Fills in `IFF_UP` and its like of the interface named in `request`; `fd` is a socket.
pub(super) fn get_flags(fd: impl AsFd, request: &mut IfRequest) -> Result<()> {
    // SAFETY: SIOCGIFFLAGS reads and writes one `struct ifreq`, which `IfRequest` is.
    unsafe { ioctl(fd, Updater::<SIOC_GIF_FLAGS, IfRequest>::new(request)) }
}

/// Sets `IFF_UP` and its like of the interface named in `request`; `fd` is a socket.
pub(super) fn set_flags(fd: impl AsFd, request: &IfRequest) -> Result<()> {
    // SAFETY: SIOCSIFFLAGS reads one `struct ifreq`, which `IfRequest` is.
    unsafe {
        ioctl(
            fd,
            Setter::<SIOC_SIF_FLAGS, IfRequest>::new(request.clone()),
        )
    }
}

/// Fills in the MTU of the interface named in `request`; `fd` is a socket.
pub(super) fn get_mtu(fd: impl AsFd, request: &mut IfRequest) -> Result<()> {
    // SAFETY: SIOCGIFMTU reads and writes one `struct ifreq`, which `IfRequest` is.
    unsafe { ioctl(fd, Updater::<SIOC_GIF_MTU, IfRequest>::new(request)) }
}

/// Fills in the hardware address of the interface named in `request` if `fd` is a socket, of the
/// queue's own interface if it is a tap's.
pub(super) fn get_hardware_address(fd: impl AsFd, request: &mut IfRequest) -> Result<()> {
    // SAFETY: SIOCGIFHWADDR reads and writes one `struct ifreq`, which `IfRequest` is.
    unsafe { ioctl(fd, Updater::<SIOC_GIF_HWADDR, IfRequest>::new(request)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_those_of_the_uapi() {
        assert_eq!(u64::from(TUN_SET_IFF), libc::TUNSETIFF);
        assert_eq!(u64::from(TUN_GET_FEATURES), libc::TUNGETFEATURES);
        assert_eq!(u64::from(TUN_SET_OFFLOAD), libc::TUNSETOFFLOAD);
        assert_eq!(u64::from(TUN_GET_IFF), libc::TUNGETIFF);
        assert_eq!(u64::from(TUN_GET_VNET_HDR_SZ), libc::TUNGETVNETHDRSZ);
        assert_eq!(u64::from(TUN_SET_VNET_HDR_SZ), libc::TUNSETVNETHDRSZ);
        assert_eq!(u64::from(TUN_SET_QUEUE), libc::TUNSETQUEUE);
        assert_eq!(u64::from(TUN_SET_VNET_LE), libc::TUNSETVNETLE);
        assert_eq!(u64::from(TUN_SET_STEERING_EBPF), libc::TUNSETSTEERINGEBPF);
        assert_eq!(u64::from(SIOC_GIF_FLAGS), libc::SIOCGIFFLAGS);
        assert_eq!(u64::from(SIOC_SIF_FLAGS), libc::SIOCSIFFLAGS);
        assert_eq!(u64::from(SIOC_GIF_MTU), libc::SIOCGIFMTU);
        assert_eq!(u64::from(SIOC_GIF_HWADDR), libc::SIOCGIFHWADDR);
    }

    #[test]
    fn numbers_are_those_of_the_patches() {
        assert_eq!(TUN_GET_VNET_HASH_CAP, 0x8008_54e4);
        assert_eq!(TUN_SET_VNET_HASH, 0x4008_54e5);
        assert_eq!(TUN_GET_VNET_HASH_TYPES, 0x8004_54e4);
        assert_eq!(TUN_SET_VNET_REPORTING_AUTOMQ, 0x8004_54e5);
        assert_eq!(TUN_SET_VNET_REPORTING_RSS, 0x8008_54e6);
        assert_eq!(TUN_SET_VNET_RSS, 0x8008_54e7);
    }

    #[test]
    fn layout_is_that_of_the_uapi() {
        assert_eq!(size_of::<IfRequest>(), size_of::<libc::ifreq>());
        assert_eq!(align_of::<IfRequest>(), align_of::<libc::ifreq>());
        assert_eq!(std::mem::offset_of!(IfRequest, data), 16);
    }
}
