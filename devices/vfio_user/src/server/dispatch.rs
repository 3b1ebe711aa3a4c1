//! One client's connection: from a checked message to a call of the device.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::io::Errno;
use zerocopy::{FromBytes, IntoBytes};

use super::{DmaMapping, IrqAction, IrqData, IrqRequest, ServerDevice, ServerError, client_memory};
use crate::link::{Incoming, Link, LinkFault, Outgoing};
use crate::region::{RegionInfo, encode_io_fds, encode_region};
use crate::state::Machine;
use crate::transport::TransportError;
use crate::version::{self, Capabilities};
use crate::wire::{
    Command, DeviceInfoMsg, DmaFlags, DmaMapMsg, DmaUnmapMsg, IRQ_ACTION_MASK, IRQ_ACTION_TRIGGER,
    IRQ_ACTION_UNMASK, IRQ_DATA_BOOL, IRQ_DATA_EVENTFD, IRQ_DATA_NONE, IrqInfoMsg, MAX_DATA_XFER,
    MigDataMsg, MultiWriteMsg, RegionAccessMsg, RegionInfoMsg, RegionIoFdsMsg, SetIrqsMsg, argsz,
    split,
};

/// A connection whose version is agreed.
pub(super) struct Session<'a> {
    link: &'a Arc<Link>,
    pub(super) device: &'a mut dyn ServerDevice,
    peer: Capabilities,
    pub(super) machine: Option<Machine>,
    pub(super) logging: bool,
    /// Payload of the reply being made; kept from message to message.
    pub(super) out: Vec<u8>,
    /// Bitmap of the reply being made, sent after `out`.
    pub(super) words: Vec<u64>,
}

impl<'a> Session<'a> {
    /// Agrees on the version and attaches the device.
    pub(super) fn open(
        link: &'a Arc<Link>,
        device: &'a mut dyn ServerDevice,
    ) -> Result<Self, ServerError> {
        let first = link.next_command().map_err(ServerError::Connection)?;
        if Command::from_number(first.command) != Some(Command::Version) {
            // The client is told; that it may not listen changes nothing.
            let _ = link.reply(&first, Err(Errno::INVAL));
            return Err(ServerError::NoVersion(first.command));
        }
        let (payload, peer) = match version::answer(&first.payload) {
            Ok(answer) => answer,
            Err(error) => {
                let _ = link.reply(&first, Err(Errno::INVAL));
                return Err(error.into());
            }
        };
        device.attach(client_memory(link, peer.data_xfer()));
        let machine = device
            .migration()
            .map(|migration| Machine::new(migration.flags()));
        let outgoing = Outgoing {
            fixed: &payload,
            ..Outgoing::default()
        };
        link.reply(&first, Ok(outgoing))
            .map_err(ServerError::Connection)?;
        Ok(Self {
            link,
            device,
            peer,
            machine,
            logging: false,
            out: Vec::new(),
            words: Vec::new(),
        })
    }

    /// Serves until the client closes the connection.
    pub(super) fn run(mut self) -> Result<(), ServerError> {
        loop {
            let mut incoming = match self.link.next_command() {
                Ok(incoming) => incoming,
                Err(fault) => return ended(fault),
            };
            self.out.clear();
            self.words.clear();
            let result = self.handle(&mut incoming);
            if let Err(errno) = &result {
                tracing::debug!(command = incoming.command, %errno, "command refused");
            }
            let sent = match &result {
                Ok(fds) => {
                    let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
                    let outgoing = Outgoing {
                        fixed: &self.out,
                        data: self.words.as_bytes(),
                        fds: &fds,
                    };
                    self.link.reply(&incoming, Ok(outgoing))
                }
                Err(errno) => self.link.reply(&incoming, Err(*errno)),
            };
            if let Err(fault) = sent {
                return ended(fault);
            }
        }
    }

