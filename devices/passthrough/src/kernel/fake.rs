//! A kernel within the test: one PCI device in a group, or with a file of its own, with answers that a
//! test can change.

mod answers;
pub(crate) mod iommufd;

use std::collections::{BTreeMap, VecDeque};
use std::ffi::CStr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;
use vfio_user::wire::{AreaMsg, FEATURE_MASK, FEATURE_PROBE, FeatureMsg, MigStateMsg};
use vfio_user::{DeviceState, Feature};
use vm_migration::RamRegion;
use zerocopy::{FromBytes, IntoBytes};

pub(crate) use self::answers::{iommu, region, sparse};
use self::iommufd::{Model, Object};
use super::memory::PinnedRam;
use super::registry::FileRegistry;
use super::sys::{IovaRules, Kernel, LogSpan};
use super::uapi::{Message, NO_FD, Number};

/// Size of regions in the device's file, as vfio-pci has it.
pub(crate) const REGION_SHIFT: u32 = 40;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Role {
    Container,
    Iommufd,
    Group,
    Device,
    Data,
}

/// What happened and what is to go wrong.
pub(crate) struct Seen {
    roles: BTreeMap<RawFd, Role>,
    pub(crate) opened: Vec<PathBuf>,
    pub(crate) open_error: Option<Errno>,
    pub(crate) open_errors: BTreeMap<PathBuf, Errno>,
    /// Group and container of each SET_CONTAINER.
    pub(crate) joined: Vec<(RawFd, RawFd)>,
    /// So many next SET_CONTAINER are refused.
    pub(crate) refuse_join: u32,
    pub(crate) version: i32,
    pub(crate) viable: bool,
    /// Whole answers, by request and index (0 where there is none).
    pub(crate) answers: BTreeMap<(u32, u32), Vec<u8>>,
    /// Every answer grows by this much each time.
    pub(crate) growth: u32,
    /// Errors, by request.
    pub(crate) errors: BTreeMap<u32, Errno>,
    pub(crate) map_error: Option<Errno>,
    pub(crate) mapped: Vec<RamRegion>,
    /// How much UNMAP says it unmapped, if not all.
    pub(crate) unmapped: Option<u64>,
    /// The last SET_IRQS, and what it returns.
    pub(crate) irqs: Vec<u8>,
    pub(crate) irq_result: i32,
    pub(crate) resets: u32,
    pub(crate) bytes: BTreeMap<u64, u8>,
    pub(crate) short: bool,
    /// Features and their data; others are ENOTTY.
    pub(crate) features: BTreeMap<u32, Vec<u8>>,
    pub(crate) state: u32,
    pub(crate) state_error: Option<Errno>,
    /// States that give a data descriptor.
    pub(crate) with_data: bool,
    pub(crate) reads: VecDeque<Result<Vec<u8>, Errno>>,
    pub(crate) writes: VecDeque<Result<usize, Errno>>,
    pub(crate) written: Vec<u8>,
    /// Whether a wait ends well.
    pub(crate) ready: bool,
    pub(crate) log: Option<(u64, Vec<(u64, u64)>)>,
    pub(crate) log_page: u64,
    pub(crate) log_error: Option<Errno>,
    pub(crate) report_error: Option<Errno>,
    pub(crate) reports: Vec<LogSpan>,
    pub(crate) stops: u32,
    pub(crate) container_log: bool,
    pub(crate) dirty: Vec<u64>,
    pub(crate) iommufd: Model,
}

impl Seen {
    /// `copy` is a duplicate of `of`.
    pub(crate) fn know(&mut self, copy: &OwnedFd, of: &OwnedFd) {
        let role = self.role(of.as_fd());
        self.roles.insert(copy.as_raw_fd(), role);
    }

    /// Sets the bits of those dirty pages that are in `span`, and forgets them.
    fn take_dirty(&mut self, span: LogSpan, words: &mut [u64]) {
        assert!(span.words().unwrap() <= words.len());
        self.reports.push(span);
        self.dirty.retain(|at| {
            let Some(inside) = at.checked_sub(span.iova).filter(|n| *n < span.length) else {
                return true;
            };
            let bit = inside / span.page_size;
            words[usize::try_from(bit / 64).unwrap()] |= 1 << (bit % 64);
            false
        });
    }
}

