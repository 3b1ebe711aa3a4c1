//! Packets on their way from queues of the tap to queues of the driver.

use std::time::{Duration, Instant};

use super::*;

#[test]
fn packets_reach_the_queue_the_table_names_from_any_queue_of_the_tap() {
    for report in [0, features::HASH_REPORT] {
        let host = rss_host(4);
        let mut guest = Guest::new(&host, MQ | report);
        let header = guest.header;
        let table = [3, 1, 0, 2, 2, 0, 1, 3];
        assert_eq!(guest.command(&rss_config(TYPES, &table, 2, 4)), 0);
        let attached: Vec<_> = host.calls.lock().iter().rev().take(3).cloned().collect();
        assert_eq!(attached, [3, 2, 1].map(|pair| Call::Attach(pair, true)));
        guest.post_all(32);
        for (number, flow) in (0..48).zip(100_u16..) {
            let tap = usize::from(flow) % 4;
            let frame = datagram(flow, number, 100);
            send(&host, tap, header, &frame);
            let queue = queue_of(flow, &table);
            let packet = guest.wait_packet(queue);
            assert!(packet[header..] == frame, "the frame is whole");
            let seen = guest.read(&packet);
            if report != 0 {
                assert_eq!((seen.hash, seen.report), (hash_of(flow), 3), "flow {flow}");
            }
            guest.post(queue, 1);
        }
        // ARP has no hash and goes where such packets go.
        let mut arp = datagram(1, 1, 20);
        arp[13] = 6;
        send(&host, 0, header, &arp);
        assert!(guest.wait_packet(2)[header..] == arp);
        let totals = guest.card.counters.totals();
        let elsewhere = (100_u16..148).filter(|flow| queue_of(*flow, &table) != flow % 4);
        let count = u64::try_from(elsewhere.count()).unwrap() + 1;
        assert_eq!(totals.rx_handed_over, count);
        assert_eq!((totals.rx_packets, totals.rx_dropped), (49, 0));
        if report != 0 {
            assert_eq!((totals.hash_reports[3], totals.hash_reports[0]), (48, 1));
        } else {
            assert_eq!(totals.hash_reports, [0; 10]);
        }
    }
}

#[test]
fn a_large_packet_is_handed_over_in_one_piece() {
    let host = rss_host(2);
    let mut guest = Guest::new(&host, MQ | features::HASH_REPORT);
    assert_eq!(guest.command(&rss_config(TYPES, &[1], 1, 2)), 0);
    // Of the reader's buffers there are fewer than it takes, so part of it is read elsewhere.
    guest.post(0, 2);
    guest.post(1, 40);
    let frame = datagram(3, 4, 60_000);
    send(&host, 0, 20, &frame);
    let mut whole = Vec::new();
    while whole.len() < frame.len() + 20 {
        whole.extend(guest.wait_packet(1));
    }
    let parts = u16::try_from(whole.len().div_ceil(2048)).unwrap();
    assert_eq!(whole[10..12], parts.to_le_bytes());
    assert_eq!(whole[12..16], hash_of(3).to_le_bytes());
    assert!(whole[20..] == frame);
    assert_eq!(guest.packet(0), None);
    // The reader's buffers are still its own.
    assert_eq!(guest.command(&rss_config(TYPES, &[0], 0, 2)), 0);
    send(&host, 0, 20, &datagram(3, 5, 40));
    let packet = guest.wait_packet(0);
    assert_eq!(guest.read(&packet).number, 5);
}

#[test]
fn what_is_read_for_another_queue_is_logged() {
    use crate::testing::is_logged;
    let host = rss_host(2);
    let mut guest = Guest::new(&host, MQ);
    assert_eq!(guest.command(&rss_config(TYPES, &[1], 1, 2)), 0);
    guest.post_all(8);
    let memory = Arc::clone(&guest.card.rings[0].memory);
    send(&host, 0, 12, &datagram(3, 4, 1000));
    guest.wait_packet(1);
    // Written by the read, and by the copy.
    assert!(is_logged(&memory, BUFFERS));
    assert!(is_logged(&memory, BUFFERS + 0x10_0000));
}

#[test]
fn a_queue_without_buffers_does_not_hold_up_others() {
    let host = rss_host(2);
    let mut guest = Guest::new(&host, MQ);
    let table = [0, 1];
    assert_eq!(guest.command(&rss_config(TYPES, &table, 0, 2)), 0);
    guest.post(1, 32);
    let (to_0, to_1) = (flow_to(0, &table), flow_to(1, &table));
    // The worker of queue 0 has no buffers, and all packets come to it.
    for number in 0..20 {
        send(&host, 0, 12, &datagram(to_0, number, 100));
        send(&host, 0, 12, &datagram(to_1, number, 100));
    }
    for number in 0..20 {
        let packet = guest.wait_packet(1);
        assert_eq!(guest.read(&packet).number, number);
    }
    // Those for queue 0 were not lost, nor did later ones overtake them.
    send(&host, 0, 12, &datagram(to_0, 20, 100));
    guest.post(0, 32);
    for number in 0..21 {
        let packet = guest.wait_packet(0);
        assert_eq!(guest.read(&packet).number, number);
    }
    let totals = guest.card.counters.totals();
    assert_eq!((totals.rx_dropped, totals.rx_hand_over_dropped), (0, 0));
}

