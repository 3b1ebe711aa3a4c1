//! What a device is made of: regions, their mappable parts and doorbells, interrupt types.
//!
//! Each type is the same at both ends: a server gives it, a client gets it. Encoding and decoding
//! are here, next to each other.

use std::os::fd::OwnedFd;

use zerocopy::{FromBytes, IntoBytes};

use crate::wire::{
    AreaMsg, CAP_SPARSE_MMAP, CapHeader, IO_FD_DATAMATCH, IO_FD_IOEVENTFD, IoFdMsg, MAX_IO_FDS,
    MAX_MSG_FDS, RegionFlags, RegionInfoMsg, RegionIoFdsMsg, SparseMsg, argsz, split,
};

/// Most sparse areas of one region.
pub const MAX_AREAS: usize = 256;

/// Kind of device and how much there is of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DeviceInfo {
    /// What it is and can.
    pub flags: crate::wire::DeviceFlags,
    /// Number of regions.
    pub num_regions: u32,
    /// Number of interrupt types.
    pub num_irqs: u32,
}

/// One interrupt type.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct IrqInfo {
    /// What it can.
    pub flags: crate::wire::IrqFlags,
    /// Number of interrupts.
    pub count: u32,
}

/// A part of a region.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Area {
    /// Offset in the region in bytes.
    pub offset: u64,
    /// Bytes.
    pub size: u64,
}

/// How a region's file can be mapped.
#[derive(Debug)]
pub struct RegionMapping {
    /// The file.
    pub fd: OwnedFd,
    /// Offset in the file of the region's first byte.
    pub offset: u64,
    /// The parts that may be mapped, all within the region; the whole region if it is one area
    /// from 0.
    pub areas: Vec<Area>,
}

/// One region.
#[derive(Debug)]
pub struct RegionInfo {
    /// READ and WRITE; the others follow from `mapping`.
    pub flags: RegionFlags,
    /// Bytes; 0 where there is no such region.
    pub size: u64,
    /// How it can be mapped, if at all.
    pub mapping: Option<RegionMapping>,
}

/// An offset in a region whose writes may signal an eventfd instead of being sent.
#[derive(Debug)]
pub struct IoEventFd {
    /// Offset in the region in bytes.
    pub offset: u64,
    /// Access size in bytes that matches, 0 for any.
    pub size: u64,
    /// Only writes of this value match, if given.
    pub datamatch: Option<u64>,
    /// What is signalled.
    pub fd: OwnedFd,
}

/// What is wrong with a description that a peer sent.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{0}")]
pub struct Malformed(pub &'static str);

/// The reply to GET_REGION_INFO for a client that takes `limit` bytes, and the descriptor to
/// send along.
pub(crate) fn encode_region(index: u32, info: RegionInfo, limit: usize) -> (Vec<u8>, Vec<OwnedFd>) {
    let mut flags = info.flags & (RegionFlags::READ | RegionFlags::WRITE);
    let mut caps = Vec::new();
    if let Some(mapping) = &info.mapping {
        flags |= RegionFlags::MMAP;
        let whole = [Area {
            offset: 0,
            size: info.size,
        }];
        if mapping.areas != whole {
            flags |= RegionFlags::CAPS;
            caps = encode_sparse(&mapping.areas);
        }
    }
    let head = size_of::<RegionInfoMsg>();
    let message = RegionInfoMsg {
        argsz: argsz(head + caps.len()),
        flags: flags.bits(),
        index,
        cap_offset: if caps.is_empty() { 0 } else { argsz(head) },
        size: info.size,
        offset: info.mapping.as_ref().map_or(0, |mapping| mapping.offset),
    };
    let mut payload = message.as_bytes().to_vec();
    // A client that gave no room for the capabilities asks again with the size it now knows.
    let fits = head + caps.len() <= limit;
    if fits {
        payload.extend_from_slice(&caps);
    }
    let fd = info.mapping.filter(|_| fits).map(|mapping| mapping.fd);
    (payload, fd.into_iter().collect())
}

fn encode_sparse(areas: &[Area]) -> Vec<u8> {
    let areas = areas.get(..MAX_AREAS).unwrap_or(areas);
    let mut caps = CapHeader {
        id: CAP_SPARSE_MMAP,
        version: 1,
        next: 0,
    }
    .as_bytes()
    .to_vec();
    let head = SparseMsg {
        nr_areas: argsz(areas.len()),
        reserved: 0,
    };
    caps.extend_from_slice(head.as_bytes());
    for area in areas {
        let message = AreaMsg {
            offset: area.offset,
            size: area.size,
        };
        caps.extend_from_slice(message.as_bytes());
    }
    caps
}

/// What GET_REGION_INFO says of a region, but for the file to map.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RegionLayout {
    /// READ and WRITE; MMAP follows from `areas`.
    pub flags: RegionFlags,
    /// Bytes; 0 where there is no such region.
    pub size: u64,
    /// Offset in the file of the region's first byte.
    pub offset: u64,
    /// The parts that may be mapped, all within the region and the file; `None` if it may not be
    /// mapped at all.
    pub areas: Option<Vec<Area>>,
}

