//! Receive-side scaling: packets reach the queue that the driver's table names, wherever the tap
//! gave them, each once and in order.

mod commands;
mod packets;

use std::collections::BTreeMap;

use net_util::hash::HashKey;
use net_util::toeplitz::hash_bitwise;
use vm_migration::state::{Pause, SaveRestore};

use super::control::KEY;
use super::*;

const RSS: u64 = features::CTRL_VQ
    | features::RSS
    | features::MRG_RXBUF
    | features::STATUS
    | features::GUEST_ANNOUNCE
    | feature::RING_EVENT_IDX
    | feature::RING_INDIRECT_DESC;
pub(super) const MQ: u64 = RSS | features::MQ;
/// UDP over IPv4 by ports, IPv4 else.
pub(super) const TYPES: u32 = 0b101;
/// Bytes of a receive buffer.
const LEN: u32 = 2048;

/// RSS_CONFIG with [`KEY`].
pub(super) fn rss_config(types: u32, table: &[u16], unclassified: u16, transmit: u16) -> Vec<u8> {
    let mut command = vec![4, 1];
    command.extend_from_slice(&types.to_le_bytes());
    let mask = u16::try_from(table.len() - 1).unwrap();
    command.extend_from_slice(&mask.to_le_bytes());
    command.extend_from_slice(&unclassified.to_le_bytes());
    for queue in table {
        command.extend_from_slice(&queue.to_le_bytes());
    }
    command.extend_from_slice(&transmit.to_le_bytes());
    command.push(40);
    command.extend_from_slice(&KEY);
    command
}

fn pairs_set(pairs: u16) -> Vec<u8> {
    [&[4, 0][..], &pairs.to_le_bytes()].concat()
}

/// A UDP datagram over IPv4 of a flow, with a number.
pub(super) fn datagram(flow: u16, number: u32, len: usize) -> Vec<u8> {
    let mut frame = vec![0; 14 + 20 + 8];
    frame[12..14].copy_from_slice(&[8, 0]);
    frame[14] = 0x45;
    frame[16..18].copy_from_slice(&u16::try_from(28 + len).unwrap().to_be_bytes());
    frame[23] = 17;
    frame[26..30].copy_from_slice(&[10, 0, 0, 1]);
    frame[30..34].copy_from_slice(&[10, 0, 0, 2]);
    frame[34..36].copy_from_slice(&flow.to_be_bytes());
    frame[36..38].copy_from_slice(&4000_u16.to_be_bytes());
    frame.extend_from_slice(&number.to_le_bytes());
    frame.resize(14 + 20 + 8 + len.max(4), 0);
    frame
}

/// The hash of the datagrams of a flow, by the definition.
pub(super) fn hash_of(flow: u16) -> u32 {
    let [high, low] = flow.to_be_bytes();
    let input = [10, 0, 0, 1, 10, 0, 0, 2, high, low, 0x0f, 0xa0];
    hash_bitwise(&HashKey::from(KEY), &input)
}

/// Which of `table` the flow goes to.
pub(super) fn queue_of(flow: u16, table: &[u16]) -> u16 {
    table[usize::try_from(hash_of(flow)).unwrap() & (table.len() - 1)]
}

/// A flow that goes to `queue`.
pub(super) fn flow_to(queue: u16, table: &[u16]) -> u16 {
    (0..1000)
        .find(|flow| queue_of(*flow, table) == queue)
        .unwrap()
}

/// What a packet says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Seen {
    pub(super) flow: u16,
    pub(super) number: u32,
    pub(super) hash: u32,
    pub(super) report: u16,
}

/// A card of several pairs, and a driver that keeps its receive queues filled.
pub(super) struct Guest {
    pub(super) card: Card,
    pairs: u16,
    header: usize,
    /// The buffer behind each descriptor.
    buffers: Vec<BTreeMap<u16, u64>>,
}

impl Guest {
    fn new(host: &Host, features: u64) -> Self {
        let pairs = u16::try_from(host.ends.len()).unwrap();
        Self::of(pairs, host.net(), features)
    }

