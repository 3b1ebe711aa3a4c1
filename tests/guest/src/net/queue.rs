//! A split virtqueue (virtio 1.2, 2.7), one descriptor per buffer.

use core::sync::atomic::{Ordering, fence};

use crate::mmio::Mmio;

/// Bytes kept for a queue's rings: 256 entries need 4096 + 518 + 2054.
pub(crate) const RING_BYTES: u64 = 12288;
/// Most entries used.
pub(crate) const MAX_ENTRIES: u16 = 256;

const AVAILABLE: u64 = 4096;
const USED: u64 = 8192;
const DESCRIPTOR_NEXT: u16 = 1;
const DESCRIPTOR_WRITE: u16 = 2;
const AVAILABLE_NO_INTERRUPT: u16 = 1;
const USED_NO_NOTIFY: u16 = 1;

/// One queue's rings and where the driver is in them.
pub(crate) struct Queue {
    rings: Mmio,
    doorbell: Mmio,
    /// What the doorbell is rung with: the queue's number.
    number: u16,
    entries: u16,
    event_index: bool,
    available: u16,
    used: u16,
    /// `available` when the device was last told.
    told: u16,
    /// Times the doorbell was rung.
    pub(crate) kicks: u64,
}

/// A queue's number and doorbell, and what was negotiated about it.
pub(crate) struct QueueSetup {
    pub(crate) number: u16,
    pub(crate) entries: u16,
    pub(crate) doorbell: Mmio,
    pub(crate) event_index: bool,
}

/// A buffer the device is done with.
pub(crate) struct Used {
    pub(crate) descriptor: u16,
    pub(crate) len: u32,
}

impl Queue {
    /// An empty queue over zeroed `rings` of [`RING_BYTES`].
    pub(crate) const fn new(rings: Mmio, setup: QueueSetup) -> Self {
        let QueueSetup {
            number,
            entries,
            doorbell,
            event_index,
        } = setup;
        Self {
            rings,
            doorbell,
            number,
            entries,
            event_index,
            available: 0,
            used: 0,
            told: 0,
            kicks: 0,
        }
    }

    /// Entries in the rings.
    pub(crate) const fn entries(&self) -> u16 {
        self.entries
    }

    /// Addresses of descriptors, available ring, used ring.
    pub(crate) const fn addresses(rings: &Mmio) -> [u64; 3] {
        [rings.base(), rings.base() + AVAILABLE, rings.base() + USED]
    }

    fn set_descriptor(&self, index: u16, address: u64, len: u32, flags: u16) {
        let at = u64::from(index) * 16;
        self.rings.write(at, address);
        self.rings.write(at + 8, len);
        self.rings.write(at + 12, flags);
        self.rings.write(at + 14, index + 1);
    }

    /// Offers a buffer; the device hears of it with the next [`Queue::kick`].
    pub(crate) fn offer(&mut self, descriptor: u16, address: u64, len: u32, device_writes: bool) {
        let flags = if device_writes { DESCRIPTOR_WRITE } else { 0 };
        self.set_descriptor(descriptor, address, len, flags);
        self.offer_head(descriptor);
    }

    /// Offers one chain of three buffers, two to read and one to write.
    pub(crate) fn offer_command(&mut self, parts: [(u64, u32); 3]) {
        let flags = [DESCRIPTOR_NEXT, DESCRIPTOR_NEXT, DESCRIPTOR_WRITE];
        for ((index, (address, len)), flags) in (0..).zip(parts).zip(flags) {
            self.set_descriptor(index, address, len, flags);
        }
        self.offer_head(0);
    }

    fn offer_head(&mut self, descriptor: u16) {
        let slot = u64::from(self.available % self.entries);
        self.rings.write(AVAILABLE + 4 + 2 * slot, descriptor);
        self.available = self.available.wrapping_add(1);
    }

    /// Publishes what was offered and rings the doorbell if the device wants it.
    pub(crate) fn kick(&mut self) {
        if self.available == self.told {
            return;
        }
        fence(Ordering::Release);
        self.rings.write(AVAILABLE + 2, self.available);
        // The index must be visible before the device's wish is read.
        fence(Ordering::SeqCst);
        let wanted = if self.event_index {
            let event: u16 = self.rings.read(USED + 4 + 8 * u64::from(self.entries));
            self.available.wrapping_sub(event).wrapping_sub(1)
                < self.available.wrapping_sub(self.told)
        } else {
            self.rings.read::<u16>(USED) & USED_NO_NOTIFY == 0
        };
        self.told = self.available;
        if wanted {
            self.kicks += 1;
            self.doorbell.write(0, self.number);
        }
    }

    /// Whether the device returned buffers.
    pub(crate) fn has_used(&self) -> bool {
        self.rings.read::<u16>(USED + 2) != self.used
    }

    /// The next buffer the device is done with.
    pub(crate) fn next_used(&mut self) -> Option<Used> {
        if !self.has_used() {
            return None;
        }
        fence(Ordering::Acquire);
        let at = USED + 4 + 8 * u64::from(self.used % self.entries);
        let [low, high, ..] = self.rings.read::<u32>(at).to_le_bytes();
        let used = Used {
            descriptor: u16::from_le_bytes([low, high]),
            len: self.rings.read(at + 4),
        };
        self.used = self.used.wrapping_add(1);
        Some(used)
    }

    /// Asks for an interrupt at the next used buffer, or for none.
    pub(crate) fn want_interrupt(&self, wanted: bool) {
        let flag = if wanted { 0 } else { AVAILABLE_NO_INTERRUPT };
        self.rings.write(AVAILABLE, flag);
        if self.event_index {
            // An index just passed is not reached again for 65535 buffers.
            let event = if wanted {
                self.used
            } else {
                self.used.wrapping_sub(1)
            };
            self.rings
                .write(AVAILABLE + 4 + 2 * u64::from(self.entries), event);
        }
        // The wish must be visible before the used index is looked at again.
        fence(Ordering::SeqCst);
    }
}
