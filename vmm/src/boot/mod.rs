//! Loading a kernel and the state in which the first vCPU starts.
//!
//! Two protocols: PVH for ELF images with the Xen note (`vmlinux`, the native test guest), and
//! the 64-bit Linux boot protocol for a `bzImage`.

mod bzimage;
mod pvh;
mod regs;
mod reset_vector;

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use linux_loader::loader::elf::{Elf, PvhBootCapability};
use linux_loader::loader::{KernelLoader, bzimage::BzImage};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};
use vm_migration::memory::GuestMemory;

use crate::layout;

pub use regs::EntryState;

/// Why a guest could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// A file of the payload cannot be opened or read.
    #[error("cannot read {what} {}", path.display())]
    File {
        /// `kernel` or `initramfs`.
        what: &'static str,
        /// Its path.
        path: PathBuf,
        /// What the system said.
        #[source]
        cause: std::io::Error,
    },
    /// The kernel is neither an ELF file nor a bzImage.
    #[error("kernel {} is neither an ELF file nor a bzImage: give a vmlinux or a vmlinuz", path.display())]
    UnknownFormat {
        /// Path of the kernel.
        path: PathBuf,
    },
    /// An ELF kernel without the PVH entry note.
    #[error("kernel {} has no PVH entry note: build it with CONFIG_PVH or give the bzImage", path.display())]
    NoPvhEntry {
        /// Path of the kernel.
        path: PathBuf,
    },
    /// The bzImage has no 64-bit entry point.
    #[error("kernel {} has no 64-bit entry point: a 64-bit kernel of boot protocol 2.12 or later is needed", path.display())]
    No64BitEntry {
        /// Path of the kernel.
        path: PathBuf,
    },
    /// The loader refused the image.
    #[error("cannot load kernel {}", path.display())]
    Load {
        /// Path of the kernel.
        path: PathBuf,
        /// What the loader said.
        #[source]
        cause: linux_loader::loader::Error,
    },
    /// The command line is too long or holds a NUL.
    #[error("kernel command line of {length} bytes: at most {max} without NUL bytes are possible", max = layout::CMDLINE_MAX - 1)]
    CommandLine {
        /// Its length.
        length: usize,
    },
    /// Not enough memory below the hole.
    #[error(
        "{what} of {size} bytes does not fit in guest memory: give --memory size= a larger value"
    )]
    NoRoom {
        /// What does not fit.
        what: &'static str,
        /// Its size.
        size: u64,
    },
    /// Guest memory could not be written.
    #[error("cannot write {what} to guest memory")]
    Memory {
        /// What was written.
        what: &'static str,
        /// What the memory said.
        #[source]
        cause: vm_memory::GuestMemoryError,
    },
}

/// What is to be booted.
#[derive(Debug)]
pub struct Payload<'a> {
    /// ELF image or bzImage.
    pub kernel: &'a Path,
    /// Initial RAM disk.
    pub initramfs: Option<&'a Path>,
    /// Kernel command line.
    pub cmdline: &'a str,
    /// Address of the RSDP.
    pub rsdp: GuestAddress,
}

/// A range of guest memory holding a loaded file.
#[derive(Clone, Copy, Debug)]
struct Loaded {
    start: u64,
    size: u64,
}

/// One entry of the memory map given to the guest: start, length, E820 type.
type MapEntry = (u64, u64, u32);

/// E820 type: usable RAM.
const E820_RAM: u32 = 1;
/// E820 type: reserved.
const E820_RESERVED: u32 = 2;

/// Loads `payload` into `memory` and says how the first vCPU must start.
///
/// # Errors
/// See [`BootError`].
pub fn load(memory: &GuestMemory, payload: &Payload<'_>) -> Result<EntryState, BootError> {
    let mut kernel = open("kernel", payload.kernel)?;
    let mut magic = [0u8; 4];
    let cause = |cause| BootError::File {
        what: "kernel",
        path: payload.kernel.into(),
        cause,
    };
    kernel.read_exact(&mut magic).map_err(cause)?;
    kernel.seek(SeekFrom::Start(0)).map_err(cause)?;
    write_cmdline(memory, payload.cmdline)?;
    reset_vector::write_reset_vector(memory)?;
    if magic == *b"\x7fELF" {
        load_elf(memory, payload, kernel)
    } else {
        load_bzimage(memory, payload, kernel)
    }
}

fn load_elf(
    memory: &GuestMemory,
    payload: &Payload<'_>,
    mut kernel: File,
) -> Result<EntryState, BootError> {
    let high = Some(GuestAddress(layout::KERNEL_START));
    let loaded = Elf::load(memory, None, &mut kernel, high).map_err(|cause| BootError::Load {
        path: payload.kernel.into(),
        cause,
    })?;
    let PvhBootCapability::PvhEntryPresent(entry) = loaded.pvh_boot_cap else {
        return Err(BootError::NoPvhEntry {
            path: payload.kernel.into(),
        });
    };
    let initramfs = load_initramfs(memory, payload, loaded.kernel_end, u64::from(u32::MAX))?;
    pvh::write_start_info(memory, payload, initramfs)?;
    Ok(EntryState::pvh(entry.0))
}

