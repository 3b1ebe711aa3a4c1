//! Save and restore under traffic.

use net_util::ctrl::RssConfig;
use net_util::hash::HashConfig;
use vm_migration::state::{Pause, SaveRestore};

use super::control::hash_config;
use super::runtime::Hashing;
use super::state::NetState1;
use super::*;

const FEATURES: u64 = features::CTRL_VQ
    | features::HASH_REPORT
    | features::MRG_RXBUF
    | features::STATUS
    | features::GUEST_ANNOUNCE
    | features::MQ
    | feature::RING_EVENT_IDX
    | feature::RING_INDIRECT_DESC;

/// Moves the card to a new device on the same host ends, as a destination would.
fn migrate(card: &mut Card, host: &Host) {
    card.driver.device.pause().unwrap();
    let state = card.driver.device.save().unwrap();
    let net = host.net();
    let counters = net.counters();
    let fabric = Arc::default();
    let mut device = pci_device(net, &card.driver.memory, &fabric);
    device.pause().unwrap();
    device.restore(&state).unwrap();
    device.resume().unwrap();
    card.driver.device = device;
    card.fabric = fabric;
    card.counters = counters;
}

#[test]
fn settings_move_and_the_tap_is_set_again() {
    let host = Host::new(2);
    let mut card = host.card(FEATURES, &[16, 16, 16, 16, 16]);
    assert_eq!(card.command(4, &hash_config(0x1ff), &[2]), 0);
    assert_eq!(card.command(4, &[4, 0, 2, 0], &[2]), 0);
    assert_eq!(
        card.driver.read16(0x2006),
        1,
        "link up, nothing to announce"
    );
    host.calls.lock().clear();
    migrate(&mut card, &host);
    let calls = host.calls.lock().clone();
    let expected = [
        Call::Header(HeaderSize::V1Hash),
        Call::Offloads(0),
        Call::Attach(1, true),
    ];
    assert_eq!(calls, expected);
    card.post(0, 1526);
    host.send(&[&[0; 20][..], &tcp_frame()].concat());
    card.used(RX);
    assert_eq!(card.buffer(0, 20)[12..18], [0x78, 0xc1, 0xcc, 0x51, 2, 0]);
    // The guest is asked to announce itself, and acknowledges.
    wait_for("configuration interrupt", || card.fabric.line(5).take() > 0);
    assert_eq!(card.driver.read16(0x2006), 3);
    assert_eq!(card.command(4, &[3, 0], &[]), 0);
    assert_eq!(card.driver.read16(0x2006), 1);
    // A reset forgets all of it.
    card.driver.write8(20, 0);
    card.rings = card.driver.bring_up(FEATURES, &[16, 16, 16, 16, 16]);
    assert_eq!(*host.calls.lock().last().unwrap(), Call::Attach(1, false));
    card.post(0, 1526);
    host.send(&[&[0; 20][..], &tcp_frame()].concat());
    card.used(RX);
    assert_eq!(card.buffer(0, 20)[12..18], [0; 6]);
}

/// Offset of the status in the BAR, and its bits.
const STATUS: u64 = 0x2006;
const UP: u16 = 1;
const UP_AND_ANNOUNCE: u16 = 3;

#[test]
fn a_driver_is_asked_to_announce_until_it_does() {
    let host = Host::new(1);
    let features = FEATURES & !features::MQ;
    let mut card = host.card(features, &[16, 16, 16]);
    assert_eq!(card.driver.read16(STATUS), UP);
    // It moves on before it has answered: each new place asks again.
    for place in 0..3 {
        migrate(&mut card, &host);
        assert_eq!(card.fabric.line(3).take(), 1, "interrupt at place {place}");
        assert_eq!(card.driver.read16(STATUS), UP_AND_ANNOUNCE);
    }
    // A pause is no move, but does not make it forget either.
    card.driver.device.pause().unwrap();
    card.driver.device.resume().unwrap();
    assert_eq!(card.driver.read16(STATUS), UP_AND_ANNOUNCE);
    assert_eq!(card.fabric.line(3).take(), 1);
    assert_eq!(card.command(2, &[3, 0], &[]), 0);
    assert_eq!(card.driver.read16(STATUS), UP);
    // A migration that failed: the source goes on where it was, and there is nothing to tell.
    card.driver.device.pause().unwrap();
    card.driver.device.save().unwrap();
    card.driver.device.resume().unwrap();
    assert_eq!(card.driver.read16(STATUS), UP);
    assert_eq!(card.fabric.line(3).take(), 0);
}

#[test]
fn a_driver_that_cannot_announce_is_not_asked() {
    let host = Host::new(1);
    let features = FEATURES & !features::MQ & !features::GUEST_ANNOUNCE;
    let mut card = host.card(features, &[16, 16, 16]);
    migrate(&mut card, &host);
    assert_eq!(card.driver.read16(STATUS), UP);
    assert_eq!(card.fabric.line(3).take(), 0);
    assert_eq!(
        card.command(2, &[3, 0], &[]),
        1,
        "a command it did not negotiate"
    );
}

