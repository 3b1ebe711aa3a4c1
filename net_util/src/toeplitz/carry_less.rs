//! The hash by multiplication of polynomials over GF(2), which is what PCLMULQDQ does.
//!
//! # Derivation
//! Let d₀, d₁, … be the input's bits and k₀, k₁, … the key's, both from the highest bit of the
//! first byte on, and h₀ … h₃₁ the hash's, h₀ the highest. By definition
//!
//! ```text
//! hⱼ = Σᵢ dᵢ · kᵢ₊ⱼ        (sums over GF(2): XOR)
//! ```
//!
//! Take 64 bits of the input, from bit s on, as a big-endian number: D = Σᵢ dₛ₊ᵢ · x^(63−i). Take
//! 95 bits of the key from the same place, the *other* way round and in two parts:
//!
//! ```text
//! A = Σₘ kₛ₊ₘ · x^(m+1)    m = 0 … 62
//! B = Σₘ kₛ₊ₘ · x^(m−63)   m = 63 … 94
//! ```
//!
//! In D·A the term of dₛ₊ᵢ·kₛ₊ₘ is at x^(64+m−i), in D·B at x^(m−i). So with j = m − i, what these
//! 64 bits add to hⱼ is at x^(64+j) of D·A plus x^j of D·B; and as 0 ≤ i ≤ 63 and 0 ≤ j ≤ 31, the
//! m of either part or the other are all there are. Hence
//!
//! ```text
//! the hash, h₀ lowest = low 32 bits of (Σ D·A >> 64  ⊕  Σ D·B)      (sums over all s = 0, 64, …)
//! ```
//!
//! and one reversal of 32 bits in the end. If D has but 32 bits of input, at its top, then i ≤ 31
//! and m ≤ 62: D·B is not needed. So each 4 bytes of input cost one multiplication.
//!
//! # Many at a time
//! VPCLMULQDQ makes two of these multiplications at once, one in each half of a register: a packet
//! in each half, four registers in a group, so that eight hashes share one reversal.
//!
//! The other known way is GF2P8AFFINEQB, which multiplies by 8×8 matrices: per packet it takes an
//! instruction for each 8 bytes of input and the 3 behind, and a sum across the register. CPUs
//! that have it with AVX-512 have VPCLMULQDQ as well, so it would serve none.

#![expect(
    unsafe_code,
    reason = "functions compiled for instructions that not every CPU has are called here"
)]

use std::arch::is_x86_feature_detected as has;
use std::arch::x86_64::*;

use super::MAX_INPUT_BYTES;
use crate::hash::{HashKey, KEY_BYTES};

/// Words of 8 bytes in the longest input.
const WORDS: usize = MAX_INPUT_BYTES.div_ceil(8);

/// For each word of the input: A and B of the key.
type Parts = [[u64; 2]; WORDS];

/// Bit `index` of the key; bits past the end are 0.
fn key_bit(key: &[u8; KEY_BYTES], index: usize) -> u64 {
    let byte = key.get(index / 8).copied().unwrap_or(0);
    u64::from(byte >> (7 - index % 8) & 1)
}

fn parts(key: &HashKey) -> Parts {
    let key = key.as_bytes();
    std::array::from_fn(|word| {
        let bit = |m: usize| key_bit(key, word * 64 + m);
        let a = (0..63).fold(0, |a, m| a | bit(m) << (m + 1));
        let b = (63..95).fold(0, |b, m| b | bit(m) << (m - 63));
        [a, b]
    })
}

/// A key for PCLMULQDQ. The invariant: there is none on a CPU without it.
#[derive(Clone)]
pub(super) struct CarryLess {
    parts: Parts,
}

impl CarryLess {
    /// `None` if the CPU cannot.
    pub(super) fn new(key: &HashKey) -> Option<Self> {
        has!("pclmulqdq").then(|| Self { parts: parts(key) })
    }

    #[inline]
    pub(super) fn hash<const N: usize>(&self, input: &[u8; N]) -> u32 {
        // SAFETY: by the type's invariant the CPU has PCLMULQDQ.
        unsafe { one(&self.parts, input) }
    }

    /// The hash of 12 bytes: big-endian numbers of 8 and of 4.
    #[inline]
    pub(super) fn hash_12(&self, first: u64, last: u32) -> u32 {
        // SAFETY: as in `hash`.
        unsafe { twelve(&self.parts, first, last) }
    }

    pub(super) fn hash_many<const N: usize>(&self, inputs: &[[u8; N]], hashes: &mut [u32]) {
        // SAFETY: as in `hash`.
        unsafe { one_by_one(&self.parts, inputs, hashes) }
    }
}

/// A key for VPCLMULQDQ and AVX2. The invariant: there is none on a CPU without them.
#[derive(Clone)]
pub(super) struct Wide {
    /// The same for single packets.
    pub(super) one: CarryLess,
}

impl Wide {
    /// `None` if the CPU cannot.
    pub(super) fn new(key: &HashKey) -> Option<Self> {
        let one = CarryLess::new(key)?;
        (has!("vpclmulqdq") && has!("avx2")).then_some(Self { one })
    }

