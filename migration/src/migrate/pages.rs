//! Pages of guest memory in frames.
//!
//! ```text
//!  payload:  run count u32 | reserved u32 | data of the data runs, in order | runs
//!  run:      gpa u64 | length u32 | kind u8 (0 data, 1 zero) | reserved u8 × 3
//! ```
//!
//! The runs come last so that the sender fills one buffer front to back. The guest writes its
//! memory while it is being sent, so that each page is first copied into the buffer; what is
//! looked at, summed and sent is the copy. A page that is all zero is only told of.

use vm_memory::{GuestAddress, GuestMemoryBackend, VolatileSlice};
use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::frame::{FrameBuffer, FrameError, Kind};
use crate::addr::{Gpa, PageSize};
use crate::memory::{GuestMemory, LOG_PAGE, WriteLog};

/// Bytes of the payload before the data.
const HEAD_BYTES: usize = 8;

/// Bytes of a run on the wire.
const RUN_BYTES: usize = size_of::<WireRun>();

/// Most page data in one frame; with all the rest it stays within the kind's limit.
const MAX_DATA: usize = (1 << 20) - (64 << 10);

/// Most runs in one frame.
const MAX_RUNS: usize = 2048;

/// Most guest memory in bytes that one frame tells of, zero pages included. Bounds the time
/// between two looks at the clock, on both sides.
const MAX_SPAN: usize = 16 << 20;

const _: () = assert!(HEAD_BYTES + MAX_DATA + MAX_RUNS * RUN_BYTES <= Kind::Pages.limit());

const DATA: u8 = 0;
const ZERO: u8 = 1;

/// The largest page size that can be sent: several pages should fit a frame.
pub(super) const LARGEST_PAGE: PageSize = match PageSize::new(64 << 10) {
    Some(size) => size,
    None => PageSize::SIZE_4K,
};

/// A run of bytes of guest memory, on the wire.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct WireRun {
    gpa: U64,
    length: U32,
    kind: u8,
    reserved: [u8; 3],
}

/// A part of guest memory that does not exist.
#[derive(Debug, thiserror::Error)]
#[error("no guest memory of {len:#x} bytes at GPA {gpa}")]
pub struct NoSuchMemory {
    /// First address.
    pub gpa: Gpa,
    /// Bytes.
    pub len: usize,
    /// What the memory said.
    #[source]
    pub cause: vm_memory::GuestMemoryError,
}

fn slice_of(
    memory: &GuestMemory,
    gpa: Gpa,
    len: usize,
) -> Result<VolatileSlice<'_, vm_memory::bitmap::RefSlice<'_, WriteLog>>, NoSuchMemory> {
    memory
        .get_slice(GuestAddress(gpa.0), len)
        .map_err(|cause| NoSuchMemory { gpa, len, cause })
}

/// Whether all bytes are zero. Blocks are OR-ed without a branch inside, which compilers turn
/// into vector code; a page with data in it mostly ends in the first block.
fn is_zero(bytes: &[u8]) -> bool {
    let (blocks, rest) = bytes.as_chunks::<128>();
    blocks.iter().all(|block| {
        let (words, _) = block.as_chunks::<8>();
        words
            .iter()
            .fold(0, |all, word| all | u64::from_ne_bytes(*word))
            == 0
    }) && rest.iter().all(|byte| *byte == 0)
}

/// What one page frame holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Tally {
    /// Bytes of guest memory told of.
    pub(super) memory_bytes: u64,
    /// Of them, bytes told to be zero.
    pub(super) zero_bytes: u64,
}

fn wide(bytes: usize) -> u64 {
    u64::try_from(bytes).unwrap_or(u64::MAX)
}

/// Collects pages into a frame.
#[derive(Debug)]
pub(super) struct PageBatch {
    frame: FrameBuffer,
    page: usize,
    data: usize,
    span: usize,
    runs: Vec<WireRun>,
    tally: Tally,
    /// Most data in one frame; less than [`MAX_DATA`] when the bandwidth is limited.
    data_limit: usize,
}

