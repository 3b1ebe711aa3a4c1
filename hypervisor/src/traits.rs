//! The hypervisor as the VMM sees it.

use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use crate::{CpuId, Regs, Result, Sregs};

/// A guest physical address.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct GuestAddr(pub u64);

/// An address in this process.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct HostAddr(pub u64);

/// What this host's KVM can do, as far as Ferry asks (`KVM_CHECK_EXTENSION`).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Capabilities {
    /// vCPUs that may exist in one VM (`KVM_CAP_MAX_VCPUS`).
    pub max_vcpus: usize,
    /// Memory slots of one VM (`KVM_CAP_NR_MEMSLOTS`).
    pub max_memory_slots: usize,
    /// Entries of the interrupt routing table (`KVM_CAP_IRQ_ROUTING`).
    pub max_irq_routes: u32,
    /// Bytes of XSAVE state (`KVM_CAP_XSAVE2`); 0 if only the fixed 4096 bytes exist.
    pub xsave2_size: usize,
    /// Bytes of nested state (`KVM_CAP_NESTED_STATE`); 0 if there is none.
    pub nested_state_size: usize,
    /// The TSC's rate can be set (`KVM_CAP_TSC_CONTROL`).
    pub tsc_control: bool,
    /// The TSC's rate can be read (`KVM_CAP_GET_TSC_KHZ`).
    pub get_tsc_khz: bool,
    /// Extended control registers (`KVM_CAP_XCRS`).
    pub xcrs: bool,
    /// Debug registers (`KVM_CAP_DEBUGREGS`).
    pub debug_regs: bool,
    /// Pending events (`KVM_CAP_VCPU_EVENTS`).
    pub vcpu_events: bool,
    /// Multiprocessing state (`KVM_CAP_MP_STATE`).
    pub mp_state: bool,
    /// The guest's clock (`KVM_CAP_ADJUST_CLOCK`), with its flags; 0 if there is none.
    pub clock_flags: u32,
    /// The guest can be told that it was paused (`KVM_CAP_KVMCLOCK_CTRL`).
    pub kvmclock_ctrl: bool,
    /// An in-kernel timer chip (`KVM_CAP_PIT2`, with `KVM_CAP_PIT_STATE2`).
    pub pit2: bool,
    /// MSI addresses and x2APIC ids above 255 (`KVM_CAP_X2APIC_API`).
    pub x2apic_api: bool,
}

/// A piece of guest physical memory backed by memory of this process.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MemorySlot {
    /// Slot number.
    pub slot: u32,
    /// Where it lies in the guest; page-aligned.
    pub guest: GuestAddr,
    /// Where it lies here; page-aligned.
    pub host: HostAddr,
    /// Size in bytes, whole pages; 0 removes the slot.
    pub size: u64,
    /// Log the pages that vCPUs write.
    pub log_dirty: bool,
    /// The guest may only read.
    pub read_only: bool,
}

/// One entry of the interrupt routing table.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum IrqRoute {
    /// A global interrupt number to a pin of the in-kernel chips: 0 and 1 are the PICs, 2 is the
    /// I/O APIC.
    Pin {
        /// Global interrupt number.
        gsi: u32,
        /// Chip.
        chip: u32,
        /// Pin of the chip.
        pin: u32,
    },
    /// A global interrupt number to a message.
    Msi {
        /// Global interrupt number.
        gsi: u32,
        /// Message address.
        address: u64,
        /// Message data.
        data: u32,
    },
}

/// Where guest writes signal an eventfd.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum IoEventAddr {
    /// A port.
    Port(u16),
    /// A guest physical address.
    Mmio(GuestAddr),
}

/// Which writes match: any, or those of one value and size.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum IoEventMatch {
    /// Writes of any size and value.
    Any,
    /// Writes of this many bytes with this value.
    Value {
        /// Bytes.
        size: u8,
        /// Value.
        value: u64,
    },
}

