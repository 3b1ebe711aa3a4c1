//! What the program steers by: memory that it and Ferry share.
//!
//! It is the one value of an array map that can be mapped, so that changing it takes no system
//! call and no privilege. There are two [`Slot`]s, of which the program uses the *active* one.
//! [`Shared::update`] fills the other and then makes that active.
//!
//! A packet that took up a slot may still be at it when the next update fills it anew. So a slot
//! has a sequence number, odd while the slot is filled: the program reads it before and after,
//! and trusts what it read in between only if both are the same and even. It has no way to have its
//! loads kept in order other than that x86 does that by itself.

use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering, fence};

use crate::config::RSS_MAX_TABLE_ENTRIES;
use crate::ctrl::RssConfig;
use crate::toeplitz::{MAX_INPUT_BYTES, Table};

/// Entries of the table in memory: one of fewer entries is repeated.
pub(super) const TABLE_ENTRIES: usize = RSS_MAX_TABLE_ENTRIES as usize;

/// "FYST", and the version of this layout and of the program that reads it.
const MAGIC: [u32; 2] = [0x5459_5346, 1];

/// The map's value.
#[derive(Debug)]
#[repr(C, align(64))]
pub(super) struct Shared {
    magic: [AtomicU32; 2],
    /// Which slot packets use: 0 or 1.
    active: AtomicU32,
    /// Nobody writes it.
    zero: AtomicU64,
    /// From a cache line of their own on.
    slots: [Slot; 2],
}

/// What one configuration comes to.
#[repr(C, align(64))]
pub(super) struct Slot {
    /// Odd while the rest is being written.
    sequence: AtomicU32,
    /// Types of hash that are on.
    types: AtomicU32,
    /// The queue of packets without a hash.
    unclassified: AtomicU16,
    /// The queue of each value of a hash's lowest bits.
    table: [AtomicU16; TABLE_ENTRIES],
    /// Toeplitz: a row per byte of input, in which the byte's value finds its share of the hash.
    rows: [[AtomicU32; 256]; MAX_INPUT_BYTES],
}

/// Where the program finds what, in bytes, of the types that instructions have them in.
pub(super) mod offset {
    use std::mem::offset_of;

    use super::{Shared, Slot};

    /// Of the active slot's number in [`Shared`].
    pub(in super::super) const ACTIVE: i16 = short(offset_of!(Shared, active));
    /// Of a zero in [`Shared`].
    pub(in super::super) const ZERO: i16 = short(offset_of!(Shared, zero));
    /// Of the first slot in [`Shared`].
    pub(in super::super) const SLOTS: i32 = long(offset_of!(Shared, slots));
    /// From one slot to the next.
    pub(in super::super) const SLOT_BYTES: i32 = long(size_of::<Slot>());
    /// Of a slot's parts in [`Slot`].
    pub(in super::super) const SEQUENCE: i16 = short(offset_of!(Slot, sequence));
    pub(in super::super) const TYPES: i16 = short(offset_of!(Slot, types));
    pub(in super::super) const UNCLASSIFIED: i16 = short(offset_of!(Slot, unclassified));
    pub(in super::super) const TABLE: i16 = short(offset_of!(Slot, table));
    pub(in super::super) const ROWS: i16 = short(offset_of!(Slot, rows));
    /// From one row to the next.
    pub(in super::super) const ROW_BYTES: i16 = short(size_of::<[u32; 256]>());

    const fn short(bytes: usize) -> i16 {
        assert!(bytes < 1 << 15);
        let [low, high, ..] = bytes.to_le_bytes();
        i16::from_le_bytes([low, high])
    }

    const fn long(bytes: usize) -> i32 {
        assert!(bytes < 1 << 31);
        let [b0, b1, b2, b3, ..] = bytes.to_le_bytes();
        i32::from_le_bytes([b0, b1, b2, b3])
    }
}

impl Shared {
    /// Says that the memory, which is new and zero, has this layout.
    pub(super) fn claim(&self) {
        for (place, magic) in self.magic.iter().zip(MAGIC) {
            place.store(magic, Ordering::Relaxed);
        }
    }

    /// Whether somebody said so.
    pub(super) fn is_claimed(&self) -> bool {
        let magic = self.magic.each_ref();
        magic.map(|place| place.load(Ordering::Relaxed)) == MAGIC
    }

    /// Has packets steered by `config` from now on. Only one thread may do so at a time.
    pub(super) fn update(&self, config: &RssConfig) {
        let next = (self.active.load(Ordering::Relaxed) & 1) ^ 1;
        let [even, odd] = &self.slots;
        let slot = if next == 0 { even } else { odd };
        slot.fill(config);
        // After what `fill` wrote.
        self.active.store(next, Ordering::Release);
    }
}

#[cfg(test)]
impl Shared {
    /// Fills the slot that packets use, under them, as a second update in a row does.
    pub(super) fn refill(&self, config: &RssConfig) {
        for slot in &self.slots {
            slot.fill(config);
        }
    }

    /// Leaves both slots as they are while they are filled.
    pub(super) fn begin_filling(&self) {
        for slot in &self.slots {
            slot.sequence.fetch_or(1, Ordering::Relaxed);
        }
    }
}

impl Slot {
    fn fill(&self, config: &RssConfig) {
        let sequence = self.sequence.load(Ordering::Relaxed) | 1;
        self.sequence.store(sequence, Ordering::Relaxed);
        // Nothing below is seen before the odd number is.
        fence(Ordering::Release);
        let hash = config.hash();
        self.types.store(hash.types.bits(), Ordering::Relaxed);
        self.unclassified
            .store(config.unclassified(), Ordering::Relaxed);
        for (place, queue) in self.table.iter().zip(config.table().iter().cycle()) {
            place.store(*queue, Ordering::Relaxed);
        }
        let table = Table::new(&hash.key);
        for (row, known) in self.rows.iter().zip(table.rows()) {
            for (place, share) in row.iter().zip(known) {
                place.store(*share, Ordering::Relaxed);
            }
        }
        self.sequence
            .store(sequence.wrapping_add(1), Ordering::Release);
    }
}

impl std::fmt::Debug for Slot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The rows are the key.
        f.write_str("Slot(..)")
    }
}
