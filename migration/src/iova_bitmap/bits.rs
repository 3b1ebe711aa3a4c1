//! Operations on bits in slices of words, a word at a time.
//!
//! Bit `n` is bit `n % 64` of word `n / 64`. Nothing here can go out of a slice: what lies
//! outside is left out.

/// Bits in a word.
pub(super) const WORD_BITS: u64 = 64;

/// How many words are tested at once for being empty.
const EMPTY_STRIDE: usize = 8;

/// The index of the word that holds `bit`: a quotient by 64, which fits any `usize` of the 64-bit
/// hosts we run on.
pub(super) const fn word_index(bit: u64) -> usize {
    (bit / WORD_BITS) as usize
}

/// The first bit of the word at `index`.
pub(super) const fn word_start(index: usize) -> u64 {
    index as u64 * WORD_BITS
}

/// The bits that `words` has room for.
pub(super) const fn bit_len(words: &[u64]) -> u64 {
    (words.len() as u64).saturating_mul(WORD_BITS)
}

/// The bits of a word from `bit` up.
pub(super) const fn from_mask(bit: u64) -> u64 {
    u64::MAX << (bit % WORD_BITS)
}

/// The bits of a word up to and including `bit`.
pub(super) const fn upto_mask(bit: u64) -> u64 {
    u64::MAX >> (WORD_BITS - 1 - bit % WORD_BITS)
}

/// Calls `change` with each word that bits `first..=last` touch and the mask of them in it.
fn for_span(words: &mut [u64], first: u64, last: u64, mut change: impl FnMut(&mut u64, u64)) {
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
        [only] => change(only, from_mask(first) & tail),
        [head, middle @ .., end] => {
            change(head, from_mask(first));
            for word in middle {
                change(word, u64::MAX);
            }
            change(end, tail);
        }
    }
}

/// Sets bits `first..=last`.
pub(super) fn set(words: &mut [u64], first: u64, last: u64) {
    for_span(words, first, last, |word, mask| *word |= mask);
}

/// Clears bits `first..=last`.
pub(super) fn clear(words: &mut [u64], first: u64, last: u64) {
    for_span(words, first, last, |word, mask| *word &= !mask);
}

/// Clears every bit from `first` on.
pub(super) fn clear_from(words: &mut [u64], first: u64) {
    if let Some(last) = bit_len(words).checked_sub(1) {
        clear(words, first, last);
    }
}

/// Whether `bit` is set.
pub(super) fn get(words: &[u64], bit: u64) -> bool {
    words
        .get(word_index(bit))
        .is_some_and(|word| word & (1 << (bit % WORD_BITS)) != 0)
}

/// The first set bit at or after `from`.
pub(super) fn next_set(words: &[u64], from: u64) -> Option<u64> {
    let start = word_index(from);
    let head = words.get(start)? & from_mask(from);
    if head != 0 {
        return Some(from - from % WORD_BITS + u64::from(head.trailing_zeros()));
    }
    let index = next_word(words, start + 1)?;
    let word = words.get(index)?;
    Some(word_start(index) + u64::from(word.trailing_zeros()))
}

/// The first word at or after index `from` that is not empty.
pub(super) fn next_word(words: &[u64], from: usize) -> Option<usize> {
    let rest = words.get(from..)?;
    // Most of a guest is clean: pass over many empty words by one test each.
    let empty = rest
        .chunks_exact(EMPTY_STRIDE)
        .take_while(|chunk| chunk.iter().fold(0, |all, word| all | word) == 0)
        .count()
        * EMPTY_STRIDE;
    let rest = rest.get(empty..)?;
    Some(from + empty + rest.iter().position(|word| *word != 0)?)
}

/// The first clear bit at or after `from` and below `limit`; `limit` if there is none.
pub(super) fn next_clear(words: &[u64], from: u64, limit: u64) -> u64 {
    let limit = limit.min(bit_len(words));
    let mut bit = from;
    let rest = words.get(word_index(from)..).unwrap_or_default();
    for word in rest {
        if bit >= limit {
            break;
        }
        let clear = !word & from_mask(bit);
        bit -= bit % WORD_BITS;
        if clear != 0 {
            bit += u64::from(clear.trailing_zeros());
            break;
        }
        bit += WORD_BITS;
    }
    bit.min(limit)
}

/// Where bit 0 of one bitmap lies in another.
#[derive(Clone, Copy, Debug)]
pub(super) enum Offset {
    /// At this bit of the destination.
    Ahead(u64),
    /// So many bits before the destination's bit 0.
    Behind(u64),
}

/// ORs `source` into `target`, bit 0 of it at `offset`; what falls outside is left out.
///
/// If the offset is a whole number of words, words are ORed as they are; otherwise each is
/// shifted over the boundary of two.
pub(super) fn or_at(target: &mut [u64], source: &[u64], offset: Offset) {
    match offset {
        Offset::Ahead(bits) => {
            let target = target.get_mut(word_index(bits)..).unwrap_or_default();
            or_shifted(target, source, bits % WORD_BITS, 0);
        }
        Offset::Behind(bits) => {
            let source = source.get(word_index(bits)..).unwrap_or_default();
            match (bits % WORD_BITS, source) {
                (0, source) => or_shifted(target, source, 0, 0),
                // Shifting down is shifting up by the rest of a word, one word earlier: the first
                // word is what is carried into the first target word.
                (down, [first, rest @ ..]) => {
                    or_shifted(target, rest, WORD_BITS - down, first >> down);
                }
                (_, []) => {}
            }
        }
    }
}

/// ORs `source << up` into `target`, with `carry` in the low `up` bits of the first word.
fn or_shifted(target: &mut [u64], source: &[u64], up: u64, carry: u64) {
    if up == 0 {
        for (word, from) in target.iter_mut().zip(source) {
            if *from != 0 {
                *word |= from;
            }
        }
        return;
    }
    let mut carry = carry;
    for (word, from) in target.iter_mut().zip(source.iter().chain([&0])) {
        let bits = carry | from << up;
        if bits != 0 {
            *word |= bits;
        }
        carry = from >> (WORD_BITS - up);
    }
}
