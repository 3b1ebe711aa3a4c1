//! A backend and interrupt vectors within the test.

use std::collections::VecDeque;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;

use devices::{InterruptError, MsiFabric, MsiLine, MsiMessage};
use parking_lot::Mutex;
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use vfio_user::wire::PCI_CONFIG_REGION;
use vfio_user::{
    Area, DeviceFlags, DeviceInfo, DeviceState, IoEventFd, Machine, MigrationFlags, PrecopyInfo,
    RegionFlags, RegionInfo, RegionMapping, StateArc,
};
use vm_memory::GuestMemoryRegion;
use vm_migration::memory::GuestRegion;
use vm_migration::{Gpa, Iova, IovaBitmap, IovaRange, PageSize, RamRegion};
use vmm_sys_util::eventfd::EventFd;

use crate::DirtyRung;
use crate::backend::{Backend, BackendError, IrqKind, SharedLog};
use crate::device::Passthrough;

pub(crate) const VENDOR: u16 = 0x1af4;
pub(crate) const DEVICE: u16 = 0x1041;
pub(crate) const MSIX_CAP: u16 = 0x40;
pub(crate) const MSI_CAP: u16 = 0x50;
pub(crate) const VENDOR_CAP: u16 = 0x60;
pub(crate) const VECTORS: u16 = 3;
/// BAR 2 holds the MSI-X table here, the pending bits at 0x1800, and is 16 KiB.
pub(crate) const TABLE: u64 = 0x1000;

/// What happened to the device and what is to go wrong.
pub(crate) struct Seen {
    pub(crate) machine: Machine,
    pub(crate) config: Vec<u8>,
    pub(crate) bar: Vec<u8>,
    pub(crate) gone: bool,
    /// Arcs that fail.
    pub(crate) faults: Vec<Fault>,
    /// Reports fail.
    pub(crate) lose_log: bool,
    /// The report after so many fails.
    pub(crate) fail_report: Option<usize>,
    /// The next start of the log fails; `true`: after it has started.
    pub(crate) fail_start: Option<bool>,
    pub(crate) path: Vec<DeviceState>,
    /// Data given in PRE_COPY and STOP_COPY.
    pub(crate) precopy: VecDeque<Vec<u8>>,
    pub(crate) stop_copy: VecDeque<Vec<u8>>,
    pub(crate) loaded: Vec<u8>,
    pub(crate) resets: u32,
    pub(crate) mapped: Vec<(RamRegion, u64)>,
    pub(crate) log: Option<Vec<IovaRange>>,
    pub(crate) dirty: Vec<u64>,
    pub(crate) reports: Vec<IovaRange>,
    pub(crate) log_page: PageSize,
    /// It has no log of its own.
    pub(crate) no_log: bool,
    pub(crate) shared: Option<Arc<FakeShared>>,
    pub(crate) irqs: Option<(IrqKind, usize)>,
    pub(crate) size: Option<u64>,
    pub(crate) precopy_info: Option<PrecopyInfo>,
    /// The device's name in a list of what several devices did, and the list.
    pub(crate) events: Option<(u8, Events)>,
}

/// What several devices did, in order.
pub(crate) type Events = Arc<Mutex<Vec<(u8, DeviceState)>>>;

/// How an arc fails.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum How {
    /// The device stays in the old state.
    Stays,
    /// The device is in ERROR.
    Breaks,
    /// Whoever has the device dies.
    Dies,
}

/// An arc that fails, so many times.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fault {
    pub(crate) arc: StateArc,
    pub(crate) how: How,
    pub(crate) times: u32,
}

pub(crate) struct FakeBackend {
    pub(crate) seen: Mutex<Seen>,
    flags: Option<MigrationFlags>,
}

