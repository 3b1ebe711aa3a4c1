//! The saved state of a network card: what the driver set, and packets that were read from the host
//! and have not found buffers of the driver's yet.

use net_util::ctrl::MqLimits;
use net_util::hash::HashConfig;
use net_util::header::HeaderSize;
use serde::{Deserialize, Serialize};

use super::exchange::Exchange;
use super::runtime::{Hashing, Runtime};
use super::rx::MAX_PACKET;

/// Version of [`NetState`].
pub(super) const STATE_VERSION: u16 = 2;
/// The version before RSS, which is read too.
const VERSION_1: u16 = 1;

/// Packets that wait, by pair.
pub(super) type Waiting = Vec<(u16, Vec<Vec<u8>>)>;

/// Saved state of a network card. Untrusted when it comes back.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(super) struct NetState {
    pub(super) version: u16,
    pub(super) mac: [u8; 6],
    pub(super) mtu: Option<u16>,
    pub(super) runtime: Runtime,
    pub(super) waiting: Waiting,
}

/// [`VERSION_1`] of [`NetState`].
#[derive(Serialize, Deserialize)]
pub(super) struct NetState1 {
    pub(super) version: u16,
    pub(super) mac: [u8; 6],
    pub(super) mtu: Option<u16>,
    pub(super) pairs: u16,
    pub(super) offloads: Option<u64>,
    pub(super) hash: HashConfig,
    pub(super) announce: bool,
}

impl NetState {
    /// Reads what any version saved; why not, if it cannot be read.
    pub(super) fn read(state: &[u8]) -> Result<Self, String> {
        let malformed = |error| format!("malformed: {error}");
        let (version, _) = postcard::take_from_bytes::<u16>(state)
            .map_err(|error| format!("no version: {error}"))?;
        match version {
            STATE_VERSION => postcard::from_bytes(state).map_err(malformed),
            VERSION_1 => postcard::from_bytes(state)
                .map(NetState1::into_state)
                .map_err(malformed),
            version => Err(format!(
                "version {version}, this build reads versions {VERSION_1} to {STATE_VERSION}: run \
                 the same release of Ferry on both sides"
            )),
        }
    }

    /// Whether a device that allows `limits` to its driver can take it.
    pub(super) fn check(&self, limits: &MqLimits) -> Result<(), String> {
        let Runtime { pairs, hashing, .. } = &self.runtime;
        let max_pairs = limits.max_pairs;
        if !(1..=max_pairs).contains(pairs) {
            return Err(format!(
                "{pairs} queue pairs are in use, the device here has {max_pairs}"
            ));
        }
        let types = hashing.config().types;
        if !types.is_subset_of(limits.hash_types) {
            return Err(format!(
                "its driver uses hash types {types:?}, the device here has {:?}",
                limits.hash_types
            ));
        }
        if let Hashing::Table(table) = hashing {
            if !limits.rss {
                return Err("its driver steers by a table, which the device here does not".into());
            }
            let queues = 1..=max_pairs;
            if !queues.contains(&table.transmit_queues()) {
                return Err(format!(
                    "{} transmit queues are in use, the device here has {max_pairs}",
                    table.transmit_queues()
                ));
            }
            table
                .check_queues(max_pairs)
                .map_err(|error| error.to_string())?;
        }
        self.check_waiting(max_pairs)
    }

    fn check_waiting(&self, max_pairs: u16) -> Result<(), String> {
        let mut bytes = 0_usize;
        for (pair, packets) in &self.waiting {
            if *pair >= max_pairs {
                return Err(format!(
                    "packets wait for queue pair {pair}, the device here has {max_pairs}"
                ));
            }
            for packet in packets {
                if !(HeaderSize::V1.bytes()..=MAX_PACKET).contains(&packet.len()) {
                    return Err(format!("a packet of {} bytes waits", packet.len()));
                }
                bytes = bytes.saturating_add(packet.len());
            }
        }
        let most = Exchange::most_bytes(usize::from(max_pairs));
        if bytes > most {
            return Err(format!("{bytes} bytes of packets wait, at most {most} may"));
        }
        Ok(())
    }
}

impl NetState1 {
    fn into_state(self) -> NetState {
        NetState {
            version: STATE_VERSION,
            mac: self.mac,
            mtu: self.mtu,
            runtime: Runtime {
                pairs: self.pairs,
                offloads: self.offloads,
                hashing: Hashing::Automatic(self.hash),
                announce: self.announce,
            },
            waiting: Vec::new(),
        }
    }
}
