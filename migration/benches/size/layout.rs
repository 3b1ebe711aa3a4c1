//! Guests as QEMU and Ferry lay them out.

use vm_migration::memory::RamRegion;
use vm_migration::{Gpa, PageSize};

/// 1 GiB.
pub(crate) const GIB: u64 = 1 << 30;

/// The page size that is tracked at.
pub(crate) const PAGE: PageSize = PageSize::SIZE_4K;

/// Where RAM ends below the hole for devices, which ends at 4 GiB.
const HOLE: u64 = 3 * GIB;

/// RAM of a PC below 1 MiB, as first and end: without the BIOS's data, the VGA window and two option
/// ROMs. Neither starts nor lengths are multiples of 64 pages.
const LEGACY: [(u64, u64); 2] = [(0, 0x9_f000), (0xc_8000, 0xe_c000)];

/// Where RAM goes on above the legacy regions, at page 240.
const LOW: u64 = 0xf_0000;

/// The RAM of a guest of so many GiB, a little less in sum.
pub(crate) fn regions(gib: u64) -> Vec<RamRegion> {
    let bytes = gib.saturating_mul(GIB);
    let below = bytes.min(HOLE);
    let low = LEGACY.into_iter().chain([(LOW, below)]);
    let high = (bytes > HOLE).then(|| (4 * GIB, 4 * GIB + (bytes - HOLE)));
    low.chain(high)
        .map(|(start, end)| RamRegion {
            gpa: Gpa(start),
            len: end - start,
        })
        .collect()
}