/// Why a vCPU came back from the guest.
#[derive(Debug)]
pub enum VcpuExit<'a> {
    /// The guest reads a port; the bytes must be filled in before the next run.
    IoIn(u16, &'a mut [u8]),
    /// The guest wrote to a port.
    IoOut(u16, &'a [u8]),
    /// The guest reads an address without memory; the bytes must be filled in.
    MmioRead(GuestAddr, &'a mut [u8]),
    /// The guest wrote to an address without memory.
    MmioWrite(GuestAddr, &'a [u8]),
    /// The guest halted and no interrupt chip is in the kernel.
    Hlt,
    /// Triple fault, or the guest asked for a shutdown.
    Shutdown,
    /// The guest crashed, reset or switched itself off by a KVM system event.
    SystemEvent(u32),
    /// KVM could not go on; [`Vcpu::internal_error`] tells more.
    InternalError,
    /// A signal or `immediate_exit` ended the run.
    Interrupted,
    /// The processor refused the vCPU's state.
    FailEntry {
        /// The hardware's reason.
        reason: u64,
    },
    /// An exit that Ferry has no use for.
    Other(String),
}

/// A host that can run VMs.
pub trait Hypervisor: Send + Sync {
    /// What it can do.
    fn capabilities(&self) -> &Capabilities;
    /// A new VM with interrupt chips in the kernel and no memory.
    ///
    /// # Errors
    /// When the host refuses.
    fn create_vm(&self) -> Result<Arc<dyn Vm>>;
    /// The CPU features a guest can have here.
    ///
    /// # Errors
    /// When the host refuses.
    fn supported_cpuid(&self) -> Result<CpuId>;
    /// The model-specific registers that hold a vCPU's state here.
    ///
    /// # Errors
    /// When the host refuses.
    fn msr_indices(&self) -> Result<Vec<u32>>;
}

/// The pages of guest memory that vCPUs wrote.
pub trait DirtyLog: Send + Sync {
    /// Copies the log of a memory slot into `words` (bit n of the whole is the slot's page n of
    /// 4 KiB) and clears it in the kernel. Bits past the slot's end are zero.
    ///
    /// # Errors
    /// When there is no such slot, the buffer is too small, or KVM refuses; the log is then as
    /// it was.
    fn dirty_log(&self, slot: u32, words: &mut [u64]) -> Result<()>;
}

/// A virtual machine.
pub trait Vm: DirtyLog {
    /// Adds, changes (same addresses and size) or removes (`size` 0) a memory slot.
    ///
    /// # Safety
    /// From now until the slot is removed, `host..host + size` must be mapped memory that belongs
    /// to the guest: the guest reads and writes it at any time.
    ///
    /// # Errors
    /// When KVM refuses.
    unsafe fn set_memory_slot(&self, slot: &MemorySlot) -> Result<()>;
    /// A new vCPU.
    ///
    /// # Errors
    /// When KVM refuses.
    fn create_vcpu(&self, id: u32) -> Result<Box<dyn Vcpu>>;
    /// Sets the whole interrupt routing table.
    ///
    /// # Errors
    /// When it is too large or KVM refuses.
    fn set_irq_routes(&self, routes: &[IrqRoute]) -> Result<()>;
    /// Signals on `event` raise the interrupt `gsi`.
    ///
    /// # Errors
    /// When KVM refuses.
    fn register_irqfd(&self, event: &EventFd, gsi: u32) -> Result<()>;
    /// Undoes [`register_irqfd`](Self::register_irqfd).
    ///
    /// # Errors
    /// When KVM refuses.
    fn unregister_irqfd(&self, event: &EventFd, gsi: u32) -> Result<()>;
    /// Guest writes that match signal `event` and cause no exit.
    ///
    /// # Errors
    /// When KVM refuses.
    fn register_ioeventfd(
        &self,
        event: &EventFd,
        address: IoEventAddr,
        matches: IoEventMatch,
    ) -> Result<()>;
    /// Undoes [`register_ioeventfd`](Self::register_ioeventfd).
    ///
    /// # Errors
    /// When KVM refuses.
    fn unregister_ioeventfd(
        &self,
        event: &EventFd,
        address: IoEventAddr,
        matches: IoEventMatch,
    ) -> Result<()>;
}

/// A virtual CPU.
pub trait Vcpu: Send {
    /// Runs the guest until the next exit.
    ///
    /// # Errors
    /// When KVM refuses.
    fn run(&mut self) -> Result<VcpuExit<'_>>;
    /// Finishes an access that the last exit left half done (KVM completes it on the next entry),
    /// without running the guest. To be called before registers are read after an exit.
    ///
    /// # Errors
    /// When KVM refuses.
    fn complete_pending_io(&mut self) -> Result<()>;
    /// What KVM said with [`VcpuExit::InternalError`]: suberror and data.
    fn internal_error(&mut self) -> (u32, Vec<u64>);
    /// From now on a [`kick`](crate::kick) of the calling thread makes this vCPU leave the guest.
    /// Lasts until the guard is dropped.
    fn bind_to_thread(&mut self) -> crate::kick::Bound;
    /// Forgets kicks that came so far. To be called before looking at what the kick was for, so
    /// that one that comes later is not lost.
    fn clear_kick(&mut self);
    /// Sets the CPU features the guest sees.
    ///
    /// # Errors
    /// When KVM refuses.
    fn set_cpuid(&self, cpuid: &CpuId) -> Result<()>;
    /// General registers.
    ///
    /// # Errors
    /// When KVM refuses.
    fn regs(&self) -> Result<Regs>;
    /// Sets the general registers.
    ///
    /// # Errors
    /// When KVM refuses.
    fn set_regs(&self, regs: &Regs) -> Result<()>;
    /// Segment, control and system registers.
    ///
    /// # Errors
    /// When KVM refuses.
    fn sregs(&self) -> Result<Sregs>;
    /// Sets the segment, control and system registers.
    ///
    /// # Errors
    /// When KVM refuses.
    fn set_sregs(&self, sregs: &Sregs) -> Result<()>;
}
