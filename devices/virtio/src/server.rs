//! A worker that answers the requests of one queue, one by one.

use std::fmt;
use std::io;
use std::sync::Arc;

use vm_memory::GuestAddressSpace;
use vm_migration::memory::{GuestMemory, MemoryHandle};
use vmm_sys_util::eventfd::EventFd;

use crate::device::{ActiveQueue, DeviceInterrupt};
use crate::poll::{Poll, clear};
use crate::queue::{Chain, Queue, RingError};
use crate::worker::Work;

/// Requests served before the worker looks whether it is to stop: a driver that adds requests
/// without end does not keep the device from being paused.
const BURST: usize = 64;

/// Answers requests.
pub(crate) trait Handler: Send + 'static {
    /// Carries out the request in `chain`; the number of bytes written to it.
    ///
    /// # Errors
    /// The request cannot even be answered: the device stops and asks for a reset.
    fn handle(&mut self, memory: &GuestMemory, chain: &Chain) -> Result<u32, RingError>;
}

/// Why a worker stopped before it was told to.
#[derive(Debug, thiserror::Error)]
pub(crate) enum WorkError {
    /// The driver broke the ring.
    #[error("queue {queue} is broken: {cause}")]
    Ring {
        /// Number of the queue.
        queue: u16,
        /// How.
        #[source]
        cause: RingError,
    },
    /// The host failed the device.
    #[error("{operation} failed: {cause}")]
    Host {
        /// What was tried.
        operation: &'static str,
        /// What the host said.
        #[source]
        cause: io::Error,
    },
}

impl WorkError {
    /// Wraps an error of waiting for events.
    pub(crate) fn wait(cause: io::Error) -> Self {
        Self::Host {
            operation: "waiting for events",
            cause,
        }
    }
}

/// The worker.
pub(crate) struct QueueServer<H> {
    pub(crate) queue: Queue,
    pub(crate) handler: H,
    kick: EventFd,
    memory: MemoryHandle,
    interrupt: Arc<dyn DeviceInterrupt>,
    chain: Chain,
}

impl<H: fmt::Debug> fmt::Debug for QueueServer<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("QueueServer")
            .field("queue", &self.queue)
            .field("handler", &self.handler)
            .finish_non_exhaustive()
    }
}

const STOP: u64 = 0;
const KICK: u64 = 1;

impl<H: Handler> QueueServer<H> {
    pub(crate) fn new(
        active: ActiveQueue,
        memory: MemoryHandle,
        interrupt: Arc<dyn DeviceInterrupt>,
        handler: H,
    ) -> Self {
        Self {
            queue: active.queue,
            kick: active.kick,
            handler,
            memory,
            interrupt,
            chain: Chain::default(),
        }
    }

    fn serve(&mut self, stop: &EventFd) -> Result<(), WorkError> {
        let host = |cause| WorkError::Host {
            operation: "watching a doorbell",
            cause,
        };
        let mut poll = Poll::new().map_err(host)?;
        poll.add_event(stop, STOP).map_err(host)?;
        poll.add_event(&self.kick, KICK).map_err(host)?;
        let mut stopped = false;
        while !stopped {
            let index = self.queue.index();
            let more = self.burst().map_err(|cause| WorkError::Ring {
                queue: index,
                cause,
            })?;
            let kick = &self.kick;
            poll.wait(more, |token, _| match token {
                STOP => stopped = true,
                _ => clear(kick),
            })
            .map_err(WorkError::wait)?;
        }
        Ok(())
    }

    /// Serves up to [`BURST`] requests; whether there are more.
    fn burst(&mut self) -> Result<bool, RingError> {
        let memory = self.memory.memory();
        self.queue.disable_kicks(&memory)?;
        let mut more = true;
        for _ in 0..BURST {
            if !self.queue.pop(&memory, &mut self.chain)? {
                // Takes the driver's kicks again, and only then is sure that there is nothing.
                more = self.queue.enable_kicks(&memory)?;
                if !more {
                    break;
                }
                continue;
            }
            let written = self.handler.handle(&memory, &self.chain)?;
            self.queue.complete(&memory, self.chain.head(), written)?;
        }
        if self.queue.needs_interrupt(&memory)? {
            self.interrupt.queue_used(self.queue.index());
        }
        Ok(more)
    }
}

impl<H: Handler> Work for QueueServer<H> {
    fn run(&mut self, stop: &EventFd) {
        if let Err(error) = self.serve(stop) {
            self.interrupt.needs_reset(&error);
        }
    }
}
