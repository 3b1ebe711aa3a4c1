//! PCI configuration space, by ports 0xcf8/0xcfc or by ECAM.

use guest_logic::args::Args;

use crate::cpu::{inl, outl};
use crate::mmio::Mmio;
use crate::paging;
use crate::sync::SpinLock;

const ADDRESS_PORT: u16 = 0xcf8;
const DATA_PORT: u16 = 0xcfc;
const ADDRESS_ENABLE: u32 = 1 << 31;
/// ECAM of one bus.
const ECAM_BYTES: u64 = 1 << 20;

const COMMAND: u16 = 0x04;
const HEADER_TYPE: u16 = 0x0e;
const BAR0: u16 = 0x10;
const CAPABILITIES: u16 = 0x34;
const COMMAND_MEMORY: u16 = 1 << 1;
const COMMAND_BUS_MASTER: u16 = 1 << 2;
const COMMAND_INTX_DISABLE: u16 = 1 << 10;
const HEADER_MULTIFUNCTION: u8 = 0x80;
const BARS: u8 = 6;
/// A chain of capabilities has at most one per 4 bytes of its space.
const MAX_CAPABILITIES: usize = 48;
/// Where BARs go that the VMM left unassigned, unless `bars=` says: below the
/// I/O APIC, in the window of most PCs.
const DEFAULT_BAR_BASE: u64 = 0xf800_0000;

/// How configuration space is reached.
#[derive(Clone, Copy)]
pub(crate) enum Access {
    /// Two I/O ports.
    Ports,
    /// A window of memory.
    Ecam(Mmio),
}

impl Access {
    /// ECAM at `ecam=` on the command line, else the ports if they answer.
    /// `bars=` is where BARs without an address are put.
    pub(crate) fn find(args: &Args<'_>) -> Option<Self> {
        *NEXT_BAR.lock() = args.number("bars", DEFAULT_BAR_BASE);
        let base = args.number("ecam", 0);
        if base != 0 {
            return paging::map(base, ECAM_BYTES).then(|| {
                // SAFETY: mapped just now; the command line says it is ECAM.
                Self::Ecam(unsafe { Mmio::new(base, ECAM_BYTES) })
            });
        }
        outl(ADDRESS_PORT, ADDRESS_ENABLE);
        (inl(ADDRESS_PORT) == ADDRESS_ENABLE).then_some(Self::Ports)
    }

    /// All functions of bus 0.
    pub(crate) fn functions(self) -> impl Iterator<Item = Function> {
        (0..32)
            .flat_map(move |device| {
                let first = Function {
                    access: self,
                    number: device << 3,
                };
                let count = match first.is_present() {
                    false => 0,
                    true if first.read8(HEADER_TYPE) & HEADER_MULTIFUNCTION != 0 => 8,
                    true => 1,
                };
                (0..count).map(move |function| Function {
                    access: self,
                    number: device << 3 | function,
                })
            })
            .filter(Function::is_present)
    }
}

/// A function of bus 0.
#[derive(Clone, Copy)]
pub(crate) struct Function {
    access: Access,
    /// Device times 8 plus function.
    number: u8,
}

impl Function {
    /// Device and function number.
    pub(crate) const fn slot(&self) -> (u8, u8) {
        (self.number >> 3, self.number & 7)
    }

    fn is_present(&self) -> bool {
        self.read32(0) != u32::MAX
    }

    /// Vendor and device number.
    pub(crate) fn identity(&self) -> (u16, u16) {
        (self.read16(0), self.read16(2))
    }

    fn select(&self, offset: u16) {
        let offset = u32::from(offset & 0xfc);
        outl(
            ADDRESS_PORT,
            ADDRESS_ENABLE | u32::from(self.number) << 8 | offset,
        );
    }

    fn ecam_offset(&self, offset: u16) -> u64 {
        u64::from(self.number) << 12 | u64::from(offset & 0xffc)
    }

