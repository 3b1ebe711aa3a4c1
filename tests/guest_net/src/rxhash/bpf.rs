//! The little of `bpf(2)` that a filter with a queue needs.
//!
//! Source: uapi `linux/bpf.h`. Instructions are written by hand: a compiler for BPF is more than
//! a static binary for an initramfs can ask for.

use std::ffi::{c_int, c_long};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

const CMD_MAP_CREATE: c_long = 0;
const CMD_PROG_LOAD: c_long = 5;
const CMD_MAP_LOOKUP_AND_DELETE_ELEM: c_long = 21;
const CMD_LINK_CREATE: c_long = 28;
const MAP_TYPE_QUEUE: u32 = 22;
const PSEUDO_MAP_FD: u8 = 1;
/// `BPF_XDP` of `enum bpf_attach_type`.
const ATTACH_XDP: u32 = 37;

/// Of helpers, as `linux/bpf.h` numbers them.
pub(super) const HELPER_SKB_LOAD_BYTES: i32 = 26;
/// See [`HELPER_SKB_LOAD_BYTES`].
pub(super) const HELPER_XDP_ADJUST_HEAD: i32 = 44;
/// See [`HELPER_SKB_LOAD_BYTES`].
pub(super) const HELPER_MAP_PUSH_ELEM: i32 = 87;
/// See [`HELPER_SKB_LOAD_BYTES`].
pub(super) const HELPER_XDP_GET_BUFF_LEN: i32 = 188;
/// See [`HELPER_SKB_LOAD_BYTES`].
pub(super) const HELPER_XDP_LOAD_BYTES: i32 = 189;

/// What a program is for (`enum bpf_prog_type`).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum ProgramKind {
    /// Looks at packets for a socket.
    SocketFilter,
    /// Looks at packets before the network stack does.
    Xdp,
}

impl ProgramKind {
    const fn number(self) -> u32 {
        match self {
            Self::SocketFilter => 1,
            Self::Xdp => 6,
        }
    }

    const fn attach_type(self) -> u32 {
        match self {
            Self::SocketFilter => 0,
            Self::Xdp => ATTACH_XDP,
        }
    }
}

/// `struct bpf_insn`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(C)]
pub(super) struct Insn {
    code: u8,
    /// Destination in the low, source in the high four bits.
    registers: u8,
    offset: i16,
    immediate: i32,
}

/// A register, 0 to 10; 10 is the end of the stack frame.
pub(super) type Register = u8;

impl Insn {
    const fn new(code: u8, to: Register, from: Register, offset: i16, immediate: i32) -> Self {
        Self {
            code,
            registers: to | from << 4,
            offset,
            immediate,
        }
    }

    /// `to = from`, 64 bits.
    pub(super) const fn copy(to: Register, from: Register) -> Self {
        Self::new(0xbf, to, from, 0, 0)
    }

    /// `to = value`, 64 bits.
    pub(super) const fn set(to: Register, value: i32) -> Self {
        Self::new(0xb7, to, 0, 0, value)
    }

    /// `to += value`, 64 bits.
    pub(super) const fn add(to: Register, value: i32) -> Self {
        Self::new(0x07, to, 0, 0, value)
    }

    /// `to = *(u32 *)(from + offset)`.
    pub(super) const fn load32(to: Register, from: Register, offset: i16) -> Self {
        Self::new(0x61, to, from, offset, 0)
    }

    /// `to = *(u16 *)(from + offset)`.
    pub(super) const fn load16(to: Register, from: Register, offset: i16) -> Self {
        Self::new(0x69, to, from, offset, 0)
    }

    /// `*(u32 *)(to + offset) = from`.
    pub(super) const fn store32(to: Register, offset: i16, from: Register) -> Self {
        Self::new(0x63, to, from, offset, 0)
    }

    /// `*(u32 *)(to + offset) = value`.
    pub(super) const fn put32(to: Register, offset: i16, value: i32) -> Self {
        Self::new(0x62, to, 0, offset, value)
    }

    /// Skips `count` instructions if `register == value`.
    pub(super) const fn skip_if_equal(register: Register, value: i32, count: i16) -> Self {
        Self::new(0x15, register, 0, count, value)
    }

    /// Skips `count` instructions if `register >= value`, unsigned.
    pub(super) const fn skip_if_at_least(register: Register, value: i32, count: i16) -> Self {
        Self::new(0x35, register, 0, count, value)
    }

    /// Skips `count` instructions if `register <= value`, unsigned.
    pub(super) const fn skip_if_at_most(register: Register, value: i32, count: i16) -> Self {
        Self::new(0xb5, register, 0, count, value)
    }

    /// `r0 = helper(r1, …, r5)`.
    pub(super) const fn call(helper: i32) -> Self {
        Self::new(0x85, 0, 0, 0, helper)
    }

    /// Returns `r0`.
    pub(super) const fn exit() -> Self {
        Self::new(0x95, 0, 0, 0, 0)
    }

    /// `to = map`: two instructions.
    pub(super) fn map<const N: usize>(to: Register, map: &QueueMap<N>) -> [Self; 2] {
        [
            Self::new(0x18, to, PSEUDO_MAP_FD, 0, map.fd.as_raw_fd()),
            Self::new(0, 0, 0, 0, 0),
        ]
    }
}

