//! Taps: host network interfaces whose far end is a file.
//!
//! A [`Tap`] is one interface with one open file per queue pair; it is opened by name
//! ([`Tap::open`]) or made of files another program opened ([`Tap::from_fds`]). Every file is a
//! [`TapQueue`]: a read gives one packet the host sends, a write injects one it receives, each
//! behind a virtio-net header.
//!
//! At activation the device sets, on any one queue, header size, byte order and offloads (the
//! kernel keeps them per interface), and attaches as many queues as the guest uses:
//!
//! ```no_run
//! use std::num::NonZeroU16;
//! use net_util::header::HeaderSize;
//! use net_util::tap::{Offloads, Tap, TapName};
//!
//! # fn main() -> Result<(), net_util::tap::TapError> {
//! let tap = Tap::open(&TapName::new("ferry0")?, NonZeroU16::MIN)?;
//! for queue in tap.queues() {
//!     queue.set_header_size(HeaderSize::V1Hash)?;
//!     queue.set_little_endian()?;
//!     queue.set_offloads(Offloads::from_guest_features(0))?;
//! }
//! tap.set_up()?;
//! # Ok(())
//! # }
//! ```
//!
//! Sources: uapi `linux/if_tun.h`, `linux/if.h`, `linux/sockios.h`; behaviour from
//! `drivers/net/tun.c`.

use std::num::NonZeroU16;
use std::os::fd::{AsFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};

mod error;
mod ioctl;
mod name;
mod offload;
mod queue;
mod vnet_hash;

pub use error::TapError;
pub use name::TapName;
pub use offload::Offloads;
pub use queue::TapQueue;
pub use vnet_hash::{HashAbi, KernelHash, KernelRss, VnetHashArgument, VnetHashError};

/// The character device behind all taps.
const TUN_DEVICE: &str = "/dev/net/tun";

/// Most queues the kernel gives a tap (`MAX_TAP_QUEUES`, `drivers/net/tun.c`).
pub const MAX_QUEUES: u16 = 256;

/// A tap interface and its open queues.
#[derive(Debug)]
pub struct Tap {
    name: TapName,
    queues: Vec<TapQueue>,
    multi_queue: bool,
}

impl Tap {
    /// Opens `queues` queues of the tap `name`, creating the interface if there is none.
    ///
    /// An interface this creates is down (see [`set_up`](Self::set_up)) and goes away with its
    /// last queue. One queue is enough for any tap; more need one that was made multi-queue.
    ///
    /// # Errors
    /// [`TapError`] names the tap and what to do.
    pub fn open(name: &TapName, queues: NonZeroU16) -> Result<Self, TapError> {
        if queues.get() > MAX_QUEUES {
            return Err(TapError::TooManyQueues {
                tap: name.clone(),
                queues: queues.get(),
            });
        }
        let (first, multi_queue) = if queues.get() == 1 {
            open_single(name)?
        } else {
            (open_first_of_many(name)?, true)
        };
        // The kernel has filled in the number of a template such as `tap%d`.
        let name = first.name().clone();
        let mut tap = Self {
            name,
            queues: vec![first],
            multi_queue,
        };
        for _ in 1..queues.get() {
            let queue = attach(&tap.name, true).map_err(|errno| tap.name.refused(errno))?;
            tap.queues.push(queue);
        }
        Ok(tap)
    }

    /// Takes over files that are queues of one tap, opened by another program.
    ///
    /// They become non-blocking, which whoever shares them notices. They must have been opened
    /// with `IFF_NO_PI`, which the kernel has no way to ask about.
    ///
    /// # Errors
    /// There are none, one is no queue of a tap, they are of different taps, or the tap was made
    /// without `IFF_VNET_HDR`.
    pub fn from_fds(fds: Vec<OwnedFd>) -> Result<Self, TapError> {
        if fds.len() > usize::from(MAX_QUEUES) {
            return Err(TapError::TooManyFds { fds: fds.len() });
        }
        let adopted = fds.into_iter().map(adopt).collect::<Result<Vec<_>, _>>()?;
        let (name, multi_queue) = match adopted.first() {
            Some((first, multi_queue)) => (first.name().clone(), *multi_queue),
            None => return Err(TapError::NoFds),
        };
        let queues: Vec<_> = adopted.into_iter().map(|(queue, _)| queue).collect();
        if let Some(other) = queues.iter().find(|queue| *queue.name() != name) {
            return Err(TapError::Mixed {
                tap: name,
                other: other.name().clone(),
            });
        }
        if queues.len() > 1 && !multi_queue {
            return Err(TapError::SingleQueue { tap: name });
        }
        Ok(Self {
            name,
            queues,
            multi_queue,
        })
    }

