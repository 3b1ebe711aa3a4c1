//! The inner loops, in plain Rust that a compiler vectorises. They are called through
//! [`raw`](crate::raw), which has them compiled for several instruction sets.

/// Words tested at once for all being the same: 256 bytes, four of the widest registers.
const STRIDE: usize = 32;

/// Where bits change, in rising order: a run's first bit, the bit behind its last, the next run's
/// first bit, and so on. Runs over word boundaries are one.
#[derive(Clone)]
pub(crate) struct Edges {
    at: [u64; Self::CAPACITY],
    head: usize,
    len: usize,
}

impl Edges {
    /// A word has up to 64 edges, so this takes the densest bits of three words.
    const CAPACITY: usize = 192;
    /// The most edges of one word.
    const ROOM: usize = 64;

    pub(crate) const fn new() -> Self {
        Self {
            at: [0; Self::CAPACITY],
            head: 0,
            len: 0,
        }
    }

    pub(crate) fn clear(&mut self) {
        (self.head, self.len) = (0, 0);
    }

    /// The next two edges, taken: a run's first bit and the bit behind it.
    #[inline]
    pub(crate) fn pop_run(&mut self) -> Option<(u64, u64)> {
        match self.at.get(self.head..self.len) {
            Some([first, end, ..]) => {
                self.head += 2;
                Some((*first, *end))
            }
            _ => None,
        }
    }

    /// All runs that are in it whole, taken.
    #[inline]
    pub(crate) fn pop_runs(&mut self) -> &[[u64; 2]] {
        let (runs, _) = self
            .at
            .get(self.head..self.len)
            .unwrap_or_default()
            .as_chunks();
        self.head += 2 * runs.len();
        runs
    }

    /// The next edge, taken.
    pub(crate) fn pop(&mut self) -> Option<u64> {
        if self.head >= self.len {
            return None;
        }
        let edge = self.at.get(self.head).copied();
        self.head += 1;
        edge
    }

    pub(crate) fn has_more(&self) -> bool {
        self.head < self.len
    }
}

#[inline(always)]
pub(crate) fn skip(words: &[u64], idle: u64) -> usize {
    let mut chunks = words.chunks_exact(STRIDE);
    let mut skipped = 0;
    for chunk in chunks.by_ref() {
        if chunk.iter().fold(0, |all, word| all | (word ^ idle)) != 0 {
            return skipped + first_other(chunk, idle);
        }
        skipped += STRIDE;
    }
    skipped + first_other(chunks.remainder(), idle)
}

#[inline(always)]
fn first_other(words: &[u64], idle: u64) -> usize {
    let other = words.iter().position(|word| *word != idle);
    other.unwrap_or(words.len())
}

#[inline(always)]
pub(crate) fn count(words: &[u64]) -> u64 {
    words.iter().map(|word| u64::from(word.count_ones())).sum()
}

#[inline(always)]
pub(crate) fn or(target: &mut [u64], source: &[u64]) -> u64 {
    let mut ones = 0;
    let len = target.len().min(source.len());
    let (target, source) = (&mut target[..len], &source[..len]);
    let mut chunks = target.chunks_exact_mut(STRIDE);
    let mut sources = source.chunks_exact(STRIDE);
    // Clean stretches are not written to, so their cache lines stay as they are.
    for (into, from) in chunks.by_ref().zip(sources.by_ref()) {
        if from.iter().fold(0, |all, word| all | word) != 0 {
            ones += or_words(into, from);
        }
    }
    ones + or_words(chunks.into_remainder(), sources.remainder())
}

#[inline(always)]
fn or_words(target: &mut [u64], source: &[u64]) -> u64 {
    let mut ones = 0;
    for (into, from) in target.iter_mut().zip(source) {
        *into |= from;
        ones += u64::from(from.count_ones());
    }
    ones
}

#[inline(always)]
pub(crate) fn take(target: &mut [u64], source: &mut [u64]) -> u64 {
    let mut ones = 0;
    let len = target.len().min(source.len());
    let (target, source) = (&mut target[..len], &mut source[..len]);
    let mut chunks = target.chunks_exact_mut(STRIDE);
    let mut sources = source.chunks_exact_mut(STRIDE);
    for (into, from) in chunks.by_ref().zip(sources.by_ref()) {
        if from.iter().fold(0, |all, word| all | word) != 0 {
            ones += or_words(into, from);
            from.fill(0);
        }
    }
    let rest = sources.into_remainder();
    ones += or_words(chunks.into_remainder(), rest);
    rest.fill(0);
    ones
}

#[inline(always)]
pub(crate) fn or_shifted(target: &mut [u64], source: &[u64], up: u32, carry: u64) -> u64 {
    let mut carry = carry;
    let mut ones = 0;
    for (into, from) in target.iter_mut().zip(source.iter().chain([&0])) {
        let bits = carry | from << up;
        if bits != 0 {
            *into |= bits;
            ones += u64::from(bits.count_ones());
        }
        carry = from >> (u64::BITS - up);
    }
    ones
}

#[inline(always)]
pub(crate) fn edges(words: &[u64], base: u64, before: bool, edges: &mut Edges) -> usize {
    let mut before = u64::from(before);
    let mut start = base;
    let mut len = edges.len;
    let mut looked_at = 0;
    while let Some(word) = words.get(looked_at) {
        if len + Edges::ROOM > Edges::CAPACITY {
            break;
        }
        // Stretches of the same bits, where there is no edge, are passed over.
        if let Some(chunk) = words.get(looked_at..looked_at + STRIDE)
            && looked_at.is_multiple_of(STRIDE)
        {
            let idle = 0u64.wrapping_sub(before);
            if chunk.iter().fold(0, |all, word| all | (word ^ idle)) == 0 {
                start = start.wrapping_add(64 * STRIDE as u64);
                looked_at += STRIDE;
                continue;
            }
        }
        // A bit here is set where the word's differs from the one before it.
        let mut changes = word ^ (word << 1 | before);
        before = word >> 63;
        let found = changes.count_ones() as usize;
        let room = &mut edges.at[len..len + Edges::ROOM];
        // Eight at a time and some too many: the number of edges in a word cannot be predicted, the
        // number of eights nearly always.
        for batch in room.chunks_exact_mut(8).take(found.div_ceil(8)) {
            for edge in batch {
                *edge = start + u64::from(changes.trailing_zeros());
                changes &= changes.wrapping_sub(1);
            }
        }
        len += found;
        start = start.wrapping_add(64);
        looked_at += 1;
    }
    edges.len = len;
    looked_at
}
