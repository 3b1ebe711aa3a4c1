//! Packets in both directions.

use vm_migration::addr::{Gpa, Iova, IovaRange};
use vm_migration::memory::{Backing, RamMapping, forget_writes, map_ram};

use super::*;
use crate::testing::{RAM, is_logged};

const RING: u64 = feature::RING_EVENT_IDX | feature::RING_INDIRECT_DESC;

#[test]
fn packet_spans_mergeable_buffers() {
    let host = Host::new(1);
    let mut card = host.card(features::MRG_RXBUF | RING, &[256, 256]);
    assert_eq!(host.calls.lock()[0], Call::Header(HeaderSize::V1));
    for index in 0..8 {
        card.post(index, 1526);
    }
    let mut packet = pattern(12 + 5000, 1);
    packet[10..12].fill(0);
    host.send(&packet);
    let lens = [1526, 1526, 1526, 5012 - 3 * 1526];
    for (index, len) in (0..).zip(lens) {
        assert_eq!(card.used(RX).len, len);
        let start = 1526 * usize::try_from(index).unwrap();
        let len = usize::try_from(len).unwrap();
        let mut expected = packet[start..start + len].to_vec();
        if index == 0 {
            expected[10..12].copy_from_slice(&4_u16.to_le_bytes());
        }
        assert!(card.buffer(index, len) == expected, "buffer {index}");
    }
    // The buffers taken ahead serve the next packet.
    host.send(&pattern(60, 2));
    assert_eq!(card.used(RX).len, 60);
    assert_eq!(card.buffer(4, 60)[10..12], [1, 0]);
    wait_for("interrupt", || card.fabric.line(0).take() > 0);
    let totals = card.counters.totals();
    assert_eq!((totals.rx_packets, totals.rx_bytes), (2, 5000 + 48));
    assert_eq!(totals.rx_dropped, 0);
    assert_eq!(totals.hash_reports, [0; 10], "no hash code ran");
}

#[test]
fn pages_written_only_by_readv_are_logged() {
    let host = Host::new(1);
    let mut card = host.card(features::MRG_RXBUF, &[256, 256]);
    for index in 0..3 {
        card.post(index, 0x2000);
    }
    let memory = Arc::clone(&card.rings[RX].memory);
    let all = IovaRange::new(Iova(0), RAM).unwrap();
    let page = |n: u64| BUFFERS + n * 0x1000;
    wait_for("buffers to be taken", || {
        forget_writes(&memory, all);
        (0..6).all(|n| !is_logged(&memory, page(n)))
    });
    // The header is in page 0, which the device also writes through the memory's interface.
    host.send(&pattern(12 + 0x2800, 3));
    assert_eq!(card.used(RX).len, 0x2000);
    assert_eq!(card.used(RX).len, 0x800 + 12);
    let logged: Vec<_> = (0..6).map(|n| is_logged(&memory, page(n))).collect();
    assert_eq!(logged, [true, true, true, false, false, false]);
}

#[test]
fn packet_waits_for_buffers_and_loses_nothing() {
    let host = Host::new(1);
    let mut card = host.card(features::MRG_RXBUF | RING, &[256, 256]);
    let packet = pattern(12 + 9000, 4);
    card.post(0, 2048);
    card.post(1, 2048);
    host.send(&packet);
    host.send(&pattern(100, 5));
    std::thread::sleep(std::time::Duration::from_millis(20));
    assert_eq!(card.rings[RX].pop_used(), None);
    for index in 2..6 {
        card.post(index, 2048);
    }
    let mut whole = Vec::new();
    for index in 0..5 {
        let used = card.used(RX);
        whole.extend(card.buffer(index, usize::try_from(used.len).unwrap()));
    }
    assert_eq!(whole[10..12], [5, 0]);
    whole[10..12].copy_from_slice(&packet[10..12]);
    assert!(whole == packet);
    assert_eq!(card.used(RX).len, 100);
    assert_eq!(card.counters.totals().rx_dropped, 0);
}