    /// The word `offset` lies in.
    pub(crate) fn read32(&self, offset: u16) -> u32 {
        match self.access {
            Access::Ports => {
                self.select(offset);
                inl(DATA_PORT)
            }
            Access::Ecam(window) => window.read(self.ecam_offset(offset)),
        }
    }

    fn write32(&self, offset: u16, value: u32) {
        match self.access {
            Access::Ports => {
                self.select(offset);
                outl(DATA_PORT, value);
            }
            Access::Ecam(window) => window.write(self.ecam_offset(offset), value),
        }
    }

    fn read16(&self, offset: u16) -> u16 {
        let bytes = self.read32(offset).to_le_bytes();
        let at = usize::from(offset & 2);
        u16::from_le_bytes([bytes[at], bytes[at + 1]])
    }

    /// A byte.
    pub(crate) fn read8(&self, offset: u16) -> u8 {
        self.read32(offset).to_le_bytes()[usize::from(offset & 3)]
    }

    /// Lets the function answer memory accesses and reach memory itself; pin
    /// interrupts stay off. BARs must have their addresses by then.
    pub(crate) fn enable(&self) {
        let wanted = COMMAND_MEMORY | COMMAND_BUS_MASTER | COMMAND_INTX_DISABLE;
        // The upper half is the status register: writing 0 changes nothing there.
        self.write32(COMMAND, u32::from(self.read16(COMMAND) | wanted));
    }

    /// Capabilities as (number, offset).
    pub(crate) fn capabilities(&self) -> impl Iterator<Item = (u8, u16)> {
        let function = *self;
        let step = move |at: u16| {
            let next = u16::from(function.read8(at) & 0xfc);
            (next != 0).then_some(next)
        };
        core::iter::successors(step(CAPABILITIES), move |&at| step(at + 1))
            .take(MAX_CAPABILITIES)
            .map(move |at| (function.read8(at), at))
    }

    /// The memory of a BAR from `offset` on; assigns the BAR an address if it
    /// has none. `None` when there is no such memory.
    pub(crate) fn bar(&self, index: u8, offset: u32, len: u64) -> Option<Mmio> {
        let base = self.bar_base(index)? + u64::from(offset);
        paging::map(base, len).then(|| {
            // SAFETY: mapped just now; a BAR's memory is no Rust object, and
            // the guest never moves BARs.
            unsafe { Mmio::new(base, len) }
        })
    }

    fn bar_base(&self, index: u8) -> Option<u64> {
        if index >= BARS {
            return None;
        }
        let at = BAR0 + 4 * u16::from(index);
        let low = self.read32(at);
        let is_64_bit = low & 6 == 4;
        if low & 1 != 0 || (is_64_bit && index + 1 == BARS) {
            return None;
        }
        let high = if is_64_bit { self.read32(at + 4) } else { 0 };
        let base = u64::from(high) << 32 | u64::from(low & !0xf);
        if base != 0 {
            return Some(base);
        }
        self.write32(at, u32::MAX);
        let size = u64::from(!(self.read32(at) & !0xf)) + 1;
        let mut next = NEXT_BAR.lock();
        let base = next.next_multiple_of(size);
        *next = base + size;
        self.write32(at, u32::try_from(base).ok()?);
        if is_64_bit {
            self.write32(at + 4, 0);
        }
        Some(base)
    }

    /// Turns MSI-X on, whose capability is at `at`; gives its table.
    pub(crate) fn enable_msix(&self, at: u16) -> Option<Mmio> {
        const ENABLE: u32 = 1 << 31;
        const MASK_ALL: u32 = 1 << 30;
        let control = self.read32(at);
        let entries = u64::from(control >> 16 & 0x7ff) + 1;
        let table = self.read32(at + 4);
        let [bar, ..] = (table & 7).to_le_bytes();
        let memory = self.bar(bar, table & !7, entries * 16)?;
        self.write32(at, (control | ENABLE) & !MASK_ALL);
        Some(memory)
    }
}

/// Where the next BAR without an address goes.
static NEXT_BAR: SpinLock<u64> = SpinLock::new(0);
