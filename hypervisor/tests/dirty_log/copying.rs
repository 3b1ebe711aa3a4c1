//! Memory copied by the log while the guest writes it is what the guest wrote.

use std::collections::BTreeSet;
use std::process::{Child, Command};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use hypervisor::{DirtyLogChoice, KvmHypervisor, MemorySlot, Vcpu, VcpuExit, VcpuKicker, Vm};
use vm_memory::mmap::MmapRegion;

use crate::common::{SMALL_RING, is_manual, methods, read, words_of};
use crate::ring3::{Guest, PAGE, host};

/// Pages of a guest, so few that it soon writes them without a fault, again and again.
const FEW_PAGES: usize = 300 + 5;
/// Pages of a guest that fill small rings.
const MANY_PAGES: usize = 2000 + 5;

/// Migrations in small, one after the other: each copies pages while the guest writes them, in
/// rounds, then the rest. Gives how many pages differed, and how often a full ring was emptied.
fn migrate(host: &KvmHypervisor, choice: DirtyLogChoice, pages: usize) -> (usize, u64) {
    let mut guest = Guest::new(host, choice, pages).unwrap();
    guest.aim(0, pages, 1);
    let (mut differ, mut rounds, mut passes) = (0, 0, 0);
    for number in 0..50 {
        let stop = AtomicBool::new(false);
        let kicker = guest.vcpu.kicker();
        let mut copier = Copier::new(&*guest.vm, guest.slot, &guest.data);
        thread::scope(|scope| {
            let runner = scope.spawn(|| run_until(&stop, guest.vcpu.as_mut()));
            // Less than a pass, and many passes.
            rounds += copier.rounds(Duration::from_millis(number * 13 % 60 + 2), &kicker);
            // What slips by now is not seen again.
            copier.send(true);
            stop.store(true, Ordering::SeqCst);
            kicker.kick().unwrap();
            passes += runner.join().unwrap();
        });
        copier.send(false);
        let data = &guest.data;
        let lost = (0..pages).filter(|page| copier.copied[*page] != word(data, *page));
        differ += lost.count();
    }
    let exits = guest.vm.dirty_ring_full_exits();
    println!("{choice:?}: {rounds} rounds, {passes} passes, {exits} full rings");
    assert!(
        rounds > 100 && passes > 2,
        "{rounds} rounds, {passes} passes"
    );
    (differ, exits)
}

/// Runs the guest; gives how many passes it completed.
fn run_until(stop: &AtomicBool, vcpu: &mut dyn Vcpu) -> u32 {
    let _attached = vcpu.kicker().attach().unwrap();
    let mut passes = 0;
    loop {
        match vcpu.run().unwrap() {
            VcpuExit::MmioWrite { .. } => passes += 1,
            VcpuExit::Interrupted if stop.load(Ordering::SeqCst) => return passes,
            VcpuExit::Interrupted => {}
            other => panic!("unexpected exit {other:?}"),
        }
    }
}

/// What a migration has copied.
struct Copier<'a> {
    vm: &'a dyn Vm,
    slot: MemorySlot,
    data: &'a MmapRegion<()>,
    copied: Vec<u64>,
}

impl<'a> Copier<'a> {
    /// Starts logging, and copies everything.
    fn new(vm: &'a dyn Vm, slot: MemorySlot, data: &'a MmapRegion<()>) -> Self {
        vm.set_dirty_logging(slot, true).unwrap();
        let mut this = Self {
            vm,
            slot,
            data,
            copied: vec![0; data.size() / PAGE],
        };
        this.copy(&(0..this.copied.len()).collect(), true);
        this
    }

    /// Copies what is dirty again and again for some time; says how often.
    fn rounds(&mut self, time: Duration, kicker: &VcpuKicker) -> u64 {
        let began = Instant::now();
        let mut rounds = 0;
        while began.elapsed() < time {
            self.send(true);
            thread::sleep(Duration::from_millis(rounds % 8 * 5));
            rounds += 1;
            // A signal may come while its thread empties the rings.
            kicker.kick().unwrap();
        }
        rounds
    }

    /// Copies what is dirty.
    fn send(&mut self, running: bool) {
        self.copy(&read(self.vm, self.slot).unwrap(), running);
    }

    /// Copies `dirty`, piece by piece, each of which is cleared just before if that is the method
    /// and the guest runs.
    fn copy(&mut self, dirty: &BTreeSet<usize>, running: bool) {
        let pages = self.copied.len();
        for first in (0..pages).step_by(640) {
            let end = (first + 640).min(pages);
            let piece: BTreeSet<_> = dirty.range(first..end).copied().collect();
            if is_manual(self.vm) && running {
                let words = words_of(&piece, end);
                let first_page = u64::try_from(first).unwrap();
                let cleared = self
                    .vm
                    .clear_dirty_log(self.slot, first_page, &words[first / 64..]);
                cleared.unwrap();
            }
            for page in piece {
                self.copied[page] = word(self.data, page);
            }
        }
    }
}

/// The one word that the guest writes in a page.
fn word(data: &MmapRegion<()>, page: usize) -> u64 {
    assert!(page < data.size() / PAGE);
    // SAFETY: the page is in the region, whose memory the guest may change at any time.
    unsafe { data.as_ptr().add(page * PAGE).cast::<u64>().read_volatile() }
}

#[test]
fn what_is_copied_by_the_log_is_what_was_written() {
    let test = "what_is_copied_by_the_log_is_what_was_written";
    let Some(host) = host(test) else {
        return;
    };
    for choice in methods(&host, test) {
        let (differ, _) = migrate(&host, choice, FEW_PAGES);
        assert_eq!(differ, 0, "{choice:?}: pages differ");
    }
    if methods(&host, test).contains(&SMALL_RING) {
        let (differ, exits) = migrate(&host, SMALL_RING, MANY_PAGES);
        assert_eq!(differ, 0, "full rings: pages differ");
        assert!(exits > 2, "{exits} full rings");
    }
}

/// A process that stops and continues this one all the time.
struct Stopper(Child);

impl Stopper {
    fn start() -> Self {
        let this = std::process::id();
        let forever = format!("while kill -STOP {this}; do kill -CONT {this}; sleep 0.001; done");
        Self(Command::new("sh").args(["-c", &forever]).spawn().unwrap())
    }
}

impl Drop for Stopper {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
        // It may have been killed in between the two.
        let this = std::process::id().to_string();
        Command::new("sh")
            .args(["-c", "kill -CONT $0", &this])
            .status()
            .unwrap();
    }
}

/// A stop cuts KVM's reset of rings short, which forgets pages.
#[test]
fn a_stop_at_any_time_loses_nothing() {
    let test = "a_stop_at_any_time_loses_nothing";
    let Some(host) = host(test) else {
        return;
    };
    if !methods(&host, test).contains(&SMALL_RING) {
        return;
    }
    let _stopper = Stopper::start();
    let (differ, exits) = migrate(&host, SMALL_RING, MANY_PAGES);
    assert_eq!(differ, 0, "pages differ");
    assert!(exits > 2, "{exits} full rings");
}