    pub(super) fn hash_many<const N: usize>(&self, inputs: &[[u8; N]], hashes: &mut [u32]) {
        // SAFETY: by the type's invariant the CPU has PCLMULQDQ, VPCLMULQDQ and AVX2.
        unsafe { eight_by_eight(&self.one.parts, inputs, hashes) }
    }
}

/// Bytes `word * 8` and on of the input as a big-endian number; what is past its end is 0.
#[inline]
fn big_endian(input: &[u8], word: usize) -> u64 {
    let rest = input.get(word * 8..).unwrap_or_default();
    if let Some(bytes) = rest.first_chunk::<8>() {
        u64::from_be_bytes(*bytes)
    } else if let Ok(bytes) = <[u8; 4]>::try_from(rest) {
        u64::from(u32::from_be_bytes(bytes)) << 32
    } else {
        let mut bytes = [0; 8];
        for (to, from) in bytes.iter_mut().zip(rest) {
            *to = *from;
        }
        u64::from_be_bytes(bytes)
    }
}

#[target_feature(enable = "pclmulqdq")]
#[inline]
fn one<const N: usize>(parts: &Parts, input: &[u8; N]) -> u32 {
    const { assert!(N <= MAX_INPUT_BYTES) };
    let words: [u64; WORDS] = std::array::from_fn(|word| big_endian(input, word));
    products(parts, words, N.div_ceil(4))
}

/// Numbers as arguments stay in registers.
#[target_feature(enable = "pclmulqdq")]
fn twelve(parts: &Parts, first: u64, last: u32) -> u32 {
    products(parts, [first, u64::from(last) << 32], 3)
}

/// The hash of the first `halves` half words of `words`.
#[target_feature(enable = "pclmulqdq")]
#[inline]
fn products<const W: usize>(parts: &Parts, words: [u64; W], halves: usize) -> u32 {
    let (mut with_a, mut with_b) = (_mm_setzero_si128(), _mm_setzero_si128());
    for (i, (word, part)) in words.into_iter().zip(parts).enumerate() {
        if i * 2 >= halves {
            break;
        }
        let data = _mm_cvtsi64_si128(word.cast_signed());
        let part = zerocopy::transmute!(*part);
        with_a = _mm_xor_si128(with_a, _mm_clmulepi64_si128::<0x00>(data, part));
        if i * 2 + 1 < halves {
            with_b = _mm_xor_si128(with_b, _mm_clmulepi64_si128::<0x10>(data, part));
        }
    }
    let sum = _mm_xor_si128(_mm_unpackhi_epi64(with_a, with_a), with_b);
    _mm_cvtsi128_si32(sum).cast_unsigned().reverse_bits()
}

#[target_feature(enable = "pclmulqdq")]
#[inline]
fn one_by_one<const N: usize>(parts: &Parts, inputs: &[[u8; N]], hashes: &mut [u32]) {
    for (hash, input) in hashes.iter_mut().zip(inputs) {
        *hash = one(parts, input);
    }
}

#[target_feature(enable = "pclmulqdq,vpclmulqdq,avx2")]
fn eight_by_eight<const N: usize>(parts: &Parts, inputs: &[[u8; N]], hashes: &mut [u32]) {
    const { assert!(N <= MAX_INPUT_BYTES && N >= 2) };
    let (groups, rest) = inputs.as_chunks::<8>();
    let (hash_groups, last_hashes) = hashes.as_chunks_mut::<8>();
    for (hashes, group) in hash_groups.iter_mut().zip(groups) {
        *hashes = zerocopy::transmute!(eight(parts, group));
    }
    one_by_one(parts, rest, last_hashes);
}

/// Where the blocks of 16 bytes of eight inputs of `N` bytes are, and how each becomes a
/// big-endian number.
struct Blocks<const N: usize>;

impl<const N: usize> Blocks<N> {
    const COUNT: usize = N.div_ceil(16);

    /// Where to load block `block` of input `input` from. The last of all starts earlier, so that
    /// nothing past the end is read.
    const fn start(input: usize, block: usize) -> usize {
        let start = input * N + block * 16;
        if start + 16 > 8 * N {
            8 * N - 16
        } else {
            start
        }
    }

    /// For each byte of the number, the lowest first: which byte of the load it is; 0x80 for a zero
    /// where the input has ended.
    const fn order(input: usize, block: usize) -> [u8; 16] {
        let skipped = input * N + block * 16 - Self::start(input, block);
        let mut order = [0x80; 16];
        let mut byte = 0;
        while byte < 16 && block * 16 + byte < N {
            #[expect(clippy::cast_possible_truncation, reason = "less than 16")]
            {
                order[15 - byte] = (skipped + byte) as u8;
            }
            byte += 1;
        }
        order
    }

