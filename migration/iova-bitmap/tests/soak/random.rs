//! Random operations against a naive model, many of them.
//!
//! `IOVA_BITMAP_OPERATIONS` says how many (default 200,000), `IOVA_BITMAP_SEED` where to start. For
//! 100 million: `IOVA_BITMAP_OPERATIONS=100000000 cargo test --release -p iova-bitmap --test soak`.
//!
//! The model is a flag for each page, and asks each page by itself whether an operation touches it,
//! in 128 bits; it has nothing of words and shifts. After each operation the bitmap is read back
//! page by page. Two bitmaps lie near each other, so that they overlap in all ways.

use iova_bitmap::{Iova, IovaBitmap, IovaRange, PageSize};

/// A step of xorshift64*.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, end: u64) -> u64 {
        (self.next() >> 11) % end.max(1)
    }
}

struct Pair {
    real: IovaBitmap,
    base: u128,
    last: u128,
    page: u128,
    set: Vec<bool>,
}

impl Pair {
    fn new(range: IovaRange, page: PageSize) -> Self {
        let real = IovaBitmap::over(range, page).unwrap();
        let pages = usize::try_from(real.pages()).unwrap();
        Self {
            real,
            base: range.first().0.into(),
            last: range.last().0.into(),
            page: page.bytes().into(),
            set: vec![false; pages],
        }
    }

    /// First and last address of a page, clipped at the end.
    fn bounds(&self, n: usize) -> (u128, u128) {
        let start = self.base + n as u128 * self.page;
        (start, (start + self.page - 1).min(self.last))
    }

    /// Sets the pages that the addresses touch; gives those pages.
    fn touch(&mut self, first: u128, last: u128, named: &mut [bool]) {
        for (n, named) in named.iter_mut().enumerate() {
            let (start, end) = self.bounds(n);
            if start <= last && first <= end {
                self.set[n] = true;
                *named = true;
            }
        }
    }

    fn clear_within(&mut self, first: u128, last: u128) {
        for n in 0..self.set.len() {
            let (start, end) = self.bounds(n);
            if first <= start && end <= last {
                self.set[n] = false;
            }
        }
    }

    fn runs(&self) -> Vec<(u128, u128)> {
        let mut runs: Vec<(u128, u128)> = Vec::new();
        for n in (0..self.set.len()).filter(|n| self.set[*n]) {
            let (start, end) = self.bounds(n);
            match runs.last_mut() {
                Some((_, last)) if *last + 1 == start => *last = end,
                _ => runs.push((start, end)),
            }
        }
        runs
    }

    /// The words have exactly what the model has.
    fn check(&self) -> bool {
        let words = self.real.words();
        let same = (0..self.set.len()).all(|n| (words[n / 64] >> (n % 64) & 1 != 0) == self.set[n]);
        let ones = self.set.iter().filter(|set| **set).count() as u64;
        same && self.real.count() == ones && self.real.is_empty() == (ones == 0)
    }
}

/// A base near `near`, at most 150 pages, the last perhaps cut.
fn place(random: &mut Random, near: u64, shift: u32) -> (IovaRange, PageSize) {
    let page = 1u64 << shift;
    let off = random.below(130).saturating_mul(page);
    let near = if random.below(2) == 0 {
        near.saturating_sub(off)
    } else {
        near.saturating_add(off)
    };
    let base = near & !(page - 1);
    let more = random.below(150).saturating_mul(page);
    let end = base.saturating_add(more) | (page - 1);
    let cut = if random.below(3) == 0 {
        random.below(page)
    } else {
        0
    };
    let range = IovaRange::from_ends(Iova(base), Iova((end - cut).max(base))).unwrap();
    (range, PageSize::new(page).unwrap())
}

/// Two bitmaps with something in common, often the page size and the word's start too.
fn two(random: &mut Random) -> (Pair, Pair) {
    let near = match random.below(4) {
        0 => 0,
        1 => u64::MAX,
        2 => 1 << 40,
        _ => random.next(),
    };
    let shift = if random.below(2) == 0 {
        12
    } else {
        u32::try_from(random.below(64)).unwrap()
    };
    let (range, page) = place(random, near, shift);
    let one = Pair::new(range, page);
    let other = match random.below(3) {
        // The same page size, words over words.
        0 => {
            let base = range
                .first()
                .0
                .saturating_add(64u64.saturating_mul(page.bytes()));
            let base = if base & (page.bytes() - 1) == 0 {
                base
            } else {
                range.first().0
            };
            let end = base.saturating_add(random.below(90).saturating_mul(page.bytes()));
            let range = IovaRange::from_ends(Iova(base), Iova(end | (page.bytes() - 1))).unwrap();
            Pair::new(range, page)
        }
        1 => {
            let (range, page) = place(random, range.first().0, shift);
            Pair::new(range, page)
        }
        _ => {
            let by = i32::try_from(random.below(9)).unwrap() - 4;
            let shift = shift.saturating_add_signed(by).min(63);
            let (range, page) = place(random, range.first().0, shift);
            Pair::new(range, page)
        }
    };
    if random.below(2) == 0 {
        (one, other)
    } else {
        (other, one)
    }
}

