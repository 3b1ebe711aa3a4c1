//! Descriptor chains: one request of the driver, as lists of buffers.

use vm_memory::{Bytes, GuestAddress};
use vm_migration::memory::GuestMemory;

use super::{DESCRIPTOR_LEN, QueueSetup, RingError};

/// `VIRTQ_DESC_F_NEXT`: the chain goes on at `next`.
const F_NEXT: u16 = 1;
/// `VIRTQ_DESC_F_WRITE`: the device writes the buffer.
const F_WRITE: u16 = 2;
/// `VIRTQ_DESC_F_INDIRECT`: the buffer is a table of descriptors.
const F_INDIRECT: u16 = 4;

/// One buffer of a chain, as the driver gave it: not yet known to be in guest memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Segment {
    /// Where it starts.
    pub address: GuestAddress,
    /// Its length in bytes, never 0.
    pub len: u32,
}

/// A descriptor chain. Meant to be used again and again, so that taking a chain allocates
/// nothing.
#[derive(Debug, Default)]
pub struct Chain {
    head: u16,
    readable: Vec<Segment>,
    writable: Vec<Segment>,
    readable_len: u32,
    writable_len: u32,
}

struct Descriptor {
    address: u64,
    len: u32,
    flags: u16,
    next: u16,
}

impl Descriptor {
    fn load(memory: &GuestMemory, table: u64, index: u16) -> Result<Self, RingError> {
        let address =
            table
                .checked_add(u64::from(index) * DESCRIPTOR_LEN)
                .ok_or(RingError::NotInMemory {
                    part: "indirect descriptor table",
                    address: table,
                    len: DESCRIPTOR_LEN,
                })?;
        let raw: [u8; 16] = memory
            .read_obj(GuestAddress(address))
            .map_err(|cause| RingError::Memory { address, cause })?;
        let [
            a0,
            a1,
            a2,
            a3,
            a4,
            a5,
            a6,
            a7,
            l0,
            l1,
            l2,
            l3,
            f0,
            f1,
            n0,
            n1,
        ] = raw;
        Ok(Self {
            address: u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]),
            len: u32::from_le_bytes([l0, l1, l2, l3]),
            flags: u16::from_le_bytes([f0, f1]),
            next: u16::from_le_bytes([n0, n1]),
        })
    }
}

impl Chain {
    /// Index of the first descriptor, which names the chain in the used ring.
    pub fn head(&self) -> u16 {
        self.head
    }

    /// What the device reads, in order.
    pub fn readable(&self) -> &[Segment] {
        &self.readable
    }

    /// What the device writes, in order.
    pub fn writable(&self) -> &[Segment] {
        &self.writable
    }

    /// Bytes the device reads.
    pub fn readable_len(&self) -> u32 {
        self.readable_len
    }

    /// Bytes the device writes.
    pub fn writable_len(&self) -> u32 {
        self.writable_len
    }

    /// Copies the readable bytes from `offset` on into `data`; how many there were.
    ///
    /// # Errors
    /// [`RingError::Buffer`] if a buffer is not in guest memory.
    pub fn read_at(
        &self,
        memory: &GuestMemory,
        offset: u32,
        data: &mut [u8],
    ) -> Result<usize, RingError> {
        read_segments(&self.readable, memory, offset, data)
    }

    /// Copies `data` to the writable bytes from `offset` on; how many fitted.
    ///
    /// # Errors
    /// [`RingError::Buffer`] if a buffer is not in guest memory.
    pub fn write_at(
        &self,
        memory: &GuestMemory,
        offset: u32,
        data: &[u8],
    ) -> Result<usize, RingError> {
        write_segments(&self.writable, memory, offset, data)
    }

    /// Fills this chain with that of descriptor `head`.
    pub(super) fn walk(
        &mut self,
        memory: &GuestMemory,
        setup: &QueueSetup,
        head: u16,
    ) -> Result<(), RingError> {
        self.head = head;
        self.readable.clear();
        self.writable.clear();
        self.readable_len = 0;
        self.writable_len = 0;

        let mut table = setup.descriptors;
        let mut table_len = u32::from(setup.size);
        let mut indirect = false;
        let mut index = head;
        let mut left = setup.size;
        loop {
            if u32::from(index) >= table_len {
                return Err(RingError::DescriptorIndex {
                    index,
                    len: table_len,
                });
            }
            let descriptor = Descriptor::load(memory, table, index)?;
            if descriptor.flags & F_INDIRECT != 0 {
                table_len = indirect_len(&descriptor, setup, indirect)?;
                table = descriptor.address;
                indirect = true;
                index = 0;
                continue;
            }
            // Section 2.7.5.3.1: no chain, its indirect part included, is longer than the queue.
            // This and the ban on nested tables bound the walk.
            left = left
                .checked_sub(1)
                .ok_or(RingError::ChainTooLong { size: setup.size })?;
            self.add(&descriptor)?;
            if descriptor.flags & F_NEXT == 0 {
                return Ok(());
            }
            index = descriptor.next;
        }
    }

