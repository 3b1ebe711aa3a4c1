//! Answers of a kernel, or of its drivers, that says anything: every call on a device ends, what it
//! says of regions holds together, and no buffer is given to it that is shorter than it was told.

#![no_main]

use std::ffi::CStr;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use devices::ThreadSpawner;
use libfuzzer_sys::fuzz_target;
use passthrough::kernel::describe::{decode_device, decode_iommu};
use passthrough::kernel::{
    FileRegistry, HostVfio, Interface, IovaRules, Kernel, LogSpan, Message, Number, PinnedRam,
    Reach,
};
use passthrough::{Backend, IrqKind, KernelVfioBackend};
use vfio_user::region::decode_layout;
use vfio_user::wire::AreaMsg;
use vfio_user::{DeviceState, Errno};
use vm_memory::GuestMemoryBackend;
use vm_migration::memory::{Backing, RamMapping, map_ram};
use vm_migration::{Gpa, Iova, IovaBitmap, IovaRange, PageSize};

/// Bytes of guest memory in each of two regions.
const RAM: u64 = 0x10_0000;

/// What the kernel says, byte for byte; at its end it refuses.
struct Script(Mutex<Vec<u8>>);

impl Script {
    fn take(&self, len: usize) -> Option<Vec<u8>> {
        let mut left = self.0.lock().expect("no panic");
        let at = left.len().checked_sub(len)?;
        Some(left.split_off(at))
    }

    fn byte(&self) -> u8 {
        self.take(1).map_or(0xff, |bytes| bytes[0])
    }

    fn word(&self) -> u64 {
        let bytes = self.take(8).unwrap_or_else(|| vec![0xff; 8]);
        u64::from_le_bytes(bytes.try_into().expect("eight bytes"))
    }

    /// What a call returns.
    fn result(&self) -> Result<i32, Errno> {
        match self.byte() {
            0..160 => Ok(0),
            200 => Ok(1),
            201 => Err(Errno::NOTTY),
            202 => Err(Errno::AGAIN),
            203 => Err(Errno::NOMSG),
            204 => Err(Errno::INTR),
            205 => Err(Errno::NODEV),
            _ => Err(Errno::IO),
        }
    }

    fn fd(&self) -> OwnedFd {
        std::fs::File::open("/dev/null").expect("/dev/null").into()
    }
}

impl Kernel for Script {
    fn open(&self, _path: &Path) -> Result<OwnedFd, Errno> {
        Ok(self.fd())
    }

    fn number(&self, _fd: BorrowedFd<'_>, request: Number, _value: u32) -> Result<i32, Errno> {
        match request {
            Number::ApiVersion => Ok(0),
            Number::CheckExtension => Ok(1),
            Number::SetIommu | Number::DeviceReset => self.result(),
        }
    }

    fn message(
        &self,
        _fd: BorrowedFd<'_>,
        request: Message,
        message: &mut [u8],
    ) -> Result<i32, Errno> {
        if matches!(request, Message::GroupStatus) {
            message[4] = 1;
            return Ok(0);
        }
        let result = self.result()?;
        // Some answers keep what was there, so that indexes are right.
        let kept = (usize::from(self.byte()) % 64).min(message.len());
        let len = message.len() - kept;
        if let Some(bytes) = self.take(len.min(128)) {
            message[kept..kept + bytes.len()].copy_from_slice(&bytes);
        }
        Ok(result)
    }

    fn set_container(&self, _group: BorrowedFd<'_>, _to: BorrowedFd<'_>) -> Result<(), Errno> {
        Ok(())
    }

    fn group_device(&self, _group: BorrowedFd<'_>, _name: &CStr) -> Result<OwnedFd, Errno> {
        Ok(self.fd())
    }

    fn map(&self, _container: BorrowedFd<'_>, _ram: &PinnedRam) -> Result<(), Errno> {
        self.result().map(drop)
    }

    fn ioas_map(&self, _fd: BorrowedFd<'_>, _ioas: u32, _ram: &PinnedRam) -> Result<(), Errno> {
        self.result().map(drop)
    }

