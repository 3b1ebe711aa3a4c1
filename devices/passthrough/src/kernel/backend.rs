//! The backend over the kernel's VFIO.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use devices::ThreadSpawner;
use parking_lot::Mutex;
use pci::config::offset;
use rustix::io::Errno;
use vfio_user::region::{RegionLayout, decode_layout};
use vfio_user::wire::{
    AreaMsg, IRQ_ACTION_TRIGGER, IRQ_DATA_EVENTFD, IRQ_DATA_NONE, IrqInfoMsg, MAX_LOG_RANGES,
    PCI_CONFIG_REGION, RegionInfoMsg, SetIrqsMsg,
};
use vfio_user::{
    DeviceFlags, DeviceInfo, DeviceState, Feature, IoEventFd, MigrationFlags, PrecopyInfo,
    RegionFlags, RegionInfo, RegionMapping,
};
use vm_migration::memory::GuestRegion;
use vm_migration::{IovaBitmap, IovaRange, PageSize, RamRegion};
use zerocopy::IntoBytes;

use super::describe::{ask, decode_device, device_question};
use super::error::{KernelError, failed};
use super::feature::Features;
use super::host::{Hold, Interface};
use super::memory::PinnedRam;
use super::session::Session;
use super::sys::{Kernel, LogSpan, report_in_pieces};
use super::uapi::{ERROR_IRQ, Message, Number, REGIONS, REQUEST_IRQ};
use super::watch::{NewsHandler, Signals, Watch};
use crate::backend::{Backend, BackendError, IrqKind, SharedLog};
use crate::fd::borrow;

/// A device of this host behind VFIO, opened by [`HostVfio`](super::HostVfio).
///
/// Fields are dropped in this order: the kernel wants the device closed before its group.
pub struct KernelVfioBackend {
    /// Dropped before the device is closed.
    news: Option<Watch>,
    kernel: Arc<dyn Kernel>,
    session: Mutex<Session>,
    device: Arc<OwnedFd>,
    info: DeviceInfo,
    regions: Vec<RegionLayout>,
    hold: Hold,
}

impl KernelVfioBackend {
    /// The device that was opened as `device` and is held by `hold`.
    pub(super) fn new(
        kernel: Arc<dyn Kernel>,
        device: Arc<OwnedFd>,
        hold: Hold,
    ) -> Result<Self, KernelError> {
        let what = "describe the device";
        let question = device_question();
        let answer = ask(
            &*kernel,
            device.as_fd(),
            Message::DeviceInfo,
            &question,
            what,
        )?;
        let info = decode_device(&answer).map_err(|cause| KernelError::Malformed {
            what: "the device",
            cause,
        })?;
        if !info.flags.contains(DeviceFlags::PCI) {
            return Err(KernelError::NotPci);
        }
        let regions = (0..info.num_regions.min(REGIONS))
            .map(|index| region(&*kernel, &device, index))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            news: None,
            session: Mutex::new(Session::new()),
            kernel,
            device,
            info,
            regions,
            hold,
        })
    }

    /// The interface of the kernel that it was opened by; never [`Interface::Auto`].
    pub const fn interface(&self) -> Interface {
        self.hold.interface()
    }

    /// Has `handler` told of the device's errors and of the host's wish to have it back, as far as
    /// the kernel tells of them; `id` is the device's, for the thread's name.
    ///
    /// # Errors
    /// [`KernelError`].
    pub fn watch(
        &mut self,
        id: &str,
        spawner: &ThreadSpawner,
        handler: NewsHandler,
    ) -> Result<(), KernelError> {
        let signals = Signals::new()?;
        for (index, event) in [(ERROR_IRQ, &signals.failed), (REQUEST_IRQ, &signals.wanted)] {
            if self.has_irq(index)? {
                self.set_irqs(index, Some(&[borrow(event)]))?;
            }
        }
        self.news = Some(Watch::start(id, signals, spawner, handler)?);
        Ok(())
    }

    /// Whether the device has interrupts of an index.
    fn has_irq(&self, index: u32) -> Result<bool, KernelError> {
        let mut message = IrqInfoMsg {
            argsz: 0,
            flags: 0,
            index,
            count: 0,
        };
        let asked = self
            .kernel
            .message(self.fd(), Message::IrqInfo, message.as_mut_bytes());
        match asked {
            Ok(_) => Ok(message.count != 0),
            // An index that this device or kernel does not know.
            Err(Errno::INVAL) => Ok(false),
            Err(cause) => Err(KernelError::refused("tell of the device's interrupts")(
                cause,
            )),
        }
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.device.as_fd()
    }

    fn features(&self) -> Features<'_> {
        Features::new(&*self.kernel, self.fd())
    }

    /// Where `len` bytes at `offset` of a region are in the file.
    fn place(&self, region: u32, offset: u64, len: usize) -> Result<u64, KernelError> {
        let outside = KernelError::OutsideRegion {
            region,
            offset,
            len,
        };
        let index = usize::try_from(region).unwrap_or(usize::MAX);
        let Some(there) = self.regions.get(index) else {
            return Err(outside);
        };
        let end = u64::try_from(len).ok().and_then(|n| offset.checked_add(n));
        match (end, there.offset.checked_add(offset)) {
            (Some(end), Some(place)) if end <= there.size => Ok(place),
            _ => Err(outside),
        }
    }

    fn set_irqs(&self, index: u32, eventfds: Option<&[BorrowedFd<'_>]>) -> Result<(), KernelError> {
        let fds = eventfds.unwrap_or_default();
        let data = match eventfds {
            Some(_) => IRQ_DATA_EVENTFD,
            None => IRQ_DATA_NONE,
        };
        let head = SetIrqsMsg {
            argsz: 0,
            flags: data | IRQ_ACTION_TRIGGER,
            index,
            start: 0,
            count: u32::try_from(fds.len()).unwrap_or(u32::MAX),
        };
        let mut message = head.as_bytes().to_vec();
        for fd in fds {
            message.extend_from_slice(&fd.as_raw_fd().to_le_bytes());
        }
        let set = self
            .kernel
            .message(self.fd(), Message::SetIrqs, &mut message)
            .map_err(KernelError::refused("set the device's interrupts up"))?;
        match set {
            0 => Ok(()),
            // As many vectors as the host could have given; none are set up.
            available => Err(KernelError::Vectors {
                available,
                wanted: fds.len(),
            }),
        }
    }

    /// Whether the log works: the kernel says so of devices whose reports it cannot carry out, for
    /// want of `CONFIG_IOMMUFD_DRIVER`. So one is tried, of the first page of what is mapped.
    fn try_log(&self) -> Result<bool, KernelError> {
        let features = self.features();
        if !features.has(Feature::DmaLoggingStart)? || !features.has(Feature::DmaLoggingReport)? {
            return Ok(false);
        }
        let range = AreaMsg {
            offset: 0,
            size: PageSize::SIZE_4K.bytes(),
        };
        let started = self.kernel.log_start(self.fd(), range.size, &[range]);
        let tried = started.and_then(|page| {
            let page = PageSize::new(page).ok_or(Errno::RANGE)?.bytes();
            let span = LogSpan {
                iova: 0,
                length: range.size,
                page_size: page.max(range.size),
            };
            self.kernel.log_report(self.fd(), span, &mut [0])
        });
        let stopped = self.features().stop_log();
        match tried {
            Ok(()) => stopped.map(|()| true),
            Err(error) => {
                tracing::warn!(%error, "the device says it has a dirty log, which does not work");
                Ok(false)
            }
        }
    }
}

