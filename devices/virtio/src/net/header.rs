//! What the device writes into the header of a received packet.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use net_util::flow::HEAD_BYTES;
use net_util::hash::HashConfig;
use net_util::header::HeaderSize;
use net_util::toeplitz::PacketHasher;
use parking_lot::Mutex;
use vm_migration::memory::GuestMemory;

use super::buffers::RxBuffers;
use super::counters::PairCounters;
use crate::queue::RingError;

/// Offset of `num_buffers`, the first field that the host does not fill in.
const NUM_BUFFERS: usize = 10;

/// Finishes headers. The kind is chosen at activation, so a device without hash reports has no
/// trace of them on its path.
pub(super) trait RxHeader: Send + 'static {
    /// Bytes of a header.
    const BYTES: usize;

    /// Completes the header of the packet of `len` bytes at the start of `buffers`, which goes
    /// into `num_buffers` of them.
    fn finish(
        &mut self,
        memory: &GuestMemory,
        buffers: &RxBuffers,
        len: usize,
        num_buffers: u16,
        counters: &PairCounters,
    ) -> Result<(), RingError>;
}

/// The 12-byte header.
#[derive(Debug)]
pub(super) struct Plain;

impl RxHeader for Plain {
    const BYTES: usize = HeaderSize::V1.bytes();

    fn finish(
        &mut self,
        memory: &GuestMemory,
        buffers: &RxBuffers,
        _len: usize,
        num_buffers: u16,
        _counters: &PairCounters,
    ) -> Result<(), RingError> {
        buffers.write_at(memory, NUM_BUFFERS, &num_buffers.to_le_bytes())
    }
}

/// The guest's hash configuration, from the control queue to the pairs' workers.
#[derive(Debug)]
pub(super) struct HashCell {
    /// Counts the changes, so that a worker need not take the lock for each packet.
    changes: AtomicU64,
    hasher: Mutex<Arc<PacketHasher>>,
}

impl HashCell {
    pub(super) fn new(config: &HashConfig) -> Self {
        Self {
            changes: AtomicU64::new(0),
            hasher: Mutex::new(Arc::new(PacketHasher::new(config))),
        }
    }

    /// From the next packet on, hashes are by `config`.
    pub(super) fn set(&self, config: &HashConfig) {
        // The table is made before the lock is taken.
        let hasher = Arc::new(PacketHasher::new(config));
        *self.hasher.lock() = hasher;
        // Release: who sees the count sees the hasher.
        self.changes.fetch_add(1, Ordering::Release);
    }
}

/// The 20-byte header, with the hash calculated here.
#[derive(Debug)]
pub(super) struct Hashed {
    cell: Arc<HashCell>,
    seen: u64,
    hasher: Arc<PacketHasher>,
}

impl Hashed {
    pub(super) fn new(cell: Arc<HashCell>) -> Self {
        let seen = cell.changes.load(Ordering::Acquire);
        let hasher = Arc::clone(&cell.hasher.lock());
        Self { cell, seen, hasher }
    }
}

impl RxHeader for Hashed {
    const BYTES: usize = HeaderSize::V1Hash.bytes();

    fn finish(
        &mut self,
        memory: &GuestMemory,
        buffers: &RxBuffers,
        len: usize,
        num_buffers: u16,
        counters: &PairCounters,
    ) -> Result<(), RingError> {
        let changes = self.cell.changes.load(Ordering::Acquire);
        if changes != self.seen {
            self.seen = changes;
            self.hasher = Arc::clone(&self.cell.hasher.lock());
        }
        // The frame is read back from guest memory, which the guest may change under us: all it
        // gets from that is a wrong hash. The copy is parsed, never the original.
        let mut head = [0; HEAD_BYTES];
        let frame = len.saturating_sub(Self::BYTES).min(HEAD_BYTES);
        let head = head.get_mut(..frame).unwrap_or_default();
        let got = buffers.read_at(memory, Self::BYTES, head)?;
        let hash = self.hasher.hash_frame(head.get(..got).unwrap_or_default());
        counters.reported(hash.report);
        // num_buffers, hash_value, hash_report and padding lie side by side.
        let [n0, n1] = num_buffers.to_le_bytes();
        let [v0, v1, v2, v3] = hash.value.to_le_bytes();
        let [r0, r1] = hash.report.code().to_le_bytes();
        let fields = [n0, n1, v0, v1, v2, v3, r0, r1, 0, 0];
        buffers.write_at(memory, NUM_BUFFERS, &fields)
    }
}
