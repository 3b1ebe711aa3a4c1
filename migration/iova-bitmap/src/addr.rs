//! I/O virtual addresses, ranges of them, and page sizes.

use core::fmt;

/// An address in a device's I/O virtual address space.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Iova(pub u64);

impl fmt::Debug for Iova {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Iova({:#x})", self.0)
    }
}

impl fmt::Display for Iova {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// A non-empty range of I/O virtual addresses, both ends inclusive so that the last byte of the
/// 64-bit space can be in one.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct IovaRange {
    first: Iova,
    last: Iova,
}

impl IovaRange {
    /// All 2^64 addresses.
    pub const ALL: Self = Self {
        first: Iova(0),
        last: Iova(u64::MAX),
    };

    /// The range of `len` bytes from `start`; `None` if it is empty or runs past 2^64.
    pub const fn new(start: Iova, len: u64) -> Option<Self> {
        if len == 0 {
            return None;
        }
        match start.0.checked_add(len - 1) {
            Some(last) => Some(Self {
                first: start,
                last: Iova(last),
            }),
            None => None,
        }
    }

    /// The range from `first` to `last`, both in it; `None` if `last` is before `first`.
    pub const fn from_ends(first: Iova, last: Iova) -> Option<Self> {
        if last.0 < first.0 {
            return None;
        }
        Some(Self { first, last })
    }

    /// As [`from_ends`](Self::from_ends), for a `last` known not to be before `first`.
    #[inline]
    pub(crate) const fn from_ordered(first: Iova, last: Iova) -> Self {
        debug_assert!(first.0 <= last.0);
        Self { first, last }
    }

    /// The addresses in both ranges; `None` if there are none.
    pub fn intersection(self, other: Self) -> Option<Self> {
        Self::from_ends(self.first.max(other.first), self.last.min(other.last))
    }

    /// First address.
    pub const fn first(self) -> Iova {
        self.first
    }

    /// Last address, inclusive.
    pub const fn last(self) -> Iova {
        self.last
    }

    /// Length in bytes; `None` for the one range that covers all 2^64.
    pub const fn len(self) -> Option<u64> {
        (self.last.0 - self.first.0).checked_add(1)
    }

    /// Always false: a range holds at least one address.
    pub const fn is_empty(self) -> bool {
        false
    }
}

/// A power-of-two page size in bytes, 1 B to 2^63 B.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct PageSize(u8);

impl PageSize {
    /// 4 KiB.
    pub const SIZE_4K: Self = Self(12);

    /// The page size of `bytes`; `None` unless it is a power of two.
    pub const fn new(bytes: u64) -> Option<Self> {
        if !bytes.is_power_of_two() {
            return None;
        }
        #[expect(
            clippy::cast_possible_truncation,
            reason = "trailing_zeros of a u64 is below 64"
        )]
        let shift = bytes.trailing_zeros() as u8;
        Some(Self(shift))
    }

    /// Size in bytes.
    pub const fn bytes(self) -> u64 {
        1 << self.0
    }

    /// log2 of the size.
    pub const fn shift(self) -> u32 {
        self.0 as u32
    }
}
