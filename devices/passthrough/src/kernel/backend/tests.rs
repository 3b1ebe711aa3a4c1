//! A device behind a kernel that answers as it should, and as it should not.

use std::os::fd::AsFd;

use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;
use vm_migration::{ErrorChain, Iova};

use super::*;
use crate::kernel::HostVfio;
use crate::kernel::fake::{
    FakeKernel, FakeRegistry, REGION_SHIFT, region as region_answer, sparse,
};

/// A folder like one of sysfs: a device in group 7.
struct Sysfs(tempfile::TempDir);

impl Sysfs {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        for (device, group) in [("0000:01:00.0", "7"), ("0000:02:00.0", "8"), ("odd", "9")] {
            std::fs::create_dir(dir.path().join(device)).unwrap();
            let link = dir.path().join(device).join("iommu_group");
            std::os::unix::fs::symlink(format!("../../groups/{group}"), link).unwrap();
        }
        Self(dir)
    }

    fn device(&self, name: &str) -> std::path::PathBuf {
        self.0.path().join(name)
    }
}

fn host(kernel: &Arc<FakeKernel>) -> HostVfio {
    let registry = Arc::new(FakeRegistry::default());
    HostVfio::new(
        Arc::clone(kernel) as _,
        Interface::Group,
        Arc::default(),
        registry,
    )
}

fn open(kernel: &Arc<FakeKernel>) -> Result<KernelVfioBackend, KernelError> {
    let sysfs = Sysfs::new();
    host(kernel).open(&sysfs.device("0000:01:00.0"))
}

fn told<T>(result: Result<T, KernelError>) -> String {
    ErrorChain(&result.err().unwrap()).to_string()
}

#[test]
fn a_device_is_opened_by_its_group_and_described() {
    let kernel = FakeKernel::new();
    let device = open(&kernel).unwrap();
    {
        let seen = kernel.0.lock();
        let opened: Vec<_> = seen.opened.iter().map(|path| path.to_str()).collect();
        assert_eq!(opened, [Some("/dev/vfio/7"), Some("/dev/vfio/vfio")]);
        assert_eq!(seen.joined.len(), 1);
    }
    let info = Backend::info(&device).unwrap();
    assert_eq!((info.num_regions, info.num_irqs), (9, 5));
    let bar = device.region(0).unwrap();
    assert_eq!(bar.size, 0x4000);
    let mapping = bar.mapping.unwrap();
    let areas: Vec<_> = mapping.areas.iter().map(|a| (a.offset, a.size)).collect();
    assert_eq!(areas, [(0, 0x1000), (0x2000, 0x2000)]);
    assert_eq!(device.region(7).unwrap().size, 256);
    assert_eq!(device.region(8).unwrap().size, 0, "VGA is not asked for");
    assert_eq!(device.region(u32::MAX).unwrap().size, 0);
}

#[test]
fn what_keeps_a_device_from_being_opened_is_named_with_the_remedy() {
    type Change = fn(&mut crate::kernel::fake::Seen);
    let cases: [(Change, &str); 8] = [
        (
            |seen| seen.open_error = Some(Errno::NOENT),
            "bind the device to vfio-pci",
        ),
        (
            |seen| seen.open_error = Some(Errno::BUSY),
            "another process",
        ),
        (
            |seen| seen.viable = false,
            "bind every device in /sys/kernel/iommu_groups/7",
        ),
        (|seen| seen.version = 1, "version 1"),
        (
            |seen| seen.errors.extend([(Number::SetIommu as u32, Errno::PERM)]),
            "set the device's IOMMU up",
        ),
        (|seen| seen.growth = 4, "grows each time"),
        (|seen| seen.growth = 1 << 20, "too long"),
        (
            |seen| {
                let info = [0_u32, 1, 9, 5].map(u32::to_le_bytes).concat();
                seen.answers.insert((Message::DeviceInfo as u32, 0), info);
            },
            "not a PCI device",
        ),
    ];
    for (change, text) in cases {
        let kernel = FakeKernel::new();
        change(&mut kernel.0.lock());
        let error = told(open(&kernel));
        assert!(error.contains(text), "{text}: {error}");
    }
    let host = host(&FakeKernel::new());
    let sysfs = Sysfs::new();
    let open = |name| told(host.open(&sysfs.device(name)));
    assert!(open("absent").contains("no IOMMU group"));
    assert!(open("odd").contains("bound to vfio-pci"));
}

