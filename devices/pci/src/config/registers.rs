//! Names of registers, bits and capabilities.

/// Offsets in the type 0 header (PCI Local Bus 3.0, §6.1).
pub mod offset {
    /// Vendor ID.
    pub const VENDOR: u16 = 0x00;
    /// Device ID.
    pub const DEVICE: u16 = 0x02;
    /// Command register.
    pub const COMMAND: u16 = 0x04;
    /// Status register.
    pub const STATUS: u16 = 0x06;
    /// Revision ID, then the three bytes of the class code.
    pub const REVISION: u16 = 0x08;
    /// Cache line size.
    pub const CACHE_LINE: u16 = 0x0c;
    /// Header type.
    pub const HEADER_TYPE: u16 = 0x0e;
    /// First base address register.
    pub const BAR0: u16 = 0x10;
    /// Subsystem vendor ID.
    pub const SUBSYSTEM_VENDOR: u16 = 0x2c;
    /// Subsystem ID.
    pub const SUBSYSTEM: u16 = 0x2e;
    /// Expansion ROM base address.
    pub const ROM: u16 = 0x30;
    /// Pointer to the first capability.
    pub const CAPABILITIES: u16 = 0x34;
    /// Interrupt line (scratch register of the firmware).
    pub const INTERRUPT_LINE: u16 = 0x3c;
    /// Interrupt pin.
    pub const INTERRUPT_PIN: u16 = 0x3d;
    /// First byte after the header.
    pub const HEADER_END: u16 = 0x40;
}

/// Bits of the command register.
pub mod command {
    /// Answers port I/O.
    pub const IO: u16 = 1 << 0;
    /// Answers memory accesses.
    pub const MEMORY: u16 = 1 << 1;
    /// May access memory by itself.
    pub const BUS_MASTER: u16 = 1 << 2;
    /// Reports parity errors.
    pub const PARITY: u16 = 1 << 6;
    /// Reports system errors.
    pub const SERR: u16 = 1 << 8;
    /// Pin interrupts are off.
    pub const INTX_DISABLE: u16 = 1 << 10;
    /// What the guest may write.
    pub const WRITABLE: u16 = IO | MEMORY | BUS_MASTER | PARITY | SERR | INTX_DISABLE;
}

/// Capability IDs (PCI Code and ID Assignment, §2).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Capability(pub u8);

impl Capability {
    /// Power management.
    pub const POWER_MANAGEMENT: Self = Self(0x01);
    /// Message-signalled interrupts.
    pub const MSI: Self = Self(0x05);
    /// Vendor specific.
    pub const VENDOR: Self = Self(0x09);
    /// PCI Express.
    pub const EXPRESS: Self = Self(0x10);
    /// MSI-X.
    pub const MSIX: Self = Self(0x11);
}
