//! Dirty rings: each vCPU has a ring, shared with KVM, into which KVM puts the pages that the vCPU
//! writes (Documentation/virt/kvm/api.rst, KVM_CAP_DIRTY_LOG_RING).
//!
//! An entry goes round like this:
//!
//! ```text
//!          KVM                   here                   KVM_RESET_DIRTY_RINGS
//! empty ────────► dirty ──────────────────► harvested ─────────────────────────► empty
//!     page made writable   bit set in its slot's log    page write-protected again
//! ```
//!
//! Between harvest and reset a page's writes are not recorded, so its content must not be read for
//! sending then. Both are done under one lock, under which alone bits leave a slot's log, and only
//! while no harvested entry waits for its reset. So when a reset fails half-way, nothing is lost:
//! the bits stay where they are until a later reset is complete.
//!
//! # Pages in doubt
//! KVM protects pages by batches: entries next to each other in a ring whose pages lie within 64
//! pages of each other. Newer kernels (6.18, say) stop when a signal is pending, and forget the
//! batch they were collecting (`kvm_dirty_ring_reset` in virt/kvm/dirty_ring.c): the entries count as
//! reset, but their pages stay writable, and what the guest writes there is in no ring any more. So
//! signals are held back during a reset. Where one may have come all the same (a stop cannot be
//! held back), the pages of the last batch are *in doubt*: they are dirty in every report from then
//! on, until logging starts anew.
//!
//! # A full ring
//! A ring that is nearly full makes KVM_RUN return; the vCPU's own thread then empties all rings
//! (see [`Rings::make_room`]) and goes on.

use std::collections::{BTreeSet, VecDeque};
use std::os::fd::BorrowedFd;
use std::ptr::{addr_of, addr_of_mut};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use kvm_bindings::{KVM_DIRTY_GFN_F_MASK, KVM_DIRTY_LOG_PAGE_OFFSET, kvm_dirty_gfn};
use kvm_ioctls::VmFd;
use parking_lot::Mutex;

use super::ioctls::{self, RingReset};
use super::vcpu_mapping::VcpuMapping;
use super::vm::PAGE_SIZE;
use crate::Error;

/// `KVM_DIRTY_GFN_F_DIRTY` of linux/kvm.h: KVM has filled the entry.
const DIRTY: u32 = 1 << 0;
/// `KVM_DIRTY_GFN_F_RESET` of linux/kvm.h: it was harvested.
const HARVESTED: u32 = 1 << 1;

/// How often in a row KVM may reset nothing (a stop keeps it from it) before that is an error.
const IDLE_RESETS: u32 = 1000;

/// Pages of one batch lie less than this apart: a batch is a word of bits.
const BATCH_PAGES: u64 = 64;

/// A page that was written, as KVM names it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Written {
    slot: u32,
    page: u64,
}

impl Written {
    fn may_be_in_batch_of(self, other: Self) -> bool {
        self.slot == other.slot && self.page.abs_diff(other.page) < BATCH_PAGES
    }
}

/// One vCPU's ring.
struct Ring {
    /// `entries` times [`kvm_dirty_gfn`].
    mapping: VcpuMapping,
    /// A power of two.
    entries: u32,
    /// The entry that KVM fills, or filled, next after those harvested; below `entries`.
    next: u32,
    /// Harvested and not reset, in the ring's order. Room for all entries is there.
    waiting: VecDeque<Written>,
}

// SAFETY: the mapping belongs to no thread; it is accessed through `&mut self` here and by KVM,
// which keeps to the flags' protocol.
unsafe impl Send for Ring {}

impl Ring {
    fn map(vcpu: BorrowedFd<'_>, entries: u32) -> Result<Self, Error> {
        let offset = u64::from(KVM_DIRTY_LOG_PAGE_OFFSET) * PAGE_SIZE;
        let operation = "mmap of a vCPU's dirty ring";
        Ok(Self {
            mapping: VcpuMapping::new(vcpu, offset, bytes(entries), operation)?,
            entries,
            next: 0,
            waiting: VecDeque::with_capacity(usize::try_from(entries).unwrap_or(0)),
        })
    }