#[test]
fn no_packet_is_lost_or_doubled_by_moving() {
    let host = Host::new(1);
    let features = FEATURES & !features::MQ & !features::HASH_REPORT;
    let mut card = host.card(features, &[64, 64, 16]);
    let mut expected_in = 0_u32;
    let mut posted = 0;
    let mut sent_in = 0_u32;
    for round in 0..20_u32 {
        // Some packets wait in the host, some buffers are taken ahead, some are used.
        while posted < u64::from(expected_in) + 40 {
            card.post(posted % 64, 512);
            posted += 1;
        }
        for _ in 0..17 {
            host.send(&[&[0; 12][..], &sent_in.to_le_bytes(), &[0; 60]].concat());
            sent_in += 1;
        }
        for n in 0..17_u32 {
            let address = BUFFERS + 0x20_0000 + u64::from(n) * 0x100;
            card.put(address, &[0; 100]);
            card.put(address + 12, &(round * 17 + n).to_le_bytes());
            card.rings[TX].add(&[(address, 100)], &[]);
        }
        card.driver.kick(1);
        // Move at once, whatever has been done so far.
        migrate(&mut card, &host);
        for n in 0..17_u32 {
            let mut packet = None;
            wait_for("packet", || {
                packet = host.receive();
                packet.is_some()
            });
            assert_eq!(packet.unwrap()[12..16], (round * 17 + n).to_le_bytes());
        }
        for _ in 0..17 {
            card.used(TX);
        }
        while expected_in < sent_in {
            assert_eq!(card.used(RX).len, 76);
            let slot = u64::from(expected_in % 64);
            let bytes = card.buffer(slot, 16);
            assert_eq!(
                bytes[12..],
                expected_in.to_le_bytes(),
                "in order, each once"
            );
            expected_in += 1;
        }
        assert_eq!(host.receive(), None);
        assert_eq!(card.rings[RX].pop_used(), None);
    }
}

#[test]
fn paused_card_writes_no_memory() {
    let host = Host::new(1);
    let mut card = host.card(FEATURES & !features::MQ, &[64, 64, 16]);
    card.post(0, 512);
    card.driver.device.pause().unwrap();
    let before = card.buffer(0, 512);
    host.send(&pattern(200, 11));
    std::thread::sleep(std::time::Duration::from_millis(20));
    assert_eq!(card.rings[RX].pop_used(), None);
    assert_eq!(card.buffer(0, 512), before);
    card.driver.device.resume().unwrap();
    assert_eq!(card.used(RX).len, 200);
}

#[test]
fn states_that_do_not_fit_are_refused() {
    let host = Host::new(2);
    let mut card = host.card(FEATURES, &[16, 16, 16, 16, 16]);
    card.driver.device.pause().unwrap();
    let state = card.driver.device.save().unwrap();
    let refusal = |host: &Host| {
        let memory = memory();
        let mut device = pci_device(host.net(), &memory, &Arc::default());
        device.pause().unwrap();
        device.restore(&state).unwrap_err()
    };
    let error = refusal(&Host::new(1)).to_string();
    assert!(error.contains("queues"), "{error}");
    let mut other = Host::new(2);
    other.options.hash_report = false;
    let error = refusal(&other).to_string();
    assert!(error.contains("features"), "{error}");
    let mut other = Host::new(2);
    other.options.queue_size = 8;
    let error = refusal(&other).to_string();
    assert!(error.contains("size"), "{error}");
}

/// A card's own state, with `runtime` set and these packets waiting.
fn state(runtime: Runtime, waiting: state::Waiting) -> NetState {
    NetState {
        version: STATE_VERSION,
        mac: MAC,
        mtu: Some(1500),
        runtime,
        waiting,
    }
}

fn restored(host: &Host, state: &NetState) -> Result<(), String> {
    let bytes = postcard::to_stdvec(state).unwrap();
    let restored = host.net().restore(&bytes);
    restored.map_err(|error| error.to_string())
}

