//! The guest physical address map.
//!
//! ```text
//! 0x0000_0000  RAM (low)           up to 3 GiB
//!   0x0000_7000    zero page       (64-bit Linux boot protocol)
//!   0x0000_8000    PVH start_info, memory map and module list
//!   0x0000_9000    page tables     (64-bit Linux boot protocol)
//!   0x0002_0000    kernel command line
//!   0x000a_0000    end of conventional memory
//!   0x000e_0000    ACPI tables
//!   0x000f_fff0    reset vector
//!   0x0010_0000    kernel
//! 0xc000_0000  PCI memory window
//! 0xe800_0000  PCI ECAM, one bus
//! 0xfec0_0000  I/O APIC
//! 0xfee0_0000  local APIC
//! 0x1_0000_0000 RAM (high), the rest
//! ```

/// End of low RAM at most: where the 32-bit hole begins.
pub const LOW_RAM_END: u64 = 0xc000_0000;
/// Start of high RAM: the end of the 32-bit hole.
pub const HIGH_RAM_START: u64 = 0x1_0000_0000;
/// The zero page (`struct boot_params`) of the 64-bit Linux boot protocol.
pub const ZERO_PAGE: u64 = 0x7000;
/// PVH `hvm_start_info`.
pub const PVH_INFO: u64 = 0x8000;
/// PVH memory map.
pub const PVH_MEMMAP: u64 = 0x8200;
/// PVH module list.
pub const PVH_MODULES: u64 = 0x8e00;
/// Page tables for a 64-bit entry: PML4, PDPT, four page directories.
pub const PAGE_TABLES: u64 = 0x9000;
/// The GDT of a 64-bit entry.
pub const GDT: u64 = 0x500;
/// The (empty) IDT of a 64-bit entry.
pub const IDT: u64 = 0x520;
/// Initial stack pointer of a 64-bit entry.
pub const BOOT_STACK: u64 = 0x8ff0;
/// The kernel command line.
pub const CMDLINE: u64 = 0x2_0000;
/// Largest command line in bytes, with its terminator (`COMMAND_LINE_SIZE` of x86 Linux).
pub const CMDLINE_MAX: usize = 2048;
/// End of conventional memory given to the guest.
pub const CONVENTIONAL_END: u64 = 0x9_fc00;
/// Where ACPI tables lie; the RSDP comes first, on a 16-byte boundary of the area that guests
/// search (ACPI 6.5, 5.2.5.1).
pub const ACPI_START: u64 = 0xe_0000;
/// End of the area for ACPI tables.
pub const ACPI_END: u64 = RESET_VECTOR;
/// Where real-mode code jumps to reset the machine: `f000:fff0`.
pub const RESET_VECTOR: u64 = 0xf_fff0;
/// Start of extended memory, and where a bzImage's 64-bit code may be loaded.
pub const KERNEL_START: u64 = 0x10_0000;
/// First address of the PCI memory window.
pub const PCI_MMIO_START: u64 = 0xc000_0000;
/// Size of the PCI memory window.
pub const PCI_MMIO_SIZE: u64 = 0x2800_0000;
/// PCI extended configuration space (ECAM), one bus of 1 MiB.
pub const ECAM_START: u64 = 0xe800_0000;
/// Size of the ECAM area.
pub const ECAM_SIZE: u64 = 0x10_0000;
/// I/O APIC registers (fixed in KVM).
pub const IOAPIC_START: u32 = 0xfec0_0000;
/// Local APIC registers (fixed in KVM).
pub const LAPIC_START: u32 = 0xfee0_0000;

/// First serial port.
pub const COM1_PORT: u16 = 0x3f8;
/// Interrupt of the first serial port.
pub const COM1_IRQ: u32 = 4;
/// i8042 command port (reset only).
pub const I8042_PORT: u16 = 0x60;
/// Diagnostic port of a PC; writes are dropped.
pub const DEBUG_PORT: u16 = 0x80;
/// Legacy PCI configuration ports.
pub const PCI_CONFIG_PORT: u16 = 0xcf8;
/// First GSI for MSI-X vectors: above the pins of the I/O APIC.
pub const FIRST_MSI_GSI: u32 = 24;
/// First port of the hot-plug registers.
pub const HOTPLUG_PORT: u16 = 0x610;
/// Interrupt by which the guest learns that they have news: the pin that ACPI's interrupt has on
/// a PC, and nothing has here.
pub const HOTPLUG_IRQ: u32 = 9;
