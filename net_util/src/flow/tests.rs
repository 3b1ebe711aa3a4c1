use etherparse::{IpFragOffset, IpNumber, Ipv4Header, PacketBuilder};

use super::*;

const A4: [u8; 4] = [66, 9, 149, 187];
const B4: [u8; 4] = [161, 142, 100, 80];
const A6: [u8; 16] = [0xfd, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15];
const B6: [u8; 16] = [0xfe, 0x80, 0, 0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8];
const HOME: [u8; 16] = [0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x99];
const ROUTED: [u8; 16] = [0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x77];

const NO_OPTION: [u8; 8] = [0, 0, 1, 4, 0, 0, 0, 0];

const fn ports(protocol: Protocol) -> Option<Transport> {
    Some(Transport {
        protocol,
        source: 2794,
        destination: 1766,
    })
}

fn flow4(transport: Option<Transport>) -> Option<Flow> {
    Some(Flow::V4(FlowV4 {
        source: A4.into(),
        destination: B4.into(),
        transport,
    }))
}

fn flow6(extended: Option<([u8; 16], [u8; 16])>, transport: Option<Transport>) -> Option<Flow> {
    let extended = extended.map(|(a, b)| ExtendedAddresses {
        source: a.into(),
        destination: b.into(),
    });
    Some(Flow::V6(FlowV6 {
        source: A6.into(),
        destination: B6.into(),
        extended,
        transport,
    }))
}

/// An Ethernet frame with these bytes behind the addresses.
fn frame(behind_addresses: &[&[u8]]) -> Vec<u8> {
    let mut frame = vec![0x52, 0x54, 0, 0, 0, 1, 0x52, 0x54, 0, 0, 0, 2];
    frame.extend(behind_addresses.concat());
    frame
}

/// An IPv6 frame: each header gets the number of the one behind it into its first byte.
fn frame6(headers: &[(u8, &[u8])], last: (u8, &[u8])) -> Vec<u8> {
    let numbers: Vec<u8> = headers.iter().map(|(n, _)| *n).chain([last.0]).collect();
    let mut payload = Vec::new();
    for (i, (_, header)) in headers.iter().enumerate() {
        payload.push(numbers[i + 1]);
        payload.extend(&header[1..]);
    }
    payload.extend(last.1);
    let len = u16::try_from(payload.len()).unwrap().to_be_bytes();
    frame(&[
        &[0x86, 0xdd, 0x60, 0, 0, 0],
        &len,
        &[numbers[0], 64],
        &A6,
        &B6,
        &payload,
    ])
}

const TCP_PAYLOAD: (u8, &[u8]) = (
    6,
    &[
        0x0a, 0xea, 0x06, 0xe6, 0, 0, 0, 0, 0, 0, 0, 0, 0x50, 0, 0, 0,
    ],
);
const UDP_PAYLOAD: (u8, &[u8]) = (17, &[0x0a, 0xea, 0x06, 0xe6, 0, 8, 0, 0]);

fn home_option() -> Vec<u8> {
    // Next header, length, PadN with 2 bytes, then the option.
    [&[0, 2, 1, 2, 0, 0, 0xc9, 16][..], &HOME].concat()
}

fn routing_header(kind: u8, segments_left: u8) -> Vec<u8> {
    [&[0, 2, kind, segments_left, 0, 0, 0, 0][..], &ROUTED].concat()
}

#[test]
fn tcp_and_udp_over_ipv4() {
    let builder = || PacketBuilder::ethernet2([2; 6], [4; 6]).ipv4(A4, B4, 64);
    let mut tcp = Vec::new();
    builder()
        .tcp(2794, 1766, 0, 100)
        .write(&mut tcp, b"data")
        .unwrap();
    assert_eq!(parse(&tcp), flow4(ports(Protocol::Tcp)));
    let mut udp = Vec::new();
    builder().udp(2794, 1766).write(&mut udp, b"data").unwrap();
    assert_eq!(parse(&udp), flow4(ports(Protocol::Udp)));
}

#[test]
fn other_protocols_have_addresses_only() {
    let mut icmp = Vec::new();
    let builder = PacketBuilder::ethernet2([2; 6], [4; 6]).ipv4(A4, B4, 64);
    builder
        .icmpv4_echo_request(1, 2)
        .write(&mut icmp, b"data")
        .unwrap();
    assert_eq!(parse(&icmp), flow4(None));
    // SCTP has ports in the same place, but no hash type.
    assert_eq!(parse(&frame6(&[], (132, UDP_PAYLOAD.1))), flow6(None, None));
}