#[test]
fn packets_for_a_queue_the_driver_neglects_are_bounded_and_counted() {
    let host = rss_host(2);
    let mut guest = Guest::new(&host, MQ);
    let table = [0, 1];
    assert_eq!(guest.command(&rss_config(TYPES, &table, 0, 2)), 0);
    guest.post(1, 32);
    let (to_0, to_1) = (flow_to(0, &table), flow_to(1, &table));
    // More than an inbox takes (2 MiB), through the worker of the other queue.
    let count = 2000;
    let start = Instant::now();
    for number in 0..count {
        let packet = [&[0; 12][..], &datagram(to_0, number, 1400)].concat();
        wait_for("room", || (&host.peers[1]).write_all(&packet).is_ok());
    }
    assert!(start.elapsed() > Duration::from_millis(100), "it waited");
    wait_for("place", || {
        let packet = [&[0; 12][..], &datagram(to_1, 1, 100)].concat();
        (&host.peers[1]).write_all(&packet).is_ok()
    });
    let packet = guest.wait_packet(1);
    assert_eq!(guest.read(&packet).flow, to_1, "the other flow goes on");
    let dropped = guest.card.counters.totals().rx_hand_over_dropped;
    assert!((1..1000).contains(&dropped), "{dropped}");
    let mut next = 0;
    while u64::from(next) < u64::from(count) - dropped {
        guest.post(0, 32);
        for _ in 0..32.min(u64::from(count) - dropped - u64::from(next)) {
            let packet = guest.wait_packet(0);
            assert_eq!(guest.read(&packet).number, next, "the oldest ones are kept");
            next += 1;
        }
        while guest.buffers[0].len() > 32 {
            guest.wait_packet(0);
        }
    }
    assert_eq!(guest.card.counters.totals().rx_packets, u64::from(next) + 1);
}

#[test]
fn packets_for_a_queue_that_is_not_enabled_are_dropped() {
    let host = rss_host(2);
    let net = host.net();
    let counters = net.counters();
    let memory = memory();
    let mut driver = Driver::new(pci_device(net, &memory, &Arc::default()), &memory);
    let layouts = [0, 1, 4].map(|queue| {
        (
            queue,
            crate::testing::RingLayout::at(0x10_0000 + u64::from(queue) * 0x4_0000, 16),
        )
    });
    assert!(driver.negotiate(MQ | feature::VERSION_1));
    let mut rings: Vec<_> = layouts
        .iter()
        .map(|(queue, layout)| {
            let ring = Ring::new(crate::testing::snapshot(&memory), *layout, true);
            driver.set_up_queue(*queue, *layout);
            ring
        })
        .collect();
    driver.write8(20, 15);
    let command = rss_config(TYPES, &[1], 1, 2);
    rings[2].put(0x60_0000, &command);
    let len = u32::try_from(command.len()).unwrap();
    rings[2].add(&[(0x60_0000, len)], &[(0x60_8000, 1)]);
    driver.kick(4);
    rings[2].wait_used();
    assert_eq!(rings[2].bytes(0x60_8000, 1), [0]);
    rings[0].add(&[], &[(BUFFERS, LEN)]);
    driver.kick(0);
    send(&host, 0, 12, &datagram(1, 1, 40));
    wait_for("drop", || counters.totals().rx_hand_over_dropped == 1);
    assert_eq!(rings[0].pop_used(), None);
}

