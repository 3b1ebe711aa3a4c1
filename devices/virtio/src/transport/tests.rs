//! Tests of the transport, with the entropy device behind it.

use std::io::{Seek, Write};
use std::sync::Arc;

use pci::{BarKind, PciDevice};
use vm_memory::{Bytes, GuestAddress};
use vm_migration::state::{Pause, SaveRestore};

use super::*;
use crate::device::feature;
use crate::rng::{EntropySource, Rng};
use crate::testing::{
    Driver, RAM, Ring, RingLayout, TestFabric, is_logged, memory, pci_device, snapshot, wait_for,
};

const RING: u64 = feature::RING_EVENT_IDX | feature::RING_INDIRECT_DESC;
const FEATURES_OK: u8 = 8;
const NEEDS_RESET: u8 = 64;

fn rng() -> (Driver, Arc<TestFabric>) {
    let memory = memory();
    let fabric = Arc::default();
    let device = pci_device(Rng::new("_rng0", EntropySource::Kernel), &memory, &fabric);
    (Driver::new(device, &memory), fabric)
}

/// Asks for `len` bytes at `address` and waits for them.
fn ask(driver: &mut Driver, ring: &mut Ring, address: u64, len: u32) -> u32 {
    let head = ring.add(&[], &[(address, len)]);
    driver.kick(0);
    wait_for("random bytes", || {
        ring.used_index() == ring.made_available()
    });
    let used = ring.pop_used().unwrap();
    assert_eq!(used.head, head);
    used.len
}

#[test]
fn function_looks_like_a_modern_virtio_device() {
    let (mut driver, fabric) = rng();
    let mut id = [0; 4];
    driver.device.read_config(0, &mut id);
    assert_eq!(id, [0xf4, 0x1a, 0x44, 0x10]);
    let bars = driver.device.bars();
    assert_eq!(bars.len(), 1);
    assert_eq!(bars[0].size, 0x8000);
    assert!(matches!(
        bars[0].kind,
        BarKind::Memory64 {
            prefetchable: false
        }
    ));
    assert_eq!(
        fabric.lines.lock().len(),
        2,
        "a queue's and the configuration's"
    );
    // Vendor capabilities: common, ISR, notify, PCI window; no device configuration here.
    let mut pointer = [0];
    let mut kinds = Vec::new();
    driver.device.read_config(0x34, &mut pointer);
    while pointer[0] != 0 {
        let at = u16::from(pointer[0]);
        let mut header = [0; 4];
        driver.device.read_config(at, &mut header);
        if header[0] == 9 {
            kinds.push(header[3]);
        }
        pointer[0] = header[1];
    }
    assert_eq!(kinds, [1, 3, 2, 5]);
    let doorbells = driver.device.doorbells();
    assert_eq!(doorbells.len(), 1);
    assert_eq!((doorbells[0].bar, doorbells[0].offset), (0, 0x3000));
}

#[test]
fn status_machine_refuses_what_it_must() {
    let (mut driver, _) = rng();
    let offered = driver.offered();
    assert_eq!(offered, RING | feature::VERSION_1);
    assert!(!driver.negotiate(RING), "no VERSION_1");
    assert!(!driver.negotiate(offered | 1 << 40), "not offered");
    assert!(driver.negotiate(offered));
    // Features are fixed now.
    driver.write32(8, 0);
    driver.write32(12, 0);
    assert_ne!(driver.read32(12), 0);
    // A queue outside memory: the device says so instead of starting.
    let layout = RingLayout {
        used: RAM,
        ..RingLayout::at(0x10_0000, 16)
    };
    driver.set_up_queue(0, layout);
    driver.write8(20, 15);
    assert_eq!(driver.status(), 15 | NEEDS_RESET);
    assert!(driver.device.is_broken());
    // DRIVER_OK without FEATURES_OK does nothing.
    driver.write8(20, 0);
    driver.write8(20, 3);
    driver.write8(20, 7);
    assert_eq!(driver.status(), 3);
    // Without its queue the device does not start.
    assert!(driver.negotiate(offered));
    driver.write8(20, 15);
    assert_eq!(driver.status(), 15 | NEEDS_RESET);
    // FAILED stays until reset.
    assert!(driver.negotiate(offered));
    driver.write8(20, 11 | 128);
    assert_eq!(driver.status(), 3 | 128);
    driver.write8(20, 15);
    assert_eq!(driver.status(), 3 | 128);
}

#[test]
fn queue_registers_are_checked() {
    let (mut driver, _) = rng();
    let offered = driver.offered();
    driver.write16(22, 0);
    driver.write16(24, 16);
    assert_eq!(driver.read16(24), 256, "not before FEATURES_OK");
    assert!(driver.negotiate(offered));
    for bad in [0, 3, 512] {
        driver.write16(24, bad);
        assert_eq!(driver.read16(24), 256);
    }
    driver.write16(26, 7);
    assert_eq!(driver.read16(26), 0xffff, "no such vector");
    driver.write16(16, 1);
    assert_eq!(driver.read16(16), 1);
    driver.write64(32, 0x1234_5678_9abc_def0);
    assert_eq!(driver.read32(32), 0x9abc_def0);
    assert_eq!(driver.read32(36), 0x1234_5678);
    driver.write16(22, 1);
    assert_eq!(driver.read16(24), 0, "no such queue");
    driver.write16(28, 1);
    assert_eq!(driver.read16(28), 0);
}

