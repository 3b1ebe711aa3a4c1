//! Answers as the kernel's structures have them.

use super::REGION_SHIFT;

/// `struct vfio_region_info` and capabilities.
pub(crate) fn region(index: u32, flags: u32, size: u64, caps: &[u8]) -> Vec<u8> {
    let mut answer = Vec::new();
    let at = if caps.is_empty() { 0_u32 } else { 32 };
    for word in [0, flags, index, at] {
        answer.extend_from_slice(&word.to_le_bytes());
    }
    answer.extend_from_slice(&size.to_le_bytes());
    answer.extend_from_slice(&(u64::from(index) << REGION_SHIFT).to_le_bytes());
    answer.extend_from_slice(caps);
    answer
}

/// `struct vfio_region_info_cap_sparse_mmap`.
pub(crate) fn sparse(next: u32, areas: &[(u64, u64)]) -> Vec<u8> {
    let mut cap = [&1_u16.to_le_bytes()[..], &1_u16.to_le_bytes()].concat();
    cap.extend_from_slice(&next.to_le_bytes());
    cap.extend_from_slice(&u32::try_from(areas.len()).unwrap().to_le_bytes());
    cap.extend_from_slice(&[0; 4]);
    for (offset, size) in areas {
        cap.extend_from_slice(&offset.to_le_bytes());
        cap.extend_from_slice(&size.to_le_bytes());
    }
    cap
}

/// `struct vfio_iommu_type1_info` with ranges and a migration capability.
pub(crate) fn iommu(ranges: &[(u64, u64)]) -> Vec<u8> {
    let mut answer = Vec::new();
    answer.extend_from_slice(&[0_u32, 3].map(u32::to_le_bytes).concat());
    answer.extend_from_slice(&0x4000_1000_u64.to_le_bytes());
    answer.extend_from_slice(&[24_u32, 0].map(u32::to_le_bytes).concat());
    let len = u32::try_from(16 + 16 * ranges.len()).unwrap();
    answer.extend_from_slice(&[1_u16, 1].map(u16::to_le_bytes).concat());
    answer.extend_from_slice(&(24 + len).to_le_bytes());
    let count = u32::try_from(ranges.len()).unwrap();
    answer.extend_from_slice(&[count, 0].map(u32::to_le_bytes).concat());
    for (start, end) in ranges {
        answer.extend_from_slice(&[*start, *end].map(u64::to_le_bytes).concat());
    }
    answer.extend_from_slice(&[2_u16, 1].map(u16::to_le_bytes).concat());
    answer.extend_from_slice(&[0_u32, 0, 0].map(u32::to_le_bytes).concat());
    answer.extend_from_slice(&[0x1000_u64, 1 << 28].map(u64::to_le_bytes).concat());
    answer
}
