//! The hash from a table with one row per byte of input: the XOR over the set bits of a byte
//! depends only on the byte's value and place.

use super::{MAX_INPUT_BYTES, key_window};
use crate::hash::HashKey;

/// 36 KiB; one load and XOR per byte of input.
#[derive(Clone)]
pub(crate) struct Table {
    rows: [[u32; 256]; MAX_INPUT_BYTES],
}

impl Table {
    pub(crate) fn new(key: &HashKey) -> Self {
        let mut rows = [[0; 256]; MAX_INPUT_BYTES];
        for (place, row) in rows.iter_mut().enumerate() {
            // A value's hash is that of its highest set bit and that of the rest, which is a
            // smaller value and so already in the row.
            for bit in (0..8).rev() {
                let window = key_window(key.as_bytes(), place * 8 + bit);
                let (known, new) = row.split_at_mut(0x80 >> bit);
                for (hash, rest) in new.iter_mut().zip(known) {
                    *hash = *rest ^ window;
                }
            }
        }
        Self { rows }
    }

    /// For each byte of input, what each value of it adds to the hash.
    pub(crate) const fn rows(&self) -> &[[u32; 256]; MAX_INPUT_BYTES] {
        &self.rows
    }

    #[inline]
    pub(super) fn hash(&self, input: &[u8]) -> u32 {
        let rows = self.rows.iter().zip(input);
        rows.fold(0, |hash, (row, byte)| hash ^ row[usize::from(*byte)])
    }
}