#[test]
fn vlan_tags_are_skipped() {
    let ip = {
        let mut ip = Vec::new();
        PacketBuilder::ipv4(A4, B4, 64)
            .udp(2794, 1766)
            .write(&mut ip, b"")
            .unwrap();
        ip
    };
    let expected = flow4(ports(Protocol::Udp));
    assert_eq!(parse(&frame(&[&[0x81, 0, 0, 5, 8, 0], &ip])), expected);
    assert_eq!(
        parse(&frame(&[&[0x88, 0xa8, 0, 5, 0x81, 0, 0, 6, 8, 0], &ip])),
        expected
    );
    assert_eq!(parse(&frame(&[&[0x81, 0, 0, 5]])), None);
    let tags = |count| [0x81, 0, 0, 5].repeat(count);
    let tagged = |count| parse(&frame(&[&tags(count), &[8, 0], &ip]));
    assert_eq!(tagged(MAX_HEADERS), expected);
    assert_eq!(tagged(MAX_HEADERS + 1), None);
}

#[test]
fn extension_headers_and_tags_are_bounded_together() {
    let chain = |headers, tags, last| {
        let plain = frame6(&vec![(PROTO_DESTINATION, &NO_OPTION[..]); headers], last);
        let (addresses, behind) = plain.split_at(12);
        let tags = [0x88, 0xa8, 0, 5].repeat(tags);
        parse(&[addresses, &tags, behind].concat())
    };
    let found = flow6(Some((A6, B6)), ports(Protocol::Udp));
    assert_eq!(chain(MAX_HEADERS, 0, UDP_PAYLOAD), found);
    assert_eq!(chain(MAX_HEADERS - 3, 3, UDP_PAYLOAD), found);
    assert_eq!(chain(MAX_HEADERS + 1, 0, UDP_PAYLOAD), None);
    assert_eq!(chain(MAX_HEADERS - 3, 4, UDP_PAYLOAD), None);
    // A fragment's header counts like the others.
    let fragment = (PROTO_FRAGMENT, &[17, 0, 0, 1, 0, 0, 0, 1][..]);
    assert_eq!(
        chain(MAX_HEADERS - 1, 0, fragment),
        flow6(Some((A6, B6)), None)
    );
    assert_eq!(chain(MAX_HEADERS, 0, fragment), None);
}

#[test]
fn what_is_not_ip_is_no_flow() {
    assert_eq!(parse(&[]), None);
    assert_eq!(parse(&frame(&[])), None);
    assert_eq!(parse(&frame(&[&[8, 6], &[0; 28]])), None);
    // 802.3 length instead of a type.
    assert_eq!(parse(&frame(&[&[0, 46], &[0; 46]])), None);
    // A tag by a number that 802.1 did not give, and PPPoE.
    let mut ip = vec![];
    let builder = PacketBuilder::ipv4(A4, B4, 64).udp(2794, 1766);
    builder.write(&mut ip, b"").unwrap();
    assert_eq!(parse(&frame(&[&[0x91, 0, 0, 5, 8, 0], &ip])), None);
    let session = [0x88, 0x64, 0x11, 0, 0, 1, 0, 30, 0, 0x21];
    assert_eq!(parse(&frame(&[&session, &ip])), None);
}

#[test]
fn tunnels_are_not_entered() {
    let mut inner = vec![];
    let builder = PacketBuilder::ipv4(HOME[..4].try_into().unwrap(), B4, 64).udp(1, 2);
    builder.write(&mut inner, b"").unwrap();
    for protocol in [4, 41, 47] {
        assert_eq!(parse(&frame6(&[], (protocol, &inner))), flow6(None, None));
    }
}

/// A frame with this IPv4 header and a TCP payload.
fn frame4(change: impl FnOnce(&mut Ipv4Header)) -> Vec<u8> {
    let mut header = Ipv4Header::new(16, 64, IpNumber::TCP, A4, B4).unwrap();
    change(&mut header);
    frame(&[&[8, 0], &header.to_bytes(), TCP_PAYLOAD.1])
}

#[test]
fn ipv4_options_are_skipped() {
    let with_options = frame4(|header| {
        header.options = [1; 12].into();
        header.total_len += 12;
    });
    assert_eq!(parse(&with_options), flow4(ports(Protocol::Tcp)));
}

#[test]
fn ipv4_fragments_have_addresses_only() {
    assert_eq!(parse(&frame4(|h| h.more_fragments = true)), flow4(None));
    let later = |h: &mut Ipv4Header| h.fragment_offset = IpFragOffset::try_new(1).unwrap();
    assert_eq!(parse(&frame4(later)), flow4(None));
    let last = |h: &mut Ipv4Header| h.fragment_offset = IpFragOffset::try_new(0x1000).unwrap();
    assert_eq!(parse(&frame4(last)), flow4(None));
    assert_eq!(
        parse(&frame4(|h| h.dont_fragment = true)),
        flow4(ports(Protocol::Tcp))
    );
}

