//! The IOVA bitmap against the naive model of its property tests: any geometry, any sequence of
//! operations between two bitmaps, up to the last byte of the 64-bit space.

#![no_main]

use arbitrary::Arbitrary;
use iova_bitmap::{Iova, IovaBitmap, IovaRange, PageSize};
use libfuzzer_sys::fuzz_target;

#[path = "../../migration/iova-bitmap/src/naive.rs"]
mod naive;

use naive::Naive;

/// Operations per input: more find nothing that fewer do not, slower.
const MAX_STEPS: usize = 24;

/// Where a bitmap is. Any values make one: they are cut to fit.
#[derive(Arbitrary, Clone, Copy, Debug)]
struct Geometry {
    near: u64,
    shift: u8,
    pages: u8,
    /// Bytes missing from the last page.
    cut: u64,
}

impl Geometry {
    fn page(self) -> PageSize {
        PageSize::new(1 << (self.shift % 64)).expect("a power of two")
    }

    fn base(self) -> u64 {
        self.near & !(self.page().bytes() - 1)
    }
}

/// An address, mostly close to a bitmap.
#[derive(Arbitrary, Clone, Copy, Debug)]
enum Address {
    Any(u64),
    /// So many quarter pages from the first bitmap's base.
    Near(i16),
}

#[derive(Arbitrary, Debug)]
enum Step {
    Set(Address, u64),
    SetPages(Address, u8),
    ClearPages(Address, u8),
    /// A base, the shift of its page size, and up to four words.
    OrWords(Address, u8, Vec<u64>),
    NextRun(Address, u16),
    /// Takes so many runs out.
    Drain(u8),
    /// Stands for as many pages from another address on.
    Retarget(Address, u8),
    /// Goes on with the same addresses by pages so many times larger or smaller (a power of two).
    Resample(i8),
    Merge,
    TakeInto,
    /// Goes on with the other bitmap.
    Swap,
    Clear,
    /// Sets bits beyond the last page, as a kernel report may.
    Scribble,
}

struct Pair {
    real: IovaBitmap,
    naive: Naive,
}

impl Pair {
    fn new(geometry: Geometry) -> Option<Self> {
        let page = geometry.page();
        let base = geometry.base();
        let more = u64::from(geometry.pages).saturating_mul(page.bytes());
        let end = base.saturating_add(more) | (page.bytes() - 1);
        let last = (end - geometry.cut % page.bytes()).max(base);
        let range = IovaRange::from_ends(Iova(base), Iova(last))?;
        Some(Self {
            real: IovaBitmap::over(range, page).ok()?,
            naive: Naive::new(base, last, page.bytes()),
        })
    }

    fn resolve(&self, address: Address) -> u64 {
        match address {
            Address::Any(address) => address,
            Address::Near(quarters) => {
                let quarter = (self.real.page_size().bytes() / 4).max(1);
                let off = u64::from(quarters.unsigned_abs()).saturating_mul(quarter);
                let base = self.real.range().first().0;
                if quarters < 0 {
                    base.saturating_sub(off)
                } else {
                    base.saturating_add(off)
                }
            }
        }
    }

    fn set(&mut self, iova: u64, len: u64) {
        self.real.set(Iova(iova), len);
        if len > 0 {
            self.naive
                .set_through(iova.into(), u128::from(iova) + u128::from(len) - 1);
        }
    }

    fn or_words(&mut self, base: u64, shift: u8, words: &[u64]) {
        let words = &words[..words.len().min(4)];
        let page = PageSize::new(1 << (shift % 64)).expect("a power of two");
        match self.real.or_words(Iova(base), page, words) {
            Ok(named) => {
                let mut alone = self.naive.clone();
                alone.set.clear();
                alone.or_words(base.into(), page.bytes().into(), words);
                assert_eq!(named, alone.set.len() as u64);
                self.naive.set.append(&mut alone.set);
            }
            Err(_) => assert!(
                !base.is_multiple_of(page.bytes()),
                "refused without a reason"
            ),
        }
    }

    /// The run found must be the first of the model's at or after the address's page.
    fn next_run(&self, from: u64, max_pages: u16) {
        let page = u128::from(self.real.page_size().bytes());
        let max_bytes = u64::from(max_pages).saturating_mul(self.real.page_size().bytes());
        let found = self.real.next_run(Iova(from), max_bytes).map(wide);
        let from = u128::from(from);
        let expected = self
            .naive
            .runs()
            .into_iter()
            .find(|run| run.1 >= from)
            .map(|run| {
                let from = from.max(self.naive.base);
                let first = run.0.max(from - (from - self.naive.base) % page);
                let most = u128::from(max_bytes) / page * page;
                (first, run.1.min(first + most.max(page) - 1))
            });
        assert_eq!(found, expected.filter(|_| from <= self.naive.last));
    }