    fn add(&mut self, descriptor: &Descriptor) -> Result<(), RingError> {
        let (list, total) = if descriptor.flags & F_WRITE != 0 {
            (&mut self.writable, &mut self.writable_len)
        } else if self.writable.is_empty() {
            (&mut self.readable, &mut self.readable_len)
        } else {
            return Err(RingError::ReadAfterWrite);
        };
        *total = total
            .checked_add(descriptor.len)
            .ok_or(RingError::ChainTooBig)?;
        if descriptor.len != 0 {
            list.push(Segment {
                address: GuestAddress(descriptor.address),
                len: descriptor.len,
            });
        }
        Ok(())
    }
}

/// Number of descriptors in the table of an indirect descriptor (section 2.7.5.3).
fn indirect_len(
    descriptor: &Descriptor,
    setup: &QueueSetup,
    nested: bool,
) -> Result<u32, RingError> {
    const STEP: u32 = 16;
    if !setup.indirect {
        return Err(RingError::Indirect("not negotiated"));
    }
    if nested {
        return Err(RingError::Indirect("within an indirect table"));
    }
    if descriptor.flags & F_NEXT != 0 {
        return Err(RingError::Indirect("with a next descriptor"));
    }
    if descriptor.len == 0 || !descriptor.len.is_multiple_of(STEP) {
        return Err(RingError::Indirect("table length is no multiple of 16"));
    }
    Ok(descriptor.len / STEP)
}

/// Copies the bytes of `segments` from `offset` on into `data`; how many there were.
pub(crate) fn read_segments<'a>(
    segments: impl IntoIterator<Item = &'a Segment>,
    memory: &GuestMemory,
    offset: u32,
    data: &mut [u8],
) -> Result<usize, RingError> {
    let mut done = 0;
    for (segment, skip) in overlapping(segments, offset) {
        let rest = data.get_mut(done..).unwrap_or_default();
        let take = rest.len().min(to_usize(segment.len - skip));
        let Some(rest) = rest.get_mut(..take).filter(|r| !r.is_empty()) else {
            break;
        };
        memory
            .read_slice(rest, within(segment, skip)?)
            .map_err(|_| buffer_error(segment))?;
        done += take;
    }
    Ok(done)
}

/// Copies `data` to the bytes of `segments` from `offset` on; how many fitted.
pub(crate) fn write_segments<'a>(
    segments: impl IntoIterator<Item = &'a Segment>,
    memory: &GuestMemory,
    offset: u32,
    data: &[u8],
) -> Result<usize, RingError> {
    let mut done = 0;
    for (segment, skip) in overlapping(segments, offset) {
        let rest = data.get(done..).unwrap_or_default();
        let take = rest.len().min(to_usize(segment.len - skip));
        let Some(rest) = rest.get(..take).filter(|r| !r.is_empty()) else {
            break;
        };
        memory
            .write_slice(rest, within(segment, skip)?)
            .map_err(|_| buffer_error(segment))?;
        done += take;
    }
    Ok(done)
}

/// Each segment that has bytes at or after `offset`, with how many of its bytes come before.
fn overlapping<'a>(
    segments: impl IntoIterator<Item = &'a Segment>,
    offset: u32,
) -> impl Iterator<Item = (&'a Segment, u32)> {
    let mut before = offset;
    segments.into_iter().filter_map(move |segment| {
        if before >= segment.len {
            before -= segment.len;
            return None;
        }
        Some((segment, std::mem::take(&mut before)))
    })
}

fn within(segment: &Segment, skip: u32) -> Result<GuestAddress, RingError> {
    segment
        .address
        .0
        .checked_add(u64::from(skip))
        .map(GuestAddress)
        .ok_or_else(|| buffer_error(segment))
}

/// The error for a segment that is not in guest memory.
pub(crate) fn buffer_error(segment: &Segment) -> RingError {
    RingError::Buffer {
        address: segment.address.0,
        len: u64::from(segment.len),
    }
}

/// A length as an index; a `u32` fits on every host this runs on.
pub(crate) fn to_usize(len: u32) -> usize {
    usize::try_from(len).unwrap_or(usize::MAX)
}
