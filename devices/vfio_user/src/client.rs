//! The VMM's end.
//!
//! A [`Client`] may be used by any number of threads. Every call ends within its time limit: with
//! the reply, with the server's errno ([`ClientError::Refused`]), or with
//! [`ClientError::ServerGone`] that names the socket. A connection that failed once stays failed.
//! One thread waits for what the server sends unasked (accesses to client memory) and notices
//! when it dies.

mod error;
mod mappings;
mod migration;
mod watcher;

pub use error::ClientError;
use mappings::{Mapping, Mappings};
pub use migration::FeatureOperation;
use watcher::Watcher;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use parking_lot::Mutex;
use rustix::event::EventfdFlags;
use rustix::io::Errno;
use zerocopy::{FromBytes, IntoBytes};

use crate::link::{Expect, Link, LinkFault, Outgoing, RequestError};
use crate::region::{
    DeviceInfo, IoEventFd, IrqInfo, MAX_IO_FDS_REPLY, Malformed, RegionInfo, decode_io_fds,
    decode_region,
};
use crate::server::IrqAction;
use crate::version::{self, Capabilities};
use crate::wire::{
    Command, DeviceFlags, DeviceInfoMsg, DmaFlags, DmaMapMsg, DmaUnmapMsg, IRQ_ACTION_MASK,
    IRQ_ACTION_TRIGGER, IRQ_ACTION_UNMASK, IRQ_DATA_EVENTFD, IRQ_DATA_NONE, IrqFlags, IrqInfoMsg,
    MAX_MSG_FDS, MAX_REGION_INFO, MAX_VERSION_DATA, RegionAccessMsg, RegionInfoMsg, RegionIoFdsMsg,
    SetIrqsMsg, VERSION_MINOR, argsz, split,
};

/// Buffers kept for replies; more are made when more threads ask at once.
const KEPT_BUFFERS: usize = 8;

/// Serves the server's accesses to client memory that has no file.
///
/// Called on the connection's own thread, for memory that is mapped for such an access only; must
/// not call the client.
pub trait DmaHandler: Send + Sync {
    /// Fills `data` from `iova`.
    fn read(&self, iova: u64, data: &mut [u8]) -> Result<(), Errno>;
    /// Writes `data` to `iova` and marks it in the VMM's dirty log: the server need not.
    fn write(&self, iova: u64, data: &[u8]) -> Result<(), Errno>;
}

/// What runs on the connection's thread.
pub type ThreadBody = Box<dyn FnOnce() + Send>;
/// Starts a thread of the given name.
pub type SpawnThread = Box<dyn FnOnce(&str, ThreadBody) -> io::Result<JoinHandle<()>> + Send>;
/// Told once, on the connection's thread, when the server is gone.
pub type GoneHandler = Box<dyn FnOnce(&ClientError) + Send>;

/// Settings of a connection.
pub struct ClientConfig {
    /// Time limit of a request.
    pub timeout: Duration,
    /// Time limit of those that may move much: migration states, reset, DMA mappings, log start.
    pub transition_timeout: Duration,
    /// Who serves the server's memory accesses; without one they are refused with ENOTSUP.
    pub dma: Option<Arc<dyn DmaHandler>>,
    /// Who is told when the server is gone, besides [`Client::gone_event`].
    pub on_gone: Option<GoneHandler>,
    /// How the connection's thread is started.
    pub spawn: SpawnThread,
}

impl Default for ClientConfig {
    /// 5 s, 10 s, nobody, and `std::thread`.
    fn default() -> Self {
        Self {
            timeout: Duration::from_secs(5),
            transition_timeout: Duration::from_secs(10),
            dma: None,
            on_gone: None,
            spawn: Box::new(|name, body| {
                std::thread::Builder::new()
                    .name(name.to_owned())
                    .spawn(body)
            }),
        }
    }
}

