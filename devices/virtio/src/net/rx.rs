//! Receiving: packets from the host into the guest's buffers.
//!
//! A packet is read straight into the buffers of the queue whose worker reads it. It is copied
//! only if it cannot stay there: because it does not fit the buffers there are, or because it is
//! for another queue (see [`super::exchange`]).
//!
//! # Order
//! Packets of one flow that one queue of the tap gives, and that the driver's table sends to one
//! queue, get there in that order: those that wait are delivered before anything more is read for
//! the same queue. When the table changes, packets read before go where the old one says and those
//! read after where the new one says; between two queues there is no order, as on any card.

use std::io::ErrorKind;
use std::time::Duration;

use net_util::flow::HEAD_BYTES;
use net_util::header::HeaderSize;
use vm_migration::memory::GuestMemory;

use super::backend::{NetBackend, read_packet};
use super::buffers::RxBuffers;
use super::counters::PairCounters;
use super::exchange::Batch;
use super::header::{Judged, RxHeader, finish_kept};
use super::lane::{Lane, Place};
use crate::queue::{Queue, RingError};

/// Most bytes of a packet behind its header: the largest TCP segment a tap gives (64 KiB) with
/// its Ethernet header and VLAN tags.
const MAX_FRAME: usize = (64 << 10) + 32;
/// Most bytes of a packet with its header.
pub(super) const MAX_PACKET: usize = HeaderSize::MAX_BYTES + MAX_FRAME;
/// Most bytes at the start of a packet that decide on its hash and queue.
const START_BYTES: usize = HeaderSize::MAX_BYTES + HEAD_BYTES;

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

/// Where the next packet for the own queue is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Source {
    /// Among those kept.
    Kept,
    /// Among those that other workers gave.
    Arrivals,
    /// In the tap.
    Tap,
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
    /// Packets of this queue that were read and found no buffers. While there are some, nothing
    /// that is read overtakes them.
    kept: Batch,
    /// To and from the other workers, if packets may be for other queues.
    lane: Option<Lane>,
    /// The last packet delivered was one that another worker gave.
    served_arrival: bool,
    /// The backend may have a packet.
    pub(super) readable: bool,
    /// The ring was empty when last looked at: a kick will tell of more.
    starved: bool,
    /// The driver may kick. Only wanted while starved.
    kicks_on: bool,
}

/// A packet as it was read.
#[derive(Clone, Copy, Debug)]
struct Read {
    len: usize,
    /// How much of it is in `buffers`; the rest is in `overflow`.
    in_buffers: usize,
}

impl<H: RxHeader> Receiver<H> {
    /// Starts with the packets `kept` from before.
    pub(super) fn new(
        queue: Queue,
        header: H,
        mergeable: bool,
        kept: Batch,
        lane: Option<Lane>,
    ) -> Self {
        Self {
            queue,
            header,
            mergeable,
            buffers: RxBuffers::default(),
            overflow: vec![0; MAX_PACKET],
            kept,
            lane,
            served_arrival: false,
            readable: true,
            starved: false,
            kicks_on: true,
        }
    }

    /// Ends: the queue, the way to finish headers and all packets that wait, for the next start.
    pub(super) fn into_parts(mut self) -> (Queue, H, Batch) {
        self.give_back();
        if let Some(lane) = self.lane {
            lane.end(&mut self.kept);
        }
        (self.queue, self.header, self.kept)
    }

    /// The driver kicked: there may be buffers.
    pub(super) fn kicked(&mut self) {
        self.starved = false;
    }

    /// How long to sleep at most.
    pub(super) fn timeout(&self) -> Option<Duration> {
        self.lane.as_ref()?.timeout(self.starved, self.readable)
    }

    /// The driver broke a queue: nobody is to wait for this worker.
    pub(super) fn close(&self) {
        if let Some(lane) = &self.lane {
            lane.close();
        }
    }