    /// The same for the registers that hold blocks of inputs `i` and `i + 4`.
    const STARTS: [[[usize; 2]; 3]; 4] = {
        let mut starts = [[[0; 2]; 3]; 4];
        let mut at = 0;
        while at < 4 * Self::COUNT {
            let (input, block) = (at / Self::COUNT, at % Self::COUNT);
            starts[input][block] = [Self::start(input, block), Self::start(input + 4, block)];
            at += 1;
        }
        starts
    };
    const ORDERS: [[[[u8; 16]; 2]; 3]; 4] = {
        let mut orders = [[[[0; 16]; 2]; 3]; 4];
        let mut at = 0;
        while at < 4 * Self::COUNT {
            let (input, block) = (at / Self::COUNT, at % Self::COUNT);
            orders[input][block] = [Self::order(input, block), Self::order(input + 4, block)];
            at += 1;
        }
        orders
    };
}

/// The 16 bytes of `bytes` from `start` on.
#[inline]
fn load(bytes: &[u8], start: usize) -> [u8; 16] {
    let block = bytes.get(start..).and_then(|rest| rest.first_chunk());
    block.copied().unwrap_or_default()
}

/// The hashes of eight inputs, in their order.
#[target_feature(enable = "pclmulqdq,vpclmulqdq,avx2")]
#[inline]
fn eight<const N: usize>(parts: &Parts, inputs: &[[u8; N]; 8]) -> __m256i {
    let bytes = inputs.as_flattened();
    // Register i: inputs i and i + 4, so that what the last step gives is in order.
    let mut with_a = [_mm256_setzero_si256(); 4];
    let mut with_b = with_a;
    for (input, (with_a, with_b)) in with_a.iter_mut().zip(&mut with_b).enumerate() {
        for block in 0..Blocks::<N>::COUNT {
            let [low, high] = Blocks::<N>::STARTS[input][block];
            let data: __m256i = zerocopy::transmute!([load(bytes, low), load(bytes, high)]);
            let order = zerocopy::transmute!(Blocks::<N>::ORDERS[input][block]);
            let data = _mm256_shuffle_epi8(data, order);
            let left = N - block * 16;
            let part = |word: usize| {
                let part = parts.get(word).copied().unwrap_or_default();
                _mm256_broadcastsi128_si256(zerocopy::transmute!(part))
            };
            // The first word is the upper half of the number.
            let part_0 = part(block * 2);
            *with_a = _mm256_xor_si256(*with_a, _mm256_clmulepi64_epi128::<0x01>(data, part_0));
            if left > 4 {
                *with_b = _mm256_xor_si256(*with_b, _mm256_clmulepi64_epi128::<0x11>(data, part_0));
            }
            let part_1 = part(block * 2 + 1);
            if left > 8 {
                *with_a = _mm256_xor_si256(*with_a, _mm256_clmulepi64_epi128::<0x00>(data, part_1));
            }
            if left > 12 {
                *with_b = _mm256_xor_si256(*with_b, _mm256_clmulepi64_epi128::<0x10>(data, part_1));
            }
        }
    }
    let [a0, a1, a2, a3] = with_a;
    let [b0, b1, b2, b3] = with_b;
    reverse_bits(gather(sum(a0, a1, b0, b1), sum(a2, a3, b2, b3)))
}

/// Upper halves of the products with A plus lower halves of those with B: two sums of 64 bits in
/// each half of the register.
#[target_feature(enable = "avx2")]
#[inline]
fn sum(a0: __m256i, a1: __m256i, b0: __m256i, b1: __m256i) -> __m256i {
    _mm256_xor_si256(_mm256_unpackhi_epi64(a0, a1), _mm256_unpacklo_epi64(b0, b1))
}

/// The lower 32 bits of each 64.
#[target_feature(enable = "avx2")]
#[inline]
fn gather(first: __m256i, second: __m256i) -> __m256i {
    let (first, second) = (_mm256_castsi256_ps(first), _mm256_castsi256_ps(second));
    _mm256_castps_si256(_mm256_shuffle_ps::<0b10_00_10_00>(first, second))
}

/// Each 32 bits the other way round: first the bits of each half byte, by a table of 16, then the
/// halves and the bytes.
#[target_feature(enable = "avx2")]
#[inline]
fn reverse_bits(words: __m256i) -> __m256i {
    const HALVES: [u8; 16] = [0, 8, 4, 12, 2, 10, 6, 14, 1, 9, 5, 13, 3, 11, 7, 15];
    const UPPER: [u8; 16] = {
        let mut upper = HALVES;
        let mut i = 0;
        while i < 16 {
            upper[i] <<= 4;
            i += 1;
        }
        upper
    };
    const BYTES: [u8; 16] = [3, 2, 1, 0, 7, 6, 5, 4, 11, 10, 9, 8, 15, 14, 13, 12];
    let both = |table: [u8; 16]| _mm256_broadcastsi128_si256(zerocopy::transmute!(table));
    let half = _mm256_set1_epi8(0x0f);
    let lower = _mm256_and_si256(words, half);
    let upper = _mm256_and_si256(_mm256_srli_epi16::<4>(words), half);
    let bytes = _mm256_or_si256(
        _mm256_shuffle_epi8(both(UPPER), lower),
        _mm256_shuffle_epi8(both(HALVES), upper),
    );
    _mm256_shuffle_epi8(bytes, both(BYTES))
}
