//! The page a vCPU shares with KVM (`struct kvm_run`).
//!
//! kvm-ioctls has a mapping of its own; this one is owned jointly by the vCPU and its kickers, so
//! that a kick after the vCPU is gone touches valid memory.

use std::os::fd::BorrowedFd;
use std::ptr::{addr_of, addr_of_mut};
use std::slice;
use std::sync::atomic::AtomicU8;

use kvm_bindings::{
    KVM_EXIT_DIRTY_RING_FULL, KVM_EXIT_FAIL_ENTRY, KVM_EXIT_HLT, KVM_EXIT_INTERNAL_ERROR,
    KVM_EXIT_INTR, KVM_EXIT_IO, KVM_EXIT_IO_OUT, KVM_EXIT_MEMORY_FAULT, KVM_EXIT_MMIO,
    KVM_EXIT_SHUTDOWN, KVM_EXIT_SYSTEM_EVENT, kvm_run, kvm_run__bindgen_ty_1,
};
use vm_memory::GuestAddress;

use super::vcpu_mapping::VcpuMapping;
use crate::{Error, VcpuExit};

/// A mapping of `struct kvm_run` and the data behind it.
#[derive(Debug)]
pub(crate) struct RunPage {
    mapping: VcpuMapping,
}

/// What an error calls the mapping.
const MAPPING: &str = "mmap of the vCPU's shared page";

// SAFETY: the mapping belongs to no thread. Through a shared `RunPage` only `immediate_exit` is
// accessed, atomically; everything else needs the vCPU's exclusive borrow (see `decode`).
unsafe impl Send for RunPage {}
// SAFETY: as above.
unsafe impl Sync for RunPage {}

impl RunPage {
    /// Maps the page of the vCPU behind `vcpu`; `length` is what KVM_GET_VCPU_MMAP_SIZE says.
    pub(crate) fn map(vcpu: BorrowedFd<'_>, length: usize) -> Result<Self, Error> {
        if length < size_of::<kvm_run>() {
            return Err(Error::Ioctl {
                operation: MAPPING,
                cause: std::io::ErrorKind::InvalidData.into(),
            });
        }
        let mapping = VcpuMapping::new(vcpu, 0, length, MAPPING)?;
        Ok(Self { mapping })
    }

    /// The byte that makes KVM return at once.
    pub(crate) fn immediate_exit(&self) -> &AtomicU8 {
        // SAFETY: the byte is inside the mapping, which lives as long as `self`, and every access
        // of this process to it is atomic through this function. The kernel reads it once per
        // entry.
        unsafe { AtomicU8::from_ptr(addr_of_mut!((*self.run()).immediate_exit)) }
    }

    fn run(&self) -> *mut kvm_run {
        self.mapping.start().cast()
    }

    fn exit(&self) -> *mut kvm_run__bindgen_ty_1 {
        // SAFETY: a field's address inside the mapping; nothing is read.
        unsafe { addr_of_mut!((*self.run()).__bindgen_anon_1) }
    }

    /// Reason of the last exit.
    fn reason(&self) -> u32 {
        // SAFETY: inside the mapping; the kernel writes it only during KVM_RUN, which the thread
        // that calls this is not in.
        unsafe { addr_of!((*self.run()).exit_reason).read() }
    }

    /// Whether the last exit, which came with an error, names a memory fault.
    pub(crate) fn is_memory_fault(&self) -> bool {
        self.reason() == KVM_EXIT_MEMORY_FAULT
    }

    /// Whether the last exit says that the vCPU's dirty ring must be emptied.
    pub(crate) fn is_dirty_ring_full(&self) -> bool {
        self.reason() == KVM_EXIT_DIRTY_RING_FULL
    }

