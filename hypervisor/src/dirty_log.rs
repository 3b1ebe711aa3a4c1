//! Which guest pages vCPUs wrote, in the ways KVM can tell it.
//!
//! # Methods
//! | [`DirtyLogMethod`] | record | cleared |
//! |---|---|---|
//! | `BitmapManualClear` | one bit per page | piece by piece, by [`DirtyLog::clear_dirty_log`] |
//! | `BitmapAutoClear` | one bit per page | whole, by the read |
//! | `Ring` | a ring of page numbers per vCPU, which fills one bit per page here | by the read |
//!
//! To clear a page is to write-protect it (or to clear the CPU's own dirty bit): the guest's next
//! write to it faults and is recorded. Clearing a whole slot at the read costs in one go what
//! clearing pieces just before they are read to be sent spreads out, and makes pages dirty again
//! which were not even sent yet; so pieces are the default where the kernel has them. Rings cost by
//! pages written, not by guest size, but stop a vCPU whose ring is full until somebody empties it.
//!
//! # Order
//! Whoever copies memory clears a page first and reads it afterwards. The other way round a write
//! between the two is lost.
//!
//! # The last read
//! Writes of a vCPU that is in the guest may still be on their way to the record (in the CPU's own
//! log, or to its ring). What is read after all vCPUs came back from [`crate::Vcpu::run`] is
//! complete.

use crate::{Error, MemorySlot};

/// How a VM is asked to keep its dirty log ([`crate::VmOptions::dirty_log`]).
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub enum DirtyLogChoice {
    /// A bitmap that is cleared piece by piece where this KVM can, and at the read elsewhere.
    #[default]
    Bitmap,
    /// A bitmap that is cleared at the read.
    BitmapAutoClear,
    /// Rings, or no VM.
    Ring {
        /// Entries of each vCPU's ring, a power of two; [`DEFAULT_RING_ENTRIES`] if not given.
        entries: Option<u32>,
    },
}

/// Entries of a vCPU's dirty ring (64 KiB) if nobody says otherwise: what a vCPU writes in tens of
/// milliseconds, so that the exits of a full ring are few beside the faults that filled it.
pub const DEFAULT_RING_ENTRIES: u32 = 4096;

/// How a VM keeps its dirty log.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DirtyLogMethod {
    /// A bitmap that is cleared piece by piece (`KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2`).
    BitmapManualClear {
        /// Logging starts with every page dirty, and nothing is write-protected before it is
        /// cleared for the first time (`KVM_DIRTY_LOG_INITIALLY_SET`).
        initially_set: bool,
    },
    /// A bitmap that is cleared at the read.
    BitmapAutoClear,
    /// One ring per vCPU (`KVM_CAP_DIRTY_LOG_RING_ACQ_REL`).
    Ring {
        /// Entries of each ring.
        entries: u32,
    },
}

/// Which guest pages were written through the guest's own mappings.
pub trait DirtyLog: Send + Sync {
    /// How the log is kept; the same for the VM's life.
    fn dirty_log_method(&self) -> DirtyLogMethod;
    /// Starts or stops recording writes to `slot`. What was recorded before is forgotten, also if
    /// logging is on already. Everything is clean at the start, or everything is dirty: see
    /// [`DirtyLogMethod::BitmapManualClear`].
    ///
    /// # Errors
    /// [`Error::UnknownSlot`], or KVM's.
    fn set_dirty_logging(&self, slot: MemorySlot, on: bool) -> Result<(), Error>;
    /// How many words [`read_dirty_log`](Self::read_dirty_log) fills for `slot`.
    ///
    /// # Errors
    /// [`Error::UnknownSlot`].
    fn dirty_log_words(&self, slot: MemorySlot) -> Result<usize, Error>;
    /// Overwrites `words` with the record: bit `n % 64` of word `n / 64` is the slot's page `n` of
    /// 4 KiB. These are the pages written since the last read, which clears the record; with
    /// [`DirtyLogMethod::BitmapManualClear`] those written since they were last cleared by
    /// [`clear_dirty_log`](Self::clear_dirty_log), and the read clears nothing.
    ///
    /// Where the record is cleared, the caller answers for the bits from here on. On error it must
    /// take all pages as dirty.
    ///
    /// # Errors
    /// [`Error::DirtyLogBuffer`] unless `words` has exactly
    /// [`dirty_log_words`](Self::dirty_log_words), [`Error::DirtyLogOff`],
    /// [`Error::UnknownSlot`], or KVM's.
    fn read_dirty_log(&self, slot: MemorySlot, words: &mut [u64]) -> Result<(), Error>;
    /// Clears the record of those pages that are set in `words`, whose first bit is the slot's page
    /// `first_page` (a multiple of 64); bits behind the slot's last page mean nothing. Pages that
    /// were not written are not touched. A write after this call is recorded anew, so call it
    /// before the page is read to be sent.
    ///
    /// # Errors
    /// [`Error::DirtyLogPiece`] if `first_page` is not a multiple of 64 or `words` reaches beyond
    /// the slot by a whole word, [`Error::DirtyLogOff`], [`Error::UnknownSlot`],
    /// [`Error::Unsupported`] unless the method is [`DirtyLogMethod::BitmapManualClear`], or KVM's.
    fn clear_dirty_log(
        &self,
        slot: MemorySlot,
        first_page: u64,
        words: &[u64],
    ) -> Result<(), Error>;
    /// How often a vCPU came out of the guest because its ring was full; 0 without rings.
    fn dirty_ring_full_exits(&self) -> u64;
}
