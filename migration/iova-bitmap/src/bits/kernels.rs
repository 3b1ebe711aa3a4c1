//! The inner loops, in plain Rust that a compiler vectorises. They are called through
//! [`raw`](crate::raw), which has them compiled for several instruction sets.

/// Words tested at once for all being the same: 256 bytes, four of the widest registers.
const STRIDE: usize = 32;
/// Bits of that many words.
const STRIDE_BITS: u32 = 32 * u64::BITS;

/// Where the set bits of each byte are, in rising order; what follows them means nothing. As wide as
/// the places they are added to, so that eight are added at once.
static PLACES: [[u32; 8]; 256] = places();

const fn places() -> [[u32; 8]; 256] {
    let mut table = [[0; 8]; 256];
    let mut byte = 0;
    while byte < 256 {
        let (mut bit, mut found) = (0, 0);
        while bit < 8 {
            if byte >> bit & 1 != 0 {
                table[byte][found] = bit;
                found += 1;
            }
            bit += 1;
        }
        byte += 1;
    }
    table
}

/// Where bits change, in rising order: a run's first bit, the bit behind its last, the next run's
/// first bit, and so on. Runs over word boundaries are one.
#[derive(Clone)]
pub(crate) struct Edges {
    /// The bit that the edges are counted from.
    base: u64,
    at: [u32; Self::CAPACITY + Self::SLACK],
    head: usize,
    len: usize,
}

impl Edges {
    /// Edges it can hold, a power of two. A word has up to 64, so this takes the densest bits of
    /// sixteen words, or some ninety words of bits of which each tenth is set at random: enough that
    /// what a batch costs besides does not show.
    const CAPACITY: usize = 1024;
    /// Those of a byte are written eight at a time, the last of which may mean nothing.
    const SLACK: usize = 8;
    /// The most edges of one word.
    const ROOM: usize = 64;
    /// Words looked at at a time, so that an edge fits a `u32`.
    const WORDS: usize = 1 << 25;

    pub(crate) const fn new() -> Self {
        Self {
            base: 0,
            at: [0; Self::CAPACITY + Self::SLACK],
            head: 0,
            len: 0,
        }
    }

    /// Forgets what it has; edges are counted from `base` on from now on.
    fn restart(&mut self, base: u64) {
        (self.base, self.head, self.len) = (base, 0, 0);
    }

    /// The next two edges, taken: a run's first bit and the bit behind it.
    #[inline]
    pub(crate) fn pop_run(&mut self) -> Option<(u64, u64)> {
        match self.at.get(self.head..self.len) {
            Some([first, end, ..]) => {
                self.head += 2;
                let base = self.base;
                Some((base + u64::from(*first), base + u64::from(*end)))
            }
            _ => None,
        }
    }

    /// All runs that are in it whole, each taken when it is given, if they end before `limit`.
    #[inline]
    pub(crate) fn pop_runs(&mut self, limit: u64) -> Option<PopRuns<'_>> {
        let (runs, _) = self.at.get(self.head..self.len)?.as_chunks();
        let [_, end] = runs.last()?;
        (self.base + u64::from(*end) < limit).then_some(PopRuns {
            base: self.base,
            runs: runs.iter(),
            taken: self.head,
            head: &mut self.head,
        })
    }

    /// The next edge, taken.
    pub(crate) fn pop(&mut self) -> Option<u64> {
        let edge = *self.at.get(self.head..self.len)?.first()?;
        self.head += 1;
        Some(self.base + u64::from(edge))
    }

    pub(crate) fn has_more(&self) -> bool {
        self.head < self.len
    }

    /// Appends those of `changes`, whose bit 0 is bit `start` after the base; there is room.
    ///
    /// A byte at a time, by a table: neither a branch nor a chain of operations depends on how many
    /// there are, which cannot be predicted.
    #[inline(always)]
    fn push(&mut self, len: usize, start: u32, changes: u64) -> usize {
        let mut len = len;
        let mut start = start;
        for byte in changes.to_le_bytes() {
            // The mask changes nothing, as there is room: it spares a test for it.
            let slot = &mut self.at[len & (Self::CAPACITY - 1)..][..Self::SLACK];
            for (edge, place) in slot.iter_mut().zip(PLACES[usize::from(byte)]) {
                *edge = start + place;
            }
            len += byte.count_ones() as usize;
            start += u8::BITS;
        }
        len
    }
}

/// Runs of [`Edges`], see [`Edges::pop_runs`].
pub(crate) struct PopRuns<'a> {
    /// What the bits of the runs are counted from.
    pub(crate) base: u64,
    runs: core::slice::Iter<'a, [u32; 2]>,
    /// As `head`, which is only written here: reading it again would have each run wait for the one
    /// before.
    taken: usize,
    head: &'a mut usize,
}

impl Iterator for PopRuns<'_> {
    /// First bit, and the one behind the last.
    type Item = (u64, u64);

    #[inline]
    fn next(&mut self) -> Option<(u64, u64)> {
        let [first, end] = self.runs.next()?;
        self.taken += 2;
        *self.head = self.taken;
        Some((u64::from(*first), u64::from(*end)))
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
    edges.restart(base);
    let words = words.get(..Edges::WORDS).unwrap_or(words);
    let mut before = u64::from(before);
    let (mut len, mut start) = (0, 0);
    let mut looked_at = 0;
    while let Some(word) = words.get(looked_at) {
        if len + Edges::ROOM > Edges::CAPACITY {
            break;
        }
        // Stretches of the same bits, where there is no edge, are passed over.
        if looked_at.is_multiple_of(STRIDE)
            && let Some(chunk) = words.get(looked_at..looked_at + STRIDE)
        {
            let idle = 0u64.wrapping_sub(before);
            if chunk.iter().fold(0, |all, word| all | (word ^ idle)) == 0 {
                start += STRIDE_BITS;
                looked_at += STRIDE;
                continue;
            }
        }
        // A bit here is set where the word's differs from the one before it.
        let changes = word ^ (word << 1 | before);
        before = word >> 63;
        if changes != 0 {
            len = edges.push(len, start, changes);
        }
        start += u64::BITS;
        looked_at += 1;
    }
    edges.len = len;
    looked_at
}