/// Takes a region's description apart: `struct vfio_region_info` and its capabilities, from a
/// vfio-user server or from the kernel, which are the same bytes.
///
/// # Errors
/// [`Malformed`], for anything that does not hold together.
pub fn decode_layout(index: u32, payload: &[u8]) -> Result<RegionLayout, Malformed> {
    let (message, _) =
        split::<RegionInfoMsg>(payload).ok_or(Malformed("the region info is too short"))?;
    if message.index != index {
        return Err(Malformed("the region info is of another region"));
    }
    let flags = RegionFlags::from_bits_truncate(message.flags);
    let mut areas = None;
    if flags.contains(RegionFlags::MMAP) && message.size != 0 {
        let sparse = match flags.contains(RegionFlags::CAPS) {
            true => decode_caps(payload, message.cap_offset)?,
            false => None,
        };
        let found = sparse.unwrap_or_else(|| {
            vec![Area {
                offset: 0,
                size: message.size,
            }]
        });
        check_areas(&found, message.size, message.offset)?;
        areas = Some(found);
    }
    Ok(RegionLayout {
        flags: flags & (RegionFlags::READ | RegionFlags::WRITE),
        size: message.size,
        offset: message.offset,
        areas,
    })
}

/// A server's reply to GET_REGION_INFO.
pub(crate) fn decode_region(
    index: u32,
    payload: &[u8],
    fds: Vec<OwnedFd>,
) -> Result<RegionInfo, Malformed> {
    let RegionLayout {
        flags,
        size,
        offset,
        areas,
    } = decode_layout(index, payload)?;
    // A mappable region without a descriptor is one the server maps for itself.
    let fd = fds.into_iter().next();
    let mapping = fd
        .zip(areas)
        .map(|(fd, areas)| RegionMapping { fd, offset, areas });
    Ok(RegionInfo {
        flags,
        size,
        mapping,
    })
}

/// The sparse areas in the capability list.
fn decode_caps(payload: &[u8], first: u32) -> Result<Option<Vec<Area>>, Malformed> {
    let body = find_capability(payload, first, CAP_SPARSE_MMAP)?;
    body.map(decode_sparse).transpose()
}

/// What follows the header of capability `id`, version 1, in a list (`struct
/// vfio_info_cap_header`) whose first entry is at `first` of `payload` (0: there is none).
///
/// # Errors
/// [`Malformed`] if the list leaves the payload or runs backwards before it is found.
pub fn find_capability(payload: &[u8], first: u32, id: u16) -> Result<Option<&[u8]>, Malformed> {
    let mut next = first;
    // Each capability has eight bytes at least and lies after the one before it, so a list in a
    // bounded payload ends.
    while next != 0 {
        let bytes = usize::try_from(next)
            .ok()
            .and_then(|at| payload.get(at..))
            .ok_or(Malformed("a capability lies outside of the reply"))?;
        let (header, body) =
            CapHeader::read_from_prefix(bytes).map_err(|_| Malformed("a capability is cut off"))?;
        if header.id == id && header.version == 1 {
            return Ok(Some(body));
        }
        if header.next != 0 && header.next <= next {
            return Err(Malformed("the capability list runs backwards"));
        }
        next = header.next;
    }
    Ok(None)
}

fn decode_sparse(body: &[u8]) -> Result<Vec<Area>, Malformed> {
    let cut = Malformed("the sparse areas are cut off");
    let (head, mut rest) = split::<SparseMsg>(body).ok_or(cut)?;
    let count = usize::try_from(head.nr_areas).unwrap_or(usize::MAX);
    if count > MAX_AREAS {
        return Err(Malformed("there are too many sparse areas"));
    }
    let mut areas = Vec::with_capacity(count);
    for _ in 0..count {
        let (area, after) = split::<AreaMsg>(rest).ok_or(cut)?;
        rest = after;
        areas.push(Area {
            offset: area.offset,
            size: area.size,
        });
    }
    Ok(areas)
}

