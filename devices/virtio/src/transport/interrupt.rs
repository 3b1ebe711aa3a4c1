//! From a device's worker threads to the driver: vectors, ISR and the reset request.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, Ordering};

use devices::MsiLine;
use vmm_sys_util::eventfd::EventFd;

use crate::device::DeviceInterrupt;

/// `VIRTIO_MSI_NO_VECTOR`: no interrupts for this event.
pub(super) const NO_VECTOR: u16 = 0xffff;
/// ISR bit: a queue has used buffers.
const ISR_QUEUE: u8 = 1;
/// ISR bit: the configuration changed.
const ISR_CONFIG: u8 = 2;

/// What transport and workers share. All atomics: a worker never waits for a vCPU.
///
/// Relaxed order is enough throughout: the data an interrupt speaks of is ordered by the ring's
/// own indices, and a vector changed while an interrupt is under way may see either value.
pub(super) struct Interrupts {
    id: String,
    lines: Vec<Arc<dyn MsiLine>>,
    queues: Vec<QueueVector>,
    config_vector: AtomicU16,
    msix_enabled: AtomicBool,
    isr: AtomicU8,
    generation: AtomicU8,
    needs_reset: AtomicBool,
    /// Somebody has the eventfd of a vector that is not the queue's any more.
    stale: AtomicBool,
}

/// A queue's vector.
struct QueueVector {
    vector: AtomicU16,
    /// Somebody else has its eventfd.
    lent: AtomicBool,
}

impl Interrupts {
    pub(super) fn new(id: String, lines: Vec<Arc<dyn MsiLine>>, queues: usize) -> Self {
        Self {
            id,
            lines,
            queues: (0..queues)
                .map(|_| QueueVector {
                    vector: AtomicU16::new(NO_VECTOR),
                    lent: AtomicBool::new(false),
                })
                .collect(),
            config_vector: AtomicU16::new(NO_VECTOR),
            msix_enabled: AtomicBool::new(false),
            isr: AtomicU8::new(0),
            generation: AtomicU8::new(0),
            needs_reset: AtomicBool::new(false),
            stale: AtomicBool::new(false),
        }
    }

    /// The vector of queue `index`.
    pub(super) fn queue_vector(&self, index: u16) -> u16 {
        self.queues
            .get(usize::from(index))
            .map_or(NO_VECTOR, |q| q.vector.load(Ordering::Relaxed))
    }

    /// Sets the vector of queue `index`; one that does not exist becomes "none", which is how
    /// the driver learns of it (section 4.1.5.1.2.1).
    pub(super) fn set_queue_vector(&self, index: u16, vector: u16) {
        if let Some(queue) = self.queues.get(usize::from(index)) {
            let vector = self.existing(vector);
            if queue.vector.swap(vector, Ordering::Relaxed) != vector {
                self.take_back(queue);
            }
        }
    }

    pub(super) fn config_vector(&self) -> u16 {
        self.config_vector.load(Ordering::Relaxed)
    }

    pub(super) fn set_config_vector(&self, vector: u16) {
        let vector = self.existing(vector);
        self.config_vector.store(vector, Ordering::Relaxed);
    }

    pub(super) fn set_msix_enabled(&self, enabled: bool) {
        if self.msix_enabled.swap(enabled, Ordering::Relaxed) != enabled {
            self.queues.iter().for_each(|queue| self.take_back(queue));
        }
    }

    fn take_back(&self, queue: &QueueVector) {
        if queue.lent.swap(false, Ordering::Relaxed) {
            self.stale.store(true, Ordering::Relaxed);
        }
    }

    /// Whether somebody signals wrong vectors since this was last asked, and must get new ones.
    pub(super) fn take_stale(&self) -> bool {
        self.stale.swap(false, Ordering::Relaxed)
    }

    /// Reads and clears the interrupt status.
    pub(super) fn take_isr(&self) -> u8 {
        self.isr.swap(0, Ordering::Relaxed)
    }

    pub(super) fn generation(&self) -> u8 {
        self.generation.load(Ordering::Relaxed)
    }

    pub(super) fn is_broken(&self) -> bool {
        self.needs_reset.load(Ordering::Relaxed)
    }

    /// What a virtio reset clears: vectors, interrupt status and the reset request.
    pub(super) fn reset(&self) {
        for queue in &self.queues {
            queue.vector.store(NO_VECTOR, Ordering::Relaxed);
            queue.lent.store(false, Ordering::Relaxed);
        }
        self.stale.store(false, Ordering::Relaxed);
        self.config_vector.store(NO_VECTOR, Ordering::Relaxed);
        self.isr.store(0, Ordering::Relaxed);
        self.needs_reset.store(false, Ordering::Relaxed);
    }

    /// Saved parts that are not registers of a queue: ISR, generation, reset request.
    pub(super) fn save(&self) -> (u8, u8, bool) {
        (
            self.isr.load(Ordering::Relaxed),
            self.generation(),
            self.is_broken(),
        )
    }

    /// Takes over what [`save`](Self::save) gave.
    pub(super) fn restore(&self, (isr, generation, broken): (u8, u8, bool)) {
        self.isr
            .store(isr & (ISR_QUEUE | ISR_CONFIG), Ordering::Relaxed);
        self.generation.store(generation, Ordering::Relaxed);
        self.needs_reset.store(broken, Ordering::Relaxed);
    }

    fn existing(&self, vector: u16) -> u16 {
        if usize::from(vector) < self.lines.len() {
            vector
        } else {
            NO_VECTOR
        }
    }

    /// Without MSI-X there is no interrupt at all (the function has no pin): the status bit is
    /// set for a driver that polls it.
    fn signal(&self, vector: u16, isr: u8) {
        if !self.msix_enabled.load(Ordering::Relaxed) {
            self.isr.fetch_or(isr, Ordering::Relaxed);
            return;
        }
        let Some(line) = self.lines.get(usize::from(vector)) else {
            return;
        };
        if let Err(error) = line.trigger() {
            tracing::error!(device = self.id, vector, %error, "interrupt could not be sent");
        }
    }
}

impl DeviceInterrupt for Interrupts {
    fn queue_used(&self, index: u16) {
        self.signal(self.queue_vector(index), ISR_QUEUE);
    }

    fn queue_event(&self, index: u16) -> Option<EventFd> {
        if !self.msix_enabled.load(Ordering::Relaxed) {
            return None;
        }
        let queue = self.queues.get(usize::from(index))?;
        let vector = queue.vector.load(Ordering::Relaxed);
        let line = self.lines.get(usize::from(vector))?;
        let event = line.eventfd().try_clone().inspect_err(|error| {
            tracing::warn!(device = self.id, %error, "interrupts go a longer way: no descriptor");
        });
        queue.lent.store(event.is_ok(), Ordering::Relaxed);
        event.ok()
    }

    fn config_changed(&self) {
        self.generation.fetch_add(1, Ordering::Relaxed);
        self.signal(self.config_vector(), ISR_CONFIG);
    }

    fn needs_reset(&self, reason: &dyn fmt::Display) {
        if !self.needs_reset.swap(true, Ordering::Relaxed) {
            tracing::error!(device = self.id, %reason, "virtio device stopped until it is reset");
        }
        self.config_changed();
    }
}
