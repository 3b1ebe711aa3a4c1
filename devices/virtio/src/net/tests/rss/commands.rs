//! The commands that set tables, and which of them holds.

use super::super::control::hash_config;
use super::*;

#[test]
fn unsound_commands_change_nothing() {
    let host = rss_host(2);
    let mut guest = Guest::new(&host, MQ);
    let table = [0, 1];
    assert_eq!(guest.command(&rss_config(TYPES, &table, 0, 2)), 0);
    let good = rss_config(TYPES, &table, 0, 2);
    let mut long_key = rss_config(TYPES, &table, 0, 2);
    let len = long_key.len();
    long_key[len - 41] = 41;
    long_key.push(0);
    let mut no_key = good[..len - 40].to_vec();
    *no_key.last_mut().unwrap() = 0;
    let mut huge = good.clone();
    huge[6..8].copy_from_slice(&0xffff_u16.to_le_bytes());
    let unsound = [
        rss_config(TYPES, &[0, 1, 0], 0, 2),
        rss_config(TYPES, &[0; 256], 0, 2),
        rss_config(TYPES, &[0, 2], 0, 2),
        rss_config(TYPES, &table, 2, 2),
        rss_config(TYPES, &table, 0, 0),
        rss_config(TYPES, &table, 0, 3),
        rss_config(1 << 9, &table, 0, 2),
        good[..len - 1].to_vec(),
        good[..7].to_vec(),
        long_key,
        no_key,
        huge,
        hash_config(TYPES),
    ];
    let calls = host.calls.lock().len();
    for command in unsound {
        assert_eq!(guest.command(&command), 1, "{command:?}");
    }
    assert_eq!(host.calls.lock().len(), calls, "the tap was left alone");
    guest.post_all(8);
    for queue in [0, 1] {
        let flow = flow_to(queue, &table);
        send(&host, 0, 12, &datagram(flow, 7, 40));
        let packet = guest.wait_packet(queue);
        assert_eq!(guest.read(&packet).flow, flow);
    }
    // An empty key will do where nothing is hashed: all goes to one queue.
    let mut nothing = rss_config(0, &[0], 1, 1);
    nothing.truncate(nothing.len() - 40);
    *nothing.last_mut().unwrap() = 0;
    assert_eq!(guest.command(&nothing), 0);
    send(&host, 0, 12, &datagram(5, 5, 40));
    let packet = guest.wait_packet(1);
    assert_eq!(guest.read(&packet).number, 5);
}

#[test]
fn types_that_are_not_offered_are_refused() {
    let mut host = rss_host(2);
    host.options.hash_types = HashTypes::from_bits(TYPES);
    let mut guest = Guest::new(&host, MQ | features::HASH_REPORT);
    let read = |guest: &mut Guest, at: u64| guest.card.driver.read16(0x2000 + at);
    assert_eq!((read(&mut guest, 20), read(&mut guest, 22)), (5, 0));
    assert_eq!(guest.command(&rss_config(7, &[0, 1], 0, 2)), 1);
    assert_eq!(guest.command(&hash_config(7)), 1);
    assert_eq!(guest.command(&rss_config(5, &[0, 1], 0, 2)), 0);
    assert_eq!(guest.command(&hash_config(1)), 0);
}

#[test]
fn the_last_command_of_the_class_holds() {
    let host = rss_host(2);
    let mut guest = Guest::new(&host, MQ | features::HASH_REPORT);
    guest.post_all(16);
    let to_1 = datagram(flow_to(1, &[0, 1]), 1, 40);
    let expect = |guest: &mut Guest, tap: usize, queue: u16, report: u16| {
        send(&host, tap, 20, &to_1);
        let packet = guest.wait_packet(queue);
        assert_eq!(guest.read(&packet).report, report);
        guest.post(queue, 1);
    };
    // After a reset the first pair gets everything, even what a tap gave to the second.
    expect(&mut guest, 1, 0, 0);
    assert_eq!(guest.command(&rss_config(TYPES, &[0, 1], 0, 2)), 0);
    expect(&mut guest, 0, 1, 3);
    // The tap chooses again; what is reported stays.
    assert_eq!(guest.command(&pairs_set(2)), 0);
    expect(&mut guest, 0, 0, 3);
    expect(&mut guest, 1, 1, 3);
    let before = host.calls.lock().len();
    assert_eq!(guest.command(&pairs_set(1)), 0);
    let detached = host.calls.lock()[before..].contains(&Call::Attach(1, false));
    assert!(!detached, "what is in it would be lost");
    expect(&mut guest, 1, 0, 3);
    assert_eq!(guest.command(&rss_config(TYPES, &[1, 1], 0, 1)), 0);
    expect(&mut guest, 0, 1, 3);
    assert_eq!(guest.command(&hash_config(1)), 0);
    expect(&mut guest, 0, 0, 1);
    assert_eq!(guest.command(&rss_config(0, &[1, 1], 0, 1)), 0);
    expect(&mut guest, 1, 0, 0);
    // A reset leaves one.
    guest.card.driver.write8(20, 0);
    guest.bring_up(MQ | features::HASH_REPORT);
    assert_eq!(
        host.calls.lock().last(),
        Some(&Call::Attach(1, false)),
        "one pair after a reset"
    );
}

#[test]
fn a_card_of_one_pair_takes_tables_too() {
    for report in [0, features::HASH_REPORT] {
        let host = rss_host(1);
        let mut guest = Guest::new(&host, RSS | report);
        assert_eq!(guest.card.driver.read16(0x2008), 1, "max_virtqueue_pairs");
        assert_eq!(guest.command(&rss_config(TYPES, &[0; 128], 0, 1)), 0);
        assert_eq!(guest.command(&rss_config(TYPES, &[0, 1], 0, 1)), 1);
        guest.post(0, 4);
        send(&host, 0, guest.header, &datagram(9, 1, 40));
        let packet = guest.wait_packet(0);
        let seen = guest.read(&packet);
        if report != 0 {
            assert_eq!((seen.hash, seen.report), (hash_of(9), 3));
        }
        assert_eq!(guest.card.counters.totals().rx_handed_over, 0);
    }
}

#[test]
fn the_control_queue_comes_last_with_rss_alone() {
    let host = rss_host(2);
    let mut guest = Guest::new(&host, RSS);
    assert_eq!(guest.command(&pairs_set(2)), 1, "MQ was not negotiated");
    assert_eq!(guest.command(&rss_config(TYPES, &[1, 1], 1, 2)), 0);
    guest.post(1, 4);
    send(&host, 0, 12, &datagram(9, 1, 40));
    guest.wait_packet(1);
}