impl Drop for KernelVfioBackend {
    /// The device starts no DMA any more, for its page tables go before it is closed, which what is
    /// mapped of it can put off.
    fn drop(&mut self) {
        let at = u64::from(offset::COMMAND);
        if let Err(error) = self.region_write(PCI_CONFIG_REGION, at, &[0; 2]) {
            tracing::debug!(%error, "a device that is let go of is not stopped");
        }
    }
}

/// Asks for one region.
fn region(kernel: &dyn Kernel, device: &OwnedFd, index: u32) -> Result<RegionLayout, KernelError> {
    let what = "describe a region";
    let question = RegionInfoMsg {
        argsz: 0,
        flags: 0,
        index,
        cap_offset: 0,
        size: 0,
        offset: 0,
    };
    let question = question.as_bytes();
    let answer = ask(kernel, device.as_fd(), Message::RegionInfo, question, what)?;
    decode_layout(index, &answer).map_err(|cause| KernelError::Malformed {
        what: "a region",
        cause,
    })
}

impl Backend for KernelVfioBackend {
    fn info(&self) -> Result<DeviceInfo, BackendError> {
        Ok(self.info)
    }

    fn region(&self, index: u32) -> Result<RegionInfo, BackendError> {
        let at = usize::try_from(index).unwrap_or(usize::MAX);
        let Some(there) = self.regions.get(at) else {
            return Ok(RegionInfo {
                flags: RegionFlags::empty(),
                size: 0,
                mapping: None,
            });
        };
        let mapping = match &there.areas {
            None => None,
            Some(areas) => Some(RegionMapping {
                fd: self
                    .device
                    .try_clone()
                    .map_err(|cause| BackendError::Failed {
                        operation: "give its file",
                        cause: Box::new(cause),
                    })?,
                offset: there.offset,
                areas: areas.clone(),
            }),
        };
        Ok(RegionInfo {
            flags: there.flags,
            size: there.size,
            mapping,
        })
    }

    fn io_events(&self, _index: u32, _size: u64) -> Result<Vec<IoEventFd>, BackendError> {
        Ok(Vec::new())
    }

    fn region_read(&self, region: u32, offset: u64, data: &mut [u8]) -> Result<(), BackendError> {
        let wanted = data.len();
        let read = self.place(region, offset, wanted).and_then(|place| {
            let read = self.kernel.read_at(self.fd(), place, data);
            read.map_err(KernelError::refused("read the device"))
        });
        read.and_then(|done| whole(done, wanted))
            .map_err(failed("read a region"))
    }

