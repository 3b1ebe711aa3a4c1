//! The two commands of bpf(2) that loading takes, and the map's memory.
//!
//! Structures and constants: uapi `linux/bpf.h`, `union bpf_attr`.
#![expect(
    unsafe_code,
    reason = "bpf(2) and mappings are untyped; here each gets its type"
)]

use std::ffi::{c_int, c_long};
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;

use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use super::asm::Instruction;
use super::shared::Shared;

const BPF_MAP_CREATE: c_int = 0;
const BPF_PROG_LOAD: c_int = 5;
const BPF_MAP_TYPE_ARRAY: u32 = 2;
const BPF_F_MMAPABLE: u32 = 1 << 10;
const BPF_PROG_TYPE_SOCKET_FILTER: u32 = 1;

/// What tools such as bpftool show of the program and its map.
const NAME: [u8; 16] = *b"ferry_steering\0\0";

/// The licence, as the kernel asks for it: no function is called that is for the GPL alone.
const LICENCE: &[u8] = b"Apache-2.0\0";

/// Bytes of the verifier's log; what does not fit is left out.
const LOG_BYTES: usize = 1 << 20;

/// `union bpf_attr` for BPF_MAP_CREATE, as far as it is used.
#[derive(Default)]
#[repr(C)]
struct MapCreate {
    map_type: u32,
    key_bytes: u32,
    value_bytes: u32,
    entries: u32,
    flags: u32,
    inner_map: u32,
    numa_node: u32,
    name: [u8; 16],
}

/// `union bpf_attr` for BPF_PROG_LOAD, as far as it is used.
#[repr(C)]
struct ProgramLoad {
    program_type: u32,
    instruction_count: u32,
    instructions: u64,
    licence: u64,
    log_level: u32,
    log_bytes: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
}

/// Makes the array map that holds one [`Shared`], all zero.
pub(super) fn create_map() -> Result<OwnedFd, Errno> {
    let attributes = MapCreate {
        map_type: BPF_MAP_TYPE_ARRAY,
        key_bytes: 4,
        value_bytes: u32::try_from(size_of::<Shared>()).map_err(|_| Errno::TOOBIG)?,
        entries: 1,
        flags: BPF_F_MMAPABLE,
        name: NAME,
        ..MapCreate::default()
    };
    // SAFETY: BPF_MAP_CREATE reads the structure and nothing else.
    unsafe { bpf(BPF_MAP_CREATE, &attributes) }
}

/// Loads a program; if the verifier refuses it, gives the end of what it says about it too.
pub(super) fn load_program(program: &[Instruction]) -> Result<OwnedFd, (Errno, String)> {
    // Without a log first: a buffer too small for it makes older kernels refuse the program.
    load(program, &mut []).or_else(|_| {
        let mut log = vec![0; LOG_BYTES];
        load(program, &mut log).map_err(|errno| (errno, end_of(&log)))
    })
}

/// The last lines of a log that is padded with zeros.
fn end_of(log: &[u8]) -> String {
    const KEPT_BYTES: usize = 2000;
    let len = log.iter().position(|byte| *byte == 0).unwrap_or(log.len());
    let written = log.get(..len).unwrap_or(log);
    let kept = written.get(written.len().saturating_sub(KEPT_BYTES)..);
    String::from_utf8_lossy(kept.unwrap_or(written)).into_owned()
}

/// Loads a program that may be attached to sockets and, for steering, to taps. The verifier's words
/// go to `log`, if it has room.
pub(super) fn load(program: &[Instruction], log: &mut [u8]) -> Result<OwnedFd, Errno> {
    let attributes = ProgramLoad {
        program_type: BPF_PROG_TYPE_SOCKET_FILTER,
        instruction_count: u32::try_from(program.len()).map_err(|_| Errno::TOOBIG)?,
        instructions: address(program.as_ptr()),
        licence: address(LICENCE.as_ptr()),
        log_level: u32::from(!log.is_empty()),
        log_bytes: u32::try_from(log.len()).map_err(|_| Errno::TOOBIG)?,
        log: if log.is_empty() {
            0
        } else {
            address(log.as_mut_ptr())
        },
        kernel_version: 0,
        flags: 0,
        name: NAME,
    };
    // SAFETY: BPF_PROG_LOAD reads the structure, as many instructions as `program` has and the
    // licence up to its zero, and writes at most `log.len()` bytes to `log`, which is borrowed
    // for that.
    unsafe { bpf(BPF_PROG_LOAD, &attributes) }
}