/// Files that a hypervisor was told of: added, or removed.
#[derive(Default)]
pub(crate) struct FakeRegistry {
    pub(crate) told: Mutex<Vec<(bool, RawFd)>>,
    pub(crate) refuses: bool,
}

impl FileRegistry for FakeRegistry {
    fn add(&self, file: BorrowedFd<'_>) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        if self.refuses {
            return Err("no room for files".into());
        }
        self.told.lock().push((true, file.as_raw_fd()));
        Ok(())
    }

    fn remove(&self, file: BorrowedFd<'_>) {
        self.told.lock().push((false, file.as_raw_fd()));
    }
}

pub(crate) struct FakeKernel(pub(crate) Mutex<Seen>);

fn token() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC).unwrap()
}

impl FakeKernel {
    pub(crate) fn new() -> Arc<Self> {
        let mut answers = BTreeMap::new();
        let info = [0_u32, 3, 9, 5, 0, 0].map(u32::to_le_bytes).concat();
        answers.insert((Message::DeviceInfo as u32, 0), info);
        for index in 0..9 {
            let answer = match index {
                // READ, WRITE, MMAP, CAPS.
                0 => region(0, 0xf, 0x4000, &sparse(0, &[(0, 0x1000), (0x2000, 0x2000)])),
                7 => region(7, 3, 256, &[]),
                index => region(index, 0, 0, &[]),
            };
            answers.insert((Message::RegionInfo as u32, index), answer);
        }
        let ranges = [(0, 0xfedf_ffff), (0xfef0_0000, u64::MAX)];
        answers.insert((Message::IommuInfo as u32, 0), iommu(&ranges));
        Arc::new(Self(Mutex::new(Seen {
            roles: BTreeMap::new(),
            opened: Vec::new(),
            open_error: None,
            open_errors: BTreeMap::new(),
            joined: Vec::new(),
            refuse_join: 0,
            version: 0,
            viable: true,
            answers,
            growth: 0,
            errors: BTreeMap::new(),
            map_error: None,
            mapped: Vec::new(),
            unmapped: None,
            irqs: Vec::new(),
            irq_result: 0,
            resets: 0,
            bytes: BTreeMap::new(),
            short: false,
            features: BTreeMap::new(),
            state: DeviceState::Running.number(),
            state_error: None,
            with_data: true,
            reads: VecDeque::new(),
            writes: VecDeque::new(),
            written: Vec::new(),
            ready: true,
            log: None,
            log_page: 0x1000,
            log_error: None,
            report_error: None,
            reports: Vec::new(),
            stops: 0,
            container_log: false,
            dirty: Vec::new(),
            iommufd: Model {
                ranges: ranges.iter().map(|(first, last)| [*first, *last]).collect(),
                alignment: 0x1000,
                ..Model::default()
            },
        })))
    }

    /// A device with migration of these flags and a dirty log.
    pub(crate) fn migratable(flags: u64) -> Arc<Self> {
        let kernel = Self::new();
        {
            let features = &mut kernel.0.lock().features;
            features.insert(Feature::Migration.number(), flags.to_le_bytes().to_vec());
            features.insert(Feature::MigDeviceState.number(), vec![0; 8]);
            features.insert(
                Feature::MigDataSize.number(),
                777_u64.to_le_bytes().to_vec(),
            );
            for feature in [
                Feature::DmaLoggingStart,
                Feature::DmaLoggingStop,
                Feature::DmaLoggingReport,
            ] {
                features.insert(feature.number(), Vec::new());
            }
        }
        kernel
    }
}

impl Seen {
    fn role(&self, fd: BorrowedFd<'_>) -> Role {
        self.roles[&fd.as_raw_fd()]
    }

    fn make(&mut self, role: Role) -> OwnedFd {
        let fd = token();
        self.roles.insert(fd.as_raw_fd(), role);
        fd
    }

