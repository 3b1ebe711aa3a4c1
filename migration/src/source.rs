//! The seam between a writer of guest memory and the migration loop.

use crate::addr::{Iova, IovaRange, PageSize};
use crate::iova_bitmap::IovaBitmap;

/// How exactly a source names the pages that were written.
#[derive(Clone, Copy, PartialEq, Eq, Debug, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Precision {
    /// Only pages that were written.
    Exact,
    /// Groups of pages of which at least one was written.
    Coarse,
    /// Every page, always: the source cannot tell.
    Everything,
}

/// Why a source could not start, report or stop.
#[derive(Debug, thiserror::Error)]
pub enum DirtyError {
    /// The source does not cover this range.
    #[error("{source_id}: range {first}..={last} is not tracked by this source")]
    NotTracked {
        /// The source's [`DirtySource::id`].
        source_id: String,
        /// First address asked for.
        first: Iova,
        /// Last address asked for.
        last: Iova,
    },
    /// The writer's interface (KVM, a device, another process) failed. What it had not yet
    /// reported is unknown: all its ranges must be taken as dirty, or the migration failed.
    #[error("{source_id}: dirty log {operation} failed")]
    Backend {
        /// The source's [`DirtySource::id`].
        source_id: String,
        /// `start`, `report` or `stop`.
        operation: &'static str,
        /// What the interface said.
        #[source]
        cause: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// A writer of guest memory that can say which pages it wrote.
///
/// Between [`start`](Self::start) and [`stop`](Self::stop) every page written is in exactly one
/// of: a report already given, or the next report. A report clears at the source, so whoever
/// takes it is answerable for the bits until the destination has the pages.
pub trait DirtySource: Send {
    /// Stable name, unique in a VM, used in status, events and errors: `vcpu`, `vmm`, or a
    /// device's identifier.
    fn id(&self) -> &str;

    /// The size at which the source tracks.
    fn granularity(&self) -> PageSize;

    /// How exact its reports are.
    fn precision(&self) -> Precision;

    /// Starts tracking writes to `ranges` (guest RAM, sorted, not overlapping; an IOVA equals a
    /// GPA unless the source translates).
    fn start(&mut self, ranges: &[IovaRange]) -> Result<(), DirtyError>;

    /// ORs into `bitmap` the pages of `window` written since the last report, and clears them at
    /// the source. `window` is always one of the ranges given to [`start`](Self::start). A source
    /// that can report only in smaller pieces cuts the window itself.
    fn report(&mut self, window: IovaRange, bitmap: &mut IovaBitmap) -> Result<(), DirtyError>;

    /// Stops tracking. Stopping twice, or without a start, is no error.
    fn stop(&mut self) -> Result<(), DirtyError>;
}