    /// Gives each dirty entry to `found`, and marks it as harvested.
    fn harvest(&mut self, mut found: impl FnMut(Written)) {
        // KVM cannot fill an entry again before it is reset: there are at most as many.
        for _ in 0..self.entries {
            let index = usize::try_from(self.next).unwrap_or(0);
            // SAFETY: `next` is below `entries`, so the entry is in the mapping.
            let entry = unsafe { self.mapping.start().cast::<kvm_dirty_gfn>().add(index) };
            // SAFETY: inside the mapping, which lives as long as `self`; KVM accesses the flags by
            // single loads and stores, this process by this reference only.
            let flags = unsafe { AtomicU32::from_ptr(addr_of_mut!((*entry).flags)) };
            // Acquire: KVM stored slot and offset before the flag.
            if flags.load(Ordering::Acquire) & KVM_DIRTY_GFN_F_MASK != DIRTY {
                break;
            }
            // SAFETY: inside the mapping; KVM does not touch an entry between its being dirty and
            // its being harvested.
            let written = unsafe {
                Written {
                    slot: addr_of!((*entry).slot).read(),
                    page: addr_of!((*entry).offset).read(),
                }
            };
            found(written);
            self.waiting.push_back(written);
            // Release: KVM may use the entry once it sees this, which must be after the reads.
            flags.store(HARVESTED, Ordering::Release);
            self.next = (self.next + 1) & (self.entries - 1);
        }
    }
}

/// Bytes of a ring.
fn bytes(entries: u32) -> usize {
    usize::try_from(entries).map_or(usize::MAX, |entries| {
        entries.saturating_mul(size_of::<kvm_dirty_gfn>())
    })
}

/// The pages of a slot that were harvested and not read yet.
struct Log {
    pages: u64,
    words: Vec<u64>,
    /// Pages that KVM may have left writable, and so may be dirty at any time.
    doubted: BTreeSet<u64>,
}

impl Log {
    fn set(&mut self, page: u64) {
        if page < self.pages {
            set_bit(&mut self.words, page);
        }
    }

    fn doubt(&mut self, page: u64) {
        if page < self.pages {
            set_bit(&mut self.words, page);
            self.doubted.insert(page);
        }
    }

    /// Gives out what is dirty, of which nothing is then but the pages in doubt.
    fn take(&mut self, words: &mut [u64]) {
        words.copy_from_slice(&self.words);
        self.words.fill(0);
        for page in &self.doubted {
            set_bit(&mut self.words, *page);
        }
    }
}

fn set_bit(words: &mut [u64], page: u64) {
    let index = usize::try_from(page / 64).unwrap_or(usize::MAX);
    if let Some(word) = words.get_mut(index) {
        *word |= 1 << (page % 64);
    }
}

/// All rings of a VM, and the logs they are emptied into.
pub(super) struct Rings {
    entries: u32,
    /// Exits of vCPUs whose ring was full.
    full_exits: AtomicU64,
    state: Mutex<State>,
}

struct State {
    /// In the order in which their vCPUs were created, which is KVM's.
    rings: Vec<Ring>,
    /// By slot number; `None` where nothing is logged.
    logs: Vec<Option<Log>>,
}

impl Rings {
    /// For vCPUs with rings of `entries` entries, a power of two.
    pub(super) fn new(entries: u32) -> Self {
        Self {
            entries,
            full_exits: AtomicU64::new(0),
            state: Mutex::new(State {
                rings: Vec::new(),
                logs: Vec::new(),
            }),
        }
    }

    /// Takes the ring of the vCPU behind `vcpu` to the others.
    pub(super) fn add(&self, vcpu: BorrowedFd<'_>) -> Result<(), Error> {
        let ring = Ring::map(vcpu, self.entries)?;
        self.state.lock().rings.push(ring);
        Ok(())
    }

