//! Numbers and structures of `linux/iommufd.h`, and of `linux/vfio.h` for devices that have a file
//! of their own. Each of the former starts with its size, as those of VFIO do.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// `IOMMU_IOAS_IOVA_RANGES`.
pub(crate) const IOAS_IOVA_RANGES: u32 = 0x3b84;
/// `IOMMU_IOAS_MAP`.
pub(crate) const IOAS_MAP: u32 = 0x3b85;
/// `IOMMU_HWPT_GET_DIRTY_BITMAP`.
pub(crate) const HWPT_GET_DIRTY_BITMAP: u32 = 0x3b8c;
/// `IOMMU_IOAS_MAP_FIXED_IOVA`, `IOMMU_IOAS_MAP_WRITEABLE` and `IOMMU_IOAS_MAP_READABLE`.
pub(crate) const IOAS_MAP_FIXED_READ_WRITE: u32 = 7;
/// `IOMMU_HWPT_ALLOC_DIRTY_TRACKING`.
pub(crate) const HWPT_ALLOC_DIRTY_TRACKING: u32 = 2;
/// `IOMMU_HWPT_DIRTY_TRACKING_ENABLE`.
pub(crate) const HWPT_DIRTY_TRACKING_ENABLE: u32 = 1;
/// `IOMMU_HW_CAP_DIRTY_TRACKING`.
pub(crate) const HW_CAP_DIRTY_TRACKING: u64 = 1;

/// `struct vfio_device_bind_iommufd` without a token, which older kernels do not know.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct BindMsg {
    pub(crate) argsz: u32,
    pub(crate) flags: u32,
    pub(crate) iommufd: i32,
    pub(crate) out_devid: u32,
}

/// `struct vfio_device_attach_iommufd_pt` without a PASID.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct AttachMsg {
    pub(crate) argsz: u32,
    pub(crate) flags: u32,
    pub(crate) pt_id: u32,
}

/// `struct vfio_device_detach_iommufd_pt` without a PASID.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct DetachMsg {
    pub(crate) argsz: u32,
    pub(crate) flags: u32,
}

/// `struct iommu_destroy`.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct DestroyMsg {
    pub(crate) size: u32,
    pub(crate) id: u32,
}

/// `struct iommu_ioas_alloc`.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct IoasAllocMsg {
    pub(crate) size: u32,
    pub(crate) flags: u32,
    pub(crate) out_ioas_id: u32,
}

/// `struct iommu_ioas_iova_ranges`.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct IovaRangesMsg {
    pub(crate) size: u32,
    pub(crate) ioas_id: u32,
    pub(crate) num_iovas: u32,
    pub(crate) reserved: u32,
    pub(crate) allowed_iovas: u64,
    pub(crate) out_iova_alignment: u64,
}

/// `struct iommu_ioas_map`.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct IoasMapMsg {
    pub(crate) size: u32,
    pub(crate) flags: u32,
    pub(crate) ioas_id: u32,
    pub(crate) reserved: u32,
    pub(crate) user_va: u64,
    pub(crate) length: u64,
    pub(crate) iova: u64,
}

/// `struct iommu_ioas_unmap`.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct IoasUnmapMsg {
    pub(crate) size: u32,
    pub(crate) ioas_id: u32,
    pub(crate) iova: u64,
    pub(crate) length: u64,
}

/// `struct iommu_hwpt_alloc`, of a table that the kernel fills from an IOAS.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct HwptAllocMsg {
    pub(crate) size: u32,
    pub(crate) flags: u32,
    pub(crate) dev_id: u32,
    pub(crate) pt_id: u32,
    pub(crate) out_hwpt_id: u32,
    pub(crate) reserved: u32,
    pub(crate) data_type: u32,
    pub(crate) data_len: u32,
    pub(crate) data_uptr: u64,
    pub(crate) fault_id: u32,
    pub(crate) reserved2: u32,
}

/// `struct iommu_hw_info`, without room for what is the vendor's.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct HwInfoMsg {
    pub(crate) size: u32,
    pub(crate) flags: u32,
    pub(crate) dev_id: u32,
    pub(crate) data_len: u32,
    pub(crate) data_uptr: u64,
    pub(crate) out_data_type: u32,
    pub(crate) reserved: u32,
    pub(crate) out_capabilities: u64,
}

/// `struct iommu_hwpt_set_dirty_tracking`.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct SetDirtyTrackingMsg {
    pub(crate) size: u32,
    pub(crate) flags: u32,
    pub(crate) hwpt_id: u32,
    pub(crate) reserved: u32,
}

/// `struct iommu_hwpt_get_dirty_bitmap`.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct GetDirtyBitmapMsg {
    pub(crate) size: u32,
    pub(crate) hwpt_id: u32,
    pub(crate) flags: u32,
    pub(crate) reserved: u32,
    pub(crate) iova: u64,
    pub(crate) length: u64,
    pub(crate) page_size: u64,
    pub(crate) data: u64,
}

#[cfg(test)]
mod tests {
    use std::mem::offset_of;

    use iommufd_bindings::iommufd as uapi;
    use vfio_bindings::bindings::vfio;

    use super::*;
    use crate::kernel::uapi::Message;