/// A connection to a device.
pub struct Client {
    link: Arc<Link>,
    socket: PathBuf,
    server: Capabilities,
    timeout: Duration,
    transition_timeout: Duration,
    mappings: Arc<Mappings>,
    buffers: Mutex<Vec<Vec<u8>>>,
    gone: OwnedFd,
    thread: Option<JoinHandle<()>>,
}

impl Client {
    /// Connects to the server at `socket` and agrees on the version.
    ///
    /// # Errors
    /// [`ClientError::Connect`], [`ClientError::Version`], [`ClientError::ServerGone`].
    pub fn connect(socket: &Path, config: ClientConfig) -> Result<Self, ClientError> {
        let stream = connect(socket, config.timeout).map_err(|errno| ClientError::Connect {
            socket: socket.to_owned(),
            source: errno.into(),
        })?;
        Self::from_stream(stream, socket, config)
    }

    /// The same over a connected stream; `socket` is its name in errors.
    ///
    /// # Errors
    /// [`ClientError::Version`], [`ClientError::ServerGone`], [`ClientError::Setup`].
    pub fn from_stream(
        stream: UnixStream,
        socket: &Path,
        config: ClientConfig,
    ) -> Result<Self, ClientError> {
        let link = Arc::new(Link::new(stream, config.timeout));
        let gone = rustix::event::eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)
            .map_err(|errno| ClientError::Setup(errno.into()))?;
        let mut client = Self {
            link,
            socket: socket.to_owned(),
            server: Capabilities::default(),
            timeout: config.timeout,
            transition_timeout: config.transition_timeout,
            mappings: Arc::default(),
            buffers: Mutex::new(Vec::new()),
            gone,
            thread: None,
        };
        client.negotiate()?;
        let watcher = Watcher {
            link: Arc::clone(&client.link),
            socket: client.socket.clone(),
            dma: config.dma,
            mappings: Arc::clone(&client.mappings),
            on_gone: config.on_gone,
            gone: client.gone.try_clone().map_err(ClientError::Setup)?,
        };
        let body = Box::new(move || watcher.run());
        let thread = (config.spawn)("vfio-user", body).map_err(ClientError::Setup)?;
        client.thread = Some(thread);
        Ok(client)
    }

    fn negotiate(&mut self) -> Result<(), ClientError> {
        let payload = version::encode(VERSION_MINOR, &Capabilities::ours());
        let outgoing = Outgoing {
            fixed: &payload,
            ..Outgoing::default()
        };
        let expect = self.expect(4 + MAX_VERSION_DATA);
        let server = self.call(Command::Version, outgoing, expect, |reply, _| {
            Ok(version::accept(reply))
        });
        let server = server.map_err(|error| match error {
            ClientError::ServerGone { socket, cause }
                if matches!(*cause, LinkFault::NoReply { .. }) =>
            {
                ClientError::Busy { socket }
            }
            other => other,
        })?;
        self.server = server.map_err(|source| ClientError::Version {
            socket: self.socket.clone(),
            source,
        })?;
        Ok(())
    }

    /// The socket's path.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// What the server says of itself.
    pub const fn server(&self) -> &Capabilities {
        &self.server
    }

    /// An eventfd that is signalled when the server is gone.
    pub fn gone_event(&self) -> BorrowedFd<'_> {
        self.gone.as_fd()
    }

    /// Why the server is gone, if it is.
    pub fn gone(&self) -> Option<ClientError> {
        self.link.fault().map(|cause| self.gone_error(cause))
    }

    fn gone_error(&self, cause: Arc<LinkFault>) -> ClientError {
        ClientError::ServerGone {
            socket: self.socket.clone(),
            cause,
        }
    }

    fn expect(&self, payload: usize) -> Expect {
        Expect {
            payload,
            fds: 0,
            timeout: self.timeout,
        }
    }

    fn expect_slow(&self, payload: usize) -> Expect {
        Expect {
            timeout: self.transition_timeout,
            ..self.expect(payload)
        }
    }

    /// Makes a request and gives the reply's payload and descriptors to `parse`.
    fn call<T>(
        &self,
        command: Command,
        outgoing: Outgoing<'_>,
        expect: Expect,
        parse: impl FnOnce(&[u8], Vec<OwnedFd>) -> Result<T, Malformed>,
    ) -> Result<T, ClientError> {
        let mut buffer = self.buffers.lock().pop().unwrap_or_default();
        let result = self.link.request(command, outgoing, expect, &mut buffer);
        let parsed = match result {
            Ok((len, fds)) => parse(buffer.get(..len).unwrap_or_default(), fds)
                .map_err(|Malformed(reason)| ClientError::BadReply { command, reason }),
            Err(RequestError::Refused(errno)) => Err(ClientError::Refused { command, errno }),
            Err(RequestError::Gone(cause)) => Err(self.gone_error(cause)),
        };
        let mut buffers = self.buffers.lock();
        if buffers.len() < KEPT_BUFFERS {
            buffers.push(buffer);
        }
        parsed
    }

    /// A request of one structure answered by one structure.
    fn ask<T: FromBytes>(
        &self,
        command: Command,
        message: &(impl IntoBytes + zerocopy::Immutable),
    ) -> Result<T, ClientError> {
        let expect = self.expect(size_of::<T>());
        self.call(command, fixed(message), expect, |reply, _| {
            T::read_from_bytes(reply).map_err(|_| Malformed("it has another length"))
        })
    }

    /// What the device is.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn info(&self) -> Result<DeviceInfo, ClientError> {
        let message = DeviceInfoMsg {
            argsz: argsz(size_of::<DeviceInfoMsg>()),
            flags: 0,
            num_regions: 0,
            num_irqs: 0,
        };
        let reply: DeviceInfoMsg = self.ask(Command::GetInfo, &message)?;
        Ok(DeviceInfo {
            flags: DeviceFlags::from_bits_truncate(reply.flags),
            num_regions: reply.num_regions,
            num_irqs: reply.num_irqs,
        })
    }

    /// One region.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn region_info(&self, index: u32) -> Result<RegionInfo, ClientError> {
        let message = RegionInfoMsg {
            argsz: argsz(MAX_REGION_INFO),
            flags: 0,
            index,
            cap_offset: 0,
            size: 0,
            offset: 0,
        };
        let expect = Expect {
            fds: MAX_MSG_FDS,
            ..self.expect(MAX_REGION_INFO)
        };
        self.call(
            Command::GetRegionInfo,
            fixed(&message),
            expect,
            |reply, fds| decode_region(index, reply, fds),
        )
    }

    /// The offsets of a region of `size` bytes whose writes may signal eventfds instead.
    ///
    /// # Errors
    /// [`ClientError`]; many servers refuse this altogether.
    pub fn region_io_fds(&self, index: u32, size: u64) -> Result<Vec<IoEventFd>, ClientError> {
        let message = RegionIoFdsMsg {
            argsz: argsz(MAX_IO_FDS_REPLY),
            flags: 0,
            index,
            count: 0,
        };
        let expect = Expect {
            fds: MAX_MSG_FDS,
            ..self.expect(MAX_IO_FDS_REPLY)
        };
        let command = Command::GetRegionIoFds;
        self.call(command, fixed(&message), expect, |reply, fds| {
            decode_io_fds(index, size, reply, &fds)
        })
    }

    /// One interrupt type.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn irq_info(&self, index: u32) -> Result<IrqInfo, ClientError> {
        let message = IrqInfoMsg {
            argsz: argsz(size_of::<IrqInfoMsg>()),
            flags: 0,
            index,
            count: 0,
        };
        let reply: IrqInfoMsg = self.ask(Command::GetIrqInfo, &message)?;
        if reply.index != index {
            return Err(ClientError::BadReply {
                command: Command::GetIrqInfo,
                reason: "the interrupt info is of another type",
            });
        }
        Ok(IrqInfo {
            flags: IrqFlags::from_bits_truncate(reply.flags),
            count: reply.count,
        })
    }

    /// Has the interrupts from `start` on signal `eventfds`, in as many messages as it takes.
    ///
    /// # Errors
    /// [`ClientError`]; the first ones may be set up then.
    pub fn set_irq_eventfds(
        &self,
        index: u32,
        start: u32,
        eventfds: &[BorrowedFd<'_>],
    ) -> Result<(), ClientError> {
        let mut at = start;
        for fds in eventfds.chunks(self.server.fds().max(1)) {
            let count = argsz(fds.len());
            let message = SetIrqsMsg {
                argsz: argsz(size_of::<SetIrqsMsg>()),
                flags: IRQ_DATA_EVENTFD | IRQ_ACTION_TRIGGER,
                index,
                start: at,
                count,
            };
            let outgoing = Outgoing {
                fds,
                ..fixed(&message)
            };
            let expect = self.expect(0);
            self.call(Command::SetIrqs, outgoing, expect, |_, _| Ok(()))?;
            at = at.checked_add(count).ok_or(ClientError::Argument {
                command: Command::SetIrqs,
                reason: "interrupt numbers run past 2^32",
            })?;
        }
        Ok(())
    }

    /// Takes the eventfds of all interrupts of a type away.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn clear_irqs(&self, index: u32) -> Result<(), ClientError> {
        self.irq_action(index, 0, 0, IrqAction::Trigger)
    }

    /// Masks, unmasks or triggers `count` interrupts from `start` on.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn irq_action(
        &self,
        index: u32,
        start: u32,
        count: u32,
        action: IrqAction,
    ) -> Result<(), ClientError> {
        let action = match action {
            IrqAction::Mask => IRQ_ACTION_MASK,
            IrqAction::Unmask => IRQ_ACTION_UNMASK,
            IrqAction::Trigger => IRQ_ACTION_TRIGGER,
        };
        let message = SetIrqsMsg {
            argsz: argsz(size_of::<SetIrqsMsg>()),
            flags: IRQ_DATA_NONE | action,
            index,
            start,
            count,
        };
        let expect = self.expect(0);
        self.call(Command::SetIrqs, fixed(&message), expect, |_, _| Ok(()))
    }

    /// Reads a region.
    ///
    /// # Errors
    /// [`ClientError`]; the contents of `data` are undefined then.
    pub fn region_read(
        &self,
        region: u32,
        offset: u64,
        data: &mut [u8],
    ) -> Result<(), ClientError> {
        let command = Command::RegionRead;
        let mut at = offset;
        for chunk in data.chunks_mut(self.server.data_xfer()) {
            let message = access(command, region, at, chunk.len())?;
            let expect = self.expect(size_of::<RegionAccessMsg>() + chunk.len());
            self.call(command, fixed(&message), expect, |reply, _| {
                let (head, bytes) =
                    split::<RegionAccessMsg>(reply).ok_or(Malformed("it is too short"))?;
                if head.count != message.count || bytes.len() != chunk.len() {
                    return Err(Malformed("it has another length than was asked for"));
                }
                chunk.copy_from_slice(bytes);
                Ok(())
            })?;
            at = next_offset(command, at, message.count)?;
        }
        Ok(())
    }

    /// Writes a region.
    ///
    /// # Errors
    /// [`ClientError`]; of more than one message's data the first part may be written.
    pub fn region_write(&self, region: u32, offset: u64, data: &[u8]) -> Result<(), ClientError> {
        let command = Command::RegionWrite;
        let mut at = offset;
        for chunk in data.chunks(self.server.data_xfer()) {
            let message = access(command, region, at, chunk.len())?;
            let outgoing = Outgoing {
                data: chunk,
                ..fixed(&message)
            };
            let expect = self.expect(size_of::<RegionAccessMsg>());
            self.call(command, outgoing, expect, |reply, _| {
                let (head, _) =
                    split::<RegionAccessMsg>(reply).ok_or(Malformed("it is too short"))?;
                if head.count != message.count {
                    return Err(Malformed("it wrote another length than was asked for"));
                }
                Ok(())
            })?;
            at = next_offset(command, at, message.count)?;
        }
        Ok(())
    }

    /// Makes `size` bytes of memory known to the device at `iova`, with the file that holds them
    /// and the offset in it; without a file the [`DmaHandler`] serves them.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn dma_map(
        &self,
        iova: u64,
        size: u64,
        flags: DmaFlags,
        file: Option<(BorrowedFd<'_>, u64)>,
    ) -> Result<(), ClientError> {
        let message = DmaMapMsg {
            argsz: argsz(size_of::<DmaMapMsg>()),
            flags: flags.bits(),
            offset: file.map_or(0, |(_, offset)| offset),
            address: iova,
            size,
        };
        let fds: Vec<BorrowedFd<'_>> = file.into_iter().map(|(fd, _)| fd).collect();
        let outgoing = Outgoing {
            fds: &fds,
            ..fixed(&message)
        };
        let expect = self.expect_slow(0);
        // Known before the server is, which may access it before its reply is read.
        self.mappings.add(Mapping { iova, size, flags });
        let mapped = self.call(Command::DmaMap, outgoing, expect, |_, _| Ok(()));
        if mapped.is_err() {
            self.mappings.remove(iova, size);
        }
        mapped
    }

    /// Takes memory away from the device again. On return it does not access it any more.
    ///
    /// # Errors
    /// [`ClientError`]; the memory must be thought to be accessed still.
    pub fn dma_unmap(&self, iova: u64, size: u64) -> Result<(), ClientError> {
        let message = DmaUnmapMsg {
            argsz: argsz(size_of::<DmaUnmapMsg>()),
            flags: 0,
            address: iova,
            size,
        };
        let expect = self.expect_slow(size_of::<DmaUnmapMsg>());
        self.call(Command::DmaUnmap, fixed(&message), expect, |_, _| Ok(()))?;
        self.mappings.remove(iova, size);
        Ok(())
    }

    /// Resets the device; its migration state is RUNNING then.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn reset(&self) -> Result<(), ClientError> {
        let expect = self.expect_slow(0);
        self.call(Command::Reset, Outgoing::default(), expect, |_, _| Ok(()))
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.link.close();
        if let Some(thread) = self.thread.take()
            && thread.thread().id() != std::thread::current().id()
            && thread.join().is_err()
        {
            tracing::error!("the vfio-user connection's thread panicked");
        }
    }
}