impl FakeBackend {
    pub(crate) fn new(flags: Option<MigrationFlags>) -> Arc<Self> {
        let mut config = vec![0; 256];
        let mut put = |at: u16, bytes: &[u8]| {
            let at = usize::from(at);
            config[at..at + bytes.len()].copy_from_slice(bytes);
        };
        put(0, &VENDOR.to_le_bytes());
        put(2, &DEVICE.to_le_bytes());
        put(6, &[0x10]);
        put(0x10, &[0x0c]);
        put(0x34, &[0x40]);
        put(MSIX_CAP, &[0x11, 0x50, 2, 0, 2, 0x10, 0, 0, 2, 0x18]);
        put(MSI_CAP, &[0x05, 0x60]);
        put(VENDOR_CAP, &[0x09, 0x00, 0x10, 0xab]);
        Arc::new(Self {
            flags,
            seen: Mutex::new(Seen {
                machine: Machine::new(flags.unwrap_or(MigrationFlags::STOP_COPY)),
                config,
                bar: (0..0x4000_u32).map(|n| n.to_le_bytes()[0]).collect(),
                gone: false,
                faults: Vec::new(),
                precopy_info: None,
                events: None,
                lose_log: false,
                fail_report: None,
                fail_start: None,
                path: Vec::new(),
                precopy: VecDeque::new(),
                stop_copy: VecDeque::new(),
                loaded: Vec::new(),
                resets: 0,
                mapped: Vec::new(),
                log: None,
                dirty: Vec::new(),
                reports: Vec::new(),
                log_page: PageSize::SIZE_4K,
                no_log: false,
                shared: None,
                irqs: None,
                size: Some(1000),
            }),
        })
    }

    fn alive(&self) -> Result<(), BackendError> {
        match self.seen.lock().gone {
            true => Err(BackendError::Gone("killed by the test".into())),
            false => Ok(()),
        }
    }
}

fn refused<T>(operation: &'static str) -> Result<T, BackendError> {
    Err(BackendError::Failed {
        operation,
        cause: "refused by the test".into(),
    })
}

impl Backend for FakeBackend {
    fn info(&self) -> Result<DeviceInfo, BackendError> {
        self.alive()?;
        Ok(DeviceInfo {
            flags: DeviceFlags::PCI | DeviceFlags::RESET,
            num_regions: 9,
            num_irqs: 5,
        })
    }

    fn region(&self, index: u32) -> Result<RegionInfo, BackendError> {
        self.alive()?;
        let (size, mapping) = match index {
            0 => (0x8000, None),
            2 => {
                let file = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
                let areas = vec![Area {
                    offset: 0,
                    size: 0x4000,
                }];
                let mapping = RegionMapping {
                    fd: file,
                    offset: 0x10_0000,
                    areas,
                };
                (0x4000, Some(mapping))
            }
            PCI_CONFIG_REGION => (256, None),
            _ => (0, None),
        };
        Ok(RegionInfo {
            flags: RegionFlags::READ | RegionFlags::WRITE,
            size,
            mapping,
        })
    }

    fn io_events(&self, index: u32, _size: u64) -> Result<Vec<IoEventFd>, BackendError> {
        self.alive()?;
        let fd: OwnedFd = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        Ok(match index {
            0 => vec![IoEventFd {
                offset: 0x3000,
                size: 2,
                datamatch: None,
                fd,
            }],
            _ => Vec::new(),
        })
    }

    fn region_read(&self, region: u32, offset: u64, data: &mut [u8]) -> Result<(), BackendError> {
        self.alive()?;
        let seen = self.seen.lock();
        let bytes = match region {
            PCI_CONFIG_REGION => &seen.config,
            2 => &seen.bar,
            _ => return refused("read a region"),
        };
        let at = usize::try_from(offset).unwrap();
        data.copy_from_slice(&bytes[at..at + data.len()]);
        Ok(())
    }

    fn region_write(&self, region: u32, offset: u64, data: &[u8]) -> Result<(), BackendError> {
        self.alive()?;
        let mut seen = self.seen.lock();
        let bytes = match region {
            PCI_CONFIG_REGION => &mut seen.config,
            2 => &mut seen.bar,
            _ => return refused("write a region"),
        };
        let at = usize::try_from(offset).unwrap();
        bytes[at..at + data.len()].copy_from_slice(data);
        Ok(())
    }

