//! Frames of every kind, and what becomes of them.

use proptest::prelude::*;

use super::*;

fn ethernet(tags: &[u16], ethertype: u16, packet: &[u8]) -> Vec<u8> {
    let mut frame = vec![0x52, 0x54, 0, 0, 0, 1, 0x52, 0x54, 0, 0, 0, 2];
    for tag in tags {
        frame.extend(tag.to_be_bytes());
        frame.extend([0, 5]);
    }
    frame.extend(ethertype.to_be_bytes());
    frame.extend(packet);
    frame
}

/// An IPv4 packet; `None` as total length is the true one.
fn ip_v4(
    fragment: u16,
    protocol: u8,
    options: &[u8],
    total: Option<u16>,
    payload: &[u8],
) -> Vec<u8> {
    let header_bytes = 20 + options.len();
    let true_total = u16::try_from(header_bytes + payload.len()).unwrap();
    let words = u8::try_from(header_bytes / 4).unwrap();
    let mut packet = vec![0x40 | words & 0xf, 0];
    packet.extend(total.unwrap_or(true_total).to_be_bytes());
    packet.extend([0, 1]);
    packet.extend(fragment.to_be_bytes());
    packet.extend([64, protocol, 0, 0]);
    packet.extend([192, 0, 2, 33, 198, 51, 100, 77]);
    packet.extend(options);
    packet.extend(payload);
    packet
}

/// An IPv6 packet: each header's first byte becomes the number of the next.
fn ip_v6(headers: &[(u8, Vec<u8>)], last: u8, length: Option<u16>, payload: &[u8]) -> Vec<u8> {
    let mut numbers = headers.iter().map(|(number, _)| *number).chain([last]);
    let first = numbers.next().unwrap();
    let mut behind = Vec::new();
    for ((_, header), next) in headers.iter().zip(numbers) {
        behind.push(next);
        behind.extend(&header[1..]);
    }
    behind.extend(payload);
    let true_length = u16::try_from(behind.len()).unwrap();
    let mut packet = vec![0x60, 0, 0, 0];
    packet.extend(length.unwrap_or(true_length).to_be_bytes());
    packet.extend([first, 64]);
    packet.extend((0x20..0x30).chain(0x80..0x90));
    packet.extend(behind);
    packet
}

const PORTS: [u8; 8] = [0x0a, 0xea, 0x06, 0xe6, 1, 2, 3, 4];

pub(super) fn tcp_v4_from(port: u16) -> Vec<u8> {
    let [high, low] = port.to_be_bytes();
    let payload = [&[high, low], &PORTS[2..]].concat();
    ethernet(&[], 0x0800, &ip_v4(0x4000, 6, &[], None, &payload))
}

pub(super) fn tcp_v4() -> Vec<u8> {
    tcp_v4_from(2794)
}

pub(super) fn tcp_v6() -> Vec<u8> {
    ethernet(&[], 0x86dd, &ip_v6(&[], 6, None, &PORTS))
}

/// A header whose length in units of 8 bytes is filled in.
fn units(mut header: Vec<u8>) -> Vec<u8> {
    header.resize(header.len().next_multiple_of(8), 0);
    header[1] = u8::try_from(header.len() / 8 - 1).unwrap();
    header
}

fn options(options: &[Vec<u8>]) -> Vec<u8> {
    units([&[0, 0], &options.concat()[..]].concat())
}

fn home(byte: u8) -> Vec<u8> {
    [&[0xc9, 16][..], &[byte; 16]].concat()
}

pub(super) fn home_address() -> Vec<u8> {
    let header = options(&[vec![1, 2, 0, 0], home(9)]);
    ethernet(&[], 0x86dd, &ip_v6(&[(60, header)], 17, None, &PORTS))
}

