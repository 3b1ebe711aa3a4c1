//! What the loader says: `hvm_start_info` of the PVH boot protocol
//! (Xen `include/public/arch-x86/hvm/start_info.h`).

use core::ptr::read_volatile;

const MAGIC: u32 = 0x336e_c578;
/// From this version on the structure carries a memory map.
const VERSION_WITH_MEMORY_MAP: u32 = 1;
const OFFSET_VERSION: u64 = 4;
const OFFSET_COMMAND_LINE: u64 = 24;
const OFFSET_MEMORY_MAP: u64 = 40;
const OFFSET_MEMORY_MAP_ENTRIES: u64 = 48;
const MEMORY_MAP_ENTRY_BYTES: u64 = 24;
/// `XEN_HVM_MEMMAP_TYPE_RAM`.
const TYPE_RAM: u32 = 1;
/// Longest command line kept.
pub(crate) const COMMAND_LINE_BYTES: usize = 1024;

unsafe extern "C" {
    /// `%ebx` at the PVH entry, kept by `boot.s`.
    static start_info: u64;
}

/// Reads a value of the loader's at a physical address.
///
/// # Safety
/// The address must lie in RAM or device memory below 1 GiB or between 3 and
/// 4 GiB, or have been mapped by `paging::map`; any bytes must be a valid `T`.
pub(crate) unsafe fn read_physical<T: Copy>(address: u64) -> T {
    // SAFETY: mapped (caller) and identity mapped; volatile, as it is not
    // memory the compiler knows.
    unsafe { read_volatile(core::ptr::without_provenance(usize_of(address))) }
}

/// `u64` to `usize`, equal on this machine.
pub(crate) const fn usize_of(value: u64) -> usize {
    const { assert!(size_of::<usize>() == size_of::<u64>()) };
    usize::from_ne_bytes(value.to_ne_bytes())
}

/// A stretch of RAM in the loader's map.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RamEntry {
    pub(crate) base: u64,
    pub(crate) len: u64,
}

/// The loader's `hvm_start_info`.
#[derive(Clone, Copy)]
pub(crate) struct StartInfo {
    base: u64,
    version: u32,
}

impl StartInfo {
    /// Finds the structure; `None` when the loader is not a PVH loader.
    pub(crate) fn find() -> Option<Self> {
        // SAFETY: written once by `boot.s` before any Rust ran.
        let base = unsafe { start_info };
        // SAFETY: PVH loaders put the structure below 4 GiB in RAM; ours,
        // QEMU's and Cloud Hypervisor's put it below 1 GiB, which is mapped.
        let magic: u32 = unsafe { read_physical(base) };
        // SAFETY: as above, same structure.
        let version = unsafe { read_physical(base + OFFSET_VERSION) };
        (magic == MAGIC).then_some(Self { base, version })
    }

    fn field(&self, offset: u64) -> u64 {
        // SAFETY: `find` saw the magic, so the structure is there, and all
        // fields used here are within its first 56 bytes; memory map fields
        // are only asked for when the version says they exist.
        unsafe { read_physical(self.base + offset) }
    }

    /// Copies the command line into `buffer`; empty when there is none or it
    /// is not UTF-8.
    pub(crate) fn command_line<'a>(&self, buffer: &'a mut [u8; COMMAND_LINE_BYTES]) -> &'a str {
        let address = self.field(OFFSET_COMMAND_LINE);
        let mut len = 0;
        if address != 0 {
            for (slot, at) in buffer.iter_mut().zip(address..) {
                // SAFETY: the loader's string, ended by a NUL, in RAM below 1 GiB.
                *slot = unsafe { read_physical(at) };
                if *slot == 0 {
                    break;
                }
                len += 1;
            }
        }
        core::str::from_utf8(&buffer[..len]).unwrap_or("")
    }

    /// The RAM in the loader's memory map; nothing when it passed no map.
    pub(crate) fn ram(&self) -> impl Iterator<Item = RamEntry> {
        let (first, count) = if self.version >= VERSION_WITH_MEMORY_MAP {
            let count = self.field(OFFSET_MEMORY_MAP_ENTRIES) & 0xffff_ffff;
            (self.field(OFFSET_MEMORY_MAP), count)
        } else {
            (0, 0)
        };
        (0..count)
            .map(move |index| first + index * MEMORY_MAP_ENTRY_BYTES)
            .filter_map(|at| {
                // SAFETY: entries of the map the loader announced, in RAM below 1 GiB.
                let (base, len, kind): (u64, u64, u32) = unsafe {
                    (
                        read_physical(at),
                        read_physical(at + 8),
                        read_physical(at + 16),
                    )
                };
                (kind == TYPE_RAM).then_some(RamEntry { base, len })
            })
    }
}
