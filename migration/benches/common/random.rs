//! Numbers at random, the same on every run.

/// Where a row of them starts.
pub(crate) const SEED: u64 = 0x9e37_79b9_7f4a_7c15;

/// A step of xorshift64.
pub(crate) fn random(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}
