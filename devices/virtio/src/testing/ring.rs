//! A driver's split ring.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use vm_memory::{Bytes, GuestAddress};
use vm_migration::memory::GuestMemory;

use super::wait_for;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// Where a ring of `size` is, from `base` on (64 KiB suffice for 1024).
#[derive(Clone, Copy, Debug)]
pub(crate) struct RingLayout {
    pub(crate) size: u16,
    pub(crate) descriptors: u64,
    pub(crate) available: u64,
    pub(crate) used: u64,
    /// Room for indirect tables.
    pub(crate) indirect: u64,
}

impl RingLayout {
    pub(crate) fn at(base: u64, size: u16) -> Self {
        Self {
            size,
            descriptors: base,
            available: base + 0x4000,
            used: base + 0x6000,
            indirect: base + 0x9000,
        }
    }
}

/// An element of the used ring.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Used {
    pub(crate) head: u16,
    pub(crate) len: u32,
}

/// The driver's side.
pub(crate) struct Ring {
    pub(crate) layout: RingLayout,
    pub(crate) memory: Arc<GuestMemory>,
    free: Vec<u16>,
    chains: Vec<Vec<u16>>,
    next_avail: u16,
    last_used: u16,
    event_idx: bool,
}

impl Ring {
    /// An empty ring; its memory is cleared.
    pub(crate) fn new(memory: Arc<GuestMemory>, layout: RingLayout, event_idx: bool) -> Self {
        memory
            .write_slice(&[0; 0x9000], GuestAddress(layout.descriptors))
            .unwrap();
        Self {
            free: (0..layout.size).rev().collect(),
            chains: vec![Vec::new(); usize::from(layout.size)],
            layout,
            memory,
            next_avail: 0,
            last_used: 0,
            event_idx,
        }
    }

    /// `len` bytes of the guest's memory.
    pub(crate) fn bytes(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        let at = GuestAddress(address);
        self.memory.read_slice(&mut bytes, at).unwrap();
        bytes
    }

    /// Writes the guest's memory.
    pub(crate) fn put(&self, address: u64, bytes: &[u8]) {
        let at = GuestAddress(address);
        self.memory.write_slice(bytes, at).unwrap();
    }

    /// The next used element, once there is one.
    #[track_caller]
    pub(crate) fn wait_used(&mut self) -> Used {
        let mut used = None;
        wait_for("used chain", || {
            used = self.pop_used();
            used.is_some()
        });
        used.unwrap()
    }

    pub(crate) fn u16(&self, address: u64) -> u16 {
        self.memory
            .load::<u16>(GuestAddress(address), Ordering::Acquire)
            .unwrap()
    }

    pub(crate) fn set_u16(&self, address: u64, value: u16) {
        self.memory
            .store(value, GuestAddress(address), Ordering::Release)
            .unwrap();
    }

    pub(crate) fn set_descriptor(
        &self,
        table: u64,
        index: u16,
        (address, len): (u64, u32),
        flags: u16,
        next: u16,
    ) {
        let mut raw = Vec::new();
        raw.extend_from_slice(&address.to_le_bytes());
        raw.extend_from_slice(&len.to_le_bytes());
        raw.extend_from_slice(&flags.to_le_bytes());
        raw.extend_from_slice(&next.to_le_bytes());
        let at = table + u64::from(index) * 16;
        self.memory.write_slice(&raw, GuestAddress(at)).unwrap();
    }

    /// Makes a chain of buffers available, without a kick; its head.
    pub(crate) fn add(&mut self, readable: &[(u64, u32)], writable: &[(u64, u32)]) -> u16 {
        let count = readable.len() + writable.len();
        let indices: Vec<u16> = (0..count).map(|_| self.free.pop().unwrap()).collect();
        self.write_chain(self.layout.descriptors, &indices, readable, writable);
        let head = indices[0];
        self.chains[usize::from(head)] = indices;
        self.expose(head);
        head
    }

    /// The same with the buffers in an indirect table.
    pub(crate) fn add_indirect(&mut self, readable: &[(u64, u32)], writable: &[(u64, u32)]) -> u16 {
        let count = u16::try_from(readable.len() + writable.len()).unwrap();
        let head = self.free.pop().unwrap();
        let table = self.layout.indirect + u64::from(head) * 0x100;
        let indices: Vec<u16> = (0..count).collect();
        self.write_chain(table, &indices, readable, writable);
        let len = u32::from(count) * 16;
        self.set_descriptor(self.layout.descriptors, head, (table, len), INDIRECT, 0);
        self.chains[usize::from(head)] = vec![head];
        self.expose(head);
        head
    }

    fn write_chain(
        &self,
        table: u64,
        indices: &[u16],
        readable: &[(u64, u32)],
        writable: &[(u64, u32)],
    ) {
        let buffers = readable
            .iter()
            .map(|b| (*b, 0))
            .chain(writable.iter().map(|b| (*b, WRITE)));
        for (place, (buffer, flags)) in buffers.enumerate() {
            let next = indices.get(place + 1);
            let flags = flags | if next.is_some() { NEXT } else { 0 };
            let next = next.copied().unwrap_or(0);
            self.set_descriptor(table, indices[place], buffer, flags, next);
        }
    }

    /// Puts `head` into the available ring.
    pub(crate) fn expose(&mut self, head: u16) {
        let slot = u64::from(self.next_avail % self.layout.size);
        self.set_u16(self.layout.available + 4 + slot * 2, head);
        self.next_avail = self.next_avail.wrapping_add(1);
        self.set_u16(self.layout.available + 2, self.next_avail);
    }

    /// Whether the device wants a kick for the last `added` chains.
    pub(crate) fn needs_kick(&self, added: u16) -> bool {
        fence(Ordering::SeqCst);
        if self.event_idx {
            let event = self.u16(self.layout.used + 4 + u64::from(self.layout.size) * 8);
            let new = self.next_avail;
            new.wrapping_sub(event).wrapping_sub(1) < added
        } else {
            self.u16(self.layout.used) & 1 == 0
        }
    }

    /// Asks for an interrupt at the next used chain; whether there is one already.
    pub(crate) fn enable_interrupts(&self) -> bool {
        if self.event_idx {
            let at = self.layout.available + 4 + u64::from(self.layout.size) * 2;
            self.set_u16(at, self.last_used);
        } else {
            self.set_u16(self.layout.available, 0);
        }
        fence(Ordering::SeqCst);
        self.u16(self.layout.used + 2) != self.last_used
    }

    /// Takes the next used chain.
    pub(crate) fn pop_used(&mut self) -> Option<Used> {
        if self.u16(self.layout.used + 2) == self.last_used {
            return None;
        }
        let slot = u64::from(self.last_used % self.layout.size);
        let raw: [u32; 2] = self
            .memory
            .read_obj(GuestAddress(self.layout.used + 4 + slot * 8))
            .unwrap();
        self.last_used = self.last_used.wrapping_add(1);
        let head = u16::try_from(raw[0]).unwrap();
        self.free
            .append(&mut std::mem::take(&mut self.chains[usize::from(head)]));
        Some(Used { head, len: raw[1] })
    }

    /// Chains made available so far, modulo 2^16.
    pub(crate) fn made_available(&self) -> u16 {
        self.next_avail
    }

    /// The device's used index.
    pub(crate) fn used_index(&self) -> u16 {
        self.u16(self.layout.used + 2)
    }
}
