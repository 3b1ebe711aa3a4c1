//! What is read of a device that was just connected.

use std::sync::Arc;

use vfio_user::MigrationFlags;

use super::*;
use crate::fake::{FakeBackend, VENDOR_CAP, device};

/// Lets the fake device have a virtio structure of `cfg_type` in BAR 2.
fn structure(backend: &FakeBackend, at: u16, next: u8, (cfg_type, offset, len): (u8, u32, u32)) {
    let mut seen = backend.seen.lock();
    let at = usize::from(at);
    let mut body = vec![0x09, next, 16, cfg_type, 2, 0, 0, 0];
    body.extend_from_slice(&offset.to_le_bytes());
    body.extend_from_slice(&len.to_le_bytes());
    seen.config[at..at + 16].copy_from_slice(&body);
}

fn profile(backend: &Arc<FakeBackend>) -> DeviceProfile {
    device(backend).0.profile().clone()
}

fn virtio_card() -> Arc<FakeBackend> {
    let backend = FakeBackend::new(Some(MigrationFlags::all()));
    structure(&backend, VENDOR_CAP, 0x70, (CFG_COMMON, 0x400, 56));
    structure(&backend, 0x70, 0, (CFG_DEVICE, 0x800, 24));
    {
        let bar = &mut backend.seen.lock().bar;
        bar[0x404..0x408].copy_from_slice(&0x1234_5678_u32.to_le_bytes());
        bar[0x412..0x414].copy_from_slice(&3_u16.to_le_bytes());
        bar[0x418..0x41a].copy_from_slice(&256_u16.to_le_bytes());
        bar[0x80a..0x80c].copy_from_slice(&9000_u16.to_le_bytes());
    }
    backend
}

#[test]
fn an_offer_is_read_from_the_common_configuration() {
    let backend = virtio_card();
    let profile = profile(&backend);
    // The fake device gives the same half for both selectors.
    let offer = profile.virtio.unwrap();
    assert_eq!(offer.features, 0x1234_5678_1234_5678);
    assert_eq!(offer.queue_sizes, [256; 3]);
    assert_eq!(offer.mtu, Some(9000));
    assert_eq!((profile.vectors, profile.bars.len()), (3, 2));
    assert_eq!(profile.migration, Some(MigrationFlags::all()));
    // Both selectors and each queue were asked for.
    let seen = backend.seen.lock();
    assert_eq!(seen.bar[0x400..0x404], 1_u32.to_le_bytes());
    assert_eq!(seen.bar[0x416..0x418], 2_u16.to_le_bytes());
}

#[test]
fn structures_outside_of_a_bar_are_not_read() {
    for (offset, len) in [
        (0x3fd0, 56),
        (0xffff_ffff, 56),
        (0x400, 0xffff_ffff),
        (0x400, 16),
    ] {
        let backend = virtio_card();
        structure(&backend, VENDOR_CAP, 0, (CFG_COMMON, offset, len));
        assert_eq!(profile(&backend).virtio, None, "{offset:#x} {len:#x}");
    }
}

#[test]
fn other_devices_are_not_touched() {
    let backend = virtio_card();
    backend.seen.lock().config[0..2].copy_from_slice(&0x8086_u16.to_le_bytes());
    let before = backend.seen.lock().bar.clone();
    assert_eq!(profile(&backend).virtio, None);
    assert_eq!(backend.seen.lock().bar, before);
}

#[test]
fn the_digest_is_of_what_the_guest_cannot_write() {
    let digest = |change: (usize, u8)| {
        let backend = virtio_card();
        backend.seen.lock().config[change.0] = change.1;
        profile(&backend).config_digest
    };
    let plain = digest((0, 0xf4));
    // Command register, and MSI-X enable.
    assert_eq!(digest((4, 0x06)), plain);
    assert_eq!(digest((0x43, 0x80)), plain);
    // Class, and a capability of the device.
    assert_ne!(digest((0x0b, 0x02)), plain);
    assert_ne!(digest((0x74, 1)), plain);
}
