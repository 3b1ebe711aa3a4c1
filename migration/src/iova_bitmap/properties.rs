//! Property tests against a set of page numbers, with addresses in 128 bits.

use proptest::prelude::*;

use super::naive::Naive;
use super::*;

/// A bitmap and its model, both clean.
#[derive(Debug)]
struct Pair {
    real: IovaBitmap,
    naive: Naive,
}

#[derive(Clone, Copy, Debug)]
struct Geometry {
    base: u64,
    last: u64,
    shift: u32,
}

impl Geometry {
    fn pair(self) -> Pair {
        let range = IovaRange::from_ends(Iova(self.base), Iova(self.last)).unwrap();
        let page = PageSize::new(1 << self.shift).unwrap();
        Pair {
            real: IovaBitmap::over(range, page).unwrap(),
            naive: Naive::new(self.base, self.last, page.bytes()),
        }
    }
}

impl Pair {
    fn or_words(&mut self, geometry: Geometry, words: &[u64]) {
        let page = PageSize::new(1 << geometry.shift).unwrap();
        self.real
            .or_words(Iova(geometry.base), page, words)
            .unwrap();
        self.naive
            .or_words(geometry.base.into(), page.bytes().into(), words);
    }

    /// Sets bits beyond the last page, as a kernel report may.
    fn scribble_beyond_the_end(&mut self) {
        let pages = self.real.pages();
        let beyond = if pages.is_multiple_of(64) {
            0
        } else {
            u64::MAX << (pages % 64)
        };
        *self.real.words_mut().last_mut().unwrap() |= beyond;
    }

    fn check(&self) -> Result<(), TestCaseError> {
        let Self { real, naive } = self;
        prop_assert_eq!(real.count(), naive.set.len() as u64);
        prop_assert_eq!(real.is_empty(), naive.set.is_empty());
        let wide = |run: IovaRange| (u128::from(run.first().0), u128::from(run.last().0));
        prop_assert_eq!(real.runs().map(wide).collect::<Vec<_>>(), naive.runs());
        for n in naive.pages() {
            let (start, end) = naive.bounds(n);
            for address in [start, end] {
                let iova = Iova(u64::try_from(address).unwrap());
                prop_assert_eq!(real.contains(iova), naive.set.contains(&n));
            }
        }
        for outside in [naive.base.checked_sub(1), Some(naive.last + 1)] {
            if let Some(Ok(outside)) = outside.map(u64::try_from) {
                prop_assert!(!real.contains(Iova(outside)));
            }
        }
        Ok(())
    }
}

/// Up to 200 pages of `shift` with the first at about `near`, the last perhaps cut short.
fn geometry_near(near: u64, shift: u32) -> impl Strategy<Value = Geometry> {
    let page = 1u64 << shift;
    (0u64..200, -200i64..200, 0..page).prop_map(move |(more, off, cut)| {
        let off = off.unsigned_abs().saturating_mul(page);
        let start = if more % 2 == 0 {
            near.saturating_sub(off)
        } else {
            near.saturating_add(off)
        };
        let base = start & !(page - 1);
        let last = base.saturating_add(more.saturating_mul(page)) | (page - 1);
        Geometry {
            base,
            last: (last - cut).max(base),
            shift,
        }
    })
}

fn geometry() -> impl Strategy<Value = Geometry> {
    let near = prop_oneof![
        Just(0),
        Just(u64::MAX),
        Just(1 << 63),
        Just(1 << 32),
        any::<u64>(),
    ];
    let shift = prop_oneof![Just(12), 0u32..64];
    (near, shift).prop_flat_map(|(near, shift)| geometry_near(near, shift))
}

/// A geometry, and another near it with the same or another page size.
fn two_geometries() -> impl Strategy<Value = (Geometry, Geometry)> {
    (geometry(), prop_oneof![Just(0), -7i32..8]).prop_flat_map(|(one, step)| {
        let shift = one.shift.saturating_add_signed(step).min(63);
        (Just(one), geometry_near(one.base, shift))
    })
}