    fn check(&self) {
        assert_eq!(self.real.count(), self.naive.set.len() as u64);
        assert_eq!(self.real.is_empty(), self.naive.set.is_empty());
        assert_eq!(
            self.real.runs().map(wide).collect::<Vec<_>>(),
            self.naive.runs()
        );
        for page in self.naive.pages() {
            let iova = u64::try_from(self.naive.bounds(page).1).expect("within 2^64");
            assert_eq!(
                self.real.contains(Iova(iova)),
                self.naive.set.contains(&page)
            );
        }
    }
}

fn wide(run: IovaRange) -> (u128, u128) {
    (run.first().0.into(), run.last().0.into())
}

fn apply(step: &Step, one: &mut Pair, other: &mut Pair) {
    match step {
        Step::Set(address, len) => one.set(one.resolve(*address), *len),
        Step::SetPages(address, pages) => {
            let len = u64::from(*pages).saturating_mul(one.real.page_size().bytes());
            one.set(one.resolve(*address), len);
        }
        Step::ClearPages(address, pages) => {
            let len = u64::from(*pages).saturating_mul(one.real.page_size().bytes());
            if let Some(range) = IovaRange::new(Iova(one.resolve(*address)), len) {
                one.real.clear_range(range);
                one.naive
                    .clear_within(range.first().0.into(), range.last().0.into());
            }
        }
        Step::OrWords(address, shift, words) => {
            one.or_words(one.resolve(*address), *shift, words);
        }
        Step::NextRun(address, pages) => one.next_run(one.resolve(*address), *pages),
        Step::Drain(runs) => {
            let expected = one.naive.runs();
            let runs = usize::from(*runs).min(expected.len());
            let got: Vec<_> = one.real.drain().take(runs).map(wide).collect();
            assert_eq!(got, expected[..runs]);
            for (first, last) in got {
                one.naive.clear_within(first, last);
            }
        }
        Step::Retarget(address, pages) => {
            let page = one.real.page_size();
            let base = one.resolve(*address) & !(page.bytes() - 1);
            let more = u64::from(*pages).saturating_mul(page.bytes());
            let last = base.saturating_add(more) | (page.bytes() - 1);
            let range = IovaRange::from_ends(Iova(base), Iova(last)).expect("in order");
            if one.real.retarget(range).is_ok() {
                one.naive = Naive::new(base, last, page.bytes());
            }
        }
        Step::Resample(step) => {
            let shift = one.real.page_size().shift();
            let other = shift.saturating_add_signed((step % 4).into()).min(63);
            let page = PageSize::new(1 << other).expect("a power of two");
            let (base, last) = (one.naive.base, one.naive.last);
            // The model tries page by page.
            if one.real.pages() << shift.saturating_sub(other) > 2048 {
                return;
            }
            one.real = one.real.resample(page).expect("few pages");
            let mut naive = Naive::new(0, 0, page.bytes());
            (naive.base, naive.last) = (base - base % u128::from(page.bytes()), last);
            naive.merge(&one.naive);
            one.naive = naive;
        }
        Step::Merge => {
            one.real.merge(&other.real);
            one.naive.merge(&other.naive);
        }
        Step::TakeInto => {
            one.real.take_into(&mut other.real);
            other.naive.merge(&one.naive);
            one.naive.clear_within(other.naive.base, other.naive.last);
        }
        Step::Swap => std::mem::swap(one, other),
        Step::Clear => {
            one.real.clear();
            one.naive.set.clear();
        }
        Step::Scribble => {
            let pages = one.real.pages();
            let beyond = if pages.is_multiple_of(64) {
                0
            } else {
                u64::MAX << (pages % 64)
            };
            if let Some(word) = one.real.words_mut().last_mut() {
                *word |= beyond;
            }
        }
    }
}

fuzz_target!(|input: (Geometry, Geometry, Vec<Step>)| {
    let (first, mut second, steps) = input;
    // Two bitmaps far apart have nothing to do with each other: most of the time bring the second
    // to the first.
    if !second.near.is_multiple_of(16) {
        second.near = first
            .near
            .wrapping_add(second.near % 512 << (first.shift % 64));
        second.shift = first.shift.wrapping_add(second.shift % 7);
    }
    let (Some(mut one), Some(mut other)) = (Pair::new(first), Pair::new(second)) else {
        return;
    };
    for step in steps.iter().take(MAX_STEPS) {
        apply(step, &mut one, &mut other);
        one.check();
        other.check();
    }
});