    /// One with the card `net` of so many pairs.
    pub(super) fn of(pairs: u16, net: Net, features: u64) -> Self {
        Self {
            card: card_of(net, features, &Self::sizes(pairs)),
            pairs,
            header: if features & features::HASH_REPORT != 0 {
                20
            } else {
                12
            },
            buffers: vec![BTreeMap::new(); usize::from(pairs)],
        }
    }

    fn sizes(pairs: u16) -> Vec<u16> {
        let mut sizes = vec![64; usize::from(pairs) * 2];
        sizes.push(16);
        sizes
    }

    /// The driver starts again, after a reset.
    pub(super) fn bring_up(&mut self, features: u64) {
        self.card.rings = self
            .card
            .driver
            .bring_up(features, &Self::sizes(self.pairs));
    }

    pub(super) fn command(&mut self, command: &[u8]) -> u8 {
        // As Linux cuts it, and anywhere.
        let pieces = [2, 8.min(command.len().saturating_sub(3)), 5];
        self.card.command(self.pairs * 2, command, &pieces)
    }

    /// Gives `count` buffers to the receive queue of `pair`.
    pub(super) fn post(&mut self, pair: u16, count: u64) {
        let (ring, place) = (usize::from(pair) * 2, usize::from(pair));
        for _ in 0..count {
            let free = (0..64).find(|slot| {
                let at = BUFFERS + u64::from(pair) * 0x10_0000 + slot * u64::from(LEN);
                !self.buffers[place].values().any(|used| *used == at)
            });
            let at = BUFFERS + u64::from(pair) * 0x10_0000 + free.expect("a slot") * u64::from(LEN);
            let head = self.card.rings[ring].add(&[], &[(at, LEN)]);
            self.buffers[place].insert(head, at);
        }
        if self.card.rings[ring].needs_kick(u16::try_from(count).unwrap()) {
            self.card.driver.kick(pair * 2);
        }
    }

    pub(super) fn post_all(&mut self, count: u64) {
        (0..self.pairs).for_each(|pair| self.post(pair, count));
    }

    /// The next packet of `pair`, if it is there.
    fn packet(&mut self, pair: u16) -> Option<Vec<u8>> {
        let used = self.card.rings[usize::from(pair) * 2].pop_used()?;
        let at = self.buffers[usize::from(pair)].remove(&used.head).unwrap();
        Some(self.card.bytes(at, usize::try_from(used.len).unwrap()))
    }

    /// The same once it is there.
    pub(super) fn wait_packet(&mut self, pair: u16) -> Vec<u8> {
        let mut packet = None;
        wait_for("packet", || {
            packet = self.packet(pair);
            packet.is_some()
        });
        packet.unwrap()
    }

    pub(super) fn read(&self, packet: &[u8]) -> Seen {
        assert_eq!(packet[10..12], [1, 0], "one buffer");
        let frame = &packet[self.header..];
        let (hash, report) = if self.header == 20 {
            let hash = u32::from_le_bytes(packet[12..16].try_into().unwrap());
            (hash, u16::from_le_bytes(packet[16..18].try_into().unwrap()))
        } else {
            (0, 0)
        };
        Seen {
            flow: u16::from_be_bytes(frame[34..36].try_into().unwrap()),
            number: u32::from_le_bytes(frame[42..46].try_into().unwrap()),
            hash,
            report,
        }
    }

    /// Moves it to a new card on the same host ends.
    fn migrate(&mut self, host: &Host) {
        self.card.driver.device.pause().unwrap();
        let state = self.card.driver.device.save().unwrap();
        let net = host.net();
        let counters = net.counters();
        let mut device = pci_device(net, &self.card.driver.memory, &Arc::default());
        device.pause().unwrap();
        device.restore(&state).unwrap();
        device.resume().unwrap();
        self.card.driver.device = device;
        self.card.counters = counters;
    }
}

pub(super) fn rss_host(pairs: usize) -> Host {
    let mut host = Host::new(pairs);
    host.options.rss = true;
    host
}

fn send(host: &Host, pair: usize, header: usize, frame: &[u8]) {
    let packet = [&vec![0xa5; header][..], frame].concat();
    (&host.peers[pair]).write_all(&packet).unwrap();
}
