//! Memory that a vCPU shares with KVM, mapped from its file descriptor.

use std::os::fd::BorrowedFd;
use std::ptr::{self, NonNull};

use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use crate::Error;

/// A shared mapping of a vCPU's file descriptor, which is unmapped with it.
///
/// KVM writes it too: access it through raw pointers and atomics, as the owner's protocol says.
#[derive(Debug)]
pub(super) struct VcpuMapping {
    start: NonNull<u8>,
    length: usize,
}

impl VcpuMapping {
    /// Maps `length` bytes at `offset` of `vcpu`; `operation` names it if that fails.
    pub(super) fn new(
        vcpu: BorrowedFd<'_>,
        offset: u64,
        length: usize,
        operation: &'static str,
    ) -> Result<Self, Error> {
        let failed = |cause: std::io::Error| Error::Ioctl { operation, cause };
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: the kernel chooses a free address for the new mapping.
        let start = unsafe {
            mmap(
                ptr::null_mut(),
                length,
                protection,
                MapFlags::SHARED,
                vcpu,
                offset,
            )
        };
        let start = start.map_err(|cause| failed(cause.into()))?;
        let start = NonNull::new(start.cast())
            .ok_or_else(|| failed(std::io::ErrorKind::InvalidData.into()))?;
        Ok(Self { start, length })
    }

    /// Fresh memory in place of a vCPU's.
    #[cfg(test)]
    pub(super) fn anonymous(length: usize) -> Self {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: the kernel chooses a free address for the new mapping.
        let start = unsafe {
            rustix::mm::mmap_anonymous(ptr::null_mut(), length, protection, MapFlags::PRIVATE)
        };
        let start = NonNull::new(start.unwrap().cast()).unwrap();
        Self { start, length }
    }

    /// Its first byte; the bytes stay mapped as long as `self`.
    pub(super) fn start(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    /// How many bytes it has.
    pub(super) fn length(&self) -> usize {
        self.length
    }
}

impl Drop for VcpuMapping {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by this type and its owner goes.
        if let Err(error) = unsafe { munmap(self.start.as_ptr().cast(), self.length) } {
            tracing::error!(%error, "memory shared with a vCPU could not be unmapped");
        }
    }
}
