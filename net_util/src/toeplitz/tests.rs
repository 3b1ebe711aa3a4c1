use std::net::IpAddr;

use proptest::prelude::*;

use super::*;
use crate::flow::ExtendedAddresses;

/// The key of Microsoft's "Verifying the RSS hash calculation".
const KEY: [u8; 40] = [
    0x6d, 0x5a, 0x56, 0xda, 0x25, 0x5b, 0x0e, 0xc2, 0x41, 0x67, 0x25, 0x3d, 0x43, 0xa3, 0x8f, 0xb0,
    0xd0, 0xca, 0x2b, 0xcb, 0xae, 0x7b, 0x30, 0xb4, 0x77, 0xcb, 0x2d, 0xa3, 0x80, 0x30, 0xf2, 0x0c,
    0x6a, 0x42, 0xb7, 0x3b, 0xbe, 0xac, 0x01, 0xfa,
];

/// Source, source port, destination, destination port, hash of the addresses, hash with ports.
const VECTORS: [(&str, u16, &str, u16, u32, u32); 8] = [
    (
        "66.9.149.187",
        2794,
        "161.142.100.80",
        1766,
        0x323e_8fc2,
        0x51cc_c178,
    ),
    (
        "199.92.111.2",
        14230,
        "65.69.140.83",
        4739,
        0xd718_262a,
        0xc626_b0ea,
    ),
    (
        "24.19.198.95",
        12898,
        "12.22.207.184",
        38024,
        0xd2d0_a5de,
        0x5c2b_394a,
    ),
    (
        "38.27.205.30",
        48228,
        "209.142.163.6",
        2217,
        0x8298_9176,
        0xafc7_327f,
    ),
    (
        "153.39.163.191",
        44251,
        "202.188.127.2",
        1303,
        0x5d18_09c5,
        0x10e8_28a2,
    ),
    (
        "3ffe:2501:200:1fff::7",
        2794,
        "3ffe:2501:200:3::1",
        1766,
        0x2cc1_8cd5,
        0x4020_7d3d,
    ),
    (
        "3ffe:501:8::260:97ff:fe40:efab",
        14230,
        "ff02::1",
        4739,
        0x0f0c_461c,
        0xdde5_1bbf,
    ),
    (
        "3ffe:1900:4545:3:200:f8ff:fe21:67cf",
        44251,
        "fe80::200:f8ff:fe21:67cf",
        38024,
        0x4b61_e985,
        0x02d1_feef,
    ),
];

fn hasher(types: HashTypes) -> PacketHasher {
    PacketHasher::new(&HashConfig {
        types,
        key: HashKey::from(KEY),
    })
}

/// The key made ready for each method that this CPU has, and a note on the others.
fn every_method(key: &HashKey) -> Vec<Toeplitz> {
    let ready = |method: &Method| {
        let toeplitz = Toeplitz::with_method(key, *method);
        if toeplitz.is_none() {
            println!("SKIP: {}: this CPU does not have it", method.name());
        }
        toeplitz
    };
    Method::ALL.iter().filter_map(ready).collect()
}

/// A vector's input, addresses and ports.
fn input(source: &str, source_port: u16, destination: &str, destination_port: u16) -> Vec<u8> {
    let octets = |address: &str| match address.parse().unwrap() {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    };
    let ports = [source_port.to_be_bytes(), destination_port.to_be_bytes()];
    [octets(source), octets(destination), ports.concat()].concat()
}

