//! The loops of [`kernels`](crate::bits::kernels), compiled three times: for any CPU, for one with
//! AVX2 and for one with AVX-512. Which is run is decided by what the CPU says.
//!
//! There are no intrinsics: the loops are plain Rust that the compiler vectorises for the
//! instruction set it is given, so all three do the same by construction. The invariant: a function
//! compiled for features is called only where [`Level::detect`] found all of them.

use crate::bits::kernels;

/// Which compiled form of the loops a CPU can run.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) enum Level {
    /// Any CPU.
    Portable,
    /// AVX2, BMI1, BMI2, LZCNT, POPCNT.
    #[cfg(all(feature = "std", target_arch = "x86_64"))]
    Avx2,
    /// Those, and AVX-512 F, BW, VL, VPOPCNTDQ.
    #[cfg(all(feature = "std", target_arch = "x86_64"))]
    Avx512,
}

impl Level {
    /// The best for this CPU. The standard library remembers what the CPU said, so this is a load
    /// and a few tests.
    #[cfg(all(feature = "std", target_arch = "x86_64"))]
    pub(crate) fn detect() -> Self {
        use std::arch::is_x86_feature_detected as has;
        let avx2 = has!("avx2") && has!("bmi1") && has!("bmi2") && has!("lzcnt") && has!("popcnt");
        let avx512 =
            has!("avx512f") && has!("avx512bw") && has!("avx512vl") && has!("avx512vpopcntdq");
        match (avx2, avx512) {
            (true, true) => Self::Avx512,
            (true, false) => Self::Avx2,
            (false, _) => Self::Portable,
        }
    }

    /// The best for this CPU.
    #[cfg(not(all(feature = "std", target_arch = "x86_64")))]
    pub(crate) fn detect() -> Self {
        Self::Portable
    }

    /// The forms this CPU can run, for tests that compare them.
    #[cfg(test)]
    pub(crate) fn all() -> impl Iterator<Item = Self> {
        let levels = [
            Self::Portable,
            #[cfg(all(feature = "std", target_arch = "x86_64"))]
            Self::Avx2,
            #[cfg(all(feature = "std", target_arch = "x86_64"))]
            Self::Avx512,
        ];
        levels.into_iter().filter(|level| *level <= Self::detect())
    }
}

/// For each loop: `name(args)` runs the best form, `at_level::name(level, args)` a given one.
macro_rules! dispatched {
    ($( $(#[$doc:meta])* fn $name:ident($($arg:ident: $type:ty),*) -> $result:ty; )*) => {
        $(
            $(#[$doc])*
            #[inline]
            pub(crate) fn $name($($arg: $type),*) -> $result {
                at_level::$name(Level::detect(), $($arg),*)
            }
        )*

        pub(crate) mod at_level {
            use super::*;

            $(
                #[inline]
                pub(crate) fn $name(level: Level, $($arg: $type),*) -> $result {
                    match level {
                        Level::Portable => kernels::$name($($arg),*),
                        #[cfg(all(feature = "std", target_arch = "x86_64"))]
                        // SAFETY: only `Level::detect` makes this level, where the CPU has all the
                        // features that the function is compiled for.
                        Level::Avx2 => unsafe { avx2::$name($($arg),*) },
                        #[cfg(all(feature = "std", target_arch = "x86_64"))]
                        // SAFETY: as above.
                        Level::Avx512 => unsafe { avx512::$name($($arg),*) },
                    }
                }
            )*
        }

        #[cfg(all(feature = "std", target_arch = "x86_64"))]
        mod avx2 {
            use super::*;

            $(
                #[target_feature(enable = "avx2,bmi1,bmi2,lzcnt,popcnt")]
                pub(super) fn $name($($arg: $type),*) -> $result {
                    kernels::$name($($arg),*)
                }
            )*
        }

        #[cfg(all(feature = "std", target_arch = "x86_64"))]
        mod avx512 {
            use super::*;

            $(
                #[target_feature(
                    enable = "avx2,bmi1,bmi2,lzcnt,popcnt,avx512f,avx512bw,avx512vl,avx512vpopcntdq"
                )]
                pub(super) fn $name($($arg: $type),*) -> $result {
                    kernels::$name($($arg),*)
                }
            )*
        }
    };
}

dispatched! {
    /// The index of the first word that is not `idle` (0 or all ones), or the number of words.
    fn skip(words: &[u64], idle: u64) -> usize;
    /// How many bits are set.
    fn count(words: &[u64]) -> u64;
    /// ORs `source` into `target` word by word as far as both go; gives the bits set in that part
    /// of `source`.
    fn or(target: &mut [u64], source: &[u64]) -> u64;
    /// As `or`, and leaves zeroes in that part of `source`.
    fn take(target: &mut [u64], source: &mut [u64]) -> u64;
    /// ORs `source << up` (1 to 63 bits) into `target`, with `carry` in the low bits of the first
    /// word, until one ends (`source` one word later, with what was shifted out); gives the bits
    /// ORed.
    fn or_shifted(target: &mut [u64], source: &[u64], up: u32, carry: u64) -> u64;
    /// Appends to `edges` where the bits of `words` change, bit 0 of them being bit `base` and the
    /// bit before it `before`; stops when `edges` might not hold those of one more word. Gives the
    /// words looked at.
    fn edges(words: &[u64], base: u64, before: bool, edges: &mut kernels::Edges) -> usize;
}
