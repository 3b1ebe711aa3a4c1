//! From the addresses a device writes to the pages of the guest.
//!
//! A device names memory by I/O virtual addresses, and logs its writes by them; [`GuestDirty`]
//! wants guest physical pages. An [`IovaLog`] is a log in the device's addresses, and becomes a
//! [`DirtySource`] only as [`Translated`], which is told how IOVAs map to GPAs. So the addresses of
//! one space are never taken for those of the other by mistake.
//!
//! ```text
//!   device writes         its log            table                   kept until asked
//!   IOVA 0x7000_1000 ──► IovaLog ──► IOVA → GPA, run by run ──► bitmaps of GPA ──► GuestDirty
//!                        (bits by IOVA)        ▲                      ▲            (by windows)
//!                                   MapHandle  │ map, unmap ──────────┘
//!                                              │ (what was written to it goes first)
//! ```
//!
//! # The maps there are
//!
//! - *Identity* ([`Translated::identity`]): the device sees guest memory as the guest does. A
//!   window's bitmap goes straight to the log; nothing is kept and nothing costs.
//! - *A list of ranges* ([`IovaMap::ranges`]), for as long as the source lives.
//! - *A live map* ([`IovaMap::live`]), which a vIOMMU changes by its [`MapHandle`] while the log
//!   runs. Each device has a map of its own, also where several are in one domain: who changes the
//!   domain tells each handle.
//!
//! Several IOVAs may map to one GPA; a write to any of them is a write to that page.
//!
//! # A mapping that goes
//!
//! [`MapHandle::unmap`] does three things under the lock that each report takes too:
//!
//! 1. the device's mapping is removed, by the caller's closure: from here on nothing is written;
//! 2. the log is asked for those addresses, and what it says is translated;
//! 3. the mapping leaves the table.
//!
//! In any other order a write would be lost: a report before the removal misses what comes between,
//! and one after the third step finds bits that mean nothing any more, or something else. Where a
//! log's record goes with the mapping ([`AfterUnmap::Forgotten`]) the second step cannot be, and all
//! pages of the mapping become dirty instead.
//!
//! # A mapping that comes
//!
//! Kernel VFIO and vfio-user fix the addresses that are logged at the start
//! (`VFIO_DEVICE_FEATURE_DMA_LOGGING_START`, linux/vfio.h), and what is mapped later outside of them
//! is not logged, without an error. So a live map has an *aperture*: the log is started for all of it,
//! and a mapping outside of it is refused ([`MapError::OutsideAperture`]). Choose the smallest
//! aperture that the guest can live with: devices limit how many bytes they log in all.
//!
//! # What is coarse
//!
//! A page of the log that reaches over mappings names every page of the guest that any part of it is
//! mapped to, and pages of the log that are larger than the host's name all the host's pages in
//! them. Nothing else is named that was not written. What is mapped to no RAM (a BAR of another
//! device) is named nowhere, and counted ([`MapHandle::pages_outside_ram`]).
//!
//! # When the log fails
//!
//! What it had not told is unknown, in every mapping: kernels say so of any error. The source fails
//! then at each report until it is started anew, also if it was an unmap that met the error; that
//! makes everything dirty.
//!
//! [`GuestDirty`]: crate::dirty::GuestDirty
//! [`DirtySource`]: crate::source::DirtySource

#![forbid(unsafe_code)]

mod handle;
mod map;
mod pending;
mod source;
mod state;

#[cfg(test)]
mod fakes;
#[cfg(test)]
mod properties;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod threads;

use iova_bitmap::IovaBitmap;

use crate::addr::{IovaRange, PageSize};
use crate::source::{DirtyError, Precision, Reported};

pub use handle::{ChangeError, MapHandle};
pub use map::{IovaMap, MAP_PAGE, MapError, Mapping};
pub use source::Translated;
pub use state::TranslateError;

/// What a log knows of addresses that are no longer mapped for the device.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum AfterUnmap {
    /// Everything, until it is reported: the log is the device's own and is kept by IOVA (DMA
    /// logging of kernel VFIO).
    Kept,
    /// Nothing, or not surely everything: the record is part of the mapping (dirty bits in the
    /// entries of an IOMMU, a log by regions in a vfio-user server).
    Forgotten,
}

/// A device's own log of what it writes, by the addresses that it uses.
///
/// Between [`start`](Self::start) and [`stop`](Self::stop) every page written is in a report
/// already given, or in the next.
pub trait IovaLog: Send {
    /// Stable name, as of [`DirtySource::id`](crate::source::DirtySource::id).
    fn id(&self) -> &str;

    /// The size at which the log tracks; it may change with each start.
    fn granularity(&self) -> PageSize;

    /// How exact its reports are, at that size.
    fn precision(&self) -> Precision;

    /// What it knows of a mapping that is gone.
    fn after_unmap(&self) -> AfterUnmap;

    /// Starts logging writes to `ranges`, which are sorted and do not overlap. They stay the same
    /// until the log is stopped, whatever is mapped in them. A log that was started before starts
    /// anew.
    ///
    /// # Errors
    /// If the log cannot cover all of them.
    fn start(&mut self, ranges: &[IovaRange]) -> Result<(), DirtyError>;

    /// ORs into `bitmap`, which covers `window`, the pages of `window` written since the last
    /// report, and forgets them.
    ///
    /// Under the identity map windows are those of
    /// [`DirtySource::report`](crate::source::DirtySource::report). Under another one a window is
    /// whole pages of the log, and at most [`WINDOW_BYTES`](crate::dirty::WINDOW_BYTES) or one such
    /// page. It is mapped throughout, or was until just before, but for what the first and the last
    /// page reach over the ends of mappings. The windows of a round come in rising order; that of a
    /// mapping which goes may come between any two of them.
    ///
    /// # Errors
    /// If a part may be missing: what was not reported is unknown then, of all addresses.
    fn report(
        &mut self,
        window: IovaRange,
        bitmap: &mut IovaBitmap,
    ) -> Result<Reported, DirtyError>;

    /// Stops logging. Stopping twice, or without a start, is no error.
    ///
    /// # Errors
    /// If the interface fails.
    fn stop(&mut self) -> Result<(), DirtyError>;
}