#[test]
fn microsofts_vectors_by_every_method() {
    for toeplitz in every_method(&HashKey::from(KEY)) {
        let method = toeplitz.method();
        for (source, source_port, destination, destination_port, plain, with_ports) in VECTORS {
            let input = input(source, source_port, destination, destination_port);
            let (addresses, _) = input.split_at(input.len() - 4);
            assert_eq!(toeplitz.hash(&input), with_ports, "{method:?}");
            assert_eq!(toeplitz.hash(addresses), plain, "{method:?}");
            match (
                <[u8; 12]>::try_from(&input[..]),
                <[u8; 36]>::try_from(&input[..]),
            ) {
                (Ok(input), _) => assert_eq!(toeplitz.hash_array(&input), with_ports, "{method:?}"),
                (_, Ok(input)) => assert_eq!(toeplitz.hash_array(&input), with_ports, "{method:?}"),
                _ => panic!("{} bytes", input.len()),
            }
        }
        // Nine inputs: a group of eight, and one that is left over.
        let (v4, v6) = VECTORS.split_at(5);
        let repeated = |vectors: &[(&'static str, u16, &'static str, u16, u32, u32)]| {
            let repeated = vectors.iter().copied().cycle().take(9);
            repeated.collect::<Vec<_>>()
        };
        let (v4, v6) = (repeated(v4), repeated(v6));
        let inputs = |vectors: &[(&str, u16, &str, u16, u32, u32)]| -> Vec<Vec<u8>> {
            let inputs = vectors.iter().map(|(a, b, c, d, ..)| input(a, *b, c, *d));
            inputs.collect()
        };
        let inputs_v4: Vec<[u8; 12]> = inputs(&v4)
            .into_iter()
            .map(|input| input.try_into().unwrap())
            .collect();
        let inputs_v6: Vec<[u8; 36]> = inputs(&v6)
            .into_iter()
            .map(|input| input.try_into().unwrap())
            .collect();
        let mut hashes = [0; 9];
        toeplitz.hash_many(&inputs_v4, &mut hashes);
        assert!(v4.iter().map(|vector| vector.5).eq(hashes), "{method:?}");
        toeplitz.hash_many(&inputs_v6, &mut hashes);
        assert!(v6.iter().map(|vector| vector.5).eq(hashes), "{method:?}");
    }
}

#[test]
fn fastest_method_that_there_is_gets_taken() {
    let all = every_method(&HashKey::ZERO);
    let fastest = all.last().map(Toeplitz::method);
    assert_eq!(Some(Toeplitz::new(&HashKey::ZERO).method()), fastest);
}

#[test]
fn more_bytes_than_the_longest_input_do_not_count() {
    for toeplitz in every_method(&HashKey::from(KEY)) {
        let long = [0x5a; MAX_INPUT_BYTES + 9];
        let expected = hash_bitwise(&HashKey::from(KEY), &long[..MAX_INPUT_BYTES]);
        assert_eq!(toeplitz.hash(&long), expected, "{:?}", toeplitz.method());
    }
}

#[test]
fn as_many_hashes_are_made_as_there_is_room_and_input() {
    let inputs: [[u8; 12]; 20] = std::array::from_fn(|i| [u8::try_from(i).unwrap() + 1; 12]);
    for toeplitz in every_method(&HashKey::from(KEY)) {
        for (given, room) in [
            (20, 3),
            (20, 11),
            (20, 20),
            (11, 20),
            (3, 20),
            (0, 20),
            (20, 0),
        ] {
            let mut hashes = [0; 20];
            toeplitz.hash_many(&inputs[..given], &mut hashes[..room]);
            for (i, (hash, input)) in hashes.iter().zip(&inputs).enumerate() {
                let expected = if i < given.min(room) {
                    hash_bitwise(&HashKey::from(KEY), input)
                } else {
                    0
                };
                assert_eq!(*hash, expected, "{:?}, {i} of {given}", toeplitz.method());
            }
        }
    }
}

/// Holds `hash_array` and `hash_many` for inputs of `N` bytes, cut out of `bytes`, against the
/// definition.
fn check_length<const N: usize>(toeplitz: &Toeplitz, key: &HashKey, bytes: &[u8]) {
    let (inputs, _) = bytes.as_chunks::<N>();
    let mut hashes = vec![0; inputs.len()];
    toeplitz.hash_many(inputs, &mut hashes);
    for (i, (input, hash)) in inputs.iter().zip(hashes).enumerate() {
        let expected = hash_bitwise(key, input);
        let method = toeplitz.method();
        assert_eq!(hash, expected, "{method:?}, {i} of many of {N} bytes");
        assert_eq!(
            toeplitz.hash_array(input),
            expected,
            "{method:?}, {N} bytes"
        );
    }
}

fn flow(source: IpAddr, destination: IpAddr, transport: Option<Transport>) -> Flow {
    match (source, destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => Flow::V4(FlowV4 {
            source,
            destination,
            transport,
        }),
        (IpAddr::V6(source), IpAddr::V6(destination)) => Flow::V6(FlowV6 {
            source,
            destination,
            extended: None,
            transport,
        }),
        _ => panic!("mixed vector"),
    }
}

