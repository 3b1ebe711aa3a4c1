//! Operations on bits in slices of words, a word at a time.
//!
//! Bit `n` is bit `n % 64` of word `n / 64`. Nothing here can go out of a slice: what lies
//! outside is left out.

pub(crate) mod kernels;

use crate::raw;

/// Bits in a word.
pub(crate) const WORD_BITS: u64 = 64;

/// Words looked at one by one before the search for a set or clear bit goes on by wide compares.
const NEAR: usize = 4;

/// The index of the word that holds `bit`: a quotient by 64, which fits any `usize` of the 64-bit
/// hosts we run on.
pub(crate) const fn word_index(bit: u64) -> usize {
    (bit / WORD_BITS) as usize
}

/// The first bit of the word at `index`.
pub(crate) const fn word_start(index: usize) -> u64 {
    index as u64 * WORD_BITS
}

/// The bits that `words` has room for.
pub(crate) const fn bit_len(words: &[u64]) -> u64 {
    (words.len() as u64).saturating_mul(WORD_BITS)
}

/// The bits of a word from `bit` up.
pub(crate) const fn from_mask(bit: u64) -> u64 {
    u64::MAX << (bit % WORD_BITS)
}

/// The bits of a word up to and including `bit`.
pub(crate) const fn upto_mask(bit: u64) -> u64 {
    u64::MAX >> (WORD_BITS - 1 - bit % WORD_BITS)
}

/// Calls `change` with the words that bits `first..=last` touch: the first and the last with the
/// mask of the bits in them, those between at once.
fn for_span(
    words: &mut [u64],
    first: u64,
    last: u64,
    mut edge: impl FnMut(&mut u64, u64),
    between: impl FnOnce(&mut [u64]),
) {
    let end = words.len().min(word_index(last).saturating_add(1));
    let Some(span) = words.get_mut(word_index(first)..end) else {
        return;
    };
    // `last` may lie beyond the slice; then its last word is touched to the end.
    let tail = if word_index(last) < end {
        upto_mask(last)
    } else {
        u64::MAX
    };
    match span {
        [] => {}
        [only] => edge(only, from_mask(first) & tail),
        [head, middle @ .., end] => {
            edge(head, from_mask(first));
            between(middle);
            edge(end, tail);
        }
    }
}

/// Sets bits `first..=last`.
pub(crate) fn set(words: &mut [u64], first: u64, last: u64) {
    let edge = |word: &mut u64, mask| *word |= mask;
    for_span(words, first, last, edge, |words| words.fill(u64::MAX));
}

/// Clears bits `first..=last`.
pub(crate) fn clear(words: &mut [u64], first: u64, last: u64) {
    let edge = |word: &mut u64, mask: u64| *word &= !mask;
    for_span(words, first, last, edge, |words| words.fill(0));
}

/// Clears every bit from `first` on.
pub(crate) fn clear_from(words: &mut [u64], first: u64) {
    if let Some(last) = bit_len(words).checked_sub(1) {
        clear(words, first, last);
    }
}

/// How many of the bits `first..=last` are set.
pub(crate) fn count(words: &[u64], first: u64, last: u64) -> u64 {
    let end = words.len().min(word_index(last).saturating_add(1));
    let tail = if word_index(last) < end {
        upto_mask(last)
    } else {
        u64::MAX
    };
    let ones = |word: u64| u64::from(word.count_ones());
    match words.get(word_index(first)..end) {
        None | Some([]) => 0,
        Some([only]) => ones(only & from_mask(first) & tail),
        Some([head, middle @ .., end]) => {
            ones(head & from_mask(first)) + raw::count(middle) + ones(end & tail)
        }
    }
}

/// Whether `bit` is set.
pub(crate) fn get(words: &[u64], bit: u64) -> bool {
    words
        .get(word_index(bit))
        .is_some_and(|word| word & (1 << (bit % WORD_BITS)) != 0)
}

/// The first set bit at or after `from`.
pub(crate) fn next_set(words: &[u64], from: u64) -> Option<u64> {
    next_other(words, from, 0)
}

/// The first clear bit at or after `from` and below `limit`; `limit` if there is none.
pub(crate) fn next_clear(words: &[u64], from: u64, limit: u64) -> u64 {
    let limit = limit.min(bit_len(words));
    // No word behind the limit is looked at: many short runs may be asked for out of a long one.
    let end = usize::try_from(limit.div_ceil(WORD_BITS)).unwrap_or(usize::MAX);
    let words = words.get(..end).unwrap_or(words);
    next_other(words, from, u64::MAX).map_or(limit, |bit| bit.min(limit))
}

/// The first bit at or after `from` that differs from those of `idle` (0 or all ones).
fn next_other(words: &[u64], from: u64, idle: u64) -> Option<u64> {
    let start = word_index(from);
    let head = (words.get(start)? ^ idle) & from_mask(from);
    if head != 0 {
        return Some(word_start(start) + u64::from(head.trailing_zeros()));
    }
    let rest = words.get(start + 1..)?;
    // A stretch is mostly either short or very long: only the long are worth the wide compares.
    let near = rest.iter().take(NEAR);
    for (index, word) in near.enumerate() {
        if *word != idle {
            let bit = u64::from((word ^ idle).trailing_zeros());
            return Some(word_start(start + 1 + index) + bit);
        }
    }
    let index = raw::skip(rest, idle);
    let word = rest.get(index)? ^ idle;
    Some(word_start(start + 1 + index) + u64::from(word.trailing_zeros()))
}

/// Where bit 0 of one bitmap lies in another.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Offset {
    /// At this bit of the destination.
    Ahead(u64),
    /// So many bits before the destination's bit 0.
    Behind(u64),
}

/// ORs `source` into `target`, bit 0 of it at `offset`; what falls outside is left out. Gives how
/// many set bits of `source` fall into the words of `target`.
///
/// If the offset is a whole number of words, words are ORed as they are; otherwise each is
/// shifted over the boundary of two.
pub(crate) fn or_at(target: &mut [u64], source: &[u64], offset: Offset) -> u64 {
    match offset {
        Offset::Ahead(bits) => {
            let target = target.get_mut(word_index(bits)..).unwrap_or_default();
            or_up(target, source, bits % WORD_BITS, 0)
        }
        Offset::Behind(bits) => {
            let source = source.get(word_index(bits)..).unwrap_or_default();
            match (bits % WORD_BITS, source) {
                (0, source) => raw::or(target, source),
                // Shifting down is shifting up by the rest of a word, one word earlier: the first
                // word is what is carried into the first target word.
                (down, [first, rest @ ..]) => or_up(target, rest, WORD_BITS - down, first >> down),
                (_, []) => 0,
            }
        }
    }
}

/// ORs `source << up` into `target`, with `carry` in the low `up` bits of the first word; `up` is
/// below 64.
fn or_up(target: &mut [u64], source: &[u64], up: u64, carry: u64) -> u64 {
    match u32::try_from(up) {
        Ok(up @ 1..64) => raw::or_shifted(target, source, up, carry),
        _ => raw::or(target, source),
    }
}
