//! The connection's thread: serves the server's requests and notices its end.

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;

use rustix::io::Errno;
use zerocopy::IntoBytes;

use super::mappings::Mappings;
use super::{ClientError, DmaHandler, GoneHandler};
use crate::link::{Incoming, Link, LinkFault, Outgoing};
use crate::wire::{Command, DmaAccessMsg, DmaFlags, MAX_DATA_XFER, split};

/// The connection's own thread.
pub(super) struct Watcher {
    pub(super) link: Arc<Link>,
    pub(super) socket: PathBuf,
    pub(super) dma: Option<Arc<dyn DmaHandler>>,
    pub(super) mappings: Arc<Mappings>,
    pub(super) on_gone: Option<GoneHandler>,
    pub(super) gone: OwnedFd,
}

impl Watcher {
    pub(super) fn run(mut self) {
        let mut out = Vec::new();
        let cause = loop {
            let result = match self.link.next_command() {
                Ok(incoming) => {
                    out.clear();
                    let served = self.serve(&incoming, &mut out);
                    let outgoing = Outgoing {
                        fixed: &out,
                        ..Outgoing::default()
                    };
                    self.link.reply(&incoming, served.map(|()| outgoing))
                }
                Err(fault) => Err(fault),
            };
            if let Err(fault) = result {
                break fault;
            }
        };
        if matches!(*cause, LinkFault::ClosedHere) {
            return;
        }
        let error = ClientError::ServerGone {
            socket: self.socket.clone(),
            cause,
        };
        if let Err(error) = rustix::io::write(&self.gone, &1_u64.to_ne_bytes()) {
            tracing::error!(%error, "cannot signal that the vfio-user server is gone");
        }
        if let Some(tell) = self.on_gone.take() {
            tell(&error);
        }
    }

    /// Serves one access of the server to client memory.
    fn serve(&self, incoming: &Incoming, out: &mut Vec<u8>) -> Result<(), Errno> {
        let (message, data) = split::<DmaAccessMsg>(&incoming.payload).ok_or(Errno::INVAL)?;
        let len = usize::try_from(message.count).map_err(|_| Errno::INVAL)?;
        if len > MAX_DATA_XFER || !incoming.fds.is_empty() {
            return Err(Errno::INVAL);
        }
        message
            .address
            .checked_add(message.count)
            .ok_or(Errno::OVERFLOW)?;
        let read = match Command::from_number(incoming.command) {
            Some(Command::DmaRead) if data.is_empty() => true,
            Some(Command::DmaWrite) if data.len() == len => false,
            Some(Command::DmaRead | Command::DmaWrite) => return Err(Errno::INVAL),
            _ => return Err(Errno::NOSYS),
        };
        let dma = self.dma.as_ref().ok_or(Errno::NOTSUP)?;
        let access = if read {
            DmaFlags::READ
        } else {
            DmaFlags::WRITE
        };
        self.mappings
            .check(message.address, message.count, access)?;
        out.extend_from_slice(message.as_bytes());
        if read {
            let head = out.len();
            out.resize(head + len, 0);
            dma.read(message.address, out.get_mut(head..).unwrap_or_default())
        } else {
            dma.write(message.address, data)
        }
    }
}