#[test]
fn microsofts_vectors() {
    let all = hasher(HashTypes::ALL);
    for (source, source_port, destination, destination_port, plain, with_ports) in VECTORS {
        let (source, destination) = (source.parse().unwrap(), destination.parse().unwrap());
        let ports = |protocol| {
            Some(Transport {
                protocol,
                source: source_port,
                destination: destination_port,
            })
        };
        let reports = if IpAddr::is_ipv4(&source) {
            [HashReport::IpV4, HashReport::TcpV4, HashReport::UdpV4]
        } else {
            [HashReport::IpV6, HashReport::TcpV6, HashReport::UdpV6]
        };
        let transports = [None, ports(Protocol::Tcp), ports(Protocol::Udp)];
        for (transport, (report, value)) in transports
            .into_iter()
            .zip(reports.into_iter().zip([plain, with_ports, with_ports]))
        {
            let flow = flow(source, destination, transport);
            assert_eq!(
                all.hash_flow(&flow),
                PacketHash { value, report },
                "{flow:?}"
            );
        }
    }
}

#[test]
fn definition_gives_microsofts_vector() {
    let input = [66, 9, 149, 187, 161, 142, 100, 80, 0x0a, 0xea, 0x06, 0xe6];
    assert_eq!(hash_bitwise(&HashKey::from(KEY), &input), 0x51cc_c178);
    assert_eq!(hash_bitwise(&HashKey::from(KEY), &input[..8]), 0x323e_8fc2);
}

#[test]
fn last_bit_of_the_longest_input_takes_the_last_bits_of_the_key() {
    let mut input = [0; MAX_INPUT_BYTES];
    input[MAX_INPUT_BYTES - 1] = 1;
    let key = HashKey::from(KEY);
    // Bits 287 to 318 of the key's 320, cut out by hand.
    let expected = 0xdf5600fd;
    assert_eq!(hash_bitwise(&key, &input), expected);
    for toeplitz in every_method(&key) {
        assert_eq!(
            toeplitz.hash_array(&input),
            expected,
            "{:?}",
            toeplitz.method()
        );
    }
}

const TCP: Option<Transport> = Some(Transport {
    protocol: Protocol::Tcp,
    source: 1,
    destination: 2,
});
const UDP: Option<Transport> = Some(Transport {
    protocol: Protocol::Udp,
    source: 1,
    destination: 2,
});

fn report(types: HashTypes, flow: &Flow) -> HashReport {
    hasher(types).hash_flow(flow).report
}

#[test]
fn ports_are_preferred_where_their_type_is_on() {
    let v4 = |transport| {
        flow(
            IpAddr::from([1, 2, 3, 4]),
            IpAddr::from([5, 6, 7, 8]),
            transport,
        )
    };
    let ip = HashTypes::IPV4;
    assert_eq!(report(ip | HashTypes::TCPV4, &v4(TCP)), HashReport::TcpV4);
    assert_eq!(report(ip | HashTypes::TCPV4, &v4(UDP)), HashReport::IpV4);
    assert_eq!(report(ip | HashTypes::UDPV4, &v4(UDP)), HashReport::UdpV4);
    assert_eq!(report(ip | HashTypes::UDPV4, &v4(TCP)), HashReport::IpV4);
    assert_eq!(report(HashTypes::TCPV4, &v4(None)), HashReport::None);
    assert_eq!(report(HashTypes::TCPV4, &v4(UDP)), HashReport::None);
    assert_eq!(report(HashTypes::NONE, &v4(TCP)), HashReport::None);
    // Types of the other IP version do not count.
    let v6_types = HashTypes::from_bits(HashTypes::ALL.bits() & !7);
    assert_eq!(hasher(v6_types).hash_flow(&v4(TCP)), PacketHash::default());
}

fn v6(extended: bool, transport: Option<Transport>) -> Flow {
    let address = |last| Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, last);
    let addresses = ExtendedAddresses {
        source: address(3),
        destination: address(4),
    };
    let extended = extended.then_some(addresses);
    Flow::V6(FlowV6 {
        source: address(1),
        destination: address(2),
        extended,
        transport,
    })
}

#[test]
fn extended_types_come_first_for_packets_with_extension_headers() {
    let all = HashTypes::ALL;
    assert_eq!(report(all, &v6(true, TCP)), HashReport::TcpV6Ex);
    assert_eq!(report(all, &v6(true, UDP)), HashReport::UdpV6Ex);
    assert_eq!(report(all, &v6(true, None)), HashReport::IpV6Ex);
    // IP_EX is consulted before the plain types.
    assert_eq!(
        report(HashTypes::IP_EX | HashTypes::TCPV6, &v6(true, TCP)),
        HashReport::IpV6Ex
    );
    // Without an extended type that fits, the headers are skipped.
    let plain = HashTypes::TCPV6 | HashTypes::UDPV6 | HashTypes::IPV6;
    assert_eq!(
        report(plain | HashTypes::UDP_EX, &v6(true, TCP)),
        HashReport::TcpV6
    );
    assert_eq!(report(plain, &v6(true, UDP)), HashReport::UdpV6);
    assert_eq!(report(plain, &v6(true, None)), HashReport::IpV6);
    assert_eq!(report(HashTypes::TCP_EX, &v6(true, UDP)), HashReport::None);
}