/// Connects within `timeout`: a plain `connect` waits for as long as the server's backlog is full.
fn connect(socket: &Path, timeout: Duration) -> Result<UnixStream, Errno> {
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, sockopt};
    let kind = SocketType::STREAM;
    let stream = rustix::net::socket_with(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None)?;
    sockopt::set_socket_timeout(&stream, sockopt::Timeout::Send, Some(timeout))?;
    rustix::net::connect(&stream, &SocketAddrUnix::new(socket)?)?;
    Ok(stream.into())
}

fn fixed(message: &(impl IntoBytes + zerocopy::Immutable)) -> Outgoing<'_> {
    Outgoing {
        fixed: message.as_bytes(),
        ..Outgoing::default()
    }
}

fn access(
    command: Command,
    region: u32,
    offset: u64,
    len: usize,
) -> Result<RegionAccessMsg, ClientError> {
    let count = u32::try_from(len).map_err(|_| ClientError::Argument {
        command,
        reason: "an access is longer than 4 GiB",
    })?;
    Ok(RegionAccessMsg {
        offset,
        region,
        count,
    })
}

fn next_offset(command: Command, at: u64, count: u32) -> Result<u64, ClientError> {
    at.checked_add(u64::from(count))
        .ok_or(ClientError::Argument {
            command,
            reason: "an access runs past 2^64",
        })
}
