//! What the device writes into the header of a received packet, and which queue the packet is for.

use std::mem::offset_of;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use net_util::ctrl::RssConfig;
use net_util::header::{HeaderSize, HeaderV1, HeaderV1Hash};
use net_util::toeplitz::{PacketHash, PacketHasher};
use parking_lot::Mutex;
use vm_migration::memory::GuestMemory;
use zerocopy::{FromBytes, IntoBytes};

use super::buffers::RxBuffers;
use super::counters::PairCounters;
use super::kernel_hash::{Checks, Told, Trust};
use super::runtime::Hashing;
use crate::queue::RingError;

/// Offset of `num_buffers`: from there on the device writes the header.
const NUM_BUFFERS: usize = offset_of!(HeaderV1, num_buffers);
/// Bytes of the header without a hash.
pub(super) const PLAIN: usize = HeaderSize::V1.bytes();
/// Bytes of the header with one.
pub(super) const WITH_HASH: usize = HeaderSize::V1Hash.bytes();

/// What is to be known of a packet before it is given to the guest.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Judged {
    /// Its hash.
    pub(super) hash: PacketHash,
    /// The queue pair it is for.
    pub(super) queue: u16,
}

/// Finishes headers. The kind is chosen at activation, so a device without hashes has no trace of
/// them on its path.
pub(super) trait RxHeader: Send + 'static {
    /// Bytes of a header.
    const BYTES: usize;
    /// Whether the frame is to be looked at ([`judge`](Self::judge)).
    const HASHES: bool;
    /// Whether a packet may be for another queue than the one it came from.
    const STEERS: bool;

    /// Judges a packet that starts with `start`, its header included, and came from queue `here`.
    fn judge(&mut self, start: &[u8], here: u16) -> Judged;

    /// There is no packet in the tap.
    fn drained(&mut self);

    /// Puts `hash` into the header that `packet`, which is not in guest memory, starts with.
    fn put_hash(&self, packet: &mut [u8], hash: PacketHash);

    /// Completes the header of the packet at the start of `buffers`, which goes into
    /// `num_buffers` of them.
    fn finish(
        &mut self,
        memory: &GuestMemory,
        buffers: &RxBuffers,
        num_buffers: u16,
        hash: PacketHash,
        counters: &PairCounters,
    ) -> Result<(), RingError>;
}

/// The 12-byte header, with nothing hashed.
#[derive(Debug)]
pub(super) struct Plain;

impl RxHeader for Plain {
    const BYTES: usize = PLAIN;
    const HASHES: bool = false;
    const STEERS: bool = false;

    fn judge(&mut self, _start: &[u8], here: u16) -> Judged {
        Judged {
            queue: here,
            ..Judged::default()
        }
    }

    /// It does not tell packets from before a change of settings from those after.
    fn drained(&mut self) {}

    fn put_hash(&self, _packet: &mut [u8], _hash: PacketHash) {}

    fn finish(
        &mut self,
        memory: &GuestMemory,
        buffers: &RxBuffers,
        num_buffers: u16,
        _hash: PacketHash,
        _counters: &PairCounters,
    ) -> Result<(), RingError> {
        buffers.write_at(memory, NUM_BUFFERS, &num_buffers.to_le_bytes())
    }
}

/// What the driver set about hashes and queues, made ready.
#[derive(Clone, Debug)]
pub(super) struct Classifier {
    hasher: PacketHasher,
    table: Option<RssConfig>,
    /// Queue pairs in use.
    pairs: u16,
    /// The tap's kernel reports hashes.
    kernel: bool,
}

impl Classifier {
    pub(super) fn new(hashing: &Hashing, pairs: u16, kernel: bool) -> Self {
        let table = match hashing {
            Hashing::Automatic(_) => None,
            Hashing::Table(config) => Some(config.clone()),
        };
        Self {
            hasher: PacketHasher::new(hashing.config()),
            table,
            pairs: pairs.max(1),
            kernel,
        }
    }

    fn hash(&self, frame: &[u8]) -> PacketHash {
        self.hasher.hash_frame(frame)
    }

    fn judge(&self, hash: PacketHash, here: u16) -> Judged {
        let queue = match &self.table {
            Some(table) => table.queue_for(hash),
            // The tap chose, but it may have done so when more pairs were in use.
            None if here < self.pairs => here,
            None => here % self.pairs,
        };
        Judged { hash, queue }
    }
}

/// The classifier that holds, from the control queue to the pairs' workers.
#[derive(Debug)]
pub(super) struct ClassifierCell {
    /// Counts the changes, so that a worker need not take the lock for each packet.
    changes: AtomicU64,
    now: Mutex<Arc<Classifier>>,
    /// Whether the kernel's reports are believed.
    pub(super) trust: Trust,
}