/// One call of `bpf(2)`.
///
/// # Safety
/// `attributes` is what `command` wants, and every address in it leads to memory of this process
/// that is as long as the command takes it to be, and writable where the command writes.
unsafe fn bpf<T>(command: c_long, attributes: &mut T) -> io::Result<c_long> {
    // SAFETY: the caller vouches for the addresses; the kernel takes the size as given.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            std::ptr::from_mut(attributes),
            size_of::<T>(),
        )
    };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// The descriptor that a `bpf(2)` call made.
fn new_fd(result: c_long) -> io::Result<OwnedFd> {
    let fd = RawFd::try_from(result).map_err(io::Error::other)?;
    // SAFETY: the kernel has just made it and gave it to nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn address<T: ?Sized>(of: *const T) -> u64 {
    // Addresses fit in 64 bits.
    u64::try_from(of.cast::<u8>().addr()).unwrap_or(0)
}

/// A queue of values of `N` bytes between a program and us.
pub(super) struct QueueMap<const N: usize> {
    fd: OwnedFd,
}

impl<const N: usize> QueueMap<N> {
    /// Makes a queue for so many values.
    pub(super) fn new(values: u32) -> io::Result<Self> {
        #[repr(C)]
        struct Attributes {
            map_type: u32,
            key_size: u32,
            value_size: u32,
            max_entries: u32,
            map_flags: u32,
        }
        let value_size = u32::try_from(N).map_err(io::Error::other)?;
        let map_type = MAP_TYPE_QUEUE;
        let mut attributes = Attributes {
            map_type,
            key_size: 0,
            value_size,
            max_entries: values,
            map_flags: 0,
        };
        // SAFETY: BPF_MAP_CREATE takes these fields and no addresses.
        let fd = new_fd(unsafe { bpf(CMD_MAP_CREATE, &mut attributes) }?)?;
        Ok(Self { fd })
    }

    /// Takes the oldest value out, if there is any.
    pub(super) fn pop(&self) -> io::Result<Option<[u8; N]>> {
        #[repr(C)]
        struct Attributes {
            map_fd: c_int,
            padding: u32,
            key: u64,
            value: u64,
            flags: u64,
        }
        let mut value = [0; N];
        let mut attributes = Attributes {
            map_fd: self.fd.as_raw_fd(),
            padding: 0,
            key: 0,
            value: address(&raw mut value),
            flags: 0,
        };
        // SAFETY: the kernel writes one value of N bytes, the size the map was made with; a queue
        // has no keys.
        match unsafe { bpf(CMD_MAP_LOOKUP_AND_DELETE_ELEM, &mut attributes) } {
            Ok(_) => Ok(Some(value)),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// Loads a program.
///
/// # Errors
/// The kernel's; with what its verifier says against the program.
pub(super) fn load(kind: ProgramKind, program: &[Insn]) -> io::Result<OwnedFd> {
    #[repr(C)]
    struct Attributes {
        prog_type: u32,
        insn_cnt: u32,
        insns: u64,
        license: u64,
        log_level: u32,
        log_size: u32,
        log_buf: u64,
        kern_version: u32,
        prog_flags: u32,
        prog_name: [u8; 16],
        prog_ifindex: u32,
        expected_attach_type: u32,
    }
    let license = c"Apache-2.0";
    let mut log = vec![0_u8; 64 << 10];
    let mut attributes = Attributes {
        prog_type: kind.number(),
        insn_cnt: u32::try_from(program.len()).map_err(io::Error::other)?,
        insns: address(program.as_ptr()),
        license: address(license.as_ptr()),
        log_level: 1,
        log_size: u32::try_from(log.len()).map_err(io::Error::other)?,
        log_buf: address(log.as_mut_ptr()),
        kern_version: 0,
        prog_flags: 0,
        prog_name: [0; 16],
        prog_ifindex: 0,
        expected_attach_type: kind.attach_type(),
    };
    // SAFETY: BPF_PROG_LOAD reads `insn_cnt` instructions and a string, and writes up to
    // `log_size` bytes of log; all outlive the call.
    match unsafe { bpf(CMD_PROG_LOAD, &mut attributes) } {
        Ok(fd) => new_fd(fd),
        Err(error) => {
            let said = log.split(|byte| *byte == 0).next().unwrap_or_default();
            let said = String::from_utf8_lossy(said);
            Err(io::Error::new(
                error.kind(),
                format!("{error}; the verifier says: {said}"),
            ))
        }
    }
}

/// Has the driver of an interface run an XDP program, until the link that this gives is closed.
pub(super) fn attach_xdp(program: &OwnedFd, interface: u32) -> io::Result<OwnedFd> {
    #[repr(C)]
    struct Attributes {
        prog_fd: c_int,
        target_ifindex: u32,
        attach_type: u32,
        flags: u32,
    }
    /// The driver itself, not the stack behind it, which does not have the header any more
    /// (`XDP_FLAGS_DRV_MODE` of uapi `linux/if_link.h`).
    const DRIVER_MODE: u32 = 1 << 2;
    let mut attributes = Attributes {
        prog_fd: program.as_raw_fd(),
        target_ifindex: interface,
        attach_type: ATTACH_XDP,
        flags: DRIVER_MODE,
    };
    // SAFETY: BPF_LINK_CREATE takes these fields and no addresses.
    new_fd(unsafe { bpf(CMD_LINK_CREATE, &mut attributes) }?)
}
