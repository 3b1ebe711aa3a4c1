use super::*;

const PAGES: usize = 300;

#[test]
fn pages_start_at_pages() {
    let memory = Memory::new(3).unwrap();
    assert_eq!(memory.page(0).as_ptr().addr() % PAGE_BYTES, 0);
    assert_eq!(memory.page(2).len(), PAGE_WORDS);
}

#[test]
fn untouched_memory_stays_right() {
    let mut memory = Memory::new(PAGES).unwrap();
    memory.write_some(1000);
    assert_eq!(memory.check_all(), 0);
    assert_eq!(memory.check_some(1000), 0);
    assert!(memory.counts_are_right());
    assert_eq!(memory.writes, 1300);
}

#[test]
fn a_changed_bit_is_found() {
    let mut memory = Memory::new(PAGES).unwrap();
    for word in [0, 7, PAGE_WORDS - 1] {
        let at = memory.start + 299 * PAGE_WORDS + word;
        memory.words[at] ^= 1 << 63;
        assert_eq!(memory.check_all(), 1);
        assert_eq!(memory.check_some(300), 1);
        memory.words[at] ^= 1 << 63;
    }
    assert_eq!(memory.check_all(), 0);
}

#[test]
fn an_old_copy_of_a_page_is_found() {
    let mut memory = Memory::new(PAGES).unwrap();
    let old = memory.page(17).to_vec();
    memory.write(17);
    assert_eq!(memory.check_all(), 0);
    let start = memory.start + 17 * PAGE_WORDS;
    memory.words[start..start + PAGE_WORDS].copy_from_slice(&old);
    assert_eq!(memory.check_all(), 1);
    // Even if what is kept aside is as old.
    memory.generations[17] -= 1;
    assert_eq!(memory.check_all(), 0);
    assert!(!memory.counts_are_right());
}

#[test]
fn a_page_in_the_wrong_place_is_found() {
    let mut memory = Memory::new(PAGES).unwrap();
    let other = memory.page(5).to_vec();
    let start = memory.start + 6 * PAGE_WORDS;
    memory.words[start..start + PAGE_WORDS].copy_from_slice(&other);
    assert_eq!(memory.check_all(), 1);
}
