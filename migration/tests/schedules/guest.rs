//! The guest's memory, and what its writers share.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use shuttle::rand::{Rng, thread_rng};
use shuttle::sync::atomic::AtomicU64 as Scheduled;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};
use vm_migration::memory::{Backing, RamMapping, map_ram};
use vm_migration::{Gpa, MemoryHandle, RamRegion};

use super::faults::Fault;
use super::ledger::Ledger;

pub(crate) const PAGE: u64 = 4096;
const LOW_PAGES: usize = 66;
const HIGH: u64 = 0x1_0000_0000;
const HIGH_PAGES: usize = 3;
/// Pages of RAM; they are numbered through both regions.
pub(crate) const PAGES: usize = LOW_PAGES + HIGH_PAGES;
/// Pages of a window, which is a word of a bitmap.
pub(crate) const WINDOW_PAGES: usize = 64;
/// First page and number of pages of each window.
pub(crate) const WINDOWS: [(usize, usize); 3] = [
    (0, WINDOW_PAGES),
    (WINDOW_PAGES, LOW_PAGES - WINDOW_PAGES),
    (LOW_PAGES, HIGH_PAGES),
];
/// Pages that are written: at both ends of windows, some next to each other.
pub(crate) const HOT: [usize; 6] = [0, 1, 63, 64, 66, 68];

/// Who writes, and the number of its word in each page. Those after the device are threads of the VMM.
pub(crate) const VCPU: usize = 0;
pub(crate) const DEVICE: usize = 1;
pub(crate) const WRITERS: usize = 4;

/// What a page holds: a word of each writer in the model's memory, then those of the VMM in real
/// memory.
pub(crate) type Content = [u64; 2 * WRITERS - DEVICE - 1];

/// A random number below `end`.
pub(crate) fn below(end: u64) -> u64 {
    thread_rng().gen_range(0..end)
}

/// True once in `times`.
pub(crate) fn one_in(times: u64) -> bool {
    below(times) == 0
}

/// The address of a page.
pub(crate) fn gpa(page: usize) -> u64 {
    let number = |page: usize| u64::try_from(page).unwrap() * PAGE;
    match page.checked_sub(LOW_PAGES) {
        None => number(page),
        Some(page) => HIGH + number(page),
    }
}

/// The page at an address.
pub(crate) fn page_at(gpa: u64) -> usize {
    let number = |offset: u64| usize::try_from(offset / PAGE).unwrap();
    match gpa.checked_sub(HIGH) {
        None => number(gpa),
        Some(offset) => LOW_PAGES + number(offset),
    }
}

/// The window of a page and its bit there.
pub(crate) fn place(page: usize) -> (usize, u64) {
    let window = WINDOWS
        .iter()
        .rposition(|(first, _)| *first <= page)
        .unwrap();
    (window, 1 << (page - WINDOWS[window].0))
}

/// Stores of one thread that are not visible yet, oldest first: page and value.
#[derive(Debug, Default)]
pub(crate) struct StoreBuffer(Mutex<VecDeque<(usize, u64)>>);

/// What is written through the log of the vCPUs.
#[derive(Debug, Default)]
pub(crate) struct Protection {
    /// Whether KVM logs.
    pub(crate) logging: bool,
    /// A word for each window: pages written and not cleared.
    pub(crate) dirty: [u64; WINDOWS.len()],
    /// A word for each window: pages the vCPU may write without being stopped.
    pub(crate) writable: [u64; WINDOWS.len()],
}

/// The guest.
pub(crate) struct Guest {
    pub(crate) fault: Option<Fault>,
    /// Real memory, for what the VMM writes through `vm-memory`, and its log.
    pub(crate) memory: MemoryHandle,
    words: Vec<[AtomicU64; WRITERS]>,
    buffers: [StoreBuffer; WRITERS],
    /// Values are taken from here, so that none comes twice.
    value: AtomicU64,
    /// Tells the writers to stop.
    pub(crate) stop: AtomicBool,
    /// Pages that the device marks at once.
    pub(crate) granule: usize,
    /// The device's log, a word for each window.
    pub(crate) device: [Scheduled; WINDOWS.len()],
    /// The vCPUs' log. The lock is never held over a point of the schedule; so with the ledger.
    pub(crate) vcpu: Mutex<Protection>,
    pub(crate) ledger: Mutex<Ledger>,
    schedule: Scheduled,
}

impl Guest {
    pub(crate) fn new(fault: Option<Fault>) -> Arc<Self> {
        let mappings = Self::regions().map(|RamRegion { gpa, len }| RamMapping {
            gpa,
            len,
            backing: Backing::Anonymous,
        });
        Arc::new(Self {
            fault,
            memory: MemoryHandle::new(map_ram(mappings.into()).unwrap()),
            words: (0..PAGES).map(|_| Default::default()).collect(),
            buffers: Default::default(),
            value: AtomicU64::new(0),
            stop: AtomicBool::new(false),
            granule: if one_in(2) { 1 } else { 4 },
            device: Default::default(),
            vcpu: Mutex::default(),
            ledger: Mutex::new(Ledger::new()),
            schedule: Scheduled::new(0),
        })
    }

    pub(crate) fn regions() -> [RamRegion; 2] {
        let region = |first, pages: usize| RamRegion {
            gpa: Gpa(gpa(first)),
            len: u64::try_from(pages).unwrap() * PAGE,
        };
        [region(0, LOW_PAGES), region(LOW_PAGES, HIGH_PAGES)]
    }

    /// Another thread may go on here.
    pub(crate) fn point(&self) {
        self.schedule.load(Ordering::SeqCst);
    }

    pub(crate) fn is(&self, fault: Fault) -> bool {
        self.fault == Some(fault)
    }

    /// A value that was never written.
    pub(crate) fn fresh(&self) -> u64 {
        self.value.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// Stores at once.
    pub(crate) fn store(&self, writer: usize, page: usize) {
        self.words[page][writer].store(self.fresh(), Ordering::Relaxed);
    }

    /// Stores into the writer's buffer.
    pub(crate) fn buffer(&self, writer: usize, page: usize) {
        let store = (page, self.fresh());
        self.buffers[writer].0.lock().unwrap().push_back(store);
    }

    /// Lets the oldest store of a writer's buffer through; false if there is none.
    pub(crate) fn let_through(&self, writer: usize) -> bool {
        let oldest = self.buffers[writer].0.lock().unwrap().pop_front();
        if let Some((page, value)) = oldest {
            self.words[page][writer].store(value, Ordering::Relaxed);
        }
        oldest.is_some()
    }

    /// Empties a writer's buffer.
    pub(crate) fn drain(&self, writer: usize) {
        while self.let_through(writer) {}
    }

    /// Where a writer's word of a page is in real memory.
    pub(crate) fn address(writer: usize, page: usize) -> GuestAddress {
        GuestAddress(gpa(page) + 8 * u64::try_from(writer).unwrap())
    }

    /// Reads a page, word by word.
    pub(crate) fn read(&self, page: usize) -> Content {
        let mut content = Content::default();
        if !HOT.contains(&page) {
            // Nobody writes it.
            return content;
        }
        for (index, word) in content.iter_mut().enumerate() {
            self.point();
            *word = match index.checked_sub(WRITERS) {
                None => self.words[page][index].load(Ordering::Relaxed),
                Some(vmm) => {
                    let memory = self.memory.memory();
                    let at = Self::address(DEVICE + 1 + vmm, page);
                    memory.load(at, Ordering::Relaxed).unwrap()
                }
            };
        }
        content
    }
}
