//! Table-driven tests: the vectors on which the kernel's `iova_bitmap` was got wrong or which it
//! gets wrong to this day, and misuse.

use crate::*;

const K: u64 = 1 << 10;
const M: u64 = 1 << 20;
const G: u64 = 1 << 30;
const P4: u64 = 4 * K;
const P64: u64 = 64 * K;

/// A bitmap's base, length and page size; the `(iova, len)` that are set; the runs of bits that
/// are set then, first and last.
type Vector = (u64, u64, u64, &'static [(u64, u64)], &'static [(u64, u64)]);

const VECTORS: &[Vector] = &[
    (0, 64 * P4, P4, &[(0x1000, 0x1000)], &[(1, 1)]),
    (4 * G, G, P4, &[(4 * G + 0x3000, 0x2000)], &[(3, 4)]),
    // One page long, but over a boundary: the last byte counts, not the length.
    (0, 64 * P4, P4, &[(0x1800, 0x1000)], &[(1, 2)]),
    (0, 64 * P4, P4, &[(0x1fff, 2)], &[(1, 2)]),
    (0, 64 * P4, P4, &[(0x1000, 1)], &[(1, 1)]),
    (0x3000, 64 * P4, P4, &[(0x3000, 0x1000)], &[(0, 0)]),
    // Lengths that are no multiple of the page.
    (0, 0x5001, P4, &[(0, 0x5001)], &[(0, 5)]),
    // Clamped at the end, and at the start.
    (0, 0x6000, P4, &[(0x4000, 0x3000)], &[(4, 5)]),
    (0, 8 * P4, P4, &[(7 * P4, 2 * P4)], &[(7, 7)]),
    (0, 8 * P4, P4, &[(0, M)], &[(0, 7)]),
    (0x1_0000, 0x1_0000, P4, &[(0xf000, 0x2000)], &[(0, 0)]),
    (0x1_0000, 0x1_0000, P4, &[(0xf000, 0x1000)], &[]),
    (0x1_0000, 0x1_0000, P4, &[(0x2_0000, 0x1000)], &[]),
    // Over the 64 GiB of IOVA that the kernel's window had.
    (
        0,
        128 * G,
        P4,
        &[(64 * G - 4 * K, 8 * K)],
        &[(16_777_215, 16_777_216)],
    ),
    (
        0,
        128 * G,
        P4,
        &[(64 * G - 2 * M, 4 * M)],
        &[(16_776_704, 16_777_727)],
    ),
    // Over a page of the buffer, if it started at byte 4088 of one.
    (0, G, P4, &[(0, 128 * P4)], &[(0, 127)]),
    // Page sizes whose shift does not fit where 32 bits were used.
    (0, 64 * G, G, &[(5 * G, 2 * G)], &[(5, 6)]),
    (0, 512 * G, 4 * G, &[(8 * G, 8 * G)], &[(2, 3)]),
    (0, 0x1000, 1 << 63, &[(0, 0x1000)], &[(0, 0)]),
    (1 << 63, 1 << 63, 1 << 63, &[(u64::MAX, 1)], &[(0, 0)]),
    (0, G, P4, &[(2 * M, 2 * M)], &[(512, 1023)]),
    // A device that tracks finer than the bitmap's page.
    (0, G, P64, &[(0x1_2000, 0x1000)], &[(1, 1)]),
    (0, G, P64, &[(0x1_f000, 0x2000)], &[(1, 2)]),
    // The last page of the 64-bit space.
    (
        0u64.wrapping_sub(256 * K),
        256 * K,
        P4,
        &[(0u64.wrapping_sub(4 * K), 4 * K)],
        &[(63, 63)],
    ),
    (
        M,
        3 * G - M,
        P4,
        &[(3 * G - 4 * K, 4 * K)],
        &[(786_175, 786_175)],
    ),
    // No bytes, wherever.
    (0, G, P4, &[(0, 0), (0x1000, 0), (G, 0), (u64::MAX, 0)], &[]),
    (M, G, P4, &[(0, 0), (M, 0), (u64::MAX, 0)], &[]),
    // Lengths that would wrap.
    (M, G, P4, &[(M + G - 1, u64::MAX)], &[(262_143, 262_143)]),
    (M, 2 * P4, P4, &[(0, u64::MAX)], &[(0, 1)]),
    (
        0u64.wrapping_sub(P4),
        P4,
        P4,
        &[(u64::MAX, u64::MAX)],
        &[(0, 0)],
    ),
    // Whole words and their edges.
    (0, G, P4, &[(63 * P4, 66 * P4)], &[(63, 128)]),
    (0, G, P4, &[(64 * P4, 64 * P4)], &[(64, 127)]),
    (
        0,
        300,
        1,
        &[(0, 1), (2, 1), (299, 5)],
        &[(0, 0), (2, 2), (299, 299)],
    ),
];

