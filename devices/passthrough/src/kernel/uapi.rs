//! Numbers and structures of `linux/vfio.h` that the vfio-user protocol does not share.
//!
//! A test holds them against the `vfio-bindings` crate.

pub(crate) mod iommufd;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// `VFIO_API_VERSION`.
pub(crate) const API_VERSION: i32 = 0;
/// `VFIO_TYPE1v2_IOMMU`.
pub(crate) const TYPE1V2_IOMMU: u32 = 3;
/// `VFIO_PCI_ERR_IRQ_INDEX`.
pub(crate) const ERROR_IRQ: u32 = 3;
/// `VFIO_PCI_REQ_IRQ_INDEX`.
pub(crate) const REQUEST_IRQ: u32 = 4;
/// `VFIO_PCI_NUM_REGIONS` less the last, VGA: the fixed regions Ferry asks for.
pub(crate) const REGIONS: u32 = 8;
/// `VFIO_GROUP_FLAGS_VIABLE`.
pub(crate) const GROUP_VIABLE: u32 = 1;
/// `VFIO_IOMMU_INFO_PGSIZES`.
pub(crate) const IOMMU_INFO_PAGE_SIZES: u32 = 1;
/// `VFIO_IOMMU_INFO_CAPS`.
pub(crate) const IOMMU_INFO_CAPS: u32 = 2;
/// `VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE`.
pub(crate) const CAP_IOVA_RANGE: u16 = 1;
/// `VFIO_IOMMU_TYPE1_INFO_CAP_MIGRATION`.
pub(crate) const CAP_MIGRATION: u16 = 2;
/// `VFIO_DMA_MAP_FLAG_READ` and `VFIO_DMA_MAP_FLAG_WRITE`.
pub(crate) const DMA_MAP_READ_WRITE: u32 = 3;
/// `VFIO_MIG_DATA_FD` that stands for none.
pub(crate) const NO_FD: i32 = -1;

/// Requests whose argument is a number, or none.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum Number {
    /// `VFIO_GET_API_VERSION`.
    ApiVersion = 0x3b64,
    /// `VFIO_CHECK_EXTENSION`.
    CheckExtension = 0x3b65,
    /// `VFIO_SET_IOMMU`.
    SetIommu = 0x3b66,
    /// `VFIO_DEVICE_RESET`.
    DeviceReset = 0x3b6f,
}

/// Requests whose argument is a structure that starts with its size and holds no pointer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum Message {
    /// `VFIO_GROUP_GET_STATUS`.
    GroupStatus = 0x3b67,
    /// `VFIO_DEVICE_GET_INFO`.
    DeviceInfo = 0x3b6b,
    /// `VFIO_DEVICE_GET_REGION_INFO`.
    RegionInfo = 0x3b6c,
    /// `VFIO_DEVICE_GET_IRQ_INFO`.
    IrqInfo = 0x3b6d,
    /// `VFIO_DEVICE_SET_IRQS`; descriptors are numbers in it.
    SetIrqs = 0x3b6e,
    /// `VFIO_IOMMU_GET_INFO`.
    IommuInfo = 0x3b70,
    /// `VFIO_IOMMU_UNMAP_DMA` without a bitmap.
    UnmapDma = 0x3b72,
    /// `VFIO_DEVICE_FEATURE` of features whose data holds no pointer, and probes of any. On a
    /// container the same number is `VFIO_IOMMU_DIRTY_PAGES`, used so to start and to stop.
    DeviceFeature = 0x3b75,
    /// `VFIO_DEVICE_BIND_IOMMUFD`; a descriptor is a number in it.
    BindIommufd = 0x3b76,
    /// `VFIO_DEVICE_ATTACH_IOMMUFD_PT`.
    AttachPt = 0x3b77,
    /// `VFIO_DEVICE_DETACH_IOMMUFD_PT`.
    DetachPt = 0x3b78,
    /// `VFIO_MIG_GET_PRECOPY_INFO`, on a data descriptor.
    PrecopyInfo = 0x3b79,
    /// `IOMMU_DESTROY`.
    Destroy = 0x3b80,
    /// `IOMMU_IOAS_ALLOC`.
    IoasAlloc = 0x3b81,
    /// `IOMMU_IOAS_UNMAP`.
    IoasUnmap = 0x3b86,
    /// `IOMMU_HWPT_ALLOC` without data of a vendor's.
    HwptAlloc = 0x3b89,
    /// `IOMMU_GET_HW_INFO` without data of a vendor's.
    HwInfo = 0x3b8a,
    /// `IOMMU_HWPT_SET_DIRTY_TRACKING`.
    SetDirtyTracking = 0x3b8b,
}

