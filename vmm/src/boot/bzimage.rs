//! The 64-bit Linux boot protocol (kernel `Documentation/arch/x86/boot.rst`).

use linux_loader::loader::bootparam::{XLF_KERNEL_64, boot_e820_entry, boot_params, setup_header};
use vm_memory::ByteValued;
use vm_migration::memory::GuestMemory;

use super::{BootError, Loaded, Payload, memory_map, write};
use crate::layout;

/// Offset of `startup_64` from the start of the protected-mode code.
pub(super) const ENTRY_OFFSET: u64 = 0x200;
/// Boot protocol 2.12: `xloadflags` exists.
const VERSION_2_12: u16 = 0x020c;
/// `type_of_loader`: no assigned id.
const LOADER_UNDEFINED: u8 = 0xff;

/// Whether the kernel has the 64-bit entry point at [`ENTRY_OFFSET`].
pub(super) fn has_64bit_entry(header: &setup_header) -> bool {
    header.version >= VERSION_2_12 && header.xloadflags & XLF_KERNEL_64 != 0
}

/// The highest address that the initial RAM disk's last byte may have.
pub(super) fn initramfs_limit(header: &setup_header) -> u64 {
    u64::from(header.initrd_addr_max)
}

/// Writes `struct boot_params` for a kernel with `header`.
pub(super) fn write_zero_page(
    memory: &GuestMemory,
    payload: &Payload<'_>,
    mut header: setup_header,
    initramfs: Option<Loaded>,
) -> Result<(), BootError> {
    header.type_of_loader = LOADER_UNDEFINED;
    // Both are below 4 GiB: the layout says so for one, the initramfs limit for the other.
    header.cmd_line_ptr = u32::try_from(layout::CMDLINE).unwrap_or(0);
    header.cmdline_size = u32::try_from(payload.cmdline.len()).unwrap_or(0);
    if let Some(loaded) = initramfs {
        let no_room = |_| BootError::NoRoom {
            what: "initramfs",
            size: loaded.size,
        };
        header.ramdisk_image = u32::try_from(loaded.start).map_err(no_room)?;
        header.ramdisk_size = u32::try_from(loaded.size).map_err(no_room)?;
    }
    let mut params = boot_params {
        hdr: header,
        ..Default::default()
    };
    params.acpi_rsdp_addr = payload.rsdp.0;
    let map = memory_map(memory);
    for (slot, (addr, size, kind)) in params.e820_table.iter_mut().zip(&map) {
        *slot = boot_e820_entry {
            addr: *addr,
            size: *size,
            r#type: *kind,
        };
    }
    params.e820_entries = u8::try_from(map.len()).unwrap_or(u8::MAX);
    write(memory, "zero page", layout::ZERO_PAGE, params.as_slice())
}
