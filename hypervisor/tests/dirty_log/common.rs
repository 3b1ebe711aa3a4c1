//! Guests for each method, and sets of pages.

use std::collections::BTreeSet;

use hypervisor::{
    DirtyLogChoice, DirtyLogMethod, Error, Hypervisor, KvmHypervisor, MemorySlot, Vm,
};

use crate::ring3::{Guest, PAGE, host};

/// Not a multiple of 64.
pub(crate) const PAGES: usize = 3 * 64 + 37;

/// A small ring: what is the least that some CPU (one that logs 512 writes itself) allows.
pub(crate) const SMALL_RING: DirtyLogChoice = DirtyLogChoice::Ring {
    entries: Some(1024),
};

/// Each method that this host has.
pub(crate) fn methods(host: &KvmHypervisor, test: &str) -> Vec<DirtyLogChoice> {
    let offered = &host.capabilities().dirty_log;
    let mut methods = vec![DirtyLogChoice::BitmapAutoClear];
    if offered.manual_clear {
        methods.push(DirtyLogChoice::Bitmap);
    } else {
        println!("SKIP: {test}: bitmap with manual clearing: not offered here");
    }
    if offered.ring_entries >= 1024 && !offered.ring_with_bitmap {
        methods.push(SMALL_RING);
        methods.push(DirtyLogChoice::Ring { entries: None });
    } else {
        println!("SKIP: {test}: rings: not offered here");
    }
    methods
}

/// Whether pages are cleared piece by piece.
pub(crate) fn is_manual(vm: &dyn Vm) -> bool {
    matches!(
        vm.dirty_log_method(),
        DirtyLogMethod::BitmapManualClear { .. }
    )
}

/// A guest with a bitmap that is cleared piece by piece, or `None` with a note.
pub(crate) fn manual(test: &str, pages: usize) -> Option<Guest> {
    let host = host(test)?;
    let guest = Guest::new(&host, DirtyLogChoice::Bitmap, pages).unwrap();
    match guest.vm.dirty_log_method() {
        DirtyLogMethod::BitmapManualClear { .. } => Some(guest),
        other => {
            println!("SKIP: {test}: only {other:?} here");
            None
        }
    }
}

/// A guest with rings, or `None` with a note.
pub(crate) fn ring(test: &str, choice: DirtyLogChoice, pages: usize) -> Option<Guest> {
    let host = host(test)?;
    match Guest::new(&host, choice, pages) {
        Ok(guest) => Some(guest),
        Err(error @ (Error::Unsupported { .. } | Error::DirtyRingNotEnough)) => {
            println!("SKIP: {test}: {error}");
            None
        }
        Err(error) => panic!("{error:?}"),
    }
}

pub(crate) fn read(vm: &dyn Vm, slot: MemorySlot) -> Result<BTreeSet<usize>, Error> {
    let mut words = vec![u64::MAX; vm.dirty_log_words(slot)?];
    vm.read_dirty_log(slot, &mut words)?;
    Ok(pages_of(&words))
}

pub(crate) fn pages_of(words: &[u64]) -> BTreeSet<usize> {
    (0..words.len() * 64)
        .filter(|page| words[page / 64] >> (page % 64) & 1 != 0)
        .collect()
}

pub(crate) fn words_of(pages: &BTreeSet<usize>, count: usize) -> Vec<u64> {
    let mut words = vec![0; count.div_ceil(64)];
    for page in pages {
        words[page / 64] |= 1 << (page % 64);
    }
    words
}

impl Guest {
    /// Starts logging, with everything clean.
    pub(crate) fn log(&self) {
        self.vm.set_dirty_logging(self.slot, true).unwrap();
        if is_manual(&*self.vm) {
            self.clear(0, &vec![u64::MAX; self.data.size() / PAGE / 64 + 1]);
        }
    }

    pub(crate) fn clear(&self, first: u64, words: &[u64]) {
        self.vm.clear_dirty_log(self.slot, first, words).unwrap();
    }

    /// What was written since the last look, all clear then.
    pub(crate) fn dirty(&self) -> BTreeSet<usize> {
        let dirty = read(&*self.vm, self.slot).unwrap();
        if is_manual(&*self.vm) {
            self.clear(0, &words_of(&dirty, self.data.size() / PAGE));
        }
        dirty
    }
}