/// `VFIO_GROUP_SET_CONTAINER`.
pub(crate) const GROUP_SET_CONTAINER: u32 = 0x3b68;
/// `VFIO_GROUP_GET_DEVICE_FD`.
pub(crate) const GROUP_GET_DEVICE_FD: u32 = 0x3b6a;
/// `VFIO_IOMMU_MAP_DMA`.
pub(crate) const IOMMU_MAP_DMA: u32 = 0x3b71;
/// `VFIO_IOMMU_DIRTY_PAGES`, on a container.
pub(crate) const IOMMU_DIRTY_PAGES: u32 = 0x3b75;
/// `VFIO_IOMMU_DIRTY_PAGES_FLAG_GET_BITMAP`.
pub(crate) const DIRTY_PAGES_GET: u32 = 4;
/// `VFIO_IOMMU_DIRTY_PAGES_FLAG_START`.
pub(crate) const DIRTY_PAGES_START: u32 = 1;
/// `VFIO_IOMMU_DIRTY_PAGES_FLAG_STOP`.
pub(crate) const DIRTY_PAGES_STOP: u32 = 2;
/// `VFIO_DEVICE_FEATURE`.
pub(crate) const DEVICE_FEATURE: u32 = 0x3b75;

/// `struct vfio_group_status`.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct GroupStatusMsg {
    pub(crate) argsz: u32,
    pub(crate) flags: u32,
}

/// `struct vfio_device_info`.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct DeviceInfoMsg {
    pub(crate) argsz: u32,
    pub(crate) flags: u32,
    pub(crate) num_regions: u32,
    pub(crate) num_irqs: u32,
    pub(crate) cap_offset: u32,
    pub(crate) padding: u32,
}

/// `struct vfio_iommu_type1_info`.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct IommuInfoMsg {
    pub(crate) argsz: u32,
    pub(crate) flags: u32,
    pub(crate) iova_page_sizes: u64,
    pub(crate) cap_offset: u32,
    pub(crate) padding: u32,
}

/// `struct vfio_iommu_type1_info_cap_iova_range` behind its header; the ranges follow.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct IovaRangesMsg {
    pub(crate) count: u32,
    pub(crate) reserved: u32,
}

/// `struct vfio_iova_range`: both ends belong to it.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct IovaRangeMsg {
    pub(crate) start: u64,
    pub(crate) end: u64,
}

/// `struct vfio_iommu_type1_info_cap_migration` behind its header.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct MigrationCapMsg {
    pub(crate) flags: u32,
    pub(crate) padding: u32,
    pub(crate) page_sizes: u64,
    pub(crate) max_bitmap_bytes: u64,
}

/// `struct vfio_iommu_type1_dma_map`.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct MapMsg {
    pub(crate) argsz: u32,
    pub(crate) flags: u32,
    pub(crate) hva: u64,
    pub(crate) iova: u64,
    pub(crate) size: u64,
}

/// `struct vfio_iommu_type1_dma_unmap` without a bitmap.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct UnmapMsg {
    pub(crate) argsz: u32,
    pub(crate) flags: u32,
    pub(crate) iova: u64,
    pub(crate) size: u64,
}

/// `struct vfio_device_feature` with `struct vfio_device_feature_dma_logging_control`.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct LogStartMsg {
    pub(crate) argsz: u32,
    pub(crate) flags: u32,
    pub(crate) page_size: u64,
    pub(crate) num_ranges: u32,
    pub(crate) reserved: u32,
    pub(crate) ranges: u64,
}

/// `struct vfio_device_feature` with `struct vfio_device_feature_dma_logging_report`.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct LogReportMsg {
    pub(crate) argsz: u32,
    pub(crate) flags: u32,
    pub(crate) iova: u64,
    pub(crate) length: u64,
    pub(crate) page_size: u64,
    pub(crate) bitmap: u64,
}

/// `struct vfio_iommu_type1_dirty_bitmap` without a range.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct DirtySwitchMsg {
    pub(crate) argsz: u32,
    pub(crate) flags: u32,
}

/// `struct vfio_iommu_type1_dirty_bitmap` with `struct vfio_iommu_type1_dirty_bitmap_get`.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct DirtyGetMsg {
    pub(crate) argsz: u32,
    pub(crate) flags: u32,
    pub(crate) iova: u64,
    pub(crate) size: u64,
    pub(crate) page_size: u64,
    pub(crate) bitmap_bytes: u64,
    pub(crate) bitmap: u64,
}

/// `struct vfio_precopy_info`.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct PrecopyInfoMsg {
    pub(crate) argsz: u32,
    pub(crate) flags: u32,
    pub(crate) initial_bytes: u64,
    pub(crate) dirty_bytes: u64,
}

#[cfg(test)]
mod tests {
    use std::mem::offset_of;

    use vfio_bindings::bindings::vfio as uapi;

    use super::*;