#[test]
fn ipv4_length_hides_padding() {
    assert_eq!(
        parse(&frame4(|h| h.total_len = 24)),
        flow4(ports(Protocol::Tcp))
    );
    assert_eq!(parse(&frame4(|h| h.total_len = 23)), flow4(None));
    assert_eq!(parse(&frame4(|h| h.total_len = 20)), flow4(None));
    assert_eq!(parse(&frame4(|h| h.total_len = 19)), None);
    // Longer than what is there: the head of a frame, or one of more than 64 KiB.
    assert_eq!(
        parse(&frame4(|h| h.total_len = 60000)),
        flow4(ports(Protocol::Tcp))
    );
    assert_eq!(parse(&frame4(|h| h.total_len = 0)), None);
}

#[test]
fn malformed_ipv4_headers_are_no_flow() {
    for version_and_length in [0x44, 0x40, 0x55, 0x65, 0x05] {
        let mut bad = frame4(|_| ());
        bad[14] = version_and_length;
        assert_eq!(parse(&bad), None, "{version_and_length:#x}");
    }
    let mut cut_options = frame4(|_| ());
    cut_options[14] = 0x4f;
    assert_eq!(parse(&cut_options), None);
}

#[test]
fn plain_ipv6() {
    assert_eq!(
        parse(&frame6(&[], TCP_PAYLOAD)),
        flow6(None, ports(Protocol::Tcp))
    );
    assert_eq!(
        parse(&frame6(&[], UDP_PAYLOAD)),
        flow6(None, ports(Protocol::Udp))
    );
    assert_eq!(
        parse(&frame6(&[], (58, &[128, 0, 0, 0]))),
        flow6(None, None)
    );
    let mut version_4 = frame6(&[], TCP_PAYLOAD);
    version_4[14] = 0x45;
    assert_eq!(parse(&version_4), None);
}

#[test]
fn ipv6_length_hides_padding() {
    let with_length = |len: u8| {
        let mut frame = frame6(&[], TCP_PAYLOAD);
        frame[19] = len;
        parse(&frame)
    };
    assert_eq!(with_length(4), flow6(None, ports(Protocol::Tcp)));
    assert_eq!(with_length(3), flow6(None, None));
    assert_eq!(with_length(0), flow6(None, None));
    assert_eq!(with_length(255), flow6(None, ports(Protocol::Tcp)));
}

#[test]
fn extension_headers_are_walked() {
    let plain = Some((A6, B6));
    let kinds = [
        PROTO_HOP_BY_HOP,
        PROTO_DESTINATION,
        PROTO_MOBILITY,
        PROTO_HIP,
        PROTO_SHIM6,
    ];
    for kind in kinds {
        let packet = frame6(&[(kind, &NO_OPTION)], TCP_PAYLOAD);
        assert_eq!(parse(&packet), flow6(plain, ports(Protocol::Tcp)), "{kind}");
    }
    // Authentication counts its length differently: (1 + 2) * 4 bytes.
    let authentication = [0, 1, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8];
    let packet = frame6(
        &[
            (PROTO_HOP_BY_HOP, &NO_OPTION),
            (PROTO_AUTHENTICATION, &authentication),
        ],
        UDP_PAYLOAD,
    );
    assert_eq!(parse(&packet), flow6(plain, ports(Protocol::Udp)));
}

#[test]
fn home_addresses_are_noted() {
    let (home, routing) = (home_option(), routing_header(ROUTING_TYPE_2, 1));
    let packet = frame6(&[(PROTO_DESTINATION, &home)], TCP_PAYLOAD);
    assert_eq!(
        parse(&packet),
        flow6(Some((HOME, B6)), ports(Protocol::Tcp))
    );
    let packet = frame6(&[(PROTO_ROUTING, &routing)], TCP_PAYLOAD);
    assert_eq!(
        parse(&packet),
        flow6(Some((A6, ROUTED)), ports(Protocol::Tcp))
    );
    let headers = [
        (PROTO_HOP_BY_HOP, &NO_OPTION[..]),
        (PROTO_ROUTING, &routing),
        (PROTO_DESTINATION, &home),
    ];
    let packet = frame6(&headers, UDP_PAYLOAD);
    assert_eq!(
        parse(&packet),
        flow6(Some((HOME, ROUTED)), ports(Protocol::Udp))
    );
    assert!(packet.len() < HEAD_BYTES);
}