/// A frame of each kind that flows differ by, with a name.
pub(super) fn samples() -> Vec<(&'static str, Vec<u8>)> {
    let v4 = |fragment, protocol| ip_v4(fragment, protocol, &[], None, &PORTS);
    let v6 = |headers: &[_], last| ip_v6(headers, last, None, &PORTS);
    let routing = units([&[0, 0, 2, 1, 0, 0, 0, 0][..], &[7; 16]].concat());
    let home = options(&[home(9)]);
    let authentication = vec![0, 2, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9, 9];
    let fragment = vec![0, 0, 0, 0, 0, 0, 0, 1];
    vec![
        ("TCP, IPv4", tcp_v4()),
        ("UDP, IPv4", ethernet(&[], 0x0800, &v4(0, 17))),
        ("ICMP", ethernet(&[], 0x0800, &v4(0, 1))),
        ("first fragment", ethernet(&[], 0x0800, &v4(0x2000, 17))),
        ("last fragment", ethernet(&[], 0x0800, &v4(0x0007, 17))),
        (
            "IPv4 options",
            ethernet(&[], 0x0800, &ip_v4(0, 6, &[1; 40], None, &PORTS)),
        ),
        ("VLAN", ethernet(&[0x8100], 0x0800, &v4(0, 6))),
        ("QinQ", ethernet(&[0x88a8, 0x8100], 0x86dd, &v6(&[], 17))),
        ("TCP, IPv6", tcp_v6()),
        ("UDP, IPv6", ethernet(&[], 0x86dd, &v6(&[], 17))),
        ("ICMPv6", ethernet(&[], 0x86dd, &v6(&[], 58))),
        (
            "home address",
            ethernet(&[], 0x86dd, &v6(&[(60, home.clone())], 6)),
        ),
        (
            "routing header",
            ethernet(&[], 0x86dd, &v6(&[(43, routing.clone())], 17)),
        ),
        (
            "both, and more",
            ethernet(
                &[0x88a8],
                0x86dd,
                &v6(
                    &[
                        (0, options(&[vec![5, 2, 0, 0]])),
                        (43, routing),
                        (51, authentication),
                        (60, home),
                    ],
                    6,
                ),
            ),
        ),
        (
            "IPv6 fragment",
            ethernet(&[], 0x86dd, &v6(&[(44, fragment)], 6)),
        ),
        ("ARP", ethernet(&[], 0x0806, &[0; 28])),
        ("IPv6, cut", ethernet(&[], 0x86dd, &v6(&[], 6)[..39])),
    ]
}

#[test]
fn samples_go_where_the_table_says() {
    let Some(mut program) = loaded("samples_go_where_the_table_says") else {
        return;
    };
    // Each type alone, all but one, all, none.
    let types = (0..9).map(|bit| 1 << bit);
    let types = types
        .clone()
        .chain(types.map(|bit| 0x1ff ^ bit))
        .chain([0x1ff, 0]);
    for types in types.map(HashTypes::from_bits) {
        let config = config(types, key(3), 100, 128);
        program.update(&config);
        for (what, frame) in samples() {
            let queue = expected(&config, &frame);
            assert_eq!(run(&program, &frame, 1).0, queue, "{what}, {types:?}");
        }
    }
}

#[test]
fn long_stacks_of_headers_are_followed() {
    let Some(mut program) = loaded("long_stacks_of_headers_are_followed") else {
        return;
    };
    let config = config(HashTypes::ALL, key(4), 100, 128);
    program.update(&config);
    let check = |what, count: usize, max, frame: Vec<u8>| {
        let queue = if count <= usize::try_from(max).unwrap() {
            expected(&config, &frame)
        } else {
            UNCLASSIFIED
        };
        assert_eq!(run(&program, &frame, 1).0, queue, "{count} {what}");
    };
    for count in 0..30 {
        let v4 = ip_v4(0, 6, &[], None, &PORTS);
        let frame = ethernet(&vec![0x8100; count], 0x0800, &v4);
        check("tags", count, MAX_TAGS, frame);
        let headers = vec![(0, vec![0; 8]); count];
        let frame = ethernet(&[], 0x86dd, &ip_v6(&headers, 6, None, &PORTS));
        check("headers", count, MAX_HEADERS, frame);
        // Those behind the home address are not looked at.
        let all = [vec![vec![0]; count].concat(), home(9), vec![0; 12]];
        let v6 = ip_v6(&[(60, options(&all))], 6, None, &PORTS);
        check("options", count, MAX_OPTIONS, ethernet(&[], 0x86dd, &v6));
    }
    for frame in around_the_head() {
        check("headers at the head's end", 2, MAX_HEADERS, frame);
    }
}