impl PageBatch {
    /// An empty batch for pages of this size, at most [`LARGEST_PAGE`].
    pub(super) fn new(page: PageSize, data_limit: usize) -> Self {
        let page = usize::try_from(page.bytes()).unwrap_or(usize::MAX);
        let mut frame = FrameBuffer::with_capacity(Kind::Pages.limit());
        frame.resize(HEAD_BYTES + MAX_DATA);
        Self {
            frame,
            page,
            data: 0,
            span: 0,
            runs: Vec::with_capacity(MAX_RUNS),
            tally: Tally::default(),
            data_limit: data_limit.clamp(page, MAX_DATA),
        }
    }

    /// Bytes of guest memory that surely still fit, a multiple of the page size.
    pub(super) fn room(&self) -> usize {
        let runs = MAX_RUNS.saturating_sub(self.runs.len());
        let room = self
            .data_limit
            .saturating_sub(self.data)
            .min(MAX_SPAN.saturating_sub(self.span))
            .min(runs.saturating_mul(self.page));
        room.checked_next_multiple_of(self.page)
            .filter(|up| *up == room)
            .unwrap_or_else(|| room.saturating_sub(room % self.page.max(1)))
    }

    /// Whether there is nothing in it.
    pub(super) fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// Copies a run of guest memory, at most [`room`](Self::room) bytes.
    pub(super) fn append(
        &mut self,
        memory: &GuestMemory,
        gpa: Gpa,
        len: usize,
    ) -> Result<(), NoSuchMemory> {
        let slice = slice_of(memory, gpa, len)?;
        let mut offset = 0usize;
        while offset < len {
            let count = self.page.min(len.saturating_sub(offset));
            let at = HEAD_BYTES.saturating_add(self.data);
            let room = self.frame.payload_mut().get_mut(at..).unwrap_or_default();
            let room = room.get_mut(..count).unwrap_or_default();
            let gpa = Gpa(gpa.0.saturating_add(wide(offset)));
            let page = slice
                .subslice(offset, room.len())
                .map_err(|error| NoSuchMemory {
                    gpa,
                    len: count,
                    cause: error.into(),
                })?;
            page.copy_to(room);
            let zero = is_zero(room);
            self.note(gpa, count, zero);
            offset = offset.saturating_add(count);
        }
        Ok(())
    }

    /// Adds a page to the runs, or lengthens the last one.
    fn note(&mut self, gpa: Gpa, count: usize, zero: bool) {
        self.span = self.span.saturating_add(count);
        self.tally.memory_bytes = self.tally.memory_bytes.saturating_add(wide(count));
        if zero {
            self.tally.zero_bytes = self.tally.zero_bytes.saturating_add(wide(count));
        } else {
            self.data = self.data.saturating_add(count);
        }
        let kind = if zero { ZERO } else { DATA };
        let count = u32::try_from(count).unwrap_or(u32::MAX);
        if let Some(last) = self.runs.last_mut() {
            let end = last.gpa.get().wrapping_add(u64::from(last.length.get()));
            if last.kind == kind && end == gpa.0 {
                last.length = last.length.get().saturating_add(count).into();
                return;
            }
        }
        self.runs.push(WireRun {
            gpa: gpa.0.into(),
            length: count.into(),
            kind,
            reserved: [0; 3],
        });
    }

    /// Whether more than half of what it tells of is data: then its time says something about
    /// the bandwidth.
    pub(super) fn is_mostly_data(&self) -> bool {
        self.data > self.span / 2
    }

    /// The frame, ready to be sealed, and what it holds. [`reset`](Self::reset) afterwards.
    pub(super) fn finish(&mut self) -> (&mut FrameBuffer, Tally) {
        let count = u32::try_from(self.runs.len()).unwrap_or(u32::MAX);
        self.frame.resize(HEAD_BYTES.saturating_add(self.data));
        if let Some((head, _)) = self
            .frame
            .payload_mut()
            .split_first_chunk_mut::<HEAD_BYTES>()
        {
            let [a, b, c, d] = count.to_le_bytes();
            *head = [a, b, c, d, 0, 0, 0, 0];
        }
        self.frame.extend(self.runs.as_slice().as_bytes());
        (&mut self.frame, self.tally)
    }

