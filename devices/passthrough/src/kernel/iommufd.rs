//! iommufd: one I/O address space for the devices of a VM, and the page tables that log DMA.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Weak};

use parking_lot::Mutex;
use rustix::io::Errno;
use vfio_user::Malformed;
use vm_migration::{IovaBitmap, PageSize, RamRegion};
use zerocopy::IntoBytes;

use super::error::{KernelError, failed};
use super::memory::PinnedRam;
use super::registry::Registered;
use super::space::{AddressSpace, Ledger};
use super::sys::{Kernel, report_in_pieces};
use super::uapi::Message;
use super::uapi::iommufd::{
    AttachMsg, BindMsg, DestroyMsg, DetachMsg, HW_CAP_DIRTY_TRACKING, HWPT_ALLOC_DIRTY_TRACKING,
    HWPT_DIRTY_TRACKING_ENABLE, HwInfoMsg, HwptAllocMsg, IoasAllocMsg, IoasUnmapMsg,
    SetDirtyTrackingMsg,
};
use crate::backend::{BackendError, SharedLog};
use crate::rung::DirtyRung;

/// Most ranges of addresses that are looked at.
const MAX_RANGES: usize = 4096;

/// What an I/O address space can map.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Reach {
    /// First and last addresses.
    pub ranges: Vec<[u64; 2]>,
    /// The page size of mappings and of dirty bitmaps.
    pub page: PageSize,
}

impl Reach {
    /// Takes what the kernel said apart: `told` ranges, of which there is room for those in `ranges`.
    ///
    /// # Errors
    /// [`Malformed`].
    pub fn decode(told: u32, mut ranges: Vec<[u64; 2]>, alignment: u64) -> Result<Self, Malformed> {
        let told = usize::try_from(told).unwrap_or(usize::MAX);
        if told > ranges.len() {
            return Err(Malformed("it has more ranges than there was room for"));
        }
        ranges.truncate(told);
        if ranges.iter().any(|[first, last]| first > last) {
            return Err(Malformed("a range ends before it starts"));
        }
        let page = PageSize::new(alignment.max(PageSize::SIZE_4K.bytes()));
        let page = page.ok_or(Malformed("its alignment is not a power of two"))?;
        Ok(Self { ranges, page })
    }

    /// Whether all of the range from `first` to `last` can be mapped.
    pub fn holds(&self, first: u64, last: u64) -> bool {
        let mut ranges = self.ranges.iter();
        ranges.any(|&[start, end]| start <= first && last <= end)
    }
}

/// The iommufd of a process, and the devices that were given to it by descriptors of others.
///
/// The kernel gives a device to an iommufd once for each time that its file was opened, and takes it
/// back when that is closed. A file that somebody else opened is not ours to close: the device stays
/// bound, and is to be found here by the next VM, or the next boot of the same.
#[derive(Default)]
pub struct Iommufd {
    file: Mutex<Option<Arc<OwnedFd>>>,
    adopted: Mutex<BTreeMap<i32, Bound>>,
}

/// A device that was given to the iommufd.
#[derive(Clone)]
pub(crate) struct Bound {
    pub(crate) device: Arc<OwnedFd>,
    /// Its number there.
    pub(crate) id: u32,
}

impl Iommufd {
    /// Uses `file`, an iommufd that somebody else opened, unless there is one already.
    pub fn provide(&self, file: OwnedFd) {
        self.file.lock().get_or_insert_with(|| Arc::new(file));
    }

    /// The iommufd, opened by `open` if there is none yet.
    pub(crate) fn get(
        &self,
        open: impl FnOnce() -> Result<OwnedFd, KernelError>,
    ) -> Result<Arc<OwnedFd>, KernelError> {
        let mut file = self.file.lock();
        if let Some(file) = &*file {
            return Ok(Arc::clone(file));
        }
        let opened = Arc::new(open()?);
        *file = Some(Arc::clone(&opened));
        Ok(opened)
    }

