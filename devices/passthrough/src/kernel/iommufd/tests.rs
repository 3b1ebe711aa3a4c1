//! Devices that have files of their own: who is attached to what, and what of DMA is reported.

use std::path::{Path, PathBuf};

use vm_memory::GuestMemoryBackend;
use vm_migration::memory::{Backing, GuestMemory, RamMapping, map_ram};
use vm_migration::{ErrorChain, Gpa, Iova, IovaRange};

use super::*;
use crate::backend::Backend;
use crate::kernel::fake::iommufd::Object;
use crate::kernel::fake::{FakeKernel, FakeRegistry};
use crate::kernel::{HostVfio, Interface, KernelVfioBackend};

const HIGH: u64 = 1 << 32;

/// A folder like one of sysfs: devices of group 7, some with files of their own.
struct Sysfs(tempfile::TempDir);

impl Sysfs {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        for (device, file) in [
            ("0000:01:00.0", Some("vfio3")),
            ("0000:01:00.1", Some("vfio4")),
            ("0000:02:00.0", None),
        ] {
            let folder = dir.path().join(device);
            std::fs::create_dir(&folder).unwrap();
            std::os::unix::fs::symlink("../../groups/7", folder.join("iommu_group")).unwrap();
            if let Some(file) = file {
                std::fs::create_dir_all(folder.join("vfio-dev").join(file)).unwrap();
            }
        }
        Self(dir)
    }

    fn device(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }
}

struct Bench {
    kernel: Arc<FakeKernel>,
    registry: Arc<FakeRegistry>,
    host: HostVfio,
    sysfs: Sysfs,
}

impl Bench {
    fn new(interface: Interface) -> Self {
        let kernel = FakeKernel::new();
        let registry = Arc::new(FakeRegistry::default());
        let (own, files) = (Arc::clone(&kernel), Arc::clone(&registry));
        Self {
            kernel,
            registry,
            host: HostVfio::new(own, interface, Arc::default(), files),
            sysfs: Sysfs::new(),
        }
    }

    /// One whose devices are behind an IOMMU that logs.
    fn logging() -> Self {
        let bench = Self::new(Interface::Iommufd);
        bench.kernel.0.lock().iommufd.capabilities = Some(HW_CAP_DIRTY_TRACKING);
        bench
    }

    fn open(&self, name: &str) -> Result<KernelVfioBackend, KernelError> {
        self.host.open(&self.sysfs.device(name))
    }

    fn first(&self) -> KernelVfioBackend {
        self.open("0000:01:00.0").unwrap()
    }

    fn second(&self) -> KernelVfioBackend {
        self.open("0000:01:00.1").unwrap()
    }

    fn told(&self, name: &str) -> String {
        ErrorChain(&self.open(name).err().unwrap()).to_string()
    }

    fn opened(&self) -> Vec<PathBuf> {
        std::mem::take(&mut self.kernel.0.lock().opened)
    }

    fn attached(&self) -> Vec<Object> {
        let seen = self.kernel.0.lock();
        let tables = seen.iommufd.attached.values();
        tables.map(|id| seen.iommufd.objects[id]).collect()
    }
}

fn paths(of: &[&str]) -> Vec<PathBuf> {
    of.iter().map(PathBuf::from).collect()
}

fn memory() -> GuestMemory {
    let region = |gpa| RamMapping {
        gpa: Gpa(gpa),
        len: 0x10_0000,
        backing: Backing::Anonymous,
    };
    map_ram(vec![region(0), region(HIGH)]).unwrap()
}

#[test]
fn a_device_is_opened_by_its_own_file_and_let_go_of_in_order() {
    let bench = Bench::new(Interface::Iommufd);
    let device = bench.first();
    assert_eq!(device.interface(), Interface::Iommufd);
    let files = ["/dev/vfio/devices/vfio3", "/dev/iommu"];
    assert_eq!(bench.opened(), paths(&files));
    assert_eq!(bench.attached(), [Object::Ioas]);
    assert!(device.shared_log().is_none(), "its IOMMU is emulated");
    assert_eq!(device.region(0).unwrap().size, 0x4000);
    drop(device);
    let seen = bench.kernel.0.lock();
    assert_eq!(
        seen.iommufd.calls,
        [
            Message::IoasAlloc,
            Message::BindIommufd,
            Message::HwInfo,
            Message::AttachPt,
            Message::DetachPt,
            Message::Destroy,
        ]
    );
    let told = bench.registry.told.lock();
    let [(true, added), (false, removed)] = told[..] else {
        panic!("{told:?}");
    };
    assert_eq!(added, removed);
    assert!(!seen.iommufd.objects.values().any(|o| *o == Object::Ioas));
}