    /// Does one command; the reply's payload is left in `out` and `words`.
    fn handle(&mut self, incoming: &mut Incoming) -> Result<Vec<OwnedFd>, Errno> {
        let command = Command::from_number(incoming.command).ok_or(Errno::NOSYS)?;
        let fds = std::mem::take(&mut incoming.fds);
        let takes_fds = matches!(command, Command::DmaMap | Command::SetIrqs);
        if !takes_fds && !fds.is_empty() {
            return Err(Errno::INVAL);
        }
        let payload = incoming.payload.as_slice();
        match command {
            Command::DmaMap => self.dma_map(payload, fds)?,
            Command::DmaUnmap => self.dma_unmap(payload)?,
            Command::GetInfo => self.info(payload)?,
            Command::GetRegionInfo => return self.region_info(payload),
            Command::GetRegionIoFds => return self.region_io_fds(payload),
            Command::GetIrqInfo => self.irq_info(payload)?,
            Command::SetIrqs => self.set_irqs(payload, fds)?,
            Command::RegionRead => self.region_read(payload)?,
            Command::RegionWrite => self.region_write(payload)?,
            Command::RegionWriteMulti => self.region_write_multi(payload)?,
            Command::Reset => self.reset()?,
            Command::DeviceFeature => self.feature(payload)?,
            Command::MigDataRead => self.mig_read(payload)?,
            Command::MigDataWrite => self.mig_write(payload)?,
            // A second VERSION, and what only servers send.
            Command::Version | Command::DmaRead | Command::DmaWrite => return Err(Errno::INVAL),
        }
        Ok(Vec::new())
    }

    fn dma_map(&mut self, payload: &[u8], mut fds: Vec<OwnedFd>) -> Result<(), Errno> {
        let message = exact::<DmaMapMsg>(payload)?;
        let flags = DmaFlags::from_bits(message.flags)
            .filter(|flags| !flags.is_empty())
            .ok_or(Errno::INVAL)?;
        if fds.len() > 1 || message.size == 0 {
            return Err(Errno::INVAL);
        }
        let overflows = message.address.checked_add(message.size - 1).is_none()
            || message.offset.checked_add(message.size).is_none();
        if overflows {
            return Err(Errno::OVERFLOW);
        }
        self.device.dma_map(DmaMapping {
            iova: message.address,
            size: message.size,
            flags,
            file: fds.pop().map(|fd| (fd, message.offset)),
        })
    }

    fn dma_unmap(&mut self, payload: &[u8]) -> Result<(), Errno> {
        let message = exact::<DmaUnmapMsg>(payload)?;
        // Flags asked for a dirty bitmap once; answering without one would lose it.
        if message.flags != 0 {
            return Err(Errno::INVAL);
        }
        self.device.dma_unmap(message.address, message.size)?;
        self.put(&message);
        Ok(())
    }

    fn info(&mut self, payload: &[u8]) -> Result<(), Errno> {
        exact::<DeviceInfoMsg>(payload)?;
        let info = self.device.info();
        self.put(&DeviceInfoMsg {
            argsz: argsz(size_of::<DeviceInfoMsg>()),
            flags: info.flags.bits(),
            num_regions: info.num_regions,
            num_irqs: info.num_irqs,
        });
        Ok(())
    }

    fn region_info(&mut self, payload: &[u8]) -> Result<Vec<OwnedFd>, Errno> {
        let message = exact::<RegionInfoMsg>(payload)?;
        let limit = usize::try_from(message.argsz).map_err(|_| Errno::INVAL)?;
        if limit < size_of::<RegionInfoMsg>() {
            return Err(Errno::INVAL);
        }
        let info = self.region(message.index)?;
        let (payload, fds) = encode_region(message.index, info, limit);
        self.out = payload;
        Ok(fds)
    }

    fn region(&mut self, index: u32) -> Result<RegionInfo, Errno> {
        if index >= self.device.info().num_regions {
            return Err(Errno::INVAL);
        }
        self.device.region_info(index)
    }

