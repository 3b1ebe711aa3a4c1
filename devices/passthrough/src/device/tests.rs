//! What guest and VMM see of a device.

use devices::MsiLine;
use pci::BarKind;
use vfio_user::{DeviceState, MigrationFlags};
use vm_memory::GuestAddress;
use vm_migration::Pause;
use vm_migration::memory::{Backing, RamMapping, map_ram};

use super::*;
use crate::backend::IrqKind;
use crate::fake::{
    DEVICE, FakeBackend, MSI_CAP, MSIX_CAP, TABLE, VECTORS, VENDOR, VENDOR_CAP, device,
};

fn config(device: &mut Passthrough, at: u16) -> u32 {
    let mut bytes = [0; 4];
    device.read_config(at, &mut bytes);
    u32::from_le_bytes(bytes)
}

#[test]
fn header_and_bars_are_emulated() {
    let backend = FakeBackend::new(None);
    let (mut nic, _) = device(&backend);
    assert_eq!(
        config(&mut nic, 0),
        u32::from(DEVICE) << 16 | u32::from(VENDOR)
    );
    let bars = nic.bars();
    assert_eq!(bars.len(), 2);
    assert_eq!(bars[0].kind, BarKind::Memory64 { prefetchable: true });
    assert_eq!((bars[0].size, bars[1].size), (0x8000, 0x4000));
    nic.set_bar_address(2, 0xe000_0000);
    nic.write_config(0x14, &1_u32.to_le_bytes());
    assert_eq!(config(&mut nic, 0x18), 0xe000_0000);
    assert_eq!(nic.bars()[0].address, 1 << 32);
    // The device's own registers do not move.
    assert_eq!(backend.seen.lock().config[0x10..0x20], {
        let mut own = [0; 16];
        own[0] = 0x0c;
        own
    });
}

#[test]
fn the_command_register_is_emulated_and_passed_along() {
    let backend = FakeBackend::new(None);
    let (mut nic, _) = device(&backend);
    assert!(!nic.memory_enabled());
    nic.write_config(4, &[0x06, 0x04]);
    assert!(nic.memory_enabled());
    assert_eq!(config(&mut nic, 4) & 0xffff, 0x0406);
    assert_eq!(backend.seen.lock().config[4..6], [0x06, 0x04]);
}

#[test]
fn msi_is_hidden_and_other_capabilities_are_the_devices() {
    let backend = FakeBackend::new(None);
    let (mut nic, _) = device(&backend);
    // The list goes from MSI-X to the vendor's.
    assert_eq!(config(&mut nic, MSIX_CAP) & 0xffff, 0x6011);
    assert_eq!(config(&mut nic, MSI_CAP) & 0xff, 0);
    assert_eq!(config(&mut nic, VENDOR_CAP), 0xab10_0009);
    nic.write_config(VENDOR_CAP + 4, &[1, 2, 3, 4]);
    nic.write_config(VENDOR_CAP, &[0xff, 0xff, 0x20, 0xcd]);
    let seen = backend.seen.lock();
    let at = usize::from(VENDOR_CAP);
    assert_eq!(seen.config[at + 4..at + 8], [1, 2, 3, 4]);
    assert_eq!(
        seen.config[at..at + 4],
        [0x09, 0x00, 0x20, 0xcd],
        "identifier and pointer are not the guest's to write"
    );
}

