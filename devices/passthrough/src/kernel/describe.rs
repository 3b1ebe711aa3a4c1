//! What the kernel says of devices and of the IOMMU, taken apart.
//!
//! The kernel is trusted more than a peer is, but its drivers are many: sizes and offsets in their
//! answers are checked as those of any other.

use std::os::fd::BorrowedFd;

use vfio_user::region::find_capability;
use vfio_user::{DeviceFlags, DeviceInfo, Malformed};
use zerocopy::{FromBytes, IntoBytes};

use super::error::KernelError;
use super::sys::Kernel;
use super::uapi::{
    CAP_IOVA_RANGE, CAP_MIGRATION, DeviceInfoMsg, IOMMU_INFO_CAPS, IOMMU_INFO_PAGE_SIZES,
    IommuInfoMsg, IovaRangeMsg, IovaRangesMsg, Message, MigrationCapMsg,
};

/// Longest answer that is taken: 4096 ranges and more.
const MAX_ANSWER: usize = 64 << 10;
/// How often the kernel may want more room for the same answer.
const MOST_TRIES: usize = 3;

/// What type 1 of this host's IOMMU can.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct IommuInfo {
    /// Page sizes that can be mapped, one bit each.
    pub page_sizes: u64,
    /// Addresses that can be mapped, first and last; empty if the kernel does not say.
    pub ranges: Vec<(u64, u64)>,
    /// Bitmaps of dirty pages.
    pub dirty: Option<DirtyBitmaps>,
}

/// What bitmaps of dirty pages a container gives.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DirtyBitmaps {
    /// Page sizes, one bit each.
    pub page_sizes: u64,
    /// Bytes of the longest bitmap.
    pub max_bytes: u64,
}

impl IommuInfo {
    /// Whether all of the range from `first` to `last` can be mapped.
    pub fn reaches(&self, first: u64, last: u64) -> bool {
        let holds = |&(start, end): &(u64, u64)| start <= first && last <= end;
        self.ranges.is_empty() || self.ranges.iter().any(holds)
    }
}

/// Asks for an answer that may be longer than `head`, its fixed part.
pub(crate) fn ask(
    kernel: &dyn Kernel,
    fd: BorrowedFd<'_>,
    request: Message,
    head: &[u8],
    what: &'static str,
) -> Result<Vec<u8>, KernelError> {
    let malformed = |reason| KernelError::Malformed {
        what,
        cause: Malformed(reason),
    };
    let mut answer = head.to_vec();
    for _ in 0..MOST_TRIES {
        kernel
            .message(fd, request, &mut answer)
            .map_err(KernelError::refused(what))?;
        let argsz = answer
            .first_chunk()
            .map_or(0, |word| u32::from_le_bytes(*word));
        let wanted = usize::try_from(argsz).unwrap_or(usize::MAX);
        if wanted <= answer.len() {
            return Ok(answer);
        }
        if wanted > MAX_ANSWER {
            return Err(malformed("it is too long"));
        }
        answer.clear();
        answer.extend_from_slice(head);
        answer.resize(wanted, 0);
    }
    Err(malformed("it grows each time"))
}

/// Takes `struct vfio_device_info` apart.
///
/// # Errors
/// [`Malformed`].
pub fn decode_device(answer: &[u8]) -> Result<DeviceInfo, Malformed> {
    // Older kernels have no capabilities in it.
    let message = DeviceInfoMsg::read_from_prefix(answer);
    let (message, _) = message.map_err(|_| Malformed("it is too short"))?;
    Ok(DeviceInfo {
        flags: DeviceFlags::from_bits_truncate(message.flags),
        num_regions: message.num_regions,
        num_irqs: message.num_irqs,
    })
}

/// Takes `struct vfio_iommu_type1_info` and its capabilities apart.
///
/// # Errors
/// [`Malformed`].
pub fn decode_iommu(answer: &[u8]) -> Result<IommuInfo, Malformed> {
    let message = IommuInfoMsg::read_from_prefix(answer);
    let (message, _) = message.map_err(|_| Malformed("it is too short"))?;
    let mut info = IommuInfo::default();
    if message.flags & IOMMU_INFO_PAGE_SIZES != 0 {
        info.page_sizes = message.iova_page_sizes;
    }
    if message.flags & IOMMU_INFO_CAPS == 0 {
        return Ok(info);
    }
    if let Some(body) = find_capability(answer, message.cap_offset, CAP_IOVA_RANGE)? {
        info.ranges = decode_ranges(body)?;
    }
    if let Some(body) = find_capability(answer, message.cap_offset, CAP_MIGRATION)? {
        let capability = MigrationCapMsg::read_from_prefix(body);
        let (capability, _) =
            capability.map_err(|_| Malformed("its migration capability is cut off"))?;
        info.dirty = Some(DirtyBitmaps {
            page_sizes: capability.page_sizes,
            max_bytes: capability.max_bitmap_bytes,
        });
    }
    Ok(info)
}

fn decode_ranges(body: &[u8]) -> Result<Vec<(u64, u64)>, Malformed> {
    let cut = Malformed("its list of ranges is cut off");
    let (head, mut rest) = IovaRangesMsg::read_from_prefix(body).map_err(|_| cut)?;
    let mut ranges = Vec::new();
    for _ in 0..head.count {
        let (range, after) = IovaRangeMsg::read_from_prefix(rest).map_err(|_| cut)?;
        if range.start > range.end {
            return Err(Malformed("a range ends before it starts"));
        }
        rest = after;
        ranges.push((range.start, range.end));
    }
    Ok(ranges)
}

/// The fixed part of a question for [`IommuInfo`].
pub(crate) fn iommu_question() -> Vec<u8> {
    let message = IommuInfoMsg {
        argsz: 0,
        flags: 0,
        iova_page_sizes: 0,
        cap_offset: 0,
        padding: 0,
    };
    message.as_bytes().to_vec()
}

/// The fixed part of a question for [`DeviceInfo`].
pub(crate) fn device_question() -> Vec<u8> {
    let message = DeviceInfoMsg {
        argsz: 0,
        flags: 0,
        num_regions: 0,
        num_irqs: 0,
        cap_offset: 0,
        padding: 0,
    };
    message.as_bytes().to_vec()
}
