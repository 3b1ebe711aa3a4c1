//! The worker of one queue pair.

use std::sync::Arc;
use std::time::Duration;

use vm_memory::GuestAddressSpace;
use vm_migration::memory::{GuestMemory, MemoryHandle};
use vmm_sys_util::eventfd::EventFd;

use super::announce::Announcer;
use super::backend::NetBackend;
use super::counters::{NetCounters, PairCounters};
use super::exchange::{Batch, Exchange};
use super::header::RxHeader;
use super::lane::Lane;
use super::rx::{Receiver, Rest};
use super::tx::Sender;
use crate::device::DeviceInterrupt;
use crate::poll::{EventFlags, Poll, clear};
use crate::queue::{Queue, RingError};
use crate::server::WorkError;
use crate::worker::Work;

const STOP: u64 = 0;
const RX_KICK: u64 = 1;
const TX_KICK: u64 = 2;
const BACKEND: u64 = 3;
const INBOX: u64 = 4;

/// What every pair of a device has in common.
#[derive(Clone)]
pub(super) struct PairContext {
    pub(super) memory: MemoryHandle,
    pub(super) interrupt: Arc<dyn DeviceInterrupt>,
    pub(super) counters: Arc<NetCounters>,
    pub(super) mergeable: bool,
    /// Where packets for other pairs go, if there may be some.
    pub(super) exchange: Option<Arc<Exchange>>,
    /// Pairs of the device.
    pub(super) pairs: u16,
}

/// What a worker begins with, and leaves when it ends.
pub(super) struct PairParts<H> {
    pub(super) rx: Queue,
    pub(super) tx: Queue,
    /// How to finish headers.
    pub(super) header: H,
    /// Packets that were read and not delivered yet.
    pub(super) kept: Batch,
    /// Announces the guest, if that is to be done here.
    pub(super) announcer: Option<Announcer>,
}

/// The worker: it moves packets between its two queues and its backend until it is stopped, and
/// keeps the queues for whoever stops it.
pub(super) struct PairWork<H> {
    /// Number of the pair.
    index: u16,
    context: PairContext,
    backend: Arc<dyn NetBackend>,
    rx_kick: EventFd,
    tx_kick: EventFd,
    /// While the worker does not run.
    parts: Option<PairParts<H>>,
}

impl<H: RxHeader> PairWork<H> {
    pub(super) fn new(
        index: u16,
        context: PairContext,
        backend: Arc<dyn NetBackend>,
        (rx_kick, tx_kick): (EventFd, EventFd),
        parts: PairParts<H>,
    ) -> Self {
        Self {
            index,
            context,
            backend,
            rx_kick,
            tx_kick,
            parts: Some(parts),
        }
    }

    fn serve(&self, pair: &mut Pair<H>, stop: &EventFd) -> Result<(), WorkError> {
        let host = |cause| WorkError::Host {
            operation: "watching the backend and doorbells",
            cause,
        };
        let mut poll = Poll::new().map_err(host)?;
        poll.add_event(stop, STOP).map_err(host)?;
        poll.add_event(&self.rx_kick, RX_KICK).map_err(host)?;
        poll.add_event(&self.tx_kick, TX_KICK).map_err(host)?;
        // Edge-triggered: a packet for which the guest has no buffer must not wake us for ever.
        poll.add(
            self.backend.as_fd(),
            BACKEND,
            EventFlags::IN | EventFlags::ET,
        )
        .map_err(host)?;
        let inbox = self.inbox();
        if let Some(inbox) = inbox {
            poll.add_event(inbox, INBOX).map_err(host)?;
        }
        let mut stopped = false;
        while !stopped {
            let more = pair.work(&self.context, self.backend.as_ref())?;
            if pair.blocked {
                // The tap arms its wake-up for room only when it is polled: this does that, and
                // reports room that came meanwhile.
                let events = EventFlags::IN | EventFlags::OUT | EventFlags::ET;
                poll.rearm(self.backend.as_fd(), BACKEND, events)
                    .map_err(host)?;
            }
            let timeout = if more {
                Some(Duration::ZERO)
            } else {
                pair.timeout()
            };
            poll.wait_for(timeout, |token, events| match token {
                STOP => stopped = true,
                RX_KICK => {
                    clear(&self.rx_kick);
                    pair.receiver.kicked();
                }
                TX_KICK => {
                    clear(&self.tx_kick);
                    pair.sender.kicked = true;
                }
                INBOX => inbox.into_iter().for_each(clear),
                _ => pair.backend_event(events),
            })
            .map_err(WorkError::wait)?;
        }
        Ok(())
    }

    fn inbox(&self) -> Option<&EventFd> {
        self.context.exchange.as_ref()?.wake(self.index)
    }

