//! The rings a backend serves, and the memory they are in, as messages.

use std::os::fd::{AsFd, BorrowedFd};

use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
use vm_migration::memory::GuestMemory;
use vmm_sys_util::eventfd::EventFd;
use zerocopy::IntoBytes;

use super::connection::{Connection, ExchangeError};
use super::message::{
    F_LOG_ALL, MAX_REGIONS, MemRegion, MemTable, Request, VRING_F_LOG, VringAddr, VringState,
};
use super::session::VhostUserError;
use crate::poll::event_fd;
use crate::queue::QueueSetup;

/// One ring.
#[derive(Debug)]
pub(super) struct Ring {
    pub(super) index: u16,
    pub(super) setup: QueueSetup,
    /// Next entry of the available ring to take.
    pub(super) next_avail: u16,
    /// Signalled by the driver's kicks.
    pub(super) kick: EventFd,
    /// Signalled by the backend for an interrupt.
    pub(super) call: EventFd,
}

impl Ring {
    /// Sets the ring up and starts it; it is still disabled.
    pub(super) fn start(
        &self,
        connection: &mut Connection,
        logging: bool,
        errors: &EventFd,
    ) -> Result<(), ExchangeError> {
        let state = |value| VringState {
            index: self.index.into(),
            value,
        };
        let size = state(self.setup.size.into());
        connection.tell(Request::SetVringNum, size.as_bytes(), &[])?;
        let base = state(self.next_avail.into());
        connection.tell(Request::SetVringBase, base.as_bytes(), &[])?;
        self.set_address(connection, logging)?;
        let index = u64::from(self.index);
        // The kick comes last: it starts the ring.
        for (request, event) in [
            (Request::SetVringErr, errors),
            (Request::SetVringCall, &self.call),
            (Request::SetVringKick, &self.kick),
        ] {
            connection.tell(request, index.as_bytes(), &[event_fd(event)])?;
        }
        Ok(())
    }

    /// Tells where the ring is, and whether writes of its used ring are logged.
    fn set_address(&self, connection: &mut Connection, logging: bool) -> Result<(), ExchangeError> {
        // A ring's "user" addresses are GPAs, as in the memory table.
        let address = VringAddr {
            index: self.index.into(),
            flags: if logging { VRING_F_LOG } else { 0 },
            descriptors: self.setup.descriptors,
            used: self.setup.used,
            available: self.setup.available,
            log: self.setup.used,
        };
        connection.tell(Request::SetVringAddr, address.as_bytes(), &[])
    }

    fn enable(&self, connection: &mut Connection, enabled: bool) -> Result<(), ExchangeError> {
        let state = VringState {
            index: self.index.into(),
            value: enabled.into(),
        };
        connection.tell(Request::SetVringEnable, state.as_bytes(), &[])
    }

    /// Stops the ring; the next entry of the available ring that it would have taken.
    pub(super) fn stop(&self, connection: &mut Connection) -> Result<u16, ExchangeError> {
        let request = Request::GetVringBase;
        let state = VringState {
            index: self.index.into(),
            value: 0,
        };
        let answer: VringState = connection.ask(request, state.as_bytes())?;
        match u16::try_from(answer.value) {
            Ok(base) if answer.index == state.index => Ok(base),
            _ => {
                let reason = format!("ring {} stopped at {}", answer.index, answer.value);
                connection.lose(reason.clone());
                Err(ExchangeError::BadReply { request, reason })
            }
        }
    }
}

/// What a backend serves while the device is active.
#[derive(Debug)]
pub(super) struct Running {
    /// Features for `SET_FEATURES`, without logging.
    features: u64,
    /// In order of their numbers; receive and transmit alternate.
    rings: Vec<Ring>,
    /// Queue pairs in use.
    pairs: u16,
}

impl Running {
    pub(super) fn new(features: u64, rings: Vec<Ring>, pairs: u16) -> Self {
        Self {
            features,
            rings,
            pairs,
        }
    }

    /// Features for `SET_FEATURES`.
    pub(super) fn features(&self, logging: bool) -> u64 {
        if logging {
            self.features | F_LOG_ALL
        } else {
            self.features
        }
    }

    pub(super) fn rings(&self) -> impl ExactSizeIterator<Item = &Ring> {
        self.rings.iter()
    }

    /// Gives how many pairs were in use before.
    pub(super) fn set_pairs(&mut self, pairs: u16) -> u16 {
        std::mem::replace(&mut self.pairs, pairs)
    }

    /// Enables the rings of the pairs in use, and disables the others.
    pub(super) fn enable(&self, connection: &mut Connection) -> Result<(), ExchangeError> {
        self.rings
            .iter()
            .try_for_each(|ring| ring.enable(connection, ring.index / 2 < self.pairs))
    }

    /// Disables all rings. They were stopped before: a ring that is disabled while it runs throws
    /// the driver's packets away (section "Ring states").
    pub(super) fn disable(&self, connection: &mut Connection) -> Result<(), ExchangeError> {
        self.rings
            .iter()
            .try_for_each(|ring| ring.enable(connection, false))
    }

    /// Switches the logging of rings that run: of buffers by the feature, of used rings by their
    /// addresses.
    pub(super) fn set_logging(
        &self,
        connection: &mut Connection,
        logging: bool,
    ) -> Result<(), ExchangeError> {
        let features = self.features(logging);
        connection.tell(Request::SetFeatures, features.as_bytes(), &[])?;
        self.rings
            .iter()
            .try_for_each(|ring| ring.set_address(connection, logging))
    }
}

/// The memory table for `memory`, and the files that go with it.
///
/// The addresses by which rings are told need only be the same in both messages. They are GPAs:
/// where memory is in this process is nobody's business.
pub(super) fn mem_table(
    memory: &GuestMemory,
) -> Result<(Vec<u8>, Vec<BorrowedFd<'_>>), VhostUserError> {
    let count = memory.num_regions();
    let regions = match u32::try_from(count) {
        Ok(regions) if count <= MAX_REGIONS => regions,
        _ => return Err(VhostUserError::Regions { count }),
    };
    let head = MemTable {
        regions,
        padding: 0,
    };
    let mut table = head.as_bytes().to_vec();
    let mut files = Vec::new();
    for region in memory.iter() {
        let file = region.file_offset().ok_or(VhostUserError::PrivateMemory)?;
        let entry = MemRegion {
            gpa: region.start_addr().0,
            len: region.len(),
            user: region.start_addr().0,
            offset: file.start(),
        };
        table.extend_from_slice(entry.as_bytes());
        files.push(file.file().as_fd());
    }
    Ok((table, files))
}
