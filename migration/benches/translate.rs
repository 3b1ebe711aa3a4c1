//! What the way from a device's addresses to guest pages costs, per report of a guest of 64 GiB at
//! 4 KiB pages: without it, with the identity map, and with maps of 1 and of 1000 ranges.
//!
//! A report of the log is a merge of ready words, so the difference is the translation: reading into
//! a bitmap of IOVAs, finding where each range leads, and moving the pages into the guest's bitmap.

use std::time::Duration;

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use vm_migration::dirty::{Collect, GuestDirty};
use vm_migration::translate::MapError;
use vm_migration::{
    AfterUnmap, BitmapError, DirtyError, DirtySource, Gpa, Iova, IovaBitmap, IovaLog, IovaMap,
    IovaRange, Mapping, PageSize, Precision, RamRegion, Reported, Translated,
};

#[path = "common/random.rs"]
mod random;
#[path = "common/source.rs"]
mod source;

use random::{SEED, random};
use source::Simulated;

const PAGE: u64 = 4096;
/// Of the guest: 1000 ranges of 64 MiB and a bit, and about 64 GiB.
const RANGES: u64 = 1000;
const RANGE_BYTES: u64 = (64 << 20) + 16 * PAGE;
const BYTES: u64 = RANGES * RANGE_BYTES;
/// Where the guest is: above the hole for devices below 4 GiB.
const BASE: u64 = 4 << 30;

/// A device that always reports the same pages, the n-th of its memory as bit n.
#[derive(Clone)]
struct Device {
    /// Where its memory is, in pieces of `piece` bytes every `stride`.
    base: u64,
    piece: u64,
    stride: u64,
    pages: std::sync::Arc<IovaBitmap>,
}

impl Device {
    fn new(fill: u64, piece: u64, stride: u64) -> Result<Self, BitmapError> {
        let mut pages = IovaBitmap::new(Iova(0), BYTES, PageSize::SIZE_4K)?;
        let mut state = SEED;
        for page in 0..pages.pages() {
            if random(&mut state) % 100 < fill {
                pages.set(Iova(page * PAGE), 1);
            }
        }
        Ok(Self {
            base: BASE,
            piece,
            stride,
            pages: std::sync::Arc::new(pages),
        })
    }

    fn tell(&self, window: IovaRange, bitmap: &mut IovaBitmap) -> Result<Reported, BitmapError> {
        let from = window.first().0 - self.base;
        let page = (from / self.stride * self.piece + from % self.stride) / PAGE;
        let count = (window.last().0 - window.first().0) / PAGE + 1;
        // The words start at or before the window; what is outside of it the bitmap leaves out.
        let ahead = page % 64;
        let word = |page: u64| usize::try_from(page / 64).unwrap_or(usize::MAX);
        let words = self.pages.words().get(word(page)..).unwrap_or_default();
        let words = words.get(..word(ahead + count + 63)).unwrap_or(words);
        let base = Iova(window.first().0 - ahead * PAGE);
        let named = bitmap.or_words(base, PageSize::SIZE_4K, words);
        named.map(Reported::counted)
    }
}

/// With the map in front of it.
impl IovaLog for Device {
    fn id(&self) -> &str {
        "device"
    }

    fn granularity(&self) -> PageSize {
        PageSize::SIZE_4K
    }

    fn precision(&self) -> Precision {
        Precision::Exact
    }

    fn after_unmap(&self) -> AfterUnmap {
        AfterUnmap::Kept
    }

    fn start(&mut self, _ranges: &[IovaRange]) -> Result<(), DirtyError> {
        Ok(())
    }

    fn report(
        &mut self,
        window: IovaRange,
        bitmap: &mut IovaBitmap,
    ) -> Result<Reported, DirtyError> {
        self.tell(window, bitmap)
            .map_err(|cause| DirtyError::backend("device", "report", cause))
    }

    fn stop(&mut self) -> Result<(), DirtyError> {
        Ok(())
    }
}

/// 1000 ranges in another order than in guest memory, every `stride` bytes.
fn scattered(stride: u64) -> Result<IovaMap, MapError> {
    let mappings: Result<Vec<Mapping>, MapError> = (0..RANGES)
        .map(|range| {
            let gpa = BASE + (range * 381 % RANGES) * RANGE_BYTES;
            Mapping::new(Iova(BASE + range * stride), Gpa(gpa), RANGE_BYTES)
        })
        .collect();
    IovaMap::ranges(&mappings?)
}

/// A way to the guest's pages, by its name.
type Way = (&'static str, Box<dyn DirtySource>);

/// All of them.
fn ways(fill: u64) -> Result<Vec<Way>, Box<dyn std::error::Error>> {
    let whole = Device::new(fill, BYTES, BYTES)?;
    let one = IovaMap::ranges(&[Mapping::new(Iova(BASE), Gpa(BASE), BYTES)?])?;
    let apart = Device {
        piece: RANGE_BYTES,
        stride: 2 * RANGE_BYTES,
        ..whole.clone()
    };
    let (mapped, _) = Translated::mapped(whole.clone(), one);
    let (together, _) = Translated::mapped(whole.clone(), scattered(RANGE_BYTES)?);
    let (scattered, _) = Translated::mapped(apart, scattered(2 * RANGE_BYTES)?);
    let direct = whole.clone();
    let direct = Simulated::new("device", PageSize::SIZE_4K, move |window, bitmap| {
        direct.tell(window, bitmap)
    });
    Ok(vec![
        ("direct", Box::new(direct)),
        ("identity", Box::new(Translated::identity(whole))),
        ("1 range", Box::new(mapped)),
        ("1000 ranges", Box::new(together)),
        ("1000 ranges apart", Box::new(scattered)),
    ])
}

fn report(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("translate 64 GiB");
    let region = RamRegion {
        gpa: Gpa(BASE),
        len: BYTES,
    };
    for (name, fill) in [("empty", 0), ("1%", 1), ("10%", 10), ("full", 100)] {
        let ways = match ways(fill) {
            Ok(ways) => ways,
            Err(error) => {
                eprintln!("SKIP: translate {name}: {error}");
                continue;
            }
        };
        for (way, mut source) in ways {
            let Ok(mut guest) = GuestDirty::new(&[region], PageSize::SIZE_4K) else {
                eprintln!("SKIP: translate {way}: no memory for the bitmaps");
                continue;
            };
            if let Err(error) = source.start(guest.ranges()) {
                eprintln!("SKIP: translate {way}: {error}");
                continue;
            }
            let mut sources = [source];
            group.bench_function(BenchmarkId::new(way, name), |bencher| {
                bencher.iter(|| guest.collect(&mut sources, Collect::default()));
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
    targets = report
}
criterion_main!(benches);
