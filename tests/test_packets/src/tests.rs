use std::collections::{BTreeMap, BTreeSet};

use super::*;
use crate::hash::{Key, LINUX_TYPES, Report};

const TO: [u8; 6] = [0x52, 0x54, 0, 1, 2, 3];

fn hex(digits: &str) -> Vec<u8> {
    let digits: Vec<u8> = digits.bytes().collect();
    let byte = |pair: &[u8]| u8::from_str_radix(str::from_utf8(pair).unwrap(), 16).unwrap();
    digits.chunks(2).map(byte).collect()
}

/// Microsoft's published verification suite ("Verifying the RSS hash calculation").
#[test]
fn hashes_are_the_published_ones() {
    let key = Key::new(&hex(
        "6d5a56da255b0ec24167253d43a38fb0d0ca2bcbae7b30b477cb2da38030f20c6a42b73bbeac01fa",
    ));
    for (addresses, ports, of_addresses, with_ports) in [
        ("420995bba18e6450", "0aea06e6", 0x323e_8fc2, 0x51cc_c178),
        ("c75c6f0241458c53", "37961283", 0xd718_262a, 0xc626_b0ea),
        (
            "3ffe2501020000031fff0000000000073ffe2501020000030000000000000001",
            "0aea06e6",
            0,
            0,
        ),
        (
            "3ffe250102001fff00000000000000073ffe2501020000030000000000000001",
            "0aea06e6",
            0x2cc1_8cd5,
            0x4020_7d3d,
        ),
    ] {
        let (addresses, ports) = (hex(addresses), hex(ports));
        let agree = key.hash(&addresses) == of_addresses
            && key.hash(&[addresses, ports].concat()) == with_ports;
        // The third is another address: this must not be a function that says yes to everything.
        assert_eq!(agree, of_addresses != 0);
    }
}

#[test]
fn a_frame_is_the_same_for_everybody_and_tells_its_number() {
    for number in 0..2000 {
        let frame = packet(7, number, TO);
        assert_eq!(frame, packet(7, number, TO));
        assert_ne!(
            frame.bytes[12..],
            packet(8, number, TO).bytes[12..],
            "{}",
            frame.kind
        );
        assert_eq!(Frame::number_of(&frame.bytes), Some(number));
        assert_eq!(frame.bytes[..6], TO);
        // What a card with an MTU of 1500 takes, with a tag.
        assert!((14..=1518).contains(&frame.bytes.len()), "{}", frame.kind);
    }
    assert_eq!(Frame::number_of(&[0; 14]), None);
    assert_eq!(Frame::number_of(&[]), None);
}

/// The chosen type is the one with the highest priority, and the addresses of extension headers are used by the
/// types that know of them only.
#[test]
fn types_are_chosen_as_the_specification_says() {
    let key = Key::new(&[0x5a, 0x17, 0x99, 0xe3].repeat(10));
    let plain = [1; 32];
    let home = [2; 32];
    let ports = [3, 4, 5, 6];
    let flow = Flow {
        addresses: Addresses::V6(plain),
        extended: Some(home),
        ports: Some((Transport::Udp, ports)),
    };
    let kind = |types| key.report(Some(&flow), types).kind;
    for (types, wanted) in [
        (0x1ff, 9),
        (0x0ff, 7),
        (0x0bf, 6),
        (0x09f, 4),
        (0x017, 0),
        (0x078, 7),
        (0, 0),
    ] {
        assert_eq!(kind(types), wanted, "{types:#x}");
    }
    let value = |types| key.report(Some(&flow), types).value;
    assert_eq!(value(0x100), key.hash(&[&home[..], &ports].concat()));
    assert_eq!(value(0x040), key.hash(&home));
    assert_eq!(value(0x020), key.hash(&[&plain[..], &ports].concat()));
    assert_eq!(value(0x008), key.hash(&plain));
    assert_eq!(key.report(None, 0x1ff), Report::default());
}

/// Each kind of frame and each report is among 20,000, with and without tags.
#[test]
fn all_there_is_comes_soon() {
    let key = Key::new(&[0x5a, 0x17, 0x99, 0xe3].repeat(10));
    let mut kinds_seen = BTreeMap::<_, BTreeSet<_>>::new();
    let (mut reports, mut for_linux) = (BTreeMap::new(), BTreeMap::new());
    for number in 0..20_000 {
        let frame = packet(1, number, TO);
        kinds_seen.entry(frame.kind).or_default().insert(frame.tags);
        for (counts, types) in [(&mut reports, 0x1ff), (&mut for_linux, LINUX_TYPES)] {
            *counts
                .entry(key.report(frame.flow.as_ref(), types).kind)
                .or_insert(0) += 1;
        }
    }
    assert!(
        kinds().all(|kind| kinds_seen[kind].len() == 4),
        "{kinds_seen:?}"
    );
    assert!((0..=9).all(|kind| reports[&kind] > 200), "{reports:?}");
    assert!((0..=6).all(|kind| for_linux[&kind] > 200), "{for_linux:?}");
}
