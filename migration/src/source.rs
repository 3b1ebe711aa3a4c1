//! The seam between a writer of guest memory and the migration loop.

use iova_bitmap::IovaBitmap;

use crate::addr::{Iova, IovaRange, PageSize};

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
        /// `start`, `report`, `clear` or `stop`.
        operation: &'static str,
        /// What the interface said.
        #[source]
        cause: Box<dyn std::error::Error + Send + Sync>,
    },
}

impl DirtyError {
    /// [`NotTracked`](Self::NotTracked): `range` is not tracked by `source_id`.
    pub fn not_tracked(source_id: impl Into<String>, range: IovaRange) -> Self {
        Self::NotTracked {
            source_id: source_id.into(),
            first: range.first(),
            last: range.last(),
        }
    }

    /// [`Backend`](Self::Backend): `operation` of `source_id`'s log failed, because of `cause`.
    pub fn backend(
        source_id: impl Into<String>,
        operation: &'static str,
        cause: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        Self::Backend {
            source_id: source_id.into(),
            operation,
            cause: cause.into(),
        }
    }
}

/// What a report named.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Reported {
    /// Pages of the bitmap that were named, whether or not another source had named them before;
    /// `None` if whoever wrote the bits (a kernel, straight into the bitmap) did not count them.
    pub pages: Option<u64>,
}

impl Reported {
    /// So many pages were named.
    pub const fn counted(pages: u64) -> Self {
        Self { pages: Some(pages) }
    }
}

/// How a source's own record of a page is cleared.
pub enum Clearing<'a> {
    /// The report clears: a write after it is in the next report.
    AtReport,
    /// Pages stay reported until they are cleared, after the report and before they are read to be
    /// sent.
    BeforeSend(&'a mut dyn DeferredClear),
}

/// The second step of a source whose reports do not clear (KVM with
/// `KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2`): protecting a page anew costs its writer a fault, so it is
/// put off until the page is about to be sent.
pub trait DeferredClear {
    /// Clears the record of those pages of `range` that are set in `pages`, and of no other. A write
    /// after this call is reported again.
    ///
    /// `range` lies in one of the ranges given to [`DirtySource::start`]; it starts a multiple of 64
    /// pages from that range's start, and its length is a multiple of 64 pages or reaches to that
    /// range's end. `pages` covers it.
    ///
    /// # Errors
    /// If the interface fails. What is then cleared is unknown.
    fn clear(&mut self, range: IovaRange, pages: &IovaBitmap) -> Result<(), DirtyError>;
}

/// A writer of guest memory that can say which pages it wrote.
///
/// Between [`start`](Self::start) and [`stop`](Self::stop) every page written is in a report
/// already given, or in the next. Whoever takes a report is answerable for its bits until the
/// destination has the pages.
pub trait DirtySource: Send {
    /// Stable name, unique in a VM, used in status, events and errors: `vcpu`, `vmm`, or a
    /// device's identifier.
    fn id(&self) -> &str;

    /// The size at which the source tracks.
    fn granularity(&self) -> PageSize;

    /// How exact its reports are.
    fn precision(&self) -> Precision;

    /// Starts tracking writes to `ranges` (guest RAM by GPA, sorted, not overlapping; what a device
    /// logs by IOVA is [translated](crate::translate)). A source that was started before starts
    /// anew.
    ///
    /// # Errors
    /// If the source cannot track all of them.
    fn start(&mut self, ranges: &[IovaRange]) -> Result<(), DirtyError>;

    /// ORs into `bitmap`, which covers `window`, the pages of `window` written since the last
    /// report; [`clearing`](Self::clearing) says what becomes of the source's record.
    ///
    /// A window lies in one of the ranges given to [`start`](Self::start), starts a multiple of 64
    /// pages from that range's start, and is at most
    /// [`WINDOW_BYTES`](crate::dirty::WINDOW_BYTES) long. In each round all windows of all ranges
    /// are asked for once, in rising order. A source whose interface reports larger pieces fetches
    /// such a piece at its first window and keeps the rest for the windows to come; one whose
    /// interface reports smaller pieces cuts the window itself.
    ///
    /// # Errors
    /// If a part may be missing: what was not reported is unknown then, and everything the source
    /// tracks must be taken as dirty.
    fn report(
        &mut self,
        window: IovaRange,
        bitmap: &mut IovaBitmap,
    ) -> Result<Reported, DirtyError>;

    /// How the source's record of a page is cleared.
    fn clearing(&mut self) -> Clearing<'_>;

    /// Stops tracking. Stopping twice, or without a start, is no error.
    ///
    /// # Errors
    /// If the interface fails.
    fn stop(&mut self) -> Result<(), DirtyError>;
}
