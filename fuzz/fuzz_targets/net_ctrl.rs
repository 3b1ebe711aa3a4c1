//! Control commands against the rules of the specification, read off the body at fixed places;
//! and what is accepted, put on the wire again, is the body.

#![no_main]

use libfuzzer_sys::fuzz_target;
use net_util::ctrl::{MQ_HASH_CONFIG, MQ_RSS_CONFIG, MQ_VQ_PAIRS_SET, MqCommand, MqLimits};
use net_util::hash::{HashConfig, HashReport, HashTypes};
use net_util::toeplitz::PacketHash;

/// A little-endian number of `len` bytes, if the body reaches so far.
fn number(body: &[u8], at: usize, len: usize) -> Option<usize> {
    let bytes = body.get(at..at + len)?;
    Some(
        bytes
            .iter()
            .rev()
            .fold(0, |number, byte| number << 8 | usize::from(*byte)),
    )
}

/// Whether the types at the body's start and the key at `at` are sound.
fn hash_is_sound(body: &[u8], at: usize, limits: &MqLimits) -> Option<bool> {
    let (types, len) = (number(body, 0, 4)?, number(body, at, 1)?);
    body.get(at + 1..at + 1 + len)?;
    let supported = usize::try_from(limits.hash_types.bits()).ok()?;
    Some(types & !supported == 0 && len <= 40 && (len > 0 || types == 0))
}

fn pairs_are_sound(pairs: usize, limits: &MqLimits) -> bool {
    (1..=usize::from(limits.max_pairs)).contains(&pairs)
}

/// Whether the device has to carry out the command; `None` if its body is too short.
fn is_sound(command: u8, body: &[u8], limits: &MqLimits) -> Option<bool> {
    match command {
        MQ_VQ_PAIRS_SET => Some(pairs_are_sound(number(body, 0, 2)?, limits) && limits.multi_queue),
        MQ_HASH_CONFIG => Some(hash_is_sound(body, 12, limits)? && limits.hash_report),
        MQ_RSS_CONFIG => {
            let entries = number(body, 4, 2)? + 1;
            let behind = 8 + entries * 2;
            // The unclassified queue lies right before the table.
            let mut queues = (0..=entries).map(|i| number(body, 6 + i * 2, 2));
            let exists = |queue| queue < usize::from(limits.max_pairs);
            let exist = queues.try_fold(true, |all, queue| Some(all && exists(queue?)))?;
            let sound = hash_is_sound(body, behind + 2, limits)?;
            let transmit = pairs_are_sound(number(body, behind, 2)?, limits);
            let length = entries <= 128 && entries.is_power_of_two();
            Some(length && exist && sound && transmit && limits.rss)
        }
        _ => Some(false),
    }
}

/// The key's length is not kept, so it comes from the body.
fn hash_bytes(hash: &HashConfig, body: &[u8], at: usize) -> Vec<u8> {
    let len = body[at];
    assert!(
        hash.key.as_bytes()[usize::from(len)..]
            .iter()
            .all(|byte| *byte == 0)
    );
    [&[len], &hash.key.as_bytes()[..usize::from(len)]].concat()
}

/// The body that asks for `command`, with what is ignored taken from `body`.
fn encode(command: &MqCommand, body: &[u8]) -> Vec<u8> {
    match command {
        MqCommand::Pairs(pairs) => pairs.to_le_bytes().to_vec(),
        MqCommand::Hash(hash) => {
            let types = hash.types.bits().to_le_bytes();
            [&types[..], &body[4..12], &hash_bytes(hash, body, 12)].concat()
        }
        MqCommand::Rss(rss) => {
            let queue = |value, report| rss.queue_for(PacketHash { value, report }).to_le_bytes();
            let mut bytes = rss.hash().types.bits().to_le_bytes().to_vec();
            bytes.extend(&body[4..6]);
            bytes.extend(queue(0, HashReport::None));
            let mask = u32::from(u16::from_le_bytes([body[4], body[5]]));
            // Only the bits under the mask count.
            bytes.extend((0..=mask).flat_map(|i| queue(i | !mask, HashReport::UdpV6)));
            bytes.extend(rss.transmit_queues().to_le_bytes());
            let at = bytes.len();
            bytes.extend(hash_bytes(rss.hash(), body, at));
            bytes
        }
    }
}

fuzz_target!(|input: &[u8]| {
    let Some(([features, pairs, types, command], body)) = input.split_first_chunk::<4>() else {
        return;
    };
    let limits = MqLimits {
        max_pairs: u16::from(*pairs),
        hash_types: HashTypes::from_bits(u32::from(*types) << (features >> 7)),
        multi_queue: features & 1 != 0,
        rss: features & 2 != 0,
        hash_report: features & 4 != 0,
    };
    let parsed = MqCommand::parse(*command, body, &limits);
    assert_eq!(
        parsed.is_ok(),
        is_sound(*command, body, &limits) == Some(true),
        "{parsed:?}"
    );
    if let Ok(command) = parsed {
        let encoded = encode(&command, body);
        assert_eq!(encoded, body[..encoded.len()], "{command:?}");
        if let MqCommand::Rss(rss) = command {
            assert!(rss.receive_queues() <= limits.max_pairs);
        }
    }
});