    /// Empties it.
    pub(super) fn reset(&mut self) {
        self.frame.resize(HEAD_BYTES + MAX_DATA);
        self.runs.clear();
        self.data = 0;
        self.span = 0;
        self.tally = Tally::default();
    }
}

/// A page frame that arrived, checked.
#[derive(Debug)]
pub(super) struct Pages<'a> {
    runs: &'a [WireRun],
    data: &'a [u8],
}

impl<'a> Pages<'a> {
    /// Checks the payload of a [`Kind::Pages`] frame: whatever passes can be applied without a
    /// further look at lengths.
    pub(super) fn open(payload: &'a [u8]) -> Result<Self, FrameError> {
        let malformed = |reason: &str| FrameError::Malformed {
            kind: Kind::Pages,
            reason: reason.to_owned(),
        };
        let (head, rest) = payload
            .split_first_chunk::<HEAD_BYTES>()
            .ok_or_else(|| malformed("too short"))?;
        let [a, b, c, d, reserved @ ..] = *head;
        if reserved != [0; 4] {
            return Err(malformed("reserved bytes are set"));
        }
        let count = usize::try_from(u32::from_le_bytes([a, b, c, d])).unwrap_or(usize::MAX);
        if count == 0 || count > MAX_RUNS {
            return Err(malformed("it has no runs, or too many"));
        }
        let cut = rest
            .len()
            .checked_sub(count.saturating_mul(RUN_BYTES))
            .ok_or_else(|| malformed("the runs do not fit"))?;
        let (data, runs) = rest.split_at(cut);
        let runs =
            <[WireRun]>::ref_from_bytes(runs).map_err(|_| malformed("the runs do not fit"))?;
        let (mut in_data, mut span) = (0usize, 0usize);
        for run in runs {
            let length = usize::try_from(run.length.get()).unwrap_or(usize::MAX);
            if length == 0 || run.reserved != [0; 3] {
                return Err(malformed("an empty run, or reserved bytes are set"));
            }
            span = span.saturating_add(length);
            match run.kind {
                DATA => in_data = in_data.saturating_add(length),
                ZERO => {}
                _ => return Err(malformed("a run of unknown kind")),
            }
        }
        if in_data != data.len() || span > MAX_SPAN {
            return Err(malformed(
                "the runs do not match the data, or tell of too much",
            ));
        }
        Ok(Self { runs, data })
    }

    /// Writes the pages into guest memory. A run must lie within one region.
    pub(super) fn apply(&self, memory: &GuestMemory) -> Result<Tally, NoSuchMemory> {
        let mut data = self.data;
        let mut tally = Tally::default();
        for run in self.runs {
            let length = usize::try_from(run.length.get()).unwrap_or(usize::MAX);
            let slice = slice_of(memory, Gpa(run.gpa.get()), length)?;
            tally.memory_bytes = tally.memory_bytes.saturating_add(wide(length));
            if run.kind == ZERO {
                tally.zero_bytes = tally.zero_bytes.saturating_add(wide(length));
                clear(&slice);
                continue;
            }
            // `open` has seen that the data is as long as the runs say.
            let (now, later) = data.split_at_checked(length).unwrap_or((data, &[]));
            slice.copy_from(now);
            data = later;
        }
        Ok(tally)
    }
}

/// Makes a part of guest memory zero. A page that this process never wrote is zero as it was
/// mapped; writing it would only make the host set memory aside for it.
fn clear<B: vm_memory::bitmap::BitmapSlice>(slice: &VolatileSlice<'_, B>) {
    const PAGE: usize = 4096;
    const _: () = assert!(LOG_PAGE.bytes() == 4096);
    static ZEROES: [u8; PAGE] = [0; PAGE];
    let mut offset = 0usize;
    while offset < slice.len() {
        let count = PAGE.min(slice.len().saturating_sub(offset));
        // A run need not begin on a page: look at the pages of its first and last byte.
        let last = offset.saturating_add(count).saturating_sub(1);
        let written = slice.bitmap().dirty_at(offset) || slice.bitmap().dirty_at(last);
        if written && let Ok(part) = slice.subslice(offset, count) {
            part.copy_from(ZEROES.get(..count).unwrap_or_default());
        }
        offset = offset.saturating_add(count);
    }
}

#[cfg(test)]
mod tests;
