//! Frames of all kinds are built along with the flow they should give.

use proptest::prelude::*;

use super::*;

const NO_OPTION: [u8; 8] = [0, 0, 1, 4, 0, 0, 0, 0];

/// A frame, and the flow it was built of.
#[derive(Clone, Debug)]
struct Built {
    frame: Vec<u8>,
    flow: Option<Flow>,
}

/// What follows the IP headers: protocol, bytes, and the ports in them.
fn last_header() -> impl Strategy<Value = (u8, Vec<u8>, Option<Transport>)> {
    let kind = prop_oneof![
        Just((6, Some(Protocol::Tcp), 20)),
        Just((17, Some(Protocol::Udp), 8)),
        Just((1, None, 8)),
        Just((132, None, 12)),
        // No next header; a packet so short that it has no ports.
        Just((59, None, 0)),
        Just((6, None, 3)),
        Just((17, None, 0)),
    ];
    (kind, any::<[u8; 20]>()).prop_map(|((number, protocol, length), bytes)| {
        let transport = protocol.map(|protocol| Transport {
            protocol,
            source: u16::from_be_bytes([bytes[0], bytes[1]]),
            destination: u16::from_be_bytes([bytes[2], bytes[3]]),
        });
        (number, bytes[..length].to_vec(), transport)
    })
}

fn built_v4() -> impl Strategy<Value = (Vec<u8>, Flow)> {
    let words = 0_usize..=10;
    let fragment = prop_oneof![Just(0_u16), Just(0x4000), Just(0x2000), 1_u16..0x4000];
    (
        any::<[[u8; 4]; 2]>(),
        words,
        any::<[u8; 40]>(),
        fragment,
        last_header(),
    )
        .prop_map(
            |([source, destination], words, options, fragment, (number, last, transport))| {
                let total = u16::try_from(20 + words * 4 + last.len()).unwrap();
                let packet = [
                    &[0x45 + u8::try_from(words).unwrap(), 0],
                    &total.to_be_bytes()[..],
                    &[0, 1],
                    &fragment.to_be_bytes(),
                    &[64, number, 0, 0],
                    &source,
                    &destination,
                    &options[..words * 4],
                    &last,
                ];
                let transport = transport.filter(|_| fragment & 0x3fff == 0);
                let (source, destination) = (source.into(), destination.into());
                (
                    packet.concat(),
                    Flow::V4(FlowV4 {
                        source,
                        destination,
                        transport,
                    }),
                )
            },
        )
}

/// An extension header without its first byte, and the home address and routed address in it.
type Extension = (u8, Vec<u8>, Option<[u8; 16]>, Option<[u8; 16]>);

fn extension() -> impl Strategy<Value = Extension> {
    let plain = prop_oneof![
        Just(PROTO_HOP_BY_HOP),
        Just(PROTO_MOBILITY),
        Just(PROTO_HIP),
        Just(PROTO_SHIM6),
    ];
    prop_oneof![
        (plain, 0_u8..3).prop_map(|(kind, units)| {
            let rest = vec![0; usize::from(units) * 8 + 6];
            (kind, [vec![units], rest].concat(), None, None)
        }),
        (1_u8..5).prop_map(|words| {
            let rest = vec![0x5a; usize::from(words) * 4 + 6];
            (
                PROTO_AUTHENTICATION,
                [vec![words], rest].concat(),
                None,
                None,
            )
        }),
        Just((PROTO_DESTINATION, NO_OPTION[1..].to_vec(), None, None)),
        any::<[u8; 16]>().prop_map(|home| {
            let start = [2, 1, 2, 0, 0, 0xc9, 16];
            (
                PROTO_DESTINATION,
                [&start[..], &home].concat(),
                Some(home),
                None,
            )
        }),
        (any::<[u8; 16]>(), 0_u8..3, 0_u8..3).prop_map(|(to, kind, left)| {
            let header = [&[2, kind, left, 0, 0, 0, 0][..], &to].concat();
            let routed = (kind == ROUTING_TYPE_2 && left == 1).then_some(to);
            (PROTO_ROUTING, header, None, routed)
        }),
    ]
}

