//! Bytes that anyone can compute from where they are, and their checksum.

/// The 64 bits at `index` of the sequence `seed` (the finaliser of SplitMix64).
pub(crate) const fn word(seed: u64, index: u64) -> u64 {
    let mut z = seed ^ index.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// The byte at `offset` of the sequence `seed`.
const fn byte(seed: u64, offset: u64) -> u8 {
    let bytes = word(seed, offset / 8).to_le_bytes();
    // The remainder picks one of 8.
    bytes[(offset % 8) as usize]
}

/// Puts the bytes from `offset` of the sequence `seed` into `bytes`.
pub(crate) fn fill(seed: u64, offset: u64, bytes: &mut [u8]) {
    for (byte, at) in bytes.iter_mut().zip(offset..) {
        *byte = self::byte(seed, at);
    }
}

/// The offset of the first of `bytes` that is not the one of the sequence `seed` there.
pub(crate) fn mismatch(seed: u64, offset: u64, bytes: &[u8]) -> Option<u64> {
    bytes
        .iter()
        .zip(offset..)
        .find(|(byte, at)| **byte != self::byte(seed, *at))
        .map(|(_, at)| at)
}

/// A running CRC-32C (Castagnoli), as in RFC 3720.
#[derive(Clone, Debug)]
pub(crate) struct Crc32c {
    state: u32,
    table: [u32; 256],
}

impl Crc32c {
    /// Of nothing yet.
    pub(crate) fn new() -> Self {
        let table = std::array::from_fn(|i| {
            // The index is below 256.
            let byte = u32::from(i.to_le_bytes()[0]);
            (0..8).fold(byte, |crc, _| {
                if crc & 1 == 0 {
                    crc >> 1
                } else {
                    crc >> 1 ^ 0x82f6_3b78
                }
            })
        });
        Self { state: !0, table }
    }

    /// Takes in more bytes.
    pub(crate) fn update(&mut self, bytes: &[u8]) {
        for byte in bytes {
            let index = self.state.to_le_bytes()[0] ^ byte;
            self.state = self.state >> 8 ^ self.table[usize::from(index)];
        }
    }

    /// The checksum of what was taken in.
    pub(crate) const fn value(&self) -> u32 {
        !self.state
    }
}
