//! What each way of keeping a dirty log costs: the host to read and clear it, the guest to write
//! under it. On the real device; `SKIP` where there is none.
//!
//! Each figure is the median of some runs with the least and the greatest. There is no criterion
//! here: one run at 1 GiB takes a guest that writes all of it, which is seconds.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a benchmark that cannot be set up has nothing to measure"
)]

use std::fmt;
use std::time::{Duration, Instant};

use hypervisor::{DirtyLogChoice, DirtyLogMethod, Hypervisor, KvmHypervisor};

#[path = "../tests/dirty_log/ring3.rs"]
mod ring3;

use ring3::{Guest, PAGE, host};

const MIB: usize = 1 << 20;
/// Guest memory that is logged, in MiB.
const SIZES: [usize; 2] = [256, 1024];
/// Percent of the pages that the guest writes.
const FILLS: [usize; 3] = [0, 1, 100];
/// What is cleared in one call, in words of 64 pages: 64 MiB.
const CHUNK_WORDS: usize = 64 * MIB / PAGE / 64;
const RUNS: usize = 5;

/// The middle, the least and the greatest of some times.
struct Times(Vec<Duration>);

impl Times {
    /// Of `RUNS` runs of `run`.
    fn of(mut run: impl FnMut() -> Duration) -> Self {
        Self((0..RUNS).map(|_| run()).collect())
    }
}

impl fmt::Display for Times {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut micros: Vec<_> = self.0.iter().map(|time| time.as_secs_f64() * 1e6).collect();
        micros.sort_unstable_by(f64::total_cmp);
        let at = |index: usize| micros.get(index).copied().unwrap_or(f64::NAN);
        let last = micros.len().saturating_sub(1);
        let text = format!("{:.0} ({:.0}-{:.0})", at(last / 2), at(0), at(last));
        write!(out, "{text:>24}")
    }
}

/// How long `action` takes.
fn time(action: impl FnOnce()) -> Duration {
    let began = Instant::now();
    action();
    began.elapsed()
}

/// A guest whose log is being kept.
struct Logged {
    guest: Guest,
    words: Vec<u64>,
}

impl Logged {
    /// With all its memory there.
    fn new(host: &KvmHypervisor, choice: DirtyLogChoice, mib: usize) -> Self {
        let pages = mib * MIB / PAGE;
        let mut guest = Guest::new(host, choice, pages).unwrap();
        guest.write(0, pages, 1);
        Self {
            words: vec![0; guest.vm.dirty_log_words(guest.slot).unwrap()],
            guest,
        }
    }

    fn pages(&self) -> usize {
        self.guest.data.size() / PAGE
    }

    fn is_manual(&self) -> bool {
        matches!(
            self.guest.vm.dirty_log_method(),
            DirtyLogMethod::BitmapManualClear { .. }
        )
    }

    fn log(&self, on: bool) {
        let Guest { vm, slot, .. } = &self.guest;
        vm.set_dirty_logging(*slot, on).unwrap();
    }

    fn read(&mut self) {
        let Guest { vm, slot, .. } = &self.guest;
        vm.read_dirty_log(*slot, &mut self.words).unwrap();
    }

    /// Clears what was read, if that is for us to do.
    fn clear(&self) {
        if !self.is_manual() {
            return;
        }
        let Guest { vm, slot, .. } = &self.guest;
        for (index, words) in (0_u64..).zip(self.words.chunks(CHUNK_WORDS)) {
            let first = index * 64 * u64::try_from(CHUNK_WORDS).unwrap();
            vm.clear_dirty_log(*slot, first, words).unwrap();
        }
    }

    /// Starts with everything clean and protected.
    fn start_clean(&mut self) {
        self.log(false);
        self.log(true);
        self.read();
        self.clear();
    }

    /// Writes so many of 100 pages.
    fn write(&mut self, percent: usize) {
        let count = self.pages() * percent / 100;
        if count > 0 {
            self.guest.write(0, count, 100 / percent);
        }
    }
}

/// The host's side: to start, to read, to clear.
fn host_costs(host: &KvmHypervisor, methods: &[(&str, DirtyLogChoice)]) {
    println!(
        "\nThe host's side, in microseconds; rings: entries left after full ones were emptied"
    );
    println!(
        "{:<18} {:>5} {:>6} {:>24} {:>24} {:>24} {:>9}",
        "method", "MiB", "dirty", "start", "read", "clear, 64 MiB a call", "full"
    );
    for (name, choice) in methods {
        for mib in SIZES {
            let mut logged = Logged::new(host, *choice, mib);
            let start = Times::of(|| {
                logged.log(false);
                logged.write(100);
                time(|| logged.log(true))
            });
            for percent in FILLS {
                let (mut reads, mut clears) = (Vec::new(), Vec::new());
                logged.start_clean();
                let before = logged.guest.vm.dirty_ring_full_exits();
                for _ in 0..RUNS {
                    logged.write(percent);
                    reads.push(time(|| logged.read()));
                    let dirty: u32 = logged.words.iter().map(|word| word.count_ones()).sum();
                    assert_eq!(usize::try_from(dirty), Ok(logged.pages() * percent / 100));
                    clears.push(time(|| logged.clear()));
                }
                let full = logged.guest.vm.dirty_ring_full_exits() - before;
                let clear = match logged.is_manual() {
                    true => Times(clears).to_string(),
                    false => format!("{:>24}", "-"),
                };
                println!(
                    "{name:<18} {mib:>5} {percent:>5}% {start} {} {clear} {full:>9}",
                    Times(reads)
                );
            }
        }
    }
}

/// The guest's side: a pass over 64 MiB.
fn guest_costs(host: &KvmHypervisor, methods: &[(&str, DirtyLogChoice)]) {
    let mib = 64;
    println!("\nThe guest's side: microseconds to write one word in each page of {mib} MiB");
    println!(
        "{:<18} {:>24} {:>24} {:>24} {:>24}",
        "method", "log off", "first pass with log", "pass after read (+clear)", "pass after a pass"
    );
    for (name, choice) in methods {
        let mut logged = Logged::new(host, *choice, mib);
        let off = Times::of(|| time(|| logged.write(100)));
        let first = Times::of(|| {
            logged.log(false);
            logged.write(100);
            logged.log(true);
            time(|| logged.write(100))
        });
        let (mut cleared, mut again) = (Vec::new(), Vec::new());
        logged.start_clean();
        for _ in 0..RUNS {
            cleared.push(time(|| logged.write(100)));
            again.push(time(|| logged.write(100)));
            logged.read();
            logged.clear();
        }
        println!(
            "{name:<18} {off} {first} {} {}",
            Times(cleared),
            Times(again)
        );
    }
}

fn main() {
    let Some(host) = host("dirty_log") else {
        return;
    };
    let offered = host.capabilities().dirty_log;
    let mut methods = vec![("bitmap-auto-clear", DirtyLogChoice::BitmapAutoClear)];
    match offered.manual_clear {
        true => methods.push(("bitmap", DirtyLogChoice::Bitmap)),
        false => println!("SKIP: bitmap cleared piece by piece: not offered here"),
    }
    let most = Some(offered.ring_entries);
    match offered.ring_entries > 0 && !offered.ring_with_bitmap {
        true => {
            methods.push(("ring", DirtyLogChoice::Ring { entries: None }));
            methods.push(("ring, largest", DirtyLogChoice::Ring { entries: most }));
        }
        false => println!("SKIP: rings: not offered here"),
    }
    println!("{RUNS} runs each: median (least-greatest). Offered: {offered:?}");
    host_costs(&host, &methods);
    guest_costs(&host, &methods);
}
