//! What else of receive hashing and steering can be read and changed: what `ethtool -X`, `-L` and `-N` do.

use std::io;

use anyhow::{Context, ensure};

use super::{Interface, RXFH_KEY_LEN, RXFH_TABLE_LEN, RXFH_WORDS};

const ETHTOOL_GRXFH: u32 = 0x29;
const ETHTOOL_SRXFH: u32 = 0x2a;
const ETHTOOL_GCHANNELS: u32 = 0x3c;
const ETHTOOL_SCHANNELS: u32 = 0x3d;
const ETHTOOL_SRSSH: u32 = 0x47;

/// As length of a table: leave it (`ETH_RXFH_INDIR_NO_CHANGE`).
const NO_CHANGE: u32 = u32::MAX;

/// `struct ethtool_channels` in words: `combined_count` is the last.
const CHANNELS_WORDS: usize = 9;

/// `RXH_IP_SRC | RXH_IP_DST`.
pub(crate) const RXH_ADDRESSES: u32 = 1 << 4 | 1 << 5;
/// `RXH_L4_B_0_1 | RXH_L4_B_2_3`.
pub(crate) const RXH_PORTS: u32 = 1 << 6 | 1 << 7;

/// Kinds of flows whose hash can be chosen: name, `*_FLOW` of the uapi, and what of it makes which type of hash.
const FLOWS: [(&str, u32, u32, u32); 6] = [
    ("ip4", 0x10, RXH_ADDRESSES, 1 << 0),
    ("tcp4", 0x01, RXH_PORTS, 1 << 1),
    ("udp4", 0x02, RXH_PORTS, 1 << 2),
    ("ip6", 0x11, RXH_ADDRESSES, 1 << 3),
    ("tcp6", 0x05, RXH_PORTS, 1 << 4),
    ("udp6", 0x06, RXH_PORTS, 1 << 5),
];

impl Interface {
    /// Sets the key, or the table, and leaves the other.
    fn set_steering(&self, table: Option<&[u32]>, key: &[u8]) -> anyhow::Result<()> {
        let mut words = vec![0; RXFH_WORDS];
        words[0] = ETHTOOL_SRSSH;
        words[RXFH_TABLE_LEN] = match table {
            Some(table) => u32::try_from(table.len())?,
            None => NO_CHANGE,
        };
        words[RXFH_KEY_LEN] = u32::try_from(key.len())?;
        words.extend(table.unwrap_or_default());
        for chunk in key.chunks(4) {
            let mut word = [0; 4];
            word[..chunk.len()].copy_from_slice(chunk);
            words.push(u32::from_ne_bytes(word));
        }
        Ok(self.command(&mut words)?)
    }

    /// `ethtool -X hkey`.
    pub(crate) fn set_key(&self, key: &[u8]) -> anyhow::Result<()> {
        self.set_steering(None, key).context("setting the hash key")
    }

    /// `ethtool -X equal` and `weight`.
    pub(crate) fn set_table(&self, table: &[u32]) -> anyhow::Result<()> {
        let set = self.set_steering(Some(table), &[]);
        set.context("setting the indirection table")
    }

    fn channels(&self) -> io::Result<[u32; CHANNELS_WORDS]> {
        let mut words = [0; CHANNELS_WORDS];
        words[0] = ETHTOOL_GCHANNELS;
        self.command(&mut words)?;
        Ok(words)
    }

    /// How many queue pairs are in use.
    pub(crate) fn pairs(&self) -> anyhow::Result<u32> {
        let channels = self.channels().context("asking for the queues")?;
        Ok(channels[CHANNELS_WORDS - 1])
    }

    /// `ethtool -L combined`.
    pub(crate) fn set_pairs(&self, pairs: u32) -> anyhow::Result<()> {
        let mut words = self.channels().context("asking for the queues")?;
        words[0] = ETHTOOL_SCHANNELS;
        words[CHANNELS_WORDS - 1] = pairs;
        self.command(&mut words).context("setting the queues")
    }

    /// Which types of hash the driver asks for when hashes are on, as virtio numbers their bits.
    pub(crate) fn types(&self) -> anyhow::Result<u32> {
        let mut types = 0;
        for (name, flow, part, bit) in FLOWS {
            // `struct ethtool_rxnfc` up to its data, which are 64 bits.
            let mut words = [ETHTOOL_GRXFH, flow, 0, 0];
            self.command(&mut words)
                .with_context(|| format!("asking what of {name} is hashed"))?;
            if words[2] & part == part {
                types |= bit;
            }
        }
        Ok(types)
    }

    /// `ethtool -N rx-flow-hash`: what of packets of the kind `name` is hashed, as `RXH_*`.
    pub(crate) fn set_flow(&self, name: &str, parts: u32) -> anyhow::Result<()> {
        let flow = FLOWS.iter().find(|(known, ..)| *known == name);
        let (_, flow, ..) = flow.with_context(|| format!("no kind of flow is called {name}"))?;
        self.command(&mut [ETHTOOL_SRXFH, *flow, parts, 0])
            .with_context(|| format!("setting what of {name} is hashed"))
    }
}

/// A table of so many entries with shares for queues as `ethtool -X weight` has them.
pub(crate) fn weighted(entries: usize, weights: &[u32]) -> anyhow::Result<Vec<u32>> {
    let sum = weights.iter().map(|weight| u64::from(*weight)).sum::<u64>();
    ensure!(sum > 0, "weights of nothing: {weights:?}");
    let size = u64::try_from(entries)?;
    let (mut table, mut share) = (Vec::with_capacity(entries), 0);
    for (queue, weight) in (0..).zip(weights) {
        share += u64::from(*weight);
        table.resize(usize::try_from(size * share / sum)?, queue);
    }
    Ok(table)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_are_shares_of_the_table() {
        assert_eq!(weighted(8, &[1, 1]).unwrap(), [0, 0, 0, 0, 1, 1, 1, 1]);
        assert_eq!(weighted(8, &[1, 3]).unwrap(), [0, 0, 1, 1, 1, 1, 1, 1]);
        assert_eq!(weighted(4, &[0, 1, 0]).unwrap(), [1; 4]);
        assert_eq!(weighted(5, &[1, 1, 1]).unwrap(), [0, 1, 1, 2, 2]);
        assert!(weighted(4, &[0, 0]).is_err());
        assert!(weighted(4, &[]).is_err());
    }

    #[test]
    fn loopback_has_none_of_it() {
        let lo = Interface::new("lo").unwrap();
        assert!(lo.set_key(&[1; 40]).is_err());
        assert!(lo.set_table(&[0; 128]).is_err());
        assert!(lo.pairs().is_err() && lo.set_pairs(1).is_err());
        assert!(lo.types().is_err() && lo.set_flow("tcp4", RXH_ADDRESSES).is_err());
        let error = lo.set_flow("tcp5", 0).unwrap_err().to_string();
        assert!(error.contains("tcp5"), "{error}");
    }
}
