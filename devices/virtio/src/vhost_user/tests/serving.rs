//! Packets through a backend, and the control queue.

use pci::PciDevice;
use vm_migration::{Pause, SaveRestore};

use super::*;
use crate::net::features::{CTRL_VQ, GUEST_ANNOUNCE, MQ, MRG_RXBUF, STATUS};

#[test]
fn packets_go_both_ways_and_interrupt_without_ferry() {
    for (features, faults) in [
        (0, Faults::default()),
        (feature::RING_EVENT_IDX | MRG_RXBUF, Faults::default()),
        (
            0,
            Faults {
                no_acknowledgements: true,
                ..Faults::default()
            },
        ),
    ] {
        let host = Host::new(1, faults);
        let mut card = host.card(features, &[256, 256]);
        for round in 0..300_usize {
            let payload = pattern(60 + round * 4, round);
            card.rings[RX].enable_interrupts();
            card.post(RX, 0, 2048);
            host.send(0, &payload);
            let used = card.used(RX);
            assert_eq!(used.len as usize, payload.len() + 12);
            assert_eq!(card.received(0, payload.len() + 12), payload);
            assert_eq!(card.bytes(BUFFERS + 10, 2), [1, 0], "num_buffers");
            wait_for("receive interrupt", || card.fabric.line(RX).take() > 0);

            card.transmit(TX, 1, &payload);
            assert_eq!(host.receive(0)[12..], payload);
            card.used(TX);
        }
    }
}

#[test]
fn a_driver_sees_what_the_backend_and_ferry_can_do() {
    let host = Host::new(2, Faults::default());
    let mut card = host.silent_card(&shared_memory());
    let offered = card.driver.offered();
    let expected = feature::VERSION_1
        | feature::RING_EVENT_IDX
        | feature::RING_INDIRECT_DESC
        | MRG_RXBUF
        | CTRL_VQ
        | MQ
        | GUEST_ANNOUNCE
        | STATUS
        | features::MAC
        | features::MTU;
    assert_eq!(offered, expected, "{offered:#x}");
    let mut config = [0; 12];
    card.driver.device.read_bar(0, 0x2000, &mut config);
    assert_eq!(config[..6], MAC);
    assert_eq!(config[6..], [1, 0, 2, 0, 0xdc, 5], "status, pairs, MTU");
    assert_eq!(card.handle.facts()["dirty_source"], "shared log");
}

#[test]
fn pairs_come_and_go_by_command() {
    let host = Host::new(2, Faults::default());
    let mut card = host.card(MQ | CTRL_VQ, &[256, 256, 256, 256, 64]);
    let (control, second) = (4, 2);
    card.post(second, 3, 2048);
    host.send(1, &pattern(100, 1));
    // The second pair is not in use yet.
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(card.rings[second].pop_used(), None);
    assert_eq!(card.command(control, &[4, 0, 2, 0]), 0);
    assert_eq!(card.used(second).len, 112);
    assert_eq!(card.received(3, 112), pattern(100, 1));

    for nonsense in [
        &[4, 0, 3, 0][..],
        &[4, 0, 0, 0],
        &[4, 0, 1],
        &[4, 1, 0, 0],
        &[5, 0],
        &[9, 9],
    ] {
        assert_eq!(card.command(control, nonsense), 1, "{nonsense:?}");
    }
    assert_eq!(card.command(control, &[4, 0, 1, 0]), 0);
    card.post(second, 3, 2048);
    host.send(1, &pattern(100, 2));
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(card.rings[second].pop_used(), None);
}

#[test]
fn a_queue_without_vector_interrupts_by_status_and_one_that_changes_is_followed() {
    let host = Host::new(1, Faults::default());
    let mut card = host.card(0, &[256, 256]);
    let receive = |card: &mut Card, seed| {
        card.post(RX, 0, 2048);
        host.send(0, &pattern(80, seed));
        card.used(RX);
        assert_eq!(card.received(0, 92), pattern(80, seed));
    };
    receive(&mut card, 1);
    wait_for("interrupt", || card.fabric.line(0).take() > 0);

    // Queue 0 gets vector 2 while it is served.
    card.driver.write16(22, 0);
    card.driver.write16(26, 2);
    card.fabric.line(2).take();
    receive(&mut card, 2);
    wait_for("interrupt", || card.fabric.line(2).take() > 0);
    assert_eq!(card.fabric.line(0).take(), 0);

    // MSI-X goes: the ISR tells.
    card.driver.disable_msix();
    card.driver.read8(0x1000);
    receive(&mut card, 3);
    wait_for("interrupt status", || card.driver.read8(0x1000) & 1 != 0);
    assert_eq!(card.fabric.line(2).take(), 0);
}

#[test]
fn a_reset_begins_anew() {
    let host = Host::new(1, Faults::default());
    let mut card = host.card(0, &[256, 256]);
    for round in 0..5 {
        card.post(RX, 0, 2048);
        host.send(0, &pattern(90, round));
        card.used(RX);
        assert_eq!(card.received(0, 102), pattern(90, round));
        // Left in the ring.
        card.post(RX, 1, 2048);
        card.rings = card.driver.bring_up(0, &[256, 256]);
    }
}

