//! The worker of one queue pair.

use std::sync::Arc;

use vm_memory::GuestAddressSpace;
use vm_migration::memory::{GuestMemory, MemoryHandle};
use vmm_sys_util::eventfd::EventFd;

use super::backend::NetBackend;
use super::counters::{NetCounters, PairCounters};
use super::header::RxHeader;
use super::rx::{Receiver, Rest};
use super::tx::Sender;
use crate::device::{ActiveQueue, DeviceInterrupt};
use crate::poll::{EventFlags, Poll, clear};
use crate::queue::{Queue, RingError};
use crate::server::WorkError;
use crate::worker::Work;

const STOP: u64 = 0;
const RX_KICK: u64 = 1;
const TX_KICK: u64 = 2;
const BACKEND: u64 = 3;

/// What every pair of a device has in common.
#[derive(Clone)]
pub(super) struct PairContext {
    pub(super) memory: MemoryHandle,
    pub(super) interrupt: Arc<dyn DeviceInterrupt>,
    pub(super) counters: Arc<NetCounters>,
    pub(super) mergeable: bool,
}

/// The worker: it moves packets between its two queues and its backend until it is stopped, and
/// keeps the queues for whoever stops it.
pub(super) struct PairWork<H> {
    /// Number of the pair.
    index: usize,
    context: PairContext,
    backend: Arc<dyn NetBackend>,
    rx_kick: EventFd,
    tx_kick: EventFd,
    /// Receive and transmit queue and how to finish headers, while the worker does not run.
    parts: Option<(Queue, Queue, H)>,
}

impl<H: RxHeader> PairWork<H> {
    pub(super) fn new(
        index: usize,
        context: PairContext,
        backend: Arc<dyn NetBackend>,
        queues: (ActiveQueue, ActiveQueue),
        header: H,
    ) -> Self {
        let (rx, tx) = queues;
        Self {
            index,
            context,
            backend,
            rx_kick: rx.kick,
            tx_kick: tx.kick,
            parts: Some((rx.queue, tx.queue, header)),
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
            poll.wait(more, |token, events| match token {
                STOP => stopped = true,
                RX_KICK => {
                    clear(&self.rx_kick);
                    pair.receiver.kicked();
                }
                TX_KICK => {
                    clear(&self.tx_kick);
                    pair.sender.kicked = true;
                }
                _ => pair.backend_event(events),
            })
            .map_err(WorkError::wait)?;
        }
        Ok(())
    }

    /// The two queues back, receive queue first.
    pub(super) fn into_queues(self) -> Vec<Queue> {
        self.parts
            .map(|(rx, tx, _)| vec![rx, tx])
            .unwrap_or_default()
    }
}

impl<H: RxHeader> Work for PairWork<H> {
    fn run(&mut self, stop: &EventFd) {
        let counters = Arc::clone(&self.context.counters);
        let Some((rx, tx, header)) = self.parts.take() else {
            return;
        };
        let Some(counters) = counters.pair(self.index) else {
            self.parts = Some((rx, tx, header));
            return;
        };
        let memory = self.context.memory.memory().into_inner();
        let mut pair = Pair {
            memory,
            receiver: Receiver::new(rx, header, self.context.mergeable),
            sender: Sender::new(tx, H::BYTES),
            iovecs: Vec::new(),
            counters,
            blocked: false,
        };
        if let Err(error) = self.serve(&mut pair, stop) {
            self.context.interrupt.needs_reset(&error);
        }
        pair.receiver.give_back(counters);
        let Pair {
            receiver, sender, ..
        } = pair;
        let (rx, header) = receiver.into_parts();
        self.parts = Some((rx, sender.queue, header));
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
        Ok(received == Rest::More || sent == Rest::More)
    }

    /// Takes up guest memory that was replaced since the last burst.
    fn follow_memory(&mut self, memory: &MemoryHandle) {
        let now = memory.memory();
        if !std::ptr::eq(&raw const *now, Arc::as_ptr(&self.memory)) {
            self.receiver.give_back(self.counters);
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