    fn region_io_fds(&mut self, payload: &[u8]) -> Result<Vec<OwnedFd>, Errno> {
        let message = exact::<RegionIoFdsMsg>(payload)?;
        let limit = usize::try_from(message.argsz).map_err(|_| Errno::INVAL)?;
        if message.flags != 0 || message.count != 0 || limit < size_of::<RegionIoFdsMsg>() {
            return Err(Errno::INVAL);
        }
        if message.index >= self.device.info().num_regions {
            return Err(Errno::INVAL);
        }
        let entries = self.device.region_io_fds(message.index)?;
        let (payload, fds) = encode_io_fds(message.index, entries, limit, self.peer.fds());
        self.out = payload;
        Ok(fds)
    }

    fn irq_info(&mut self, payload: &[u8]) -> Result<(), Errno> {
        let message = exact::<IrqInfoMsg>(payload)?;
        if message.index >= self.device.info().num_irqs {
            return Err(Errno::INVAL);
        }
        let info = self.device.irq_info(message.index)?;
        self.put(&IrqInfoMsg {
            argsz: argsz(size_of::<IrqInfoMsg>()),
            flags: info.flags.bits(),
            index: message.index,
            count: info.count,
        });
        Ok(())
    }

    fn set_irqs(&mut self, payload: &[u8], fds: Vec<OwnedFd>) -> Result<(), Errno> {
        let (message, data) = split::<SetIrqsMsg>(payload).ok_or(Errno::INVAL)?;
        if message.index >= self.device.info().num_irqs {
            return Err(Errno::INVAL);
        }
        let total = self.device.irq_info(message.index)?.count;
        let end = message.start.checked_add(message.count);
        if end.is_none_or(|end| end > total) {
            return Err(Errno::INVAL);
        }
        let action = match message.flags & !(IRQ_DATA_NONE | IRQ_DATA_BOOL | IRQ_DATA_EVENTFD) {
            IRQ_ACTION_MASK => IrqAction::Mask,
            IRQ_ACTION_UNMASK => IrqAction::Unmask,
            IRQ_ACTION_TRIGGER => IrqAction::Trigger,
            _ => return Err(Errno::INVAL),
        };
        let count = usize::try_from(message.count).map_err(|_| Errno::INVAL)?;
        let kind = message.flags & (IRQ_DATA_NONE | IRQ_DATA_BOOL | IRQ_DATA_EVENTFD);
        let lengths = (data.len(), fds.len());
        let data = match kind {
            IRQ_DATA_NONE if lengths == (0, 0) => IrqData::All,
            IRQ_DATA_BOOL if lengths == (count, 0) => {
                IrqData::Some(data.iter().map(|byte| *byte != 0).collect())
            }
            IRQ_DATA_EVENTFD if lengths == (0, count) || lengths == (0, 0) => {
                IrqData::EventFds(fds)
            }
            _ => return Err(Errno::INVAL),
        };
        self.device.set_irqs(IrqRequest {
            index: message.index,
            start: message.start,
            count: message.count,
            action,
            data,
        })
    }

    /// Checks that an access lies in its region and gives its length.
    fn check_access(&mut self, region: u32, offset: u64, count: u32) -> Result<usize, Errno> {
        let size = self.region(region)?.size;
        let end = offset.checked_add(u64::from(count));
        if end.is_none_or(|end| end > size) {
            return Err(Errno::INVAL);
        }
        let len = usize::try_from(count).map_err(|_| Errno::INVAL)?;
        if len > self.peer.data_xfer().min(MAX_DATA_XFER) {
            return Err(Errno::INVAL);
        }
        Ok(len)
    }