fn page(bytes: u64) -> PageSize {
    PageSize::new(bytes).unwrap()
}

/// The runs of set bits by testing one after the other in the words.
fn bit_runs(bitmap: &IovaBitmap) -> Vec<(u64, u64)> {
    let mut runs: Vec<(u64, u64)> = Vec::new();
    for (index, word) in bitmap.words().iter().enumerate() {
        for bit in (0..64).filter(|bit| word & (1 << bit) != 0) {
            let n = index as u64 * 64 + bit;
            match runs.last_mut() {
                Some((_, last)) if *last + 1 == n => *last = n,
                _ => runs.push((n, n)),
            }
        }
    }
    runs
}

#[test]
fn vectors_of_the_kernel() {
    for (base, len, page_bytes, sets, expected) in VECTORS {
        let mut bitmap = IovaBitmap::new(Iova(*base), *len, page(*page_bytes)).unwrap();
        for (iova, len) in *sets {
            bitmap.set(Iova(*iova), *len);
        }
        let what = format!("base {base:#x} len {len:#x} page {page_bytes:#x} set {sets:x?}");
        assert_eq!(bit_runs(&bitmap), *expected, "{what}");
        let pages: u64 = expected.iter().map(|(first, last)| last - first + 1).sum();
        assert_eq!(bitmap.count(), pages, "{what}");
        assert_eq!(bitmap.is_empty(), pages == 0, "{what}");
        let last = base + (len - 1);
        let ranges: Vec<_> = expected
            .iter()
            .map(|(first, end)| {
                let start = base + first * page_bytes;
                let end = u128::from(*base) + u128::from(end + 1) * u128::from(*page_bytes) - 1;
                let end = u64::try_from(end.min(last.into())).unwrap();
                IovaRange::from_ends(Iova(start), Iova(end)).unwrap()
            })
            .collect();
        assert_eq!(bitmap.runs().collect::<Vec<_>>(), ranges, "{what}");
    }
}

#[test]
fn the_layout_is_the_kernels() {
    let mut bitmap = IovaBitmap::new(Iova(0x10_0000), G, PageSize::SIZE_4K).unwrap();
    bitmap.set(Iova(0x10_0000 + 77 * P4), 1);
    assert_eq!(bitmap.words()[77 / 64], 1 << (77 % 64));
    let bytes: Vec<u8> = bitmap
        .words()
        .iter()
        .flat_map(|word| word.to_le_bytes())
        .collect();
    assert_eq!(bytes[77 / 8], 1 << (77 % 8));
}

#[test]
fn bitmaps_that_cannot_be_are_refused() {
    let new = |base, len, bytes| IovaBitmap::new(Iova(base), len, page(bytes));
    assert!(matches!(
        new(0x800, G, P4),
        Err(BitmapError::Misaligned { .. })
    ));
    assert!(matches!(new(0, 0, P4), Err(BitmapError::BadRange { .. })));
    assert!(matches!(
        new(u64::MAX, 2, 1),
        Err(BitmapError::BadRange { .. })
    ));
    assert!(matches!(
        new(0, MAX_PAGES * P4 + 1, P4),
        Err(BitmapError::TooManyPages { pages, page_bytes: P4 }) if pages == MAX_PAGES + 1
    ));
    let everything = IovaRange::from_ends(Iova(0), Iova(u64::MAX)).unwrap();
    assert!(matches!(
        IovaBitmap::over(everything, page(1)),
        Err(BitmapError::TooManyPages {
            pages: u64::MAX,
            ..
        })
    ));
    for bytes in [0, 0x3000, u64::MAX] {
        assert_eq!(PageSize::new(bytes), None, "{bytes:#x} is no power of two");
    }
}

