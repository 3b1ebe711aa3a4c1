//! What the ioctls that set hashes are given.

use super::{CAP_BYTES, KernelRss};
use crate::config::{RSS_MAX_KEY_BYTES, RSS_MAX_TABLE_ENTRIES};
use crate::ctrl::RssError;
use crate::hash::{HashKey, HashTypes};

/// Bytes of RFC v5's `struct tun_vnet_hash_rss { u16 mask; u16 unclassified; }`.
const RSS_BYTES: usize = 4;

/// Bytes of the longest argument: RFC v5's two structures, a full table and a full key.
const MAX_BYTES: usize =
    CAP_BYTES + RSS_BYTES + 2 * RSS_MAX_TABLE_ENTRIES as usize + RSS_MAX_KEY_BYTES as usize;

/// An argument of `TUNSETVNETHASH`, `TUNSETVNETREPORTINGRSS` or `TUNSETVNETRSS`.
///
/// The kernel reads as much of it as its mask says; there is always room for the longest table
/// and key, so it never reads past the end. All numbers are in the machine's byte order.
#[derive(Clone, PartialEq, Eq)]
#[repr(C, align(4))]
pub struct VnetHashArgument {
    bytes: [u8; MAX_BYTES],
}

impl VnetHashArgument {
    /// RFC v5: flags, padding, types; then mask, unclassified queue, table, key.
    ///
    /// # Errors
    /// [`RssError::TableLength`].
    pub fn rfc_v5(
        flags: u16,
        types: HashTypes,
        rss: &KernelRss<'_>,
        key: &HashKey,
    ) -> Result<Self, RssError> {
        let mask = mask(rss.table)?;
        let mut writer = Writer::new();
        writer.u16(flags);
        writer.u16(0);
        writer.u32(types.bits());
        writer.rss(mask, rss, key);
        Ok(writer.done())
    }

    /// RFC v5: no reports and no RSS.
    pub const fn rfc_v5_off() -> Self {
        Self {
            bytes: [0; MAX_BYTES],
        }
    }

    /// v12: types, mask, unclassified queue, table, key.
    ///
    /// # Errors
    /// [`RssError::TableLength`].
    pub fn v12(types: HashTypes, rss: &KernelRss<'_>, key: &HashKey) -> Result<Self, RssError> {
        let mask = mask(rss.table)?;
        let mut writer = Writer::new();
        writer.u32(types.bits());
        writer.rss(mask, rss, key);
        Ok(writer.done())
    }

    /// The argument, and zeros behind it.
    pub const fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }
}

impl std::fmt::Debug for VnetHashArgument {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The key is in it.
        f.write_str("VnetHashArgument(..)")
    }
}

/// The mask of a table whose length is right.
fn mask(table: &[u16]) -> Result<u16, RssError> {
    let entries = table.len();
    match u16::try_from(entries) {
        Ok(length) if length.is_power_of_two() && length <= RSS_MAX_TABLE_ENTRIES => Ok(length - 1),
        _ => Err(RssError::TableLength { entries }),
    }
}

/// Writes numbers one behind the other; what [`mask`] let pass always fits.
struct Writer {
    argument: VnetHashArgument,
    at: usize,
}

impl Writer {
    const fn new() -> Self {
        Self {
            argument: VnetHashArgument::rfc_v5_off(),
            at: 0,
        }
    }

    fn bytes(&mut self, bytes: &[u8]) {
        let free = self.argument.bytes.iter_mut().skip(self.at);
        for (place, byte) in free.zip(bytes) {
            *place = *byte;
        }
        self.at = self.at.saturating_add(bytes.len());
    }

    fn u16(&mut self, number: u16) {
        self.bytes(&number.to_ne_bytes());
    }

    fn u32(&mut self, number: u32) {
        self.bytes(&number.to_ne_bytes());
    }

    fn rss(&mut self, mask: u16, rss: &KernelRss<'_>, key: &HashKey) {
        self.u16(mask);
        self.u16(rss.unclassified);
        for queue in rss.table {
            self.u16(*queue);
        }
        self.bytes(key.as_bytes());
    }

    fn done(self) -> VnetHashArgument {
        self.argument
    }
}
