//! What went through a network card.

use std::iter::Sum;
use std::sync::atomic::{AtomicU64, Ordering};

use net_util::hash::HashReport;
use serde::{Deserialize, Serialize};

/// Number of hash reports, "none" included.
const REPORTS: usize = HashReport::ALL.len();

/// Counters of one queue pair, each written by its one worker thread.
#[derive(Debug, Default)]
pub(super) struct PairCounters {
    rx_packets: AtomicU64,
    rx_bytes: AtomicU64,
    rx_dropped: AtomicU64,
    handed_over: AtomicU64,
    hand_over_dropped: AtomicU64,
    tx_packets: AtomicU64,
    tx_bytes: AtomicU64,
    tx_dropped: AtomicU64,
    announcements: AtomicU64,
    reports: [AtomicU64; REPORTS],
}

impl PairCounters {
    pub(super) fn received(&self, bytes: u64) {
        self.rx_packets.fetch_add(1, Ordering::Relaxed);
        self.rx_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(super) fn receive_dropped(&self) {
        self.rx_dropped.fetch_add(1, Ordering::Relaxed);
    }

    /// A packet that the tap gave to this pair was given on to another.
    pub(super) fn handed_over(&self) {
        self.handed_over.fetch_add(1, Ordering::Relaxed);
    }

    /// A packet for another pair was dropped, as that has no buffers or no worker.
    pub(super) fn hand_over_dropped(&self) {
        self.hand_over_dropped.fetch_add(1, Ordering::Relaxed);
    }

    /// A frame that announces the guest was sent for it.
    pub(super) fn announced(&self) {
        self.announcements.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn sent(&self, bytes: u64) {
        self.tx_packets.fetch_add(1, Ordering::Relaxed);
        self.tx_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(super) fn send_dropped(&self) {
        self.tx_dropped.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn reported(&self, report: HashReport) {
        self.reported_code(report.code());
    }

    /// The same for the number of a report, which is not counted if there is no such report.
    pub(super) fn reported_code(&self, code: u16) {
        if let Some(counter) = self.reports.get(usize::from(code)) {
            counter.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn read(&self) -> NetTotals {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        NetTotals {
            rx_packets: get(&self.rx_packets),
            rx_bytes: get(&self.rx_bytes),
            rx_dropped: get(&self.rx_dropped),
            rx_handed_over: get(&self.handed_over),
            rx_hand_over_dropped: get(&self.hand_over_dropped),
            tx_packets: get(&self.tx_packets),
            tx_bytes: get(&self.tx_bytes),
            tx_dropped: get(&self.tx_dropped),
            announcements: get(&self.announcements),
            hash_reports: self.reports.each_ref().map(get),
        }
    }
}

/// Counters of a network card; they count from its creation and may be read at any time.
#[derive(Debug)]
pub struct NetCounters {
    pairs: Vec<PairCounters>,
}

impl NetCounters {
    pub(super) fn new(pairs: usize) -> Self {
        Self {
            pairs: (0..pairs).map(|_| PairCounters::default()).collect(),
        }
    }

    pub(super) fn pair(&self, index: usize) -> Option<&PairCounters> {
        self.pairs.get(index)
    }

    /// The counters of each queue pair, in their order.
    pub fn pairs(&self) -> impl ExactSizeIterator<Item = NetTotals> {
        self.pairs.iter().map(PairCounters::read)
    }

    /// The sums over all queue pairs.
    pub fn totals(&self) -> NetTotals {
        self.pairs().sum()
    }
}

/// A reading of [`NetCounters`], of one queue pair or of all. Bytes are those of frames, without virtio-net headers.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct NetTotals {
    /// Packets given to the guest.
    pub rx_packets: u64,
    /// Their bytes.
    pub rx_bytes: u64,
    /// Packets for the guest that fitted none of its buffers.
    pub rx_dropped: u64,
    /// Packets that the tap gave to another queue than the driver's table names, and that were
    /// given to the right one here.
    pub rx_handed_over: u64,
    /// Such packets that were dropped, as the right queue had no buffers for long or is not
    /// enabled.
    pub rx_hand_over_dropped: u64,
    /// Packets taken from the guest.
    pub tx_packets: u64,
    /// Their bytes.
    pub tx_bytes: u64,
    /// Packets of the guest that were malformed or that the host refused.
    pub tx_dropped: u64,
    /// Frames sent to the network in the guest's name after it arrived here, so that switches learn
    /// where it is.
    pub announcements: u64,
    /// Packets given to the guest with a 20-byte header, by the report in it: index 0 counts
    /// those without a hash, the others are as [`HashReport::code`] numbers them.
    pub hash_reports: [u64; REPORTS],
}

impl NetTotals {
    /// Packets given to the guest with a hash.
    pub fn hashed(&self) -> u64 {
        self.hash_reports.iter().skip(1).sum()
    }
}

impl Sum for NetTotals {
    fn sum<I: Iterator<Item = Self>>(all: I) -> Self {
        all.fold(Self::default(), |mut sum, one| {
            sum.rx_packets += one.rx_packets;
            sum.rx_bytes += one.rx_bytes;
            sum.rx_dropped += one.rx_dropped;
            sum.rx_handed_over += one.rx_handed_over;
            sum.rx_hand_over_dropped += one.rx_hand_over_dropped;
            sum.tx_packets += one.tx_packets;
            sum.tx_bytes += one.tx_bytes;
            sum.tx_dropped += one.tx_dropped;
            sum.announcements += one.announcements;
            for (sum, count) in sum.hash_reports.iter_mut().zip(one.hash_reports) {
                *sum += count;
            }
            sum
        })
    }
}