#[test]
fn states_of_cards_that_cannot_be_are_refused() {
    let mut host = Host::new(2);
    host.options.rss = true;
    host.options.hash_types = HashTypes::from_bits(0x3f);
    let table = |types, entries: &[u16], unclassified, transmit| {
        let hash = HashConfig {
            types: HashTypes::from_bits(types),
            ..HashConfig::default()
        };
        Runtime {
            hashing: Hashing::Table(
                RssConfig::new(hash, entries.into(), unclassified, transmit).unwrap(),
            ),
            ..Runtime::default()
        }
    };
    assert_eq!(restored(&host, &state(Runtime::default(), vec![])), Ok(()));
    assert_eq!(
        restored(&host, &state(table(0x3f, &[0, 1], 1, 2), vec![])),
        Ok(())
    );
    let packet = |len| vec![(1, vec![vec![0; len]])];
    assert_eq!(
        restored(&host, &state(Runtime::default(), packet(60))),
        Ok(())
    );
    let pairs = |pairs| Runtime {
        pairs,
        ..Runtime::default()
    };
    let refused = [
        (state(pairs(3), vec![]), "queue pairs"),
        (state(pairs(0), vec![]), "queue pairs"),
        (state(table(0x1ff, &[0, 1], 1, 2), vec![]), "hash types"),
        (state(table(1, &[0, 2], 1, 2), vec![]), "receive queue 2"),
        (
            state(table(1, &[0, 1], 2, 2), vec![]),
            "without a hash is 2",
        ),
        (state(table(1, &[0, 1], 1, 3), vec![]), "transmit queues"),
        (state(table(1, &[0, 1], 1, 0), vec![]), "transmit queues"),
        (state(Runtime::default(), packet(11)), "11 bytes waits"),
        (
            state(Runtime::default(), packet(70_000)),
            "70000 bytes waits",
        ),
        (
            state(Runtime::default(), vec![(2, vec![vec![0; 60]])]),
            "queue pair 2",
        ),
        (
            state(Runtime::default(), vec![(0, vec![vec![0; 60_000]; 100])]),
            "bytes of packets wait",
        ),
    ];
    for (state, reason) in refused {
        let error = restored(&host, &state).unwrap_err();
        assert!(error.contains(reason), "{error}");
    }
    let other_mtu = NetState {
        mtu: Some(9000),
        ..state(Runtime::default(), vec![])
    };
    let error = restored(&host, &other_mtu).unwrap_err();
    assert!(error.contains("MTU"), "{error}");
    host.options.rss = false;
    let error = restored(&host, &state(table(1, &[0, 1], 1, 2), vec![])).unwrap_err();
    assert!(error.contains("steers by a table"), "{error}");
}

#[test]
fn states_of_the_version_before_are_read_and_others_are_refused_by_name() {
    let host = Host::new(2);
    let hash = HashConfig {
        types: HashTypes::from_bits(5),
        key: [7; 40].into(),
    };
    let old = NetState1 {
        version: 1,
        mac: [2, 0, 0, 0, 0, 9],
        mtu: Some(1500),
        pairs: 2,
        offloads: Some(3),
        hash,
        announce: false,
    };
    let mut bytes = postcard::to_stdvec(&old).unwrap();
    let mut net = host.net();
    net.restore(&bytes).unwrap();
    let expected = Runtime {
        pairs: 2,
        offloads: Some(3),
        hashing: Hashing::Automatic(hash),
        announce: true,
    };
    assert_eq!(net.shared.runtime(), expected);
    assert_eq!(net.mac, [2, 0, 0, 0, 0, 9]);
    bytes[0] = 3;
    let error = net.restore(&bytes).unwrap_err().to_string();
    assert!(
        error.contains("version 3, this build reads versions 1 to 2"),
        "{error}"
    );
}

/// A frame that asks for the address of `mac`, for all stations (RFC 903).
fn reverse_request(mac: [u8; 6]) -> Vec<u8> {
    let mut frame = vec![0xff; 6];
    frame.extend(mac);
    frame.extend([0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3]);
    frame.extend(mac);
    frame.extend([0; 4]);
    frame.extend(mac);
    frame.extend([0; 22]);
    frame
}

#[test]
fn a_guest_that_cannot_announce_itself_is_announced() {
    for header in [12, 20] {
        let host = Host::new(1);
        let report = if header == 20 {
            features::HASH_REPORT
        } else {
            0
        };
        let features = features::CTRL_VQ | features::MRG_RXBUF | report;
        let mut card = host.card(features, &[16, 16, 16]);
        assert_eq!(host.receive(), None);
        migrate(&mut card, &host);
        let start = std::time::Instant::now();
        let mut packets = Vec::new();
        wait_for("five frames", || {
            packets.extend(host.receive());
            // In the middle the card stops and goes on.
            if packets.len() == 2 && card.counters.totals().announcements == 2 {
                card.driver.device.pause().unwrap();
                card.driver.device.resume().unwrap();
            }
            packets.len() == 5
        });
        let took = start.elapsed();
        assert!(took > std::time::Duration::from_millis(600), "{took:?}");
        for packet in packets {
            assert_eq!(packet.len(), header + 60);
            assert_eq!(packet[..header], vec![0; header]);
            assert_eq!(packet[header..], reverse_request(MAC));
        }
        assert_eq!(card.counters.totals().announcements, 5);
        std::thread::sleep(std::time::Duration::from_millis(50));
        assert_eq!(host.receive(), None, "no more of them");
        assert_eq!(card.counters.totals().tx_packets, 0);
    }
    // One that can is asked to.
    let host = Host::new(1);
    let mut card = host.card(FEATURES & !features::MQ, &[16, 16, 16]);
    migrate(&mut card, &host);
    std::thread::sleep(std::time::Duration::from_millis(50));
    assert_eq!(host.receive(), None);
}
