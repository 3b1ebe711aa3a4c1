//! The traits the VMM is written against, and the types in their signatures.

use std::fmt;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use vm_memory::GuestAddress;
use vm_memory::bitmap::Bitmap;
use vm_memory::mmap::{GuestRegionMmap, MmapRegion};
use vmm_sys_util::eventfd::EventFd;

use crate::{
    Capabilities, Cpuid, DirtyLog, DirtyLogChoice, Error, Registers, SpecialRegisters, VcpuExit,
    VcpuKicker, VcpuState, VmState,
};

/// A host virtual address.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Hva(pub u64);

impl fmt::Debug for Hva {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Hva({:#x})", self.0)
    }
}

/// Memory of this process that a guest may be given.
///
/// # Safety
/// From the first call of [`hva`](Self::hva) until the value is dropped, the `len` bytes there
/// stay mapped to memory that may change at any time (no Rust reference to them exists).
pub unsafe trait HostMapping: Send + Sync {
    /// Where it is. Always the same.
    fn hva(&self) -> Hva;
    /// How long it is in bytes. Always the same.
    fn len(&self) -> u64;
    /// Whether it has no bytes.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

// SAFETY: a region owns its mapping until it is dropped, and vm-memory hands out raw and volatile
// access only.
unsafe impl<B: Bitmap + Send + Sync> HostMapping for MmapRegion<B> {
    fn hva(&self) -> Hva {
        // An address always fits 64 bits.
        Hva(self.as_ptr() as u64)
    }

    fn len(&self) -> u64 {
        self.size() as u64
    }
}

// SAFETY: holds an `MmapRegion` and answers with its answers.
unsafe impl<B: Bitmap + Send + Sync> HostMapping for GuestRegionMmap<B> {
    fn hva(&self) -> Hva {
        Hva(self.as_ptr() as u64)
    }

    fn len(&self) -> u64 {
        self.size() as u64
    }
}

/// Number of a memory slot of a VM.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct MemorySlot(pub(crate) u32);

impl MemorySlot {
    /// The slot that an implementation of [`Vm`] calls `number`.
    pub const fn new(number: u32) -> Self {
        Self(number)
    }

    /// KVM's number, for messages.
    pub const fn number(self) -> u32 {
        self.0
    }
}

/// How a memory slot is mapped.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct SlotFlags {
    /// Guest writes exit to the VMM as MMIO.
    pub read_only: bool,
}

/// An address a doorbell is at.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum IoAddress {
    /// Memory mapped.
    Mmio(GuestAddress),
    /// Port I/O.
    Pio(u16),
}

/// A message-signalled interrupt behind a GSI.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MsiRoute {
    /// Global system interrupt; 0 to 23 are the pins of the I/O APIC, so use 24 and up.
    pub gsi: u32,
    /// Message address.
    pub address: u64,
    /// Message data.
    pub data: u32,
}

/// What a VM is created with.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct VmOptions {
    /// Where Intel's real-mode emulation may put three pages (not RAM, below 4 GiB).
    pub tss: GuestAddress,
    /// Where it may put one more page.
    pub identity_map: GuestAddress,
    /// Whether there is an i8254 timer (with a dummy speaker port).
    pub timer: bool,
    /// How writes to memory are recorded once [`DirtyLog::set_dirty_logging`] asks for it.
    pub dirty_log: DirtyLogChoice,
}

impl Default for VmOptions {
    /// Pages below the firmware's hole at the end of the 32-bit space; with timer; a dirty bitmap.
    fn default() -> Self {
        Self {
            tss: GuestAddress(0xfffb_d000),
            identity_map: GuestAddress(0xfffb_c000),
            timer: true,
            dirty_log: DirtyLogChoice::default(),
        }
    }
}