#[test]
fn only_sound_mobility_headers_count() {
    let plain = flow6(Some((A6, B6)), ports(Protocol::Tcp));
    for (kind, segments_left) in [(ROUTING_TYPE_2, 0), (ROUTING_TYPE_2, 2), (0, 1), (4, 1)] {
        let routing = routing_header(kind, segments_left);
        assert_eq!(
            parse(&frame6(&[(PROTO_ROUTING, &routing)], TCP_PAYLOAD)),
            plain
        );
    }
    let mut wrong_length = home_option();
    // As an option of 15 bytes, and a Pad1 behind it.
    wrong_length[7] = 15;
    *wrong_length.last_mut().unwrap() = 0;
    assert_eq!(
        parse(&frame6(&[(PROTO_DESTINATION, &wrong_length)], TCP_PAYLOAD)),
        plain
    );
    // Among hop-by-hop options a home address means nothing.
    assert_eq!(
        parse(&frame6(&[(PROTO_HOP_BY_HOP, &home_option())], TCP_PAYLOAD)),
        plain
    );
}

#[test]
fn ipv6_fragments_have_addresses_only() {
    for offset_and_more in [0, 1, 8] {
        let fragment = [0, 0, 0, offset_and_more, 0, 0, 0, 1];
        let packet = frame6(&[(PROTO_FRAGMENT, &fragment)], TCP_PAYLOAD);
        assert_eq!(parse(&packet), flow6(Some((A6, B6)), None));
    }
    let home = home_option();
    let headers = [
        (PROTO_DESTINATION, &home[..]),
        (PROTO_FRAGMENT, &[0, 0, 0, 1, 0, 0, 0, 1]),
    ];
    assert_eq!(
        parse(&frame6(&headers, TCP_PAYLOAD)),
        flow6(Some((HOME, B6)), None)
    );
}

#[test]
fn nothing_is_read_behind_an_encrypted_payload() {
    let home = home_option();
    let packet = frame6(
        &[(PROTO_DESTINATION, &home)],
        (PROTO_ENCRYPTED, TCP_PAYLOAD.1),
    );
    assert_eq!(parse(&packet), flow6(Some((HOME, B6)), None));
    assert_eq!(parse(&frame6(&[], (PROTO_ENCRYPTED, &[0; 7]))), None);
}

#[test]
fn ports_that_are_cut_off_make_no_flow() {
    // By its length the packet has ports; the frame ends in the middle of them.
    let v4 = frame4(|_| ());
    assert_eq!(parse(&v4[..14 + 20 + 4]), flow4(ports(Protocol::Tcp)));
    assert_eq!(parse(&v4[..14 + 20 + 3]), None);
    assert_eq!(parse(&v4[..14 + 20]), None);
    let v6 = frame6(&[(PROTO_HOP_BY_HOP, &NO_OPTION)], UDP_PAYLOAD);
    let found = flow6(Some((A6, B6)), ports(Protocol::Udp));
    assert_eq!(parse(&v6[..14 + 40 + 8 + 4]), found);
    assert_eq!(parse(&v6[..14 + 40 + 8 + 3]), None);
}

#[test]
fn malformed_chains_are_no_flow() {
    // The header says 16 bytes and there are 8.
    let too_long = [0, 1, 1, 4, 0, 0, 0, 0];
    assert_eq!(
        parse(&frame6(&[(PROTO_HOP_BY_HOP, &too_long)], (59, &[]))),
        None
    );
    // An option that reaches beyond its header.
    let option_too_long = [0, 0, 5, 5, 0, 0, 0, 0];
    assert_eq!(
        parse(&frame6(
            &[(PROTO_DESTINATION, &option_too_long)],
            TCP_PAYLOAD
        )),
        None
    );
    let option_without_length = [0, 0, 1, 3, 0, 0, 0, 5];
    assert_eq!(
        parse(&frame6(
            &[(PROTO_DESTINATION, &option_without_length)],
            TCP_PAYLOAD
        )),
        None
    );
    assert_eq!(
        parse(&frame6(&[(PROTO_FRAGMENT, &[0; 4])], (59, &[]))),
        None
    );
    assert_eq!(parse(&frame6(&[], (PROTO_ROUTING, &[]))), None);
    // The chain goes on past the head.
    let long = [&[0, 255][..], &[0; 2046]].concat();
    let packet = frame6(&[(PROTO_DESTINATION, &long)], TCP_PAYLOAD);
    assert_eq!(parse(&packet[..HEAD_BYTES]), None);
    assert_eq!(parse(&packet), flow6(Some((A6, B6)), ports(Protocol::Tcp)));
}