#[test]
fn the_whole_address_space_fits_in_large_pages() {
    let everything = IovaRange::from_ends(Iova(0), Iova(u64::MAX)).unwrap();
    let mut bitmap = IovaBitmap::over(everything, page(1 << 44)).unwrap();
    assert_eq!(bitmap.pages(), 1 << 20);
    bitmap.set_all();
    assert_eq!(bitmap.runs().collect::<Vec<_>>(), [everything]);
    bitmap.clear_range(IovaRange::from_ends(Iova(1), Iova(u64::MAX)).unwrap());
    assert_eq!(bitmap.count(), 1, "the first page is not wholly cleared");
}

#[test]
fn words_of_a_misaligned_base_are_refused_and_set_nothing() {
    let mut bitmap = IovaBitmap::new(Iova(0), G, PageSize::SIZE_4K).unwrap();
    let result = bitmap.or_words(Iova(0x8000), page(P64), &[u64::MAX]);
    assert!(matches!(
        result,
        Err(BitmapError::Misaligned {
            page_bytes: P64,
            ..
        })
    ));
    assert!(bitmap.is_empty());
}

#[test]
fn foreign_words_land_where_they_belong() {
    // Bitmap of 130 pages of 4 KiB from 1 MiB.
    type Case = (u64, u64, &'static [u64], &'static [(u64, u64)]);
    let cases: &[Case] = &[
        (M, P4, &[1, 0, 0b11], &[(0, 0), (128, 129)]),
        // The bits beyond page 129 are left out.
        (M, P4, &[0, 0, u64::MAX, u64::MAX], &[(128, 129)]),
        // Whole words off, both ways.
        (M + 64 * P4, P4, &[1 << 63], &[(127, 127)]),
        (M - 64 * P4, P4, &[u64::MAX, 0b10], &[(1, 1)]),
        // Shifted over words, both ways.
        (M + P4, P4, &[u64::MAX], &[(1, 64)]),
        (M - P4, P4, &[1 << 63, 1], &[(62, 63)]),
        (M - 63 * P4, P4, &[u64::MAX], &[(0, 0)]),
        // Wholly outside.
        (M - 64 * P4, P4, &[u64::MAX], &[]),
        (M + 130 * P4, P4, &[u64::MAX], &[]),
        (0u64.wrapping_sub(P4), P4, &[u64::MAX, u64::MAX], &[]),
        // Coarser: one bit is many; from before the bitmap too.
        (M, P64, &[0b10], &[(16, 31)]),
        (0, 2 * M, &[1], &[(0, 129)]),
        (M - P64, P64, &[0b11], &[(0, 15)]),
        // Finer: many bits are one.
        (M, 512, &[0x1_0101], &[(0, 2)]),
        (M - 512, 512, &[0b11], &[(0, 0)]),
        (0, 1 << 63, &[1, 1], &[(0, 129)]),
    ];
    for (base, page_bytes, words, expected) in cases {
        let mut bitmap = IovaBitmap::new(Iova(M), 130 * P4, PageSize::SIZE_4K).unwrap();
        bitmap
            .or_words(Iova(*base), page(*page_bytes), words)
            .unwrap();
        assert_eq!(
            bit_runs(&bitmap),
            *expected,
            "{base:#x} {page_bytes:#x} {words:x?}"
        );
    }
}

#[test]
fn or_and_merge_never_clear() {
    let mut bitmap = IovaBitmap::new(Iova(0), G, PageSize::SIZE_4K).unwrap();
    bitmap.set_all();
    bitmap
        .or_words(Iova(0), PageSize::SIZE_4K, &[0; 4])
        .unwrap();
    bitmap.merge(&IovaBitmap::new(Iova(0), G, PageSize::SIZE_4K).unwrap());
    assert_eq!(bitmap.count(), bitmap.pages());
}