/// Whether there are more options in a header than the program looks at.
fn has_many_options(frame: &[u8]) -> bool {
    let mut at = 12;
    while frame[at..].starts_with(&[0x81, 0]) || frame[at] == 0x88 {
        at += 4;
    }
    let (mut next, mut at) = (frame[at + 8], at + 42);
    for _ in 0..MAX_HEADERS {
        let Some(&[behind, units, ..]) = frame.get(at..).filter(|rest| rest.len() > 1) else {
            return false;
        };
        let bytes = match next {
            51 => (usize::from(units) + 2) * 4,
            _ => (usize::from(units) + 1) * 8,
        };
        let header = &frame[at..frame.len().min(at + bytes)];
        if next == 60 && count_options(&header[2..]) > MAX_OPTIONS {
            return true;
        }
        (next, at) = (behind, at + bytes);
    }
    false
}

fn count_options(mut options: &[u8]) -> i32 {
    let mut count = 0;
    while let [kind, behind @ ..] = options {
        count += 1;
        options = match (kind, behind) {
            (0, _) => behind,
            (_, [len, data @ ..]) => data.get(usize::from(*len)..).unwrap_or_default(),
            (_, []) => return count,
        };
    }
    count
}

fn any_payload() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        4 => any::<[u8; 12]>().prop_map(Vec::from),
        1 => prop::collection::vec(any::<u8>(), 0..8),
    ]
}

/// Mostly the true length.
fn any_length() -> impl Strategy<Value = Option<u16>> {
    prop_oneof![6 => Just(None), 1 => Just(Some(0)), 2 => (0_u16..120).prop_map(Some), 1 => any::<u16>().prop_map(Some)]
}

fn any_protocol() -> impl Strategy<Value = u8> {
    prop_oneof![3 => Just(6), 3 => Just(17), 1 => any::<u8>()]
}

fn any_fragment() -> impl Strategy<Value = u16> {
    prop_oneof![5 => Just(0), 2 => Just(0x4000), 1 => Just(0x2000), 1 => any::<u16>()]
}

fn any_option() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        3 => Just(vec![0]),
        2 => (0_u8..9).prop_map(|len| [&[1, len][..], &vec![0; usize::from(len)]].concat()),
        3 => any::<u8>().prop_map(home),
        1 => (0_u8..18).prop_map(|len| [&[0xc9, len][..], &vec![8; usize::from(len)]].concat()),
        1 => prop::collection::vec(any::<u8>(), 0..9),
    ]
}

fn any_header() -> impl Strategy<Value = (u8, Vec<u8>)> {
    let kinds = prop_oneof![
        Just(0_u8),
        Just(135),
        Just(139),
        Just(140),
        Just(43),
        Just(60)
    ];
    let plain = (kinds, prop::collection::vec(any::<u8>(), 1..30));
    let plain = plain.prop_map(|(kind, body)| (kind, units([&[0, 0], &body[..]].concat())));
    let routing = (0_u8..4, 0_u8..3, any::<u8>()).prop_map(|(kind, left, byte)| {
        (
            43,
            units([&[0, 0, kind, left, 0, 0, 0, 0][..], &[byte; 16]].concat()),
        )
    });
    let destination = prop::collection::vec(any_option(), 0..8);
    let authentication = (0_u8..6).prop_map(|len| {
        let mut header = vec![3; (usize::from(len) + 2) * 4];
        header[1] = len;
        (51, header)
    });
    prop_oneof![
        2 => plain,
        3 => routing,
        4 => destination.prop_map(|all| (60, options(&all))),
        1 => authentication,
        1 => any::<[u8; 8]>().prop_map(|header| (44, header.to_vec())),
        1 => any::<[u8; 8]>().prop_map(|header| (50, header.to_vec())),
    ]
}

