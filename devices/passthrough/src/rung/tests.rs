//! The first rung that there is, is taken; none is taken without a word.

use vfio_user::MigrationFlags;
use vm_migration::{ErrorChain, Gpa, Iova};

use super::*;
use crate::fake::{FakeBackend, FakeShared, device};

const RAM: RamRegion = RamRegion {
    gpa: Gpa(0),
    len: 0x10_0000,
};

fn range(first: u64, len: u64) -> IovaRange {
    IovaRange::new(Iova(first), len).unwrap()
}

#[test]
fn the_best_rung_is_taken_and_the_last_only_by_consent() {
    let backend = FakeBackend::new(Some(MigrationFlags::all()));
    let (nic, _) = device(&backend);
    assert_eq!(nic.dirty_rung(true).unwrap(), DirtyRung::DeviceLog);

    let backend = FakeBackend::new(Some(MigrationFlags::all()));
    backend.seen.lock().no_log = true;
    let (nic, _) = device(&backend);
    nic.inner.map_for_test(RAM);
    let error = ErrorChain(&nic.dirty_rung(false).unwrap_err()).to_string();
    assert!(error.contains("dirty=all"), "{error}");
    assert_eq!(nic.dirty_rung(true).unwrap(), DirtyRung::Everything);

    let shared = FakeShared::new(RAM.len);
    backend.seen.lock().shared = Some(Arc::clone(&shared));
    assert_eq!(nic.dirty_rung(true).unwrap(), DirtyRung::Container);
    *shared.rung.lock() = DirtyRung::Iommu;
    assert_eq!(nic.dirty_rung(false).unwrap(), DirtyRung::Iommu);
    let sources = crate::dirty_sources([(&nic, false)]).unwrap();
    assert_eq!(sources[0].id(), "iommu-of-nic0");
    // Its bitmaps are too short for the region.
    backend.seen.lock().shared = Some(FakeShared::new(RAM.len - 1));
    assert_eq!(nic.dirty_rung(true).unwrap(), DirtyRung::Everything);
}

#[test]
fn a_container_is_asked_once_for_all_its_devices() {
    let shared = FakeShared::new(u64::MAX);
    let make = || {
        let backend = FakeBackend::new(Some(MigrationFlags::all()));
        {
            let mut seen = backend.seen.lock();
            seen.no_log = true;
            seen.shared = Some(Arc::clone(&shared));
        }
        let (nic, _) = device(&backend);
        nic.inner.map_for_test(RAM);
        nic
    };
    let devices = [make(), make()];
    let asked = devices.iter().map(|device| (device, false));
    let mut sources = crate::dirty_sources(asked).unwrap();
    assert_eq!(sources.len(), 1);
    let source = sources.first_mut().unwrap();
    assert_eq!(source.id(), "container-of-nic0");
    let window = range(0, RAM.len);
    let mut bitmap = IovaBitmap::over(window, PageSize::SIZE_4K).unwrap();
    assert!(source.report(window, &mut bitmap).is_err(), "not started");
    source.start(&[window]).unwrap();
    *shared.dirty.lock() = vec![0x3000];
    assert_eq!(source.report(window, &mut bitmap).unwrap().pages, Some(1));
    assert!(bitmap.contains(Iova(0x3000)));
    assert_eq!(source.report(window, &mut bitmap).unwrap().pages, Some(0));
    source.stop().unwrap();
    assert!(!*shared.on.lock());
}

#[test]
fn everything_is_everything_each_time() {
    let backend = FakeBackend::new(Some(MigrationFlags::all()));
    backend.seen.lock().no_log = true;
    let (nic, _) = device(&backend);
    let mut sources = crate::dirty_sources([(&nic, true)]).unwrap();
    let source = sources.first_mut().unwrap();
    let window = range(0x4000, 0x8000);
    source.start(&[window]).unwrap();
    for _ in 0..2 {
        let mut bitmap = IovaBitmap::over(range(0, 0x10_0000), PageSize::SIZE_4K).unwrap();
        assert_eq!(source.report(window, &mut bitmap).unwrap().pages, Some(8));
        assert_eq!(bitmap.count(), 8);
    }
    assert_eq!(source.precision(), Precision::Everything);
}
