//! Numbers that look random and are the same for everybody.

/// A generator: SplitMix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators").
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// One of its own for each pair of a seed and a number.
    pub fn new(seed: u64, number: u64) -> Self {
        let mut outer = Self(seed);
        let mut this = Self(outer.next() ^ number);
        // Neighbouring numbers must not begin alike.
        this.0 = this.next();
        this
    }

    /// 64 bits.
    pub const fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `end`, which is not 0.
    pub fn below(&mut self, end: u16) -> u16 {
        let number = self.next() % u64::from(end.max(1));
        u16::try_from(number).unwrap_or(0)
    }

    /// Whether one of `of` chances came true.
    pub fn one_in(&mut self, of: u16) -> bool {
        self.below(of) == 0
    }

    /// One of `choices`, which are not none.
    pub fn pick<'a, T>(&mut self, choices: &'a [T]) -> &'a T {
        let end = u16::try_from(choices.len()).unwrap_or(u16::MAX);
        &choices[usize::from(self.below(end))]
    }

    /// `N` bytes.
    pub fn bytes<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        self.fill(&mut bytes);
        bytes
    }

    /// So many bytes.
    pub fn vec(&mut self, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.fill(&mut bytes);
        bytes
    }

    fn fill(&mut self, bytes: &mut [u8]) {
        for chunk in bytes.chunks_mut(8) {
            let next = self.next().to_le_bytes();
            chunk.copy_from_slice(&next[..chunk.len()]);
        }
    }
}
