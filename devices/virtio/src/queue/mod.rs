//! The device's side of a split virtqueue (virtio 1.2, section 2.7).
//!
//! The driver is hostile: every index, length and address it wrote is checked before use, every
//! walk is bounded by the queue size, and whatever is wrong comes back as a [`RingError`], upon
//! which the device stops and asks for a reset. The `virtio-queue` crate is not used because
//! three things are needed here that it does not give: a chain that breaks off is told from a
//! chain that ends, the used elements of one packet are published by one index update (a driver
//! that polls must never see half a packet), and `VRING_AVAIL_F_NO_INTERRUPT` is honoured.

mod chain;
#[cfg(test)]
mod tests;

use std::num::Wrapping;
use std::sync::atomic::{Ordering, fence};

use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestAddress, GuestMemory as _, GuestMemoryError, Permissions};
use vm_migration::memory::GuestMemory;

pub use chain::{Chain, Segment};
pub(crate) use chain::{buffer_error, read_segments, to_usize, write_segments};

/// Largest queue size there is (virtio 1.2, section 2.7).
pub const MAX_QUEUE_SIZE: u16 = 32768;

/// `VRING_AVAIL_F_NO_INTERRUPT` (section 2.7.6): the driver wants no interrupts.
const AVAIL_F_NO_INTERRUPT: u16 = 1;
/// `VRING_USED_F_NO_NOTIFY` (section 2.7.8): the device wants no kicks.
const USED_F_NO_NOTIFY: u16 = 1;

/// Bytes of a descriptor.
const DESCRIPTOR_LEN: u64 = 16;
/// Bytes of an available ring's `flags` and `idx`, and of a used ring's.
const RING_HEADER_LEN: u64 = 4;
/// Offset of `idx` in either ring.
const RING_INDEX: u64 = 2;
/// Bytes of an available ring's element.
const AVAIL_ELEMENT_LEN: u64 = 2;
/// Bytes of a used ring's element.
const USED_ELEMENT_LEN: u64 = 8;
/// Bytes of the event word after either ring's elements.
const EVENT_LEN: u64 = 2;

/// What is wrong with a virtqueue. The device that meets it stops and sets `DEVICE_NEEDS_RESET`.
#[derive(Debug, thiserror::Error)]
pub enum RingError {
    /// The size is not a power of two from 1 to the largest the device allows.
    #[error("queue size {size} is not a power of two between 1 and {max}")]
    Size {
        /// The driver's size.
        size: u16,
        /// Largest size allowed.
        max: u16,
    },
    /// A part of the queue is not aligned (16, 2 and 4 bytes: section 2.7).
    #[error("{part} at {address:#x} is not aligned to {align} bytes")]
    Misaligned {
        /// Which part.
        part: &'static str,
        /// Its address.
        address: u64,
        /// What it should be aligned to.
        align: u64,
    },
    /// A part of the queue is not in guest memory.
    #[error("{part} ({len} bytes at {address:#x}) is not in guest memory")]
    NotInMemory {
        /// Which part.
        part: &'static str,
        /// Its address.
        address: u64,
        /// Its length in bytes.
        len: u64,
    },
    /// The available index is further ahead than the queue is long.
    #[error("available index {index} is more than {size} ahead of {next}")]
    AvailableIndex {
        /// What the driver wrote.
        index: u16,
        /// Where the device is.
        next: u16,
        /// Queue size.
        size: u16,
    },
    /// A descriptor index outside its table.
    #[error("descriptor index {index} is outside a table of {len}")]
    DescriptorIndex {
        /// The index.
        index: u16,
        /// Descriptors in the table.
        len: u32,
    },
    /// A chain has more descriptors than the queue (a loop, perhaps).
    #[error("descriptor chain is longer than the queue ({size})")]
    ChainTooLong {
        /// Queue size.
        size: u16,
    },
    /// The buffers of a chain have 2^32 bytes or more.
    #[error("the buffers of a descriptor chain have 2^32 bytes or more")]
    ChainTooBig,
    /// A device-readable descriptor follows a device-writable one (section 2.7.4.2).
    #[error("a readable descriptor follows a writable one")]
    ReadAfterWrite,
    /// An indirect descriptor that is nested, chained, not negotiated, or of a bad length.
    #[error("indirect descriptor is not valid: {0}")]
    Indirect(&'static str),
    /// A buffer is not in guest memory.
    #[error("buffer of {len} bytes at {address:#x} is not in guest memory")]
    Buffer {
        /// Its address.
        address: u64,
        /// Its length in bytes.
        len: u64,
    },
    /// A request is not what the device's protocol asks for.
    #[error("request is not valid: {0}")]
    Request(&'static str),
    /// Guest memory could not be accessed.
    #[error("access to guest memory at {address:#x} failed")]
    Memory {
        /// Where.
        address: u64,
        /// Why.
        #[source]
        cause: GuestMemoryError,
    },
}

/// Where a queue is and what was negotiated for it: all but its position.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct QueueSetup {
    /// Number of descriptors, a power of two.
    pub size: u16,
    /// GPA of the descriptor table.
    pub descriptors: u64,
    /// GPA of the available ring (the driver area).
    pub available: u64,
    /// GPA of the used ring (the device area).
    pub used: u64,
    /// `VIRTIO_F_RING_EVENT_IDX` was negotiated.
    pub event_idx: bool,
    /// `VIRTIO_F_INDIRECT_DESC` was negotiated.
    pub indirect: bool,
}

/// How far a queue has been worked off.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct QueuePosition {
    /// Next entry of the available ring to take.
    pub next_avail: u16,
    /// Next entry of the used ring to fill.
    pub next_used: u16,
}