    fn describe(&mut self, request: Message, message: &mut [u8]) -> Result<i32, Errno> {
        let index = match request {
            Message::RegionInfo | Message::IrqInfo => {
                u32::from_le_bytes(message[8..12].try_into().unwrap())
            }
            _ => 0,
        };
        let answer = &self.answers[&(request as u32, index)];
        let len = u32::try_from(answer.len()).unwrap();
        let argsz = match self.growth {
            0 => len,
            growth => u32::try_from(message.len()).unwrap() + growth,
        };
        let room = message.len().min(answer.len());
        message[..room].copy_from_slice(&answer[..room]);
        message[..4].copy_from_slice(&argsz.to_le_bytes());
        Ok(0)
    }

    fn iommufd(&mut self, fd: RawFd, request: Message, message: &mut [u8]) -> Result<i32, Errno> {
        self.iommufd.request(fd, request, message, &mut self.mapped)
    }

    fn feature(&mut self, message: &mut [u8]) -> Result<i32, Errno> {
        let (head, data) = message.split_at_mut(size_of::<FeatureMsg>());
        let head = FeatureMsg::read_from_bytes(head).unwrap();
        let number = head.flags & FEATURE_MASK;
        let Some(value) = self.features.get(&number) else {
            return Err(Errno::NOTTY);
        };
        if head.flags & FEATURE_PROBE != 0 {
            return Ok(0);
        }
        if number == Feature::DmaLoggingStop.number() {
            self.stops += 1;
            return self.log.take().map(|_| 0).ok_or(Errno::INVAL);
        }
        if number == Feature::MigDeviceState.number() {
            let state = MigStateMsg {
                device_state: self.state,
                data_fd: NO_FD,
            };
            data.copy_from_slice(state.as_bytes());
            return Ok(0);
        }
        data.copy_from_slice(value);
        Ok(0)
    }
}

impl Kernel for FakeKernel {
    fn open(&self, path: &Path) -> Result<OwnedFd, Errno> {
        let mut seen = self.0.lock();
        seen.opened.push(path.to_owned());
        let refused = seen.open_errors.get(path).copied().or(seen.open_error);
        if let Some(error) = refused {
            return Err(error);
        }
        let role = match path.to_str() {
            Some("/dev/vfio/vfio") => Role::Container,
            Some("/dev/iommu") => Role::Iommufd,
            Some(path) if path.starts_with("/dev/vfio/devices/") => Role::Device,
            _ => Role::Group,
        };
        Ok(seen.make(role))
    }

    fn number(&self, fd: BorrowedFd<'_>, request: Number, value: u32) -> Result<i32, Errno> {
        let mut seen = self.0.lock();
        let role = seen.role(fd);
        if let Some(error) = seen.errors.get(&(request as u32)) {
            return Err(*error);
        }
        match request {
            Number::ApiVersion => Ok(seen.version),
            Number::CheckExtension => Ok(i32::from(value == 3)),
            Number::SetIommu => {
                assert_eq!((role, value), (Role::Container, 3));
                Ok(0)
            }
            Number::DeviceReset => {
                assert_eq!(role, Role::Device);
                seen.resets += 1;
                seen.state = DeviceState::Running.number();
                Ok(0)
            }
        }
    }

    fn message(
        &self,
        fd: BorrowedFd<'_>,
        request: Message,
        message: &mut [u8],
    ) -> Result<i32, Errno> {
        let mut seen = self.0.lock();
        let role = seen.role(fd);
        if let Some(error) = seen.errors.get(&(request as u32)) {
            return Err(*error);
        }
        match request {
            Message::GroupStatus => {
                assert_eq!(role, Role::Group);
                message[4] = u8::from(seen.viable);
                Ok(0)
            }
            Message::SetIrqs => {
                seen.irqs = message.to_vec();
                Ok(seen.irq_result)
            }
            Message::UnmapDma => {
                let word = |at: usize| u64::from_le_bytes(message[at..at + 8].try_into().unwrap());
                let (iova, size) = (word(8), word(16));
                seen.mapped
                    .retain(|ram| (ram.gpa.0, ram.len) != (iova, size));
                let done = seen.unmapped.unwrap_or(size);
                message[16..24].copy_from_slice(&done.to_le_bytes());
                Ok(0)
            }
            Message::DeviceFeature if role == Role::Container => {
                seen.container_log = message[4] == 1;
                Ok(0)
            }
            Message::DeviceFeature => seen.feature(message),
            Message::PrecopyInfo => {
                assert_eq!(role, Role::Data);
                message[8..24].copy_from_slice(&[100_u64, 23].map(u64::to_le_bytes).concat());
                Ok(0)
            }
            Message::DeviceInfo | Message::RegionInfo | Message::IrqInfo | Message::IommuInfo => {
                seen.describe(request, message)
            }
            Message::BindIommufd | Message::AttachPt | Message::DetachPt => {
                assert_eq!(role, Role::Device);
                seen.iommufd(fd.as_raw_fd(), request, message)
            }
            Message::Destroy
            | Message::IoasAlloc
            | Message::IoasUnmap
            | Message::HwptAlloc
            | Message::HwInfo
            | Message::SetDirtyTracking => {
                assert_eq!(role, Role::Iommufd);
                seen.iommufd(fd.as_raw_fd(), request, message)
            }
        }
    }