    fn ioas_ranges(
        &self,
        _fd: BorrowedFd<'_>,
        _ioas: u32,
        ranges: &mut [[u64; 2]],
    ) -> Result<IovaRules, Errno> {
        self.result()?;
        let told = usize::from(self.byte());
        for range in ranges.iter_mut().take(told) {
            *range = [self.word(), self.word()];
        }
        let ranges = match told {
            0xff => u32::MAX,
            _ => u32::try_from(told).expect("a byte"),
        };
        let alignment = match self.byte() {
            shift @ 0..64 => 1 << shift,
            _ => self.word(),
        };
        Ok(IovaRules { ranges, alignment })
    }

    fn hwpt_report(
        &self,
        iommufd: BorrowedFd<'_>,
        _hwpt: u32,
        span: LogSpan,
        words: &mut [u64],
    ) -> Result<(), Errno> {
        self.log_report(iommufd, span, words)
    }

    fn set_migration_state(
        &self,
        _device: BorrowedFd<'_>,
        _state: u32,
    ) -> Result<Option<OwnedFd>, Errno> {
        self.result().map(|which| (which == 0).then(|| self.fd()))
    }

    fn log_start(
        &self,
        _device: BorrowedFd<'_>,
        _page_size: u64,
        _ranges: &[AreaMsg],
    ) -> Result<u64, Errno> {
        self.result()?;
        Ok(match self.byte() {
            shift @ 0..64 => 1 << shift,
            _ => self.word(),
        })
    }

    fn log_report(
        &self,
        _device: BorrowedFd<'_>,
        span: LogSpan,
        words: &mut [u64],
    ) -> Result<(), Errno> {
        assert!(span.page_size.is_power_of_two());
        let pages = span.length.div_ceil(span.page_size);
        let room = u64::try_from(words.len()).expect("64 bits") * 64;
        assert!(pages <= room, "{pages} pages in {room} bits");
        words.fill(u64::MAX);
        self.result().map(drop)
    }

    fn container_report(
        &self,
        container: BorrowedFd<'_>,
        span: LogSpan,
        words: &mut [u64],
    ) -> Result<(), Errno> {
        self.log_report(container, span, words)
    }

    fn read_at(&self, _fd: BorrowedFd<'_>, _at: u64, data: &mut [u8]) -> Result<usize, Errno> {
        self.result()?;
        Ok(data.len() - usize::from(self.byte()).min(data.len()))
    }

    fn write_at(&self, _fd: BorrowedFd<'_>, _at: u64, data: &[u8]) -> Result<usize, Errno> {
        self.result().map(|_| data.len())
    }

    fn set_nonblocking(&self, _fd: BorrowedFd<'_>) -> Result<(), Errno> {
        Ok(())
    }

    fn read(&self, _fd: BorrowedFd<'_>, _data: &mut [u8]) -> Result<usize, Errno> {
        self.result().map(|_| usize::from(self.byte()))
    }

    fn write(&self, _fd: BorrowedFd<'_>, _data: &[u8]) -> Result<usize, Errno> {
        self.result().map(|_| usize::from(self.byte()))
    }

    fn wait(&self, _fd: BorrowedFd<'_>, _out: bool, _limit: Duration) -> Result<bool, Errno> {
        self.result().map(|_| true)
    }
}

/// A folder like that of a device in sysfs.
fn device() -> &'static Path {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    PATH.get_or_init(|| {
        let name = format!("ferry-fuzz-{}/0000:01:00.0", std::process::id());
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir_all(path.join("vfio-dev/vfio0")).expect("a temporary folder");
        // One that is there is of this target, too.
        let _ = std::os::unix::fs::symlink("../../groups/7", path.join("iommu_group"));
        path
    })
}

/// Nobody wants to know of files.
struct NoRegistry;

impl FileRegistry for NoRegistry {
    fn add(&self, _file: BorrowedFd<'_>) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        Ok(())
    }

