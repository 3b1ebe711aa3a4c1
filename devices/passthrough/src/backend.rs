//! The seam to whatever has the device.
//!
//! The operations are VFIO's, so the types are those of the `vfio-user` crate, which mirror the
//! kernel's structures. Behind the seam is a vfio-user server ([`crate::VfioUserBackend`]), the
//! kernel's VFIO ([`crate::KernelVfioBackend`]), and in unit tests a fake.

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use vfio_user::wire::PCI_MSIX_IRQ;
use vfio_user::{DeviceInfo, DeviceState, IoEventFd, MigrationFlags, PrecopyInfo, RegionInfo};
use vm_migration::memory::GuestRegion;
use vm_migration::{Gpa, IovaBitmap, IovaRange, PageSize, RamRegion};

use crate::rung::DirtyRung;

/// Why a device did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    /// Whoever has the device is dead, hangs or talks nonsense; nothing will work any more.
    #[error("the device is gone")]
    Gone(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// Guest memory is private to this process, and the device is in another one.
    #[error(
        "guest memory at {gpa} cannot be shared with the device: start with --memory shared=on"
    )]
    NotShared {
        /// Where the private memory is.
        gpa: Gpa,
    },
    /// It refused; the rest goes on working.
    #[error("the device failed to {operation}")]
    Failed {
        /// What was asked.
        operation: &'static str,
        /// What it said.
        #[source]
        cause: Box<dyn std::error::Error + Send + Sync>,
    },
}

impl BackendError {
    /// Whether the device is gone for good.
    pub const fn is_gone(&self) -> bool {
        matches!(self, Self::Gone(_))
    }
}

/// `VFIO_PCI_MSI_IRQ_INDEX`.
const MSI_IRQ: u32 = 1;

/// A way in which a PCI device interrupts.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum IrqKind {
    /// Message-signalled, by registers of a capability.
    Msi,
    /// Message-signalled, from a table in a BAR.
    Msix,
}

impl IrqKind {
    /// Its number (`VFIO_PCI_*_IRQ_INDEX`).
    pub const fn index(self) -> u32 {
        match self {
            Self::Msi => MSI_IRQ,
            Self::Msix => PCI_MSIX_IRQ,
        }
    }
}

/// A log of DMA that several devices share, of all that is mapped for them.
pub trait SharedLog: Send + Sync {
    /// Which rung it is.
    fn rung(&self) -> DirtyRung;
    /// The page size of its reports, once it is started.
    ///
    /// # Errors
    /// [`BackendError`].
    fn page_size(&self) -> Result<PageSize, BackendError>;
    /// Bytes of the largest mapped region it can report.
    fn max_region(&self) -> u64;
    /// Starts it.
    ///
    /// # Errors
    /// [`BackendError`].
    fn start(&self) -> Result<(), BackendError>;
    /// Stops it; no error if it does not run.
    ///
    /// # Errors
    /// [`BackendError`].
    fn stop(&self) -> Result<(), BackendError>;
    /// As [`Backend::report_log`].
    ///
    /// # Errors
    /// [`BackendError`].
    fn report(&self, bitmap: &mut IovaBitmap) -> Result<(), BackendError>;
}

/// A device and the ways to it. Calls come from any thread and end in bounded time.
pub trait Backend: Send + Sync {
    /// What it is.
    fn info(&self) -> Result<DeviceInfo, BackendError>;
    /// One region (`VFIO_PCI_*_REGION_INDEX`).
    fn region(&self, index: u32) -> Result<RegionInfo, BackendError>;
    /// Offsets of a region of `size` bytes whose writes may signal eventfds; empty if there are
    /// none or the backend does not do that.
    fn io_events(&self, index: u32, size: u64) -> Result<Vec<IoEventFd>, BackendError>;
    /// Reads a region.
    fn region_read(&self, region: u32, offset: u64, data: &mut [u8]) -> Result<(), BackendError>;
    /// Writes a region.
    fn region_write(&self, region: u32, offset: u64, data: &[u8]) -> Result<(), BackendError>;
    /// Switches interrupts of a kind on, the n-th signalling `eventfds[n]`. At most one kind is on.
    fn enable_irqs(&self, kind: IrqKind, eventfds: &[BorrowedFd<'_>]) -> Result<(), BackendError>;
    /// Switches them off again.
    fn disable_irqs(&self, kind: IrqKind) -> Result<(), BackendError>;
    /// Lets the device access a region of guest RAM. IOVA is GPA.
    fn map(&self, region: &GuestRegion) -> Result<(), BackendError>;
    /// Takes that access away: on return the device makes none.
    fn unmap(&self, ram: RamRegion) -> Result<(), BackendError>;
    /// Resets the device; its migration state is RUNNING then.
    fn reset(&self) -> Result<(), BackendError>;
    /// What its migration can do; `None` if it has none.
    fn migration(&self) -> Result<Option<MigrationFlags>, BackendError>;
    /// Its migration state.
    fn state(&self) -> Result<DeviceState, BackendError>;
    /// Brings it to `state`, over as many arcs as it takes. After an error it may be in any state
    /// on the way.
    fn set_state(&self, state: DeviceState) -> Result<(), BackendError>;
    /// What there is to read in PRE_COPY and PRE_COPY_P2P, the only states in which it is asked;
    /// `None` if unknown.
    fn precopy_info(&self) -> Result<Option<PrecopyInfo>, BackendError>;
    /// Estimate in bytes of the data there is to read if it is stopped now, what can be read before
    /// included; `None` if unknown.
    fn stop_copy_size(&self) -> Result<Option<u64>, BackendError>;
    /// Reads migration data; 0 means that there is no more, now (PRE_COPY) or at all (STOP_COPY,
    /// where "no more now" is an error: the state would be cut short).
    fn read_data(&self, data: &mut [u8]) -> Result<usize, BackendError>;
    /// Writes all of `data` to a resuming device.
    fn write_data(&self, data: &[u8]) -> Result<(), BackendError>;
    /// Whether it logs the pages it writes. To find out a log may be started and stopped: not to
    /// be asked while one runs.
    fn can_log(&self) -> Result<bool, BackendError>;
    /// Most ranges that [`start_log`](Self::start_log) takes.
    fn max_log_ranges(&self) -> usize;
    /// Starts the log and gives the page size the device chose.
    fn start_log(&self, page: PageSize, ranges: &[IovaRange]) -> Result<PageSize, BackendError>;
    /// Stops the log; no error if there is none.
    fn stop_log(&self) -> Result<(), BackendError>;
    /// ORs into `bitmap`, which is of one mapped region at the page size the device chose, the pages
    /// written since the last report, and forgets them.
    fn report_log(&self, bitmap: &mut IovaBitmap) -> Result<(), BackendError>;
    /// The log that it shares with other devices, if there is one; the same for all of them.
    fn shared_log(&self) -> Option<Arc<dyn SharedLog>>;
}
