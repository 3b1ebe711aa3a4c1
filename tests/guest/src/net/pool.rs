//! Receive buffers, and keeping what they received for as long as possible.
//!
//! The driver never writes these pages: only the device does. A page a
//! migration forgets because the device's writes were not logged is therefore
//! seen here and nowhere else. Each received piece is kept until its buffer is
//! the oldest, checked once more, and only then offered again.

use crate::memory::Ram;
use crate::mmio::Mmio;
use crate::serial::say;

/// Bytes checked or copied at a time.
const PIECE: usize = 64;
/// Buffers checked in one audit step.
const AUDIT_BATCH: usize = 16;
/// Corrupt buffers reported in full.
const MAX_REPORTS: u64 = 8;

/// All receive buffers of a NIC.
pub(crate) struct Pool {
    memory: Mmio,
    buffer_bytes: u32,
    /// Buffers the device does not have, oldest first, from `head`.
    order: &'static mut [u16],
    head: usize,
    len: usize,
    /// Per buffer: bytes received and not yet given up; their digest.
    received: &'static mut [u32],
    digests: &'static mut [u64],
    /// Next buffer of an audit under way.
    audit: Option<usize>,
    /// Received pieces checked in the last audit.
    pub(crate) audited: u64,
    /// Received pieces that had changed when checked, ever.
    pub(crate) corrupt: u64,
    /// The NIC's number, for reports.
    nic: u8,
}

/// A digest that takes the bytes in pieces of [`PIECE`].
struct Digest(u64);

impl Digest {
    fn update(&mut self, piece: &[u8]) {
        for chunk in piece.chunks(8) {
            let mut bytes = [0; 8];
            bytes[..chunk.len()].copy_from_slice(chunk);
            let mixed = (self.0 ^ u64::from_le_bytes(bytes)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            self.0 = mixed ^ (mixed >> 29);
        }
    }
}

impl Pool {
    /// `count` buffers of `buffer_bytes`; all are free, the first one oldest.
    pub(crate) fn new(nic: u8, count: u16, buffer_bytes: u32, ram: &mut Ram) -> Option<Self> {
        let buffers = u64::from(count);
        let pool = Self {
            memory: ram.take_dma(buffers * u64::from(buffer_bytes))?,
            buffer_bytes,
            order: ram.take_slice(buffers)?,
            head: 0,
            len: usize::from(count),
            received: ram.take_slice(buffers)?,
            digests: ram.take_slice(buffers)?,
            audit: None,
            audited: 0,
            corrupt: 0,
            nic,
        };
        for (slot, buffer) in pool.order.iter_mut().zip(0..) {
            *slot = buffer;
        }
        Some(pool)
    }

    /// Where a buffer lies.
    pub(crate) fn address(&self, buffer: u16) -> u64 {
        self.memory.base() + self.offset(buffer)
    }

    fn offset(&self, buffer: u16) -> u64 {
        u64::from(buffer) * u64::from(self.buffer_bytes)
    }

    /// Bytes of each buffer.
    pub(crate) const fn buffer_bytes(&self) -> u32 {
        self.buffer_bytes
    }

    /// The oldest buffer, to be offered to the device; what it held is checked
    /// and given up.
    pub(crate) fn give_up_oldest(&mut self) -> Option<u16> {
        self.len = self.len.checked_sub(1)?;
        let buffer = self.order[self.head];
        self.head = (self.head + 1) % self.order.len();
        self.check(buffer);
        self.received[usize::from(buffer)] = 0;
        Some(buffer)
    }

    /// Copies what the device wrote to `buffer` and keeps the buffer as the
    /// newest. Bytes beyond `into` or the buffer are left out; how many came.
    pub(crate) fn receive(&mut self, buffer: u16, len: u32, into: &mut [u8]) -> usize {
        let len = len
            .min(self.buffer_bytes)
            .min(u32::try_from(into.len()).unwrap_or(u32::MAX));
        let into = &mut into[..len as usize];
        self.memory.copy_out(self.offset(buffer), into);
        let mut digest = Digest(u64::from(len));
        into.chunks(PIECE).for_each(|piece| digest.update(piece));
        self.received[usize::from(buffer)] = len;
        self.digests[usize::from(buffer)] = digest.0;
        let tail = (self.head + self.len) % self.order.len();
        self.order[tail] = buffer;
        self.len += 1;
        into.len()
    }

    /// Checks what a buffer received is still there; whether it held anything.
    fn check(&mut self, buffer: u16) -> bool {
        let len = self.received[usize::from(buffer)];
        let mut digest = Digest(u64::from(len));
        let (mut piece, mut at, end) = ([0; PIECE], 0, u64::from(len));
        while at < end {
            let step = usize::try_from(end - at).map_or(PIECE, |left| left.min(PIECE));
            self.memory
                .copy_out(self.offset(buffer) + at, &mut piece[..step]);
            digest.update(&piece[..step]);
            at += step as u64;
        }
        if len != 0 && digest.0 != self.digests[usize::from(buffer)] {
            self.corrupt += 1;
            if self.corrupt <= MAX_REPORTS {
                let (nic, gpa) = (self.nic, self.address(buffer));
                say!(
                    "ERROR {{\"nic\":{nic},\"what\":\"rx-page\",\"gpa\":\"{gpa:#x}\",\"len\":{len}}}"
                );
            }
        }
        len != 0
    }

    /// Starts checking everything kept.
    pub(crate) fn start_audit(&mut self) {
        self.audit = Some(0);
        self.audited = 0;
    }

    /// Checks some; whether an audit is still under way.
    pub(crate) fn audit_step(&mut self) -> bool {
        let Some(from) = self.audit else {
            return false;
        };
        let end = self.received.len().min(from + AUDIT_BATCH);
        for buffer in (from..end).filter_map(|buffer| u16::try_from(buffer).ok()) {
            self.audited += u64::from(self.check(buffer));
        }
        self.audit = (end < self.received.len()).then_some(end);
        self.audit.is_some()
    }
}