    fn remove(&self, _file: BorrowedFd<'_>) {}
}

/// What of a list of ranges may be believed.
fn check_reach(bytes: &[u8]) {
    let words = bytes.chunks_exact(8);
    let word = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().expect("eight bytes"));
    let words: Vec<u64> = words.map(word).collect();
    let ranges = words
        .chunks_exact(2)
        .map(|pair| [pair[0], pair[1]])
        .collect();
    let told = bytes.first().copied().unwrap_or(0).into();
    if let Ok(reach) = Reach::decode(told, ranges, words.last().copied().unwrap_or(0)) {
        assert!(reach.page >= PageSize::SIZE_4K);
        assert_eq!(reach.ranges.len(), usize::try_from(told).expect("a byte"));
        for [first, last] in &reach.ranges {
            assert!(reach.holds(*first, *last));
        }
    }
}

/// What of an answer may be believed.
fn check_description(bytes: &[u8]) {
    let _ = decode_device(bytes);
    if let Ok(info) = decode_iommu(bytes) {
        assert!(info.ranges.iter().all(|(first, last)| first <= last));
    }
    let index = bytes.first().map_or(0, |index| u32::from(*index));
    if let Ok(layout) = decode_layout(index, bytes) {
        for area in layout.areas.unwrap_or_default() {
            let end = area.offset.checked_add(area.size).expect("no overflow");
            assert!(end <= layout.size && layout.offset.checked_add(end).is_some());
        }
    }
}

fn use_device(device: &KernelVfioBackend, script: &Script) {
    for index in 0..9 {
        let region = device.region(index).expect("a region");
        let mut data = [0; 8];
        assert!(device.region_read(index, region.size, &mut data).is_err());
        let _ = device.region_read(index, script.word() % 0x1000, &mut data);
        let _ = device.region_write(index, script.word(), &data);
    }
    let _ = device.enable_irqs(IrqKind::Msix, &[]);
    let ram = |gpa| RamMapping {
        gpa: Gpa(gpa),
        len: RAM,
        backing: Backing::Anonymous,
    };
    let memory = map_ram(vec![ram(0), ram(1 << 32)]).expect("memory");
    for region in memory.iter() {
        let _ = device.map(region);
    }
    let _ = (device.migration(), device.state(), device.can_log());
    if let Some(log) = device.shared_log() {
        for first in [0, 1 << 32] {
            let range = IovaRange::new(Iova(first), RAM).expect("a range");
            let Ok(page) = log.start().and_then(|()| log.page_size()) else {
                continue;
            };
            let _ = IovaBitmap::over(range, page).map(|mut bitmap| log.report(&mut bitmap));
            let _ = log.stop();
        }
    }
    while let Some(step) = script.take(1) {
        let state = u32::from(step[0] & 7);
        let _ = match step[0] >> 3 {
            0..8 => device.set_state(DeviceState::from_number(state).expect("a state")),
            8..16 => device.read_data(&mut [0; 64]).map(|len| assert!(len <= 64)),
            16..20 => device.write_data(&[0; 64]),
            20..22 => device.precopy_info().map(drop),
            22..24 => device.stop_copy_size().map(drop),
            24..30 => {
                let range = IovaRange::new(Iova(0), RAM).expect("a range");
                device
                    .start_log(PageSize::SIZE_4K, &[range])
                    .and_then(|page| {
                        let mut bitmap = IovaBitmap::over(range, page).expect("a bitmap");
                        device.report_log(&mut bitmap)
                    })
            }
            30 => device.stop_log(),
            _ => device.reset(),
        };
    }
}

fuzz_target!(|bytes: &[u8]| {
    check_description(bytes);
    check_reach(bytes);
    let script = Arc::new(Script(Mutex::new(bytes.to_vec())));
    let interface = match script.byte() & 1 {
        0 => Interface::Group,
        _ => Interface::Iommufd,
    };
    let kernel = Arc::clone(&script) as Arc<dyn Kernel>;
    let host = HostVfio::new(kernel, interface, Arc::default(), Arc::new(NoRegistry));
    if let Ok(mut device) = host.open(device()) {
        if script.byte() == 0 {
            let _ = device.watch("x", &ThreadSpawner::unconfined(), Box::new(|_| ()));
        }
        use_device(&device, &script);
    }
});
