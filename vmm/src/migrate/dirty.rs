//! vCPUs as a writer of guest memory: the dirty log of KVM, in whichever way the VM keeps it.
//!
//! Each memory slot holds one region of RAM, and KVM tells of a slot as a whole: its answer is
//! fetched at the slot's first window and given out window by window.
//!
//! # When a page's record is cleared
//! With a bitmap that is cleared at the read, and with rings, the fetch clears. With a bitmap that is
//! cleared piece by piece a page stays in all answers until [`DeferredClear::clear`] was told of it,
//! which comes before the page is read to be sent. Nothing else clears, so that a page which was
//! reported and is not sent yet costs the guest no second fault; and if the migration fails
//! half-way, what was not cleared is still in KVM's record.
//!
//! # The last report
//! A vCPU that is in the guest may have written pages that are in no answer yet. The report after
//! all have left it is complete, which is why the engine asks once more then.

use std::sync::Arc;

use hypervisor::{DirtyLog, DirtyLogMethod, MemorySlot};
use vm_migration::memory::RamRegion;
use vm_migration::{
    BitmapError, Clearing, DeferredClear, DirtyError, DirtySource, Iova, IovaBitmap, IovaRange,
    PageSize, Precision, Reported,
};

#[cfg(test)]
mod tests;

/// Identifier of the source.
pub(super) const VCPU_SOURCE_ID: &str = "vcpu";

/// The page KVM logs by on x86.
const LOG_PAGE: PageSize = PageSize::SIZE_4K;

