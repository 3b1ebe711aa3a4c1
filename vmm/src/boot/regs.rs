//! Register state of the first vCPU at the kernel's entry point.

use hypervisor::{Registers, Segment, SpecialRegisters};
use vm_migration::memory::GuestMemory;

use super::{BootError, write};
use crate::layout;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// RFLAGS: the bit that is always one.
const RFLAGS_FIXED: u64 = 2;

/// Flat 32-bit code, 64-bit code, data, and a busy 32-bit TSS, at their selectors.
const GDT: [u64; 4] = [
    0,
    0x00af_9b00_0000_ffff,
    0x00cf_9300_0000_ffff,
    0x008f_8b00_0000_ffff,
];

/// How the first vCPU enters the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EntryState {
    entry: u64,
    mode: Mode,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    /// 32-bit protected mode, paging off, `ebx` = start info.
    Pvh,
    /// 64-bit mode, identity-mapped, `rsi` = zero page.
    Linux64,
}

impl EntryState {
    /// Entry by the PVH protocol.
    pub fn pvh(entry: u64) -> Self {
        Self {
            entry,
            mode: Mode::Pvh,
        }
    }

    /// Entry by the 64-bit Linux boot protocol.
    pub fn linux64(entry: u64) -> Self {
        Self {
            entry,
            mode: Mode::Linux64,
        }
    }

    /// General registers.
    pub fn regs(&self) -> Registers {
        let mut regs = Registers {
            rip: self.entry,
            rflags: RFLAGS_FIXED,
            ..Default::default()
        };
        match self.mode {
            Mode::Pvh => regs.rbx = layout::PVH_INFO,
            Mode::Linux64 => {
                regs.rsi = layout::ZERO_PAGE;
                regs.rsp = layout::BOOT_STACK;
                regs.rbp = layout::BOOT_STACK;
            }
        }
        regs
    }

    /// Changes `sregs`, as KVM gave them, to what the protocol wants.
    pub fn apply_sregs(&self, sregs: &mut SpecialRegisters) {
        let long = self.mode == Mode::Linux64;
        let data = segment(0x10, 0x3, false);
        sregs.cs = Segment {
            l: u8::from(long),
            db: u8::from(!long),
            ..segment(0x8, 0xb, false)
        };
        for slot in [
            &mut sregs.ds,
            &mut sregs.es,
            &mut sregs.fs,
            &mut sregs.gs,
            &mut sregs.ss,
        ] {
            *slot = data;
        }
        sregs.tr = segment(0x18, 0xb, true);
        match self.mode {
            Mode::Pvh => {
                sregs.cr0 = CR0_PE | CR0_ET;
                sregs.cr4 = 0;
            }
            Mode::Linux64 => {
                sregs.gdt.base = layout::GDT;
                sregs.gdt.limit = 4 * 8 - 1;
                sregs.idt.base = layout::IDT;
                sregs.idt.limit = 7;
                sregs.cr3 = layout::PAGE_TABLES;
                sregs.cr4 = CR4_PAE;
                sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
                sregs.efer = EFER_LME | EFER_LMA;
            }
        }
    }
}

fn segment(selector: u16, kind: u8, system: bool) -> Segment {
    Segment {
        base: 0,
        limit: if system { 0x67 } else { 0xffff_ffff },
        selector,
        type_: kind,
        present: 1,
        dpl: 0,
        db: u8::from(!system),
        s: u8::from(!system),
        l: 0,
        g: u8::from(!system),
        avl: 0,
        unusable: 0,
        padding: 0,
    }
}

/// Writes the GDT, an empty IDT, and page tables that map the first 4 GiB onto themselves with
/// 2 MiB pages.
pub(super) fn write_long_mode_tables(memory: &GuestMemory) -> Result<(), BootError> {
    const PRESENT_WRITABLE: u64 = 3;
    const LARGE: u64 = 1 << 7;
    const DIRECTORIES: u64 = 4;
    let what = "boot page tables";
    let table = |entries: &[u64]| -> Vec<u8> {
        entries
            .iter()
            .flat_map(|entry| entry.to_le_bytes())
            .collect()
    };
    write(memory, "boot GDT", layout::GDT, &table(&GDT))?;
    write(memory, "boot IDT", layout::IDT, &[0; 8])?;
    let pdpt = layout::PAGE_TABLES + 0x1000;
    let first_pd = pdpt + 0x1000;
    write(
        memory,
        what,
        layout::PAGE_TABLES,
        &table(&[pdpt | PRESENT_WRITABLE]),
    )?;
    let pointers: Vec<u64> = (0..DIRECTORIES)
        .map(|i| (first_pd + i * 0x1000) | PRESENT_WRITABLE)
        .collect();
    write(memory, what, pdpt, &table(&pointers))?;
    let pages: Vec<u64> = (0..DIRECTORIES * 512)
        .map(|i| (i << 21) | LARGE | PRESENT_WRITABLE)
        .collect();
    write(memory, what, first_pd, &table(&pages))
}