#[test]
fn entropy_of_a_file_is_its_bytes_and_then_nothing() {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&[7; 300]).unwrap();
    file.rewind().unwrap();
    let memory = memory();
    let source = EntropySource::File(Arc::new(file));
    let device = pci_device(Rng::new("_rng0", source), &memory, &Arc::default());
    let mut driver = Driver::new(device, &memory);
    let mut rings = driver.bring_up(RING, &[64]);
    let ring = &mut rings[0];
    assert_eq!(ask(&mut driver, ring, 0x8000, 290), 290);
    let mut bytes = [0; 290];
    ring.memory
        .read_slice(&mut bytes, GuestAddress(0x8000))
        .unwrap();
    assert_eq!(bytes, [7; 290]);
    assert_eq!(ask(&mut driver, ring, 0x8000, 290), 10);
    assert_eq!(ask(&mut driver, ring, 0x8000, 290), 0);
}

#[test]
fn device_serves_and_interrupts() {
    let (mut driver, fabric) = rng();
    let mut rings = driver.bring_up(RING, &[64]);
    let ring = &mut rings[0];
    assert_eq!(fabric.line(0).routed().unwrap().data, 0);
    assert_eq!(ask(&mut driver, ring, 0x8000, 100), 100);
    let mut bytes = [0; 100];
    ring.memory
        .read_slice(&mut bytes, GuestAddress(0x8000))
        .unwrap();
    assert!(bytes.iter().any(|b| *b != 0));
    assert!(is_logged(&ring.memory, 0x8000));
    wait_for("interrupt", || fabric.line(0).take() > 0);
    // One request has a bound.
    assert_eq!(ask(&mut driver, ring, 0x10000, 0x2_0000), 0x1_0000);
    // The doorbell eventfd works as a kick, too.
    let head = ring.add(&[], &[(0x8000, 1)]);
    driver.device.doorbells()[0].eventfd.write(1).unwrap();
    wait_for("random byte", || ring.used_index() == ring.made_available());
    assert!(std::iter::from_fn(|| ring.pop_used()).any(|u| u.head == head));
    // A reset takes everything back.
    driver.write8(20, 0);
    assert_eq!(driver.status(), 0);
    driver.write16(22, 0);
    assert_eq!(driver.read16(28), 0);
}

#[test]
fn broken_ring_asks_for_a_reset_and_recovers() {
    let (mut driver, fabric) = rng();
    let rings = driver.bring_up(RING, &[64]);
    rings[0].set_u16(rings[0].layout.available + 2, 1000);
    driver.kick(0);
    wait_for("reset request", || driver.status() & NEEDS_RESET != 0);
    wait_for("configuration interrupt", || fabric.line(1).take() > 0);
    // Pausing, saving and restoring a broken device keeps it broken.
    driver.device.pause().unwrap();
    let state = driver.device.save().unwrap();
    driver.device.resume().unwrap();
    let (mut other, _) = rng();
    other.device.pause().unwrap();
    other.device.restore(&state).unwrap();
    other.device.resume().unwrap();
    assert_eq!(other.status(), 15 | NEEDS_RESET);
    let mut rings = driver.bring_up(RING, &[64]);
    assert_eq!(ask(&mut driver, &mut rings[0], 0x8000, 8), 8);
}

#[test]
fn isr_serves_drivers_without_msix() {
    let (mut driver, fabric) = rng();
    assert!(driver.negotiate(feature::VERSION_1));
    let layout = RingLayout::at(0x10_0000, 16);
    let mut ring = Ring::new(snapshot(&driver.memory), layout, false);
    driver.write16(22, 0);
    driver.set_up_queue(0, layout);
    driver.write8(20, 15);
    assert_eq!(ask(&mut driver, &mut ring, 0x8000, 8), 8);
    wait_for("ISR bit", || driver.read8(0x1000) == 1);
    assert_eq!(driver.read8(0x1000), 0, "cleared by reading");
    assert_eq!(fabric.line(0).take(), 0);
}