/// A live virtqueue. Owned by the one thread that serves it.
#[derive(Debug)]
pub struct Queue {
    index: u16,
    setup: QueueSetup,
    next_avail: Wrapping<u16>,
    next_used: Wrapping<u16>,
    /// The driver's available index as last read; entries before it can be taken without
    /// reading it again.
    avail_seen: Wrapping<u16>,
    /// Elements written but not yet published.
    unpublished: u16,
    /// `next_used` when the need for an interrupt was last judged; unknown at first.
    judged: Option<Wrapping<u16>>,
}

impl Queue {
    /// The queue number `index`, checked against `memory`.
    ///
    /// # Errors
    /// [`RingError::Size`], [`RingError::Misaligned`] or [`RingError::NotInMemory`].
    pub fn new(
        index: u16,
        setup: QueueSetup,
        position: QueuePosition,
        memory: &GuestMemory,
    ) -> Result<Self, RingError> {
        let size = setup.size;
        if !size.is_power_of_two() || size > MAX_QUEUE_SIZE {
            return Err(RingError::Size {
                size,
                max: MAX_QUEUE_SIZE,
            });
        }
        let n = u64::from(size);
        let parts = [
            (
                "descriptor table",
                setup.descriptors,
                16,
                n * DESCRIPTOR_LEN,
            ),
            (
                "available ring",
                setup.available,
                2,
                RING_HEADER_LEN + n * AVAIL_ELEMENT_LEN + EVENT_LEN,
            ),
            (
                "used ring",
                setup.used,
                4,
                RING_HEADER_LEN + n * USED_ELEMENT_LEN + EVENT_LEN,
            ),
        ];
        for (part, address, align, len) in parts {
            if !address.is_multiple_of(align) {
                return Err(RingError::Misaligned {
                    part,
                    address,
                    align,
                });
            }
            let fits = usize::try_from(len).is_ok_and(|n| {
                memory.check_range(GuestAddress(address), n, Permissions::ReadWrite)
            });
            if !fits {
                return Err(RingError::NotInMemory { part, address, len });
            }
        }
        Ok(Self {
            index,
            setup,
            next_avail: Wrapping(position.next_avail),
            next_used: Wrapping(position.next_used),
            avail_seen: Wrapping(position.next_avail),
            unpublished: 0,
            judged: None,
        })
    }

    /// Number of the queue in its device.
    pub fn index(&self) -> u16 {
        self.index
    }

    /// Number of descriptors.
    pub fn size(&self) -> u16 {
        self.setup.size
    }

    /// How far the queue has been worked off.
    pub fn position(&self) -> QueuePosition {
        QueuePosition {
            next_avail: self.next_avail.0,
            next_used: self.next_used.0,
        }
    }

    /// Where the queue is and what was negotiated for it.
    pub(crate) fn setup(&self) -> QueueSetup {
        self.setup
    }

    /// The queue as another left it that had worked it off to `position`.
    pub(crate) fn at(self, position: QueuePosition) -> Self {
        Self {
            next_avail: Wrapping(position.next_avail),
            next_used: Wrapping(position.next_used),
            avail_seen: Wrapping(position.next_avail),
            unpublished: 0,
            judged: None,
            ..self
        }
    }

    /// The used index in memory, for a queue that another serves.
    ///
    /// # Errors
    /// [`RingError::Memory`].
    pub(crate) fn published(&self, memory: &GuestMemory) -> Result<u16, RingError> {
        load_u16(memory, self.setup.used + RING_INDEX, Ordering::Acquire)
    }

    /// Takes the next chain into `chain`; `false` if there is none.
    ///
    /// # Errors
    /// Any [`RingError`] about what the driver wrote.
    pub fn pop(&mut self, memory: &GuestMemory, chain: &mut Chain) -> Result<bool, RingError> {
        if self.next_avail == self.avail_seen && !self.look_for_more(memory)? {
            return Ok(false);
        }
        let slot = u64::from(self.next_avail.0 & (self.setup.size - 1));
        let address = self.setup.available + RING_HEADER_LEN + slot * AVAIL_ELEMENT_LEN;
        let head = load_u16(memory, address, Ordering::Relaxed)?;
        chain.walk(memory, &self.setup, head)?;
        self.next_avail += 1;
        Ok(true)
    }

    /// Reads the available index; whether there is anything to take.
    fn look_for_more(&mut self, memory: &GuestMemory) -> Result<bool, RingError> {
        // Acquire: the ring entries and descriptors up to the index are read after it.
        let index = Wrapping(load_u16(
            memory,
            self.setup.available + RING_INDEX,
            Ordering::Acquire,
        )?);
        if (index - self.next_avail).0 > self.setup.size {
            return Err(RingError::AvailableIndex {
                index: index.0,
                next: self.next_avail.0,
                size: self.setup.size,
            });
        }
        self.avail_seen = index;
        Ok(index != self.next_avail)
    }