/// Sends from all queues of the tap while tables change and the card moves; then each packet has
/// come once, with the right hash, and those of a flow in order within each queue.
#[test]
fn tables_change_under_traffic_without_loss() {
    const FLOWS: u16 = 24;
    const EACH: u32 = 400;
    let host = Arc::new(rss_host(4));
    let mut guest = Guest::new(&host, MQ | features::HASH_REPORT);
    assert_eq!(guest.command(&rss_config(TYPES, &[0, 1, 2, 3], 0, 4)), 0);
    guest.post_all(48);
    let senders: Vec<_> = (0..4_u16)
        .map(|tap| {
            let host = Arc::clone(&host);
            std::thread::spawn(move || {
                for number in 0..EACH {
                    for flow in (0..FLOWS).filter(|flow| flow % 4 == tap) {
                        let frame = datagram(flow, number, 60);
                        let packet = [&[0; 20][..], &frame].concat();
                        let peer = &host.peers[usize::from(tap)];
                        wait_for("room", || (&*peer).write_all(&packet).is_ok());
                    }
                }
            })
        })
        .collect();
    let mut seen = vec![vec![false; usize::try_from(EACH).unwrap()]; usize::from(FLOWS)];
    let mut last: BTreeMap<(u16, u16), u32> = BTreeMap::new();
    let (mut count, mut turn) = (0, 0_u16);
    let all = usize::from(FLOWS) * usize::try_from(EACH).unwrap();
    let start = Instant::now();
    let mut changed = Instant::now();
    while count < all {
        assert!(
            start.elapsed() < Duration::from_secs(60),
            "{count} of {all}"
        );
        for pair in 0..4 {
            while let Some(packet) = guest.packet(pair) {
                guest.post(pair, 1);
                let Seen {
                    flow,
                    number,
                    hash,
                    report,
                } = guest.read(&packet);
                assert_eq!((hash, report), (hash_of(flow), 3));
                let slot = &mut seen[usize::from(flow)][usize::try_from(number).unwrap()];
                assert!(!std::mem::replace(slot, true), "{flow} {number} came twice");
                if let Some(before) = last.insert((pair, flow), number) {
                    assert!(before < number, "{flow}: {number} after {before}");
                }
                count += 1;
            }
        }
        if changed.elapsed() > Duration::from_millis(3) {
            turn = turn.wrapping_add(1);
            let table: Vec<u16> = (0..8).map(|entry| (entry * 3 + turn) % 4).collect();
            assert_eq!(guest.command(&rss_config(TYPES, &table, turn % 4, 4)), 0);
            if turn % 4 == 0 {
                guest.migrate(&host);
            }
            changed = Instant::now();
        }
    }
    senders
        .into_iter()
        .for_each(|sender| sender.join().unwrap());
    assert!(turn > 4, "{turn} tables");
    assert_eq!(guest.card.counters.totals().rx_dropped, 0);
}

#[test]
fn packets_on_their_way_move_with_the_card() {
    let host = rss_host(2);
    let mut guest = Guest::new(&host, MQ | features::HASH_REPORT);
    let table = [0, 1];
    assert_eq!(guest.command(&rss_config(TYPES, &table, 0, 2)), 0);
    guest.post(1, 2);
    let (to_0, to_1) = (flow_to(0, &table), flow_to(1, &table));
    for number in 0..6 {
        send(&host, 1, 20, &datagram(to_0, number, 100));
        send(&host, 1, 20, &datagram(to_1, number, 100));
    }
    // Two of the second flow arrive, the others wait, as do those of the first.
    for number in 0..2 {
        let packet = guest.wait_packet(1);
        assert_eq!(guest.read(&packet).number, number);
    }
    for round in 0..3 {
        // Some wait in the tap, some in the card; twice in a row nothing is delivered.
        std::thread::sleep(Duration::from_millis(30 * round));
        guest.migrate(&host);
    }
    guest.card.driver.device.pause().unwrap();
    let state = guest.card.driver.device.save().unwrap();
    assert!(state.len() > 10 * 140, "packets are in the state");
    guest.card.driver.device.resume().unwrap();
    send(&host, 0, 20, &datagram(to_0, 6, 100));
    guest.post_all(16);
    for number in 0..7 {
        let packet = guest.wait_packet(0);
        let seen = guest.read(&packet);
        assert_eq!(
            (seen.flow, seen.hash, seen.report),
            (to_0, hash_of(to_0), 3)
        );
        if number < 6 {
            assert_eq!(seen.number, number);
        }
    }
    for number in 2..6 {
        let packet = guest.wait_packet(1);
        let seen = guest.read(&packet);
        assert_eq!((seen.flow, seen.number), (to_1, number));
    }
    // A reset forgets them.
    send(&host, 1, 20, &datagram(to_0, 9, 3000));
    guest.card.driver.device.reset();
    assert_eq!(guest.card.counters.totals().rx_dropped, 0);
}

#[test]
fn a_pause_is_quick_and_writes_no_memory_after_it() {
    let host = rss_host(2);
    let mut guest = Guest::new(&host, MQ);
    assert_eq!(guest.command(&rss_config(TYPES, &[1], 1, 2)), 0);
    guest.post_all(32);
    for number in 0..16 {
        send(&host, 0, 12, &datagram(1, number, 100));
    }
    let start = Instant::now();
    guest.card.driver.device.pause().unwrap();
    assert!(start.elapsed() < Duration::from_millis(500));
    let before = guest.card.bytes(BUFFERS, 0x20_0000);
    std::thread::sleep(Duration::from_millis(20));
    assert!(guest.card.bytes(BUFFERS, 0x20_0000) == before);
    guest.card.driver.device.resume().unwrap();
    for number in 0..16 {
        let packet = guest.wait_packet(1);
        assert_eq!(guest.read(&packet).number, number);
    }
}