    /// The interface's name.
    pub const fn name(&self) -> &TapName {
        &self.name
    }

    /// The open queues.
    pub fn queues(&self) -> &[TapQueue] {
        &self.queues
    }

    /// The open queues, each to go to its own worker.
    pub fn into_queues(self) -> Vec<TapQueue> {
        self.queues
    }

    /// Whether the interface was made multi-queue, so that queues can be attached and detached.
    pub const fn is_multi_queue(&self) -> bool {
        self.multi_queue
    }

    /// The interface's hardware address: that of the host's end, not the guest's.
    ///
    /// # Errors
    /// The kernel's.
    pub fn mac(&self) -> Result<[u8; 6], TapError> {
        self.first()?.mac()
    }

    /// Largest payload of a frame in bytes.
    ///
    /// # Errors
    /// The kernel's, or [`TapError::OtherNamespace`].
    pub fn mtu(&self) -> Result<u16, TapError> {
        let (mut request, socket) = self.interface_request()?;
        ioctl::get_mtu(&socket, &mut request)
            .map_err(|errno| self.name.failed("reading the MTU", errno))?;
        // A tap's MTU fits: tun.c bounds it to 65535 less the Ethernet header.
        Ok(u16::try_from(request.int()).unwrap_or(u16::MAX))
    }

    /// Brings the interface up (needs CAP_NET_ADMIN unless it is up already).
    ///
    /// # Errors
    /// The kernel's, or [`TapError::OtherNamespace`].
    pub fn set_up(&self) -> Result<(), TapError> {
        let (mut request, socket) = self.interface_request()?;
        let operation = "bringing the interface up";
        ioctl::get_flags(&socket, &mut request)
            .map_err(|errno| self.name.failed(operation, errno))?;
        if request.flags() & ioctl::IFF_UP != 0 {
            return Ok(());
        }
        request.set_flags(request.flags() | ioctl::IFF_UP);
        ioctl::set_flags(&socket, &request).map_err(|errno| match errno {
            Errno::PERM => TapError::NeedsAdmin {
                tap: self.name.clone(),
            },
            errno => self.name.failed(operation, errno),
        })
    }

    fn first(&self) -> Result<&TapQueue, TapError> {
        self.queues.first().ok_or(TapError::NoFds)
    }

    /// What interface ioctls go through, once it is sure that they reach this tap.
    ///
    /// They find the interface by name in the caller's network namespace, where an adopted tap
    /// need not be and another interface may have its name: the addresses tell them apart.
    fn interface_request(&self) -> Result<(ioctl::IfRequest, OwnedFd), TapError> {
        let operation = "opening a control socket";
        let socket = socket_with(
            AddressFamily::INET,
            SocketType::DGRAM,
            SocketFlags::CLOEXEC,
            None,
        )
        .map_err(|errno| self.name.failed(operation, errno))?;
        let mut request = ioctl::IfRequest::new(&self.name);
        let found = ioctl::get_hardware_address(&socket, &mut request);
        if found.is_ok() && request.hardware_address() == self.mac()? {
            Ok((ioctl::IfRequest::new(&self.name), socket))
        } else {
            Err(TapError::OtherNamespace {
                tap: self.name.clone(),
            })
        }
    }
}

/// Opens the only queue wanted; says whether the tap is multi-queue.
fn open_single(name: &TapName) -> Result<(TapQueue, bool), TapError> {
    match attach(name, false) {
        Ok(queue) => Ok((queue, false)),
        // So the kernel refuses the flag of a single-queue tap on a multi-queue one, and any
        // interface that is no tap.
        Err(Attach::Refused(Errno::INVAL)) => match attach(name, true) {
            Ok(queue) => Ok((queue, true)),
            Err(Attach::Refused(Errno::INVAL)) => Err(TapError::NotATap { tap: name.clone() }),
            Err(errno) => Err(name.refused(errno)),
        },
        Err(errno) => Err(name.refused(errno)),
    }
}

