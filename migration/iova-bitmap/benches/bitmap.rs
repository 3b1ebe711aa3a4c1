//! What finding and merging dirty pages costs, beside what it could cost at best and what the
//! obvious ways cost.
//!
//! 64 GiB at 4 KiB pages (2 MiB of bits): clean, 1 % or 10 % dirty at random, clustered, all dirty.
//! In each group, one run, the same bits:
//!
//! - `scan`: `runs` (ours), `read once` (the bits read by the widest loads and nothing else: the
//!   least any scan can cost), `bit by bit` (the loop one would write first);
//! - `set`, `merge`, `drain`: ours, and `vm-memory`'s `AtomicBitmap` used in the usual way (each
//!   page marked; `get_and_reset`, then words walked bit by bit), whose pages are the same.
//!
//! The ratios are in SPECIFICATION.md.

use std::hint::black_box;
use std::num::NonZeroUsize;
use std::time::Duration;

use criterion::{BatchSize, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use iova_bitmap::{Iova, IovaBitmap, PageSize};
use vm_memory::bitmap::{AtomicBitmap, Bitmap};

const GIB: u64 = 1 << 30;
const PAGE: u64 = 4096;
const BYTES: u64 = 64 * GIB;

/// Which pages are dirty.
#[derive(Clone, Copy)]
enum Fill {
    Empty,
    /// So many of 100, at random.
    Percent(u64),
    /// 1 %, in stretches of 512 pages.
    Clustered,
    Full,
}

const FILLS: [(&str, Fill); 5] = [
    ("empty", Fill::Empty),
    ("1%", Fill::Percent(1)),
    ("10%", Fill::Percent(10)),
    ("clustered", Fill::Clustered),
    ("full", Fill::Full),
];

/// A step of xorshift64: the same dirty pages on every run.
fn random(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

fn dirty_pages(fill: Fill) -> Vec<u64> {
    let mut state = 0x9e37_79b9_7f4a_7c15;
    let mut chance = |percent: u64| random(&mut state) % 100 < percent;
    let pages = BYTES / PAGE;
    match fill {
        Fill::Empty => Vec::new(),
        Fill::Percent(percent) => (0..pages).filter(|_| chance(percent)).collect(),
        Fill::Clustered => {
            let clusters = (0..pages).step_by(512).filter(|_| chance(1));
            clusters.flat_map(|first| first..first + 512).collect()
        }
        Fill::Full => (0..pages).collect(),
    }
}

fn clean() -> Option<IovaBitmap> {
    IovaBitmap::new(Iova(0), BYTES, PageSize::SIZE_4K)
        .map_err(|error| eprintln!("SKIP: bitmap: {error}"))
        .ok()
}

fn filled(pages: &[u64]) -> Option<IovaBitmap> {
    let mut bitmap = clean()?;
    for page in pages {
        bitmap.set(Iova(page * PAGE), 1);
    }
    Some(bitmap)
}

fn atomic(pages: &[u64]) -> Option<AtomicBitmap> {
    let page = NonZeroUsize::new(4096)?;
    let bitmap = AtomicBitmap::new(usize::try_from(BYTES).ok()?, page);
    for page in pages {
        bitmap.mark_dirty(usize::try_from(page * PAGE).ok()?, 1);
    }
    Some(bitmap)
}

fn mark(bitmap: &AtomicBitmap, address: u64) {
    if let Ok(address) = usize::try_from(address) {
        bitmap.mark_dirty(address, 4096);
    }
}

/// Counted and added up so that no run can be left out.
type Check = (u64, u64);

fn add((runs, sum): Check, first: u64, last: u64) -> Check {
    (runs + 1, sum ^ first ^ last)
}

fn scan_runs(bitmap: &IovaBitmap) -> Check {
    let runs = bitmap.runs();
    runs.fold((0, 0), |check, run| add(check, run.first().0, run.last().0))
}

fn scan_bit_by_bit(words: &[u64]) -> Check {
    let mut check = (0, 0);
    let mut start = None;
    for page in 0..words.len() as u64 * 64 {
        let dirty = words[(page / 64) as usize] >> (page % 64) & 1 != 0;
        match (dirty, start) {
            (true, None) => start = Some(page * PAGE),
            (false, Some(first)) => {
                check = add(check, first, page * PAGE - 1);
                start = None;
            }
            _ => {}
        }
    }
    match start {
        Some(first) => add(check, first, words.len() as u64 * 64 * PAGE - 1),
        None => check,
    }
}

/// Reads the words by 64 bytes at a time, where the CPU can.
fn read_once(words: &[u64]) -> u64 {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx512f")]
        fn wide(words: &[u64]) -> u64 {
            words.iter().fold(0, |all, word| all | word)
        }
        if std::arch::is_x86_feature_detected!("avx512f") {
            // SAFETY: the CPU has the feature.
            return unsafe { wide(words) };
        }
    }
    words.iter().fold(0, |all, word| all | word)
}

fn scan(criterion: &mut Criterion) {
    for (name, fill) in FILLS {
        let Some(bitmap) = filled(&dirty_pages(fill)) else {
            return;
        };
        if scan_runs(&bitmap) != scan_bit_by_bit(bitmap.words()) {
            eprintln!("WRONG: {name}: the two scans differ, their times mean nothing");
        }
        let mut group = criterion.benchmark_group(format!("scan {name}"));
        group.throughput(Throughput::Elements(BYTES / PAGE));
        group.bench_function("runs", |bencher| {
            bencher.iter(|| scan_runs(black_box(&bitmap)));
        });
        group.bench_function("read once", |bencher| {
            bencher.iter(|| read_once(black_box(bitmap.words())));
        });
        group.bench_function("bit by bit", |bencher| {
            bencher.iter(|| scan_bit_by_bit(black_box(bitmap.words())));
        });
        group.bench_function("count", |bencher| {
            bencher.iter(|| black_box(&bitmap).count());
        });
        group.finish();
    }
}

fn against_atomic_bitmap(criterion: &mut Criterion) {
    for (name, fill) in [FILLS[1], FILLS[2], FILLS[3]] {
        let pages = dirty_pages(fill);
        let (Some(mut bitmap), Some(source), Some(source_words)) =
            (clean(), filled(&pages), atomic(&pages))
        else {
            return;
        };
        let mut group = criterion.benchmark_group(format!("AtomicBitmap {name}"));
        group.throughput(Throughput::Elements(pages.len() as u64));
        // A report of pages becomes bits.
        let list: Vec<Iova> = pages.iter().map(|page| Iova(page * PAGE)).collect();
        group.bench_function(BenchmarkId::new("set", "ours"), |bencher| {
            bencher.iter(|| bitmap.set_each(&list));
        });
        group.bench_function(BenchmarkId::new("set", "ours, one by one"), |bencher| {
            bencher.iter(|| {
                for iova in &list {
                    bitmap.set(*iova, PAGE);
                }
            });
        });
        group.bench_function(BenchmarkId::new("set", "AtomicBitmap"), |bencher| {
            bencher.iter(|| {
                for iova in &list {
                    mark(&source_words, iova.0);
                }
            });
        });
        // Another's bits are ORed in.
        group.bench_function(BenchmarkId::new("merge", "ours"), |bencher| {
            bencher.iter(|| bitmap.merge(&source));
        });
        let words = source.words().to_vec();
        group.bench_function(BenchmarkId::new("merge", "AtomicBitmap"), |bencher| {
            bencher.iter(|| {
                for (index, word) in words.iter().enumerate() {
                    let mut rest = *word;
                    while rest != 0 {
                        let page = index as u64 * 64 + u64::from(rest.trailing_zeros());
                        mark(&source_words, page * PAGE);
                        rest &= rest - 1;
                    }
                }
            });
        });
        // All runs are taken out.
        group.bench_function(BenchmarkId::new("drain", "ours"), |bencher| {
            bencher.iter_batched_ref(
                || filled(&pages),
                |bitmap| {
                    let drained = bitmap.as_mut().map(IovaBitmap::drain).into_iter().flatten();
                    drained.fold((0, 0), |check, run| add(check, run.first().0, run.last().0))
                },
                BatchSize::LargeInput,
            );
        });
        group.bench_function(BenchmarkId::new("drain", "AtomicBitmap"), |bencher| {
            bencher.iter_batched_ref(
                || atomic(&pages),
                |bitmap| {
                    let words = bitmap.as_ref().map(AtomicBitmap::get_and_reset);
                    scan_bit_by_bit(&words.unwrap_or_default())
                },
                BatchSize::LargeInput,
            );
        });
        group.finish();
    }
}

/// Short: the machine that runs it for a change is a developer's, and the differences are large.
fn settings() -> Criterion {
    Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_millis(1200))
}

criterion_group! {
    name = benches;
    config = settings();
    targets = scan, against_atomic_bitmap
}
criterion_main!(benches);
