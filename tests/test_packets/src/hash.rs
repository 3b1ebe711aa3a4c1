//! Which hash is reported of a flow.
//!
//! Source: VIRTIO 1.4 §5.1.6.4.3.

use crate::{Addresses, Flow, Transport};

/// Most bytes of a key that count: the longest input is 36 bytes, and its last bit takes 32 bits.
pub const KEY_BYTES: usize = 40;
/// Of an enabled set of types, those that a Linux driver asks for: all but the ones that know of home addresses.
pub const LINUX_TYPES: u32 = 0x3f;

/// What a header says of the hash.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub struct Report {
    /// `hash_report`: 0 for none, else one more than the number of the type's bit.
    pub kind: u16,
    /// `hash_value`; 0 if there is none.
    pub value: u32,
}

/// A hash key, prepared.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Key {
    /// For each bit of an input, the 32 bits of the key that begin at its place.
    windows: Vec<u32>,
}

impl Key {
    /// The key, padded with zeros.
    pub fn new(key: &[u8]) -> Self {
        let bit = |at: usize| {
            let byte = key.get(at / 8).copied().unwrap_or(0);
            u32::from(byte >> (7 - at % 8) & 1)
        };
        let window = |at: usize| (at..at + 32).fold(0, |word, at| word << 1 | bit(at));
        Self {
            windows: (0..(KEY_BYTES - 4) * 8).map(window).collect(),
        }
    }

    /// The Toeplitz hash of `input`: for each of its bits that is set, the key from there.
    pub fn hash(&self, input: &[u8]) -> u32 {
        let bits = input
            .iter()
            .flat_map(|byte| (0..8).rev().map(move |bit| byte >> bit & 1 == 1));
        let set = self.windows.iter().zip(bits).filter(|(_, set)| *set);
        set.fold(0, |hash, (window, _)| hash ^ window)
    }

    /// What must be reported of a packet with this flow if `types` are on.
    pub fn report(&self, flow: Option<&Flow>, types: u32) -> Report {
        let Some((bit, input)) = flow.and_then(|flow| hashed(flow, types)) else {
            return Report::default();
        };
        Report {
            kind: bit + 1,
            value: self.hash(&input),
        }
    }
}

/// The number of the type's bit, and the input.
fn hashed(flow: &Flow, types: u32) -> Option<(u16, Vec<u8>)> {
    if let Some(addresses) = &flow.extended
        && let Some(chosen) = choose(addresses, flow.ports, types, 6)
    {
        return Some(chosen);
    }
    let lowest = match flow.addresses {
        Addresses::V4(_) => 0,
        Addresses::V6(_) => 3,
    };
    choose(flow.addresses.as_bytes(), flow.ports, types, lowest)
}

/// Of the three types from bit `lowest` on (addresses, TCP, UDP) the one that is used.
fn choose(
    addresses: &[u8],
    ports: Option<(Transport, [u8; 4])>,
    types: u32,
    lowest: u16,
) -> Option<(u16, Vec<u8>)> {
    let is_on = |bit: u16| types >> bit & 1 == 1;
    if let Some((transport, ports)) = ports {
        let bit = lowest
            + match transport {
                Transport::Tcp => 1,
                Transport::Udp => 2,
            };
        if is_on(bit) {
            return Some((bit, [addresses, &ports[..]].concat()));
        }
    }
    is_on(lowest).then(|| (lowest, addresses.to_vec()))
}
