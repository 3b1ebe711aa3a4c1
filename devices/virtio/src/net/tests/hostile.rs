//! A driver that writes anything anywhere.

use std::time::{Duration, Instant};

use pci::PciDevice;
use proptest::prelude::*;
use vm_migration::state::{Pause, SaveRestore};

use super::control::hash_config;
use super::rss::{MQ, TYPES, datagram, flow_to, rss_config, rss_host};
use super::*;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Whatever is in the rings, the device serves or stops, and can be paused and reset.
    #[test]
    fn garbage_in_rings_is_survived(
        descriptors in proptest::collection::vec((0_u64..0x110_0000, 0_u32..0x3000, 0_u16..8, 0_u16..20), 16),
        heads in proptest::collection::vec(0_u16..18, 16),
        index in prop_oneof![0_u16..17, any::<u16>()],
        event_idx in any::<bool>(),
        queue in 0_usize..3,
    ) {
        let host = Host::new(1);
        let features = features::CTRL_VQ | features::MRG_RXBUF | feature::RING_INDIRECT_DESC
            | if event_idx { feature::RING_EVENT_IDX } else { 0 };
        let mut card = host.card(features, &[16, 16, 16]);
        let ring = &card.rings[queue];
        for (place, (address, len, flags, next)) in (0_u16..).zip(&descriptors) {
            ring.set_descriptor(ring.layout.descriptors, place, (*address, *len), *flags, *next);
        }
        for (slot, head) in (0_u64..).zip(&heads) {
            ring.set_u16(ring.layout.available + 4 + slot * 2, *head);
        }
        ring.set_u16(ring.layout.available + 2, index);
        for _ in 0..8 {
            host.send(&pattern(500, 1));
        }
        let start = Instant::now();
        card.driver.kick(u16::try_from(queue).unwrap());
        std::thread::sleep(Duration::from_millis(2));
        card.driver.device.pause().unwrap();
        card.driver.device.resume().unwrap();
        // A sound driver finds a sound device again.
        while host.receive().is_some() {}
        card.rings = card.driver.bring_up(features, &[16, 16, 16]);
        prop_assert_eq!(card.command(2, &[9, 9], &[]), 1);
        card.put(BUFFERS, &[0; 64]);
        card.rings[TX].add(&[(BUFFERS, 64)], &[]);
        card.driver.kick(1);
        card.used(TX);
        prop_assert!(start.elapsed() < Duration::from_secs(5));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// Saved state with wrong bytes is refused, or gives a device that can be stopped and reset.
    #[test]
    fn damaged_state_is_survived(
        damage in proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 1..6),
    ) {
        let host = rss_host(2);
        let features = MQ | features::HASH_REPORT;
        let sizes = [16; 5];
        let mut card = host.card(features, &sizes);
        prop_assert_eq!(card.command(4, &rss_config(TYPES, &[0, 1], 0, 2), &[]), 0);
        card.post(0, 1526);
        // Some for the queue that has no buffers wait in the state.
        for number in 0..3 {
            let datagram = datagram(flow_to(1, &[0, 1]), number, 100);
            host.send(&[&[0; 20][..], &datagram].concat());
        }
        wait_for("hand-over", || card.counters.totals().rx_handed_over == 3);
        card.driver.device.pause().unwrap();
        let mut state = card.driver.device.save().unwrap();
        for (place, byte) in damage {
            let place = place.index(state.len());
            state[place] = byte;
        }
        let mut device = pci_device(host.net(), &card.driver.memory, &Arc::default());
        device.pause().unwrap();
        let taken = device.restore(&state).is_ok();
        card.driver.device = device;
        if taken {
            host.send(&pattern(100, 1));
            // May fail, for the queues may be anywhere; then the device asks for a reset.
            let resumed = card.driver.device.resume().is_ok();
            prop_assert!(resumed || card.driver.device.is_broken());
            card.driver.device.pause().unwrap();
        }
        card.driver.device.reset();
        card.driver.device.resume().unwrap();
        while host.receive().is_some() {}
        card.rings = card.driver.bring_up(features, &sizes);
        prop_assert_eq!(card.command(4, &[9, 9], &[]), 1);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Any commands of the class in any order are answered, and packets go on afterwards.
    #[test]
    fn any_commands_are_answered(
        commands in proptest::collection::vec(
            (0_u8..4, proptest::collection::vec(any::<u8>(), 0..80), 0_u32..0x400,
             proptest::collection::vec(0_u16..3, 1..9), 0_u16..3, 0_u16..4),
            1..12,
        ),
    ) {
        let host = rss_host(2);
        let mut card = host.card(MQ | features::HASH_REPORT, &[16; 5]);
        for (kind, raw, types, table, unclassified, transmit) in commands {
            let command = match kind {
                0 => [&[4, 1][..], &raw].concat(),
                1 => hash_config(types),
                2 => [&[4, 0][..], &transmit.to_le_bytes()].concat(),
                _ => rss_config(types, &table, unclassified, transmit),
            };
            prop_assert!(card.command(4, &command, &[2]) <= 1);
            host.send(&[&[0; 20][..], &datagram(1, 1, 60)].concat());
        }
        prop_assert_eq!(card.command(4, &rss_config(TYPES, &[0], 0, 1), &[2]), 0);
        let before = card.counters.totals().rx_packets;
        host.send(&[&[0; 20][..], &datagram(1, 1, 60)].concat());
        card.post(0, 1526);
        wait_for("packet", || card.counters.totals().rx_packets > before);
    }
}

#[test]
fn endless_requests_do_not_hold_up_a_pause() {
    // Every descriptor index valid, and the driver moves the available index on and on.
    let host = Host::new(1);
    let mut card = host.card(features::CTRL_VQ, &[16, 16, 16]);
    card.put(BUFFERS, &[0; 64]);
    let ring = &card.rings[TX];
    for slot in 0..16 {
        ring.set_descriptor(ring.layout.descriptors, slot, (BUFFERS, 64), 0, 0);
        ring.set_u16(ring.layout.available + 4 + u64::from(slot) * 2, slot);
    }
    let (memory, layout) = (Arc::clone(&ring.memory), ring.layout);
    let kick = card.driver.device.doorbells().remove(TX).eventfd;
    let peer = host.peers[0].try_clone().unwrap();
    let done = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let finished = Arc::clone(&done);
    let attacker = std::thread::spawn(move || {
        let mut packet = [0; 100];
        while !finished.load(std::sync::atomic::Ordering::Relaxed) {
            let mut used = [0; 2];
            memory
                .read_slice(&mut used, GuestAddress(layout.used + 2))
                .unwrap();
            let next = u16::from_le_bytes(used).wrapping_add(16).to_le_bytes();
            memory
                .write_slice(&next, GuestAddress(layout.available + 2))
                .unwrap();
            kick.write(1).unwrap();
            while (&peer).read(&mut packet).is_ok() {}
        }
    });
    wait_for("traffic", || card.counters.totals().tx_packets > 1000);
    let start = Instant::now();
    card.driver.device.pause().unwrap();
    let took = start.elapsed();
    done.store(true, std::sync::atomic::Ordering::Relaxed);
    attacker.join().unwrap();
    assert!(took < Duration::from_millis(500), "{took:?}");
}