    /// Gets ready for entries of `slot`, which has `pages` pages: all are clean. To be called
    /// before KVM makes entries.
    pub(super) fn open_log(&self, slot: u32, pages: u64) {
        let log = Log {
            pages,
            words: vec![0; ioctls::words_of(pages)],
            doubted: BTreeSet::new(),
        };
        self.state.lock().put_log(slot, Some(log));
    }

    /// Forgets `slot`, for which KVM makes no more entries, and empties the rings.
    pub(super) fn close_log(&self, vm: &VmFd, slot: u32) -> Result<(), Error> {
        let mut state = self.state.lock();
        state.put_log(slot, None);
        state.empty(vm)
    }

    /// Overwrites `words` with what is dirty of `slot`, of which nothing is then but pages in doubt.
    pub(super) fn take(&self, vm: &VmFd, slot: u32, words: &mut [u64]) -> Result<(), Error> {
        let mut state = self.state.lock();
        state.empty(vm)?;
        let log = state.log_mut(slot).ok_or(Error::DirtyLogOff { slot })?;
        ioctls::check_dirty_log_buffer(slot, log.pages, words)?;
        log.take(words);
        Ok(())
    }

    /// Empties all rings, as a vCPU's is full.
    pub(super) fn make_room(&self, vm: &VmFd) -> Result<(), Error> {
        self.full_exits.fetch_add(1, Ordering::Relaxed);
        self.state.lock().empty(vm)
    }

    /// How often [`make_room`](Self::make_room) was called.
    pub(super) fn full_exits(&self) -> u64 {
        self.full_exits.load(Ordering::Relaxed)
    }
}

impl State {
    fn log_mut(&mut self, slot: u32) -> Option<&mut Log> {
        log_of(&mut self.logs, slot)
    }

    fn put_log(&mut self, slot: u32, log: Option<Log>) {
        let index = usize::try_from(slot).unwrap_or(usize::MAX);
        if index >= self.logs.len() && log.is_some() {
            self.logs.resize_with(index.saturating_add(1), || None);
        }
        if let Some(place) = self.logs.get_mut(index) {
            *place = log;
        }
    }

    /// Harvests all rings and has KVM protect again what was harvested. On success no harvested
    /// entry waits.
    fn empty(&mut self, vm: &VmFd) -> Result<(), Error> {
        for ring in &mut self.rings {
            // A page of a slot that is not logged (any more), or is shorter now, is of no interest.
            ring.harvest(|written| {
                if let Some(log) = log_of(&mut self.logs, written.slot) {
                    log.set(written.page);
                }
            });
        }
        let mut idle = 0;
        loop {
            let waiting = self.waiting();
            if waiting == 0 {
                return Ok(());
            }
            let reset = ioctls::reset_dirty_rings(vm)?;
            self.account(&reset);
            idle = if reset.done == 0 { idle + 1 } else { 0 };
            if idle > IDLE_RESETS {
                return Err(Error::DirtyRingReset { waiting });
            }
        }
    }

    /// Entries harvested and not reset.
    fn waiting(&self) -> usize {
        self.rings.iter().map(|ring| ring.waiting.len()).sum()
    }

    /// Takes note of what KVM did.
    fn account(&mut self, reset: &RingReset) {
        let mut done = usize::try_from(reset.done).unwrap_or(usize::MAX);
        let doubtful = reset.disturbed || done < self.waiting();
        // The batch that KVM was at when it stopped is in the last ring it took entries from.
        let mut batch = Vec::new();
        for ring in &mut self.rings {
            let count = done.min(ring.waiting.len());
            done = done.saturating_sub(count);
            let taken = ring.waiting.drain(..count);
            if doubtful && count > 0 {
                batch = last_batch(taken);
            }
        }
        if !batch.is_empty() {
            tracing::warn!(pages = batch.len(), "dirty ring reset was disturbed");
        }
        for written in batch {
            if let Some(log) = log_of(&mut self.logs, written.slot) {
                log.doubt(written.page);
            }
        }
    }
}