    fn set_container(&self, group: BorrowedFd<'_>, container: BorrowedFd<'_>) -> Result<(), Errno> {
        let mut seen = self.0.lock();
        let roles = (seen.role(group), seen.role(container));
        assert_eq!(roles, (Role::Group, Role::Container));
        if let Some(left) = seen.refuse_join.checked_sub(1) {
            seen.refuse_join = left;
            return Err(Errno::INVAL);
        }
        seen.joined.push((group.as_raw_fd(), container.as_raw_fd()));
        Ok(())
    }

    fn group_device(&self, group: BorrowedFd<'_>, name: &CStr) -> Result<OwnedFd, Errno> {
        let mut seen = self.0.lock();
        assert_eq!(seen.role(group), Role::Group);
        match name.to_bytes().starts_with(b"0000:") {
            true => Ok(seen.make(Role::Device)),
            false => Err(Errno::NODEV),
        }
    }

    fn map(&self, container: BorrowedFd<'_>, ram: &PinnedRam) -> Result<(), Errno> {
        let mut seen = self.0.lock();
        assert_eq!(seen.role(container), Role::Container);
        if let Some(error) = seen.map_error {
            return Err(error);
        }
        seen.mapped.push(ram.ram());
        Ok(())
    }

    fn ioas_map(&self, iommufd: BorrowedFd<'_>, ioas: u32, ram: &PinnedRam) -> Result<(), Errno> {
        let mut seen = self.0.lock();
        assert_eq!(seen.role(iommufd), Role::Iommufd);
        assert_eq!(seen.iommufd.objects[&ioas], Object::Ioas);
        if let Some(error) = seen.map_error {
            return Err(error);
        }
        seen.mapped.push(ram.ram());
        Ok(())
    }

    fn ioas_ranges(
        &self,
        iommufd: BorrowedFd<'_>,
        ioas: u32,
        ranges: &mut [[u64; 2]],
    ) -> Result<IovaRules, Errno> {
        let seen = self.0.lock();
        assert_eq!(seen.role(iommufd), Role::Iommufd);
        let model = &seen.iommufd;
        assert_eq!(model.objects[&ioas], Object::Ioas);
        ranges[..model.ranges.len()].copy_from_slice(&model.ranges);
        let told = u32::try_from(model.ranges.len()).unwrap();
        Ok(IovaRules {
            ranges: model.ranges_told.unwrap_or(told),
            alignment: model.alignment,
        })
    }

    fn hwpt_report(
        &self,
        iommufd: BorrowedFd<'_>,
        hwpt: u32,
        span: LogSpan,
        words: &mut [u64],
    ) -> Result<(), Errno> {
        let mut seen = self.0.lock();
        assert_eq!(seen.role(iommufd), Role::Iommufd);
        assert_eq!(seen.iommufd.objects[&hwpt], Object::Hwpt(true));
        if let Some(error) = seen.report_error {
            return Err(error);
        }
        seen.take_dirty(span, words);
        Ok(())
    }

    fn set_migration_state(
        &self,
        device: BorrowedFd<'_>,
        state: u32,
    ) -> Result<Option<OwnedFd>, Errno> {
        let mut seen = self.0.lock();
        assert_eq!(seen.role(device), Role::Device);
        if let Some(error) = seen.state_error {
            return Err(error);
        }
        let was = DeviceState::from_number(seen.state).unwrap();
        seen.state = state;
        let state = DeviceState::from_number(state).unwrap();
        let begins = match state {
            DeviceState::PreCopy | DeviceState::PreCopyP2p | DeviceState::StopCopy => {
                !was.is_saving()
            }
            state => state == DeviceState::Resuming,
        };
        Ok((begins && seen.with_data).then(|| seen.make(Role::Data)))
    }