#[test]
fn the_msix_table_becomes_routes_of_vectors_the_device_signals() {
    let backend = FakeBackend::new(None);
    let (mut nic, fabric) = device(&backend);
    assert_eq!(backend.seen.lock().irqs, None);
    nic.write_bar(2, TABLE + 16, &0xfee0_0000_u64.to_le_bytes());
    nic.write_bar(2, TABLE + 24, &0x4041_u32.to_le_bytes());
    nic.write_bar(2, TABLE + 28, &0_u32.to_le_bytes());
    let lines = fabric.0.lock();
    assert_eq!(*lines[1].route.lock(), None);
    // The device signals while MSI-X is off: pending.
    lines[1].trigger().unwrap();
    let mut pending = [0; 8];
    nic.read_bar(2, 0x1800, &mut pending);
    assert_eq!(pending[0], 2);
    nic.write_config(MSIX_CAP + 2, &0x8002_u16.to_le_bytes());
    let route = lines[1].route.lock().unwrap();
    assert_eq!((route.address, route.data), (0xfee0_0000, 0x4041));
    let at = usize::from(MSIX_CAP) + 2;
    assert_eq!(backend.seen.lock().config[at..at + 2], [0x02, 0x80]);
    // The device's vectors are on just while the guest's are.
    let all = Some((IrqKind::Msix, usize::from(VECTORS)));
    assert_eq!(backend.seen.lock().irqs, all);
    nic.write_config(MSIX_CAP + 2, &0x0002_u16.to_le_bytes());
    assert_eq!(backend.seen.lock().irqs, None);
    nic.write_config(MSIX_CAP + 2, &0x8002_u16.to_le_bytes());
    assert_eq!(backend.seen.lock().irqs, all);
    // Neither table nor pending bits reach the device.
    let base = usize::try_from(TABLE).unwrap();
    assert_eq!(backend.seen.lock().bar[base + 16], 16);
    nic.write_bar(2, 0x1800, &[0xff; 8]);
    assert_eq!(backend.seen.lock().bar[0x1800], 0);
    let mut word = [0; 4];
    nic.read_bar(2, TABLE + 24, &mut word);
    assert_eq!(u32::from_le_bytes(word), 0x4041);
}

#[test]
fn a_device_without_msix_interrupts_by_msi() {
    let backend = FakeBackend::new(Some(MigrationFlags::all()));
    {
        // MSI comes first, with four maskable vectors, and points past MSI-X.
        let config = &mut backend.seen.lock().config;
        config[0x34] = MSI_CAP.to_le_bytes()[0];
        let at = usize::from(MSI_CAP) + 2;
        config[at..at + 2].copy_from_slice(&0x0104_u16.to_le_bytes());
        config.resize(256, 0);
        // The vendor's moves out of the way.
        config[usize::from(MSI_CAP) + 1] = 0x70;
        config[0x70..0x74].copy_from_slice(&[0x09, 0, 0x10, 0xab]);
    }
    let (mut nic, fabric) = device(&backend);
    assert_eq!(nic.profile().vectors, 4);
    nic.write_config(MSI_CAP + 4, &0xfee0_0000_u32.to_le_bytes());
    nic.write_config(MSI_CAP + 8, &0x41_u32.to_le_bytes());
    nic.write_config(MSI_CAP + 12, &0_u32.to_le_bytes());
    assert_eq!(backend.seen.lock().irqs, None);
    nic.write_config(MSI_CAP + 2, &0x0111_u16.to_le_bytes());
    assert_eq!(backend.seen.lock().irqs, Some((IrqKind::Msi, 2)));
    let lines = fabric.0.lock();
    let route = |n: usize| lines[n].route.lock().map(|m| (m.address, m.data));
    assert_eq!(route(0), Some((0xfee0_0000, 0x40)));
    assert_eq!((route(1), route(2)), (Some((0xfee0_0000, 0x41)), None));
    // Masked, it waits, and the guest sees that it does.
    nic.write_config(MSI_CAP + 12, &1_u32.to_le_bytes());
    assert_eq!(route(0), None);
    lines[0].trigger().unwrap();
    assert_eq!(config(&mut nic, MSI_CAP + 16), 1);
    let saved = nic.inner.front.lock().save();
    assert_eq!(route(0), None);
    nic.inner.front.lock().restore(&saved).unwrap();
    assert_eq!(config(&mut nic, MSI_CAP + 16), 1);
    nic.reset().unwrap();
    assert_eq!((backend.seen.lock().irqs, route(1)), (None, None));
}

#[test]
fn bars_are_read_and_written_at_the_device() {
    let backend = FakeBackend::new(None);
    let (mut nic, _) = device(&backend);
    nic.write_bar(2, 0x10, &[9, 8]);
    let mut data = [0; 4];
    nic.read_bar(2, 0x10, &mut data);
    assert_eq!(data, [9, 8, 0x12, 0x13]);
    // What the device refuses reads as all ones.
    nic.read_bar(0, 0, &mut data);
    assert_eq!(data, [0xff; 4]);
}