    #[test]
    fn structures_are_as_large_as_the_kernels() {
        let sizes = [
            (
                size_of::<GroupStatusMsg>(),
                size_of::<uapi::vfio_group_status>(),
            ),
            (
                size_of::<DeviceInfoMsg>(),
                size_of::<uapi::vfio_device_info>(),
            ),
            (
                size_of::<IommuInfoMsg>(),
                size_of::<uapi::vfio_iommu_type1_info>(),
            ),
            (
                size_of::<IovaRangeMsg>(),
                size_of::<uapi::vfio_iova_range>(),
            ),
            (
                size_of::<MapMsg>(),
                size_of::<uapi::vfio_iommu_type1_dma_map>(),
            ),
            (
                size_of::<UnmapMsg>(),
                size_of::<uapi::vfio_iommu_type1_dma_unmap>(),
            ),
            (
                size_of::<DirtySwitchMsg>(),
                size_of::<uapi::vfio_iommu_type1_dirty_bitmap>(),
            ),
            (
                size_of::<DirtyGetMsg>(),
                8 + size_of::<uapi::vfio_iommu_type1_dirty_bitmap_get>(),
            ),
            (
                size_of::<PrecopyInfoMsg>(),
                size_of::<uapi::vfio_precopy_info>(),
            ),
            // Behind the header of a capability, and behind that of a feature.
            (
                8 + size_of::<IovaRangesMsg>(),
                size_of::<uapi::vfio_iommu_type1_info_cap_iova_range>(),
            ),
            (
                8 + size_of::<MigrationCapMsg>(),
                size_of::<uapi::vfio_iommu_type1_info_cap_migration>(),
            ),
            (
                size_of::<LogStartMsg>(),
                8 + size_of::<uapi::vfio_device_feature_dma_logging_control>(),
            ),
            (
                size_of::<LogReportMsg>(),
                8 + size_of::<uapi::vfio_device_feature_dma_logging_report>(),
            ),
        ];
        for (at, (ours, theirs)) in sizes.into_iter().enumerate() {
            assert_eq!(ours, theirs, "structure {at}");
        }
        assert_eq!(
            offset_of!(MapMsg, iova),
            offset_of!(uapi::vfio_iommu_type1_dma_map, iova)
        );
        assert_eq!(
            offset_of!(IommuInfoMsg, cap_offset),
            offset_of!(uapi::vfio_iommu_type1_info, cap_offset)
        );
        assert_eq!(
            offset_of!(LogStartMsg, ranges),
            8 + offset_of!(uapi::vfio_device_feature_dma_logging_control, ranges)
        );
    }

    #[test]
    fn numbers_are_the_kernels() {
        assert_eq!(API_VERSION.cast_unsigned(), uapi::VFIO_API_VERSION);
        assert_eq!(TYPE1V2_IOMMU, uapi::VFIO_TYPE1v2_IOMMU);
        assert_eq!(GROUP_VIABLE, uapi::VFIO_GROUP_FLAGS_VIABLE);
        assert_eq!(IOMMU_INFO_PAGE_SIZES, uapi::VFIO_IOMMU_INFO_PGSIZES);
        assert_eq!(IOMMU_INFO_CAPS, uapi::VFIO_IOMMU_INFO_CAPS);
        let range = uapi::VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE;
        assert_eq!(u32::from(CAP_IOVA_RANGE), range);
        let migration = uapi::VFIO_IOMMU_TYPE1_INFO_CAP_MIGRATION;
        assert_eq!(u32::from(CAP_MIGRATION), migration);
        assert_eq!(ERROR_IRQ, uapi::VFIO_PCI_ERR_IRQ_INDEX);
        assert_eq!(REQUEST_IRQ, uapi::VFIO_PCI_REQ_IRQ_INDEX);
        let both = uapi::VFIO_DMA_MAP_FLAG_READ | uapi::VFIO_DMA_MAP_FLAG_WRITE;
        assert_eq!(DMA_MAP_READ_WRITE, both);
        let flags = [
            uapi::VFIO_IOMMU_DIRTY_PAGES_FLAG_START,
            uapi::VFIO_IOMMU_DIRTY_PAGES_FLAG_STOP,
            uapi::VFIO_IOMMU_DIRTY_PAGES_FLAG_GET_BITMAP,
        ];
        assert_eq!(
            [DIRTY_PAGES_START, DIRTY_PAGES_STOP, DIRTY_PAGES_GET],
            flags
        );
        // `_IO(VFIO_TYPE, VFIO_BASE + n)`: the header has no numbers but these.
        let request = |n| u32::from(uapi::VFIO_TYPE) << 8 | (uapi::VFIO_BASE + n);
        for (ours, n) in [
            (Number::ApiVersion as u32, 0),
            (Number::CheckExtension as u32, 1),
            (Number::SetIommu as u32, 2),
            (Message::GroupStatus as u32, 3),
            (GROUP_SET_CONTAINER, 4),
            (GROUP_GET_DEVICE_FD, 6),
            (Message::DeviceInfo as u32, 7),
            (Message::RegionInfo as u32, 8),
            (Message::IrqInfo as u32, 9),
            (Message::SetIrqs as u32, 10),
            (Number::DeviceReset as u32, 11),
            (Message::IommuInfo as u32, 12),
            (IOMMU_MAP_DMA, 13),
            (Message::UnmapDma as u32, 14),
            (IOMMU_DIRTY_PAGES, 17),
            (DEVICE_FEATURE, 17),
            (Message::DeviceFeature as u32, 17),
            (Message::BindIommufd as u32, 18),
            (Message::AttachPt as u32, 19),
            (Message::DetachPt as u32, 20),
            (Message::PrecopyInfo as u32, 21),
        ] {
            assert_eq!(ours, request(n), "request {n}");
        }
    }
}