    /// Makes sense of the last exit.
    ///
    /// # Safety
    /// KVM_RUN has returned, and until the returned value is dropped no KVM_RUN happens on this
    /// vCPU and `decode` is not called again.
    pub(crate) unsafe fn decode<'a>(&self) -> Result<VcpuExit<'a>, Error> {
        let exit = self.exit();
        // SAFETY (this whole match): the reason says which member of the union the kernel wrote;
        // all lie within `kvm_run`, which is mapped, and have no invalid bit patterns. The caller
        // guarantees that nothing else writes them.
        Ok(match self.reason() {
            // SAFETY: see above; slices are made by functions that check their bounds.
            KVM_EXIT_IO => unsafe { self.port_access()? },
            // SAFETY: see above.
            KVM_EXIT_MMIO => unsafe { self.memory_access()? },
            KVM_EXIT_HLT => VcpuExit::Hlt,
            KVM_EXIT_SHUTDOWN => VcpuExit::Shutdown,
            KVM_EXIT_INTR => VcpuExit::Interrupted,
            KVM_EXIT_SYSTEM_EVENT => VcpuExit::SystemEvent {
                // SAFETY: see above.
                kind: unsafe { (*exit).system_event.type_ },
            },
            KVM_EXIT_INTERNAL_ERROR => {
                // SAFETY: see above.
                let internal = unsafe { (*exit).internal };
                let count = usize::try_from(internal.ndata).unwrap_or(usize::MAX);
                VcpuExit::InternalError {
                    suberror: internal.suberror,
                    data: internal.data.into_iter().take(count).collect(),
                }
            }
            KVM_EXIT_FAIL_ENTRY => {
                // SAFETY: see above.
                let fail = unsafe { (*exit).fail_entry };
                VcpuExit::FailEntry {
                    reason: fail.hardware_entry_failure_reason,
                    cpu: fail.cpu,
                }
            }
            KVM_EXIT_MEMORY_FAULT => {
                // SAFETY: see above.
                let fault = unsafe { (*exit).memory_fault };
                VcpuExit::MemoryFault {
                    address: GuestAddress(fault.gpa),
                    size: fault.size,
                }
            }
            other => VcpuExit::Other(other),
        })
    }

    /// # Safety
    /// As [`decode`](Self::decode), with exit reason KVM_EXIT_IO.
    unsafe fn port_access<'a>(&self) -> Result<VcpuExit<'a>, Error> {
        // SAFETY: the reason makes `io` the live member.
        let io = unsafe { (*self.exit()).io };
        let size = usize::from(io.size);
        let bytes = usize::try_from(io.count)
            .ok()
            .and_then(|count| count.checked_mul(size));
        let start = usize::try_from(io.data_offset).ok();
        let (Some(bytes), Some(start)) = (bytes, start) else {
            return Err(Error::MalformedExit);
        };
        let fits = start
            .checked_add(bytes)
            .is_some_and(|end| end <= self.mapping.length());
        if !fits || start < size_of::<kvm_run>() || !matches!(size, 1 | 2 | 4) {
            return Err(Error::MalformedExit);
        }
        // SAFETY: inside the mapping and behind `kvm_run`, as just checked; the caller guarantees
        // that nobody else uses it for the lifetime.
        let data = unsafe { slice::from_raw_parts_mut(self.mapping.start().add(start), bytes) };
        let port = io.port;
        Ok(if u32::from(io.direction) == KVM_EXIT_IO_OUT {
            VcpuExit::IoOut { port, size, data }
        } else {
            VcpuExit::IoIn { port, size, data }
        })
    }

    /// # Safety
    /// As [`decode`](Self::decode), with exit reason KVM_EXIT_MMIO.
    unsafe fn memory_access<'a>(&self) -> Result<VcpuExit<'a>, Error> {
        // SAFETY: the reason makes `mmio` the live member; only its address is taken.
        let mmio = unsafe { addr_of_mut!((*self.exit()).mmio) };
        // SAFETY: as above; plain integers.
        let (address, length, write) =
            unsafe { ((*mmio).phys_addr, (*mmio).len, (*mmio).is_write != 0) };
        // SAFETY: as above; the array is lent for the lifetime the caller guarantees.
        let data: &mut [u8; 8] = unsafe { &mut *addr_of_mut!((*mmio).data) };
        let length = usize::try_from(length).map_err(|_| Error::MalformedExit)?;
        let data = data.get_mut(..length).ok_or(Error::MalformedExit)?;
        let address = GuestAddress(address);
        Ok(if write {
            VcpuExit::MmioWrite { address, data }
        } else {
            VcpuExit::MmioRead { address, data }
        })
    }
}
