//! Who owns which RAM: DMA buffers first, the verified pages from the rest.

use core::ptr::without_provenance_mut;

use guest_logic::args::Args;
use guest_logic::pattern::{PAGE_BYTES, Page};
use guest_logic::sequence::Tracker;

use crate::boot_info::{StartInfo, usize_of};
use crate::mmio::Mmio;
use crate::paging;

/// Most stretches of RAM kept; maps have two or three.
const MAX_STRETCHES: usize = 16;
/// Below this lie the image and what the loader passed.
const DEFAULT_FLOOR_MIB: u64 = 16;
const MIB: u64 = 1 << 20;

unsafe extern "C" {
    /// End of the image, in `link.ld`.
    static image_end: u8;
}

#[derive(Clone, Copy, Default)]
struct Stretch {
    base: u64,
    len: u64,
}

/// Types for which memory of zero bits holds a value.
///
/// # Safety
/// Zero bits must be a valid value, and its alignment at most a page.
pub(crate) unsafe trait Zeroable {}
// SAFETY: integers.
unsafe impl Zeroable for u8 {}
// SAFETY: integers.
unsafe impl Zeroable for u16 {}
// SAFETY: integers.
unsafe impl Zeroable for u32 {}
// SAFETY: integers.
unsafe impl Zeroable for u64 {}
// SAFETY: made of integers only; zero bits are its start, as it documents.
unsafe impl Zeroable for Tracker {}

/// RAM nobody has taken yet.
pub(crate) struct Ram {
    stretches: [Stretch; MAX_STRETCHES],
    count: usize,
}

impl Ram {
    /// The loader's memory map above the image. Without a map, `ram=` on the
    /// command line says how many MiB there are.
    pub(crate) fn of(info: &StartInfo, args: &Args<'_>) -> Self {
        let image = (&raw const image_end).addr() as u64;
        let floor = image.max(args.number("lo", DEFAULT_FLOOR_MIB) * MIB);
        let mut ram = Self {
            stretches: [Stretch::default(); MAX_STRETCHES],
            count: 0,
        };
        for entry in info.ram() {
            ram.add(entry.base, entry.base.saturating_add(entry.len), floor);
        }
        if ram.count == 0 {
            ram.add(0, args.number("ram", 64) * MIB, floor);
        }
        ram
    }

    fn add(&mut self, base: u64, end: u64, floor: u64) {
        let base = base.max(floor).next_multiple_of(PAGE_BYTES);
        let end = end & !(PAGE_BYTES - 1);
        if base < end && self.count < MAX_STRETCHES && paging::map(base, end - base) {
            self.stretches[self.count] = Stretch {
                base,
                len: end - base,
            };
            self.count += 1;
        }
    }

    /// Takes zeroed memory for a device, in one piece, page aligned.
    pub(crate) fn take_dma(&mut self, bytes: u64) -> Option<Mmio> {
        let base = self.take(bytes)?;
        // SAFETY: mapped by `add`; `take` gave it to nobody else.
        let memory = unsafe { Mmio::new(base, bytes) };
        (0..bytes / 8).for_each(|word| memory.write(word * 8, 0u64));
        Some(memory)
    }

    /// Takes memory for `count` values, zeroed.
    pub(crate) fn take_slice<T: Zeroable>(&mut self, count: u64) -> Option<&'static mut [T]> {
        let bytes = (size_of::<T>() as u64).checked_mul(count)?;
        let base = without_provenance_mut::<T>(usize_of(self.take(bytes)?));
        let count = usize_of(count);
        // SAFETY: RAM mapped by `add` and given to nobody else, for ever; page
        // aligned; zeroed first, and zero bits are a valid `T` (`Zeroable`).
        unsafe {
            base.write_bytes(0, count);
            Some(core::slice::from_raw_parts_mut(base, count))
        }
    }

    /// Takes `bytes`, page aligned, off the end of the largest stretch.
    /// Nobody else is ever given them.
    fn take(&mut self, bytes: u64) -> Option<u64> {
        let bytes = bytes.next_multiple_of(PAGE_BYTES);
        let largest = self
            .stretches
            .iter_mut()
            .max_by_key(|stretch| stretch.len)?;
        largest.len = largest.len.checked_sub(bytes)?;
        Some(largest.base + largest.len)
    }

    /// Makes the verified pages of the first `bytes` left (all when 0).
    pub(crate) fn into_pages(self, bytes: u64) -> Pages {
        let mut left = if bytes == 0 { u64::MAX } else { bytes };
        let mut pages = Pages {
            runs: [&[]; MAX_STRETCHES],
        };
        for (run, stretch) in pages.runs.iter_mut().zip(self.stretches) {
            let len = stretch.len.min(left) & !(PAGE_BYTES - 1);
            left -= len;
            if len != 0 {
                // SAFETY: RAM by the loader's map, mapped by `add`, page
                // aligned, above the image; `self` is consumed and `take`
                // shortened it, so only these words refer to it. Any bits are
                // valid words. RAM is never taken away.
                *run = unsafe {
                    core::slice::from_raw_parts(
                        core::ptr::without_provenance(usize_of(stretch.base)),
                        usize_of(len / PAGE_BYTES),
                    )
                };
            }
        }
        pages
    }
}

/// The verified pages, numbered from 0 across all stretches.
#[derive(Clone, Copy)]
pub(crate) struct Pages {
    runs: [&'static [Page]; MAX_STRETCHES],
}

impl Pages {
    /// How many there are.
    pub(crate) fn count(&self) -> u64 {
        self.runs.iter().map(|run| run.len() as u64).sum()
    }

    /// The pages from number `first` to the end of their stretch, at most
    /// `limit`; empty beyond the last.
    pub(crate) fn run(&self, first: u64, limit: u64) -> &'static [Page] {
        let mut skip = first;
        for run in self.runs {
            let len = run.len() as u64;
            if skip < len {
                let end = len.min(skip.saturating_add(limit));
                return &run[usize_of(skip)..usize_of(end)];
            }
            skip -= len;
        }
        &[]
    }
}

/// A page's guest physical address: memory is identity mapped.
pub(crate) fn address_of(page: &Page) -> u64 {
    core::ptr::from_ref(page).addr() as u64
}