    /// Receives up to [`BURST`] packets.
    pub(super) fn burst(
        &mut self,
        memory: &GuestMemory,
        backend: &dyn NetBackend,
        counters: &PairCounters,
    ) -> Result<Rest, RingError> {
        if let Some(lane) = &mut self.lane {
            lane.retry(&mut self.kept, counters);
        }
        let mut rest = Rest::More;
        for _ in 0..BURST {
            if !self.step(memory, backend, counters)? {
                rest = Rest::Idle;
                break;
            }
        }
        if let Some(lane) = &mut self.lane {
            lane.flush();
        }
        Ok(rest)
    }

    /// One packet; false if nothing is to be done before the next event.
    fn step(
        &mut self,
        memory: &GuestMemory,
        backend: &dyn NetBackend,
        counters: &PairCounters,
    ) -> Result<bool, RingError> {
        if self.starved {
            return Ok(H::STEERS && self.pass_by(backend, counters));
        }
        let Some((source, waiting)) = self.next_source() else {
            return Ok(false);
        };
        if self.kicks_on {
            self.queue.disable_kicks(memory)?;
            self.kicks_on = false;
        }
        let wanted = waiting.unwrap_or(H::BYTES + MAX_FRAME);
        let most = if self.mergeable { usize::MAX } else { 1 };
        // A packet that waits is copied, so the bound of a readv does not hold for it.
        let for_read = waiting.is_none();
        self.buffers
            .fill(&mut self.queue, memory, wanted, most, for_read)?;
        let has_all = if self.mergeable {
            self.buffers.chains() >= usize::from(self.queue.size())
        } else {
            self.buffers.chains() > 0
        };
        match waiting {
            Some(len) if self.buffers.bytes() >= len => {
                self.deliver_waiting(memory, source, counters)?;
            }
            // There will never be more.
            Some(_) if has_all => {
                self.pop_waiting(source);
                counters.receive_dropped();
            }
            None if self.buffers.chains() > 0 => self.receive(memory, backend, counters)?,
            waiting => self.wait_for_buffers(memory, waiting.is_some())?,
        }
        Ok(true)
    }

    /// Where the next packet comes from, and its length if it is known.
    fn next_source(&mut self) -> Option<(Source, Option<usize>)> {
        if let Some(packet) = self.kept.front() {
            return Some((Source::Kept, Some(packet.len())));
        }
        let readable = self.readable && !self.lane.as_ref().is_some_and(Lane::is_stalled);
        let arrival = if H::STEERS {
            let lane = self.lane.as_mut();
            lane.and_then(|lane| lane.front().map(<[u8]>::len))
        } else {
            None
        };
        match arrival {
            // In turn, so that neither keeps the other waiting.
            Some(len) if !(readable && self.served_arrival) => Some((Source::Arrivals, Some(len))),
            _ if readable => Some((Source::Tap, None)),
            _ => None,
        }
    }

    fn wait_for_buffers(&mut self, memory: &GuestMemory, waiting: bool) -> Result<(), RingError> {
        self.kicks_on = true;
        self.starved = !self.queue.enable_kicks(memory)?;
        if self.starved
            && let Some(lane) = &mut self.lane
        {
            lane.starve(waiting);
        }
        Ok(())
    }

    fn receive(
        &mut self,
        memory: &GuestMemory,
        backend: &dyn NetBackend,
        counters: &PairCounters,
    ) -> Result<(), RingError> {
        // SAFETY: the list is of guest memory in the snapshot that the worker keeps while it
        // works, translated and bounds-checked by `fill`, and of `overflow`, which is not
        // touched during the call.
        let read = |list: &[libc::iovec]| unsafe { read_packet(backend, list) };
        let got = repeat(|| self.buffers.with_iovecs(&mut self.overflow, read));
        self.served_arrival = false;
        let Some(len) = got else {
            self.readable = false;
            self.header.drained();
            return Ok(());
        };
        let room = self.buffers.bytes();
        let read = Read {
            len,
            in_buffers: len.min(room),
        };
        self.buffers.mark(memory, read.in_buffers);
        if len < H::BYTES {
            counters.receive_dropped();
            return Ok(());
        }
        let judged = self.judge(memory, read)?;
        if H::STEERS && self.is_elsewhere(judged) {
            return self.hand_over(Some(memory), read, judged, counters);
        }
        if len <= room {
            if let Some(lane) = &mut self.lane {
                lane.feed();
            }
            let num_buffers = self.buffers.chains_for(len);
            self.header
                .finish(memory, &self.buffers, num_buffers, judged.hash, counters)?;
            return self.complete(memory, len, counters);
        }
        if self.mergeable {
            if let Some(lane) = &self.lane {
                lane.keep(len);
            }
            return self.keep(Some(memory), read, judged);
        }
        counters.receive_dropped();
        Ok(())
    }