fn any_packet() -> impl Strategy<Value = (u16, Vec<u8>)> {
    let options = (0_usize..11).prop_map(|words| vec![1; words * 4]);
    let v4 = (
        any_fragment(),
        any_protocol(),
        options,
        any_length(),
        any_payload(),
    );
    let v4 = v4.prop_map(|(fragment, protocol, options, total, payload)| {
        (0x0800, ip_v4(fragment, protocol, &options, total, &payload))
    });
    let headers = prop::collection::vec(any_header(), 0..6);
    let v6 = (headers, any_protocol(), any_length(), any_payload());
    let v6 = v6.prop_map(|(headers, last, length, payload)| {
        (0x86dd, ip_v6(&headers, last, length, &payload))
    });
    let other = (any::<u16>(), prop::collection::vec(any::<u8>(), 0..60));
    prop_oneof![4 => v4, 8 => v6, 1 => other]
}

/// Frames of all kinds, some of them spoilt or cut.
fn any_frame() -> impl Strategy<Value = Vec<u8>> {
    let tag = prop_oneof![Just(0x8100_u16), Just(0x88a8), Just(0x9100)];
    let tags = prop::collection::vec(tag, 0..4);
    let spoilt = prop::option::weighted(0.3, (any::<prop::sample::Index>(), any::<u8>()));
    let cut = prop::option::weighted(0.3, any::<prop::sample::Index>());
    (tags, any_packet(), spoilt, cut).prop_map(|(tags, (ethertype, packet), spoilt, cut)| {
        let mut frame = ethernet(&tags, ethertype, &packet);
        if let Some((place, byte)) = spoilt {
            // Behind the addresses.
            let place = 12 + place.index(frame.len() - 12);
            frame[place] = byte;
        }
        if let Some(cut) = cut {
            frame.truncate(1 + cut.index(frame.len()));
        }
        frame
    })
}

fn any_config() -> impl Strategy<Value = RssConfig> {
    let key = any::<([u8; 32], [u8; 8])>().prop_map(HashKey::from);
    let types = prop_oneof![Just(0x1ff_u32), 0_u32..0x200].prop_map(HashTypes::from_bits);
    (key, types, 0_u32..8).prop_map(|(key, types, power)| config(types, key, 100, 1 << power))
}

#[test]
fn any_frame_goes_where_the_table_says() {
    let Some(mut program) = loaded("any_frame_goes_where_the_table_says") else {
        return;
    };
    let mut classified = 0;
    let mut frames = 0;
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig {
        cases: 100,
        failure_persistence: None,
        ..ProptestConfig::default()
    });
    let strategy = (any_config(), prop::collection::vec(any_frame(), 200));
    let cell = std::cell::RefCell::new((&mut program, &mut classified, &mut frames));
    let outcome = runner.run(&strategy, |(config, batch)| {
        let (program, classified, frames) = &mut *cell.borrow_mut();
        program.update(&config);
        for frame in batch {
            let queue = expected(&config, &frame);
            **classified += u32::from(queue != UNCLASSIFIED);
            **frames += 1_u32;
            let steered = run(program, &frame, 1).0;
            if steered == UNCLASSIFIED && queue != UNCLASSIFIED && has_many_options(&frame) {
                continue;
            }
            prop_assert_eq!(steered, queue, "{:02x?}", frame);
        }
        Ok(())
    });
    if let Err(error) = outcome {
        panic!("{error}");
    }
    println!("{frames} frames, {classified} with a hash");
    assert!(classified > frames / 5);
}

/// IPv6 with chains of headers that end around the end of the head.
pub(super) fn around_the_head() -> Vec<Vec<u8>> {
    let long = |units: usize| vec![0; units * 8];
    // Authentication headers move the end by 4 bytes.
    let short = |words: u8| {
        let mut header = vec![0; (usize::from(words) + 2) * 4];
        header[1] = words;
        (51, header)
    };
    (0..6)
        .map(|words| {
            let mut hop = long(23);
            hop[1] = 22;
            let headers = [(0, hop), short(words)];
            ethernet(&[], 0x86dd, &ip_v6(&headers, 6, None, &PORTS))
        })
        .collect()
}