#[test]
fn malformed_regions_are_refused_and_none_is_read_past_its_end() {
    let areas = [(0, 0x1000)];
    let cut = {
        let mut cap = sparse(0, &areas);
        cap.truncate(20);
        cap
    };
    let cases: [(Vec<u8>, &str); 6] = [
        (
            region_answer(0, 0xf, 0x4000, &sparse(32, &areas)[..8]),
            "cut off",
        ),
        (region_answer(0, 0xf, 0x4000, &cut), "cut off"),
        (
            region_answer(0, 0xf, 0x4000, &{
                let mut other = sparse(8, &areas);
                other[0] = 9;
                other
            }),
            "backwards",
        ),
        (
            region_answer(0, 0xf, 0x4000, &sparse(0, &[(0x3000, 0x2000)])),
            "outside",
        ),
        (
            region_answer(0, 0xf, 0x4000, &sparse(0, &[(u64::MAX, 2)])),
            "outside",
        ),
        (region_answer(1, 0xf, 0x4000, &[]), "another region"),
    ];
    for (answer, text) in cases {
        let kernel = FakeKernel::new();
        let request = Message::RegionInfo as u32;
        kernel.0.lock().answers.insert((request, 0), answer);
        let error = told(open(&kernel));
        assert!(error.contains(text), "{text}: {error}");
    }
    let device = open(&FakeKernel::new()).unwrap();
    for (region, at, len) in [(0, 0x3ffd, 4), (0, u64::MAX, 4), (1, 0, 1), (9, 0, 1)] {
        let mut data = vec![0; len];
        assert!(device.region_read(region, at, &mut data).is_err());
        assert!(device.region_write(region, at, &data).is_err());
    }
}

#[test]
fn regions_are_parts_of_the_devices_file() {
    let kernel = FakeKernel::new();
    let device = open(&kernel).unwrap();
    device.region_write(7, 4, &[1, 2]).unwrap();
    let at = (7 << REGION_SHIFT) + 4;
    assert_eq!(kernel.0.lock().bytes, [(at, 1), (at + 1, 2)].into());
    let mut data = [0; 4];
    device.region_read(7, 4, &mut data).unwrap();
    assert_eq!(data, [1, 2, 0, 0]);
    kernel.0.lock().short = true;
    assert!(device.region_read(7, 4, &mut data).is_err());
    assert!(device.region_write(7, 4, &data).is_err());
}

#[test]
fn interrupts_are_switched_on_with_descriptors_and_off_without() {
    let kernel = FakeKernel::new();
    let device = open(&kernel).unwrap();
    let event = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
    device
        .enable_irqs(IrqKind::Msix, &[event.as_fd(), event.as_fd()])
        .unwrap();
    let words = |kernel: &FakeKernel| -> Vec<u32> {
        let bytes = kernel.0.lock().irqs.clone();
        let words = bytes.chunks_exact(4);
        words
            .map(|w| u32::from_le_bytes(w.try_into().unwrap()))
            .collect()
    };
    let number = u32::try_from(event.as_raw_fd()).unwrap();
    // DATA_EVENTFD and ACTION_TRIGGER of MSI-X, two from the first on.
    assert_eq!(words(&kernel)[1..], [0x24, 2, 0, 2, number, number]);
    device.disable_irqs(IrqKind::Msix).unwrap();
    // DATA_NONE and ACTION_TRIGGER, none.
    assert_eq!(words(&kernel)[1..], [0x21, 2, 0, 0]);
    kernel.0.lock().irq_result = 1;
    let few = device.enable_irqs(IrqKind::Msix, &[event.as_fd(); 2]);
    let error = ErrorChain(&few.unwrap_err()).to_string();
    assert!(error.contains("has 1 interrupt vectors"), "{error}");
}