/// Why KVM's log could not be used.
#[derive(Debug, thiserror::Error)]
enum VcpuDirtyError {
    /// A window that is not the slot's first, nor the one after the last that was asked for.
    #[error("window {first} is out of turn: report all windows of a region in rising order")]
    OutOfTurn {
        /// The window's first address.
        first: Iova,
    },
    /// A piece to clear that does not start with a word of the log.
    #[error("range {first} to clear does not start at a multiple of 64 pages of its region")]
    Unaligned {
        /// The range's first address.
        first: Iova,
    },
    /// KVM's.
    #[error(transparent)]
    Kvm(#[from] hypervisor::Error),
    /// The bitmap's.
    #[error(transparent)]
    Bitmap(#[from] BitmapError),
}

fn failed(operation: &'static str) -> impl Fn(VcpuDirtyError) -> DirtyError {
    move |cause| DirtyError::backend(VCPU_SOURCE_ID, operation, cause)
}

fn not_tracked(range: IovaRange) -> DirtyError {
    DirtyError::not_tracked(VCPU_SOURCE_ID, range)
}

/// The dirty log of one memory slot. Its buffers live as long as the source, so that no report
/// allocates.
struct Slot {
    slot: MemorySlot,
    range: IovaRange,
    /// KVM's last answer, one bit per page of the slot.
    words: Vec<u64>,
    /// Pages that were reported and not cleared since, which KVM tells again each time; empty
    /// where the report clears.
    uncleared: Vec<u64>,
    /// Where the next window starts, if the answer is good for one.
    next: Option<Iova>,
}

impl Slot {
    /// The words of the log that hold the pages of `range`, which lies in the slot: the first of
    /// them, and how many.
    fn words_of(&self, range: IovaRange) -> (usize, usize) {
        let word = |address: Iova| {
            let page = (address.0 - self.range.first().0) >> LOG_PAGE.shift();
            usize::try_from(page / 64).unwrap_or(usize::MAX)
        };
        let first = word(range.first());
        (
            first,
            word(range.last()).saturating_sub(first).saturating_add(1),
        )
    }

    /// The address of the first page of a word.
    fn address_of(&self, word: usize) -> Iova {
        let pages = u64::try_from(word).unwrap_or(u64::MAX).saturating_mul(64);
        Iova(
            self.range
                .first()
                .0
                .saturating_add(pages << LOG_PAGE.shift()),
        )
    }

    /// ORs the pages of `window` of KVM's last answer into `bitmap`.
    fn give_out(
        &mut self,
        window: IovaRange,
        bitmap: &mut IovaBitmap,
    ) -> Result<Reported, VcpuDirtyError> {
        let (first, count) = self.words_of(window);
        let words = first
            .checked_add(count)
            .and_then(|end| self.words.get(first..end))
            .ok_or(VcpuDirtyError::OutOfTurn {
                first: window.first(),
            })?;
        let named = bitmap.or_words(self.address_of(first), LOG_PAGE, words)?;
        if self.uncleared.is_empty() {
            return Ok(Reported::counted(named));
        }
        let mut new = 0;
        let uncleared = self.uncleared.iter_mut().skip(first);
        for (word, known) in words.iter().zip(uncleared) {
            new += u64::from((word & !*known).count_ones());
            *known = *word;
        }
        Ok(Reported::counted(new))
    }
}

/// All vCPUs' writes.
pub(super) struct VcpuDirty {
    log: Arc<dyn DirtyLog>,
    slots: Vec<Slot>,
    /// Pages to clear, at the size that KVM logs by.
    piece: Option<IovaBitmap>,
}

impl VcpuDirty {
    /// The log of `slots`, which hold `regions` in the same order.
    pub(super) fn new(log: Arc<dyn DirtyLog>, slots: &[MemorySlot], regions: &[RamRegion]) -> Self {
        let slots = slots
            .iter()
            .zip(regions)
            .filter_map(|(slot, region)| {
                let range = IovaRange::new(Iova(region.gpa.0), region.len)?;
                Some(Slot {
                    slot: *slot,
                    range,
                    words: Vec::new(),
                    uncleared: Vec::new(),
                    next: None,
                })
            })
            .collect();
        Self {
            log,
            slots,
            piece: None,
        }
    }

    /// The slot that all of `range` lies in.
    fn slot_of(&self, range: IovaRange) -> Result<usize, DirtyError> {
        let within = |slot: &Slot| slot.range.intersection(range) == Some(range);
        let found = self.slots.iter().position(within);
        found.ok_or_else(|| not_tracked(range))
    }

    fn start_slots(&mut self) -> Result<(), hypervisor::Error> {
        let method = self.log.dirty_log_method();
        for slot in &mut self.slots {
            slot.next = None;
            self.log.set_dirty_logging(slot.slot, true)?;
            slot.words.resize(self.log.dirty_log_words(slot.slot)?, 0);
            if let DirtyLogMethod::BitmapManualClear { initially_set } = method {
                // What KVM calls dirty from the start was not written since.
                let known = if initially_set { u64::MAX } else { 0 };
                slot.uncleared.clear();
                slot.uncleared.resize(slot.words.len(), known);
            }
        }
        tracing::info!(?method, "dirty log of the vCPUs");
        Ok(())
    }

    fn report_from(
        log: &dyn DirtyLog,
        slot: &mut Slot,
        window: IovaRange,
        bitmap: &mut IovaBitmap,
    ) -> Result<Reported, VcpuDirtyError> {
        // Taken out, so that after an error only a new start or a new round goes on.
        let next = slot.next.take();
        if window.first() == slot.range.first() {
            log.read_dirty_log(slot.slot, &mut slot.words)?;
        } else if next != Some(window.first()) {
            return Err(VcpuDirtyError::OutOfTurn {
                first: window.first(),
            });
        }
        let reported = slot.give_out(window, bitmap)?;
        slot.next = window.last().0.checked_add(1).map(Iova);
        Ok(reported)
    }

    fn clear_piece(
        &mut self,
        index: usize,
        range: IovaRange,
        pages: &IovaBitmap,
    ) -> Result<(), VcpuDirtyError> {
        let Some(slot) = self.slots.get_mut(index) else {
            return Ok(());
        };
        let (first, _) = slot.words_of(range);
        if slot.address_of(first) != range.first() {
            return Err(VcpuDirtyError::Unaligned {
                first: range.first(),
            });
        }
        // One as large as any before is used again.
        let kept = self.piece.take();
        let kept = kept.and_then(|mut piece| piece.retarget(range).ok().map(|()| piece));
        let piece = match kept {
            Some(piece) => self.piece.insert(piece),
            None => self.piece.insert(IovaBitmap::over(range, LOG_PAGE)?),
        };
        piece.merge(pages);
        let first_page = u64::try_from(first).unwrap_or(u64::MAX).saturating_mul(64);
        self.log
            .clear_dirty_log(slot.slot, first_page, piece.words())?;
        for (known, cleared) in slot.uncleared.iter_mut().skip(first).zip(piece.words()) {
            *known &= !cleared;
        }
        Ok(())
    }
}

impl DirtySource for VcpuDirty {
    fn id(&self) -> &str {
        VCPU_SOURCE_ID
    }

    fn granularity(&self) -> PageSize {
        LOG_PAGE
    }

    fn precision(&self) -> Precision {
        Precision::Exact
    }

    fn start(&mut self, ranges: &[IovaRange]) -> Result<(), DirtyError> {
        for range in ranges {
            self.slot_of(*range)?;
        }
        self.start_slots()
            .map_err(|cause| failed("start")(cause.into()))
    }

    fn report(
        &mut self,
        window: IovaRange,
        bitmap: &mut IovaBitmap,
    ) -> Result<Reported, DirtyError> {
        let index = self.slot_of(window)?;
        let slot = self
            .slots
            .get_mut(index)
            .ok_or_else(|| not_tracked(window))?;
        Self::report_from(&*self.log, slot, window, bitmap).map_err(failed("report"))
    }

    fn clearing(&mut self) -> Clearing<'_> {
        match self.log.dirty_log_method() {
            DirtyLogMethod::BitmapManualClear { .. } => Clearing::BeforeSend(self),
            DirtyLogMethod::BitmapAutoClear | DirtyLogMethod::Ring { .. } => Clearing::AtReport,
        }
    }

    fn stop(&mut self) -> Result<(), DirtyError> {
        let mut result = Ok(());
        for slot in &mut self.slots {
            slot.next = None;
            let stopped = self.log.set_dirty_logging(slot.slot, false);
            result = result.and(stopped);
        }
        result.map_err(|cause| failed("stop")(cause.into()))
    }
}

impl DeferredClear for VcpuDirty {
    fn clear(&mut self, range: IovaRange, pages: &IovaBitmap) -> Result<(), DirtyError> {
        let index = self.slot_of(range)?;
        self.clear_piece(index, range, pages)
            .map_err(failed("clear"))
    }
}