    fn enable_irqs(&self, kind: IrqKind, eventfds: &[BorrowedFd<'_>]) -> Result<(), BackendError> {
        self.alive()?;
        self.seen.lock().irqs = Some((kind, eventfds.len()));
        Ok(())
    }

    fn disable_irqs(&self, kind: IrqKind) -> Result<(), BackendError> {
        self.alive()?;
        let was = self.seen.lock().irqs.take();
        match was {
            Some((on, _)) if on == kind => Ok(()),
            _ => refused("switch interrupts off that are not on"),
        }
    }

    fn map(&self, region: &GuestRegion) -> Result<(), BackendError> {
        let ram = RamRegion {
            gpa: Gpa(region.start_addr().0),
            len: region.len(),
        };
        let file = region.file_offset();
        let file = file.ok_or(BackendError::NotShared { gpa: ram.gpa })?;
        self.seen.lock().mapped.push((ram, file.start()));
        Ok(())
    }

    fn unmap(&self, ram: RamRegion) -> Result<(), BackendError> {
        self.seen.lock().mapped.retain(|(mapped, _)| *mapped != ram);
        Ok(())
    }

    fn reset(&self) -> Result<(), BackendError> {
        self.alive()?;
        let mut seen = self.seen.lock();
        seen.resets += 1;
        seen.machine.reset();
        Ok(())
    }

    fn migration(&self) -> Result<Option<MigrationFlags>, BackendError> {
        Ok(self.flags)
    }

    fn state(&self) -> Result<DeviceState, BackendError> {
        self.alive()?;
        Ok(self.seen.lock().machine.state())
    }

    fn set_state(&self, state: DeviceState) -> Result<(), BackendError> {
        self.alive()?;
        let mut seen = self.seen.lock();
        let mut faults = std::mem::take(&mut seen.faults);
        let mut dies = false;
        let mut path = Vec::new();
        let result = seen.machine.transition(state, |arc| {
            use vfio_user::{ArcFailure, Errno};
            let due = |fault: &&mut Fault| fault.arc == arc && fault.times > 0;
            let Some(fault) = faults.iter_mut().find(due) else {
                path.push(arc.ends().1);
                return Ok(());
            };
            fault.times -= 1;
            match fault.how {
                How::Stays => Err(ArcFailure::Unchanged(Errno::IO)),
                How::Breaks => Err(ArcFailure::Broken(Errno::IO)),
                How::Dies => {
                    dies = true;
                    Err(ArcFailure::Broken(Errno::IO))
                }
            }
        });
        seen.faults = faults;
        if let Some((name, events)) = &seen.events {
            events.lock().extend(path.iter().map(|to| (*name, *to)));
        }
        seen.path.extend(path);
        if dies {
            seen.gone = true;
            return Err(BackendError::Gone("killed by the test".into()));
        }
        result.map_err(|error| BackendError::Failed {
            operation: "change its migration state",
            cause: Box::new(error),
        })
    }

    fn precopy_info(&self) -> Result<Option<PrecopyInfo>, BackendError> {
        self.alive()?;
        let seen = self.seen.lock();
        match seen.machine.state() {
            DeviceState::PreCopy | DeviceState::PreCopyP2p => Ok(seen.precopy_info),
            _ => refused("tell what there is to read of it"),
        }
    }

    fn stop_copy_size(&self) -> Result<Option<u64>, BackendError> {
        self.alive()?;
        Ok(self.seen.lock().size)
    }

    fn read_data(&self, data: &mut [u8]) -> Result<usize, BackendError> {
        self.alive()?;
        let mut seen = self.seen.lock();
        let queue = match seen.machine.state() {
            DeviceState::StopCopy => &mut seen.stop_copy,
            state if state.is_saving() => &mut seen.precopy,
            _ => return refused("give its state"),
        };
        let Some(mut piece) = queue.pop_front() else {
            return Ok(0);
        };
        let len = piece.len().min(data.len());
        data[..len].copy_from_slice(&piece[..len]);
        if len < piece.len() {
            queue.push_front(piece.split_off(len));
        }
        Ok(len)
    }

    fn write_data(&self, data: &[u8]) -> Result<(), BackendError> {
        self.alive()?;
        let mut seen = self.seen.lock();
        if seen.machine.state() != DeviceState::Resuming {
            return refused("take its state");
        }
        seen.loaded.extend_from_slice(data);
        Ok(())
    }

    fn can_log(&self) -> Result<bool, BackendError> {
        Ok(self.flags.is_some() && !self.seen.lock().no_log)
    }

    fn max_log_ranges(&self) -> usize {
        2
    }

    fn start_log(&self, _page: PageSize, ranges: &[IovaRange]) -> Result<PageSize, BackendError> {
        self.alive()?;
        let mut seen = self.seen.lock();
        let fail = seen.fail_start.take();
        // As vfio-user servers have it.
        if seen.log.is_some() || fail == Some(false) {
            return refused("start its dirty log");
        }
        seen.log = Some(ranges.to_vec());
        match fail {
            Some(_) => refused("start its dirty log"),
            None => Ok(seen.log_page),
        }
    }

    fn stop_log(&self) -> Result<(), BackendError> {
        self.alive()?;
        self.seen.lock().log = None;
        Ok(())
    }

    fn report_log(&self, bitmap: &mut IovaBitmap) -> Result<(), BackendError> {
        self.alive()?;
        let (region, page) = (bitmap.range(), bitmap.page_size());
        let words = bitmap.words_mut();
        let mut seen = self.seen.lock();
        let due = seen.fail_report == Some(0);
        seen.fail_report = seen.fail_report.and_then(|left| left.checked_sub(1));
        if due || seen.lose_log || seen.log.is_none() {
            return refused("report its dirty log");
        }
        seen.reports.push(region);
        let (first, last) = (region.first().0, region.last().0);
        seen.dirty.retain(|at| {
            let inside = (first..=last).contains(at);
            if inside {
                let bit = (at - first) / page.bytes();
                words[usize::try_from(bit / 64).unwrap()] |= 1 << (bit % 64);
            }
            !inside
        });
        Ok(())
    }

    fn shared_log(&self) -> Option<Arc<dyn SharedLog>> {
        self.seen.lock().shared.clone().map(|log| log as _)
    }
}

/// A log that devices share.
pub(crate) struct FakeShared {
    pub(crate) rung: Mutex<DirtyRung>,
    max_region: u64,
    pub(crate) on: Mutex<bool>,
    pub(crate) dirty: Mutex<Vec<u64>>,
}

impl FakeShared {
    pub(crate) fn new(max_region: u64) -> Arc<Self> {
        Arc::new(Self {
            rung: Mutex::new(DirtyRung::Container),
            max_region,
            on: Mutex::new(false),
            dirty: Mutex::default(),
        })
    }
}

impl SharedLog for FakeShared {
    fn rung(&self) -> DirtyRung {
        *self.rung.lock()
    }

