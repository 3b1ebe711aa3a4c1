//! The calls themselves: a small trait, so that tests can stand in for the kernel, and its one
//! implementation that makes them.
//!
//! All `unsafe` of the kernel's backend is in this file. What has a pointer in its argument is a
//! method that takes a slice, so that nobody outside of this file forms an address.

#![expect(
    unsafe_code,
    reason = "ioctls of VFIO have no safe wrapper that leaves descriptors and buffers to the caller"
)]

use std::ffi::{CStr, c_ulong, c_void};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use vfio_user::Feature;
use vfio_user::wire::{AreaMsg, FEATURE_GET, FEATURE_SET, FeatureMsg, MigStateMsg};
use vm_migration::{IovaBitmap, IovaRange, PageSize};
use vmm_sys_util::ioctl::{ioctl_with_mut_ptr, ioctl_with_ptr, ioctl_with_val};
use zerocopy::{FromBytes, IntoBytes};

use super::error::KernelError;
use super::memory::PinnedRam;
use super::uapi::iommufd::{
    GetDirtyBitmapMsg, HWPT_GET_DIRTY_BITMAP, IOAS_IOVA_RANGES, IOAS_MAP,
    IOAS_MAP_FIXED_READ_WRITE, IoasMapMsg, IovaRangesMsg,
};
use super::uapi::{
    DEVICE_FEATURE, DIRTY_PAGES_GET, DMA_MAP_READ_WRITE, DirtyGetMsg, GROUP_GET_DEVICE_FD,
    GROUP_SET_CONTAINER, IOMMU_DIRTY_PAGES, IOMMU_MAP_DMA, LogReportMsg, LogStartMsg, MapMsg,
    Message, NO_FD, Number,
};

/// What a log is asked for: a range, page by page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LogSpan {
    /// First address.
    pub iova: u64,
    /// Bytes.
    pub length: u64,
    /// Bytes of a page, a power of two.
    pub page_size: u64,
}

impl LogSpan {
    /// The pages of `range`.
    pub(crate) fn over(range: IovaRange, page_size: PageSize) -> Result<Self, KernelError> {
        Ok(Self {
            iova: range.first().0,
            length: range.len().ok_or(KernelError::WholeSpace)?,
            page_size: page_size.bytes(),
        })
    }

    /// Words of a bitmap of its pages.
    pub(crate) fn words(&self) -> Option<usize> {
        let pages = self.length.div_ceil(self.page_size.max(1));
        usize::try_from(pages.div_ceil(64)).ok()
    }

    /// `words` as the uapi holds a bitmap of its pages: the address, and the bytes that it takes, which
    /// are all there; `EINVAL` if they are not.
    fn bitmap(&self, words: &mut [u64]) -> Result<(u64, u64), Errno> {
        let needed = self.words().filter(|needed| *needed <= words.len());
        let bytes = needed.ok_or(Errno::INVAL)?.checked_mul(size_of::<u64>());
        let bytes = bytes.and_then(|bytes| u64::try_from(bytes).ok());
        Ok((address(words.as_mut_ptr()), bytes.ok_or(Errno::INVAL)?))
    }
}

/// Most bytes of IOVA in one report: what the kernel's `iova_bitmap` looks at without pinning the
/// bitmap anew (512 pages of bitmap at 4 KiB pages), so that no report fails half-way.
const REPORT_BYTES: u64 = 64 << 30;

/// Has `report` OR into `bitmap` piece by piece.
pub(crate) fn report_in_pieces(
    bitmap: &mut IovaBitmap,
    mut report: impl FnMut(LogSpan, &mut [u64]) -> Result<(), Errno>,
) -> Result<(), KernelError> {
    let page_size = bitmap.page_size();
    for window in bitmap.windows_mut(REPORT_BYTES) {
        let span = LogSpan::over(window.range, page_size)?;
        report(span, window.words).map_err(KernelError::refused("report what was written"))?;
    }
    Ok(())
}

/// What `IOMMU_IOAS_IOVA_RANGES` says besides the ranges.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct IovaRules {
    /// How many ranges there are.
    pub ranges: u32,
    /// What first addresses and lengths of mappings are multiples of, in bytes.
    pub alignment: u64,
}