#[test]
fn news_of_a_device_is_told_until_it_is_closed() {
    use crate::kernel::DeviceNews;
    let kernel = FakeKernel::new();
    let irq = |index: u32, count: u32| [0, 1, index, count].map(u32::to_le_bytes).concat();
    {
        let answers = &mut kernel.0.lock().answers;
        answers.insert((Message::IrqInfo as u32, ERROR_IRQ), irq(ERROR_IRQ, 0));
        answers.insert((Message::IrqInfo as u32, REQUEST_IRQ), irq(REQUEST_IRQ, 1));
    }
    let mut device = open(&kernel).unwrap();
    let (sender, inbox) = std::sync::mpsc::channel();
    let handler = Box::new(move |news| sender.send(news).unwrap());
    device
        .watch("nic0", &ThreadSpawner::unconfined(), handler)
        .unwrap();
    let irqs = kernel.0.lock().irqs.clone();
    // The last four bytes are the descriptor: only of the request, as errors are not told of.
    let (head, fd) = irqs.split_at(20);
    assert_eq!(head[8..12], REQUEST_IRQ.to_le_bytes());
    let fd = i32::from_le_bytes(fd.try_into().unwrap());
    let event = crate::fd::duplicate_for_test(fd);
    for _ in 0..2 {
        event.write(1).unwrap();
        assert_eq!(inbox.recv().unwrap(), DeviceNews::Wanted);
    }
    drop(device);
    assert!(inbox.recv().is_err(), "the thread has ended");
}

#[test]
fn a_device_that_is_gone_is_told_from_one_that_refuses() {
    let kernel = FakeKernel::new();
    let device = open(&kernel).unwrap();
    let reset = Number::DeviceReset as u32;
    kernel.0.lock().errors.insert(reset, Errno::NODEV);
    assert!(device.reset().unwrap_err().is_gone());
    kernel.0.lock().errors.insert(reset, Errno::INVAL);
    assert!(!device.reset().unwrap_err().is_gone());
}

#[test]
fn what_is_not_there_is_none_and_not_an_error() {
    let device = open(&FakeKernel::new()).unwrap();
    assert_eq!(device.migration().unwrap(), None);
    assert_eq!(device.stop_copy_size().unwrap(), None);
    assert_eq!(device.precopy_info().unwrap(), None);
    assert!(!device.can_log().unwrap());
    assert!(device.state().is_err());
    let kernel = FakeKernel::migratable(0);
    assert!(open(&kernel).unwrap().migration().is_err(), "no STOP_COPY");
    kernel.0.lock().state = 99;
    assert!(open(&kernel).unwrap().state().is_err(), "no such state");
}

#[test]
fn migration_goes_through_its_states_and_data() {
    let kernel = FakeKernel::migratable(7);
    let device = open(&kernel).unwrap();
    assert_eq!(device.migration().unwrap(), Some(MigrationFlags::all()));
    assert_eq!(device.stop_copy_size().unwrap(), Some(777));
    assert!(device.read_data(&mut [0; 8]).is_err(), "no session yet");
    device.set_state(DeviceState::PreCopy).unwrap();
    assert_eq!(device.state().unwrap(), DeviceState::PreCopy);
    assert_eq!(
        device
            .precopy_info()
            .unwrap()
            .map(|info| info.initial_bytes + info.dirty_bytes),
        Some(123)
    );
    kernel.0.lock().reads = [
        Ok(vec![1, 2]),
        Err(Errno::NOMSG),
        Err(Errno::AGAIN),
        Err(Errno::AGAIN),
        Ok(vec![3]),
        Ok(Vec::new()),
        Err(Errno::NOMSG),
    ]
    .into();
    let mut data = [0; 8];
    let mut read = || device.read_data(&mut data);
    assert_eq!(read().unwrap(), 2);
    assert_eq!(read().unwrap(), 0, "no more for now");
    assert_eq!(read().unwrap(), 0, "nothing yet");
    device.set_state(DeviceState::StopCopy).unwrap();
    assert_eq!(device.precopy_info().unwrap(), None);
    assert_eq!(read().unwrap(), 1, "waited for");
    assert_eq!(read().unwrap(), 0, "the end");
    assert!(read().is_err(), "stopped, and yet more may come");
    device.set_state(DeviceState::Stop).unwrap();
    assert!(read().is_err(), "the session is over");
}