#[test]
fn a_device_is_told_of_before_it_is_bound() {
    for registry in [false, true] {
        let kernel = FakeKernel::new();
        let files = Arc::new(FakeRegistry {
            refuses: registry,
            ..FakeRegistry::default()
        });
        if !registry {
            let request = Message::BindIommufd as u32;
            kernel.0.lock().errors.insert(request, Errno::BUSY);
        }
        let own = Arc::clone(&kernel);
        let host = HostVfio::new(
            own,
            Interface::Iommufd,
            Arc::default(),
            Arc::clone(&files) as _,
        );
        let sysfs = Sysfs::new();
        let error = host.open(&sysfs.device("0000:01:00.0")).err().unwrap();
        let error = ErrorChain(&error).to_string();
        let (text, told) = match registry {
            true => ("no room for files", 0),
            // Added, refused by the kernel, removed.
            false => ("another process has it", 2),
        };
        assert!(error.contains(text), "{error}");
        assert_eq!(files.told.lock().len(), told);
        let calls = &kernel.0.lock().iommufd.calls;
        assert!(!calls.contains(&Message::BindIommufd));
    }
}

#[test]
fn devices_share_memory_and_a_table_that_logs() {
    let bench = Bench::logging();
    let (first, second) = (bench.first(), bench.second());
    assert_eq!(bench.attached(), [Object::Hwpt(false); 2]);
    let logs = [&first, &second].map(|device| device.shared_log().unwrap());
    assert!(std::ptr::addr_eq(
        Arc::as_ptr(&logs[0]),
        Arc::as_ptr(&logs[1])
    ));
    assert_eq!(logs[0].rung(), DirtyRung::Iommu);
    let opened = bench.opened();
    let iommufds = opened
        .iter()
        .filter(|path| *path == Path::new("/dev/iommu"));
    assert_eq!(iommufds.count(), 1);
    for device in [&first, &second] {
        for region in memory().iter() {
            device.map(region).unwrap();
        }
    }
    assert_eq!(bench.kernel.0.lock().mapped.len(), 2);
    let ram = RamRegion {
        gpa: Gpa(HIGH),
        len: 0x10_0000,
    };
    first.unmap(ram).unwrap();
    assert_eq!(bench.kernel.0.lock().mapped.len(), 2, "one needs it still");
    second.unmap(ram).unwrap();
    assert_eq!(bench.kernel.0.lock().mapped.len(), 1);
    // A device behind another IOMMU gets a table of its own.
    drop(second);
    bench.kernel.0.lock().iommufd.refuse_tables = 1;
    let other = bench.second();
    let log = other.shared_log().unwrap();
    assert!(!std::ptr::addr_eq(Arc::as_ptr(&logs[0]), Arc::as_ptr(&log)));
    // Tables go with the last who needs them, and the address space after them.
    drop((logs, log, first, other));
    let seen = bench.kernel.0.lock();
    assert!(seen.iommufd.objects.values().all(|o| *o == Object::Device));
}

#[test]
fn an_iommu_that_cannot_log_after_all_is_used_without_a_log() {
    let bench = Bench::logging();
    let request = Message::HwptAlloc as u32;
    bench
        .kernel
        .0
        .lock()
        .errors
        .insert(request, Errno::OPNOTSUPP);
    let device = bench.first();
    assert!(device.shared_log().is_none());
    assert_eq!(bench.attached(), [Object::Ioas]);
}

#[test]
fn the_interface_is_chosen_by_what_there_is() {
    let group = ["/dev/vfio/7", "/dev/vfio/vfio"];
    let bench = Bench::new(Interface::Auto);
    assert_eq!(bench.first().interface(), Interface::Iommufd);
    bench.opened();
    // No file of its own; no iommufd; no permission.
    let by_group = bench.open("0000:02:00.0").unwrap();
    assert_eq!(by_group.interface(), Interface::Group);
    assert_eq!(bench.opened(), paths(&group));
    drop(by_group);
    for (path, error) in [
        ("/dev/iommu", Errno::NOENT),
        ("/dev/vfio/devices/vfio3", Errno::ACCESS),
    ] {
        let mut errors = std::collections::BTreeMap::new();
        errors.insert(PathBuf::from(path), error);
        let bench = Bench::new(Interface::Auto);
        bench.kernel.0.lock().open_errors = errors.clone();
        assert_eq!(bench.first().interface(), Interface::Group, "{path}");
        let strict = Bench::new(Interface::Iommufd);
        strict.kernel.0.lock().open_errors = errors;
        let told = strict.told("0000:01:00.0");
        assert!(told.contains(path), "{told}");
    }
    let strict = Bench::new(Interface::Iommufd);
    let told = strict.told("0000:02:00.0");
    assert!(told.contains("CONFIG_VFIO_DEVICE_CDEV"), "{told}");
    let groups = Bench::new(Interface::Group);
    assert_eq!(groups.first().interface(), Interface::Group);
    assert_eq!(groups.opened(), paths(&group));
}