fn built_v6() -> impl Strategy<Value = (Vec<u8>, Flow)> {
    let chain = prop::collection::vec(extension(), 0..5);
    // Neither, a fragment, or an encrypted payload.
    let end = prop_oneof![
        Just(None),
        Just(Some(PROTO_FRAGMENT)),
        Just(Some(PROTO_ENCRYPTED))
    ];
    (any::<[[u8; 16]; 2]>(), chain, end, last_header()).prop_map(
        |([source, destination], chain, end, (number, last, transport))| {
            let numbers = chain
                .iter()
                .map(|header| header.0)
                .chain(end)
                .chain([number]);
            let numbers: Vec<u8> = numbers.collect();
            let mut payload = vec![];
            for ((_, header, ..), next) in chain.iter().zip(&numbers[1..]) {
                payload.push(*next);
                payload.extend(header);
            }
            if end.is_some() {
                payload.extend([number, 0, 0, 1, 1, 2, 3, 4]);
            }
            payload.extend(last);
            let length = u16::try_from(payload.len()).unwrap().to_be_bytes();
            let start = [&[0x60, 0, 0, 0], &length[..], &[numbers[0], 64]].concat();
            let packet = [&start[..], &source, &destination, &payload].concat();
            let home = chain.iter().filter_map(|header| header.2).next_back();
            let routed = chain.iter().filter_map(|header| header.3).next_back();
            let extended = (numbers.len() > 1).then(|| ExtendedAddresses {
                source: home.unwrap_or(source).into(),
                destination: routed.unwrap_or(destination).into(),
            });
            let flow = Flow::V6(FlowV6 {
                source: source.into(),
                destination: destination.into(),
                extended,
                transport: transport.filter(|_| end.is_none()),
            });
            (packet, flow)
        },
    )
}

/// A sound frame of any kind, with padding behind the packet.
fn built() -> impl Strategy<Value = Built> {
    let tag = (
        prop_oneof![Just([0x81, 0]), Just([0x88, 0xa8])],
        any::<[u8; 2]>(),
    );
    let tags = prop::collection::vec(tag, 0..4);
    let packet = prop_oneof![
        built_v4().prop_map(|built| ([8, 0], built)),
        built_v6().prop_map(|built| ([0x86, 0xdd], built)),
    ];
    let padding = prop::collection::vec(any::<u8>(), 0..30);
    (any::<[u8; 12]>(), tags, packet, padding).prop_map(
        |(addresses, tags, (kind, (packet, flow)), padding)| {
            let tags = tags.iter().flat_map(|(kind, tag)| [*kind, *tag]);
            let tags: Vec<u8> = tags.flatten().collect();
            let frame = [&addresses[..], &tags, &kind, &packet, &padding].concat();
            Built {
                frame,
                flow: Some(flow),
            }
        },
    )
}

proptest! {
    #[test]
    fn what_is_built_is_found(built in built()) {
        prop_assert_eq!(parse(&built.frame), built.flow);
    }

    /// Of a frame that is cut anywhere, the flow is that of the whole, or there is none.
    #[test]
    fn a_cut_frame_gives_the_same_flow_or_none(built in built()) {
        for length in 0..built.frame.len() {
            let part = parse(&built.frame[..length]);
            prop_assert!(part.is_none() || part == built.flow, "{:?} of {} bytes", part, length);
        }
    }

    #[test]
    fn any_bytes_are_taken(built in built(), changes: Vec<(prop::sample::Index, u8)>) {
        let mut frame = built.frame;
        for (at, byte) in changes {
            let at = at.index(frame.len());
            frame[at] = byte;
        }
        let addresses = match parse(&frame) {
            Some(Flow::V4(flow)) => [flow.source.octets(), flow.destination.octets()].concat(),
            Some(Flow::V6(flow)) => [flow.source.octets(), flow.destination.octets()].concat(),
            None => vec![frame[0]],
        };
        prop_assert!(frame.windows(addresses.len()).any(|window| window == addresses));
    }

    #[test]
    fn any_packet_is_taken(behind in prop::collection::vec(any::<u8>(), 0..300), v6: bool) {
        let kind = if v6 { [0x86, 0xdd] } else { [8, 0] };
        let flow = parse(&[&[2; 12][..], &kind, &behind].concat());
        let version = behind.first().map(|byte| byte >> 4);
        let expected = if v6 { 6 } else { 4 };
        prop_assert!(flow.is_none() || version == Some(expected));
    }
}