#[test]
fn state_is_loaded_in_as_many_pieces_as_the_device_takes() {
    let kernel = FakeKernel::migratable(1);
    let device = open(&kernel).unwrap();
    device.set_state(DeviceState::Resuming).unwrap();
    kernel.0.lock().writes = [Ok(1), Err(Errno::AGAIN), Ok(2)].into();
    device.write_data(&[1, 2, 3, 4, 5]).unwrap();
    assert_eq!(kernel.0.lock().written, [1, 2, 3, 4, 5]);
    for odd in [Ok(0), Ok(9), Err(Errno::IO)] {
        kernel.0.lock().writes = [odd].into();
        assert!(device.write_data(&[1, 2]).is_err());
    }
    kernel.0.lock().with_data = false;
    device.reset().unwrap();
    assert!(device.set_state(DeviceState::Resuming).is_err(), "no file");
    kernel.0.lock().state_error = Some(Errno::IO);
    assert!(device.set_state(DeviceState::Stop).is_err());
}

#[test]
fn a_log_that_only_seems_to_be_there_is_found_out() {
    let kernel = FakeKernel::migratable(1);
    let device = open(&kernel).unwrap();
    assert!(device.can_log().unwrap());
    assert!(kernel.0.lock().log.is_none(), "and is not left on");
    kernel.0.lock().log_page = 0x3000;
    assert!(!device.can_log().unwrap(), "no such pages");
    assert!(kernel.0.lock().log.is_none(), "and is not left on");
    kernel.0.lock().log_page = 0x1000;
    kernel.0.lock().report_error = Some(Errno::OPNOTSUPP);
    assert!(!device.can_log().unwrap());
    assert!(kernel.0.lock().log.is_none(), "and is not left on");
    kernel.0.lock().log_error = Some(Errno::OPNOTSUPP);
    assert!(!device.can_log().unwrap());
}

#[test]
fn reports_come_in_pieces_and_hold_every_page() {
    const LEN: u64 = (64 << 30) + 0x3000;
    let kernel = FakeKernel::migratable(1);
    let device = open(&kernel).unwrap();
    let base = 1 << 40;
    let range = IovaRange::new(Iova(base), LEN).unwrap();
    let page = device.start_log(PageSize::SIZE_4K, &[range]).unwrap();
    assert_eq!(kernel.0.lock().log, Some((0x1000, vec![(base, LEN)])));
    let dirty = [
        base,
        base + (64 << 30) - 0x1000,
        base + (64 << 30),
        base + LEN - 1,
    ];
    kernel.0.lock().dirty = dirty.into();
    let mut bitmap = IovaBitmap::over(range, page).unwrap();
    device.report_log(&mut bitmap).unwrap();
    assert_eq!(bitmap.count(), 4);
    assert!(dirty.iter().all(|at| bitmap.contains(Iova(*at))));
    let spans: Vec<_> = kernel
        .0
        .lock()
        .reports
        .iter()
        .map(|s| (s.iova, s.length))
        .collect();
    assert_eq!(spans, [(base, 64 << 30), (base + (64 << 30), 0x3000)]);
    device.stop_log().unwrap();
    device.stop_log().unwrap();
    for odd in [0, 0x3000] {
        kernel.0.lock().log_page = odd;
        let error = device.start_log(PageSize::SIZE_4K, &[range]).unwrap_err();
        assert!(ErrorChain(&error).to_string().contains("power of two"));
        device.stop_log().unwrap();
    }
}
