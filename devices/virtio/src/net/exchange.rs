//! Packets on their way from the worker that read them to the worker whose queue they are for.
//!
//! With receive-side scaling the driver's table says which queue a packet goes to, but the tap may
//! give it to the worker of another. That worker copies it into a [`Batch`] and puts the batch into
//! the other's inbox at the end of its burst: one lock and at most one wake-up per burst and queue,
//! however many packets there are.
//!
//! An inbox is bounded in bytes. Whoever finds it full stops reading its own queue of the tap
//! until there is room, so packets wait in the tap as they always did. Only if the inbox' queue
//! has had no buffers for [`STARVED_LONG`] are packets for it dropped, and counted: then one queue
//! that the driver neglects must not hold up the others for ever.

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::rx::MAX_PACKET;

/// How long a queue may be without buffers before packets for it no longer hold up others.
pub(super) const STARVED_LONG: Duration = Duration::from_millis(500);
/// Bytes that may be on their way in a device, shared out among its queues; each may at least
/// have one packet.
const ALL_BYTES: usize = 4 << 20;
/// What a packet counts besides its bytes, so that small ones are bounded too.
const PER_PACKET: usize = 64;
/// Most bytes of memory an empty batch is kept with for later use.
const SPARE_BYTES: usize = 1 << 20;
/// Most empty batches kept by an inbox.
const SPARES: usize = 8;

/// Packets one behind the other, each with its virtio-net header.
#[derive(Debug, Default)]
pub(super) struct Batch {
    bytes: Vec<u8>,
    lens: VecDeque<usize>,
    /// Where the first one starts.
    at: usize,
}

impl Batch {
    /// Whether there are no packets.
    pub(super) fn is_empty(&self) -> bool {
        self.lens.is_empty()
    }

    /// How many packets there are.
    pub(super) fn len(&self) -> usize {
        self.lens.len()
    }

    /// The first packet.
    pub(super) fn front(&self) -> Option<&[u8]> {
        let len = *self.lens.front()?;
        self.bytes.get(self.at..self.at.checked_add(len)?)
    }

    /// Removes the first packet; its length.
    pub(super) fn pop(&mut self) -> usize {
        let len = self.lens.pop_front().unwrap_or(0);
        self.at = self.at.saturating_add(len);
        if self.lens.is_empty() {
            self.bytes.clear();
            self.at = 0;
        }
        len
    }

    /// Appends a packet of `len` bytes, which `fill` writes; nothing if `fill` fails.
    pub(super) fn push<E>(
        &mut self,
        len: usize,
        fill: impl FnOnce(&mut [u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let start = self.bytes.len();
        self.bytes.resize(start.saturating_add(len), 0);
        let filled = fill(self.bytes.get_mut(start..).unwrap_or_default());
        match filled {
            Ok(()) => self.lens.push_back(len),
            Err(_) => self.bytes.truncate(start),
        }
        filled
    }

    /// Appends a copy of `packet`.
    pub(super) fn push_copy(&mut self, packet: &[u8]) {
        self.bytes.extend_from_slice(packet);
        self.lens.push_back(packet.len());
    }

    /// Moves all packets of `other` behind its own.
    pub(super) fn append(&mut self, mut other: Self) {
        if self.is_empty() {
            *self = other;
            return;
        }
        while let Some(packet) = other.front() {
            self.push_copy(packet);
            other.pop();
        }
    }

    /// Copies of all packets, in order.
    pub(super) fn to_packets(&self) -> Vec<Vec<u8>> {
        let mut at = self.at;
        let mut packets = Vec::new();
        for len in &self.lens {
            packets.extend(self.bytes.get(at..at + len).map(<[u8]>::to_vec));
            at += len;
        }
        packets
    }

    /// What all packets count against the bound of an inbox.
    fn charge(&self) -> usize {
        self.lens.iter().copied().map(charge).sum()
    }
}

/// What a packet of `len` bytes counts.
const fn charge(len: usize) -> usize {
    len.saturating_add(PER_PACKET)
}

/// Whether a packet may be given to a queue.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Room {
    /// Yes; its place is taken.
    Reserved,
    /// Not now: its worker signals when there is room.
    Full,
    /// No, and its queue has had no buffers for long: drop it.
    Starved,
    /// Nobody serves that queue: drop it.
    Closed,
}

/// The packets given to one queue.
#[derive(Debug)]
struct Inbox {
    line: Mutex<Line>,
    /// `line` has batches. Looked at without the lock.
    filled: AtomicBool,
    /// What the packets count that are here, or taken and not yet delivered.
    charged: AtomicUsize,
    /// Someone waits for room.
    wanted: AtomicBool,
    /// Its worker runs, or is paused and will.
    open: AtomicBool,
    /// Milliseconds on the exchange's clock, and one, since when packets wait here for buffers of
    /// the driver's; 0 if none do.
    starved: AtomicU64,
    wake: EventFd,
}

#[derive(Debug, Default)]
struct Line {
    batches: VecDeque<Batch>,
    spares: Vec<Batch>,
}

/// The inboxes of all queue pairs of a device.
#[derive(Debug)]
pub(super) struct Exchange {
    inboxes: Vec<Inbox>,
    /// Most bytes in one inbox.
    bound: usize,
    start: Instant,
}

impl Exchange {
    /// Inboxes for `pairs` queue pairs, all closed.
    ///
    /// # Errors
    /// There is no eventfd.
    pub(super) fn new(pairs: usize) -> io::Result<Self> {
        let inbox = |_| {
            Ok(Inbox {
                line: Mutex::default(),
                filled: AtomicBool::new(false),
                charged: AtomicUsize::new(0),
                wanted: AtomicBool::new(false),
                open: AtomicBool::new(false),
                starved: AtomicU64::new(0),
                wake: EventFd::new(EFD_NONBLOCK)?,
            })
        };
        Ok(Self {
            inboxes: (0..pairs).map(inbox).collect::<io::Result<_>>()?,
            bound: (ALL_BYTES / pairs.max(1)).max(charge(MAX_PACKET)),
            start: Instant::now(),
        })
    }

