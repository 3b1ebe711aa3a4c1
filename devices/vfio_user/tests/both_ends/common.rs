//! A device for tests: two regions, four interrupts, memory it can write, a stream of state.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::Duration;

use parking_lot::Mutex;
use rustix::fs::{MemfdFlags, memfd_create};
use vfio_user::{
    ArcFailure, Area, Client, ClientConfig, ClientMemory, DeviceFlags, DeviceInfo, DeviceState,
    DmaLogDevice, DmaMapping, Errno, IoEventFd, IrqAction, IrqData, IrqFlags, IrqInfo, IrqRequest,
    MigrationDevice, MigrationFlags, PrecopyInfo, RegionFlags, RegionInfo, RegionMapping,
    ServerDevice, ServerError, StateArc,
};

pub(crate) const REGION_SIZE: u64 = 3 << 20;
pub(crate) const CONFIG: u32 = 7;
/// A write here has the device copy 4 KiB of its first region to the IOVA written.
pub(crate) const DMA_DOORBELL: u64 = 0x100;
/// A write here reads 8 bytes at the IOVA written by message and puts them at `DMA_RESULT`.
pub(crate) const DMA_BY_MESSAGE: u64 = 0x108;
pub(crate) const DMA_RESULT: u64 = 0x110;

#[derive(Default)]
pub(crate) struct Shared {
    /// Every device operation fails with this.
    pub(crate) fail: Option<Errno>,
    pub(crate) irqs: BTreeMap<u32, OwnedFd>,
    pub(crate) mappings: BTreeMap<u64, (u64, Option<(OwnedFd, u64)>)>,
    pub(crate) detached: u32,
    pub(crate) resets: u32,
    pub(crate) arcs: Vec<(DeviceState, DeviceState)>,
    /// What RESUMING took.
    pub(crate) loaded: Vec<u8>,
}

static STATE: OnceLock<Vec<u8>> = OnceLock::new();

pub(crate) struct FakeDevice {
    pub(crate) shared: Arc<Mutex<Shared>>,
    memory: Vec<u8>,
    client: Option<ClientMemory>,
    state: &'static [u8],
    read_at: usize,
    log: Option<(u64, Vec<u64>)>,
}

impl FakeDevice {
    pub(crate) fn new() -> Self {
        Self {
            shared: Arc::default(),
            memory: vec![0; usize::try_from(REGION_SIZE).unwrap()],
            client: None,
            state: STATE.get_or_init(|| (0..3_000_000_u32).map(|n| n.to_le_bytes()[1]).collect()),
            read_at: 0,
            log: None,
        }
    }

    fn check(&self) -> Result<(), Errno> {
        self.shared.lock().fail.map_or(Ok(()), Err)
    }

    fn dma(&mut self, iova: u64) -> Result<(), Errno> {
        let shared = self.shared.lock();
        let (base, (size, file)) = shared
            .mappings
            .range(..=iova)
            .next_back()
            .ok_or(Errno::FAULT)?;
        if iova + 4096 > base + size {
            return Err(Errno::FAULT);
        }
        let (fd, offset) = file.as_ref().ok_or(Errno::FAULT)?;
        rustix::io::pwrite(fd, &self.memory[..4096], offset + iova - base)?;
        if let Some((_, dirty)) = &mut self.log {
            dirty.push(iova);
        }
        Ok(())
    }
}

impl ServerDevice for FakeDevice {
    fn info(&self) -> DeviceInfo {
        DeviceInfo {
            flags: DeviceFlags::PCI | DeviceFlags::RESET,
            num_regions: 9,
            num_irqs: 5,
        }
    }