/// The entries at the end of `taken` that KVM can have had in one batch, and perhaps a few more.
fn last_batch(taken: impl DoubleEndedIterator<Item = Written>) -> Vec<Written> {
    let mut backwards = taken.rev().peekable();
    let last = backwards.peek().copied();
    backwards
        .take_while(|written| last.is_some_and(|last| written.may_be_in_batch_of(last)))
        .collect()
}

fn log_of(logs: &mut [Option<Log>], slot: u32) -> Option<&mut Log> {
    logs.get_mut(usize::try_from(slot).ok()?)?.as_mut()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SLOT: u32 = 1;

    /// A page of the slot that is logged.
    fn written(page: u64) -> Written {
        Written { slot: SLOT, page }
    }

    fn ring(waiting: &[u64]) -> Ring {
        Ring {
            mapping: VcpuMapping::anonymous(bytes(256)),
            entries: 256,
            next: 0,
            waiting: waiting.iter().copied().map(written).collect(),
        }
    }

    /// Rings with these pages waiting, and the pages that are in doubt after `resets`: entries
    /// done, and whether that was disturbed.
    fn doubted(rings: &[&[u64]], resets: &[(u64, bool)]) -> Vec<u64> {
        let mut state = State {
            rings: rings.iter().copied().map(ring).collect(),
            logs: Vec::new(),
        };
        let log = Log {
            pages: 5000,
            words: vec![0; ioctls::words_of(5000)],
            doubted: BTreeSet::new(),
        };
        state.put_log(SLOT, Some(log));
        for (done, disturbed) in resets.iter().copied() {
            state.account(&RingReset { done, disturbed });
        }
        assert_eq!(state.waiting(), 0);
        let log = state.log_mut(SLOT).unwrap();
        for _ in 0..3 {
            let mut words = vec![0; log.words.len()];
            log.take(&mut words);
            let told: BTreeSet<_> = (0..5000)
                .filter(|page: &u64| {
                    let word = words[usize::try_from(page / 64).unwrap()];
                    word >> (page % 64) & 1 != 0
                })
                .collect();
            assert_eq!(told, log.doubted, "told again and again");
        }
        log.doubted.iter().copied().collect()
    }

    #[test]
    fn a_complete_reset_leaves_no_doubt() {
        let doubted = doubted(&[&[1, 2, 3], &[], &[900]], &[(4, false)]);
        assert!(doubted.is_empty(), "{doubted:?}");
    }

    #[test]
    fn the_last_batch_of_a_disturbed_reset_is_in_doubt() {
        let pages: &[u64] = &[900, 1, 2, 64, 63];
        assert_eq!(doubted(&[pages], &[(5, true)]), [1, 2, 63, 64]);
        // It stopped after the first two, and after nothing.
        let resets = [(0, false), (2, false), (0, true), (3, false)];
        assert_eq!(doubted(&[pages], &resets), [1]);
        // In the second ring; at the first one's end.
        assert_eq!(doubted(&[pages, &[3, 300]], &[(6, false), (1, false)]), [3]);
        let resets = [(5, false), (2, false)];
        assert_eq!(doubted(&[pages, &[3, 300]], &resets), [1, 2, 63, 64]);
        // A page beyond the slot's end, as of a longer slot before it.
        assert_eq!(doubted(&[&[5001, 4999]], &[(2, true)]), [4999]);
    }

    #[test]
    fn another_slot_ends_a_batch() {
        let other = Written { slot: 7, page: 5 };
        let taken = [written(6), other, written(5), written(4)];
        assert_eq!(last_batch(taken.into_iter()), [written(4), written(5)]);
        assert_eq!(last_batch([].into_iter()), []);
    }
}
