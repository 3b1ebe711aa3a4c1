//! Taking the bits of pages out of words in which others set them.
//!
//! Who writes a page sets its bit afterwards, by an atomic OR; who takes the bit reads the page
//! afterwards. [`memory`](crate::memory) tells why so no write is lost.

use std::sync::atomic::Ordering;

use iova_bitmap::{BitmapError, IovaBitmap};

use super::log::LOG_PAGE;
use crate::addr::Iova;
use crate::sync::AtomicU64;

/// Pages that one word stands for.
pub(super) const WORD_PAGES: usize = 64;

/// Words handed on at once: few enough for the stack, and enough that what a hand-over costs does
/// not show.
const BATCH: usize = 128;

/// Moves the bits of pages `first` to `last` out of `words` into `bitmap`, other bits stay. Bit
/// `n % 64` of word `n / 64` is the page of 4 KiB at `base + n * 4096`; what the words have no bit for
/// adds nothing. Gives how many pages of `bitmap` were named.
///
/// `bitmap` must cover those pages: what is outside of it is lost.
///
/// # Errors
/// If `base` is not a multiple of 4 KiB. Nothing was taken then.
pub fn take_bits(
    words: &[AtomicU64],
    (first, last): (usize, usize),
    base: Iova,
    bitmap: &mut IovaBitmap,
) -> Result<u64, BitmapError> {
    // No bits are ORed, but a misaligned base is refused before any is taken.
    let mut named = bitmap.or_words(base, LOG_PAGE, &[])?;
    let mut batch = [0; BATCH];
    let mut spans = span(words, first, last).peekable();
    while let Some((index, ..)) = spans.peek() {
        let start = start_of(*index, base);
        let (mut any, mut count) = (0, 0);
        for (bits, (_, word, mask)) in batch.iter_mut().zip(spans.by_ref()) {
            *bits = take_word(word, mask);
            any |= *bits;
            count += 1;
        }
        // Words that start beyond 2^64 stand for no address.
        if any != 0
            && let Some(start) = start
        {
            named += bitmap.or_words(start, LOG_PAGE, batch.get(..count).unwrap_or_default())?;
        }
    }
    Ok(named)
}

/// The address of the first page of word `index`.
fn start_of(index: usize, base: Iova) -> Option<Iova> {
    let offset = index.checked_mul(WORD_PAGES << LOG_PAGE.shift())?;
    base.0.checked_add(u64::try_from(offset).ok()?).map(Iova)
}

/// Takes the bits of `mask` out of `word`.
pub(super) fn take_word(word: &AtomicU64, mask: u64) -> u64 {
    // A clean word is not written to, so its cache line stays shared with the writers. A bit set after
    // this load is there for the next time; before the last time the writers have stopped, which
    // whoever stopped them has synchronised with.
    if word.load(Ordering::Relaxed) & mask == 0 {
        return 0;
    }
    // Acquire: who sets a bit does so by a release.
    if mask == u64::MAX {
        word.swap(0, Ordering::Acquire)
    } else {
        word.fetch_and(!mask, Ordering::Acquire) & mask
    }
}

/// The words that have bits for pages `first` to `last`, with their index and the mask of those bits.
pub(super) fn span(
    words: &[AtomicU64],
    first: usize,
    last: usize,
) -> impl Iterator<Item = (usize, &AtomicU64, u64)> {
    let (first_word, last_word) = (first / WORD_PAGES, last / WORD_PAGES);
    let end = last_word.saturating_add(1).min(words.len());
    words
        .get(first_word..end)
        .unwrap_or_default()
        .iter()
        .zip(first_word..)
        .map(move |(word, index)| {
            let mut mask = u64::MAX;
            if index == first_word {
                mask &= u64::MAX << (first % WORD_PAGES);
            }
            if index == last_word {
                mask &= u64::MAX >> (WORD_PAGES - 1 - last % WORD_PAGES);
            }
            (index, word, mask)
        })
}