impl ClassifierCell {
    pub(super) fn new(hashing: &Hashing, pairs: u16) -> Self {
        Self {
            changes: AtomicU64::new(0),
            now: Mutex::new(Arc::new(Classifier::new(hashing, pairs, false))),
            trust: Trust::default(),
        }
    }

    /// From the next packet that is read on, the kernel's reports are not looked at: it is about to
    /// be told of settings that workers do not know yet.
    pub(super) fn look_away(&self) {
        let mut now = self.now.lock();
        if now.kernel {
            let mut without = Classifier::clone(&now);
            without.kernel = false;
            *now = Arc::new(without);
            self.changes.fetch_add(1, Ordering::Release);
        }
    }

    /// From the next packet that is read on, `hashing` holds, and `pairs` pairs are in use; whether
    /// the `kernel` reports hashes by it.
    pub(super) fn set(&self, hashing: &Hashing, pairs: u16, kernel: bool) {
        // The hash's table is made before the lock is taken.
        let new = Arc::new(Classifier::new(hashing, pairs, kernel));
        *self.now.lock() = new;
        // Release: who sees the count sees the classifier.
        self.changes.fetch_add(1, Ordering::Release);
    }
}

/// Headers of `BYTES` bytes for packets that are hashed here: for the report, which only the
/// longer header has, and, if `STEERS`, to choose the queue.
#[derive(Debug)]
pub(super) struct Hashed<const BYTES: usize, const STEERS: bool> {
    cell: Arc<ClassifierCell>,
    seen: u64,
    now: Arc<Classifier>,
    checks: Checks,
}

impl<const BYTES: usize, const STEERS: bool> Hashed<BYTES, STEERS> {
    pub(super) fn new(cell: Arc<ClassifierCell>) -> Self {
        let seen = cell.changes.load(Ordering::Acquire);
        let now = Arc::clone(&cell.now.lock());
        Self {
            cell,
            seen,
            now,
            checks: Checks::new(),
        }
    }

    /// Takes up settings that have changed; whether they had.
    fn refresh(&mut self) -> bool {
        let changes = self.cell.changes.load(Ordering::Acquire);
        if changes == self.seen {
            return false;
        }
        self.seen = changes;
        self.now = Arc::clone(&self.cell.now.lock());
        self.checks = Checks::new();
        true
    }
}

/// A header with what is the device's of it; the rest is the host's.
fn own_fields(num_buffers: u16, hash: PacketHash) -> HeaderV1Hash {
    let mut header = HeaderV1Hash::default();
    header.v1.num_buffers = num_buffers.into();
    header.set_hash(hash);
    header
}

impl<const BYTES: usize, const STEERS: bool> RxHeader for Hashed<BYTES, STEERS> {
    const BYTES: usize = BYTES;
    const HASHES: bool = true;
    const STEERS: bool = STEERS;

    fn judge(&mut self, start: &[u8], here: u16) -> Judged {
        self.refresh();
        let (header, frame) = start.split_at_checked(BYTES).unwrap_or_default();
        let own = || self.now.hash(frame);
        let told = if self.now.kernel {
            Told::read(header)
        } else {
            None
        };
        let hash = match told {
            Some(told) => self.checks.hash(told, frame, &self.cell.trust, own),
            None => own(),
        };
        self.now.judge(hash, here)
    }

    fn drained(&mut self) {
        // If they have just changed, the tap may have been empty before that.
        if self.now.kernel && !self.refresh() {
            self.checks.drained();
        }
    }

    fn put_hash(&self, packet: &mut [u8], hash: PacketHash) {
        if BYTES == WITH_HASH
            && let Ok((header, _)) = HeaderV1Hash::mut_from_prefix(packet)
        {
            header.v1.num_buffers = 1.into();
            header.set_hash(hash);
        }
    }

    fn finish(
        &mut self,
        memory: &GuestMemory,
        buffers: &RxBuffers,
        num_buffers: u16,
        hash: PacketHash,
        counters: &PairCounters,
    ) -> Result<(), RingError> {
        if BYTES == WITH_HASH {
            counters.reported(hash.report);
            let header = own_fields(num_buffers, hash);
            let own = header.as_bytes().get(NUM_BUFFERS..).unwrap_or_default();
            return buffers.write_at(memory, NUM_BUFFERS, own);
        }
        buffers.write_at(memory, NUM_BUFFERS, &num_buffers.to_le_bytes())
    }
}

/// Completes the header of a packet that was put into `buffers` as a whole, its hash included.
pub(super) fn finish_kept<H: RxHeader>(
    memory: &GuestMemory,
    buffers: &RxBuffers,
    num_buffers: u16,
    packet: &[u8],
    counters: &PairCounters,
) -> Result<(), RingError> {
    if H::BYTES == WITH_HASH
        && let Ok((header, _)) = HeaderV1Hash::ref_from_prefix(packet)
    {
        counters.reported_code(header.hash_report.get());
    }
    buffers.write_at(memory, NUM_BUFFERS, &num_buffers.to_le_bytes())
}
