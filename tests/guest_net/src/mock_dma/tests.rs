use std::ptr::NonNull;

use super::device::Engine;
use super::memory::Words;
use super::record::{Fault, Order, judge, word};
use super::{PAGE_WORDS, is_whole};

const ENGINE: Engine = Engine {
    rate: 1,
    bytes: 64,
    step: 1,
    pattern: 0x1234,
};

/// For each page the last of the first `stamp` records, by going through all of them.
fn slowly(pages: u64, step: u64, stamp: u64) -> Vec<u64> {
    let mut last = vec![0; usize::try_from(pages).unwrap()];
    for s in 1..=stamp {
        last[usize::try_from((s - 1) * step % pages).unwrap()] = s;
    }
    last
}

#[test]
fn the_order_of_pages_is_the_devices() {
    for (pages, step) in [(1, 1), (5, 1), (8, 3), (64, 11), (7, 100)] {
        let order = Order::new(pages, step).unwrap();
        for stamp in 0..3 * u64::from(pages) + 2 {
            let last: Vec<u64> = (0..order.pages())
                .map(|page| order.last(page, stamp))
                .collect();
            assert_eq!(
                last,
                slowly(u64::from(pages), u64::from(step), stamp),
                "{pages} {step} {stamp}"
            );
        }
    }
    assert!(Order::new(8, 2).is_err());
    assert!(Order::new(4, 0).is_err());
}

#[test]
fn a_lost_write_is_stale_and_one_under_way_is_not() {
    let order = Order::new(4, 1).unwrap();
    // Page 1 got records 2, 6, 10.
    assert_eq!(judge(&order, 1, 6, 9, 9), None);
    assert_eq!(judge(&order, 1, 2, 9, 9), Some(Fault::Stale));
    assert_eq!(judge(&order, 1, 0, 2, 2), Some(Fault::Stale));
    assert_eq!(judge(&order, 1, 0, 1, 1), None);
    // While the count went from 9 to 10, either is right.
    assert_eq!(judge(&order, 1, 6, 9, 10), None);
    assert_eq!(judge(&order, 1, 10, 9, 10), None);
    assert_eq!(judge(&order, 1, 2, 9, 10), Some(Fault::Stale));
    // Never written, or another page's.
    assert_eq!(judge(&order, 1, 10, 9, 9), Some(Fault::Foreign));
    assert_eq!(judge(&order, 1, 7, 6, 12), Some(Fault::Foreign));
}

#[test]
fn a_page_is_one_record_or_nothing() {
    let mut page = vec![0; PAGE_WORDS];
    let whole = |page: &mut Vec<u64>| {
        // SAFETY: used while the page is borrowed only.
        let words = unsafe { Words::new(NonNull::new(page.as_mut_ptr()).unwrap(), PAGE_WORDS) };
        is_whole(words, ENGINE)
    };
    assert!(whole(&mut page));
    for (at, index) in (0..8).zip(0..) {
        page[at] = word(7, ENGINE.pattern, index);
    }
    assert!(whole(&mut page));
    page[7] = word(6, ENGINE.pattern, 7);
    assert!(!whole(&mut page));
    page[7] = word(7, ENGINE.pattern, 7);
    page[8] = 1;
    assert!(!whole(&mut page));
}

#[test]
fn words_end_where_they_end() {
    let mut memory = vec![1; 4];
    // SAFETY: used while the vector lives only.
    let words = unsafe { Words::new(NonNull::new(memory.as_mut_ptr()).unwrap(), 4) };
    let part = words.part(2, 2).unwrap();
    part.set(1, 9);
    part.set(2, 9);
    assert_eq!((words.get(3), part.get(2), words.get(4)), (9, 0, 0));
    assert!(words.part(3, 2).is_none());
    assert!(words.part(usize::MAX, 2).is_none());
}
