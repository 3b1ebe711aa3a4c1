//! Who writes guest memory.

use std::cell::RefCell;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use shuttle::thread::{self, JoinHandle};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};
use vm_migration::mark_written;

use super::faults::Fault;
use super::guest::{DEVICE, Guest, HOT, PAGE, VCPU, WINDOWS, WRITERS, below, gpa, one_in, place};

/// The most that a writer writes.
const WRITES: u64 = 60;
/// The longest pauses between two writes, in points of the schedule; a writer has one of them. With
/// short ones much is written at once, with long ones a page may stay as it is for a round or more,
/// which is when a loss shows.
const PAUSES: [u64; 3] = [4, 30, 200];

shuttle::thread_local! {
    /// The guest and the number of the writer whose thread this is.
    static WRITER: RefCell<Option<(Arc<Guest>, usize)>> = RefCell::new(None);
}

/// A read-modify-write of this thread: what it stored before is visible.
pub(crate) fn fence() {
    WRITER.with(|writer| {
        if let Some((guest, writer)) = &*writer.borrow() {
            guest.drain(*writer);
        }
    });
}

/// Starts all writers, and whoever lets stores through.
pub(crate) fn start(guest: &Arc<Guest>) -> Vec<JoinHandle<()>> {
    guest.stop.store(false, Ordering::Relaxed);
    let writers = (0..WRITERS).map(|writer| {
        let guest = Arc::clone(guest);
        thread::spawn(move || {
            WRITER.with(|this| *this.borrow_mut() = Some((Arc::clone(&guest), writer)));
            run(&guest, writer);
            // To end is to synchronise with whoever waits for the end.
            guest.drain(writer);
        })
    });
    let mut threads: Vec<_> = writers.collect();
    let guest = Arc::clone(guest);
    threads.push(thread::spawn(move || {
        for _ in 0..below(WRITES) {
            for _ in 0..below(PAUSES[1]) {
                guest.point();
            }
            guest.let_through(usize::try_from(below(4)).unwrap());
        }
    }));
    threads
}

/// Tells all writers to stop, and waits until they have.
pub(crate) fn stop(guest: &Guest, threads: Vec<JoinHandle<()>>) {
    guest.stop.store(true, Ordering::Relaxed);
    for thread in threads {
        thread.join().unwrap();
    }
}

fn run(guest: &Guest, writer: usize) {
    let pause = PAUSES[usize::try_from(below(3)).unwrap()];
    for _ in 0..below(WRITES) {
        for _ in 0..below(pause) {
            guest.point();
        }
        if guest.stop.load(Ordering::Relaxed) {
            return;
        }
        let page = HOT[usize::try_from(below(6)).unwrap()];
        match writer {
            VCPU => by_vcpu(guest, page),
            DEVICE => by_device(guest, page),
            _ if one_in(2) => through_vm_memory(guest, writer, page),
            _ => beside_vm_memory(guest, writer, page),
        }
    }
}

/// A store that finds its page protected stops the vCPU; KVM notes the page, lets it be written and
/// the vCPU tries again.
fn by_vcpu(guest: &Guest, page: usize) {
    let (window, bit) = place(page);
    loop {
        guest.point();
        let mut log = guest.vcpu.lock().unwrap();
        if !log.logging || log.writable[window] & bit != 0 {
            guest.store(VCPU, page);
            return;
        }
        let mut ledger = guest.ledger.lock().unwrap();
        ledger.mark_begins(&[page]);
        log.dirty[window] |= bit;
        log.writable[window] |= bit;
        ledger.mark_ends(&[page]);
    }
}

/// A device writes, then notes the page or its group of pages.
fn by_device(guest: &Guest, page: usize) {
    let (window, _) = place(page);
    let (first, pages) = WINDOWS[window];
    let group = (page - first) / guest.granule * guest.granule;
    let touched: Vec<_> = (first + group..first + pages).take(guest.granule).collect();
    let mask = touched.iter().fold(0, |mask, page| mask | place(*page).1);

    guest.buffer(DEVICE, page);
    guest.ledger.lock().unwrap().mark_begins(&touched);
    let log = &guest.device[window];
    if !guest.is(Fault::SkipSetBit) || log.load(Ordering::SeqCst) & mask != mask {
        fence();
        log.fetch_or(mask, Ordering::SeqCst);
    }
    guest.ledger.lock().unwrap().mark_ends(&touched);
}

fn through_vm_memory(guest: &Guest, writer: usize, page: usize) {
    let value = guest.fresh();
    guest.ledger.lock().unwrap().mark_begins(&[page]);
    let memory = guest.memory.memory();
    let at = Guest::address(writer, page);
    memory.store(value, at, Ordering::Relaxed).unwrap();
    guest.ledger.lock().unwrap().mark_ends(&[page]);
}

/// As a `readv` into guest buffers; it may go over the end of a page.
fn beside_vm_memory(guest: &Guest, writer: usize, page: usize) {
    let mut pages = vec![page];
    if HOT.contains(&(page + 1)) && gpa(page + 1) == gpa(page) + PAGE && one_in(2) {
        pages.push(page + 1);
    }
    let write = || pages.iter().for_each(|page| guest.buffer(writer, *page));
    let len = usize::try_from(PAGE).unwrap() * pages.len();

    let marks_first = guest.is(Fault::MarkBeforeWrite);
    if !marks_first {
        write();
    }
    guest.ledger.lock().unwrap().mark_begins(&pages);
    mark_written(&guest.memory.memory(), GuestAddress(gpa(page)), len);
    guest.ledger.lock().unwrap().mark_ends(&pages);
    if marks_first {
        write();
    }
}