#[test]
fn packet_larger_than_all_buffers_of_the_ring_is_dropped() {
    let host = Host::new(1);
    let mut card = host.card(features::MRG_RXBUF, &[4, 256]);
    for index in 0..4 {
        card.post(index, 1000);
    }
    host.send(&pattern(5000, 6));
    host.send(&pattern(500, 7));
    assert_eq!(card.used(RX).len, 500);
    assert_eq!(card.counters.totals().rx_dropped, 1);
}

#[test]
fn one_buffer_each_without_mergeable_buffers() {
    let host = Host::new(1);
    let mut card = host.card(RING, &[256, 256]);
    // Header and data apart, as some drivers have it.
    let (header, data) = ((BUFFERS, 12), (BUFFERS + 0x1000, 2000));
    card.rings[RX].add_indirect(&[], &[header, data]);
    card.driver.kick(0);
    host.send(&pattern(3000, 8));
    let packet = pattern(1500, 9);
    host.send(&packet);
    assert_eq!(card.used(RX).len, 1500);
    assert_eq!(card.bytes(BUFFERS, 10), packet[..10]);
    assert_eq!(card.bytes(BUFFERS + 10, 2), [1, 0]);
    assert_eq!(card.bytes(BUFFERS + 0x1000, 1488), packet[12..]);
    assert_eq!(card.counters.totals().rx_dropped, 1, "the large one");
}

#[test]
fn guest_packets_are_gathered() {
    let host = Host::new(1);
    let mut card = host.card(RING, &[256, 256]);
    let packet = pattern(12 + 1000, 10);
    card.put(BUFFERS, &packet[..12]);
    card.put(BUFFERS + 0x1000, &packet[12..500]);
    card.put(BUFFERS + 0x2000, &packet[500..]);
    let pieces = [
        (BUFFERS, 12),
        (BUFFERS + 0x1000, 488),
        (BUFFERS + 0x2000, 512),
    ];
    let direct = card.rings[TX].add(&pieces, &[]);
    let indirect = card.rings[TX].add_indirect(&pieces, &[]);
    // No more than a header: nothing to send.
    let empty = card.rings[TX].add(&[(BUFFERS, 12)], &[]);
    card.driver.kick(1);
    for head in [direct, indirect, empty] {
        assert_eq!(card.used(TX), Used { head, len: 0 });
    }
    for _ in 0..2 {
        assert!(host.receive().unwrap() == packet);
    }
    assert_eq!(host.receive(), None);
    let totals = card.counters.totals();
    assert_eq!((totals.tx_packets, totals.tx_bytes), (2, 2000));
    assert_eq!(totals.tx_dropped, 1);
}

#[test]
fn full_host_holds_the_guest_back_without_loss() {
    let mut host = Host::new(1);
    host.options.queue_size = 1024;
    let mut card = host.card(RING, &[256, 1024]);
    let count = 1000_u32;
    for n in 0..count {
        let address = BUFFERS + u64::from(n) * 0x400;
        card.put(address, &pattern(1000, 0));
        card.put(address + 12, &n.to_le_bytes());
        card.rings[TX].add(&[(address, 1000)], &[]);
    }
    card.driver.kick(1);
    std::thread::sleep(std::time::Duration::from_millis(50));
    let sent = card.counters.totals().tx_packets;
    assert!(sent < u64::from(count), "the socket takes {sent}");
    for n in 0..count {
        let mut packet = None;
        wait_for("packet", || {
            packet = host.receive();
            packet.is_some()
        });
        assert_eq!(packet.unwrap()[12..16], n.to_le_bytes());
    }
    wait_for("last one used", || card.rings[TX].used_index() == 1000);
    assert_eq!(card.counters.totals().tx_dropped, 0);
}

