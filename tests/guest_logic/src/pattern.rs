//! A page's content: a generation, a check word, and an incompressible filler.
//!
//! Word 0 counts the writes to the page, word 1 is derived from it and from
//! the page's address, so a page that is stale, torn, misplaced or zeroed is
//! told apart from the right one. The other 510 words depend on the address
//! alone: dirtying a page costs two stores, checking all of it is still
//! possible at any time.

use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Bytes per page.
pub const PAGE_BYTES: u64 = 4096;

/// Words per page.
pub const PAGE_WORDS: usize = 512;

/// A page of guest memory. Atomic words, because another CPU, a device or a
/// migration may have written it since the compiler last looked.
pub type Page = [AtomicU64; PAGE_WORDS];

const CHECK_SALT: u64 = 0x5555_5555_aaaa_aaaa;
const FILL_SALT: u64 = 0x9e37_79b9_7f4a_7c15;

fn check_word(address: u64, generation: u64) -> u64 {
    generation.rotate_left(32) ^ address ^ CHECK_SALT
}

/// The filler's words, in order, by Knuth's MMIX congruential generator.
fn filler(address: u64) -> impl Iterator<Item = u64> {
    let mut state = address ^ FILL_SALT;
    core::iter::repeat_with(move || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        state
    })
}

/// Writes the whole page at `address` with its content at `generation`.
pub fn fill(page: &Page, address: u64, generation: u64) {
    for (word, value) in page.iter().skip(2).zip(filler(address)) {
        word.store(value, Relaxed);
    }
    stamp(page, address, generation);
}

/// Writes generation and check word only: what dirtying a page means.
#[inline]
pub fn stamp(page: &Page, address: u64, generation: u64) {
    page[0].store(generation, Relaxed);
    page[1].store(check_word(address, generation), Relaxed);
}

/// True when generation and check word are those of `generation`.
#[inline]
#[must_use]
pub fn is_stamped(page: &Page, address: u64, generation: u64) -> bool {
    page[0].load(Relaxed) == generation && page[1].load(Relaxed) == check_word(address, generation)
}

/// True when every word of the page is as [`fill`] and [`stamp`] left it.
#[must_use]
pub fn is_intact(page: &Page, address: u64, generation: u64) -> bool {
    let differences = page
        .iter()
        .skip(2)
        .zip(filler(address))
        .fold(0, |sum, (word, value)| sum | (word.load(Relaxed) ^ value));
    differences == 0 && is_stamped(page, address, generation)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page() -> Page {
        [const { AtomicU64::new(0) }; PAGE_WORDS]
    }

    #[test]
    fn a_written_page_is_intact_at_its_generation_only() {
        let page = page();
        fill(&page, 0x20_0000, 1);
        assert!(is_intact(&page, 0x20_0000, 1));
        stamp(&page, 0x20_0000, 2);
        assert!(is_intact(&page, 0x20_0000, 2));
        assert!(!is_stamped(&page, 0x20_0000, 1), "stale generation");
        assert!(!is_intact(&page, 0x20_1000, 2), "another page's content");
    }

    #[test]
    fn any_changed_word_is_seen() {
        let page = page();
        fill(&page, 0x1234_5000, 9);
        for word in &page {
            let old = word.fetch_xor(1 << 63, Relaxed);
            assert!(!is_intact(&page, 0x1234_5000, 9));
            word.store(old, Relaxed);
        }
        assert!(is_intact(&page, 0x1234_5000, 9));
    }

    #[test]
    fn zeroed_page_is_never_intact() {
        assert!(!is_stamped(&page(), 0x20_0000, 0));
    }
}
