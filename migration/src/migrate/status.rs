//! How a migration is doing, for whoever asks.

use std::sync::Arc;
use std::time::Instant;

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use super::phase::{DestinationPhase, SourcePhase};
use crate::dirty::SourceReport;
use crate::source::Precision;

/// Which side, and where it is.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(tag = "side", content = "phase", rename_all = "kebab-case")]
pub enum Side {
    /// The guest leaves.
    Source(SourcePhase),
    /// The guest comes.
    Destination(DestinationPhase),
}

/// What one writer of guest memory dirtied.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct SourceStatus {
    /// The source's identifier.
    pub id: String,
    /// The size in bytes at which it tracks.
    pub granularity: u64,
    /// How exact it is.
    pub precision: Precision,
    /// Pages (of the manifest's page size) in its last report; `None` if nobody counted them.
    pub last_pages: Option<u64>,
    /// Pages in all its reports that were counted.
    pub total_pages: u64,
    /// What its last report cost, in µs.
    pub last_report_us: u64,
    /// How often its log failed and was started anew, everything being dirty then.
    #[serde(default)]
    pub restarts: u32,
    /// Why, the last time.
    #[serde(default)]
    pub last_failure: Option<String>,
}

impl SourceStatus {
    /// What `report` makes of the status that `before` was.
    pub(super) fn after(report: SourceReport, before: Option<&Self>) -> Self {
        let pages = report.pages.unwrap_or(0);
        let failed = u32::from(report.failure.is_some());
        Self {
            id: report.id,
            granularity: report.granularity,
            precision: report.precision,
            last_pages: report.pages,
            total_pages: before
                .map_or(0, |old| old.total_pages)
                .saturating_add(pages),
            last_report_us: u64::try_from(report.took.as_micros()).unwrap_or(u64::MAX),
            restarts: before.map_or(0, |old| old.restarts).saturating_add(failed),
            last_failure: report
                .failure
                .or_else(|| before.and_then(|old| old.last_failure.clone())),
        }
    }
}

/// What one device took of a downtime, in µs. Devices that are read, sent and loaded at once share
/// the time.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct DeviceDowntime {
    /// The device's identifier.
    pub id: String,
    /// Coming to rest.
    pub quiesce: u64,
    /// Stopping.
    pub stop: u64,
    /// Reading its state from it, if a thread of its own does that.
    pub read: u64,
    /// Sending it.
    pub send: u64,
    /// Taking it in at the destination.
    pub load: u64,
    /// Bytes of its state that were sent while the guest stood still.
    pub bytes: u64,
}

/// How long the guest stood still, and why, in µs. Parts that the destination does while the
/// source waits are in the source's total.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Downtime {
    /// Stopping the vCPUs.
    pub pause_vcpus: u64,
    /// Bringing all devices to rest.
    pub quiesce: u64,
    /// Stopping all devices.
    pub stop: u64,
    /// The last reports of all dirty sources.
    pub final_sync: u64,
    /// Sending the last pages.
    pub memory: u64,
    /// Sending the devices' states.
    pub device_state: u64,
    /// What loading them took besides receiving them, told by the destination.
    pub destination_load: u64,
    /// From the commit until the destination said that the guest runs.
    pub commit: u64,
    /// From the moment the vCPUs were asked to stop until the guest ran at the destination.
    pub total: u64,
    /// The devices' shares of it.
    #[serde(default)]
    pub devices: Vec<DeviceDowntime>,
}

/// A snapshot of a migration.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct MigrationStatus {
    /// Side and phase.
    #[serde(flatten)]
    pub side: Side,
    /// Milliseconds since it began, to its end if it is over.
    pub elapsed_ms: u64,
    /// Rounds of memory completed.
    pub rounds: u32,
    /// Bytes on the wire (sent by the source, received by the destination).
    pub bytes: u64,
    /// Pages sent or received, zero pages included.
    pub pages: u64,
    /// Of them, zero pages.
    pub zero_pages: u64,
    /// Bytes of guest RAM in all.
    pub memory_bytes: u64,
    /// Bytes of device state sent or received.
    pub device_bytes: u64,
    /// Pages known to be dirty and not yet sent.
    pub remaining_pages: u64,
    /// Pages the guest dirties per second, measured between the last two collections.
    pub dirty_pages_per_second: Option<u64>,
    /// What each dirty source reported.
    pub sources: Vec<SourceStatus>,
    /// Time spent so far on finding dirty pages (reports, merging, clearing at the sources), in µs.
    #[serde(default)]
    pub tracking_us: u64,
    /// Measured bytes per second.
    pub bandwidth: Option<u64>,
    /// How long the guest would stand still if it moved now, in µs.
    pub downtime_estimate_us: Option<u64>,
    /// How long it stood still, once it did.
    pub downtime: Option<Downtime>,
    /// Why it was aborted.
    pub aborted: Option<String>,
}

impl MigrationStatus {
    /// Whether it has come to its end, good or bad.
    pub fn is_over(&self) -> bool {
        matches!(
            self.side,
            Side::Source(SourcePhase::Done | SourcePhase::Aborted { .. })
                | Side::Destination(DestinationPhase::Running | DestinationPhase::Aborted { .. })
        )
    }
}

#[derive(Debug)]
struct Inner {
    now: MigrationStatus,
    since: Instant,
    over: bool,
}

/// The status of a migration, shared between the thread that does it and those who ask.
#[derive(Debug)]
pub struct Status(Mutex<Inner>);

impl Status {
    /// The status of a migration about to begin.
    pub fn new(side: Side) -> Arc<Self> {
        Arc::new(Self(Mutex::new(Inner {
            now: MigrationStatus {
                side,
                elapsed_ms: 0,
                rounds: 0,
                bytes: 0,
                pages: 0,
                zero_pages: 0,
                memory_bytes: 0,
                device_bytes: 0,
                remaining_pages: 0,
                dirty_pages_per_second: None,
                sources: Vec::new(),
                tracking_us: 0,
                bandwidth: None,
                downtime_estimate_us: None,
                downtime: None,
                aborted: None,
            },
            since: Instant::now(),
            over: false,
        })))
    }

    /// The status of a guest about to leave.
    pub fn source() -> Arc<Self> {
        Self::new(Side::Source(SourcePhase::default()))
    }

    /// The status of a guest about to come.
    pub fn destination() -> Arc<Self> {
        Self::new(Side::Destination(DestinationPhase::default()))
    }

    /// How it is now.
    pub fn snapshot(&self) -> MigrationStatus {
        let inner = self.0.lock();
        let mut now = inner.now.clone();
        if !inner.over {
            now.elapsed_ms = elapsed_ms(inner.since);
        }
        now
    }

    /// Changes it; the change must be quick.
    pub(super) fn update(&self, change: impl FnOnce(&mut MigrationStatus)) {
        change(&mut self.0.lock().now);
    }

    /// Enters a phase; the clock stops at the last. The engine does so by itself; for whoever
    /// starts one that ends before there is a connection.
    pub fn enter(&self, side: Side) {
        let mut inner = self.0.lock();
        let aborted = match &side {
            Side::Source(SourcePhase::Aborted { why })
            | Side::Destination(DestinationPhase::Aborted { why }) => Some(why.clone()),
            _ => None,
        };
        inner.now.aborted = aborted;
        inner.now.side = side;
        if inner.now.is_over() {
            inner.now.elapsed_ms = elapsed_ms(inner.since);
            inner.over = true;
        }
    }
}

fn elapsed_ms(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX)
}
