//! Property tests against a set of page numbers, with addresses in 128 bits.

use proptest::prelude::*;

use crate::bits::kernels::Edges;
use crate::naive::Naive;
use crate::raw::{Level, at_level};
use crate::*;

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
        let named = self
            .real
            .or_words(Iova(geometry.base), page, words)
            .unwrap();
        let mut alone = geometry_of(&self.real).pair().naive;
        alone.or_words(geometry.base.into(), page.bytes().into(), words);
        assert_eq!(named, alone.set.len() as u64, "pages named");
        self.naive.set.append(&mut alone.set);
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

fn geometry_of(bitmap: &IovaBitmap) -> Geometry {
    Geometry {
        base: bitmap.range().first().0,
        last: bitmap.range().last().0,
        shift: bitmap.page_size().shift(),
    }
}

fn wide(run: IovaRange) -> (u128, u128) {
    (run.first().0.into(), run.last().0.into())
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

/// Enough words for the widest loops and their rests.
fn many_words() -> impl Strategy<Value = Vec<u64>> {
    let word = prop_oneof![
        4 => Just(0),
        4 => Just(u64::MAX),
        1 => (0u32..64).prop_map(|bit| 1 << bit),
        1 => any::<u64>(),
    ];
    let stretch = (word, 1usize..50).prop_map(|(word, times)| vec![word; times]);
    proptest::collection::vec(stretch, 0..6).prop_map(|stretches| stretches.concat())
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
    fn a_list_sets_what_its_addresses_do((of, ranges) in geometry_and_ranges(), repeat in 1usize..40) {
        let mut pair = of.pair();
        let near = |n: usize, iova: u64| iova.wrapping_add((n as u64) << of.shift.saturating_sub(1));
        let list: Vec<Iova> = ranges
            .iter()
            .flat_map(|(iova, _)| (0..repeat).map(|n| Iova(near(n, *iova))))
            .collect();
        pair.real.set_each(&list);
        for iova in list {
            pair.naive.set_through(iova.0.into(), iova.0.into());
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
        let named = ours.real.merge(&other.real);
        let mut alone = ours.naive.clone();
        alone.set.clear();
        alone.merge(&other.naive);
        prop_assert_eq!(named, alone.set.len() as u64);
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
        let named = source.real.take_into(&mut target.real);
        let mut alone = target.naive.clone();
        alone.set.clear();
        alone.merge(&source.naive);
        prop_assert_eq!(named, alone.set.len() as u64);
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

    #[test]
    fn what_is_drained_is_clean_and_the_rest_is_not(
        of in geometry(),
        set in words(),
        given in 0usize..20,
    ) {
        let mut pair = of.pair();
        pair.or_words(of, &set);
        pair.scribble_beyond_the_end();
        let expected = pair.naive.runs();
        let drained: Vec<_> = pair.real.drain().take(given).map(wide).collect();
        prop_assert_eq!(&drained[..], &expected[..given.min(expected.len())]);
        for (first, last) in drained {
            pair.naive.clear_within(first, last);
        }
        pair.check()?;
    }

    #[test]
    fn windows_are_the_bitmap_cut(of in geometry(), set in words(), words_each in 0u64..4) {
        let mut pair = of.pair();
        pair.or_words(of, &set);
        let page = pair.real.page_size().bytes();
        let bytes = page.saturating_mul(64).saturating_mul(words_each);
        let whole = pair.real.words().to_vec();
        let mut next = Some(pair.real.range().first().0);
        let mut seen = Vec::new();
        for window in pair.real.windows_mut(bytes) {
            prop_assert_eq!(Some(window.range.first().0), next);
            next = window.range.last().0.checked_add(1);
            let pages = (window.range.last().0 - window.range.first().0) / page + 1;
            prop_assert_eq!(window.words.len() as u64, pages.div_ceil(64));
            seen.extend_from_slice(window.words);
        }
        prop_assert_eq!(next, of.last.checked_add(1));
        prop_assert_eq!(seen, whole);
    }

    #[test]
    fn resampling_keeps_every_address((of, other) in two_geometries(), set in words()) {
        let mut pair = of.pair();
        pair.or_words(of, &set);
        let page = PageSize::new(1 << other.shift).unwrap();
        // Finer by much would be more pages than the model can try one by one.
        prop_assume!(of.shift.saturating_sub(other.shift) < 6);
        let real = pair.real.resample(page).unwrap();
        let base = of.base & !(page.bytes() - 1);
        let mut naive = Naive::new(base, of.last, page.bytes());
        naive.merge(&pair.naive);
        Pair { real, naive }.check()?;
    }

    #[test]
    fn a_bitmap_used_again_is_a_new_one((of, other) in two_geometries(), set in words()) {
        let mut pair = of.pair();
        pair.or_words(of, &set);
        pair.scribble_beyond_the_end();
        let other = Geometry { shift: of.shift, base: other.base & !((1 << of.shift) - 1), ..other };
        let fresh = other.pair();
        let range = fresh.real.range();
        let room = pair.real.pages().next_multiple_of(64);
        match pair.real.retarget(range) {
            Ok(()) => {
                prop_assert!(fresh.real.pages() <= room);
                Pair { real: pair.real, naive: fresh.naive }.check()?;
            }
            Err(BitmapError::TooSmall { .. }) => {
                prop_assert!(fresh.real.pages() > room);
                pair.check()?;
            }
            Err(error) => prop_assert!(false, "{error}"),
        }
    }

    #[test]
    fn questions_about_a_range_are_answered((of, ranges) in geometry_and_ranges(), set in words()) {
        let mut pair = of.pair();
        pair.or_words(of, &set);
        pair.scribble_beyond_the_end();
        for (iova, len) in ranges {
            let Some(range) = IovaRange::new(Iova(iova), len) else { continue };
            let (first, last) = wide(range);
            let touched = pair.naive.set.iter().filter(|n| {
                let (start, end) = pair.naive.bounds(**n);
                start <= last && first <= end
            });
            let touched = touched.count() as u64;
            prop_assert_eq!(pair.real.count_in(range), touched);
            prop_assert_eq!(pair.real.any_in(range), touched > 0);
        }
    }

    #[test]
    fn every_instruction_set_does_the_same(
        one in many_words(),
        two in many_words(),
        up in 1u32..64,
        carry: u64,
    ) {
        let results: Vec<_> = Level::all().map(|level| {
            let (mut ored, mut shifted, mut taken, mut source) =
                (one.clone(), one.clone(), one.clone(), two.clone());
            let counts = [
                at_level::count(level, &one),
                at_level::or(level, &mut ored, &two),
                at_level::or_shifted(level, &mut shifted, &two, up, carry),
                at_level::take(level, &mut taken, &mut source),
                at_level::skip(level, &one, 0) as u64,
                at_level::skip(level, &one, u64::MAX) as u64,
            ];
            let mut edges = Edges::new();
            let looked_at = at_level::edges(level, &one, 640, carry & 1 != 0, &mut edges);
            let edges: Vec<_> = std::iter::from_fn(|| edges.pop()).collect();
            (counts, ored, shifted, taken, source, looked_at, edges)
        }).collect();
        for result in &results {
            prop_assert_eq!(result, &results[0]);
        }
        // And that is right.
        let (counts, ored, .., looked_at, edges) = &results[0];
        let both = |n: usize| one[n] | two.get(n).copied().unwrap_or(0);
        prop_assert!((0..one.len()).all(|n| ored[n] == both(n)));
        prop_assert_eq!(counts[0], one.iter().map(|word| u64::from(word.count_ones())).sum::<u64>());
        let mut before = carry & 1 != 0;
        let mut expected = Vec::new();
        for bit in 0..*looked_at as u64 * 64 {
            let now = one[(bit / 64) as usize] >> (bit % 64) & 1 != 0;
            if now != before {
                expected.push(640 + bit);
            }
            before = now;
        }
        prop_assert_eq!(edges, &expected);
    }
}
