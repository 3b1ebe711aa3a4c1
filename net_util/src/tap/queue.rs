//! One queue of a tap.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use rustix::io::Errno;

use super::{HashAbi, KernelHash, Offloads, TapError, TapName, VnetHashError, ioctl, vnet_hash};
use crate::header::HeaderSize;
use crate::steering::{SteeringError, SteeringProgram};

/// One queue of a tap: packets to and from the host, each behind a virtio-net header.
///
/// Reading and writing never block: without a packet, or room for one, the error is
/// [`WouldBlock`](io::ErrorKind::WouldBlock). One read takes one packet; what does not fit the
/// buffers is lost. One write gives one packet.
#[derive(Debug)]
pub struct TapQueue {
    fd: OwnedFd,
    name: TapName,
}

impl TapQueue {
    pub(super) const fn new(fd: OwnedFd, name: TapName) -> Self {
        Self { fd, name }
    }

    /// The interface's name.
    pub const fn name(&self) -> &TapName {
        &self.name
    }

    /// Sets how many bytes of header precede each packet, on all queues of the interface.
    ///
    /// # Errors
    /// The kernel's.
    pub fn set_header_size(&self, size: HeaderSize) -> Result<(), TapError> {
        // Both sizes fit in an int.
        let bytes = i32::try_from(size.bytes()).unwrap_or(i32::MAX);
        ioctl::tun_set_vnet_hdr_size(&self.fd, bytes)
            .map_err(|errno| self.name.failed("setting the header size", errno))
    }

    /// How many bytes of header precede each packet.
    ///
    /// # Errors
    /// The kernel's.
    pub fn header_bytes(&self) -> Result<i32, TapError> {
        ioctl::tun_get_vnet_hdr_size(&self.fd)
            .map_err(|errno| self.name.failed("reading the header size", errno))
    }

    /// Makes the header's fields little-endian, as [`crate::header`] has them, on all queues of
    /// the interface.
    ///
    /// # Errors
    /// The kernel's.
    pub fn set_little_endian(&self) -> Result<(), TapError> {
        ioctl::tun_set_vnet_le(&self.fd, true)
            .map_err(|errno| self.name.failed("making the header little-endian", errno))
    }

    /// Sets which large and unfinished packets the interface hands over.
    ///
    /// # Errors
    /// The kernel does not know one of them (USO needs 6.2): leave it out and try again.
    pub fn set_offloads(&self, offloads: Offloads) -> Result<(), TapError> {
        ioctl::tun_set_offload(&self.fd, offloads.bits()).map_err(|errno| match errno {
            Errno::INVAL => TapError::Offloads {
                tap: self.name.clone(),
                offloads: offloads.bits(),
                source: errno.into(),
            },
            errno => self.name.failed("setting the offloads", errno),
        })
    }

    /// Has the kernel hash, steer and report as `hash` says, on all queues of the interface.
    ///
    /// The header size comes first: a report needs [`HeaderSize::V1Hash`]. What is asked for is
    /// refused unless the patches are known to do it right (see [`KernelHash`]).
    ///
    /// # Errors
    /// [`VnetHashError`]: hash and steer otherwise.
    pub fn set_vnet_hash(&self, abi: HashAbi, hash: &KernelHash<'_>) -> Result<(), VnetHashError> {
        vnet_hash::set(self, abi, hash)
    }

    /// Ends what [`set_vnet_hash`](Self::set_vnet_hash) began.
    ///
    /// # Errors
    /// The kernel's; or there is no such interface, by `abi`.
    pub fn clear_vnet_hash(&self, abi: HashAbi) -> Result<(), VnetHashError> {
        vnet_hash::clear(self, abi)
    }

    /// Has `program` choose the queue of each packet the host sends, on all queues of the
    /// interface; `None` leaves the choice to the kernel, as it was at first.
    ///
    /// # Errors
    /// [`SteeringError::HashLoaded`] or [`SteeringError::Attach`].
    pub fn set_steering(&self, program: Option<&SteeringProgram>) -> Result<(), SteeringError> {
        let program = program.map(SteeringProgram::program_fd);
        ioctl::tun_set_steering_ebpf(&self.fd, program).map_err(|errno| {
            let (tap, source) = (self.name.clone(), errno.into());
            match errno {
                Errno::BUSY => SteeringError::HashLoaded { tap, source },
                _ => SteeringError::Attach { tap, source },
            }
        })
    }

    /// Lets the interface use this queue (again).
    ///
    /// The kernel numbers attached queues in the order of their attachment, and moves the last
    /// into the place of one that is detached. To keep the numbers by which packets are steered,
    /// detach from the last queue down and attach from the first up.
    ///
    /// # Errors
    /// [`TapError::FixedQueue`], or the kernel's.
    pub fn attach(&self) -> Result<(), TapError> {
        self.switch(true)
    }

    /// Keeps the interface from using this queue; packets already in it are dropped.
    ///
    /// # Errors
    /// [`TapError::FixedQueue`], or the kernel's.
    pub fn detach(&self) -> Result<(), TapError> {
        self.switch(false)
    }

    /// Attaches or detaches, unless that is so already (which the kernel calls an error).
    fn switch(&self, attached: bool) -> Result<(), TapError> {
        let operation = if attached {
            "attaching a queue"
        } else {
            "detaching a queue"
        };
        let failed = |errno| self.name.failed(operation, errno);
        let flags = ioctl::tun_get_iff(&self.fd).map_err(failed)?.flags();
        if flags & ioctl::IFF_MULTI_QUEUE == 0 {
            return Err(TapError::FixedQueue {
                tap: self.name.clone(),
            });
        }
        if attached == (flags & ioctl::IFF_DETACH_QUEUE == 0) {
            return Ok(());
        }
        let mut request = ioctl::IfRequest::new(&self.name);
        request.set_flags(if attached {
            ioctl::IFF_ATTACH_QUEUE
        } else {
            ioctl::IFF_DETACH_QUEUE
        });
        ioctl::tun_set_queue(&self.fd, &request).map_err(failed)
    }

    /// The interface's hardware address: that of the host's end, not the guest's.
    ///
    /// # Errors
    /// The kernel's.
    pub fn mac(&self) -> Result<[u8; 6], TapError> {
        let mut request = ioctl::IfRequest::new(&self.name);
        ioctl::get_hardware_address(&self.fd, &mut request)
            .map_err(|errno| self.name.failed("reading the hardware address", errno))?;
        Ok(request.hardware_address())
    }
}

impl AsFd for TapQueue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl AsRawFd for TapQueue {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

impl Read for &TapQueue {
    fn read(&mut self, packet: &mut [u8]) -> io::Result<usize> {
        Ok(rustix::io::read(&self.fd, packet)?)
    }

    fn read_vectored(&mut self, packet: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        Ok(rustix::io::readv(&self.fd, packet)?)
    }
}

impl Write for &TapQueue {
    fn write(&mut self, packet: &[u8]) -> io::Result<usize> {
        Ok(rustix::io::write(&self.fd, packet)?)
    }

    fn write_vectored(&mut self, packet: &[IoSlice<'_>]) -> io::Result<usize> {
        Ok(rustix::io::writev(&self.fd, packet)?)
    }

    /// There is nothing to flush: the kernel has each packet when the write returns.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
