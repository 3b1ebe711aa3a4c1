//! What the migration loop pays per round for finding the dirty pages of a guest: a round's whole
//! way from a device's report, of the guest's base and of another, to runs taken for sending.
//!
//! A guest of 64 GiB at 4 KiB pages; clean, with 1 % or 10 % of the pages dirty at random, or all of
//! them. What the bitmap alone costs is measured by `cargo bench -p iova-bitmap`.

use std::time::Duration;

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use vm_migration::dirty::{Collect, GuestDirty};
use vm_migration::memory::RamRegion;
use vm_migration::{DirtyError, DirtySource, Gpa, Iova, IovaBitmap, IovaRange, PageSize, Reported};

#[path = "common/random.rs"]
mod random;
#[path = "common/source.rs"]
mod source;

use random::{SEED, random};
use source::Simulated;

const GIB: u64 = 1 << 30;
const PAGE: u64 = 4096;
const BYTES: u64 = 64 * GIB;
/// Where the guest is: above the hole for devices below 4 GiB.
const BASE: u64 = 4 * GIB;
/// A run is cut to what one message carries.
const RUN_BYTES: u64 = 1 << 20;

/// Which pages are dirty.
#[derive(Clone, Copy)]
enum Fill {
    Empty,
    /// So many of 100, at random.
    Percent(u64),
    Full,
}

const FILLS: [(&str, Fill); 4] = [
    ("empty", Fill::Empty),
    ("1%", Fill::Percent(1)),
    ("10%", Fill::Percent(10)),
    ("full", Fill::Full),
];

fn filled(fill: Fill) -> Result<IovaBitmap, vm_migration::BitmapError> {
    let mut bitmap = IovaBitmap::new(Iova(BASE), BYTES, PageSize::SIZE_4K)?;
    match fill {
        Fill::Empty => {}
        Fill::Percent(percent) => {
            let mut state = SEED;
            for page in 0..bitmap.pages() {
                if random(&mut state) % 100 < percent {
                    bitmap.set(Iova(BASE + page * PAGE), 1);
                }
            }
        }
        Fill::Full => bitmap.set_all(),
    }
    Ok(bitmap)
}

/// A device that always reports the same words, from `pages_before` the guest's start: as if its
/// window were aligned to something else.
fn device(words: Vec<u64>, pages_before: u64) -> Box<dyn DirtySource> {
    let report = move |window: IovaRange, bitmap: &mut IovaBitmap| {
        let base = Iova(window.first().0 - pages_before * PAGE);
        let named = bitmap.or_words(base, PageSize::SIZE_4K, &words);
        named.map(Reported::counted)
    };
    Box::new(Simulated::new("device", PageSize::SIZE_4K, report))
}

/// One round: a report, then every run taken and confirmed.
fn round(guest: &mut GuestDirty, sources: &mut [Box<dyn DirtySource>]) -> Result<u64, DirtyError> {
    guest.collect(sources, Collect::default())?;
    let mut bytes = 0;
    while let Some(run) = guest.next_run(RUN_BYTES, sources)? {
        bytes += run.len;
    }
    guest.acknowledge();
    Ok(bytes)
}

fn collect(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("collect 64 GiB");
    let region = RamRegion {
        gpa: Gpa(BASE),
        len: BYTES,
    };
    for (name, fill) in FILLS {
        for (alignment, pages_before) in [("aligned", 0), ("shifted", 5)] {
            let (Ok(bitmap), Ok(mut guest)) =
                (filled(fill), GuestDirty::new(&[region], PageSize::SIZE_4K))
            else {
                eprintln!("SKIP: collect {name}: no memory for the bitmaps");
                continue;
            };
            let mut sources = [device(bitmap.words().to_vec(), pages_before)];
            group.bench_function(BenchmarkId::new(alignment, name), |bencher| {
                bencher.iter(|| round(&mut guest, &mut sources));
            });
        }
    }
    group.finish();
}

/// Short: the machine that runs it for a change is a developer's, and the differences are large.
fn settings() -> Criterion {
    Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_millis(800))
}

criterion_group! {
    name = benches;
    config = settings();
    targets = collect
}
criterion_main!(benches);
