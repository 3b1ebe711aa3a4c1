//! Frames of all sorts, and what a virtio-net device must report of each.
//!
//! [`packet`] makes the frame with a given number of an endless, repeatable stream: TCP, UDP and other
//! protocols over IPv4 and IPv6, with options, extension headers, VLAN tags and as fragments, tunnels,
//! other network protocols, and broken packets. What of a frame is hashed is known because the frame
//! was made here; nothing is parsed. [`hash`] tells the report from that. Nothing of Ferry is used, so that a
//! test can hold Ferry against it.
//!
//! A frame carries its number in its source address ([`Frame::number_of`]): a receiver knows of whatever
//! arrives what was sent, and so what must be reported.
//!
//! Source for what is hashed: VIRTIO 1.4 §5.1.6.4.3 "Hash calculation for incoming packets".
#![forbid(unsafe_code)]

mod flow;
pub mod hash;
mod ip;
mod kinds;
mod random;

pub use flow::{Addresses, Flow, Transport};
pub use random::Random;

use kinds::{KINDS, Make};

/// First two bytes of the source address: locally administered, and of no other packet of a test.
const MARK: [u8; 2] = [0x02, 0xfe];
/// Bytes of an Ethernet header.
const ETHERNET_BYTES: usize = 14;
/// Tags of 802.1Q and 802.1ad.
const TAGS: [u16; 2] = [0x8100, 0x88a8];

/// A frame, and what it is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Frame {
    /// From the destination address to the end of the payload, without a checksum.
    pub bytes: Vec<u8>,
    /// What it was made as; [`kinds`] has all of them.
    pub kind: &'static str,
    /// How many VLAN tags it has.
    pub tags: usize,
    /// What of it is hashed; `None` if it is no sound packet of IPv4 or IPv6.
    pub flow: Option<Flow>,
}

impl Frame {
    /// The number of the frame that begins with `head`, if it is one of these.
    pub fn number_of(head: &[u8]) -> Option<u32> {
        let number = head.get(6..12)?.strip_prefix(&MARK)?;
        Some(u32::from_be_bytes(number.try_into().ok()?))
    }

    /// As Linux hands it to packet sockets: without its first tag; `None` if Linux drops it before,
    /// which it does with a tag that less than four bytes follow.
    pub fn untagged(&self) -> Option<Vec<u8>> {
        if self.tags == 0 {
            return Some(self.bytes.clone());
        }
        let behind = self.bytes.get(ETHERNET_BYTES + 2..)?;
        (behind.len() >= 4).then(|| [&self.bytes[..12], behind].concat())
    }
}

/// The names of all kinds of frames.
pub fn kinds() -> impl Iterator<Item = &'static str> {
    KINDS.iter().map(|(name, ..)| *name)
}

/// Frame `number` of the stream `seed`, for the card with the address `to`.
pub fn packet(seed: u64, number: u32, to: [u8; 6]) -> Frame {
    let mut random = Random::new(seed, u64::from(number));
    let (kind, make) = choose(&mut random);
    let body = make(&mut random);
    // One in four has tags.
    let tags = usize::from(random.below(16).saturating_sub(11)).min(3);
    let mut bytes = [&to[..], &MARK, &number.to_be_bytes()].concat();
    for _ in 0..tags {
        bytes.extend(random.pick(&TAGS).to_be_bytes());
        bytes.extend(random.bytes::<2>());
    }
    bytes.extend(body.ether_type.to_be_bytes());
    bytes.extend(body.bytes);
    Frame {
        bytes,
        kind,
        tags,
        flow: body.flow,
    }
}

/// A kind, the frequent ones more often.
fn choose(random: &mut Random) -> (&'static str, Make) {
    let total = KINDS.iter().map(|(_, weight, _)| *weight).sum();
    let mut left = random.below(total);
    for (name, weight, make) in KINDS {
        match left.checked_sub(*weight) {
            Some(rest) => left = rest,
            None => return (name, *make),
        }
    }
    // Not reached: `left` is below the sum of the weights.
    (KINDS[0].0, KINDS[0].2)
}

#[cfg(test)]
mod tests;