    /// The device that came as descriptor `number`, made by `bind` if it did not come before.
    pub(crate) fn adopted(
        &self,
        number: i32,
        bind: impl FnOnce() -> Result<Bound, KernelError>,
    ) -> Result<Bound, KernelError> {
        let mut adopted = self.adopted.lock();
        if let Some(bound) = adopted.get(&number) {
            return Ok(bound.clone());
        }
        let bound = bind()?;
        adopted.insert(number, bound.clone());
        Ok(bound)
    }
}

/// The I/O address space of a VM.
pub(crate) struct Ioas {
    kernel: Arc<dyn Kernel>,
    file: Arc<OwnedFd>,
    id: u32,
    tables: Mutex<Vec<Weak<Hwpt>>>,
    mapped: Ledger,
}

impl Ioas {
    /// A new one in the iommufd that `file` is.
    pub(crate) fn new(kernel: &Arc<dyn Kernel>, file: Arc<OwnedFd>) -> Result<Self, KernelError> {
        let mut message = IoasAllocMsg {
            size: 0,
            flags: 0,
            out_ioas_id: 0,
        };
        kernel
            .message(file.as_fd(), Message::IoasAlloc, message.as_mut_bytes())
            .map_err(KernelError::refused("make an I/O address space"))?;
        Ok(Self {
            kernel: Arc::clone(kernel),
            file,
            id: message.out_ioas_id,
            tables: Mutex::default(),
            mapped: Ledger::default(),
        })
    }

    fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Gives the iommufd the device that was opened as `device`; its number there. The hypervisor
    /// knows of it already.
    pub(crate) fn bind(&self, device: BorrowedFd<'_>) -> Result<u32, KernelError> {
        let mut message = BindMsg {
            argsz: 0,
            flags: 0,
            iommufd: self.file.as_raw_fd(),
            out_devid: 0,
        };
        self.kernel
            .message(device, Message::BindIommufd, message.as_mut_bytes())
            .map_err(|cause| KernelError::Bind {
                remedy: match cause {
                    Errno::BUSY => {
                        "another process has it, or a device of its IOMMU group is not bound to \
                         vfio-pci"
                    }
                    Errno::INVAL => {
                        "its descriptor is not of a file in /dev/vfio/devices, or served another \
                         process already: open the file anew for each"
                    }
                    _ => "see the kernel's log",
                },
                cause,
            })?;
        Ok(message.out_devid)
    }

    /// What can be mapped; less with each device that is attached.
    fn reach(&self) -> Result<Reach, KernelError> {
        let mut ranges = vec![[0; 2]; MAX_RANGES];
        let rules = self
            .kernel
            .ioas_ranges(self.file(), self.id, &mut ranges)
            .map_err(KernelError::refused("tell which addresses devices have"))?;
        Reach::decode(rules.ranges, ranges, rules.alignment).map_err(|cause| {
            KernelError::Malformed {
                what: "the I/O address space",
                cause,
            }
        })
    }

    /// Whether the IOMMU of a device logs what is written through it.
    fn logs(&self, device_id: u32) -> Result<bool, KernelError> {
        let mut message = HwInfoMsg {
            size: 0,
            flags: 0,
            dev_id: device_id,
            data_len: 0,
            data_uptr: 0,
            out_data_type: 0,
            reserved: 0,
            out_capabilities: 0,
        };
        let asked = self
            .kernel
            .message(self.file(), Message::HwInfo, message.as_mut_bytes());
        match asked {
            Ok(_) => Ok(message.out_capabilities & HW_CAP_DIRTY_TRACKING != 0),
            // A device whose IOMMU its driver emulates; a kernel or driver that tells nothing.
            Err(Errno::NOENT | Errno::OPNOTSUPP | Errno::NOTTY) => Ok(false),
            Err(cause) => Err(KernelError::refused("describe the device's IOMMU")(cause)),
        }
    }