    /// Most bytes of packets that wait in a device of `pairs` pairs that has stopped: what fills
    /// all inboxes, and for each worker a packet that found no room and one that found no buffers.
    pub(crate) const fn most_bytes(pairs: usize) -> usize {
        let packets = pairs.saturating_mul(charge(MAX_PACKET));
        ALL_BYTES.saturating_add(packets.saturating_mul(3))
    }

    fn inbox(&self, queue: u16) -> Option<&Inbox> {
        self.inboxes.get(usize::from(queue))
    }

    /// Signalled when something was put into the empty inbox of `queue`, or when there may be room
    /// in another's.
    pub(super) fn wake(&self, queue: u16) -> Option<&EventFd> {
        self.inbox(queue).map(|inbox| &inbox.wake)
    }

    /// Workers are about to serve just these queues. Said before the first of them starts, as
    /// what is given to a closed inbox is dropped.
    pub(super) fn open(&self, mut is_served: impl FnMut(u16) -> bool) {
        for (queue, inbox) in (0..).zip(&self.inboxes) {
            inbox.open.store(is_served(queue), Ordering::SeqCst);
        }
    }

    /// Nobody serves `queue` any more: who waits for room must not wait for ever.
    pub(super) fn close(&self, queue: u16) {
        if let Some(inbox) = self.inbox(queue) {
            inbox.open.store(false, Ordering::SeqCst);
            self.wake_others(queue);
        }
    }

    /// Asks for room for a packet of `len` bytes in the inbox of `queue`.
    pub(super) fn reserve(&self, queue: u16, len: usize) -> Room {
        let Some(inbox) = self.inbox(queue) else {
            return Room::Closed;
        };
        if !inbox.open.load(Ordering::SeqCst) {
            return Room::Closed;
        }
        if self.try_reserve(inbox, len) {
            return Room::Reserved;
        }
        // Asked again after the wish is known, so that room made in between is not missed.
        inbox.wanted.store(true, Ordering::SeqCst);
        if self.try_reserve(inbox, len) {
            return Room::Reserved;
        }
        match inbox.starved.load(Ordering::Relaxed) {
            0 => Room::Full,
            since if self.now().saturating_sub(since) < millis(STARVED_LONG) => Room::Full,
            _ => Room::Starved,
        }
    }

