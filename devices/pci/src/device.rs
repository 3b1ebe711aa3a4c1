//! The seam between the bus and a PCI function.

use vmm_sys_util::eventfd::EventFd;

/// Address space and prefetchability of a BAR.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum BarKind {
    /// 32-bit memory.
    Memory32,
    /// 64-bit memory; takes this BAR's register and the next.
    Memory64 {
        /// Reads have no side effects.
        prefetchable: bool,
    },
    /// Port I/O.
    Io,
}

/// One implemented BAR.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BarInfo {
    /// Register index, 0 to 5.
    pub index: u8,
    /// Kind.
    pub kind: BarKind,
    /// Size in bytes, a power of two.
    pub size: u64,
    /// Address now programmed (by us at creation, by the guest later).
    pub address: u64,
}

/// An offset in a BAR whose writes only wake someone: the VMM binds it to the eventfd in the
/// kernel so that no exit to user space is needed.
#[derive(Debug)]
pub struct Doorbell {
    /// BAR index.
    pub bar: u8,
    /// Offset in the BAR.
    pub offset: u64,
    /// Access size in bytes that matches, 0 for any.
    pub size: u8,
    /// Only writes of this value match, if given.
    pub datamatch: Option<u64>,
    /// What is signalled.
    pub eventfd: EventFd,
}

/// A PCI function as the bus sees it. Held as `Arc<parking_lot::Mutex<dyn PciDevice>>`.
pub trait PciDevice: Send {
    /// Identifier of the device in the VM's configuration (`_net0`).
    fn id(&self) -> &str;
    /// Reads configuration space. `offset + data.len()` is within 4096 and within one dword.
    fn read_config(&mut self, offset: u16, data: &mut [u8]);
    /// Writes configuration space. The bus compares [`bars`](Self::bars) and
    /// [`memory_enabled`](Self::memory_enabled) before and after to move mappings.
    fn write_config(&mut self, offset: u16, data: &[u8]);
    /// The implemented BARs with their present addresses.
    fn bars(&self) -> Vec<BarInfo>;
    /// Programs a BAR's address when the VMM lays out the bus at creation.
    fn set_bar_address(&mut self, index: u8, address: u64);
    /// Whether the command register's memory-space bit is set.
    fn memory_enabled(&self) -> bool;
    /// Reads `data.len()` (1, 2, 4 or 8) bytes of a BAR.
    fn read_bar(&mut self, bar: u8, offset: u64, data: &mut [u8]);
    /// Writes to a BAR.
    fn write_bar(&mut self, bar: u8, offset: u64, data: &[u8]);
    /// The doorbells, asked for each time BARs are mapped.
    fn doorbells(&self) -> Vec<Doorbell>;
}