/// A host that can run VMs.
pub trait Hypervisor: Send + Sync {
    /// What it can do.
    fn capabilities(&self) -> &Capabilities;
    /// The CPUID it can give guests; the VMM may take features away before
    /// [`Cpuid::for_vcpu`].
    ///
    /// # Errors
    /// KVM's.
    fn supported_cpuid(&self) -> Result<Cpuid, Error>;
    /// A VM with an in-kernel interrupt controller, without memory and vCPUs.
    ///
    /// # Errors
    /// KVM's; [`Error::Unsupported`] for a timer or dirty rings this KVM has not;
    /// [`Error::DirtyRingEntries`], [`Error::DirtyRingRefused`], [`Error::DirtyRingNotEnough`].
    fn create_vm(&self, options: &VmOptions) -> Result<Arc<dyn Vm>, Error>;
}

/// Interrupts into a VM and doorbells out of it.
pub trait IrqChip: Send + Sync {
    /// Has each write of `eventfd` raise `gsi`. A count the eventfd already has is delivered now.
    ///
    /// # Errors
    /// KVM's.
    fn register_irqfd(&self, eventfd: &EventFd, gsi: u32) -> Result<(), Error>;
    /// Undoes [`register_irqfd`](Self::register_irqfd); on return no more interrupts come from
    /// it, and writes stay in the eventfd's count.
    ///
    /// # Errors
    /// KVM's.
    fn unregister_irqfd(&self, eventfd: &EventFd, gsi: u32) -> Result<(), Error>;
    /// Has guest writes of `length` bytes (0: any) at `address` signal `eventfd` in the kernel;
    /// only writes of `datamatch`, if given.
    ///
    /// # Errors
    /// [`Error::IoEventLength`], or KVM's.
    fn register_ioeventfd(
        &self,
        eventfd: &EventFd,
        address: IoAddress,
        length: u8,
        datamatch: Option<u64>,
    ) -> Result<(), Error>;
    /// Undoes [`register_ioeventfd`](Self::register_ioeventfd) with the same arguments.
    ///
    /// # Errors
    /// As there.
    fn unregister_ioeventfd(
        &self,
        eventfd: &EventFd,
        address: IoAddress,
        length: u8,
        datamatch: Option<u64>,
    ) -> Result<(), Error>;
    /// Replaces all message routes. The pins stay: GSI 0 to 23 are the I/O APIC's pins 0 to 23,
    /// 0 to 15 the i8259s' too (so the timer is at GSI 0, without an override).
    ///
    /// Costs a grace period of the kernel; call it with all routes at once.
    ///
    /// # Errors
    /// [`Error::TooMany`], or KVM's.
    fn set_msi_routes(&self, routes: &[MsiRoute]) -> Result<(), Error>;
}