/// What the kernel is asked. Each call ends in bounded time.
pub trait Kernel: Send + Sync {
    /// Opens a file read-write.
    ///
    /// # Errors
    /// The system's.
    fn open(&self, path: &Path) -> Result<OwnedFd, Errno>;

    /// A request with a number as its argument.
    ///
    /// # Errors
    /// The driver's.
    fn number(&self, fd: BorrowedFd<'_>, request: Number, value: u32) -> Result<i32, Errno>;

    /// A request with a structure, which is read and written. Its first word, the size, is set
    /// here.
    ///
    /// # Errors
    /// The driver's; `EINVAL` if there is no room for the size.
    fn message(
        &self,
        fd: BorrowedFd<'_>,
        request: Message,
        message: &mut [u8],
    ) -> Result<i32, Errno>;

    /// Puts a group into a container.
    ///
    /// # Errors
    /// The driver's.
    fn set_container(&self, group: BorrowedFd<'_>, container: BorrowedFd<'_>) -> Result<(), Errno>;

    /// The device called `name` in a group.
    ///
    /// # Errors
    /// The driver's.
    fn group_device(&self, group: BorrowedFd<'_>, name: &CStr) -> Result<OwnedFd, Errno>;

    /// Lets the devices of a container read and write `ram` at its GPA. The caller keeps `ram`
    /// until it is unmapped or the container is closed.
    ///
    /// # Errors
    /// The driver's.
    fn map(&self, container: BorrowedFd<'_>, ram: &PinnedRam) -> Result<(), Errno>;

    /// Lets the devices of an I/O address space of an iommufd read and write `ram` at its GPA. The
    /// caller keeps `ram` until it is unmapped or the address space is gone.
    ///
    /// # Errors
    /// The kernel's.
    fn ioas_map(&self, iommufd: BorrowedFd<'_>, ioas: u32, ram: &PinnedRam) -> Result<(), Errno>;

    /// Writes the first and the last address of each range that an I/O address space can map
    /// into `ranges`.
    ///
    /// # Errors
    /// The kernel's; `EMSGSIZE` if there are more ranges.
    fn ioas_ranges(
        &self,
        iommufd: BorrowedFd<'_>,
        ioas: u32,
        ranges: &mut [[u64; 2]],
    ) -> Result<IovaRules, Errno>;

    /// ORs which pages of a mapped range the devices of an I/O page table wrote into `words`, and
    /// forgets them.
    ///
    /// # Errors
    /// The kernel's; `EINVAL` if `words` are too few.
    fn hwpt_report(
        &self,
        iommufd: BorrowedFd<'_>,
        hwpt: u32,
        span: LogSpan,
        words: &mut [u64],
    ) -> Result<(), Errno>;

    /// Brings a device to a migration state (`enum vfio_device_mig_state`); the descriptor is that
    /// of a data session which this began.
    ///
    /// # Errors
    /// The driver's.
    fn set_migration_state(
        &self,
        device: BorrowedFd<'_>,
        state: u32,
    ) -> Result<Option<OwnedFd>, Errno>;

    /// Starts the DMA log of a device; gives the page size the device chose.
    ///
    /// # Errors
    /// The driver's.
    fn log_start(
        &self,
        device: BorrowedFd<'_>,
        page_size: u64,
        ranges: &[AreaMsg],
    ) -> Result<u64, Errno>;

    /// ORs what the log has into `words` and clears the log.
    ///
    /// # Errors
    /// The driver's; `EINVAL` if `words` are too few.
    fn log_report(
        &self,
        device: BorrowedFd<'_>,
        span: LogSpan,
        words: &mut [u64],
    ) -> Result<(), Errno>;

    /// Writes which pages of a mapped range the devices of a container wrote into `words`, which
    /// are zero, and forgets them.
    ///
    /// # Errors
    /// The driver's; `EINVAL` if `words` are too few.
    fn container_report(
        &self,
        container: BorrowedFd<'_>,
        span: LogSpan,
        words: &mut [u64],
    ) -> Result<(), Errno>;

    /// Reads a device at an offset of its file.
    ///
    /// # Errors
    /// The driver's.
    fn read_at(&self, fd: BorrowedFd<'_>, offset: u64, data: &mut [u8]) -> Result<usize, Errno>;

    /// Writes a device at an offset of its file.
    ///
    /// # Errors
    /// The driver's.
    fn write_at(&self, fd: BorrowedFd<'_>, offset: u64, data: &[u8]) -> Result<usize, Errno>;

    /// Has a data session neither read nor write longer than it can.
    ///
    /// # Errors
    /// The system's.
    fn set_nonblocking(&self, fd: BorrowedFd<'_>) -> Result<(), Errno>;

    /// Reads a data session.
    ///
    /// # Errors
    /// The driver's.
    fn read(&self, fd: BorrowedFd<'_>, data: &mut [u8]) -> Result<usize, Errno>;

    /// Writes a data session.
    ///
    /// # Errors
    /// The driver's.
    fn write(&self, fd: BorrowedFd<'_>, data: &[u8]) -> Result<usize, Errno>;

    /// Waits until `fd` is ready to be read or written, or `limit` is over; whether it is ready.
    ///
    /// # Errors
    /// The system's.
    fn wait(&self, fd: BorrowedFd<'_>, writable: bool, limit: Duration) -> Result<bool, Errno>;
}

/// The kernel of this host.
#[derive(Clone, Copy, Debug, Default)]
pub struct HostKernel;

/// What an ioctl returned, as a result.
fn checked(returned: i32) -> Result<i32, Errno> {
    match returned {
        0.. => Ok(returned),
        _ => {
            let error = std::io::Error::last_os_error();
            Err(Errno::from_io_error(&error).unwrap_or(Errno::IO))
        }
    }
}

/// `size_of`, as structures of the uapi tell it.
fn size<T>() -> u32 {
    u32::try_from(size_of::<T>()).unwrap_or(u32::MAX)
}

fn retry<T>(mut call: impl FnMut() -> Result<T, Errno>) -> Result<T, Errno> {
    loop {
        match call() {
            Err(Errno::INTR) => {}
            other => return other,
        }
    }
}

impl Kernel for HostKernel {
    fn open(&self, path: &Path) -> Result<OwnedFd, Errno> {
        rustix::fs::open(path, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
    }

    fn number(&self, fd: BorrowedFd<'_>, request: Number, value: u32) -> Result<i32, Errno> {
        let request = request as u32;
        // SAFETY: these requests take a number and touch no memory of this process.
        checked(unsafe { ioctl_with_val(&fd, request.into(), c_ulong::from(value)) })
    }

    fn message(
        &self,
        fd: BorrowedFd<'_>,
        request: Message,
        message: &mut [u8],
    ) -> Result<i32, Errno> {
        let argsz = u32::try_from(message.len()).map_err(|_| Errno::INVAL)?;
        let room = message.get_mut(..4).ok_or(Errno::INVAL)?;
        room.copy_from_slice(&argsz.to_le_bytes());
        let request = request as u32;
        let argument = message.as_mut_ptr().cast::<c_void>();
        // SAFETY: the structures of these requests hold no pointers, and the kernel accesses no
        // more of them than their first word says, which is the length of `message`.
        checked(unsafe { ioctl_with_mut_ptr(&fd, request.into(), argument) })
    }

    fn set_container(&self, group: BorrowedFd<'_>, container: BorrowedFd<'_>) -> Result<(), Errno> {
        let container = container.as_raw_fd();
        let argument = std::ptr::from_ref(&container);
        // SAFETY: the argument is an int that the kernel reads during the call.
        checked(unsafe { ioctl_with_ptr(&group, GROUP_SET_CONTAINER.into(), argument) })?;
        Ok(())
    }

    fn group_device(&self, group: BorrowedFd<'_>, name: &CStr) -> Result<OwnedFd, Errno> {
        let argument = name.as_ptr();
        // SAFETY: the argument is a string that ends with a NUL, read during the call.
        let fd = checked(unsafe { ioctl_with_ptr(&group, GROUP_GET_DEVICE_FD.into(), argument) })?;
        // SAFETY: the kernel has just made this descriptor for us, and nobody else knows of it.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }

    fn map(&self, container: BorrowedFd<'_>, ram: &PinnedRam) -> Result<(), Errno> {
        let message = MapMsg {
            argsz: size::<MapMsg>(),
            flags: DMA_MAP_READ_WRITE,
            hva: ram.hva(),
            iova: ram.ram().gpa.0,
            size: ram.ram().len,
        };
        let argument = std::ptr::from_ref(&message);
        // SAFETY: the structure is read during the call. The memory it names is guest RAM, which
        // anybody may write at any time, and mapped for as long as the container uses it, which
        // pins its pages besides.
        checked(unsafe { ioctl_with_ptr(&container, IOMMU_MAP_DMA.into(), argument) })?;
        Ok(())
    }

    fn ioas_map(&self, iommufd: BorrowedFd<'_>, ioas: u32, ram: &PinnedRam) -> Result<(), Errno> {
        let mut message = IoasMapMsg {
            size: size::<IoasMapMsg>(),
            flags: IOAS_MAP_FIXED_READ_WRITE,
            ioas_id: ioas,
            reserved: 0,
            user_va: ram.hva(),
            length: ram.ram().len,
            iova: ram.ram().gpa.0,
        };
        let argument = std::ptr::from_mut(&mut message);
        // SAFETY: the structure is read, and may be written, during the call. Of the memory it names
        // the same holds as in `map`.
        checked(unsafe { ioctl_with_mut_ptr(&iommufd, IOAS_MAP.into(), argument) })?;
        Ok(())
    }

    fn ioas_ranges(
        &self,
        iommufd: BorrowedFd<'_>,
        ioas: u32,
        ranges: &mut [[u64; 2]],
    ) -> Result<IovaRules, Errno> {
        let mut message = IovaRangesMsg {
            size: size::<IovaRangesMsg>(),
            ioas_id: ioas,
            num_iovas: u32::try_from(ranges.len()).map_err(|_| Errno::TOOBIG)?,
            reserved: 0,
            allowed_iovas: address(ranges.as_mut_ptr()),
            out_iova_alignment: 0,
        };
        let argument = std::ptr::from_mut(&mut message);
        // SAFETY: the structure and room for as many ranges as it says live through the call, and
        // the kernel writes no more of either.
        checked(unsafe { ioctl_with_mut_ptr(&iommufd, IOAS_IOVA_RANGES.into(), argument) })?;
        Ok(IovaRules {
            ranges: message.num_iovas,
            alignment: message.out_iova_alignment,
        })
    }

    fn hwpt_report(
        &self,
        iommufd: BorrowedFd<'_>,
        hwpt: u32,
        span: LogSpan,
        words: &mut [u64],
    ) -> Result<(), Errno> {
        let (bitmap, _) = span.bitmap(words)?;
        let mut message = GetDirtyBitmapMsg {
            size: size::<GetDirtyBitmapMsg>(),
            hwpt_id: hwpt,
            flags: 0,
            reserved: 0,
            iova: span.iova,
            length: span.length,
            page_size: span.page_size,
            data: bitmap,
        };
        let argument = std::ptr::from_mut(&mut message);
        // SAFETY: the structure lives through the call, and the bitmap has a bit for each page of
        // the span, which is all that the kernel writes.
        checked(unsafe { ioctl_with_mut_ptr(&iommufd, HWPT_GET_DIRTY_BITMAP.into(), argument) })?;
        Ok(())
    }

    fn set_migration_state(
        &self,
        device: BorrowedFd<'_>,
        state: u32,
    ) -> Result<Option<OwnedFd>, Errno> {
        let mut message = [0; size_of::<FeatureMsg>() + size_of::<MigStateMsg>()];
        let head = FeatureMsg {
            argsz: 0,
            flags: FEATURE_SET | Feature::MigDeviceState.number(),
        };
        let body = MigStateMsg {
            device_state: state,
            data_fd: NO_FD,
        };
        let (to_head, to_body) = message.split_at_mut(size_of::<FeatureMsg>());
        to_head.copy_from_slice(head.as_bytes());
        to_body.copy_from_slice(body.as_bytes());
        self.message(device, Message::DeviceFeature, &mut message)?;
        let (_, body) = message.split_at(size_of::<FeatureMsg>());
        let body = MigStateMsg::read_from_bytes(body).map_err(|_| Errno::INVAL)?;
        // SAFETY: a number that is not negative is a descriptor the kernel has just made for us.
        Ok((body.data_fd >= 0).then(|| unsafe { OwnedFd::from_raw_fd(body.data_fd) }))
    }

    fn log_start(
        &self,
        device: BorrowedFd<'_>,
        page_size: u64,
        ranges: &[AreaMsg],
    ) -> Result<u64, Errno> {
        let mut message = LogStartMsg {
            argsz: size::<LogStartMsg>(),
            flags: FEATURE_SET | Feature::DmaLoggingStart.number(),
            page_size,
            num_ranges: u32::try_from(ranges.len()).map_err(|_| Errno::TOOBIG)?,
            reserved: 0,
            ranges: address(ranges.as_ptr()),
        };
        let argument = std::ptr::from_mut(&mut message);
        // SAFETY: the structure and as many ranges as it says live through the call; the kernel
        // reads the ranges and writes the page size.
        checked(unsafe { ioctl_with_mut_ptr(&device, DEVICE_FEATURE.into(), argument) })?;
        Ok(message.page_size)
    }

    fn log_report(
        &self,
        device: BorrowedFd<'_>,
        span: LogSpan,
        words: &mut [u64],
    ) -> Result<(), Errno> {
        let (bitmap, _) = span.bitmap(words)?;
        let mut message = LogReportMsg {
            argsz: size::<LogReportMsg>(),
            flags: FEATURE_GET | Feature::DmaLoggingReport.number(),
            iova: span.iova,
            length: span.length,
            page_size: span.page_size,
            bitmap,
        };
        let argument = std::ptr::from_mut(&mut message);
        // SAFETY: the structure lives through the call, and the bitmap has a bit for each page of
        // the span, which is all that the kernel writes.
        checked(unsafe { ioctl_with_mut_ptr(&device, DEVICE_FEATURE.into(), argument) })?;
        Ok(())
    }

    fn container_report(
        &self,
        container: BorrowedFd<'_>,
        span: LogSpan,
        words: &mut [u64],
    ) -> Result<(), Errno> {
        let (bitmap, bitmap_bytes) = span.bitmap(words)?;
        let mut message = DirtyGetMsg {
            argsz: size::<DirtyGetMsg>(),
            flags: DIRTY_PAGES_GET,
            iova: span.iova,
            size: span.length,
            page_size: span.page_size,
            bitmap_bytes,
            bitmap,
        };
        let argument = std::ptr::from_mut(&mut message);
        // SAFETY: the structure lives through the call, and so does the bitmap, which has as many
        // bytes as it says.
        checked(unsafe { ioctl_with_mut_ptr(&container, IOMMU_DIRTY_PAGES.into(), argument) })?;
        Ok(())
    }

    fn read_at(&self, fd: BorrowedFd<'_>, offset: u64, data: &mut [u8]) -> Result<usize, Errno> {
        retry(|| rustix::io::pread(fd, &mut *data, offset))
    }

    fn write_at(&self, fd: BorrowedFd<'_>, offset: u64, data: &[u8]) -> Result<usize, Errno> {
        retry(|| rustix::io::pwrite(fd, data, offset))
    }

    fn set_nonblocking(&self, fd: BorrowedFd<'_>) -> Result<(), Errno> {
        let flags = rustix::fs::fcntl_getfl(fd)?;
        rustix::fs::fcntl_setfl(fd, flags | OFlags::NONBLOCK)
    }

    fn read(&self, fd: BorrowedFd<'_>, data: &mut [u8]) -> Result<usize, Errno> {
        retry(|| rustix::io::read(fd, &mut *data))
    }

    fn write(&self, fd: BorrowedFd<'_>, data: &[u8]) -> Result<usize, Errno> {
        retry(|| rustix::io::write(fd, data))
    }

    fn wait(&self, fd: BorrowedFd<'_>, writable: bool, limit: Duration) -> Result<bool, Errno> {
        let flags = if writable {
            PollFlags::OUT
        } else {
            PollFlags::IN
        };
        let limit = Timespec::try_from(limit).map_err(|_| Errno::INVAL)?;
        let mut set = [PollFd::from_borrowed_fd(fd, flags)];
        Ok(poll(&mut set, Some(&limit))? > 0)
    }
}

/// A pointer as the uapi holds it.
fn address<T>(pointer: *const T) -> u64 {
    // Addresses are 64 bits on all hosts that Ferry runs on.
    u64::try_from(pointer.addr()).unwrap_or(u64::MAX)
}