#[test]
fn doorbells_and_mappable_areas_are_given_but_not_the_msix_pages() {
    let backend = FakeBackend::new(None);
    let (nic, _) = device(&backend);
    let bells = nic.doorbells();
    assert_eq!(
        (bells[0].bar, bells[0].offset, bells[0].size),
        (0, 0x3000, 2)
    );
    let areas: Vec<_> = nic
        .mappable_areas()
        .iter()
        .map(|area| (area.bar, area.offset, area.len, area.file_offset))
        .collect();
    assert_eq!(
        areas,
        [(2, 0, 0x1000, 0x10_0000), (2, 0x2000, 0x2000, 0x10_2000)]
    );
}

#[test]
fn a_dead_device_reads_as_all_ones() {
    let backend = FakeBackend::new(None);
    let (mut nic, _) = device(&backend);
    backend.seen.lock().gone = true;
    let mut data = [0; 8];
    nic.read_bar(2, 0x10, &mut data);
    assert_eq!(data, [0xff; 8]);
    assert_eq!(config(&mut nic, 0), u32::MAX);
    nic.read_bar(2, TABLE, &mut data);
    assert_eq!(data, [0xff; 8]);
    nic.write_bar(2, 0x10, &[1]);
    assert!(nic.reset().is_err());
}

#[test]
fn memory_is_mapped_by_file_and_private_memory_refused_with_the_remedy() {
    let backend = FakeBackend::new(None);
    let (nic, _) = device(&backend);
    let file = |gpa, offset| RamMapping {
        gpa: Gpa(gpa),
        len: 0x10_0000,
        backing: {
            let fd = rustix::fs::memfd_create("ram", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
            rustix::fs::ftruncate(&fd, 0x40_0000).unwrap();
            Backing::File {
                file: fd.into(),
                offset,
            }
        },
    };
    let memory = map_ram(vec![file(0, 0), file(1 << 32, 0x10_0000)]).unwrap();
    nic.map_memory(&memory).unwrap();
    let mapped: Vec<_> = backend
        .seen
        .lock()
        .mapped
        .iter()
        .map(|(ram, offset)| (ram.gpa.0, ram.len, *offset))
        .collect();
    assert_eq!(mapped, [(0, 0x10_0000, 0), (1 << 32, 0x10_0000, 0x10_0000)]);
    nic.unmap_memory().unwrap();
    assert!(backend.seen.lock().mapped.is_empty());

    let private = GuestMemory::from_ranges(&[(GuestAddress(0), 4096)]).unwrap();
    let error = nic.map_memory(&private).unwrap_err();
    let error = ErrorChain(&error).to_string();
    assert!(error.contains("--memory shared=on"), "{error}");
}

#[test]
fn a_device_that_cannot_migrate_says_so() {
    let backend = FakeBackend::new(None);
    let (mut nic, _) = device(&backend);
    assert!(nic.profile().migration.is_none());
    assert!(matches!(
        nic.state_source().err(),
        Some(StateError::Unsupported { .. })
    ));
    assert!(matches!(
        nic.state_sink().err(),
        Some(StateError::Unsupported { .. })
    ));
    assert!(matches!(
        nic.dirty_rung(false).err(),
        Some(StateError::Unsupported { .. })
    ));
    assert!(nic.pause().is_err());
    // It always runs, so there is nothing to resume.
    nic.resume().unwrap();
}

#[test]
fn a_pause_stops_the_device_and_a_resume_starts_it() {
    let backend = FakeBackend::new(Some(MigrationFlags::all()));
    let (mut nic, _) = device(&backend);
    nic.pause().unwrap();
    assert_eq!(backend.seen.lock().machine.state(), DeviceState::Stop);
    nic.resume().unwrap();
    assert_eq!(backend.seen.lock().machine.state(), DeviceState::Running);
}
