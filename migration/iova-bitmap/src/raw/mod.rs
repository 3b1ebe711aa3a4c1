//! All of the crate's `unsafe`: memory that a kernel may be given, and loops compiled for
//! instruction sets that not every CPU has.
//!
//! Each has one invariant, told at the head of its module; nothing outside of here can break it.

#![expect(
    unsafe_code,
    reason = "mapping memory, and calling code compiled for a CPU's features, are unsafe by nature"
)]

#[cfg(feature = "std")]
mod mapped;
#[cfg(feature = "std")]
pub(crate) use mapped::PageBuffer;

#[cfg(not(feature = "std"))]
mod allocated;
#[cfg(not(feature = "std"))]
pub(crate) use allocated::PageBuffer;

mod dispatch;
#[cfg(test)]
pub(crate) use dispatch::{Level, at_level};
pub(crate) use dispatch::{count, edges, or, or_shifted, skip, take};
