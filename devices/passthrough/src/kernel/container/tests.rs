//! Memory that devices share, and what a kernel can have against it.

use vm_memory::GuestMemoryBackend;
use vm_migration::memory::{Backing, GuestMemory, RamMapping, map_ram};
use vm_migration::{ErrorChain, Iova, IovaRange};

use super::*;
use crate::kernel::fake::{FakeKernel, FakeRegistry, iommu};

const HIGH: u64 = 1 << 32;

fn memory() -> GuestMemory {
    let region = |gpa| RamMapping {
        gpa: vm_migration::Gpa(gpa),
        len: 0x10_0000,
        backing: Backing::Anonymous,
    };
    map_ram(vec![region(0), region(HIGH)]).unwrap()
}

fn groups(kernel: &Arc<FakeKernel>) -> Groups {
    Groups::new(Arc::clone(kernel) as _, Arc::new(FakeRegistry::default()))
}

fn pinned(memory: &GuestMemory) -> Vec<PinnedRam> {
    memory.iter().map(PinnedRam::new).collect()
}

#[test]
fn groups_share_a_container_and_memory_is_mapped_once() {
    let kernel = FakeKernel::new();
    let groups = groups(&kernel);
    let (first, second) = (groups.get(7).unwrap(), groups.get(8).unwrap());
    assert!(Arc::ptr_eq(&groups.get(7).unwrap(), &first));
    assert!(Arc::ptr_eq(&first.container, &second.container));
    let memory = memory();
    for group in [&first, &second] {
        for ram in pinned(&memory) {
            group.container().map(ram).unwrap();
        }
    }
    assert_eq!(kernel.0.lock().mapped.len(), 2);
    let ram = pinned(&memory)[0].ram();
    first.container().unmap(ram).unwrap();
    assert_eq!(kernel.0.lock().mapped.len(), 2, "the other still needs it");
    second.container().unmap(ram).unwrap();
    assert_eq!(kernel.0.lock().mapped.len(), 1);
    assert!(second.container().unmap(ram).is_err());
    // A group whose IOMMU does not go with the others' has a container of its own.
    kernel.0.lock().refuse_join = 2;
    let third = groups.get(9).unwrap();
    assert!(!Arc::ptr_eq(&first.container, &third.container));
    // What nobody uses is closed, and opened again when it is needed.
    let opened = kernel.0.lock().opened.len();
    drop(third);
    groups.get(9).unwrap();
    assert_eq!(kernel.0.lock().opened.len(), opened + 1);
}

#[test]
fn memory_that_cannot_be_mapped_is_named() {
    let kernel = FakeKernel::new();
    let request = (Message::IommuInfo as u32, 0);
    let ranges = [(0, 0xffff_ffff), (HIGH + 0x1000, u64::MAX)];
    kernel.0.lock().answers.insert(request, iommu(&ranges));
    let groups = groups(&kernel);
    let group = groups.get(7).unwrap();
    let told = |result: Result<(), KernelError>| ErrorChain(&result.unwrap_err()).to_string();
    let memory = memory();
    let mut ram = pinned(&memory).into_iter();
    let (low, high) = (ram.next().unwrap(), ram.next().unwrap());
    let error = told(group.container().map(high));
    assert!(error.contains("not within the addresses"), "{error}");
    kernel.0.lock().map_error = Some(Errno::NOMEM);
    let again = PinnedRam::new(memory.iter().next().unwrap());
    let error = told(group.container().map(again));
    assert!(error.contains("ulimit -l"), "{error}");
    kernel.0.lock().map_error = None;
    let region = low.ram();
    group.container().map(low).unwrap();
    kernel.0.lock().unmapped = Some(0x1000);
    assert!(group.container().unmap(region).is_err(), "part of it stays");
}

#[test]
fn the_bitmaps_of_a_container_add_to_what_was_known() {
    let kernel = FakeKernel::new();
    let groups = groups(&kernel);
    let group = groups.get(7).unwrap();
    let container = group.container();
    assert!(container.has_log());
    assert_eq!(container.page_size().unwrap(), PageSize::SIZE_4K);
    assert_eq!(container.max_region(), 8 << 40, "256 MiB of bits");
    let memory = memory();
    let high = pinned(&memory).pop().unwrap();
    let range = IovaRange::new(Iova(HIGH), high.ram().len).unwrap();
    container.map(high).unwrap();
    let mut bitmap = IovaBitmap::over(range, PageSize::SIZE_4K).unwrap();
    assert!(container.report(&mut bitmap).is_err(), "not started");
    container.start().unwrap();
    for page in [HIGH + 0x5000, HIGH + 0xf_f000] {
        kernel.0.lock().dirty = vec![page];
        container.report(&mut bitmap).unwrap();
        assert!(bitmap.contains(Iova(page)));
    }
    assert_eq!(bitmap.count(), 2);
    let part = IovaRange::new(Iova(HIGH), 0x1000).unwrap();
    let mut part = IovaBitmap::over(part, PageSize::SIZE_4K).unwrap();
    assert!(container.report(&mut part).is_err(), "mappings are not cut");
    container.stop().unwrap();
    assert!(!kernel.0.lock().container_log);
}
