//! KVM behind small traits.
//!
//! A VMM sees [`Hypervisor`] (what the host can do, new VMs), [`Vm`] (memory slots, interrupt
//! routes, eventfds bound to the guest's accesses), [`DirtyLog`] (which pages vCPUs wrote),
//! [`IrqChip`] (state of the in-kernel interrupt controllers) and [`Vcpu`] (run until the next
//! exit, registers, whole state). [`kvm::Kvm`] implements them over `kvm-ioctls`.
//!
//! Addresses of the guest and of this process have types of their own, so that they cannot be
//! mixed up. Every KVM capability is asked for before an ioctl that depends on it is made; what
//! this host's KVM cannot do is in [`Capabilities`].

pub mod kick;
pub mod kvm;

mod cpuid;
mod error;
mod traits;

pub use cpuid::guest_cpuid;
pub use error::HypervisorError;
pub use kvm_bindings::{
    CpuId, kvm_cpuid_entry2 as CpuIdEntry, kvm_regs as Regs, kvm_segment as Segment,
    kvm_sregs as Sregs,
};
pub use traits::{
    Capabilities, DirtyLog, GuestAddr, HostAddr, Hypervisor, IoEventAddr, IoEventMatch, IrqRoute,
    MemorySlot, Vcpu, VcpuExit, Vm,
};

/// A result whose error is a [`HypervisorError`].
pub type Result<T> = std::result::Result<T, HypervisorError>;