/// Opens the first of several queues.
fn open_first_of_many(name: &TapName) -> Result<TapQueue, TapError> {
    match attach(name, true) {
        Ok(queue) => Ok(queue),
        // If it can be had as a single-queue tap, or could if it were free, that is what it is.
        Err(Attach::Refused(Errno::INVAL)) => match attach(name, false) {
            Err(Attach::Refused(Errno::INVAL)) => Err(TapError::NotATap { tap: name.clone() }),
            Ok(_) | Err(Attach::Refused(_)) => Err(TapError::SingleQueue { tap: name.clone() }),
            Err(error @ Attach::Device(_)) => Err(name.refused(error)),
        },
        Err(errno) => Err(name.refused(errno)),
    }
}

/// Opens [`TUN_DEVICE`] to ask what the kernel can do: it is no queue of any interface.
fn open_unattached() -> Result<OwnedFd, TapError> {
    use rustix::fs::{Mode, OFlags, open};
    open(TUN_DEVICE, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).map_err(no_tun_device)
}

fn no_tun_device(errno: Errno) -> TapError {
    TapError::NoTunDevice {
        source: errno.into(),
    }
}

/// Where opening a queue failed.
enum Attach {
    /// At [`TUN_DEVICE`].
    Device(Errno),
    /// At the interface.
    Refused(Errno),
}

/// Opens one queue of the tap `name`.
fn attach(name: &TapName, multi_queue: bool) -> Result<TapQueue, Attach> {
    use rustix::fs::{Mode, OFlags, open};
    let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let fd = open(TUN_DEVICE, flags, Mode::empty()).map_err(Attach::Device)?;
    let mut request = ioctl::IfRequest::new(name);
    let multi_queue = if multi_queue {
        ioctl::IFF_MULTI_QUEUE
    } else {
        0
    };
    request.set_flags(ioctl::IFF_TAP | ioctl::IFF_NO_PI | ioctl::IFF_VNET_HDR | multi_queue);
    ioctl::tun_set_iff(&fd, &mut request).map_err(Attach::Refused)?;
    let name = request.name().ok_or(Attach::Refused(Errno::INVAL))?;
    Ok(TapQueue::new(fd, name))
}

/// Checks that `fd` is a queue of a tap of the right kind; says whether it is multi-queue.
fn adopt(fd: OwnedFd) -> Result<(TapQueue, bool), TapError> {
    let request = ioctl::tun_get_iff(&fd).map_err(|errno| match errno {
        Errno::BADFD => TapError::Unattached,
        errno => TapError::NotATapFd {
            source: errno.into(),
        },
    })?;
    let tap = request.name().ok_or(TapError::NotATapFd {
        source: Errno::INVAL.into(),
    })?;
    let flags = request.flags();
    let missing = |flag| flags & flag == 0;
    if missing(ioctl::IFF_TAP) {
        return Err(TapError::NotATap { tap });
    }
    // IFF_NO_PI cannot be checked: TUNGETIFF also uses its bit for "no socket filter".
    if missing(ioctl::IFF_VNET_HDR) {
        return Err(TapError::NoHeader { tap });
    }
    rustix::io::ioctl_fionbio(fd.as_fd(), true)
        .map_err(|errno| tap.failed("making the file non-blocking", errno))?;
    Ok((TapQueue::new(fd, tap), !missing(ioctl::IFF_MULTI_QUEUE)))
}

/// What the running kernel's taps can do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct KernelFeatures {
    /// Packets can have a virtio-net header; nothing works without.
    pub headers: bool,
    /// A tap can have several queues.
    pub multi_queue: bool,
}

impl KernelFeatures {
    /// Asks the kernel.
    ///
    /// # Errors
    /// `/dev/net/tun` cannot be opened or gives no answer.
    pub fn probe() -> Result<Self, TapError> {
        let fd = open_unattached()?;
        let features = ioctl::tun_get_features(&fd).map_err(no_tun_device)?;
        let has = |flag| features & u32::from(flag) != 0;
        Ok(Self {
            headers: has(ioctl::IFF_VNET_HDR),
            multi_queue: has(ioctl::IFF_MULTI_QUEUE),
        })
    }
}

#[cfg(test)]
pub(crate) mod tests;