    fn log_start(
        &self,
        device: BorrowedFd<'_>,
        page_size: u64,
        ranges: &[AreaMsg],
    ) -> Result<u64, Errno> {
        let mut seen = self.0.lock();
        assert_eq!(seen.role(device), Role::Device);
        if let Some(error) = seen.log_error {
            return Err(error);
        }
        if seen.log.is_some() {
            return Err(Errno::INVAL);
        }
        let ranges = ranges.iter().map(|range| (range.offset, range.size));
        seen.log = Some((page_size, ranges.collect()));
        Ok(seen.log_page)
    }

    fn log_report(
        &self,
        _device: BorrowedFd<'_>,
        span: LogSpan,
        words: &mut [u64],
    ) -> Result<(), Errno> {
        let mut seen = self.0.lock();
        if let Some(error) = seen.report_error {
            return Err(error);
        }
        assert!(seen.log.is_some());
        seen.take_dirty(span, words);
        Ok(())
    }

    fn container_report(
        &self,
        container: BorrowedFd<'_>,
        span: LogSpan,
        words: &mut [u64],
    ) -> Result<(), Errno> {
        let mut seen = self.0.lock();
        assert_eq!(seen.role(container), Role::Container);
        let whole = |ram: &RamRegion| (ram.gpa.0, ram.len) == (span.iova, span.length);
        if !seen.container_log || !seen.mapped.iter().any(whole) {
            return Err(Errno::INVAL);
        }
        assert!(words.iter().all(|word| *word == 0));
        for at in std::mem::take(&mut seen.dirty) {
            let bit = (at - span.iova) / span.page_size;
            words[usize::try_from(bit / 64).unwrap()] |= 1 << (bit % 64);
        }
        Ok(())
    }

    fn read_at(&self, fd: BorrowedFd<'_>, offset: u64, data: &mut [u8]) -> Result<usize, Errno> {
        let seen = self.0.lock();
        assert_eq!(seen.role(fd), Role::Device);
        for (at, byte) in (offset..).zip(data.iter_mut()) {
            *byte = seen.bytes.get(&at).copied().unwrap_or(0);
        }
        Ok(data.len() - usize::from(seen.short))
    }

    fn write_at(&self, fd: BorrowedFd<'_>, offset: u64, data: &[u8]) -> Result<usize, Errno> {
        let mut seen = self.0.lock();
        assert_eq!(seen.role(fd), Role::Device);
        seen.bytes.extend((offset..).zip(data.iter().copied()));
        Ok(data.len() - usize::from(seen.short))
    }

    fn set_nonblocking(&self, fd: BorrowedFd<'_>) -> Result<(), Errno> {
        assert_eq!(self.0.lock().role(fd), Role::Data);
        Ok(())
    }

    fn read(&self, fd: BorrowedFd<'_>, data: &mut [u8]) -> Result<usize, Errno> {
        let mut seen = self.0.lock();
        assert_eq!(seen.role(fd), Role::Data);
        let piece = seen.reads.pop_front().unwrap_or(Ok(Vec::new()))?;
        data[..piece.len()].copy_from_slice(&piece);
        Ok(piece.len())
    }

    fn write(&self, fd: BorrowedFd<'_>, data: &[u8]) -> Result<usize, Errno> {
        let mut seen = self.0.lock();
        assert_eq!(seen.role(fd), Role::Data);
        let len = seen.writes.pop_front().unwrap_or(Ok(data.len()))?;
        seen.written.extend_from_slice(&data[..len.min(data.len())]);
        Ok(len)
    }

    fn wait(&self, fd: BorrowedFd<'_>, _writable: bool, limit: Duration) -> Result<bool, Errno> {
        let seen = self.0.lock();
        assert_eq!(seen.role(fd), Role::Data);
        if !seen.ready {
            drop(seen);
            std::thread::sleep(limit);
            return Ok(false);
        }
        Ok(true)
    }
}