fn load_bzimage(
    memory: &GuestMemory,
    payload: &Payload<'_>,
    mut kernel: File,
) -> Result<EntryState, BootError> {
    let high = Some(GuestAddress(layout::KERNEL_START));
    let loaded = BzImage::load(memory, None, &mut kernel, high).map_err(|cause| match cause {
        linux_loader::loader::Error::Bzimage(
            linux_loader::loader::bzimage::Error::InvalidBzImage,
        ) => BootError::UnknownFormat {
            path: payload.kernel.into(),
        },
        cause => BootError::Load {
            path: payload.kernel.into(),
            cause,
        },
    })?;
    let header = loaded
        .setup_header
        .ok_or_else(|| BootError::UnknownFormat {
            path: payload.kernel.into(),
        })?;
    if !bzimage::has_64bit_entry(&header) {
        return Err(BootError::No64BitEntry {
            path: payload.kernel.into(),
        });
    }
    // The decompressor needs `init_size` bytes from where it runs.
    let end = loaded
        .kernel_load
        .0
        .saturating_add(u64::from(header.init_size));
    let initramfs = load_initramfs(memory, payload, end, bzimage::initramfs_limit(&header))?;
    bzimage::write_zero_page(memory, payload, header, initramfs)?;
    regs::write_long_mode_tables(memory)?;
    Ok(EntryState::linux64(
        loaded.kernel_load.0 + bzimage::ENTRY_OFFSET,
    ))
}

fn open(what: &'static str, path: &Path) -> Result<File, BootError> {
    File::open(path).map_err(|cause| BootError::File {
        what,
        path: path.into(),
        cause,
    })
}

fn write_cmdline(memory: &GuestMemory, cmdline: &str) -> Result<(), BootError> {
    if cmdline.len() >= layout::CMDLINE_MAX || cmdline.contains('\0') {
        return Err(BootError::CommandLine {
            length: cmdline.len(),
        });
    }
    let mut bytes = cmdline.as_bytes().to_vec();
    bytes.push(0);
    write(memory, "command line", layout::CMDLINE, &bytes)
}

/// Loads the initial RAM disk as high in low memory as `limit` allows, above `kernel_end`.
fn load_initramfs(
    memory: &GuestMemory,
    payload: &Payload<'_>,
    kernel_end: u64,
    limit: u64,
) -> Result<Option<Loaded>, BootError> {
    let Some(path) = payload.initramfs else {
        return Ok(None);
    };
    let what = "initramfs";
    let mut file = open(what, path)?;
    let failed = |cause| BootError::File {
        what,
        path: path.into(),
        cause,
    };
    let size = file.metadata().map_err(failed)?.len();
    let too_big = BootError::NoRoom { what, size };
    let top = low_ram_end(memory).min(limit.saturating_add(1));
    let start = match top.checked_sub(size) {
        Some(start) => start & !0xfff,
        None => return Err(too_big),
    };
    if start < kernel_end {
        return Err(too_big);
    }
    let length = usize::try_from(size).map_err(|_| BootError::NoRoom { what, size })?;
    memory
        .read_exact_volatile_from(GuestAddress(start), &mut file, length)
        .map_err(|cause| BootError::Memory { what, cause })?;
    Ok(Some(Loaded { start, size }))
}

fn low_ram_end(memory: &GuestMemory) -> u64 {
    memory
        .iter()
        .filter(|region| region.start_addr().0 < layout::LOW_RAM_END)
        .map(|region| region.start_addr().0 + region.len())
        .max()
        .unwrap_or(0)
}

fn memory_map(memory: &GuestMemory) -> Vec<MapEntry> {
    let mut map = vec![
        (0, layout::CONVENTIONAL_END, E820_RAM),
        (
            layout::CONVENTIONAL_END,
            layout::KERNEL_START - layout::CONVENTIONAL_END,
            E820_RESERVED,
        ),
        (layout::ECAM_START, layout::ECAM_SIZE, E820_RESERVED),
    ];
    for region in memory.iter() {
        let end = region.start_addr().0 + region.len();
        let start = region.start_addr().0.max(layout::KERNEL_START);
        if start < end {
            map.push((start, end - start, E820_RAM));
        }
    }
    map.sort_unstable();
    map
}

fn write(
    memory: &GuestMemory,
    what: &'static str,
    address: u64,
    bytes: &[u8],
) -> Result<(), BootError> {
    memory
        .write_slice(bytes, GuestAddress(address))
        .map_err(|cause| BootError::Memory { what, cause })
}