#[test]
fn bits_beyond_the_last_page_are_ignored() {
    // 65 pages and a bit: 66, with 62 bits of the last word beyond.
    let mut bitmap = IovaBitmap::new(Iova(0), 65 * P4 + 1, PageSize::SIZE_4K).unwrap();
    bitmap.words_mut()[1] = !0b11;
    assert!(bitmap.is_empty());
    assert_eq!(bitmap.count(), 0);
    assert_eq!(bitmap.runs().next(), None);
    assert!(!bitmap.contains(Iova(66 * P4)));
    let mut other = IovaBitmap::new(Iova(0), G, PageSize::SIZE_4K).unwrap();
    other.merge(&bitmap);
    assert!(other.is_empty());
    let mut coarse = IovaBitmap::new(Iova(0), G, page(P64)).unwrap();
    coarse.merge(&bitmap);
    assert!(coarse.is_empty());
    bitmap.words_mut()[1] = u64::MAX;
    bitmap.take_into(&mut other);
    assert_eq!(bit_runs(&other), [(64, 65)]);
}

#[test]
fn a_run_may_be_cut_and_gone_on_with() {
    let mut bitmap = IovaBitmap::new(Iova(M), G, PageSize::SIZE_4K).unwrap();
    bitmap.set(Iova(M + 60 * P4), 100 * P4);
    let run = |first: u64, pages: u64| IovaRange::new(Iova(M + first * P4), pages * P4);
    assert_eq!(bitmap.next_run(Iova(0), 10 * P4 + 5), run(60, 10));
    assert_eq!(bitmap.next_run(Iova(M + 70 * P4), u64::MAX), run(70, 90));
    assert_eq!(bitmap.next_run(Iova(M + 159 * P4 + 7), 0), run(159, 1));
    assert_eq!(bitmap.next_run(Iova(M + 160 * P4), u64::MAX), None);
    assert_eq!(bitmap.next_run(Iova(u64::MAX), u64::MAX), None);
}

#[test]
fn what_a_smaller_target_does_not_cover_stays() {
    let mut from = IovaBitmap::new(Iova(0), 64 * P64, page(P64)).unwrap();
    let mut into = IovaBitmap::new(Iova(P64 + P4), 2 * P64, PageSize::SIZE_4K).unwrap();
    from.set_all();
    from.take_into(&mut into);
    assert_eq!(into.count(), into.pages());
    // Only page 2 of `from` lies wholly in `into`.
    assert_eq!(bit_runs(&from), [(0, 1), (3, 63)]);
}

#[test]
fn the_buffer_is_page_aligned_present_and_not_for_children() {
    let mut bitmap = IovaBitmap::new(Iova(0), 4 * G, PageSize::SIZE_4K).unwrap();
    let words = bitmap.words_mut();
    let (address, bytes) = (words.as_ptr().addr(), size_of_val(words));
    assert_eq!(address % rustix::param::page_size(), 0);
    // The kernel may have put neighbouring mappings of the same kind into one, so the smaps entry
    // is the one that holds the buffer.
    let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let mut holds = false;
    let mut entry = Vec::new();
    for line in smaps.lines() {
        let bounds = line
            .split(' ')
            .next()
            .and_then(|bounds| bounds.split_once('-'));
        let parse = |hex: &str| usize::from_str_radix(hex, 16).ok();
        if let Some((Some(start), Some(end))) =
            bounds.map(|(start, end)| (parse(start), parse(end)))
        {
            holds = start <= address && address + bytes <= end;
        }
        if holds {
            entry.push(line.split_whitespace().collect::<Vec<_>>());
        }
    }
    let field = |name: &str| entry.iter().find(|line| line[0] == name).unwrap();
    assert!(field("VmFlags:").contains(&"dc"), "VM_DONTCOPY is set");
    assert_eq!(field("Rss:")[1], field("Size:")[1], "every page is there");
}