#[test]
fn configuration_window_reaches_the_bar() {
    let (mut driver, _) = rng();
    let mut pointer = [0];
    driver.device.read_config(0x34, &mut pointer);
    let window = loop {
        let at = u16::from(pointer[0]);
        let mut header = [0; 4];
        driver.device.read_config(at, &mut header);
        if header[0] == 9 && header[3] == 5 {
            break at;
        }
        pointer[0] = header[1];
    };
    let mut access = |offset: u32, length: u32| {
        driver
            .device
            .write_config(window + 8, &offset.to_le_bytes());
        driver
            .device
            .write_config(window + 12, &length.to_le_bytes());
    };
    access(18, 2);
    let mut data = [0; 2];
    driver.device.read_config(window + 16, &mut data);
    assert_eq!(data, [1, 0], "num_queues");
    let mut access = |offset: u32, length: u32| {
        driver
            .device
            .write_config(window + 8, &offset.to_le_bytes());
        driver
            .device
            .write_config(window + 12, &length.to_le_bytes());
    };
    access(20, 1);
    driver.device.write_config(window + 16, &[3]);
    assert_eq!(driver.status(), 3);
    for (offset, length) in [(0x8000, 4), (2, 4), (0, 3), (u32::MAX, 1)] {
        driver
            .device
            .write_config(window + 8, &u32::to_le_bytes(offset));
        driver
            .device
            .write_config(window + 12, &u32::to_le_bytes(length));
        driver.device.write_config(window + 16, &[0; 4]);
    }
    assert_eq!(driver.status(), 3, "nothing reached the device");
}

#[test]
fn restored_device_goes_on_where_the_saved_one_stopped() {
    let (mut source, _) = rng();
    let mut rings = source.bring_up(RING, &[64]);
    let ring = &mut rings[0];
    for _ in 0..100 {
        assert_eq!(ask(&mut source, ring, 0x8000, 16), 16);
    }
    source.device.pause().unwrap();
    // The driver adds while no one serves, and the kick is lost with the source.
    let head = ring.add(&[], &[(0x9000, 16)]);
    source.kick(0);
    let state = source.device.save().unwrap();
    assert!(state.len() < VirtioPciDevice::MAX_STATE_BYTES);
    std::thread::sleep(std::time::Duration::from_millis(20));
    assert_eq!(ring.pop_used(), None, "a paused device writes nothing");

    let fabric = Arc::default();
    let device = pci_device(
        Rng::new("_rng0", EntropySource::Kernel),
        &source.memory,
        &fabric,
    );
    let mut target = Driver::new(device, &source.memory);
    target.device.pause().unwrap();
    target.device.restore(&state).unwrap();
    assert_eq!(target.device.bars(), source.device.bars());
    assert_eq!(fabric.line(0).routed().unwrap().data, 0);
    assert_eq!(fabric.line(0).take(), 0);
    target.device.resume().unwrap();
    assert_eq!(target.status(), 15);
    assert!(fabric.line(0).take() > 0, "drivers are woken once");
    wait_for("the chain added meanwhile", || {
        ring.used_index() == ring.made_available()
    });
    assert_eq!(ring.pop_used().unwrap().head, head);
    assert_eq!(ask(&mut target, ring, 0x8000, 16), 16);
    // An aborted migration: the source goes on from the same state.
    target.device.pause().unwrap();
    let back = target.device.save().unwrap();
    source.device.restore(&back).unwrap();
    source.device.resume().unwrap();
    assert_eq!(ask(&mut source, ring, 0x8000, 16), 16);
}

#[test]
fn foreign_states_are_refused() {
    let (mut driver, _) = rng();
    driver.bring_up(RING, &[64]);
    assert!(driver.device.save().is_err(), "not paused");
    driver.device.pause().unwrap();
    let state = driver.device.save().unwrap();
    for len in 0..state.len() {
        let (mut other, _) = rng();
        other.device.pause().unwrap();
        assert!(other.device.restore(&state[..len]).is_err());
    }
    let (mut other, _) = rng();
    other.device.pause().unwrap();
    let mut wrong = state.clone();
    wrong[0] = 99;
    let error = other.device.restore(&wrong).unwrap_err().to_string();
    assert!(error.contains("version 99"), "{error}");
    assert!(other.device.restore(&vec![1; 1 << 20]).is_err());
    driver.device.resume().unwrap();
    assert!(driver.device.restore(&state).is_err(), "serving");
}

#[test]
fn driver_ok_while_paused_takes_effect_on_resume() {
    let (mut driver, _) = rng();
    driver.device.pause().unwrap();
    let mut rings = driver.bring_up(RING, &[64]);
    let ring = &mut rings[0];
    ring.add(&[], &[(0x8000, 4)]);
    driver.kick(0);
    std::thread::sleep(std::time::Duration::from_millis(10));
    assert_eq!(ring.pop_used(), None);
    driver.device.resume().unwrap();
    wait_for("service", || ring.pop_used().is_some());
    assert_eq!(driver.status() & FEATURES_OK, FEATURES_OK);
}

#[test]
fn accesses_of_any_shape_are_survived() {
    let (mut driver, _) = rng();
    let mut data = [0x5a; 8];
    for offset in (0..0x8000_u64).step_by(3).chain([u64::MAX, u64::MAX - 7]) {
        for len in [1, 2, 4, 8] {
            driver.device.write_bar(0, offset, &data[..len]);
            driver.device.read_bar(0, offset, &mut data[..len]);
            driver.device.write_bar(3, offset, &data[..len]);
            driver.device.read_bar(3, offset, &mut data[..len]);
        }
    }
    driver.device.reset();
    assert_eq!(driver.status(), 0);
}
