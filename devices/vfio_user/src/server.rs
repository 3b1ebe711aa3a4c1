//! The device's end.
//!
//! A device implements [`ServerDevice`]; [`Server`] listens on a socket and serves one client at
//! a time (the next one waits in the socket's backlog), and [`serve`] does the same for one
//! connection that exists already. Whatever a client sends is checked for length, alignment,
//! overflow and order before the device sees it; a device error becomes an error reply; a breach
//! of the protocol ends the connection. After a client has gone the device is detached and reset.

mod dispatch;
mod feature;
mod listener;

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use rustix::io::Errno;
use zerocopy::IntoBytes;

use crate::link::{Expect, Link, LinkFault, Outgoing, RequestError};
use crate::region::{Area, DeviceInfo, IoEventFd, IrqInfo, RegionInfo};
use crate::state::{ArcFailure, MigrationFlags, PrecopyInfo, StateArc};
use crate::version::VersionError;
use crate::wire::{Command, DmaAccessMsg, DmaFlags, MAX_DATA_XFER, split};

pub use listener::{Server, Stopper};

/// How long a client may pause within a message, or take to read a reply.
pub const CLIENT_TIMEOUT: Duration = Duration::from_secs(5);

/// Why a server cannot serve.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The socket cannot be made.
    #[error("cannot listen on {path}: {hint}")]
    Listen {
        /// Where.
        path: String,
        /// What to do.
        hint: &'static str,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The listening socket failed.
    #[error("cannot accept clients")]
    Accept(#[source] std::io::Error),
    /// The client and this server have no version in common.
    #[error("the client was refused")]
    Version(#[from] VersionError),
    /// The connection ended other than by the client closing it.
    #[error("the connection was ended")]
    Connection(#[source] Arc<LinkFault>),
    /// The client did not begin with VERSION.
    #[error("the client's first message was command {0}, not VERSION")]
    NoVersion(u16),
    /// The device could not be reset for the next client.
    #[error("the device could not be reset after its client had gone")]
    Reset(#[source] Errno),
}

/// A range of client memory that becomes known to the device.
#[derive(Debug)]
pub struct DmaMapping {
    /// First IOVA.
    pub iova: u64,
    /// Bytes, never 0; `iova + size` does not overflow.
    pub size: u64,
    /// Access allowed.
    pub flags: DmaFlags,
    /// The file to map and the offset in it; without one the memory is reached by [`ClientMemory`]
    /// only.
    pub file: Option<(OwnedFd, u64)>,
}

/// What is to happen to interrupts.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum IrqAction {
    /// They are masked.
    Mask,
    /// They are unmasked.
    Unmask,
    /// They are triggered; with eventfds: these are signalled from now on.
    Trigger,
}

/// Which of the interrupts named it concerns.
#[derive(Debug)]
pub enum IrqData {
    /// All.
    All,
    /// Those that are true.
    Some(Vec<bool>),
    /// All, each with its eventfd; an empty list takes the eventfds away.
    EventFds(Vec<OwnedFd>),
}

/// SET_IRQS.
#[derive(Debug)]
pub struct IrqRequest {
    /// Interrupt type; exists.
    pub index: u32,
    /// First interrupt.
    pub start: u32,
    /// Number of interrupts; `start + count` is within the type's count. 0 with
    /// [`IrqData::All`] and [`IrqAction::Trigger`] takes all eventfds of the type away.
    pub count: u32,
    /// What to do.
    pub action: IrqAction,
    /// With which; lists have `count` entries, or none for eventfds.
    pub data: IrqData,
}

/// A device behind a server.
///
/// An `Err` is answered with its errno and must leave the device as it was.
pub trait ServerDevice: Send {
    /// What it is.
    fn info(&self) -> DeviceInfo;
    /// One region; `index` is below [`DeviceInfo::num_regions`]. Size 0 where there is none.
    fn region_info(&mut self, index: u32) -> Result<RegionInfo, Errno>;
    /// The offsets of a region whose writes may signal eventfds; empty if there are none.
    fn region_io_fds(&mut self, index: u32) -> Result<Vec<IoEventFd>, Errno>;
    /// One interrupt type; `index` is below [`DeviceInfo::num_irqs`].
    fn irq_info(&mut self, index: u32) -> Result<IrqInfo, Errno>;
    /// Sets up, masks or triggers interrupts.
    fn set_irqs(&mut self, request: IrqRequest) -> Result<(), Errno>;
    /// Reads a region. The access is within it and at most [`MAX_DATA_XFER`] bytes long.
    fn region_read(&mut self, region: u32, offset: u64, data: &mut [u8]) -> Result<(), Errno>;
    /// Writes a region, with the same promises.
    fn region_write(&mut self, region: u32, offset: u64, data: &[u8]) -> Result<(), Errno>;
    /// Takes over client memory. Overlap with a present mapping is the device's to refuse
    /// (EEXIST).
    fn dma_map(&mut self, mapping: DmaMapping) -> Result<(), Errno>;
    /// Gives client memory back: on return it is not accessed any more. `iova` and `size` must be
    /// those of one mapping.
    fn dma_unmap(&mut self, iova: u64, size: u64) -> Result<(), Errno>;
    /// Resets it: as after power-on, running, with its mappings and interrupts kept.
    fn reset(&mut self) -> Result<(), Errno>;
    /// Its migration, if it has one.
    fn migration(&mut self) -> Option<&mut dyn MigrationDevice>;
    /// Its dirty log, if it has one.
    fn dma_log(&mut self) -> Option<&mut dyn DmaLogDevice>;
    /// A client is there.
    fn attach(&mut self, memory: ClientMemory);
    /// The client has gone: all its mappings and eventfds are dropped, the log is stopped.
    /// [`reset`](Self::reset) follows.
    fn detach(&mut self);
}

/// Migration of a device. The server walks the state table; the device does the single arcs.
pub trait MigrationDevice {
    /// What it can.
    fn flags(&self) -> MigrationFlags;
    /// Goes over one arc. Complete on return.
    fn arc(&mut self, arc: StateArc) -> Result<(), ArcFailure>;
    /// Reads migration data in a saving state; fewer bytes than asked for mean that there is no
    /// more now (pre-copy) or at all (stop-copy).
    fn read_data(&mut self, data: &mut [u8]) -> Result<usize, Errno>;
    /// Takes migration data in RESUMING.
    fn write_data(&mut self, data: &[u8]) -> Result<(), Errno>;
    /// Estimate of the bytes that are left to read if it is stopped now, those that could be read
    /// before included.
    fn stop_copy_size(&mut self) -> Result<u64, Errno>;
    /// What there is to read in PRE_COPY and PRE_COPY_P2P, the only states in which it is asked.
    fn precopy_info(&mut self) -> Result<PrecopyInfo, Errno>;
}

/// The dirty log of a device's DMA writes.
pub trait DmaLogDevice {
    /// Starts logging, with everything clean. `page_size` is a power of two and a wish; the one
    /// chosen is returned. `ranges` are sorted, aligned and apart; empty means all memory.
    fn start(&mut self, page_size: u64, ranges: &[Area]) -> Result<u64, Errno>;
    /// Stops logging; no error if it does not log.
    fn stop(&mut self) -> Result<(), Errno>;
    /// ORs into `words` which pages of `page_size` (a power of two, 4 KiB or more) in the range
    /// were written since the last report, and forgets them. Bit n is the page at
    /// `iova + n * page_size`. An error must not lose bits.
    fn report(
        &mut self,
        iova: u64,
        length: u64,
        page_size: u64,
        words: &mut [u64],
    ) -> Result<(), Errno>;
}

/// Access to client memory by messages, for mappings that came without a file.
///
/// May be used by any thread. Whether such writes appear in the dirty log is not specified by the
/// protocol: our client marks them itself.
#[derive(Clone)]
pub struct ClientMemory {
    link: Arc<Link>,
    limit: usize,
    timeout: Duration,
}

impl ClientMemory {
    /// Fills `data` from `iova`.
    ///
    /// # Errors
    /// What the client answered; ENOTCONN if it has gone.
    pub fn read(&self, iova: u64, data: &mut [u8]) -> Result<(), Errno> {
        let mut reply = Vec::new();
        let mut at = iova;
        for chunk in data.chunks_mut(self.limit) {
            let len = u64::try_from(chunk.len()).map_err(|_| Errno::INVAL)?;
            let message = DmaAccessMsg {
                address: at,
                count: len,
            };
            let payload = size_of::<DmaAccessMsg>() + chunk.len();
            let got = self.request(Command::DmaRead, &message, &[], payload, &mut reply)?;
            let bytes = reply.get(..got).unwrap_or_default();
            let (head, bytes) = split::<DmaAccessMsg>(bytes).ok_or(Errno::PROTO)?;
            if head.count != len || bytes.len() != chunk.len() {
                return Err(Errno::PROTO);
            }
            chunk.copy_from_slice(bytes);
            at = at.checked_add(len).ok_or(Errno::OVERFLOW)?;
        }
        Ok(())
    }

    /// Writes `data` to `iova`.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn write(&self, iova: u64, data: &[u8]) -> Result<(), Errno> {
        let mut reply = Vec::new();
        let mut at = iova;
        for chunk in data.chunks(self.limit) {
            let len = u64::try_from(chunk.len()).map_err(|_| Errno::INVAL)?;
            let message = DmaAccessMsg {
                address: at,
                count: len,
            };
            let payload = size_of::<DmaAccessMsg>();
            self.request(Command::DmaWrite, &message, chunk, payload, &mut reply)?;
            at = at.checked_add(len).ok_or(Errno::OVERFLOW)?;
        }
        Ok(())
    }

    fn request(
        &self,
        command: Command,
        message: &DmaAccessMsg,
        data: &[u8],
        payload: usize,
        reply: &mut Vec<u8>,
    ) -> Result<usize, Errno> {
        let outgoing = Outgoing {
            fixed: message.as_bytes(),
            data,
            fds: &[],
        };
        let expect = Expect {
            payload,
            fds: 0,
            timeout: self.timeout,
        };
        match self.link.request(command, outgoing, expect, reply) {
            Ok((len, _)) => Ok(len),
            Err(RequestError::Refused(errno)) => Err(errno),
            Err(RequestError::Gone(_)) => Err(Errno::NOTCONN),
        }
    }
}

/// Serves one client on a connected socket until it closes the connection, then detaches and
/// resets the device.
///
/// # Errors
/// [`ServerError`]; the device is detached and reset all the same.
pub fn serve(stream: UnixStream, device: &mut dyn ServerDevice) -> Result<(), ServerError> {
    serve_link(&Arc::new(Link::new(stream, CLIENT_TIMEOUT)), device)
}

fn serve_link(link: &Arc<Link>, device: &mut dyn ServerDevice) -> Result<(), ServerError> {
    let served = dispatch::Session::open(link, &mut *device).and_then(dispatch::Session::run);
    link.close();
    device.detach();
    let reset = device.reset().map_err(ServerError::Reset);
    match served {
        Ok(()) => reset,
        Err(error) => {
            if let Err(reset) = reset {
                tracing::error!(error = %reset, "device is left as it was");
            }
            Err(error)
        }
    }
}

fn client_memory(link: &Arc<Link>, limit: usize) -> ClientMemory {
    ClientMemory {
        link: Arc::clone(link),
        limit: limit.clamp(1, MAX_DATA_XFER),
        timeout: CLIENT_TIMEOUT,
    }
}
