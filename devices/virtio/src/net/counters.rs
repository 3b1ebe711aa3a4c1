//! What went through a network card.

use std::sync::atomic::{AtomicU64, Ordering};

use net_util::hash::HashReport;
use serde::{Deserialize, Serialize};

/// Number of hash reports, "none" included.
const REPORTS: usize = 10;

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

    /// The sums over all queue pairs.
    pub fn totals(&self) -> NetTotals {
        let mut totals = NetTotals::default();
        for pair in &self.pairs {
            let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
            totals.rx_packets += get(&pair.rx_packets);
            totals.rx_bytes += get(&pair.rx_bytes);
            totals.rx_dropped += get(&pair.rx_dropped);
            totals.rx_handed_over += get(&pair.handed_over);
            totals.rx_hand_over_dropped += get(&pair.hand_over_dropped);
            totals.announcements += get(&pair.announcements);
            totals.tx_packets += get(&pair.tx_packets);
            totals.tx_bytes += get(&pair.tx_bytes);
            totals.tx_dropped += get(&pair.tx_dropped);
            for (sum, counter) in totals.hash_reports.iter_mut().zip(&pair.reports) {
                *sum += get(counter);
            }
        }
        totals
    }
}

/// A reading of [`NetCounters`]. Bytes are those of frames, without virtio-net headers.
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
