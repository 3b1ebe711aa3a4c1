//! The PVH start information (Xen `public/arch-x86/hvm/start_info.h`, version 1).

use vm_migration::memory::GuestMemory;
use zerocopy::{Immutable, IntoBytes};

use super::{BootError, Loaded, Payload, memory_map, write};
use crate::layout;

/// `XEN_HVM_START_MAGIC_VALUE`.
const START_MAGIC: u32 = 0x336e_c578;

/// `struct hvm_start_info`, version 1.
#[repr(C)]
#[derive(IntoBytes, Immutable)]
struct StartInfo {
    magic: u32,
    version: u32,
    flags: u32,
    nr_modules: u32,
    modlist_paddr: u64,
    cmdline_paddr: u64,
    rsdp_paddr: u64,
    memmap_paddr: u64,
    memmap_entries: u32,
    reserved: u32,
}

/// `struct hvm_modlist_entry`.
#[repr(C)]
#[derive(IntoBytes, Immutable)]
struct Module {
    paddr: u64,
    size: u64,
    cmdline_paddr: u64,
    reserved: u64,
}

/// `struct hvm_memmap_table_entry`.
#[repr(C)]
#[derive(IntoBytes, Immutable)]
struct MemmapEntry {
    addr: u64,
    size: u64,
    kind: u32,
    reserved: u32,
}

/// Writes `hvm_start_info` and what it points to.
pub(super) fn write_start_info(
    memory: &GuestMemory,
    payload: &Payload<'_>,
    initramfs: Option<Loaded>,
) -> Result<(), BootError> {
    let map: Vec<MemmapEntry> = memory_map(memory)
        .into_iter()
        .map(|(addr, size, kind)| MemmapEntry {
            addr,
            size,
            kind,
            reserved: 0,
        })
        .collect();
    write(
        memory,
        "PVH memory map",
        layout::PVH_MEMMAP,
        map.as_slice().as_bytes(),
    )?;
    if let Some(loaded) = initramfs {
        let module = Module {
            paddr: loaded.start,
            size: loaded.size,
            cmdline_paddr: 0,
            reserved: 0,
        };
        write(
            memory,
            "PVH module list",
            layout::PVH_MODULES,
            module.as_bytes(),
        )?;
    }
    let info = StartInfo {
        magic: START_MAGIC,
        version: 1,
        flags: 0,
        nr_modules: u32::from(initramfs.is_some()),
        modlist_paddr: if initramfs.is_some() {
            layout::PVH_MODULES
        } else {
            0
        },
        cmdline_paddr: layout::CMDLINE,
        rsdp_paddr: payload.rsdp.0,
        memmap_paddr: layout::PVH_MEMMAP,
        memmap_entries: u32::try_from(map.len()).unwrap_or(u32::MAX),
        reserved: 0,
    };
    write(memory, "PVH start info", layout::PVH_INFO, info.as_bytes())
}
