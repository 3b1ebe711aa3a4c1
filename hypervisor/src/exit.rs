//! Why a vCPU came back to the VMM.

use vm_memory::GuestAddress;

/// What the guest needs from the VMM. Slices lie in the page shared with KVM: what a read exit
/// puts there is what the guest gets on the next entry.
#[derive(Debug, PartialEq, Eq)]
pub enum VcpuExit<'a> {
    /// The guest reads a port. `data` holds one access of `size` bytes, or several for a string
    /// instruction: fill each of its `size`-byte chunks by one read of the port.
    IoIn {
        /// Port.
        port: u16,
        /// Bytes of one access: 1, 2 or 4.
        size: usize,
        /// To be filled.
        data: &'a mut [u8],
    },
    /// The guest writes a port; `data` as for [`IoIn`](Self::IoIn).
    IoOut {
        /// Port.
        port: u16,
        /// Bytes of one access: 1, 2 or 4.
        size: usize,
        /// What is written.
        data: &'a [u8],
    },
    /// The guest reads where no memory is.
    MmioRead {
        /// Where.
        address: GuestAddress,
        /// To be filled, 1 to 8 bytes.
        data: &'a mut [u8],
    },
    /// The guest writes where no (writable) memory is.
    MmioWrite {
        /// Where.
        address: GuestAddress,
        /// What is written, 1 to 8 bytes.
        data: &'a [u8],
    },
    /// The guest halted (never with an in-kernel interrupt controller).
    Hlt,
    /// Triple fault, or another unrecoverable state of the guest: it resets.
    Shutdown,
    /// The guest asked the platform for something (KVM_SYSTEM_EVENT_*).
    SystemEvent {
        /// Which.
        kind: u32,
    },
    /// KVM gave up (KVM_EXIT_INTERNAL_ERROR), for example at an instruction it cannot emulate.
    InternalError {
        /// KVM_INTERNAL_ERROR_*.
        suberror: u32,
        /// What KVM adds, up to 16 words.
        data: Vec<u64>,
    },
    /// The CPU refused to enter the guest.
    FailEntry {
        /// The hardware's reason.
        reason: u64,
        /// Physical CPU.
        cpu: u32,
    },
    /// The guest touched memory that the host could not provide.
    MemoryFault {
        /// Where.
        address: GuestAddress,
        /// How many bytes.
        size: u64,
    },
    /// Kicked, or a signal came. See [`crate::Vcpu::run`].
    Interrupted,
    /// An exit Ferry never asks for, by KVM's number.
    Other(u32),
}