fn words() -> impl Strategy<Value = Vec<u64>> {
    let word = prop_oneof![
        3 => Just(0),
        1 => Just(u64::MAX),
        2 => (0u32..64).prop_map(|bit| 1 << bit),
        2 => any::<u64>(),
    ];
    proptest::collection::vec(word, 0..6)
}

/// Addresses in, at the ends of, and around a geometry.
fn ranges(of: Geometry) -> impl Strategy<Value = Vec<(u64, u64)>> {
    let page = 1u64 << of.shift;
    let start = prop_oneof![
        4 => of.base..=of.last,
        1 => Just(of.base.saturating_sub(page / 2)),
        1 => Just(of.last),
        1 => any::<u64>(),
    ];
    let len = prop_oneof![
        4 => 0..=page.saturating_mul(70),
        1 => 0u64..3,
        1 => Just(page),
        1 => any::<u64>(),
    ];
    proptest::collection::vec((start, len), 0..6)
}

fn geometry_and_ranges() -> impl Strategy<Value = (Geometry, Vec<(u64, u64)>)> {
    geometry().prop_flat_map(|of| (Just(of), ranges(of)))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1500))]

    #[test]
    fn set_touches_what_it_says((of, ranges) in geometry_and_ranges(), scribble: bool) {
        let mut pair = of.pair();
        for (iova, len) in ranges {
            pair.real.set(Iova(iova), len);
            if len > 0 {
                let last = u128::from(iova) + u128::from(len) - 1;
                pair.naive.set_through(iova.into(), last);
            }
        }
        if scribble {
            pair.scribble_beyond_the_end();
        }
        pair.check()?;
    }

    #[test]
    fn foreign_words_are_ored(
        (ours, theirs) in two_geometries(),
        first in words(),
        second in words(),
    ) {
        let mut pair = ours.pair();
        pair.or_words(ours, &first);
        pair.check()?;
        pair.or_words(theirs, &second);
        pair.check()?;
    }

    #[test]
    fn merge_is_the_union((ours, theirs) in two_geometries(), a in words(), b in words()) {
        let (mut ours, mut other) = (ours.pair(), theirs.pair());
        ours.or_words(theirs, &a);
        other.or_words(theirs, &b);
        other.scribble_beyond_the_end();
        ours.real.merge(&other.real);
        ours.naive.merge(&other.naive);
        ours.check()?;
        other.check()?;
    }

    #[test]
    fn take_into_moves_and_loses_nothing(
        (ours, theirs) in two_geometries(),
        a in words(),
        b in words(),
    ) {
        let (mut target, mut source) = (ours.pair(), theirs.pair());
        target.or_words(ours, &a);
        source.or_words(theirs, &b);
        source.scribble_beyond_the_end();
        source.real.take_into(&mut target.real);
        target.naive.merge(&source.naive);
        source.naive.clear_within(target.naive.base, target.naive.last);
        target.check()?;
        source.check()?;
    }

    #[test]
    fn clear_range_spares_pages_that_reach_out(
        (of, ranges) in geometry_and_ranges(),
        set in words(),
    ) {
        let mut pair = of.pair();
        pair.or_words(of, &set);
        for (iova, len) in ranges {
            if let Some(range) = IovaRange::new(Iova(iova), len) {
                pair.real.clear_range(range);
                pair.naive.clear_within(range.first().0.into(), range.last().0.into());
            }
        }
        pair.check()?;
    }

    #[test]
    fn runs_cut_to_size_cover_the_same(of in geometry(), set in words(), max_pages in 0u64..70) {
        let mut pair = of.pair();
        pair.or_words(of, &set);
        pair.scribble_beyond_the_end();
        let page = pair.real.page_size();
        let max_bytes = max_pages.saturating_mul(page.bytes());
        let mut seen = of.pair();
        let mut from = Some(Iova(0));
        while let Some(run) = from.and_then(|from| pair.real.next_run(from, max_bytes)) {
            prop_assert!(from <= Some(run.first()));
            let pages = ((run.last().0 - run.first().0) >> page.shift()) + 1;
            prop_assert!(pages <= max_pages.max(1));
            seen.real.set_range(run);
            from = run.last().0.checked_add(1).map(Iova);
        }
        seen.naive = pair.naive;
        seen.check()?;
    }
}
