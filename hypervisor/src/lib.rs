//! The hypervisor: KVM behind small traits.
//!
//! # How the parts fit
//! * [`Hypervisor`] ([`kvm::KvmHypervisor`]) opens `/dev/kvm`, says what it can do
//!   ([`Capabilities`]) and creates VMs.
//! * [`Vm`] maps memory, creates vCPUs, and moves its own small state ([`VmState`]: interrupt
//!   chips, timer, clock). Its supertraits are [`IrqChip`] (irqfd, ioeventfd, routes) and
//!   [`DirtyLog`] (which guest pages were written; [`dirty_log`] tells the ways).
//! * [`Vcpu`] runs guest code until something needs the VMM ([`VcpuExit`]), and saves and
//!   restores its state ([`VcpuState`]). [`VcpuKicker`] gets it out of the guest.
//! * [`cpuid`] makes the CPUID of each vCPU and tells before a migration whether another host
//!   can offer what the guest was promised.
//!
//! # Life of a vCPU thread
//! ```text
//! attach kicker ─► loop { handle requests ─► run ─► serve the exit }
//! to pause:  publish the request ─► kick ─► (thread) Interrupted ─► complete_pending_io
//!            until Interrupted ─► save
//! ```
//! Registers read before [`Vcpu::complete_pending_io`] are of the middle of an instruction.
//!
//! # Order of a restore
//! VM created with the same options and memory → [`Vm::restore`] → for each vCPU
//! [`Vcpu::restore`] → devices → run. Saved state is untrusted: sizes and versions are checked
//! here, contents by KVM.
//!
//! # Addresses
//! A guest physical address (GPA) is a [`vm_memory::GuestAddress`]; a host virtual address
//! (HVA) is an [`Hva`].

pub mod api;
pub mod capabilities;
pub mod cpuid;
pub mod dirty_log;
pub mod error;
pub mod exit;
pub mod kick;
pub mod kvm;
pub mod state;

pub use api::{
    HostMapping, Hva, Hypervisor, IoAddress, IrqChip, MemorySlot, MsiRoute, SlotFlags, Vcpu, Vm,
    VmOptions,
};
pub use capabilities::Capabilities;
pub use cpuid::Cpuid;
pub use dirty_log::{DirtyLog, DirtyLogChoice, DirtyLogMethod};
pub use error::Error;
pub use exit::VcpuExit;
pub use kick::{AttachedThread, VcpuKicker};
pub use kvm::KvmHypervisor;
pub use state::{VcpuState, VmState};

/// Descriptor table register, for [`SpecialRegisters`].
pub use kvm_bindings::kvm_dtable as DescriptorTable;
/// General-purpose registers.
pub use kvm_bindings::kvm_regs as Registers;
/// Segment register, for [`SpecialRegisters`].
pub use kvm_bindings::kvm_segment as Segment;
/// Segment, control and descriptor table registers.
pub use kvm_bindings::kvm_sregs as SpecialRegisters;