#[test]
fn extended_types_do_not_serve_packets_without_extension_headers() {
    let extended = HashTypes::IP_EX | HashTypes::TCP_EX | HashTypes::UDP_EX;
    for transport in [None, TCP, UDP] {
        assert_eq!(report(extended, &v6(false, transport)), HashReport::None);
    }
    assert_eq!(report(HashTypes::ALL, &v6(false, TCP)), HashReport::TcpV6);
    assert_eq!(report(HashTypes::ALL, &v6(false, UDP)), HashReport::UdpV6);
    assert_eq!(report(HashTypes::ALL, &v6(false, None)), HashReport::IpV6);
}

#[test]
fn home_addresses_are_hashed_by_extended_types_only() {
    let Flow::V6(with) = v6(true, TCP) else {
        panic!("built as IPv6")
    };
    let home = with.extended.unwrap();
    let as_if = Flow::V6(FlowV6 {
        source: home.source,
        destination: home.destination,
        extended: None,
        transport: with.transport,
    });
    let plain = hasher(HashTypes::TCPV6);
    let extended = hasher(HashTypes::TCP_EX).hash_flow(&Flow::V6(with));
    assert_eq!(extended.value, plain.hash_flow(&as_if).value);
    assert_eq!(
        plain.hash_flow(&Flow::V6(with)),
        plain.hash_flow(&v6(false, TCP))
    );
    assert_ne!(extended.value, plain.hash_flow(&Flow::V6(with)).value);
}

#[test]
fn secrets_do_not_reach_logs() {
    let shown = format!("{:?}", hasher(HashTypes::IPV4));
    assert!(shown.contains("Toeplitz(..)"), "{shown}");
}

proptest! {
    #[test]
    fn every_method_agrees_with_the_definition(
        key: [u8; 32],
        key_tail: [u8; 8],
        input in prop::collection::vec(any::<u8>(), 0..=MAX_INPUT_BYTES),
    ) {
        let key = HashKey::from((key, key_tail));
        let expected = hash_bitwise(&key, &input);
        for toeplitz in every_method(&key) {
            prop_assert_eq!(toeplitz.hash(&input), expected, "{:?}", toeplitz.method());
        }
    }

    /// Lengths on both sides of each limit between words, halves of words and blocks.
    #[test]
    fn every_method_agrees_at_each_length_on_one_and_many(
        key: [u8; 32],
        key_tail: [u8; 8],
        bytes in prop::collection::vec(any::<u8>(), 0..1000),
    ) {
        let key = HashKey::from((key, key_tail));
        for toeplitz in every_method(&key) {
            check_length::<2>(&toeplitz, &key, &bytes);
            check_length::<4>(&toeplitz, &key, &bytes);
            check_length::<5>(&toeplitz, &key, &bytes);
            check_length::<8>(&toeplitz, &key, &bytes);
            check_length::<9>(&toeplitz, &key, &bytes);
            check_length::<12>(&toeplitz, &key, &bytes);
            check_length::<13>(&toeplitz, &key, &bytes);
            check_length::<16>(&toeplitz, &key, &bytes);
            check_length::<17>(&toeplitz, &key, &bytes);
            check_length::<21>(&toeplitz, &key, &bytes);
            check_length::<29>(&toeplitz, &key, &bytes);
            check_length::<32>(&toeplitz, &key, &bytes);
            check_length::<33>(&toeplitz, &key, &bytes);
            check_length::<36>(&toeplitz, &key, &bytes);
        }
    }

    /// Padding with zeros is the same as a window that ends in zeros.
    #[test]
    fn short_keys_are_padded_with_zeros(
        key in prop::collection::vec(any::<u8>(), 0..=40),
        input: [u8; 32],
    ) {
        let padded = HashKey::padded(&key).unwrap();
        let bit = |i: usize| key.get(i / 8).is_some_and(|byte| byte & 0x80 >> (i % 8) != 0);
        let mut expected = 0_u32;
        for i in (0..256).filter(|i| input[i / 8] & 0x80 >> (i % 8) != 0) {
            expected ^= (0..32).fold(0, |window, j| window << 1 | u32::from(bit(i + j)));
        }
        prop_assert_eq!(Toeplitz::new(&padded).hash(&input), expected);
    }
}
