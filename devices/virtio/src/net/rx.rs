//! Receiving: packets from the host into the guest's buffers.

use std::io::ErrorKind;

use vm_migration::memory::GuestMemory;

use super::backend::{NetBackend, read_packet};
use super::buffers::RxBuffers;
use super::counters::PairCounters;
use super::header::RxHeader;
use crate::queue::{Queue, RingError};

/// Most bytes of a packet behind its header: the largest TCP segment a tap gives (64 KiB) with
/// its Ethernet header and VLAN tags.
const MAX_FRAME: usize = (64 << 10) + 32;

/// Packets received before the worker looks for other work.
const BURST: usize = 64;

/// What one burst left.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Rest {
    /// Nothing to do before the next event.
    Idle,
    /// There may be more packets.
    More,
}

/// The receiving half of a queue pair.
pub(super) struct Receiver<H> {
    pub(super) queue: Queue,
    header: H,
    /// `VIRTIO_NET_F_MRG_RXBUF`: a packet may take several buffers.
    mergeable: bool,
    buffers: RxBuffers,
    /// Takes what does not fit the guest's buffers, so that no part of a packet is lost.
    overflow: Vec<u8>,
    /// A packet of so many bytes of which the first are in `buffers` and the others in
    /// `overflow`, waiting for more buffers.
    held: Option<Held>,
    /// The backend may have a packet.
    pub(super) readable: bool,
    /// The ring was empty when last looked at: a kick will tell of more.
    starved: bool,
    /// The driver may kick. Only wanted while starved.
    kicks_on: bool,
}

#[derive(Clone, Copy, Debug)]
struct Held {
    len: usize,
    in_buffers: usize,
}

/// What a read gave.
enum Got {
    Packet(usize),
    Nothing,
}

impl<H: RxHeader> Receiver<H> {
    pub(super) fn new(queue: Queue, header: H, mergeable: bool) -> Self {
        Self {
            queue,
            header,
            mergeable,
            buffers: RxBuffers::default(),
            overflow: vec![0; MAX_FRAME],
            held: None,
            readable: true,
            starved: false,
            kicks_on: true,
        }
    }

    /// The queue and the way to finish headers, for the next start.
    pub(super) fn into_parts(self) -> (Queue, H) {
        (self.queue, self.header)
    }

    /// The driver kicked: there may be buffers.
    pub(super) fn kicked(&mut self) {
        self.starved = false;
    }

    /// Receives up to [`BURST`] packets.
    pub(super) fn burst(
        &mut self,
        memory: &GuestMemory,
        backend: &dyn NetBackend,
        counters: &PairCounters,
    ) -> Result<Rest, RingError> {
        for _ in 0..BURST {
            if self.starved || !(self.readable || self.held.is_some()) {
                return Ok(Rest::Idle);
            }
            if self.kicks_on {
                self.queue.disable_kicks(memory)?;
                self.kicks_on = false;
            }
            let wanted = self.held.map_or(H::BYTES + MAX_FRAME, |held| held.len);
            let most = if self.mergeable { usize::MAX } else { 1 };
            // The rest of a held packet is copied, so the bound of a readv does not hold for it.
            let for_read = self.held.is_none();
            self.buffers
                .fill(&mut self.queue, memory, wanted, most, for_read)?;
            match self.held {
                Some(held) if self.buffers.bytes() >= held.len => {
                    self.finish_held(memory, held, counters)?;
                }
                // With every buffer of the ring in hand there will never be more.
                Some(_) if self.buffers.chains() >= usize::from(self.queue.size()) => {
                    self.held = None;
                    counters.receive_dropped();
                }
                Some(_) => self.wait_for_buffers(memory)?,
                None if self.buffers.chains() == 0 => self.wait_for_buffers(memory)?,
                None => self.receive(memory, backend, counters)?,
            }
        }
        Ok(Rest::More)
    }

    fn wait_for_buffers(&mut self, memory: &GuestMemory) -> Result<(), RingError> {
        self.kicks_on = true;
        self.starved = !self.queue.enable_kicks(memory)?;
        Ok(())
    }

    fn receive(
        &mut self,
        memory: &GuestMemory,
        backend: &dyn NetBackend,
        counters: &PairCounters,
    ) -> Result<(), RingError> {
        let Got::Packet(len) = self.read(backend) else {
            self.readable = false;
            return Ok(());
        };
        let room = self.buffers.bytes();
        self.buffers.mark(memory, len.min(room));
        if len < H::BYTES {
            counters.receive_dropped();
            return Ok(());
        }
        if len <= room {
            return self.deliver(memory, len, counters);
        }
        if self.mergeable {
            self.held = Some(Held {
                len,
                in_buffers: room,
            });
        } else {
            counters.receive_dropped();
        }
        Ok(())
    }

    fn read(&mut self, backend: &dyn NetBackend) -> Got {
        loop {
            // SAFETY: the list is of guest memory in the snapshot that the worker keeps while it
            // works, translated and bounds-checked by `fill`, and of `overflow`, which is not
            // touched during the call.
            let read = self.buffers.with_iovecs(&mut self.overflow, |list| unsafe {
                read_packet(backend, list)
            });
            match read {
                Ok(0) => return Got::Nothing,
                Ok(len) => return Got::Packet(len),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Got::Nothing,
                Err(error) => {
                    tracing::warn!(%error, "reading a packet from the host failed");
                    return Got::Nothing;
                }
            }
        }
    }

    /// The buffers now have room for the held packet: puts the rest of it there.
    fn finish_held(
        &mut self,
        memory: &GuestMemory,
        held: Held,
        counters: &PairCounters,
    ) -> Result<(), RingError> {
        self.held = None;
        let rest = self
            .overflow
            .get(..held.len - held.in_buffers)
            .unwrap_or_default();
        self.buffers.write_at(memory, held.in_buffers, rest)?;
        self.deliver(memory, held.len, counters)
    }

    fn deliver(
        &mut self,
        memory: &GuestMemory,
        len: usize,
        counters: &PairCounters,
    ) -> Result<(), RingError> {
        let num_buffers = self.buffers.chains_for(len);
        self.header
            .finish(memory, &self.buffers, len, num_buffers, counters)?;
        self.buffers.complete(&mut self.queue, memory, len)?;
        counters.received(u64::try_from(len - H::BYTES).unwrap_or(0));
        Ok(())
    }

    /// Gives back what was taken ahead: the worker stops, or guest memory was replaced. A packet
    /// that waited for buffers is dropped.
    pub(super) fn give_back(&mut self, counters: &PairCounters) {
        self.buffers.give_back(&mut self.queue);
        if self.held.take().is_some() {
            counters.receive_dropped();
        }
    }
}