/// An address in or around a bitmap.
fn address(random: &mut Random, of: &Pair) -> u64 {
    let (base, page) = (of.real.range().first().0, of.real.page_size().bytes());
    match random.below(8) {
        0 => random.next(),
        1 => base.saturating_sub(random.below(page.saturating_mul(4))),
        _ => base.saturating_add(random.below(page.saturating_mul(160))),
    }
}

/// Does one operation on both sides; false if they differ.
fn step(random: &mut Random, one: &mut Pair, other: &mut Pair) -> bool {
    let mut named = vec![false; one.set.len()];
    let count = |named: &[bool]| named.iter().filter(|named| **named).count() as u64;
    let page = one.real.page_size();
    match random.below(10) {
        0 | 1 => {
            let iova = address(random, one);
            let len = match random.below(3) {
                0 => random.below(4),
                1 => random.below(page.bytes().saturating_mul(70)),
                _ => page.bytes(),
            };
            one.real.set(Iova(iova), len);
            if len > 0 {
                one.touch(
                    iova.into(),
                    u128::from(iova) + u128::from(len) - 1,
                    &mut named,
                );
            }
            true
        }
        2 => {
            let first = address(random, one);
            let last = first.saturating_add(random.below(page.bytes().saturating_mul(70)));
            let range = IovaRange::from_ends(Iova(first), Iova(last)).unwrap();
            one.real.clear_range(range);
            one.clear_within(first.into(), last.into());
            true
        }
        3 => {
            let shift = match random.below(3) {
                0 => page.shift(),
                _ => page
                    .shift()
                    .saturating_sub(3)
                    .saturating_add(u32::try_from(random.below(7)).unwrap()),
            };
            let from = PageSize::new(1 << shift.min(63)).unwrap();
            let base = address(random, one) & !(from.bytes() - 1);
            let words: Vec<u64> = (0..random.below(4))
                .map(|_| match random.below(4) {
                    0 => 0,
                    1 => u64::MAX,
                    2 => 1 << random.below(64),
                    _ => random.next(),
                })
                .collect();
            let said = one.real.or_words(Iova(base), from, &words).unwrap();
            for (n, word) in words.iter().enumerate() {
                for bit in (0..64).filter(|bit| word >> bit & 1 != 0) {
                    let start =
                        u128::from(base) + (n as u128 * 64 + bit) * u128::from(from.bytes());
                    one.touch(start, start + u128::from(from.bytes()) - 1, &mut named);
                }
            }
            said == count(&named)
        }
        4 => {
            let said = one.real.merge(&other.real);
            for (first, last) in other.runs() {
                one.touch(first, last, &mut named);
            }
            said == count(&named)
        }
        5 => {
            let said = other.real.take_into(&mut one.real);
            for (first, last) in other.runs() {
                one.touch(first, last, &mut named);
            }
            other.clear_within(one.base, one.last);
            said == count(&named)
        }
        6 => {
            let some = usize::try_from(random.below(9)).unwrap();
            let expected = one.runs();
            let got: Vec<_> = one
                .real
                .drain()
                .take(some)
                .map(|run| (u128::from(run.first().0), u128::from(run.last().0)))
                .collect();
            for (first, last) in &got {
                one.clear_within(*first, *last);
            }
            got[..] == expected[..some.min(expected.len())]
        }
        7 => {
            let got = one.real.runs();
            let wide = |run: IovaRange| (u128::from(run.first().0), u128::from(run.last().0));
            got.map(wide).eq(one.runs())
        }
        8 => {
            // As a kernel report may: bits beyond the last page.
            let pages = one.real.pages();
            if let Some(word) = one.real.words_mut().last_mut()
                && !pages.is_multiple_of(64)
            {
                *word |= u64::MAX << (pages % 64);
            }
            true
        }
        _ => {
            let from = address(random, one);
            let bytes = random.below(80).saturating_mul(page.bytes());
            let most = bytes >> page.shift();
            let got = one.real.next_run(Iova(from), bytes);
            let from = u128::from(from);
            let first = (0..one.set.len()).find(|n| one.set[*n] && one.bounds(*n).1 >= from);
            let expected = first.filter(|_| from <= one.last).map(|first| {
                let most = usize::try_from(most.max(1)).unwrap();
                let len = (first..one.set.len().min(first + most))
                    .take_while(|n| one.set[*n])
                    .count();
                (one.bounds(first).0, one.bounds(first + len - 1).1)
            });
            got.map(|run| (u128::from(run.first().0), u128::from(run.last().0))) == expected
        }
    }
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap())
}

#[test]
fn random_operations_agree_with_a_naive_model() {
    let operations = number("IOVA_BITMAP_OPERATIONS", 200_000);
    let mut random = Random(number("IOVA_BITMAP_SEED", 0x9e37_79b9_7f4a_7c15).max(1));
    let mut done = 0;
    while done < operations {
        let (mut one, mut other) = two(&mut random);
        for _ in 0..40 {
            let before = random.0;
            let agreed = step(&mut random, &mut one, &mut other);
            assert!(
                agreed && one.check() && other.check(),
                "after operation {done}, random state {before:#x}: {:?} {:?}",
                one.real,
                other.real
            );
            std::mem::swap(&mut one, &mut other);
            done += 1;
        }
    }
    println!("{done} operations agreed");
}