/// A virtual machine.
pub trait Vm: IrqChip + DirtyLog {
    /// What this VM's KVM can do.
    fn capabilities(&self) -> &Capabilities;
    /// Maps `mapping` into the guest at `gpa`. The VM (and each vCPU) holds the mapping until the
    /// slot is removed.
    ///
    /// # Errors
    /// [`Error::Unaligned`], [`Error::NoMemorySlot`], or KVM's (EEXIST on overlap).
    fn add_memory(
        &self,
        gpa: GuestAddress,
        mapping: Arc<dyn HostMapping>,
        flags: SlotFlags,
    ) -> Result<MemorySlot, Error>;
    /// Takes memory from the guest.
    ///
    /// # Errors
    /// [`Error::UnknownSlot`], or KVM's.
    fn remove_memory(&self, slot: MemorySlot) -> Result<(), Error>;
    /// Takes note of a file of VFIO, a group's or a device's own, before a device is opened by it: the
    /// devices behind it work for this VM, until [`remove_vfio_file`](Self::remove_vfio_file).
    ///
    /// # Errors
    /// [`Error::Unsupported`], or KVM's (ENODEV, EEXIST, EINVAL of what is no such file).
    fn add_vfio_file(&self, file: BorrowedFd<'_>) -> Result<(), Error>;
    /// Forgets the file, which KVM would keep open otherwise.
    ///
    /// # Errors
    /// KVM's (ENOENT of a file that was not added).
    fn remove_vfio_file(&self, file: BorrowedFd<'_>) -> Result<(), Error>;
    /// Creates the vCPU with APIC ID `index`. vCPU 0 starts, the others wait for it.
    ///
    /// # Errors
    /// [`Error::VcpuIndex`], or KVM's.
    fn create_vcpu(&self, index: u32) -> Result<Box<dyn Vcpu>, Error>;
    /// The state of interrupt chips, timer and clock. All vCPUs must be paused.
    ///
    /// # Errors
    /// KVM's.
    fn save(&self) -> Result<VmState, Error>;
    /// Takes over saved state; before the vCPUs' own.
    ///
    /// # Errors
    /// [`Error::StateVersion`], [`Error::StateFormat`], [`Error::Unsupported`], or KVM's.
    fn restore(&self, state: &VmState) -> Result<(), Error>;
}

/// A virtual CPU. Used by one thread at a time; that thread runs it.
pub trait Vcpu: Send {
    /// Its APIC ID.
    fn index(&self) -> u32;
    /// Runs guest code until something needs the VMM.
    ///
    /// [`VcpuExit::Interrupted`] clears the kick: look at your requests after it, before the next
    /// call.
    ///
    /// # Errors
    /// KVM's, after which the vCPU should not be run again.
    fn run(&mut self) -> Result<VcpuExit<'_>, Error>;
    /// Finishes the instruction whose exit was served last, without running any further guest
    /// code. Must be called, and repeated until it returns [`VcpuExit::Interrupted`], before
    /// registers are read or the state saved: KVM completes an I/O instruction (destination
    /// register, instruction pointer) only on its next entry. Any other exit is a further part of
    /// the same instruction (a string or page-crossing access) and is to be served as usual.
    ///
    /// Clears the kick, as [`run`](Self::run) does.
    ///
    /// # Errors
    /// KVM's.
    fn complete_pending_io(&mut self) -> Result<VcpuExit<'_>, Error>;
    /// A handle that gets the vCPU out of the guest.
    fn kicker(&self) -> VcpuKicker;
    /// General-purpose registers.
    ///
    /// # Errors
    /// KVM's.
    fn registers(&self) -> Result<Registers, Error>;
    /// Sets them.
    ///
    /// # Errors
    /// KVM's.
    fn set_registers(&mut self, registers: &Registers) -> Result<(), Error>;
    /// Segment and control registers.
    ///
    /// # Errors
    /// KVM's.
    fn special_registers(&self) -> Result<SpecialRegisters, Error>;
    /// Sets them.
    ///
    /// # Errors
    /// KVM's.
    fn set_special_registers(&mut self, registers: &SpecialRegisters) -> Result<(), Error>;
    /// Sets what the guest's CPUID instruction answers; before the first run.
    ///
    /// # Errors
    /// KVM's.
    fn set_cpuid(&mut self, cpuid: &Cpuid) -> Result<(), Error>;
    /// Model-specific registers `(index, value)`.
    ///
    /// # Errors
    /// [`Error::Msr`] naming the first that KVM refuses, [`Error::TooMany`] over 256.
    fn set_msrs(&mut self, msrs: &[(u32, u64)]) -> Result<(), Error>;
    /// Tells the guest's clock that it was stopped, so that its watchdogs do not bark. Nothing
    /// happens in a guest without the KVM clock.
    ///
    /// # Errors
    /// KVM's.
    fn mark_paused(&self) -> Result<(), Error>;
    /// The whole state, after [`complete_pending_io`](Self::complete_pending_io). All vCPUs of
    /// the VM must be paused: pending interrupts from others are part of it.
    ///
    /// # Errors
    /// KVM's.
    fn save(&mut self) -> Result<VcpuState, Error>;
    /// Takes over saved state, CPUID included.
    ///
    /// # Errors
    /// [`Error::StateVersion`], [`Error::XsaveSize`], [`Error::TscFrequency`], [`Error::Msr`],
    /// [`Error::Unsupported`] for nested state, or KVM's.
    fn restore(&mut self, state: &VcpuState) -> Result<(), Error>;
}