#[test]
fn descriptors_of_others_are_used_in_place_of_files_and_stay_bound() {
    let bench = Bench::new(Interface::Auto);
    let kernel = &bench.kernel;
    let device = kernel.open(Path::new("/dev/vfio/devices/vfio9")).unwrap();
    let iommufd = Arc::new(Iommufd::default());
    iommufd.provide(kernel.open(Path::new("/dev/iommu")).unwrap());
    bench.opened();
    // Twice, as when the guest reboots: the file cannot be bound again.
    for _ in 0..2 {
        let (own, files) = (Arc::clone(kernel), Arc::clone(&bench.registry));
        let host = HostVfio::new(own, Interface::Auto, Arc::clone(&iommufd), files);
        let copy = device.try_clone().unwrap();
        kernel.0.lock().know(&copy, &device);
        let adopted = host.adopt(9, copy).unwrap();
        assert_eq!(adopted.interface(), Interface::Iommufd);
        assert!(bench.opened().is_empty());
        assert_eq!(bench.attached(), [Object::Ioas]);
    }
    let calls = &kernel.0.lock().iommufd.calls;
    let count = |request| calls.iter().filter(|call| **call == request).count();
    assert_eq!(count(Message::BindIommufd), 1);
    assert_eq!(count(Message::AttachPt), 2);
    assert_eq!(count(Message::DetachPt), 2);
    let told: Vec<bool> = bench
        .registry
        .told
        .lock()
        .iter()
        .map(|told| told.0)
        .collect();
    assert_eq!(told, [true, false, true, false]);
}

#[test]
fn a_descriptor_of_a_device_needs_iommufd() {
    let bench = Bench::new(Interface::Group);
    let path = Path::new("/dev/vfio/devices/vfio9");
    let device = bench.kernel.open(path).unwrap();
    let told = ErrorChain(&bench.host.adopt(9, device).err().unwrap()).to_string();
    assert!(told.contains("--platform iommufd=off"), "{told}");
}

#[test]
fn what_keeps_a_device_from_being_attached_is_named_with_the_remedy() {
    let cases = [
        (Message::BindIommufd, Errno::INVAL, "open the file anew"),
        (Message::AttachPt, Errno::ADDRINUSE, "give the guest less"),
        (Message::IoasAlloc, Errno::NOMEM, "I/O address space"),
        (Message::HwInfo, Errno::IO, "describe the device's IOMMU"),
    ];
    for (request, error, text) in cases {
        let bench = Bench::new(Interface::Iommufd);
        bench.kernel.0.lock().errors.insert(request as u32, error);
        let told = bench.told("0000:01:00.0");
        assert!(told.contains(text), "{text}: {told}");
        assert!(bench.attached().is_empty());
    }
}

#[test]
fn memory_that_devices_cannot_reach_is_named() {
    let bench = Bench::new(Interface::Iommufd);
    let device = bench.first();
    let memory = memory();
    let mut regions = memory.iter();
    let (low, high) = (regions.next().unwrap(), regions.next().unwrap());
    bench.kernel.0.lock().iommufd.ranges = vec![[0, 0xffff_ffff], [HIGH + 0x1000, u64::MAX]];
    let told = |result: Result<(), BackendError>| ErrorChain(&result.unwrap_err()).to_string();
    let error = told(device.map(high));
    assert!(error.contains("not within the addresses"), "{error}");
    bench.kernel.0.lock().map_error = Some(Errno::NOMEM);
    let error = told(device.map(low));
    assert!(error.contains("ulimit -l"), "{error}");
    for (told_ranges, alignment) in [(Some(u32::MAX), 0x1000), (None, 0x3000)] {
        let model = &mut bench.kernel.0.lock().iommufd;
        (model.ranges_told, model.alignment) = (told_ranges, alignment);
    }
    let error = told(device.map(low));
    assert!(error.contains("not a power of two"), "{error}");
}

#[test]
fn dirty_bits_are_reported_of_whole_mappings_and_in_pieces() {
    let bench = Bench::logging();
    let device = bench.first();
    let log = device.shared_log().unwrap();
    for region in memory().iter() {
        device.map(region).unwrap();
    }
    assert_eq!(log.page_size().unwrap(), PageSize::SIZE_4K);
    log.start().unwrap();
    let range = |first, len| IovaRange::new(Iova(first), len).unwrap();
    let over = |range| IovaBitmap::over(range, PageSize::SIZE_4K).unwrap();
    let mut bitmap = over(range(HIGH, 0x10_0000));
    for page in [HIGH, HIGH + 0xf_f000] {
        bench.kernel.0.lock().dirty = vec![page, 0x3000];
        log.report(&mut bitmap).unwrap();
        assert!(bitmap.contains(Iova(page)));
    }
    assert_eq!(bitmap.count(), 2, "and what was known stays");
    assert_eq!(bench.kernel.0.lock().dirty, [0x3000], "not asked for");
    // A hole is not looked over, as the kernel would.
    for hole in [range(0x8_0000, 0x10_0000), range(0, HIGH + 0x10_0000)] {
        let error = log.report(&mut over(hole)).unwrap_err();
        let error = ErrorChain(&error).to_string();
        assert!(error.contains("not mapped"), "{error}");
    }
    bench.kernel.0.lock().report_error = Some(Errno::IO);
    assert!(log.report(&mut bitmap).is_err());
    log.stop().unwrap();
    assert_eq!(bench.attached(), [Object::Hwpt(false)]);
    bench.kernel.0.lock().iommufd.alignment = 0x1_0000;
    assert_eq!(log.page_size().unwrap().bytes(), 0x1_0000);
}
