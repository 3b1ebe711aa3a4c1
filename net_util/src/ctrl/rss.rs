//! Receive-side scaling: which queue a hash goes to.
//!
//! Source: VIRTIO 1.4 §5.1.6.5.7 "Receive-side scaling (RSS)".

use serde::{Deserialize, Serialize};

use super::{Body, CtrlError, MqLimits, check_pairs, is_classified};
use crate::config::RSS_MAX_TABLE_ENTRIES;
use crate::hash::HashConfig;
use crate::toeplitz::PacketHash;

/// What is unsound about an indirection table.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum RssError {
    /// The number of entries is 0, no power of two, or more than the device takes.
    #[error(
        "the indirection table has {entries} entries, a power of two up to {RSS_MAX_TABLE_ENTRIES} is possible"
    )]
    TableLength {
        /// Its entries.
        entries: usize,
    },
    /// An entry names a receive queue that does not exist.
    #[error("entry {index} names receive queue {queue}, there are {queues}")]
    Entry {
        /// Which entry.
        index: usize,
        /// The queue it names.
        queue: u16,
        /// Receive queues that exist.
        queues: u16,
    },
    /// Packets without a hash would go to a receive queue that does not exist.
    #[error("the queue for packets without a hash is {queue}, there are {queues}")]
    Unclassified {
        /// The queue named.
        queue: u16,
        /// Receive queues that exist.
        queues: u16,
    },
}

/// A sound RSS configuration: hash types, key and indirection table.
///
/// Saved state is untrusted, so a restored one has the soundness of its table checked, but not
/// that its queues exist: call [`check_queues`](Self::check_queues).
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(try_from = "Unchecked", into = "Unchecked")]
pub struct RssConfig {
    hash: HashConfig,
    /// One less than the table's length, which is a power of two.
    mask: u32,
    table: Box<[u16]>,
    unclassified: u16,
    transmit_queues: u16,
}

impl RssConfig {
    /// A configuration that steers by `table`, and packets without a hash to `unclassified`.
    ///
    /// # Errors
    /// The table's length is not a power of two up to [`RSS_MAX_TABLE_ENTRIES`].
    pub fn new(
        hash: HashConfig,
        table: Box<[u16]>,
        unclassified: u16,
        transmit_queues: u16,
    ) -> Result<Self, RssError> {
        let entries = table.len();
        let refused = RssError::TableLength { entries };
        if !entries.is_power_of_two() || entries > usize::from(RSS_MAX_TABLE_ENTRIES) {
            return Err(refused);
        }
        let mask = u32::try_from(entries - 1).map_err(|_| refused)?;
        Ok(Self {
            hash,
            mask,
            table,
            unclassified,
            transmit_queues,
        })
    }

    /// Checks that all queues named are below `queues`.
    ///
    /// # Errors
    /// The first queue that is not.
    pub fn check_queues(&self, queues: u16) -> Result<(), RssError> {
        if self.unclassified >= queues {
            return Err(RssError::Unclassified {
                queue: self.unclassified,
                queues,
            });
        }
        match self
            .table
            .iter()
            .enumerate()
            .find(|(_, queue)| **queue >= queues)
        {
            Some((index, &queue)) => Err(RssError::Entry {
                index,
                queue,
                queues,
            }),
            None => Ok(()),
        }
    }

    /// Hash types and key.
    pub const fn hash(&self) -> &HashConfig {
        &self.hash
    }

    /// The receive queue of each index; a power of two of them, at most
    /// [`RSS_MAX_TABLE_ENTRIES`].
    pub const fn table(&self) -> &[u16] {
        &self.table
    }

    /// The receive queue of packets without a hash.
    pub const fn unclassified(&self) -> u16 {
        self.unclassified
    }

    /// How many transmit queues the driver uses.
    pub const fn transmit_queues(&self) -> u16 {
        self.transmit_queues
    }

    /// How many receive queues the driver uses: one more than the highest it named.
    pub fn receive_queues(&self) -> u16 {
        let highest = self.table.iter().copied().fold(self.unclassified, u16::max);
        highest.saturating_add(1)
    }

    /// The receive queue for a packet with this hash.
    pub fn queue_for(&self, hash: PacketHash) -> u16 {
        if !is_classified(hash) {
            return self.unclassified;
        }
        let index = usize::try_from(hash.value & self.mask).unwrap_or(0);
        self.table.get(index).copied().unwrap_or(self.unclassified)
    }
}

/// [`RssConfig`] as saved, before its table is checked.
#[derive(Clone, Serialize, Deserialize)]
struct Unchecked {
    hash: HashConfig,
    table: Vec<u16>,
    unclassified: u16,
    transmit_queues: u16,
}

impl TryFrom<Unchecked> for RssConfig {
    type Error = RssError;

    fn try_from(saved: Unchecked) -> Result<Self, RssError> {
        Self::new(
            saved.hash,
            saved.table.into(),
            saved.unclassified,
            saved.transmit_queues,
        )
    }
}

impl From<RssConfig> for Unchecked {
    fn from(config: RssConfig) -> Self {
        let RssConfig {
            hash,
            mask: _,
            table,
            unclassified,
            transmit_queues,
        } = config;
        Self {
            hash,
            table: table.into(),
            unclassified,
            transmit_queues,
        }
    }
}

/// Parses the body of [`MQ_RSS_CONFIG`](super::MQ_RSS_CONFIG).
pub(super) fn parse(body: &[u8], limits: &MqLimits) -> Result<RssConfig, CtrlError> {
    let mut body = Body::new(body);
    let types = body.hash_types(limits)?;
    let entries = usize::from(body.le16("indirection_table_mask")?) + 1;
    // Before the table is read, so that a wrong mask is not reported as a short body.
    if entries > usize::from(RSS_MAX_TABLE_ENTRIES) {
        return Err(RssError::TableLength { entries }.into());
    }
    let unclassified = body.le16("unclassified_queue")?;
    let table = body.bytes(entries * 2, "indirection_table")?;
    let table = table
        .chunks_exact(2)
        .map(|entry| u16::from_le_bytes([entry[0], entry[1]]));
    let table = table.collect();
    let transmit_queues = check_pairs(body.le16("max_tx_vq")?, limits)?;
    let hash = body.hash_key(types)?;
    let config = RssConfig::new(hash, table, unclassified, transmit_queues)?;
    config.check_queues(limits.max_pairs)?;
    Ok(config)
}