    fn try_reserve(&self, inbox: &Inbox, len: usize) -> bool {
        let more = charge(len);
        let reserve = |now: usize| {
            let then = now.saturating_add(more);
            (now == 0 || then <= self.bound).then_some(then)
        };
        let (set, get) = (Ordering::SeqCst, Ordering::SeqCst);
        inbox.charged.fetch_update(set, get, reserve).is_ok()
    }

    /// Counts a packet of `len` bytes that is for `queue` whether or not there is room.
    pub(super) fn charge(&self, queue: u16, len: usize) {
        if let Some(inbox) = self.inbox(queue) {
            inbox.charged.fetch_add(charge(len), Ordering::SeqCst);
        }
    }

    /// A packet of `len` bytes for `queue` was delivered or dropped.
    pub(super) fn release(&self, queue: u16, len: usize) {
        let Some(inbox) = self.inbox(queue) else {
            return;
        };
        inbox.charged.fetch_sub(charge(len), Ordering::SeqCst);
        if inbox.wanted.load(Ordering::SeqCst) && inbox.wanted.swap(false, Ordering::SeqCst) {
            self.wake_others(queue);
        }
    }

    fn wake_others(&self, queue: u16) {
        for (other, inbox) in self.inboxes.iter().enumerate() {
            if other != usize::from(queue) {
                signal(&inbox.wake);
            }
        }
    }

    /// Puts `batch`, for whose packets there was room, into the inbox of `queue`; an empty one for
    /// the next.
    pub(super) fn give(&self, queue: u16, batch: Batch) -> Batch {
        let Some(inbox) = self.inbox(queue) else {
            return Batch::default();
        };
        let (first, spare) = {
            let mut line = inbox.line.lock();
            let first = line.batches.is_empty();
            line.batches.push_back(batch);
            // Under the lock, as the receiver clears it there.
            inbox.filled.store(true, Ordering::Release);
            (first, line.spares.pop())
        };
        if first {
            signal(&inbox.wake);
        }
        spare.unwrap_or_default()
    }

    /// Takes all batches out of the inbox of `queue` into the empty `into`.
    pub(super) fn take(&self, queue: u16, into: &mut VecDeque<Batch>) {
        let Some(inbox) = self.inbox(queue) else {
            return;
        };
        if inbox.filled.load(Ordering::Acquire) {
            let mut line = inbox.line.lock();
            inbox.filled.store(false, Ordering::Relaxed);
            std::mem::swap(&mut line.batches, into);
        }
    }

    /// Keeps the memory of an empty batch of `queue` for who gives to it next.
    pub(super) fn recycle(&self, queue: u16, batch: Batch) {
        if let Some(inbox) = self.inbox(queue)
            && batch.bytes.capacity() <= SPARE_BYTES
        {
            let mut line = inbox.line.lock();
            if line.spares.len() < SPARES {
                line.spares.push(batch);
            }
        }
    }

    /// Packets for `queue` begin to wait for buffers of the driver's, or do so no longer.
    pub(super) fn set_starved(&self, queue: u16, starved: bool) {
        let Some(inbox) = self.inbox(queue) else {
            return;
        };
        let since = if starved { self.now() } else { 0 };
        inbox.starved.store(since, Ordering::Relaxed);
    }

    fn now(&self) -> u64 {
        millis(self.start.elapsed()).saturating_add(1)
    }

    /// Empties the inbox of `queue`, all of whose givers have stopped.
    pub(super) fn drain(&self, queue: u16) -> Batch {
        let mut all = Batch::default();
        let Some(inbox) = self.inbox(queue) else {
            return all;
        };
        let mut line = inbox.line.lock();
        for batch in line.batches.drain(..) {
            all.append(batch);
        }
        drop(line);
        inbox.filled.store(false, Ordering::Relaxed);
        inbox.charged.store(0, Ordering::SeqCst);
        inbox.wanted.store(false, Ordering::SeqCst);
        inbox.starved.store(0, Ordering::Relaxed);
        all
    }

    /// Counts all of `batch`, which a worker of `queue` starts with.
    pub(super) fn charge_all(&self, queue: u16, batch: &Batch) {
        if let Some(inbox) = self.inbox(queue) {
            inbox.charged.fetch_add(batch.charge(), Ordering::SeqCst);
        }
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

fn signal(event: &EventFd) {
    if let Err(error) = event.write(1) {
        // Only possible if the counter is full, and then it is readable.
        tracing::debug!(%error, "a worker was woken already");
    }
}