    /// A page table for `device_id` that logs DMA; `None` if it turns out that there is none.
    fn logging_table(self: &Arc<Self>, device_id: u32) -> Result<Option<Arc<Hwpt>>, KernelError> {
        let mut message = HwptAllocMsg {
            size: 0,
            flags: HWPT_ALLOC_DIRTY_TRACKING,
            dev_id: device_id,
            pt_id: self.id,
            out_hwpt_id: 0,
            reserved: 0,
            data_type: 0,
            data_len: 0,
            data_uptr: 0,
            fault_id: 0,
            reserved2: 0,
        };
        let request = Message::HwptAlloc;
        match self
            .kernel
            .message(self.file(), request, message.as_mut_bytes())
        {
            Ok(_) => Ok(Some(Arc::new(Hwpt {
                ioas: Arc::clone(self),
                id: message.out_hwpt_id,
            }))),
            Err(Errno::OPNOTSUPP) => {
                tracing::warn!("the IOMMU says it logs DMA, which does not work");
                Ok(None)
            }
            Err(cause) => Err(attach_error(cause)),
        }
    }

    fn attach_to(&self, device: BorrowedFd<'_>, pt_id: u32) -> Result<(), Errno> {
        let mut message = AttachMsg {
            argsz: 0,
            flags: 0,
            pt_id,
        };
        let request = Message::AttachPt;
        let attached = self.kernel.message(device, request, message.as_mut_bytes());
        attached.map(drop)
    }

    /// Attaches a device to a page table that logs DMA if its IOMMU has such, else to whichever the
    /// kernel chooses.
    fn attach(
        self: &Arc<Self>,
        device: BorrowedFd<'_>,
        device_id: u32,
    ) -> Result<Option<Arc<Hwpt>>, KernelError> {
        if self.logs(device_id)? {
            let mut tables = self.tables.lock();
            tables.retain(|table| table.strong_count() != 0);
            for table in tables.iter().filter_map(Weak::upgrade) {
                match self.attach_to(device, table.id) {
                    Ok(()) => return Ok(Some(table)),
                    // That table is of another IOMMU.
                    Err(Errno::INVAL) => {}
                    Err(cause) => return Err(attach_error(cause)),
                }
            }
            if let Some(table) = self.logging_table(device_id)? {
                self.attach_to(device, table.id).map_err(attach_error)?;
                tables.push(Arc::downgrade(&table));
                return Ok(Some(table));
            }
        }
        self.attach_to(device, self.id).map_err(attach_error)?;
        Ok(None)
    }

    fn destroy(&self, id: u32) {
        let mut message = DestroyMsg { size: 0, id };
        let request = Message::Destroy;
        let destroyed = self
            .kernel
            .message(self.file(), request, message.as_mut_bytes());
        if let Err(error) = destroyed {
            // It goes with the last copy of the iommufd.
            tracing::warn!(%error, "an object of the iommufd is not destroyed");
        }
    }
}

/// Why a device is not attached.
fn attach_error(cause: Errno) -> KernelError {
    match cause {
        Errno::ADDRINUSE => KernelError::Reserved { cause },
        cause => KernelError::refused("attach the device to the VM's I/O address space")(cause),
    }
}

impl Drop for Ioas {
    /// The iommufd may be somebody else's, who keeps it open.
    fn drop(&mut self) {
        self.destroy(self.id);
    }
}

impl AddressSpace for Ioas {
    fn ledger(&self) -> &Ledger {
        &self.mapped
    }

    fn reaches(&self, first: u64, last: u64) -> Result<bool, KernelError> {
        Ok(self.reach()?.holds(first, last))
    }

    fn map_now(&self, memory: &PinnedRam) -> Result<(), Errno> {
        self.kernel.ioas_map(self.file(), self.id, memory)
    }

    fn unmap_now(&self, ram: RamRegion) -> Result<u64, Errno> {
        let mut message = IoasUnmapMsg {
            size: 0,
            ioas_id: self.id,
            iova: ram.gpa.0,
            length: ram.len,
        };
        let request = Message::IoasUnmap;
        self.kernel
            .message(self.file(), request, message.as_mut_bytes())?;
        Ok(message.length)
    }
}

