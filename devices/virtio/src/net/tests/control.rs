//! The control queue, hash reports and configuration.

use pci::PciDevice;

use super::*;
use crate::testing::RingLayout;

pub(super) const KEY: [u8; 40] = [
    0x6d, 0x5a, 0x56, 0xda, 0x25, 0x5b, 0x0e, 0xc2, 0x41, 0x67, 0x25, 0x3d, 0x43, 0xa3, 0x8f, 0xb0,
    0xd0, 0xca, 0x2b, 0xcb, 0xae, 0x7b, 0x30, 0xb4, 0x77, 0xcb, 0x2d, 0xa3, 0x80, 0x30, 0xf2, 0x0c,
    0x6a, 0x42, 0xb7, 0x3b, 0xbe, 0xac, 0x01, 0xfa,
];

/// HASH_CONFIG with `types` and [`KEY`]; the last reserved field as Linux fills it.
pub(super) fn hash_config(types: u32) -> Vec<u8> {
    let mut command = vec![4, 2];
    command.extend_from_slice(&types.to_le_bytes());
    command.extend_from_slice(&[0, 0, 0, 0, 0, 0, 1, 0, 40]);
    command.extend_from_slice(&KEY);
    command
}

fn with_header(header: &[u8], frame: &[u8]) -> Vec<u8> {
    [header, frame].concat()
}

#[test]
fn hash_goes_into_the_long_header() {
    let host = Host::new(1);
    let features = features::CTRL_VQ | features::HASH_REPORT | features::MRG_RXBUF;
    let mut card = host.card(features, &[256, 256, 16]);
    assert_eq!(host.calls.lock()[0], Call::Header(HeaderSize::V1Hash));
    for index in 0..8 {
        card.post(index, 1526);
    }
    // The host leaves garbage where it knows no fields.
    let packet = with_header(&[0xa5; 20], &tcp_frame());
    host.send(&packet);
    assert_eq!(card.used(RX).len, 74);
    let head = |num: u8, rest: [u8; 8]| [&[0xa5; 10][..], &[num, 0], &rest].concat();
    assert_eq!(card.buffer(0, 20), head(1, [0; 8]), "nothing is hashed yet");
    // The body in pieces, cut anywhere.
    assert_eq!(card.command(2, &hash_config(0x1ff), &[1, 4, 9]), 0);
    host.send(&packet);
    card.used(RX);
    let report = [0x78, 0xc1, 0xcc, 0x51, 2, 0, 0, 0];
    assert_eq!(card.buffer(1, 20), head(1, report), "TCP over IPv4");
    assert_eq!(card.buffer(1, 74)[20..], tcp_frame());
    assert_eq!(card.command(2, &hash_config(1), &[2]), 0);
    host.send(&packet);
    card.used(RX);
    let report = [0xc2, 0x8f, 0x3e, 0x32, 1, 0, 0, 0];
    assert_eq!(card.buffer(2, 20), head(1, report), "addresses only");
    let mut arp = tcp_frame();
    arp[13] = 6;
    host.send(&with_header(&[0xa5; 20], &arp));
    card.used(RX);
    assert_eq!(card.buffer(3, 20), head(1, [0; 8]), "no hash for ARP");
    // A refused command changes nothing.
    assert_eq!(card.command(2, &hash_config(1 << 9), &[2]), 1);
    host.send(&with_header(
        &[0xa5; 20],
        &[&tcp_frame()[..], &[0; 3000]].concat(),
    ));
    card.used(RX);
    assert_eq!(card.buffer(4, 20), head(3, report), "spans three buffers");
    let totals = card.counters.totals();
    assert_eq!(totals.hashed(), 3);
    assert_eq!(totals.hash_reports[..3], [2, 2, 1]);
}

#[test]
fn plain_header_is_untouched_but_for_num_buffers() {
    let host = Host::new(1);
    let mut card = host.card(features::CTRL_VQ | features::MRG_RXBUF, &[256, 256, 16]);
    card.post(0, 1526);
    card.put(BUFFERS + 100, &[0xee; 100]);
    let packet = with_header(&[0xa5; 12], &tcp_frame());
    host.send(&packet);
    assert_eq!(card.used(RX).len, 66);
    let mut expected = packet;
    expected[10..12].copy_from_slice(&[1, 0]);
    assert_eq!(card.buffer(0, 66), expected);
    assert_eq!(card.buffer(0, 200)[100..], [0xee; 100]);
    assert_eq!(card.command(2, &hash_config(1), &[2]), 1, "not negotiated");
    assert_eq!(card.counters.totals().hash_reports, [0; 10]);
}

