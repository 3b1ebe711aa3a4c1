//! Which pages of a range of I/O virtual addresses were written.
//!
//! A live migration copies a guest's memory while the guest, its devices and the VMM go on writing
//! it. Each of these writers can say which pages it wrote: KVM by its dirty log, a device or an
//! IOMMU by a VFIO or iommufd report, another process by a shared log. All speak in bitmaps, each at
//! a page size and from a base of its own. [`IovaBitmap`] is the one type they all report into and
//! the migration loop reads from.
//!
//! ```
//! use iova_bitmap::{Iova, IovaBitmap, PageSize};
//!
//! // 1 MiB from IOVA 1 MiB on, a bit for each 4 KiB.
//! let mut dirty = IovaBitmap::new(Iova(0x10_0000), 0x10_0000, PageSize::SIZE_4K)?;
//! dirty.set(Iova(0x10_1fff), 2); // two bytes, two pages
//!
//! let run = dirty.runs().next().expect("one run");
//! assert_eq!((run.first(), run.last()), (Iova(0x10_1000), Iova(0x10_2fff)));
//! # Ok::<(), iova_bitmap::BitmapError>(())
//! ```
//!
//! # Layout
//!
//! Page `n = (iova - base) >> shift` is bit `n % 64` of word `n / 64`. In memory the words are
//! little-endian, so the same page is bit `n % 8` of byte `n / 8`: the layout of the kernel's
//! `iova_bitmap` (drivers/iommu/iommufd/iova_bitmap.c) and so of every VFIO and iommufd dirty
//! report. (The formulas in the kernel's comments differ; they index by the absolute IOVA and pick
//! bit `iova % 64`, which is bit 0 for every page. The code does what is said here.)
//!
//! # What is promised
//!
//! - A write of any length at any address sets every page it touches; ranges are clamped to the
//!   bitmap, and the last byte of the 64-bit space can be in one. Nothing wraps.
//! - Page sizes are any power of two from 1 B to 2^63 B; a length need not be a multiple of one.
//!   The last page may be cut short by the bitmap's end; ranges given out end there.
//! - [`words_mut`](IovaBitmap::words_mut) is page-aligned, present memory which may be given to a
//!   kernel report (with feature `std`). Bits beyond the last page are ignored wherever they come
//!   from.
//! - Nothing but `clear`, `clear_range`, `retarget`, `drain` and `take_into` makes a page clean;
//!   `drain` only what it has given out, `take_into` only what the other bitmap then holds.
//! - Misuse (a range beyond 2^64, a base that starts no page, a size that no memory holds) is a
//!   [`BitmapError`], never a wrong bit.
//! - Nothing allocates but the making of a bitmap; [`retarget`](IovaBitmap::retarget) uses one
//!   again for another range.
//!
//! # A report of a device
//!
//! A device that tracks at another page size, or a kernel, gives words. They are ORed in:
//!
//! ```
//! use iova_bitmap::{Iova, IovaBitmap, PageSize};
//!
//! let mut dirty = IovaBitmap::new(Iova(0), 1 << 30, PageSize::SIZE_4K)?;
//! // A NIC with pages of 64 KiB says that its page 1 was written: 16 of ours.
//! let pages = dirty.or_words(Iova(0), PageSize::new(65536).expect("a power of two"), &[0b10])?;
//! assert_eq!((pages, dirty.count()), (16, 16));
//! # Ok::<(), iova_bitmap::BitmapError>(())
//! ```
//!
//! # Windows
//!
//! Kernels before 6.11 report at most 64 GiB at a time, and memory in a cache is merged faster than
//! memory that is not. [`windows_mut`](IovaBitmap::windows_mut) cuts a bitmap into windows of a
//! chosen size, whose words can be filled by several threads:
//!
//! ```
//! use iova_bitmap::{Iova, IovaBitmap, PageSize};
//!
//! let mut dirty = IovaBitmap::new(Iova(0), 4 << 30, PageSize::SIZE_4K)?;
//! std::thread::scope(|scope| {
//!     for window in dirty.windows_mut(1 << 30) {
//!         scope.spawn(move || window.words[0] |= 1); // a report for `window.range`
//!     }
//! });
//! assert_eq!(dirty.count(), 4);
//! # Ok::<(), iova_bitmap::BitmapError>(())
//! ```
//!
//! # Taking
//!
//! Who sends a page must no longer count it as dirty, but must be able to put it back until it has
//! arrived. [`take_into`](IovaBitmap::take_into) moves pages between bitmaps,
//! [`drain`](IovaBitmap::drain) gives runs out and leaves zeroes behind:
//!
//! ```
//! use iova_bitmap::{Iova, IovaBitmap, PageSize};
//!
//! let mut dirty = IovaBitmap::new(Iova(0), 1 << 30, PageSize::SIZE_4K)?;
//! let mut in_flight = IovaBitmap::new(Iova(0), 1 << 30, PageSize::SIZE_4K)?;
//! dirty.set(Iova(0x3000), 0x5000);
//! for run in dirty.drain() {
//!     in_flight.set_range(run); // and send it
//! }
//! assert!(dirty.is_empty());
//! in_flight.take_into(&mut dirty); // it did not arrive
//! assert_eq!(dirty.count(), 5);
//! # Ok::<(), iova_bitmap::BitmapError>(())
//! ```
//!
//! # Speed
//!
//! Everything goes a word at a time: empty and full stretches by wide compares, runs by counting
//! zeroes. Feature `std` picks AVX2 or AVX-512 at run time; the results are those of the portable
//! code, which property tests hold. `cargo bench -p iova-bitmap` compares with reading the memory
//! once, with a bit-by-bit walk and with `vm-memory`'s `AtomicBitmap`.
//!
//! # Without `std`
//!
//! Only `alloc` is needed. Buffers are then page-aligned and zeroed, but nobody has told the kernel
//! to keep them present: give them to no kernel report.

#![cfg_attr(not(feature = "std"), no_std)]
#![deny(unsafe_code)]

extern crate alloc;

mod addr;
mod bitmap;
mod bits;
mod error;
#[cfg(test)]
mod naive;
#[cfg(test)]
mod properties;
mod raw;
mod runs;
#[cfg(test)]
mod tests;
mod windows;

pub use addr::{Iova, IovaRange, PageSize};
pub use bitmap::{IovaBitmap, MAX_PAGES};
pub use error::{BitmapError, NoMemory};
pub use runs::{Drain, Runs};
pub use windows::{Window, Windows};
