//! Guest buffers as lists for `readv` and `writev`.

use std::collections::VecDeque;

use libc::iovec;
use vm_memory::{GuestAddress, GuestMemory as _, Permissions};
use vm_migration::memory::{GuestMemory, mark_written};

use super::backend::MAX_IOVECS;
use crate::queue::{Chain, Queue, RingError, Segment, buffer_error, to_usize, write_segments};

/// Calls `each` with the host's view of every contiguous part of `segment`, and the part itself.
///
/// The pointers are good for as long as `memory` is kept.
pub(super) fn translate(
    memory: &GuestMemory,
    segment: &Segment,
    access: Permissions,
    mut each: impl FnMut(iovec, Segment),
) -> Result<(), RingError> {
    let error = |_| buffer_error(segment);
    let slices = memory
        .get_slices(segment.address, to_usize(segment.len), access)
        .map_err(error)?;
    let mut address = segment.address.0;
    for slice in slices {
        let slice = slice.map_err(error)?;
        let len = u32::try_from(slice.len()).map_err(|_| buffer_error(segment))?;
        each(
            iovec {
                iov_base: slice.ptr_guard_mut().as_ptr().cast(),
                iov_len: slice.len(),
            },
            Segment {
                address: GuestAddress(address),
                len,
            },
        );
        address = address.saturating_add(u64::from(len));
    }
    Ok(())
}

/// One receive buffer of the driver.
#[derive(Clone, Copy, Debug)]
struct RxChain {
    head: u16,
    /// How many parts it has.
    parts: usize,
    bytes: usize,
}

/// Receive buffers taken from the ring and not yet used, in the order of the ring.
///
/// Taking them ahead lets one `readv` span as many as the largest packet needs; those a packet
/// leaves over serve the next. The lists hold pointers into one snapshot of guest memory: they
/// are emptied when that changes, and never leave their thread.
#[derive(Debug, Default)]
pub(super) struct RxBuffers {
    chains: VecDeque<RxChain>,
    segments: VecDeque<Segment>,
    iovecs: VecDeque<iovec>,
    bytes: usize,
    chain: Chain,
}

impl RxBuffers {
    /// Bytes in all buffers.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Number of chains.
    pub(super) fn chains(&self) -> usize {
        self.chains.len()
    }

    /// Takes buffers until there are `bytes`, or `chains` chains, or the ring is empty; if
    /// `for_read`, no more than fit one `readv`.
    pub(super) fn fill(
        &mut self,
        queue: &mut Queue,
        memory: &GuestMemory,
        bytes: usize,
        chains: usize,
        for_read: bool,
    ) -> Result<(), RingError> {
        while self.bytes < bytes && self.chains.len() < chains {
            if !queue.pop(memory, &mut self.chain)? {
                break;
            }
            let before = self.iovecs.len();
            for segment in self.chain.writable() {
                translate(memory, segment, Permissions::Write, |iov, part| {
                    self.iovecs.push_back(iov);
                    self.segments.push_back(part);
                })?;
            }
            let parts = self.iovecs.len() - before;
            if parts == 0 || parts >= MAX_IOVECS {
                return Err(RingError::Request("receive buffer of no or too many parts"));
            }
            let bytes = to_usize(self.chain.writable_len());
            self.bytes += bytes;
            self.chains.push_back(RxChain {
                head: self.chain.head(),
                parts,
                bytes,
            });
            // One entry is left for what does not fit.
            if for_read && self.iovecs.len() >= MAX_IOVECS {
                self.drop_last(queue);
                break;
            }
        }
        Ok(())
    }

    fn drop_last(&mut self, queue: &mut Queue) {
        if let Some(chain) = self.chains.pop_back() {
            let parts = self.iovecs.len() - chain.parts;
            self.iovecs.truncate(parts);
            self.segments.truncate(parts);
            self.bytes -= chain.bytes;
            queue.unpop(1);
        }
    }

    /// The buffers followed by `overflow`, as a list for one `readv`; `read` makes the call.
    pub(super) fn with_iovecs<T>(
        &mut self,
        overflow: &mut [u8],
        read: impl FnOnce(&[iovec]) -> T,
    ) -> T {
        self.iovecs.push_back(iovec {
            iov_base: overflow.as_mut_ptr().cast(),
            iov_len: overflow.len(),
        });
        let result = read(self.iovecs.make_contiguous());
        self.iovecs.pop_back();
        result
    }

    /// Writes `data` at `offset` bytes into the buffers.
    pub(super) fn write_at(
        &self,
        memory: &GuestMemory,
        offset: usize,
        data: &[u8],
    ) -> Result<(), RingError> {
        let offset = u32::try_from(offset).unwrap_or(u32::MAX);
        write_segments(&self.segments, memory, offset, data).map(|_| ())
    }

    /// Copies what is at `offset` bytes into the buffers to `data`; how many bytes there were.
    pub(super) fn read_at(
        &self,
        memory: &GuestMemory,
        offset: usize,
        data: &mut [u8],
    ) -> Result<usize, RingError> {
        let offset = u32::try_from(offset).unwrap_or(u32::MAX);
        crate::queue::read_segments(&self.segments, memory, offset, data)
    }

    /// How many chains a packet of `len` bytes takes.
    pub(super) fn chains_for(&self, len: usize) -> u16 {
        let mut left = len;
        let mut count = 0;
        for chain in &self.chains {
            count += 1;
            if left <= chain.bytes {
                break;
            }
            left -= chain.bytes;
        }
        count
    }

    /// Logs that the first `len` bytes were written by `readv`, which the memory's own log did
    /// not see.
    pub(super) fn mark(&self, memory: &GuestMemory, len: usize) {
        let mut left = len;
        for segment in &self.segments {
            let take = left.min(to_usize(segment.len));
            mark_written(memory, segment.address, take);
            left -= take;
            if left == 0 {
                break;
            }
        }
    }

    /// Gives the driver its packet of `len` bytes, all of its chains at once.
    pub(super) fn complete(
        &mut self,
        queue: &mut Queue,
        memory: &GuestMemory,
        len: usize,
    ) -> Result<(), RingError> {
        let mut left = len;
        while left > 0 {
            let Some(chain) = self.chains.pop_front() else {
                break;
            };
            let used = left.min(chain.bytes);
            queue.push_used(memory, chain.head, u32::try_from(used).unwrap_or(u32::MAX))?;
            left -= used;
            self.bytes -= chain.bytes;
            self.iovecs.drain(..chain.parts);
            self.segments.drain(..chain.parts);
        }
        queue.publish(memory)
    }

    /// Gives all buffers back to the ring.
    pub(super) fn give_back(&mut self, queue: &mut Queue) {
        // No more than the queue's size were taken, which is a u16.
        queue.unpop(u16::try_from(self.chains.len()).unwrap_or(u16::MAX));
        self.chains.clear();
        self.segments.clear();
        self.iovecs.clear();
        self.bytes = 0;
    }
}