    /// Gives back the last `count` chains taken, as if never taken. Only chains for which
    /// nothing was put into the used ring.
    pub fn unpop(&mut self, count: u16) {
        self.next_avail -= count;
    }

    /// Writes a used element that the driver does not see before [`publish`](Self::publish).
    ///
    /// # Errors
    /// [`RingError::Memory`].
    pub fn push_used(
        &mut self,
        memory: &GuestMemory,
        head: u16,
        len: u32,
    ) -> Result<(), RingError> {
        let slot =
            u64::from((self.next_used + Wrapping(self.unpublished)).0 & (self.setup.size - 1));
        let address = self.setup.used + RING_HEADER_LEN + slot * USED_ELEMENT_LEN;
        let element = [u32::from(head).to_le(), len.to_le()];
        memory
            .write_obj(element, GuestAddress(address))
            .map_err(|cause| RingError::Memory { address, cause })?;
        self.unpublished += 1;
        Ok(())
    }

    /// Shows the driver all elements written since the last call, at once.
    ///
    /// # Errors
    /// [`RingError::Memory`].
    pub fn publish(&mut self, memory: &GuestMemory) -> Result<(), RingError> {
        self.next_used += self.unpublished;
        self.unpublished = 0;
        // Release: the elements, and the buffers they speak of, are written before the index.
        store_u16(
            memory,
            self.setup.used + RING_INDEX,
            self.next_used.0,
            Ordering::Release,
        )
    }

    /// [`push_used`](Self::push_used) and [`publish`](Self::publish) of one chain.
    ///
    /// # Errors
    /// [`RingError::Memory`].
    pub fn complete(&mut self, memory: &GuestMemory, head: u16, len: u32) -> Result<(), RingError> {
        self.push_used(memory, head, len)?;
        self.publish(memory)
    }

    /// Whether the driver wants an interrupt for what was published since this was last asked
    /// (section 2.7.7). The first answer after a restore may be a spurious yes.
    ///
    /// # Errors
    /// [`RingError::Memory`].
    pub fn needs_interrupt(&mut self, memory: &GuestMemory) -> Result<bool, RingError> {
        let new = self.next_used;
        let old = self.judged.replace(new);
        if old == Some(new) {
            return Ok(false);
        }
        // The driver writes its wish and then looks at the used index; we publish the index and
        // then look at the wish. Without a full fence on both sides both could miss.
        fence(Ordering::SeqCst);
        if self.setup.event_idx {
            let address = self.setup.available
                + RING_HEADER_LEN
                + u64::from(self.setup.size) * AVAIL_ELEMENT_LEN;
            let event = Wrapping(load_u16(memory, address, Ordering::Relaxed)?);
            return Ok(old.is_none_or(|old| new - event - Wrapping(1) < new - old));
        }
        let flags = load_u16(memory, self.setup.available, Ordering::Relaxed)?;
        Ok(flags & AVAIL_F_NO_INTERRUPT == 0)
    }

    /// Asks the driver not to kick; it may all the same.
    ///
    /// # Errors
    /// [`RingError::Memory`].
    pub fn disable_kicks(&mut self, memory: &GuestMemory) -> Result<(), RingError> {
        if self.setup.event_idx {
            // The event word is left where it is: it has been passed, so no kick comes until the
            // index has gone once around.
            return Ok(());
        }
        store_u16(memory, self.setup.used, USED_F_NO_NOTIFY, Ordering::Relaxed)
    }

    /// Asks the driver to kick when it adds a chain. `true` if there is one already: the caller
    /// must go on taking, for no kick will come for it.
    ///
    /// # Errors
    /// [`RingError::Memory`], [`RingError::AvailableIndex`].
    pub fn enable_kicks(&mut self, memory: &GuestMemory) -> Result<bool, RingError> {
        if self.setup.event_idx {
            let address =
                self.setup.used + RING_HEADER_LEN + u64::from(self.setup.size) * USED_ELEMENT_LEN;
            store_u16(memory, address, self.next_avail.0, Ordering::Relaxed)?;
        } else {
            store_u16(memory, self.setup.used, 0, Ordering::Relaxed)?;
        }
        // Mirror of the fence in `needs_interrupt`: our wish is visible before we look again.
        fence(Ordering::SeqCst);
        self.look_for_more(memory)
    }
}

fn load_u16(memory: &GuestMemory, address: u64, order: Ordering) -> Result<u16, RingError> {
    memory
        .load::<u16>(GuestAddress(address), order)
        .map(u16::from_le)
        .map_err(|cause| RingError::Memory { address, cause })
}

fn store_u16(
    memory: &GuestMemory,
    address: u64,
    value: u16,
    order: Ordering,
) -> Result<(), RingError> {
    memory
        .store(value.to_le(), GuestAddress(address), order)
        .map_err(|cause| RingError::Memory { address, cause })
}
