//! Sending: packets from the guest's buffers to the host.

use std::io::ErrorKind;

use libc::iovec;
use vm_memory::Permissions;
use vm_migration::memory::GuestMemory;

use super::backend::{MAX_IOVECS, NetBackend, write_packet};
use super::buffers::translate;
use super::counters::PairCounters;
use super::rx::Rest;
use crate::queue::{Chain, Queue, RingError, to_usize};

/// Packets sent before the worker looks for other work.
const BURST: usize = 64;

/// The sending half of a queue pair.
pub(super) struct Sender {
    pub(super) queue: Queue,
    header_bytes: usize,
    chain: Chain,
    /// The driver may have added packets.
    pub(super) kicked: bool,
    /// The backend takes packets.
    pub(super) writable: bool,
}

/// What became of a packet.
enum Fate {
    Sent(usize),
    Dropped,
    /// The host has no room now.
    Later,
}

impl Sender {
    pub(super) fn new(queue: Queue, header_bytes: usize) -> Self {
        Self {
            queue,
            header_bytes,
            chain: Chain::default(),
            kicked: true,
            writable: true,
        }
    }

    /// Sends up to [`BURST`] packets. `iovecs` is scratch space.
    pub(super) fn burst(
        &mut self,
        memory: &GuestMemory,
        backend: &dyn NetBackend,
        counters: &PairCounters,
        iovecs: &mut Vec<iovec>,
    ) -> Result<Rest, RingError> {
        if !(self.kicked && self.writable) {
            return Ok(Rest::Idle);
        }
        self.queue.disable_kicks(memory)?;
        let mut used = false;
        let mut rest = Rest::More;
        for _ in 0..BURST {
            if !self.queue.pop(memory, &mut self.chain)? {
                if self.queue.enable_kicks(memory)? {
                    continue;
                }
                self.kicked = false;
                rest = Rest::Idle;
                break;
            }
            match self.send(memory, backend, iovecs)? {
                Fate::Sent(len) => {
                    counters.sent(u64::try_from(len - self.header_bytes).unwrap_or(0));
                }
                Fate::Dropped => counters.send_dropped(),
                Fate::Later => {
                    self.queue.unpop(1);
                    self.writable = false;
                    rest = Rest::Idle;
                    break;
                }
            }
            self.queue.push_used(memory, self.chain.head(), 0)?;
            used = true;
        }
        if used {
            self.queue.publish(memory)?;
        }
        Ok(rest)
    }

    fn send(
        &mut self,
        memory: &GuestMemory,
        backend: &dyn NetBackend,
        iovecs: &mut Vec<iovec>,
    ) -> Result<Fate, RingError> {
        iovecs.clear();
        for segment in self.chain.readable() {
            translate(memory, segment, Permissions::Read, |iov, _| {
                iovecs.push(iov)
            })?;
        }
        let len = to_usize(self.chain.readable_len());
        if len <= self.header_bytes || iovecs.len() > MAX_IOVECS {
            return Ok(Fate::Dropped);
        }
        loop {
            // SAFETY: the list is of guest memory in the snapshot `memory`, translated and
            // bounds-checked just above.
            match unsafe { write_packet(backend, iovecs) } {
                Ok(_) => return Ok(Fate::Sent(len)),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(Fate::Later),
                Err(error) => {
                    // The header is the guest's, so it may be nonsense: not worth more than this.
                    tracing::debug!(%error, "the host refused a packet");
                    return Ok(Fate::Dropped);
                }
            }
        }
    }
}