fn address<T>(pointer: *const T) -> u64 {
    // An address fits 64 bits on every machine Linux knows.
    u64::try_from(pointer.expose_provenance()).unwrap_or(0)
}

/// bpf(2) with a command whose result is a new descriptor.
///
/// # Safety
/// What the command reads and writes beyond `attributes` is there.
unsafe fn bpf<T>(command: c_int, attributes: &T) -> Result<OwnedFd, Errno> {
    let attributes_pointer: *const T = attributes;
    // SAFETY: the kernel reads `size_of::<T>()` bytes of the structure; the rest is the caller's
    // promise.
    let result: c_long =
        unsafe { libc::syscall(libc::SYS_bpf, command, attributes_pointer, size_of::<T>()) };
    match c_int::try_from(result) {
        // SAFETY: the kernel made the descriptor for this call, so nobody else owns it.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => {
            let errno = std::io::Error::last_os_error();
            Err(Errno::from_io_error(&errno).unwrap_or(Errno::INVAL))
        }
    }
}

/// A map's [`Shared`] in this process' memory.
#[derive(Debug)]
pub(super) struct Mapping {
    /// Mapped from [`map`](Self::map) until `drop`.
    shared: NonNull<Shared>,
}

impl Mapping {
    /// Maps the value of `map`, which is a map of at least its size, and no file.
    pub(super) fn map(map: impl AsFd) -> Result<Self, Errno> {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a null hint without MAP_FIXED lets the kernel choose unused addresses.
        let address = unsafe {
            mmap(
                std::ptr::null_mut(),
                size_of::<Shared>(),
                protection,
                MapFlags::SHARED,
                map,
                0,
            )
        }?;
        let shared = NonNull::new(address.cast::<Shared>()).ok_or(Errno::FAULT)?;
        Ok(Self { shared })
    }

    /// The memory, which the kernel's program reads too.
    pub(super) fn shared(&self) -> &Shared {
        // SAFETY: the mapping is page-aligned, has at least this size (the kernel refuses to map
        // more than the map has) and lives as long as `self`; all of `Shared` is atomics, for which
        // any bytes are valid and which others may change.
        unsafe { self.shared.as_ref() }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: `self` owns the mapping, and references into it borrow from `self`.
        let unmapped = unsafe { munmap(self.shared.as_ptr().cast(), size_of::<Shared>()) };
        debug_assert!(unmapped.is_ok(), "unmapping the map's own pages");
    }
}

// SAFETY: the mapping is owned and not tied to a thread.
unsafe impl Send for Mapping {}
// SAFETY: what is shared is atomics.
unsafe impl Sync for Mapping {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layouts_are_those_of_the_uapi() {
        use std::mem::offset_of;
        assert_eq!(
            (size_of::<MapCreate>(), offset_of!(MapCreate, name)),
            (44, 28)
        );
        assert_eq!(
            (size_of::<ProgramLoad>(), offset_of!(ProgramLoad, name)),
            (64, 48)
        );
        assert_eq!(offset_of!(ProgramLoad, log), 32);
    }

    #[test]
    fn the_end_of_a_log_is_kept() {
        assert_eq!(end_of(b"back-edge\n\0\0\0"), "back-edge\n");
        let long = [&[b'a'; 5000][..], b"why", &[0; 10]].concat();
        let kept = end_of(&long);
        assert_eq!((kept.len(), kept.ends_with("why")), (2000, true));
        assert_eq!(end_of(&[]), "");
    }
}