/// An I/O page table (*hardware page table*) that logs DMA, for devices whose IOMMUs are alike.
pub(crate) struct Hwpt {
    ioas: Arc<Ioas>,
    id: u32,
}

impl Drop for Hwpt {
    fn drop(&mut self) {
        self.ioas.destroy(self.id);
    }
}

impl Hwpt {
    fn switch_log(&self, flags: u32) -> Result<(), Errno> {
        let mut message = SetDirtyTrackingMsg {
            size: 0,
            flags,
            hwpt_id: self.id,
            reserved: 0,
        };
        let request = Message::SetDirtyTracking;
        let (kernel, file) = (&self.ioas.kernel, self.ioas.file());
        let switched = kernel.message(file, request, message.as_mut_bytes());
        switched.map(drop)
    }
}

/// Dirty bits of the page table's entries.
impl SharedLog for Hwpt {
    fn rung(&self) -> DirtyRung {
        DirtyRung::Iommu
    }

    fn page_size(&self) -> Result<PageSize, BackendError> {
        let reach = self.ioas.reach();
        let reach = reach.map_err(failed("tell the page size of the dirty log it shares"))?;
        Ok(reach.page)
    }

    fn max_region(&self) -> u64 {
        // Reports come in pieces.
        u64::MAX
    }

    fn start(&self) -> Result<(), BackendError> {
        // The kernel clears what is stale.
        self.switch_log(HWPT_DIRTY_TRACKING_ENABLE)
            .map_err(KernelError::refused("start the IOMMU's dirty log"))
            .map_err(failed("start the dirty log it shares"))
    }

    fn stop(&self) -> Result<(), BackendError> {
        self.switch_log(0)
            .map_err(KernelError::refused("stop the IOMMU's dirty log"))
            .map_err(failed("stop the dirty log it shares"))
    }

    fn report(&self, bitmap: &mut IovaBitmap) -> Result<(), BackendError> {
        // Kernels (6.12 to 7.3 at least) do not tell of a hole in what is mapped, but leave out what
        // is behind it: so only whole mapped regions are asked for, as the seam has it.
        let range = bitmap.range();
        let mapped = self.ioas.is_mapped(range.first().0, range.last().0);
        let operation = "report the dirty log it shares";
        if !mapped {
            let gpa = vm_migration::Gpa(range.first().0);
            return Err(failed(operation)(KernelError::NotMapped { gpa }));
        }
        let (kernel, file) = (&self.ioas.kernel, self.ioas.file());
        report_in_pieces(bitmap, |span, words| {
            kernel.hwpt_report(file, self.id, span, words)
        })
        .map_err(failed(operation))
    }
}

/// A device that has a file of its own, attached to an I/O address space until this is dropped.
pub(crate) struct Attached {
    table: Option<Arc<Hwpt>>,
    ioas: Arc<Ioas>,
    device: Registered,
}

impl Attached {
    /// Attaches the device that has number `id` in the iommufd.
    pub(crate) fn new(device: Registered, id: u32, ioas: Arc<Ioas>) -> Result<Self, KernelError> {
        let file = device.file().as_fd();
        let table = ioas.attach(file, id)?;
        Ok(Self {
            table,
            ioas,
            device,
        })
    }

    /// The map its DMA goes through.
    pub(crate) fn space(&self) -> &Arc<Ioas> {
        &self.ioas
    }

    /// The log of its DMA, if its IOMMU keeps one.
    pub(crate) fn log(&self) -> Option<&Arc<Hwpt>> {
        self.table.as_ref()
    }
}

impl Drop for Attached {
    /// The device's file may be held open by what of it is mapped, or by whoever opened it.
    fn drop(&mut self) {
        let mut message = DetachMsg { argsz: 0, flags: 0 };
        let file = self.device.file().as_fd();
        let request = Message::DetachPt;
        let kernel = &self.ioas.kernel;
        if let Err(error) = kernel.message(file, request, message.as_mut_bytes()) {
            tracing::warn!(%error, "a device is not detached");
        }
    }
}

#[cfg(test)]
mod tests;
