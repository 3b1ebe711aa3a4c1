//! What a queue pair gets its packets from and gives them to.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;

use libc::iovec;
use net_util::ctrl::RssConfig;
use net_util::header::HeaderSize;
use net_util::steering::{SteeringError, SteeringProgram};
use net_util::tap::{HashAbi, KernelHash, Offloads, TapQueue};

use super::offload::QueueSteering;

/// Most buffers of one `readv` or `writev` (`UIO_MAXIOV`, uapi `linux/uio.h`).
pub(super) const MAX_IOVECS: usize = 1024;

/// The host's end of one queue pair: a non-blocking file of which each read gives one packet and
/// each write takes one, behind a virtio-net header. [`TapQueue`] is the usual one.
pub trait NetBackend: AsFd + Send + Sync {
    /// Sets the size of the headers, little-endian, on all queues of the interface.
    ///
    /// # Errors
    /// The host's.
    fn set_header(&self, size: HeaderSize) -> io::Result<()>;

    /// Sets which large and unfinished packets the interface may hand over.
    ///
    /// # Errors
    /// The host's.
    fn set_offloads(&self, offloads: Offloads) -> io::Result<()>;

    /// Lets the interface use this queue, or keeps it from doing so. Only called if there are
    /// several.
    ///
    /// # Errors
    /// The host's.
    fn set_attached(&self, attached: bool) -> io::Result<()>;

    /// Has the interface's kernel hash, steer and report by `abi` as `hash` says, or, without it,
    /// do so no longer. Set after the size of headers, and while the queues it names are attached.
    ///
    /// # Errors
    /// Why the host does not: hash and steer without it.
    fn set_kernel_hash(&self, abi: HashAbi, hash: Option<&KernelHash<'_>>) -> io::Result<()>;
}

impl NetBackend for TapQueue {
    fn set_header(&self, size: HeaderSize) -> io::Result<()> {
        self.set_header_size(size).map_err(io::Error::other)?;
        self.set_little_endian().map_err(io::Error::other)
    }

    fn set_offloads(&self, offloads: Offloads) -> io::Result<()> {
        TapQueue::set_offloads(self, offloads).map_err(io::Error::other)
    }

    fn set_attached(&self, attached: bool) -> io::Result<()> {
        if attached {
            self.attach().map_err(io::Error::other)
        } else {
            self.detach().map_err(io::Error::other)
        }
    }

    fn set_kernel_hash(&self, abi: HashAbi, hash: Option<&KernelHash<'_>>) -> io::Result<()> {
        match hash {
            Some(hash) => self.set_vnet_hash(abi, hash),
            None => self.clear_vnet_hash(abi),
        }
        .map_err(io::Error::other)
    }
}

/// A program in the kernel that steers the packets of one tap.
pub struct TapSteering {
    program: SteeringProgram,
    queue: Arc<TapQueue>,
    /// The tap has the program.
    attached: bool,
}

impl TapSteering {
    /// Loads a program for the tap that `queue` is of.
    ///
    /// # Errors
    /// [`SteeringError`] says what is missing: the card steers without it.
    pub fn load(queue: Arc<TapQueue>) -> Result<Self, SteeringError> {
        Ok(Self {
            program: SteeringProgram::load()?,
            queue,
            attached: false,
        })
    }
}

impl QueueSteering for TapSteering {
    fn steer(&mut self, table: Option<&RssConfig>) -> io::Result<()> {
        if let Some(table) = table {
            self.program.update(table);
        }
        if table.is_some() != self.attached {
            let program = table.map(|_| &self.program);
            self.queue.set_steering(program).map_err(io::Error::other)?;
            self.attached = table.is_some();
        }
        Ok(())
    }
}

/// Reads one packet into `buffers`; how many bytes.
///
/// # Safety
/// Each of `buffers` is writable memory for the length it names, for the length of the call. The
/// guest may use the same memory meanwhile; nothing in Rust refers to it.
pub(super) unsafe fn read_packet(backend: &dyn NetBackend, buffers: &[iovec]) -> io::Result<usize> {
    let count = i32::try_from(buffers.len()).unwrap_or(i32::MAX);
    // SAFETY: the descriptor is open for the length of the borrow, `count` is the length of the
    // array, and the caller vouches for the buffers.
    let got = unsafe { libc::readv(backend.as_fd().as_raw_fd(), buffers.as_ptr(), count) };
    usize::try_from(got).map_err(|_| io::Error::last_os_error())
}

/// Writes one packet from `buffers`; how many bytes.
///
/// # Safety
/// As [`read_packet`], with readable memory.
pub(super) unsafe fn write_packet(
    backend: &dyn NetBackend,
    buffers: &[iovec],
) -> io::Result<usize> {
    let count = i32::try_from(buffers.len()).unwrap_or(i32::MAX);
    // SAFETY: as in `read_packet`.
    let put = unsafe { libc::writev(backend.as_fd().as_raw_fd(), buffers.as_ptr(), count) };
    usize::try_from(put).map_err(|_| io::Error::last_os_error())
}