    fn region_info(&mut self, index: u32) -> Result<RegionInfo, Errno> {
        self.check()?;
        let flags = RegionFlags::READ | RegionFlags::WRITE;
        Ok(match index {
            0 | CONFIG => RegionInfo {
                flags,
                size: REGION_SIZE,
                mapping: None,
            },
            2 => RegionInfo {
                flags,
                size: 0x4000,
                mapping: Some(RegionMapping {
                    fd: memfd_create("region", MemfdFlags::CLOEXEC)?,
                    offset: 0x1000,
                    areas: vec![Area {
                        offset: 0x2000,
                        size: 0x1000,
                    }],
                }),
            },
            _ => RegionInfo {
                flags: RegionFlags::empty(),
                size: 0,
                mapping: None,
            },
        })
    }

    fn region_io_fds(&mut self, index: u32) -> Result<Vec<IoEventFd>, Errno> {
        self.check()?;
        if index != 0 {
            return Ok(Vec::new());
        }
        Ok(vec![IoEventFd {
            offset: 0x40,
            size: 2,
            datamatch: Some(1),
            fd: rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC)?,
        }])
    }

    fn irq_info(&mut self, index: u32) -> Result<IrqInfo, Errno> {
        self.check()?;
        Ok(IrqInfo {
            flags: IrqFlags::EVENTFD,
            count: if index == 2 { 200 } else { 0 },
        })
    }

    fn set_irqs(&mut self, request: IrqRequest) -> Result<(), Errno> {
        self.check()?;
        let mut shared = self.shared.lock();
        match (request.action, request.data) {
            (IrqAction::Trigger, IrqData::EventFds(fds)) => {
                for (vector, fd) in (request.start..).zip(fds) {
                    shared.irqs.insert(vector, fd);
                }
                Ok(())
            }
            (IrqAction::Trigger, IrqData::All) if request.count == 0 => {
                shared.irqs.clear();
                Ok(())
            }
            (IrqAction::Trigger, IrqData::All) => {
                for vector in request.start..request.start + request.count {
                    let fd = shared.irqs.get(&vector).ok_or(Errno::NOENT)?;
                    rustix::io::write(fd, &1_u64.to_ne_bytes())?;
                }
                Ok(())
            }
            _ => Err(Errno::OPNOTSUPP),
        }
    }

    fn region_read(&mut self, _region: u32, offset: u64, data: &mut [u8]) -> Result<(), Errno> {
        self.check()?;
        let at = usize::try_from(offset).unwrap();
        data.copy_from_slice(&self.memory[at..at + data.len()]);
        Ok(())
    }

    fn region_write(&mut self, _region: u32, offset: u64, data: &[u8]) -> Result<(), Errno> {
        self.check()?;
        let at = usize::try_from(offset).unwrap();
        self.memory[at..at + data.len()].copy_from_slice(data);
        match (offset, <[u8; 8]>::try_from(data)) {
            (DMA_DOORBELL, Ok(iova)) => self.dma(u64::from_le_bytes(iova)),
            (DMA_BY_MESSAGE, Ok(iova)) => {
                let iova = u64::from_le_bytes(iova);
                let client = self.client.clone().ok_or(Errno::NOTCONN)?;
                let mut bytes = [0; 8];
                client.read(iova, &mut bytes)?;
                client.write(iova + 8, &bytes)?;
                let at = usize::try_from(DMA_RESULT).unwrap();
                self.memory[at..at + 8].copy_from_slice(&bytes);
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn dma_map(&mut self, mapping: DmaMapping) -> Result<(), Errno> {
        self.check()?;
        let mut shared = self.shared.lock();
        if shared.mappings.contains_key(&mapping.iova) {
            return Err(Errno::EXIST);
        }
        shared
            .mappings
            .insert(mapping.iova, (mapping.size, mapping.file));
        Ok(())
    }

    fn dma_unmap(&mut self, iova: u64, size: u64) -> Result<(), Errno> {
        self.check()?;
        let mut shared = self.shared.lock();
        match shared.mappings.get(&iova) {
            Some((mapped, _)) if *mapped == size => {
                shared.mappings.remove(&iova);
                Ok(())
            }
            _ => Err(Errno::NOENT),
        }
    }

    fn reset(&mut self) -> Result<(), Errno> {
        self.check()?;
        self.memory.fill(0);
        self.shared.lock().resets += 1;
        Ok(())
    }

    fn migration(&mut self) -> Option<&mut dyn MigrationDevice> {
        Some(self)
    }

    fn dma_log(&mut self) -> Option<&mut dyn DmaLogDevice> {
        Some(self)
    }

    fn attach(&mut self, memory: ClientMemory) {
        self.client = Some(memory);
    }

    fn detach(&mut self) {
        self.client = None;
        self.log = None;
        let mut shared = self.shared.lock();
        shared.mappings.clear();
        shared.irqs.clear();
        shared.detached += 1;
    }
}

impl MigrationDevice for FakeDevice {
    fn flags(&self) -> MigrationFlags {
        MigrationFlags::all()
    }

    fn arc(&mut self, arc: StateArc) -> Result<(), ArcFailure> {
        self.check().map_err(ArcFailure::Unchanged)?;
        self.shared.lock().arcs.push(arc.ends());
        if arc == StateArc::ResumingToStop && self.shared.lock().loaded.starts_with(b"bad") {
            return Err(ArcFailure::Broken(Errno::BADMSG));
        }
        self.read_at = 0;
        Ok(())
    }

    fn read_data(&mut self, data: &mut [u8]) -> Result<usize, Errno> {
        self.check()?;
        let rest = &self.state[self.read_at..];
        let len = rest.len().min(data.len());
        data[..len].copy_from_slice(&rest[..len]);
        self.read_at += len;
        Ok(len)
    }

    fn write_data(&mut self, data: &[u8]) -> Result<(), Errno> {
        self.check()?;
        self.shared.lock().loaded.extend_from_slice(data);
        Ok(())
    }

    fn stop_copy_size(&mut self) -> Result<u64, Errno> {
        self.check()?;
        Ok(self.state.len() as u64)
    }

    fn precopy_info(&mut self) -> Result<PrecopyInfo, Errno> {
        self.check()?;
        Ok(PrecopyInfo {
            initial_bytes: (self.state.len() - self.read_at) as u64,
            dirty_bytes: 5,
            reinit: self.read_at == 0,
        })
    }
}

impl DmaLogDevice for FakeDevice {
    fn start(&mut self, _page_size: u64, _ranges: &[Area]) -> Result<u64, Errno> {
        self.check()?;
        self.log = Some((4096, Vec::new()));
        Ok(4096)
    }

    fn stop(&mut self) -> Result<(), Errno> {
        self.check()?;
        self.log = None;
        Ok(())
    }

    fn report(
        &mut self,
        iova: u64,
        length: u64,
        page_size: u64,
        words: &mut [u64],
    ) -> Result<(), Errno> {
        self.check()?;
        let (_, dirty) = self.log.as_mut().ok_or(Errno::INVAL)?;
        dirty.retain(|page| {
            let inside = (iova..iova + length).contains(page);
            if inside {
                let bit = (page - iova) / page_size;
                words[usize::try_from(bit / 64).unwrap()] |= 1 << (bit % 64);
            }
            !inside
        });
        Ok(())
    }
}

pub(crate) type Served = JoinHandle<Result<(), ServerError>>;

/// A client and a served device, and what the test sees of it.
pub(crate) fn connected(config: ClientConfig) -> (Client, Arc<Mutex<Shared>>, Served) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut device = FakeDevice::new();
    let shared = Arc::clone(&device.shared);
    let served = std::thread::spawn(move || vfio_user::serve(theirs, &mut device));
    let client = Client::from_stream(ours, Path::new("test.sock"), config).unwrap();
    (client, shared, served)
}

pub(crate) fn quick() -> ClientConfig {
    ClientConfig {
        timeout: Duration::from_millis(300),
        transition_timeout: Duration::from_millis(300),
        ..ClientConfig::default()
    }
}