    fn region_write(&self, region: u32, offset: u64, data: &[u8]) -> Result<(), BackendError> {
        let wanted = data.len();
        let written = self.place(region, offset, wanted).and_then(|place| {
            let written = self.kernel.write_at(self.fd(), place, data);
            written.map_err(KernelError::refused("write the device"))
        });
        written
            .and_then(|done| whole(done, wanted))
            .map_err(failed("write a region"))
    }

    fn enable_irqs(&self, kind: IrqKind, eventfds: &[BorrowedFd<'_>]) -> Result<(), BackendError> {
        self.set_irqs(kind.index(), Some(eventfds))
            .map_err(failed("take its interrupt eventfds"))
    }

    fn disable_irqs(&self, kind: IrqKind) -> Result<(), BackendError> {
        self.set_irqs(kind.index(), None)
            .map_err(failed("switch its interrupts off"))
    }

    fn map(&self, region: &GuestRegion) -> Result<(), BackendError> {
        self.hold
            .space()
            .map(PinnedRam::new(region))
            .map_err(failed("map guest memory"))
    }

    fn unmap(&self, ram: RamRegion) -> Result<(), BackendError> {
        self.hold
            .space()
            .unmap(ram)
            .map_err(failed("unmap guest memory"))
    }

    fn reset(&self) -> Result<(), BackendError> {
        // A data session of the state before means nothing any more.
        self.session.lock().end();
        if !self.info.flags.contains(DeviceFlags::RESET) {
            tracing::warn!("a device that has no reset starts as it was left");
            return Ok(());
        }
        self.kernel
            .number(self.fd(), Number::DeviceReset, 0)
            .map(drop)
            .map_err(KernelError::refused("reset the device"))
            .map_err(failed("reset"))
    }

    fn migration(&self) -> Result<Option<MigrationFlags>, BackendError> {
        self.features()
            .migration()
            .map_err(failed("describe its migration"))
    }

    fn state(&self) -> Result<DeviceState, BackendError> {
        self.features()
            .state()
            .map_err(failed("tell its migration state"))
    }

    fn set_state(&self, state: DeviceState) -> Result<(), BackendError> {
        let mut session = self.session.lock();
        let set = self
            .kernel
            .set_migration_state(self.fd(), state.number())
            .map_err(KernelError::refused("change the device's migration state"));
        match set {
            Ok(began) => session.enter(&*self.kernel, state, began),
            Err(error) => Err(error),
        }
        .map_err(failed("change its migration state"))
    }

    fn precopy_info(&self) -> Result<Option<PrecopyInfo>, BackendError> {
        self.session
            .lock()
            .precopy_info(&*self.kernel)
            .map_err(failed("estimate its state"))
    }

    fn stop_copy_size(&self) -> Result<Option<u64>, BackendError> {
        self.features()
            .stop_copy_size()
            .map_err(failed("estimate its state"))
    }

    fn read_data(&self, data: &mut [u8]) -> Result<usize, BackendError> {
        self.session
            .lock()
            .read(&*self.kernel, data)
            .map_err(failed("give its state"))
    }

    fn write_data(&self, data: &[u8]) -> Result<(), BackendError> {
        self.session
            .lock()
            .write(&*self.kernel, data)
            .map_err(failed("take its state"))
    }

    fn can_log(&self) -> Result<bool, BackendError> {
        self.try_log().map_err(failed("describe its dirty log"))
    }

    fn max_log_ranges(&self) -> usize {
        // `LOG_MAX_RANGES` of the kernel's vfio_main.c: PAGE_SIZE / 16, of pages of 4 KiB.
        MAX_LOG_RANGES
    }

    fn start_log(&self, page: PageSize, ranges: &[IovaRange]) -> Result<PageSize, BackendError> {
        let start = || {
            let areas = ranges
                .iter()
                .map(|range| {
                    let size = range.len().ok_or(KernelError::WholeSpace)?;
                    Ok(AreaMsg {
                        offset: range.first().0,
                        size,
                    })
                })
                .collect::<Result<Vec<_>, KernelError>>()?;
            let chosen = self
                .kernel
                .log_start(self.fd(), page.bytes(), &areas)
                .map_err(KernelError::refused("start the device's dirty log"))?;
            PageSize::new(chosen).ok_or(KernelError::PageSize(chosen))
        };
        start().map_err(failed("start its dirty log"))
    }

    fn stop_log(&self) -> Result<(), BackendError> {
        self.features()
            .stop_log()
            .map_err(failed("stop its dirty log"))
    }

    fn report_log(&self, bitmap: &mut IovaBitmap) -> Result<(), BackendError> {
        report_in_pieces(bitmap, |span, words| {
            self.kernel.log_report(self.fd(), span, words)
        })
        .map_err(failed("report its dirty log"))
    }

    fn shared_log(&self) -> Option<Arc<dyn SharedLog>> {
        self.hold.log()
    }
}

/// That a transfer was not cut short.
const fn whole(done: usize, wanted: usize) -> Result<(), KernelError> {
    match done == wanted {
        true => Ok(()),
        false => Err(KernelError::Short { done, wanted }),
    }
}

#[cfg(test)]
mod tests;