/// The driver kicks only when asked to and sleeps for interrupts: a lost wake-up would hang it.
fn ping_pong(features: u64) {
    let host = Host::new(1);
    let mut card = host.card(features | features::MRG_RXBUF, &[16, 16]);
    for index in 0..16 {
        card.post(index, 256);
    }
    let mut posted = 16;
    for round in 0..3000_u32 {
        let burst = round % 5 + 1;
        for n in 0..burst {
            let address = BUFFERS + 0x10_0000 + u64::from(n) * 0x100;
            card.put(address, &[0; 64]);
            card.put(address + 12, &(round * 8 + n).to_le_bytes());
            card.rings[TX].add(&[(address, 64)], &[]);
        }
        if card.rings[TX].needs_kick(u16::try_from(burst).unwrap()) {
            card.driver.kick(1);
        }
        for n in 0..burst {
            let mut packet = None;
            wait_for("packet", || {
                packet = host.receive();
                packet.is_some()
            });
            let packet = packet.unwrap();
            assert_eq!(packet[12..16], (round * 8 + n).to_le_bytes());
            host.send(&packet);
        }
        for _ in 0..burst {
            let line = card.fabric.line(RX);
            let used = loop {
                if let Some(used) = card.rings[RX].pop_used() {
                    break used;
                }
                if !card.rings[RX].enable_interrupts() {
                    wait_for("receive interrupt", || line.take() > 0);
                }
            };
            assert_eq!(used.len, 64);
            card.post(posted % 16, 256);
            posted += 1;
        }
        let line = card.fabric.line(TX);
        for _ in 0..burst {
            while card.rings[TX].pop_used().is_none() {
                if !card.rings[TX].enable_interrupts() {
                    wait_for("transmit interrupt", || line.take() > 0);
                }
            }
        }
    }
}

#[test]
fn no_wake_up_is_lost_with_event_index() {
    ping_pong(RING);
}

#[test]
fn no_wake_up_is_lost_without_event_index() {
    ping_pong(0);
}

#[test]
fn packet_takes_more_parts_than_one_readv() {
    let mut host = Host::new(1);
    host.options.queue_size = 1024;
    let mut card = host.card(features::MRG_RXBUF | RING, &[1024, 256]);
    // 80 buffers of 16 times 64 bytes.
    for index in 0..80 {
        let at = BUFFERS + index * 0x400;
        let parts: Vec<_> = (0..16).map(|part| (at + part * 64, 64)).collect();
        assert_eq!(u64::from(card.rings[RX].add_indirect(&[], &parts)), index);
    }
    card.driver.kick(0);
    for seed in 0..3 {
        let packet = pattern(12 + 65_000, seed);
        host.send(&packet);
        let mut whole = Vec::new();
        while whole.len() < packet.len() {
            let used = card.used(RX);
            let at = BUFFERS + u64::from(used.head) * 0x400;
            whole.extend(card.bytes(at, usize::try_from(used.len).unwrap()));
            let parts: Vec<_> = (0..16).map(|part| (at + part * 64, 64)).collect();
            card.rings[RX].add_indirect(&[], &parts);
            if card.rings[RX].needs_kick(1) {
                card.driver.kick(0);
            }
        }
        assert_eq!(whole[10..12], [64, 0]);
        whole[10..12].copy_from_slice(&packet[10..12]);
        assert!(whole == packet);
    }
}

#[test]
fn memory_that_was_replaced_is_followed() {
    let host = Host::new(1);
    let mut card = host.card(features::MRG_RXBUF, &[256, 256]);
    card.post(0, 0x1000);
    host.send(&pattern(100, 1));
    assert_eq!(card.used(RX).len, 100);
    card.post(1, 0x1000);
    // More memory is plugged in while a buffer is held.
    let more = map_ram(vec![RamMapping {
        gpa: Gpa(RAM),
        len: 0x10000,
        backing: Backing::Anonymous,
    }])
    .unwrap();
    let (_, region) = more.remove_region(GuestAddress(RAM), 0x10000).unwrap();
    let new = card.rings[RX].memory.insert_region(region).unwrap();
    card.driver.memory.lock().unwrap().replace(new);
    card.rings[RX].add(&[], &[(RAM, 0x1000)]);
    card.driver.kick(0);
    host.send(&pattern(200, 2));
    host.send(&pattern(0x1000, 3));
    assert_eq!(card.used(RX).len, 200);
    assert_eq!(card.buffer(1, 200)[12..], pattern(200, 2)[12..]);
    assert_eq!(card.used(RX).len, 0x1000);
    let mut bytes = vec![0; 0x1000];
    let memory = crate::testing::snapshot(&card.driver.memory);
    memory.read_slice(&mut bytes, GuestAddress(RAM)).unwrap();
    assert!(bytes[12..] == pattern(0x1000, 3)[12..]);
    assert!(is_logged(&memory, RAM));
}