#[test]
fn a_paused_card_writes_no_memory_and_goes_on_where_it_was() {
    let host = Host::new(1, Faults::default());
    let mut card = host.card(feature::RING_EVENT_IDX, &[256, 256]);
    for round in 0..50_usize {
        card.post(RX, 0, 2048);
        card.driver.device.pause().unwrap();
        let before = card.bytes(0, 16 << 20);
        host.send(0, &pattern(70, round));
        card.rings[TX].add(&[(BUFFERS, 60)], &[]);
        card.driver.kick(1);
        std::thread::sleep(Duration::from_millis(2));
        let after = card.bytes(0, 16 << 20);
        // The driver itself wrote its transmit ring.
        let ring = card.rings[TX].layout;
        let [start, used, end] =
            [ring.descriptors, ring.used, ring.indirect].map(|at| usize::try_from(at).unwrap());
        assert!(before[..start] == after[..start] && before[end..] == after[end..]);
        assert!(before[used..end] == after[used..end]);
        card.driver.device.resume().unwrap();
        assert_eq!(card.used(RX).len, 82);
        assert_eq!(card.received(0, 82), pattern(70, round));
        host.receive(0);
        card.used(TX);
    }
}

#[test]
fn a_card_moves_to_another_backend() {
    let hosts = [
        Host::new(2, Faults::default()),
        Host::new(2, Faults::default()),
    ];
    let features = MQ | CTRL_VQ | STATUS | GUEST_ANNOUNCE | feature::RING_EVENT_IDX;
    let mut card = hosts[0].card(features, &[256, 256, 256, 256, 64]);
    assert_eq!(card.command(4, &[4, 0, 2, 0]), 0);
    let memory = card.driver.memory.clone();
    for round in 0..20_usize {
        let (here, there) = (&hosts[round % 2], &hosts[(round + 1) % 2]);
        for pair in 0..2 {
            let rx = pair * 2;
            card.post(rx, 1, 2048);
            here.send(pair, &pattern(64, round));
            card.used(rx);
            assert_eq!(card.received(1, 76), pattern(64, round));
            card.transmit(rx + 1, 2, &pattern(64, round + 1));
            assert_eq!(here.receive(pair)[12..], pattern(64, round + 1));
            card.used(rx + 1);
        }
        // Two more buffers are with the backend when it stops.
        card.post(0, 3, 2048);
        card.post(2, 4, 2048);

        card.driver.device.pause().unwrap();
        let state = card.driver.device.save().unwrap();
        let mut next = there.silent_card(&memory);
        next.driver.device.restore(&state).unwrap();
        next.driver.device.resume().unwrap();
        next.rings = std::mem::take(&mut card.rings);
        card = next;
        // The driver is asked to announce itself, and does.
        let mut status = [0; 2];
        card.driver.device.read_bar(0, 0x2006, &mut status);
        assert_eq!(status, [3, 0]);
        assert_eq!(card.command(4, &[3, 0]), 0);
        card.driver.device.read_bar(0, 0x2006, &mut status);
        assert_eq!(status, [1, 0]);

        for (pair, buffer) in [(0, 3), (1, 4)] {
            there.send(pair, &pattern(99, round));
            card.used(pair * 2);
            assert_eq!(card.received(buffer, 111), pattern(99, round));
        }
    }
}

#[test]
fn state_of_another_card_is_refused() {
    let host = Host::new(1, Faults::default());
    let mut net = host.net();
    let state = net.save().unwrap();
    net.restore(&state).unwrap();
    for (bytes, reason) in [
        (&state[..state.len() - 1], "saved state"),
        (&[&state[..], &[0]].concat(), "too many"),
        (&[0xff; 65], "65 bytes"),
        (&[7, 0], "version 7"),
    ] {
        let error = net.restore(bytes).unwrap_err().to_string();
        assert!(error.contains(reason), "{error}");
    }
    let larger = Host::new(2, Faults::default());
    let more = larger.net();
    more.settings.arrived(2);
    let error = net.restore(&more.save().unwrap()).unwrap_err().to_string();
    assert!(error.contains("2 queue pairs are in use"), "{error}");
    net.mtu = Some(9000);
    let error = net.restore(&state).unwrap_err().to_string();
    assert!(error.contains("MTU"), "{error}");
}

#[test]
fn private_memory_and_impossible_shapes_are_refused() {
    let host = Host::new(1, Faults::default());
    let memory = crate::testing::memory();
    let mut card = host.silent_card(&memory);
    card.driver.bring_up_unserved(0, &[256, 256]);
    assert!(card.driver.device.is_broken());
    for (pairs, size) in [(0, 256), (128, 256), (1, 0), (1, 3), (1, 1)] {
        let options = VhostUserOptions {
            queue_size: size,
            ..options(pairs)
        };
        let made = VhostUserNet::connect(options, &ThreadSpawner::unconfined(), Box::new(|_| ()));
        let error = made.map(drop).unwrap_err().to_string();
        assert!(error.contains("are possible"), "{error}");
    }
    let nobody = VhostUserNet::connect(options(1), &ThreadSpawner::unconfined(), Box::new(|_| ()));
    let error = nobody.map(drop).unwrap_err().to_string();
    assert!(error.contains("test.sock: is it running?"), "{error}");
}