#[test]
fn queue_pairs_are_switched() {
    let host = Host::new(2);
    let features = features::CTRL_VQ | features::MQ | features::MRG_RXBUF;
    let mut card = host.card(features, &[16, 16, 16, 16, 16]);
    let last = |host: &Host| host.calls.lock().last().unwrap().clone();
    assert_eq!(last(&host), Call::Attach(1, false), "one pair after reset");
    let set = |pairs: u16| [&[4, 0][..], &pairs.to_le_bytes()].concat();
    assert_eq!(card.command(4, &set(0), &[]), 1);
    assert_eq!(card.command(4, &set(3), &[]), 1);
    assert_eq!(card.command(4, &[4, 0, 2], &[]), 1, "short");
    assert_eq!(card.command(4, &set(2), &[1, 1]), 0);
    assert_eq!(last(&host), Call::Attach(1, true));
    // The second pair works.
    card.rings[2].add(&[], &[(BUFFERS, 100)]);
    card.driver.kick(2);
    (&host.peers[1]).write_all(&[0; 60]).unwrap();
    assert_eq!(card.used(2).len, 60);
    assert_eq!(card.command(4, &set(1), &[]), 0);
    assert_eq!(last(&host), Call::Attach(1, false));
}

#[test]
fn control_queue_comes_third_without_multi_queue() {
    let host = Host::new(2);
    let mut card = host.card(features::CTRL_VQ, &[16, 16, 16]);
    assert_eq!(card.command(2, &[4, 0, 1, 0], &[]), 1, "not negotiated");
    assert_eq!(card.command(2, &[9, 9], &[]), 1);
    assert_eq!(card.command(2, &[4], &[]), 1);
    // Pausing gives every queue its place back.
    use vm_migration::state::Pause;
    card.driver.device.pause().unwrap();
    card.driver.device.resume().unwrap();
    assert_eq!(card.command(2, &[9, 9], &[]), 1);
}

#[test]
fn offloads_follow_negotiation_and_command() {
    let host = Host::new(1);
    let features = features::CTRL_VQ
        | features::CTRL_GUEST_OFFLOADS
        | features::GUEST_CSUM
        | features::GUEST_TSO4;
    let mut card = host.card(features, &[16, 16, 16]);
    let last = |host: &Host| host.calls.lock().last().unwrap().clone();
    assert_eq!(last(&host), Call::Offloads(3));
    let set = |bits: u64| [&[5, 0][..], &bits.to_le_bytes()].concat();
    assert_eq!(card.command(2, &set(features::GUEST_CSUM), &[]), 0);
    assert_eq!(last(&host), Call::Offloads(1));
    assert_eq!(card.command(2, &set(features::GUEST_TSO6), &[]), 1);
    assert_eq!(last(&host), Call::Offloads(1));
}

#[test]
fn command_without_room_for_the_answer_breaks_the_device() {
    let host = Host::new(1);
    let mut card = host.card(features::CTRL_VQ, &[16, 16, 16]);
    card.rings[2].add(&[(BUFFERS, 10)], &[]);
    card.driver.kick(2);
    wait_for("reset request", || card.driver.status() & 64 != 0);
    // After a reset all is well.
    card.rings = card.driver.bring_up(features::CTRL_VQ, &[16, 16, 16]);
    assert_eq!(card.command(2, &[9, 9], &[]), 1);
}

#[test]
fn configuration_and_features() {
    let host = Host::new(2);
    let memory = memory();
    let mut driver = Driver::new(pci_device(host.net(), &memory, &Arc::default()), &memory);
    let offered = driver.offered();
    for bit in [
        features::MQ,
        features::MTU,
        features::HASH_REPORT,
        features::MRG_RXBUF,
    ] {
        assert_ne!(offered & bit, 0);
    }
    assert_eq!(offered & (1 << 10 | 1 << 14), 0, "no UFO");
    let mut config = [0; 24];
    for (place, half) in (0_u64..).zip(config.chunks_mut(4)) {
        driver.device.read_bar(0, 0x2000 + place * 4, half);
    }
    assert_eq!(config[..6], MAC);
    assert_eq!(config[6..12], [1, 0, 2, 0, 0xdc, 5]);
    assert_eq!(config[17..24], [40, 128, 0, 0xff, 1, 0, 0]);
    let refused = [
        features::HASH_REPORT,
        features::MQ,
        features::GUEST_TSO4,
        features::HOST_ECN | features::CSUM,
    ];
    for features in refused {
        assert!(!driver.negotiate(features | feature::VERSION_1));
    }
    assert!(driver.negotiate(offered), "all together");
    // A driver that does not enable the first pair is told so.
    driver.set_up_queue(0, RingLayout::at(0x10_0000, 16));
    driver.write8(20, 15);
    assert_ne!(driver.status() & 64, 0);
}

#[test]
fn impossible_cards_are_refused() {
    let host = Host::new(1);
    let none = Net::new(host.options.clone(), Vec::new());
    assert!(matches!(none, Err(NetError::Pairs { pairs: 0, .. })));
    for queue_size in [0, 1, 100] {
        let options = NetOptions {
            queue_size,
            ..host.options.clone()
        };
        let net = host.net();
        let backends = net.shared.backends().to_vec();
        assert!(matches!(
            Net::new(options, backends),
            Err(NetError::QueueSize { .. })
        ));
    }
}