    fn page_size(&self) -> Result<PageSize, BackendError> {
        Ok(PageSize::SIZE_4K)
    }

    fn max_region(&self) -> u64 {
        self.max_region
    }

    fn start(&self) -> Result<(), BackendError> {
        *self.on.lock() = true;
        Ok(())
    }

    fn stop(&self) -> Result<(), BackendError> {
        *self.on.lock() = false;
        Ok(())
    }

    fn report(&self, bitmap: &mut IovaBitmap) -> Result<(), BackendError> {
        for at in self.dirty.lock().drain(..) {
            bitmap.set(Iova(at), 1);
        }
        Ok(())
    }
}

/// A vector that remembers its route.
pub(crate) struct FakeLine {
    event: EventFd,
    pub(crate) route: Mutex<Option<MsiMessage>>,
}

impl MsiLine for FakeLine {
    fn trigger(&self) -> Result<(), InterruptError> {
        self.event
            .write(1)
            .map_err(|cause| InterruptError::Backend {
                operation: "trigger",
                cause,
            })
    }

    fn eventfd(&self) -> &EventFd {
        &self.event
    }

    fn route(&self, message: Option<MsiMessage>) -> Result<(), InterruptError> {
        *self.route.lock() = message;
        Ok(())
    }

    fn is_pending(&self) -> bool {
        let event = crate::fd::borrow(&self.event);
        let mut set = [PollFd::from_borrowed_fd(event, PollFlags::IN)];
        let none = rustix::event::Timespec::default();
        self.route.lock().is_none() && poll(&mut set, Some(&none)) == Ok(1)
    }
}

/// Gives vectors out and keeps them.
#[derive(Default)]
pub(crate) struct FakeFabric(pub(crate) Mutex<Vec<Arc<FakeLine>>>);

impl MsiFabric for FakeFabric {
    fn allocate(&self, count: u16) -> Result<Vec<Arc<dyn MsiLine>>, InterruptError> {
        let lines: Vec<Arc<FakeLine>> = (0..count)
            .map(|_| {
                Arc::new(FakeLine {
                    event: EventFd::new(vmm_sys_util::eventfd::EFD_NONBLOCK).unwrap(),
                    route: Mutex::default(),
                })
            })
            .collect();
        self.0.lock().extend(lines.iter().cloned());
        Ok(lines.into_iter().map(|line| line as _).collect())
    }
}

/// A device over a fake backend.
pub(crate) fn device(backend: &Arc<FakeBackend>) -> (Passthrough, FakeFabric) {
    let fabric = FakeFabric::default();
    let backend = Arc::clone(backend) as Arc<dyn Backend>;
    let device = Passthrough::new("nic0", backend, &fabric).unwrap();
    (device, fabric)
}