    fn is_elsewhere(&self, judged: Judged) -> bool {
        self.lane
            .as_ref()
            .is_some_and(|lane| lane.here() != judged.queue)
    }

    /// Reads a packet although the own queue has no buffers: it may be for another.
    fn pass_by(&mut self, backend: &dyn NetBackend, counters: &PairCounters) -> bool {
        let Some(lane) = &mut self.lane else {
            return false;
        };
        let waiting = !self.kept.is_empty() || lane.front().is_some();
        lane.starve(waiting);
        if !(self.readable && !lane.is_stalled() && lane.impatient()) {
            return false;
        }
        let here = lane.here();
        let list = [libc::iovec {
            iov_base: self.overflow.as_mut_ptr().cast(),
            iov_len: self.overflow.len(),
        }];
        // SAFETY: the list is of `overflow`, which is not touched during the call.
        let Some(len) = repeat(|| unsafe { read_packet(backend, &list) }) else {
            self.readable = false;
            return false;
        };
        if len < H::BYTES {
            counters.receive_dropped();
            return true;
        }
        let start = self.overflow.get(..len.min(START_BYTES));
        let judged = self.header.judge(start.unwrap_or_default(), here);
        let read = Read { len, in_buffers: 0 };
        // Without guest memory nothing can fail.
        self.hand_over(None, read, judged, counters).is_ok()
    }

    /// Looks at the start of a packet.
    ///
    /// It is read back from guest memory, which the guest may change under us: all it gets from
    /// that is a wrong hash, or a packet in another of its queues. The copy is looked at, never
    /// the original.
    fn judge(&mut self, memory: &GuestMemory, read: Read) -> Result<Judged, RingError> {
        let here = self.lane.as_ref().map_or(0, Lane::here);
        if !H::HASHES {
            return Ok(self.header.judge(&[], here));
        }
        let mut start = [0; START_BYTES];
        let len = read.len.min(H::BYTES + HEAD_BYTES);
        let start = start.get_mut(..len).unwrap_or_default();
        self.copy_out(Some(memory), read, start)?;
        Ok(self.header.judge(start, here))
    }

    /// Copies the start of a packet to `data`, which is no longer than it.
    fn copy_out(
        &self,
        memory: Option<&GuestMemory>,
        read: Read,
        data: &mut [u8],
    ) -> Result<(), RingError> {
        let (in_buffers, in_overflow) = data.split_at_mut(read.in_buffers.min(data.len()));
        if let Some(memory) = memory.filter(|_| !in_buffers.is_empty()) {
            self.buffers.read_at(memory, 0, in_buffers)?;
        }
        for (to, from) in in_overflow.iter_mut().zip(&self.overflow) {
            *to = *from;
        }
        Ok(())
    }

    /// Puts a packet, its hash in its header, behind those that wait for buffers.
    fn keep(
        &mut self,
        memory: Option<&GuestMemory>,
        read: Read,
        judged: Judged,
    ) -> Result<(), RingError> {
        let mut kept = std::mem::take(&mut self.kept);
        let pushed = self.push_to(&mut kept, memory, read, judged);
        self.kept = kept;
        pushed
    }

    fn push_to(
        &self,
        batch: &mut Batch,
        memory: Option<&GuestMemory>,
        read: Read,
        judged: Judged,
    ) -> Result<(), RingError> {
        batch.push(read.len, |packet| {
            self.copy_out(memory, read, packet)?;
            self.header.put_hash(packet, judged.hash);
            Ok(())
        })
    }