    fn region_read(&mut self, payload: &[u8]) -> Result<(), Errno> {
        let message = exact::<RegionAccessMsg>(payload)?;
        let len = self.check_access(message.region, message.offset, message.count)?;
        self.put(&message);
        let head = self.out.len();
        self.out.resize(head + len, 0);
        let data = self.out.get_mut(head..).unwrap_or_default();
        self.device
            .region_read(message.region, message.offset, data)
    }

    fn region_write(&mut self, payload: &[u8]) -> Result<(), Errno> {
        let (message, data) = split::<RegionAccessMsg>(payload).ok_or(Errno::INVAL)?;
        let len = self.check_access(message.region, message.offset, message.count)?;
        if data.len() != len {
            return Err(Errno::INVAL);
        }
        self.device
            .region_write(message.region, message.offset, data)?;
        self.put(&message);
        Ok(())
    }

    fn region_write_multi(&mut self, payload: &[u8]) -> Result<(), Errno> {
        let (count, mut rest) = split::<u64>(payload).ok_or(Errno::INVAL)?;
        let expected = usize::try_from(count)
            .ok()
            .and_then(|count| count.checked_mul(size_of::<MultiWriteMsg>()));
        if expected != Some(rest.len()) {
            return Err(Errno::INVAL);
        }
        while let Some((write, after)) = split::<MultiWriteMsg>(rest) {
            rest = after;
            let len = self.check_access(write.region, write.offset, write.count)?;
            let data = write.data.get(..len).ok_or(Errno::INVAL)?;
            self.device.region_write(write.region, write.offset, data)?;
        }
        self.put(&count);
        Ok(())
    }

    fn reset(&mut self) -> Result<(), Errno> {
        self.device.reset()?;
        if let Some(machine) = &mut self.machine {
            machine.reset();
        }
        Ok(())
    }

    fn mig_read(&mut self, payload: &[u8]) -> Result<(), Errno> {
        let message = exact::<MigDataMsg>(payload)?;
        let asked = usize::try_from(message.size).map_err(|_| Errno::INVAL)?;
        let state = self.machine.as_ref().ok_or(Errno::NOTTY)?.state();
        if !state.is_saving() || asked > self.peer.data_xfer() {
            return Err(Errno::INVAL);
        }
        let migration = self.device.migration().ok_or(Errno::NOTTY)?;
        let head = size_of::<MigDataMsg>();
        self.out.resize(head + asked, 0);
        let (front, data) = self.out.split_at_mut(head);
        let got = migration.read_data(data)?.min(asked);
        let reply = MigDataMsg {
            argsz: argsz(head + got),
            size: argsz(got),
        };
        front.copy_from_slice(reply.as_bytes());
        self.out.truncate(head + got);
        Ok(())
    }

    fn mig_write(&mut self, payload: &[u8]) -> Result<(), Errno> {
        let (message, data) = split::<MigDataMsg>(payload).ok_or(Errno::INVAL)?;
        let state = self.machine.as_ref().ok_or(Errno::NOTTY)?.state();
        if state != crate::DeviceState::Resuming || usize::try_from(message.size) != Ok(data.len())
        {
            return Err(Errno::INVAL);
        }
        self.device
            .migration()
            .ok_or(Errno::NOTTY)?
            .write_data(data)
    }

    /// Adds a structure to the reply.
    pub(super) fn put<T: IntoBytes + zerocopy::Immutable>(&mut self, message: &T) {
        self.out.extend_from_slice(message.as_bytes());
    }
}

/// Why a session ended: the client closing it is how it should.
fn ended(fault: Arc<LinkFault>) -> Result<(), ServerError> {
    match *fault {
        LinkFault::Transport(TransportError::Closed) | LinkFault::ClosedHere => Ok(()),
        _ => Err(ServerError::Connection(fault)),
    }
}

/// A payload that is one structure and nothing else.
pub(super) fn exact<T: FromBytes>(payload: &[u8]) -> Result<T, Errno> {
    T::read_from_bytes(payload).map_err(|_| Errno::INVAL)
}
