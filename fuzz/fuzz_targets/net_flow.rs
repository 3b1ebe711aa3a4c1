//! The flow parser and the packet hasher against a slow second way: a reader that goes through
//! the frame byte by byte, and the hash by its definition, for every method that the CPU has. Of
//! any head of the frame the hash is that of the whole, or there is none.

#![no_main]

use std::collections::VecDeque;

use libfuzzer_sys::fuzz_target;
use net_util::flow;
use net_util::hash::{HashConfig, HashKey, HashTypes};
use net_util::toeplitz::{Method, PacketHasher, Toeplitz, hash_bitwise};

/// What the frame says, as bytes.
#[derive(Clone, Debug, Default, PartialEq)]
struct Naive {
    /// Source and destination.
    addresses: Vec<u8>,
    /// The same with home addresses, if there are extension headers.
    extended: Option<Vec<u8>>,
    /// Source and destination port, and whether they are TCP's.
    ports: Option<(Vec<u8>, bool)>,
}

type Bytes = VecDeque<u8>;

fn take(bytes: &mut Bytes, count: usize) -> Option<Vec<u8>> {
    (bytes.len() >= count).then(|| bytes.drain(..count).collect())
}

fn number(bytes: &[u8]) -> usize {
    bytes
        .iter()
        .fold(0, |number, byte| number * 256 + usize::from(*byte))
}

/// `length`: how many bytes there should be by the IP header. No ports is right for a packet that
/// has none, and for one whose own length ends before them; not for one that is cut.
fn ports(protocol: usize, mut rest: Bytes, length: usize) -> Option<Option<(Vec<u8>, bool)>> {
    if ![6, 17].contains(&protocol) || length < 4 {
        return Some(None);
    }
    let ports = take(&mut rest, 4)?;
    Some(Some((ports, protocol == 6)))
}

fn frame(mut bytes: Bytes) -> Option<Naive> {
    take(&mut bytes, 12)?;
    for tags in 0..=15 {
        match number(&take(&mut bytes, 2)?) {
            0x8100 | 0x88a8 => drop(take(&mut bytes, 2)?),
            0x0800 => return version_4(bytes),
            0x86dd => return version_6(bytes, tags),
            _ => return None,
        }
    }
    None
}

fn version_4(mut bytes: Bytes) -> Option<Naive> {
    let fixed = take(&mut bytes, 20)?;
    let words = usize::from(fixed[0])
        .checked_sub(0x40)
        .filter(|words| (5..16).contains(words))?;
    take(&mut bytes, words * 4 - 20)?;
    let length = number(&fixed[2..4]).checked_sub(words * 4)?;
    bytes.truncate(length);
    // Without the reserved bit and don't-fragment.
    let fragment = number(&fixed[6..8]) % 0x4000 != 0;
    Some(Naive {
        addresses: fixed[12..].to_vec(),
        extended: None,
        ports: if fragment {
            None
        } else {
            ports(usize::from(fixed[9]), bytes, length)?
        },
    })
}

fn version_6(mut bytes: Bytes, tags: usize) -> Option<Naive> {
    let fixed = take(&mut bytes, 40)?;
    if fixed[0] / 16 != 6 {
        return None;
    }
    let mut length = number(&fixed[4..6]);
    bytes.truncate(length);
    let (mut source, mut destination) = (fixed[8..24].to_vec(), fixed[24..].to_vec());
    let (mut next, mut headers, mut last) = (usize::from(fixed[6]), 0, false);
    while !last && [0, 43, 44, 50, 51, 60, 135, 139, 140].contains(&next) {
        headers += 1;
        let start = take(&mut bytes, 8)?;
        let rest = match next {
            44 | 50 => 0,
            51 => usize::from(start[1]) * 4,
            _ => usize::from(start[1]) * 8,
        };
        let header = [start.clone(), take(&mut bytes, rest)?].concat();
        length -= header.len();
        match next {
            44 | 50 => last = true,
            60 => {
                if let Some(home) = home(&header[2..])? {
                    source = home;
                }
            }
            43 if header[1..4] == [2, 2, 1] => destination = header[8..].to_vec(),
            _ => {}
        }
        next = usize::from(header[0]);
    }
    if tags + headers > 15 {
        return None;
    }
    Some(Naive {
        addresses: fixed[8..].to_vec(),
        extended: (headers > 0).then(|| [source, destination].concat()),
        ports: if last {
            None
        } else {
            ports(next, bytes, length)?
        },
    })
}

/// The first home address among options, which all must be sound up to it.
fn home(options: &[u8]) -> Option<Option<Vec<u8>>> {
    let mut options: Bytes = options.iter().copied().collect();
    while let Some(kind) = options.pop_front() {
        if kind == 0 {
            continue;
        }
        let length = usize::from(options.pop_front()?);
        let data = take(&mut options, length)?;
        if kind == 0xc9 && length == 16 {
            return Some(Some(data));
        }
    }
    Some(None)
}

/// What the specification hashes of it, and the number of the report.
fn choose(naive: &Naive, types: u32) -> Option<(Vec<u8>, u16)> {
    let on = |bit: u16| types >> (bit - 1) & 1 == 1;
    // Reports for TCP, UDP and addresses alone; those for extension headers come first.
    let plain = if naive.addresses.len() == 8 {
        [2, 3, 1]
    } else {
        [5, 6, 4]
    };
    let tables = [
        (&naive.extended, [8, 9, 7]),
        (&Some(naive.addresses.clone()), plain),
    ];
    for (addresses, [tcp, udp, ip]) in tables {
        let Some(addresses) = addresses else { continue };
        match &naive.ports {
            Some((ports, true)) if on(tcp) => return Some(([&addresses[..], ports].concat(), tcp)),
            Some((ports, false)) if on(udp) => {
                return Some(([&addresses[..], ports].concat(), udp));
            }
            _ if on(ip) => return Some((addresses.clone(), ip)),
            _ => {}
        }
    }
    None
}

fuzz_target!(|input: &[u8]| {
    let Some((types, rest)) = input.split_first_chunk::<2>() else {
        return;
    };
    let Some((key, head)) = rest.split_first_chunk::<40>() else {
        return;
    };
    let types = u32::from(u16::from_le_bytes(*types)) & HashTypes::ALL.bits();
    let key = HashKey::from(*key);

    let naive = frame(head.iter().copied().collect());
    assert_eq!(naive.is_some(), flow::parse(head).is_some(), "{naive:x?}");
    let chosen = naive.as_ref().and_then(|naive| choose(naive, types));
    let expected = chosen.as_ref().map_or((0, 0), |(input, report)| {
        (hash_bitwise(&key, input), *report)
    });
    let config = HashConfig {
        types: HashTypes::from_bits(types),
        key,
    };
    let hasher = PacketHasher::new(&config);
    let hash = hasher.hash_frame(head);
    assert_eq!((hash.value, hash.report.code()), expected, "{naive:x?}");
    for method in Method::ALL {
        if let (Some(toeplitz), Some((input, _))) = (Toeplitz::with_method(&key, method), &chosen) {
            assert_eq!(toeplitz.hash(input), expected.0, "{method:?}");
        }
    }
    for length in 0..head.len().min(256) {
        let part = hasher.hash_frame(&head[..length]);
        let none = part.report.code() == 0;
        assert!(
            part == hash || (none && part.value == 0),
            "{length}: {part:?}"
        );
    }
});