    /// Gives a packet to the worker whose queue it is for, which may be this one if its queue has
    /// no buffers.
    fn hand_over(
        &mut self,
        memory: Option<&GuestMemory>,
        read: Read,
        judged: Judged,
        counters: &PairCounters,
    ) -> Result<(), RingError> {
        let Some(mut lane) = self.lane.take() else {
            return Ok(());
        };
        let queue = judged.queue;
        let result = match lane.place(queue, read.len) {
            Place::Give if queue == lane.here() => self.keep(memory, read, judged),
            Place::Give => {
                counters.handed_over();
                match lane.outgoing(queue) {
                    Some(batch) => self.push_to(batch, memory, read, judged),
                    None => Ok(()),
                }
            }
            Place::Stall => {
                let mut aside = Batch::default();
                let pushed = self.push_to(&mut aside, memory, read, judged);
                lane.stall(queue, aside);
                pushed
            }
            Place::Drop => {
                counters.hand_over_dropped();
                Ok(())
            }
        };
        self.lane = Some(lane);
        result
    }

    /// The first packet of those that wait at `source`, if any wait there.
    fn waiting(&mut self, source: Source) -> Option<&[u8]> {
        match source {
            Source::Kept => self.kept.front(),
            Source::Arrivals => self.lane.as_mut()?.front(),
            Source::Tap => None,
        }
    }

    fn pop_waiting(&mut self, source: Source) {
        match source {
            Source::Kept => {
                let len = self.kept.pop();
                if let Some(lane) = &self.lane {
                    lane.kept_gone(len);
                }
            }
            Source::Arrivals => {
                if let Some(lane) = &mut self.lane {
                    lane.pop();
                }
                self.served_arrival = true;
            }
            Source::Tap => {}
        }
    }

    /// The buffers now have room for the packet that waits at `source`: puts it there.
    fn deliver_waiting(
        &mut self,
        memory: &GuestMemory,
        source: Source,
        counters: &PairCounters,
    ) -> Result<(), RingError> {
        if let Some(lane) = &mut self.lane {
            lane.feed();
        }
        let buffers = std::mem::take(&mut self.buffers);
        let put = self.put_waiting(memory, &buffers, source, counters);
        self.buffers = buffers;
        let len = put?;
        self.pop_waiting(source);
        if len < H::BYTES {
            // Only saved state can have such a packet.
            counters.receive_dropped();
            return Ok(());
        }
        self.complete(memory, len, counters)
    }

    fn put_waiting(
        &mut self,
        memory: &GuestMemory,
        buffers: &RxBuffers,
        source: Source,
        counters: &PairCounters,
    ) -> Result<usize, RingError> {
        let packet = self.waiting(source).unwrap_or_default();
        if packet.len() < H::BYTES {
            return Ok(0);
        }
        buffers.write_at(memory, 0, packet)?;
        let num_buffers = buffers.chains_for(packet.len());
        finish_kept::<H>(memory, buffers, num_buffers, packet, counters)?;
        Ok(packet.len())
    }

    fn complete(
        &mut self,
        memory: &GuestMemory,
        len: usize,
        counters: &PairCounters,
    ) -> Result<(), RingError> {
        self.buffers.complete(&mut self.queue, memory, len)?;
        counters.received(u64::try_from(len - H::BYTES).unwrap_or(0));
        Ok(())
    }

    /// Gives back what was taken ahead: the worker stops, or guest memory was replaced.
    pub(super) fn give_back(&mut self) {
        self.buffers.give_back(&mut self.queue);
    }
}

/// The length of the packet that `read` gives; `None` if there is none.
fn repeat(mut read: impl FnMut() -> std::io::Result<usize>) -> Option<usize> {
    loop {
        match read() {
            Ok(0) => return None,
            Ok(len) => return Some(len),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => return None,
            Err(error) => {
                tracing::warn!(%error, "reading a packet from the host failed");
                return None;
            }
        }
    }
}
