//! A worker's side of the exchange: what it gives to others, and what they gave to it.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::counters::PairCounters;
use super::exchange::{Batch, Exchange, Room};

/// How long a worker whose own queue has no buffers leaves packets in the tap before it looks
/// whether there are some for other queues among them. Most drivers give buffers sooner, and a
/// packet that is left in the tap need not be copied.
const PATIENCE: Duration = Duration::from_millis(20);
/// How long a worker that waits for room in another's inbox sleeps before it asks again whether
/// that queue is worth waiting for. Room itself wakes it sooner.
const ASK_AGAIN: Duration = Duration::from_millis(20);

/// Where a packet goes that was read.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Place {
    /// Into the batch for that queue ([`Lane::outgoing`]).
    Give,
    /// Aside ([`Lane::stall`]): there is no room yet, and nothing is read until there is.
    Stall,
    /// Nowhere.
    Drop,
}

/// The lane of one worker.
#[derive(Debug)]
pub(super) struct Lane {
    here: u16,
    exchange: Arc<Exchange>,
    /// What others gave.
    arrivals: VecDeque<Batch>,
    /// What is to be given at the end of the burst, by queue.
    outgoing: Vec<Batch>,
    /// Queues that have something in `outgoing`.
    touched: Vec<u16>,
    /// A packet for which there was no room, and its queue.
    stalled: Option<(u16, Batch)>,
    /// Since when the own queue has been without the buffers it needs.
    starved: Option<Instant>,
    /// Others know that packets wait for buffers here.
    told: bool,
}

impl Lane {
    /// The lane of the worker of queue `here` of `pairs`, which has `kept` from before.
    pub(super) fn new(here: u16, pairs: u16, exchange: Arc<Exchange>, kept: &Batch) -> Self {
        exchange.charge_all(here, kept);
        Self {
            here,
            exchange,
            arrivals: VecDeque::new(),
            outgoing: (0..pairs).map(|_| Batch::default()).collect(),
            touched: Vec::with_capacity(usize::from(pairs)),
            stalled: None,
            starved: None,
            told: false,
        }
    }

    /// The worker's own queue.
    pub(super) fn here(&self) -> u16 {
        self.here
    }

    /// The first packet that others gave.
    pub(super) fn front(&mut self) -> Option<&[u8]> {
        if self.arrivals.is_empty() {
            self.exchange.take(self.here, &mut self.arrivals);
        }
        self.arrivals.front()?.front()
    }

    /// Removes the first packet that others gave.
    pub(super) fn pop(&mut self) {
        let Some(batch) = self.arrivals.front_mut() else {
            return;
        };
        let len = batch.pop();
        if batch.is_empty()
            && let Some(batch) = self.arrivals.pop_front()
        {
            self.exchange.recycle(self.here, batch);
        }
        self.exchange.release(self.here, len);
    }

    /// A packet of the own queue of `len` bytes is kept; it was not counted before.
    pub(super) fn keep(&self, len: usize) {
        self.exchange.charge(self.here, len);
    }

    /// A kept packet of `len` bytes has gone.
    pub(super) fn kept_gone(&self, len: usize) {
        self.exchange.release(self.here, len);
    }

    /// Where to put a packet of `len` bytes for `queue`. If it is to be given, its room is taken.
    pub(super) fn place(&self, queue: u16, len: usize) -> Place {
        match self.exchange.reserve(queue, len) {
            Room::Reserved => Place::Give,
            Room::Full => Place::Stall,
            Room::Starved | Room::Closed => Place::Drop,
        }
    }

    /// The batch for `queue`.
    pub(super) fn outgoing(&mut self, queue: u16) -> Option<&mut Batch> {
        let batch = self.outgoing.get_mut(usize::from(queue))?;
        if batch.is_empty() {
            self.touched.push(queue);
        }
        Some(batch)
    }

    /// Puts a packet aside. There is only one at a time, as nothing is read meanwhile.
    pub(super) fn stall(&mut self, queue: u16, packet: Batch) {
        self.stalled = Some((queue, packet));
    }

    /// Whether a packet waits for room.
    pub(super) fn is_stalled(&self) -> bool {
        self.stalled.is_some()
    }

    /// Looks again for room for the packet that waits for it. One for the own queue goes to
    /// `kept`.
    pub(super) fn retry(&mut self, kept: &mut Batch, counters: &PairCounters) {
        let Some((queue, packet)) = self.stalled.take() else {
            return;
        };
        let len = packet.front().map_or(0, <[u8]>::len);
        match self.place(queue, len) {
            Place::Stall => self.stalled = Some((queue, packet)),
            Place::Drop => counters.hand_over_dropped(),
            Place::Give if queue == self.here => kept.append(packet),
            Place::Give => {
                if let Some(batch) = self.outgoing(queue) {
                    batch.append(packet);
                    counters.handed_over();
                }
            }
        }
    }

    /// Gives what is to be given.
    pub(super) fn flush(&mut self) {
        for queue in self.touched.drain(..) {
            if let Some(batch) = self.outgoing.get_mut(usize::from(queue))
                && !batch.is_empty()
            {
                let full = std::mem::take(batch);
                *batch = self.exchange.give(queue, full);
            }
        }
    }

    /// The own queue lacks buffers, also for a packet that is `waiting` for some.
    pub(super) fn starve(&mut self, waiting: bool) {
        if self.starved.is_none() {
            self.starved = Some(Instant::now());
        }
        if waiting && !self.told {
            self.told = true;
            self.exchange.set_starved(self.here, true);
        }
    }

    /// The own queue had buffers for a packet.
    pub(super) fn feed(&mut self) {
        self.starved = None;
        if std::mem::take(&mut self.told) {
            self.exchange.set_starved(self.here, false);
        }
    }

    /// Whether the own queue has been without buffers for so long that the tap is to be read all
    /// the same, for the sake of other queues.
    pub(super) fn impatient(&self) -> bool {
        self.starved
            .is_some_and(|since| since.elapsed() >= PATIENCE)
    }

    /// How long to sleep at most, if the own queue is `starved` and the tap may have packets.
    pub(super) fn timeout(&self, starved: bool, readable: bool) -> Option<Duration> {
        if self.is_stalled() {
            return Some(ASK_AGAIN);
        }
        let since = self.starved.filter(|_| starved && readable)?;
        Some(PATIENCE.saturating_sub(since.elapsed()))
    }

    /// The queue is served no more because its driver broke it.
    pub(super) fn close(&self) {
        self.exchange.close(self.here);
    }

    /// Ends: what is to be given is given, whether there is room or not, and what is for the own
    /// queue goes to `kept`.
    pub(super) fn end(mut self, kept: &mut Batch) {
        match self.stalled.take() {
            Some((queue, packet)) if queue == self.here => kept.append(packet),
            Some((queue, packet)) => {
                self.exchange
                    .charge(queue, packet.front().map_or(0, <[u8]>::len));
                if let Some(batch) = self.outgoing(queue) {
                    batch.append(packet);
                }
            }
            None => {}
        }
        self.flush();
        for batch in self.arrivals {
            kept.append(batch);
        }
    }
}
