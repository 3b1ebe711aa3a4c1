//! Parts of BARs that the guest reaches without an exit.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use vfio_user::RegionMapping;

use crate::front::MsixLayout;

/// Page size of mappings of BARs into the guest.
const PAGE: u64 = 4096;

/// A part of a BAR that may be mapped into the guest: accesses then cause no exit.
#[derive(Clone, Debug)]
pub struct MappableArea {
    /// BAR index.
    pub bar: u8,
    /// Offset in the BAR in bytes.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// The file to map.
    pub file: Arc<OwnedFd>,
    /// Offset in the file of the area's first byte.
    pub file_offset: u64,
}

/// What of `bar` the guest may reach without an exit.
pub(crate) fn mappable(
    bar: u8,
    mapping: RegionMapping,
    msix: Option<&MsixLayout>,
) -> Vec<MappableArea> {
    let file = Arc::new(mapping.fd);
    // The sums do not wrap: the client has checked areas and offset against each other.
    let spans = mapping.areas.into_iter().flat_map(|area| {
        let span = (area.offset, area.offset + area.size);
        without_msix(bar, span, msix)
    });
    spans
        .map(|(start, end)| MappableArea {
            bar,
            offset: start,
            len: end - start,
            file: Arc::clone(&file),
            file_offset: mapping.offset + start,
        })
        .collect()
}

/// The parts of `span` in `bar` whose pages hold no MSI-X structure: those must be trapped.
fn without_msix(bar: u8, span: (u64, u64), msix: Option<&MsixLayout>) -> Vec<(u64, u64)> {
    let mut spans = vec![span];
    for place in msix.into_iter().flat_map(|msix| [msix.table, msix.pending]) {
        if place.bar != bar {
            continue;
        }
        let hole = (
            place.offset / PAGE * PAGE,
            (place.offset + place.len).next_multiple_of(PAGE),
        );
        spans = spans
            .into_iter()
            .flat_map(|(start, end)| [(start, end.min(hole.0)), (start.max(hole.1), end)])
            .filter(|(start, end)| start < end)
            .collect();
    }
    spans
}
