//! Where a migration learns which pages a device wrote.

use std::fmt;
use std::sync::Arc;

use vm_migration::{
    Clearing, DirtyError, DirtySource, IovaBitmap, IovaRange, PageSize, Precision, RamRegion,
    Reported,
};

use crate::backend::{BackendError, SharedLog};
use crate::device::Inner;

/// The ladder of sources, best first. The first that a device has is taken.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DirtyRung {
    /// The device logs its own writes.
    DeviceLog,
    /// The IOMMU sets dirty bits in the page table (of an iommufd) that the device's DMA goes through.
    Iommu,
    /// VFIO's container keeps bitmaps for all devices in it. Without help of an IOMMU they say that
    /// everything was written.
    Container,
    /// Nobody tells: everything the device can reach counts as written. Only by consent, as all of
    /// it is then copied while the guest stands still.
    Everything,
}

impl DirtyRung {
    /// Why it is this one, in words.
    pub const fn why(self) -> &'static str {
        match self {
            Self::DeviceLog => "the device logs its own writes",
            Self::Iommu => {
                "the device has no log of its own, its IOMMU's page table has dirty bits"
            }
            Self::Container => {
                "the device has no log of its own, and its IOMMU no page table with dirty bits"
            }
            Self::Everything => {
                "neither the device nor the kernel's IOMMU interface has a log, and dirty=all consents"
            }
        }
    }
}

impl fmt::Display for DirtyRung {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::DeviceLog => "device DMA log",
            Self::Iommu => "IOMMU dirty bits (iommufd)",
            Self::Container => "VFIO container bitmaps",
            Self::Everything => "none: everything counts as written (dirty=all)",
        })
    }
}

/// A rung, and what is needed to stand on it.
pub(crate) enum FoundLog {
    /// The device's own.
    Device,
    /// That of its page table or container.
    Shared(Arc<dyn SharedLog>),
    /// None, by consent.
    Nowhere,
}

impl FoundLog {
    pub(crate) fn rung(&self) -> DirtyRung {
        match self {
            Self::Device => DirtyRung::DeviceLog,
            Self::Shared(log) => log.rung(),
            Self::Nowhere => DirtyRung::Everything,
        }
    }
}

/// Whoever keeps a log of DMA.
pub(crate) trait DmaLog: Send + Sync {
    /// Name in status, events and errors.
    fn id(&self) -> &str;
    /// The RAM that can be written.
    fn mapped(&self) -> Vec<RamRegion>;
    /// How exact reports are.
    fn precision(&self) -> Precision;
    /// Most ranges that a start takes.
    fn max_ranges(&self) -> usize;
    /// Starts the log and gives the page size of its reports.
    fn start(&self, ranges: &[IovaRange]) -> Result<PageSize, BackendError>;
    /// Stops it; no error if there is none.
    fn stop(&self) -> Result<(), BackendError>;
    /// As [`Backend::report_log`](crate::Backend::report_log).
    fn report(&self, bitmap: &mut IovaBitmap) -> Result<(), BackendError>;
}

/// The device's own.
impl DmaLog for Inner {
    fn id(&self) -> &str {
        &self.id
    }

    fn mapped(&self) -> Vec<RamRegion> {
        Self::mapped(self)
    }

    fn precision(&self) -> Precision {
        Precision::Exact
    }

    fn max_ranges(&self) -> usize {
        self.backend.max_log_ranges()
    }

    fn start(&self, ranges: &[IovaRange]) -> Result<PageSize, BackendError> {
        self.backend.start_log(PageSize::SIZE_4K, ranges)
    }

    fn stop(&self) -> Result<(), BackendError> {
        self.backend.stop_log()
    }

    fn report(&self, bitmap: &mut IovaBitmap) -> Result<(), BackendError> {
        self.backend.report_log(bitmap)
    }
}

/// The one that all devices of a page table or container share.
pub(crate) struct OfMany {
    id: String,
    /// One of them, which has the same RAM as all others.
    device: Arc<Inner>,
    log: Arc<dyn SharedLog>,
}

impl OfMany {
    pub(crate) fn new(device: Arc<Inner>, log: Arc<dyn SharedLog>) -> Self {
        let keeper = match log.rung() {
            DirtyRung::Iommu => "iommu",
            DirtyRung::DeviceLog | DirtyRung::Container | DirtyRung::Everything => "container",
        };
        Self {
            id: format!("{keeper}-of-{}", device.id),
            device,
            log,
        }
    }
}

impl DmaLog for OfMany {
    fn id(&self) -> &str {
        &self.id
    }

    fn mapped(&self) -> Vec<RamRegion> {
        self.device.mapped()
    }

    fn precision(&self) -> Precision {
        // An IOMMU tells apart what it maps, which may be large pages; whether a container tells
        // pages apart or names everything, the kernel does not say.
        Precision::Coarse
    }

    fn max_ranges(&self) -> usize {
        // It logs what is mapped, whatever ranges are asked for.
        usize::MAX
    }

    fn start(&self, _ranges: &[IovaRange]) -> Result<PageSize, BackendError> {
        self.log.start()?;
        self.log.page_size()
    }

    fn stop(&self) -> Result<(), BackendError> {
        self.log.stop()
    }

    fn report(&self, bitmap: &mut IovaBitmap) -> Result<(), BackendError> {
        self.log.report(bitmap)
    }
}

/// The source of a device that nobody watches: all of its RAM, always.
pub struct EverythingDirty {
    device: Arc<Inner>,
}

impl EverythingDirty {
    pub(crate) const fn new(device: Arc<Inner>) -> Self {
        Self { device }
    }
}

impl DirtySource for EverythingDirty {
    fn id(&self) -> &str {
        &self.device.id
    }

    fn granularity(&self) -> PageSize {
        PageSize::SIZE_4K
    }

    fn precision(&self) -> Precision {
        Precision::Everything
    }

    fn start(&mut self, _ranges: &[IovaRange]) -> Result<(), DirtyError> {
        Ok(())
    }

    fn report(
        &mut self,
        window: IovaRange,
        bitmap: &mut IovaBitmap,
    ) -> Result<Reported, DirtyError> {
        bitmap.set_range(window);
        Ok(Reported::counted(bitmap.count_in(window)))
    }

    fn clearing(&mut self) -> Clearing<'_> {
        Clearing::AtReport
    }

    fn stop(&mut self) -> Result<(), DirtyError> {
        Ok(())
    }
}

#[cfg(test)]
mod tests;