    #[test]
    fn structures_are_as_large_as_the_kernels() {
        let sizes = [
            (size_of::<DestroyMsg>(), size_of::<uapi::iommu_destroy>()),
            (
                size_of::<IoasAllocMsg>(),
                size_of::<uapi::iommu_ioas_alloc>(),
            ),
            (
                size_of::<IovaRangesMsg>(),
                size_of::<uapi::iommu_ioas_iova_ranges>(),
            ),
            (size_of::<[u64; 2]>(), size_of::<uapi::iommu_iova_range>()),
            (size_of::<IoasMapMsg>(), size_of::<uapi::iommu_ioas_map>()),
            (
                size_of::<IoasUnmapMsg>(),
                size_of::<uapi::iommu_ioas_unmap>(),
            ),
            (
                size_of::<HwptAllocMsg>(),
                size_of::<uapi::iommu_hwpt_alloc>(),
            ),
            (size_of::<HwInfoMsg>(), size_of::<uapi::iommu_hw_info>()),
            (
                size_of::<SetDirtyTrackingMsg>(),
                size_of::<uapi::iommu_hwpt_set_dirty_tracking>(),
            ),
            (
                size_of::<GetDirtyBitmapMsg>(),
                size_of::<uapi::iommu_hwpt_get_dirty_bitmap>(),
            ),
            // Of these, what newer kernels added at the end is left out.
            (
                size_of::<BindMsg>(),
                offset_of!(vfio::vfio_device_bind_iommufd, token_uuid_ptr),
            ),
            (
                size_of::<AttachMsg>(),
                offset_of!(vfio::vfio_device_attach_iommufd_pt, pasid),
            ),
            (
                size_of::<DetachMsg>(),
                offset_of!(vfio::vfio_device_detach_iommufd_pt, pasid),
            ),
        ];
        for (at, (ours, theirs)) in sizes.into_iter().enumerate() {
            assert_eq!(ours, theirs, "structure {at}");
        }
        let places = [
            (
                offset_of!(IovaRangesMsg, out_iova_alignment),
                offset_of!(uapi::iommu_ioas_iova_ranges, out_iova_alignment),
            ),
            (
                offset_of!(IoasMapMsg, iova),
                offset_of!(uapi::iommu_ioas_map, iova),
            ),
            (
                offset_of!(HwptAllocMsg, out_hwpt_id),
                offset_of!(uapi::iommu_hwpt_alloc, out_hwpt_id),
            ),
            (
                offset_of!(HwInfoMsg, out_capabilities),
                offset_of!(uapi::iommu_hw_info, out_capabilities),
            ),
            (
                offset_of!(SetDirtyTrackingMsg, hwpt_id),
                offset_of!(uapi::iommu_hwpt_set_dirty_tracking, hwpt_id),
            ),
            (
                offset_of!(GetDirtyBitmapMsg, hwpt_id),
                offset_of!(uapi::iommu_hwpt_get_dirty_bitmap, hwpt_id),
            ),
        ];
        for (at, (ours, theirs)) in places.into_iter().enumerate() {
            assert_eq!(ours, theirs, "field {at}");
        }
    }

    #[test]
    fn numbers_are_the_kernels() {
        let request = |n| u32::from(uapi::IOMMUFD_TYPE) << 8 | n;
        for (ours, n) in [
            (Message::Destroy as u32, uapi::IOMMUFD_CMD_DESTROY),
            (Message::IoasAlloc as u32, uapi::IOMMUFD_CMD_IOAS_ALLOC),
            (IOAS_IOVA_RANGES, uapi::IOMMUFD_CMD_IOAS_IOVA_RANGES),
            (IOAS_MAP, uapi::IOMMUFD_CMD_IOAS_MAP),
            (Message::IoasUnmap as u32, uapi::IOMMUFD_CMD_IOAS_UNMAP),
            (Message::HwptAlloc as u32, uapi::IOMMUFD_CMD_HWPT_ALLOC),
            (Message::HwInfo as u32, uapi::IOMMUFD_CMD_GET_HW_INFO),
            (
                Message::SetDirtyTracking as u32,
                uapi::IOMMUFD_CMD_HWPT_SET_DIRTY_TRACKING,
            ),
            (
                HWPT_GET_DIRTY_BITMAP,
                uapi::IOMMUFD_CMD_HWPT_GET_DIRTY_BITMAP,
            ),
        ] {
            assert_eq!(ours, request(n), "request {n}");
        }
        let map = uapi::iommufd_ioas_map_flags_IOMMU_IOAS_MAP_FIXED_IOVA
            | uapi::iommufd_ioas_map_flags_IOMMU_IOAS_MAP_WRITEABLE
            | uapi::iommufd_ioas_map_flags_IOMMU_IOAS_MAP_READABLE;
        assert_eq!(IOAS_MAP_FIXED_READ_WRITE, map);
        let alloc = uapi::iommufd_hwpt_alloc_flags_IOMMU_HWPT_ALLOC_DIRTY_TRACKING;
        assert_eq!(HWPT_ALLOC_DIRTY_TRACKING, alloc);
        let enable = uapi::iommufd_hwpt_set_dirty_tracking_flags_IOMMU_HWPT_DIRTY_TRACKING_ENABLE;
        assert_eq!(HWPT_DIRTY_TRACKING_ENABLE, enable);
        let dirty = uapi::iommufd_hw_capabilities_IOMMU_HW_CAP_DIRTY_TRACKING;
        assert_eq!(HW_CAP_DIRTY_TRACKING, u64::from(dirty));
    }
}