    /// Number of the pair, and what the worker left.
    pub(super) fn into_parts(self) -> (u16, Option<PairParts<H>>) {
        (self.index, self.parts)
    }

    fn lane(&self, kept: &Batch) -> Option<Lane> {
        let exchange = self.context.exchange.as_ref().filter(|_| H::STEERS)?;
        let (here, pairs) = (self.index, self.context.pairs);
        Some(Lane::new(here, pairs, Arc::clone(exchange), kept))
    }
}

impl<H: RxHeader> Work for PairWork<H> {
    fn run(&mut self, stop: &EventFd) {
        let all = Arc::clone(&self.context.counters);
        let Some(counters) = all.pair(usize::from(self.index)) else {
            return;
        };
        let Some(parts) = self.parts.take() else {
            return;
        };
        let lane = self.lane(&parts.kept);
        let mergeable = self.context.mergeable;
        let mut pair = Pair {
            memory: self.context.memory.memory().into_inner(),
            receiver: Receiver::new(parts.rx, parts.header, mergeable, parts.kept, lane),
            sender: Sender::new(parts.tx, H::BYTES),
            iovecs: Vec::new(),
            counters,
            blocked: false,
            announcer: parts.announcer,
        };
        if let Err(error) = self.serve(&mut pair, stop) {
            pair.receiver.close();
            self.context.interrupt.needs_reset(&error);
        }
        let Pair {
            receiver,
            sender,
            announcer,
            ..
        } = pair;
        let (rx, header, kept) = receiver.into_parts();
        self.parts = Some(PairParts {
            rx,
            tx: sender.queue,
            header,
            kept,
            announcer,
        });
    }
}

/// A pair at work. It holds pointers into guest memory and so never leaves its thread.
struct Pair<'a, H> {
    /// The snapshot of guest memory that all pointers here are into.
    memory: Arc<GuestMemory>,
    receiver: Receiver<H>,
    sender: Sender,
    iovecs: Vec<libc::iovec>,
    counters: &'a PairCounters,
    /// The last burst found that the backend has no more room for what the guest sends.
    blocked: bool,
    announcer: Option<Announcer>,
}

impl<H: RxHeader> Pair<'_, H> {
    /// One burst each way; whether there is more to do at once.
    fn work(&mut self, context: &PairContext, backend: &dyn NetBackend) -> Result<bool, WorkError> {
        self.follow_memory(&context.memory);
        let memory = Arc::clone(&self.memory);
        let received = self.receiver.burst(&memory, backend, self.counters);
        let received = received.and_then(|rest| {
            signal(
                &mut self.receiver.queue,
                &memory,
                context.interrupt.as_ref(),
            )
            .map(|()| rest)
        });
        let received = ring_error(&self.receiver.queue, received)?;
        let could_send = self.sender.writable;
        let sent = self
            .sender
            .burst(&memory, backend, self.counters, &mut self.iovecs);
        let sent = sent.and_then(|rest| {
            signal(&mut self.sender.queue, &memory, context.interrupt.as_ref()).map(|()| rest)
        });
        let sent = ring_error(&self.sender.queue, sent)?;
        self.blocked = could_send && !self.sender.writable;
        if let Some(announcer) = &mut self.announcer
            && announcer.announce(backend, H::BYTES, self.counters)
        {
            self.announcer = None;
        }
        Ok(received == Rest::More || sent == Rest::More)
    }

    /// How long to sleep at most.
    fn timeout(&self) -> Option<Duration> {
        let announcer = self.announcer.as_ref().map(Announcer::timeout);
        [self.receiver.timeout(), announcer]
            .into_iter()
            .flatten()
            .min()
    }

    /// Takes up guest memory that was replaced since the last burst.
    fn follow_memory(&mut self, memory: &MemoryHandle) {
        let now = memory.memory();
        if !std::ptr::eq(&raw const *now, Arc::as_ptr(&self.memory)) {
            self.receiver.give_back();
            self.memory = now.into_inner();
        }
    }

    fn backend_event(&mut self, events: EventFlags) {
        if events.intersects(EventFlags::IN | EventFlags::ERR | EventFlags::HUP) {
            self.receiver.readable = true;
        }
        if events.contains(EventFlags::OUT) {
            self.sender.writable = true;
        }
    }
}

/// Interrupts the driver if it wants to know what was just done.
fn signal(
    queue: &mut Queue,
    memory: &GuestMemory,
    interrupt: &dyn DeviceInterrupt,
) -> Result<(), RingError> {
    if queue.needs_interrupt(memory)? {
        interrupt.queue_used(queue.index());
    }
    Ok(())
}

fn ring_error<T>(queue: &Queue, result: Result<T, RingError>) -> Result<T, WorkError> {
    result.map_err(|cause| WorkError::Ring {
        queue: queue.index(),
        cause,
    })
}