fn check_areas(areas: &[Area], size: u64, base: u64) -> Result<(), Malformed> {
    for area in areas {
        let end = area
            .offset
            .checked_add(area.size)
            .filter(|end| *end <= size)
            .ok_or(Malformed("a mappable area lies outside of its region"))?;
        base.checked_add(end)
            .ok_or(Malformed("a mappable area lies outside of its file"))?;
    }
    Ok(())
}

/// The reply to GET_REGION_IO_FDS for a client that takes `limit` bytes and `max_fds`
/// descriptors, and the descriptors to send along. Entries beyond are left out: their accesses
/// then go by message.
pub(crate) fn encode_io_fds(
    index: u32,
    mut entries: Vec<IoEventFd>,
    limit: usize,
    max_fds: usize,
) -> (Vec<u8>, Vec<OwnedFd>) {
    entries.truncate(max_fds.min(MAX_IO_FDS));
    let full = size_of::<RegionIoFdsMsg>() + size_of::<IoFdMsg>() * entries.len();
    let mut message = RegionIoFdsMsg {
        argsz: argsz(full),
        flags: 0,
        index,
        count: argsz(entries.len()),
    };
    if full > limit {
        // Too little room: only the size needed, and no descriptors.
        message.count = 0;
        return (message.as_bytes().to_vec(), Vec::new());
    }
    let mut payload = message.as_bytes().to_vec();
    let mut fds = Vec::with_capacity(entries.len());
    for entry in entries {
        let item = IoFdMsg {
            offset: entry.offset,
            size: entry.size,
            fd_index: argsz(fds.len()),
            kind: IO_FD_IOEVENTFD,
            flags: if entry.datamatch.is_some() {
                IO_FD_DATAMATCH
            } else {
                0
            },
            padding: 0,
            datamatch: entry.datamatch.unwrap_or(0),
        };
        payload.extend_from_slice(item.as_bytes());
        fds.push(entry.fd);
    }
    (payload, fds)
}

/// Largest reply to GET_REGION_IO_FDS.
pub(crate) const MAX_IO_FDS_REPLY: usize =
    size_of::<RegionIoFdsMsg>() + size_of::<IoFdMsg>() * MAX_IO_FDS;

/// A server's reply to GET_REGION_IO_FDS for a region of `size` bytes. Entries of kinds not known
/// here are left out: their accesses go by message.
pub(crate) fn decode_io_fds(
    index: u32,
    size: u64,
    payload: &[u8],
    fds: &[OwnedFd],
) -> Result<Vec<IoEventFd>, Malformed> {
    let cut = Malformed("the I/O descriptor list is cut off");
    let (head, mut rest) = split::<RegionIoFdsMsg>(payload).ok_or(cut)?;
    if head.index != index {
        return Err(Malformed("the I/O descriptors are of another region"));
    }
    let count = usize::try_from(head.count).unwrap_or(usize::MAX);
    if count > MAX_IO_FDS {
        return Err(Malformed("there are too many I/O descriptors"));
    }
    let mut entries = Vec::with_capacity(count.min(MAX_MSG_FDS));
    for _ in 0..count {
        let (item, after) = split::<IoFdMsg>(rest).ok_or(cut)?;
        rest = after;
        if item.kind != IO_FD_IOEVENTFD || item.flags & !IO_FD_DATAMATCH != 0 {
            continue;
        }
        if !matches!(item.size, 0 | 1 | 2 | 4 | 8) {
            return Err(Malformed("an ioeventfd has an impossible access size"));
        }
        item.offset
            .checked_add(item.size.max(1))
            .filter(|end| *end <= size)
            .ok_or(Malformed("an ioeventfd lies outside of its region"))?;
        let fd = usize::try_from(item.fd_index)
            .ok()
            .and_then(|at| fds.get(at))
            .ok_or(Malformed("an ioeventfd has no descriptor"))?;
        let fd = fd
            .try_clone()
            .map_err(|_| Malformed("an ioeventfd could not be duplicated"))?;
        entries.push(IoEventFd {
            offset: item.offset,
            size: item.size,
            datamatch: (item.flags & IO_FD_DATAMATCH != 0).then_some(item.datamatch),
            fd,
        });
    }
    Ok(entries)
}

#[cfg(test)]
mod tests;
