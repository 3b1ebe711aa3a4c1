//! A virtio PCI function as a vfio-user device.

use std::sync::Arc;

use devices::ThreadSpawner;
use pci::PciDevice;
use pci::config::CONFIG_SPACE_SIZE;
use rustix::io::Errno;
use vfio_user::wire::{PCI_CONFIG_REGION, PCI_MSIX_IRQ, PCI_NUM_IRQS, PCI_NUM_REGIONS};
use vfio_user::{
    ArcFailure, Area, ClientMemory as ByMessage, DeviceFlags, DeviceInfo, DmaLogDevice, DmaMapping,
    IoEventFd, IrqAction, IrqData, IrqFlags, IrqInfo, IrqRequest, MigrationDevice, MigrationFlags,
    PrecopyInfo, RegionFlags, RegionInfo, ServerDevice, StateArc,
};
use virtio_devices::{TransportError, VirtioDevice, VirtioPciDevice, VirtioPciParts};
use vm_migration::{Pause, SaveRestore, StateError};

use crate::interrupts::ClientFabric;
use crate::memory::ClientMemory;
use crate::migration::{Incoming, Kind, Outgoing};

/// Stop-copy bytes told before the first state was saved: more than a card with a few queues has.
const FIRST_GUESS: u64 = 16 << 10;

/// The device behind the server.
pub struct NicDevice {
    function: VirtioPciDevice,
    memory: ClientMemory,
    fabric: Arc<ClientFabric>,
    /// The migration state keeps it still: no thread of it runs.
    stopped: bool,
    outgoing: Outgoing,
    incoming: Incoming,
    /// Bytes of the state when it was last saved.
    last_size: u64,
}

impl NicDevice {
    /// `device` behind a PCI function, without a client.
    ///
    /// # Errors
    /// See [`TransportError`].
    pub fn new(
        device: Box<dyn VirtioDevice>,
        spawner: ThreadSpawner,
    ) -> Result<Self, TransportError> {
        let memory = ClientMemory::default();
        let fabric = Arc::new(ClientFabric::default());
        let function = VirtioPciDevice::new(VirtioPciParts {
            device,
            memory: memory.handle(),
            fabric: Arc::clone(&fabric) as _,
            spawner,
        })?;
        Ok(Self {
            function,
            memory,
            fabric,
            stopped: false,
            outgoing: Outgoing::default(),
            incoming: Incoming::default(),
            last_size: FIRST_GUESS,
        })
    }

    /// Size of a region in bytes; 0 where there is none.
    fn region_size(&self, index: u32) -> u64 {
        if index == PCI_CONFIG_REGION {
            return CONFIG_SPACE_SIZE as u64;
        }
        let bars = self.function.bars();
        let bar = bars.iter().find(|bar| u32::from(bar.index) == index);
        bar.map_or(0, |bar| bar.size)
    }

    /// Runs `work` while no thread of the device runs.
    fn while_still<T>(&mut self, work: impl FnOnce(&mut Self) -> T) -> T {
        if self.stopped {
            return work(self);
        }
        // Even a pause that failed leaves no thread running; the function has then told its
        // driver that it needs a reset, as it does if it cannot go on.
        log("pause", self.function.pause());
        let result = work(self);
        log("resume", self.function.resume());
        result
    }

    fn save(&mut self) -> Result<Vec<u8>, Errno> {
        let state = self.function.save().map_err(|error| {
            log("save", Err(error));
            Errno::IO
        })?;
        self.last_size = u64::try_from(state.len()).unwrap_or(u64::MAX);
        Ok(state)
    }

    /// Begins a data session with a first cut of the state.
    fn begin_precopy(&mut self) -> Result<(), ArcFailure> {
        let state = self
            .while_still(Self::save)
            .map_err(ArcFailure::Unchanged)?;
        self.outgoing.clear();
        self.outgoing.push(Kind::Early, &state);
        Ok(())
    }

    /// Adds the state of the device, which stands still.
    fn begin_stop_copy(&mut self) -> Result<(), ArcFailure> {
        let state = self.save().map_err(ArcFailure::Unchanged)?;
        self.outgoing.push(Kind::Final, &state);
        Ok(())
    }

    fn halt(&mut self) -> Result<(), ArcFailure> {
        let stopped = self.function.pause();
        self.stopped = true;
        stopped.map_err(broken("stopping"))
    }

    fn go_on(&mut self) -> Result<(), ArcFailure> {
        self.stopped = false;
        self.function.resume().map_err(broken("starting"))
    }

    fn loaded(&mut self) -> Result<(), ArcFailure> {
        let complete = self.incoming.is_complete();
        self.incoming = Incoming::default();
        match complete {
            true => Ok(()),
            // It may have taken part of the state.
            false => Err(ArcFailure::Broken(Errno::INVAL)),
        }
    }
}

fn log(operation: &'static str, result: Result<(), StateError>) {
    if let Err(error) = result {
        let cause = std::error::Error::source(&error).map(ToString::to_string);
        tracing::error!(operation, %error, cause, "device operation failed");
    }
}

fn broken(operation: &'static str) -> impl Fn(StateError) -> ArcFailure {
    move |error| {
        log(operation, Err(error));
        ArcFailure::Broken(Errno::IO)
    }
}

/// Cuts an access into naturally aligned ones of 1, 2, 4 or (up to `most`) 8 bytes: offset in the
/// region and in the data, and length.
fn accesses(offset: u64, len: usize, most: usize) -> impl Iterator<Item = (u64, usize, usize)> {
    let mut at = 0;
    std::iter::from_fn(move || {
        if at >= len {
            return None;
        }
        let place = offset.checked_add(u64::try_from(at).ok()?)?;
        let mut size = most;
        while size > len - at || !place.is_multiple_of(u64::try_from(size).unwrap_or(1)) {
            size /= 2;
        }
        let access = (place, at, size);
        at += size;
        Some(access)
    })
}

impl ServerDevice for NicDevice {
    fn info(&self) -> DeviceInfo {
        DeviceInfo {
            flags: DeviceFlags::PCI | DeviceFlags::RESET,
            num_regions: PCI_NUM_REGIONS,
            num_irqs: PCI_NUM_IRQS,
        }
    }

    fn region_info(&mut self, index: u32) -> Result<RegionInfo, Errno> {
        let size = self.region_size(index);
        let flags = match size {
            0 => RegionFlags::empty(),
            _ => RegionFlags::READ | RegionFlags::WRITE,
        };
        Ok(RegionInfo {
            flags,
            size,
            mapping: None,
        })
    }

    fn region_io_fds(&mut self, index: u32) -> Result<Vec<IoEventFd>, Errno> {
        let doorbells = self.function.doorbells().into_iter();
        let here = doorbells.filter(|doorbell| u32::from(doorbell.bar) == index);
        here.map(|doorbell| {
            Ok(IoEventFd {
                offset: doorbell.offset,
                size: u64::from(doorbell.size),
                datamatch: doorbell.datamatch,
                fd: crate::os::duplicate(&doorbell.eventfd).map_err(|_| Errno::MFILE)?,
            })
        })
        .collect()
    }

    fn irq_info(&mut self, index: u32) -> Result<IrqInfo, Errno> {
        Ok(IrqInfo {
            flags: IrqFlags::EVENTFD,
            count: match index {
                PCI_MSIX_IRQ => self.fabric.vectors(),
                _ => 0,
            },
        })
    }

    fn set_irqs(&mut self, request: IrqRequest) -> Result<(), Errno> {
        let IrqRequest {
            start,
            count,
            action,
            data,
            ..
        } = request;
        match (action, data) {
            (IrqAction::Trigger, IrqData::EventFds(fds)) if fds.is_empty() => {
                self.fabric.disconnect(start, count);
                Ok(())
            }
            (IrqAction::Trigger, IrqData::EventFds(fds)) => self.fabric.connect(start, fds),
            (IrqAction::Trigger, IrqData::All) if count == 0 => {
                self.fabric.disconnect_all();
                Ok(())
            }
            (IrqAction::Trigger, IrqData::All) => self.fabric.trigger(start, count),
            (IrqAction::Trigger, IrqData::Some(which)) => {
                for (vector, wanted) in (start..).zip(which) {
                    if wanted {
                        self.fabric.trigger(vector, 1)?;
                    }
                }
                Ok(())
            }
            // Vectors are masked at the client.
            (IrqAction::Mask | IrqAction::Unmask, _) => Err(Errno::OPNOTSUPP),
        }
    }

    fn region_read(&mut self, region: u32, offset: u64, data: &mut [u8]) -> Result<(), Errno> {
        let config = region == PCI_CONFIG_REGION;
        for (place, at, size) in accesses(offset, data.len(), if config { 4 } else { 8 }) {
            let part = data.get_mut(at..at + size).ok_or(Errno::INVAL)?;
            if config {
                let place = u16::try_from(place).map_err(|_| Errno::INVAL)?;
                self.function.read_config(place, part);
            } else {
                let bar = u8::try_from(region).map_err(|_| Errno::INVAL)?;
                self.function.read_bar(bar, place, part);
            }
        }
        Ok(())
    }

    fn region_write(&mut self, region: u32, offset: u64, data: &[u8]) -> Result<(), Errno> {
        let config = region == PCI_CONFIG_REGION;
        for (place, at, size) in accesses(offset, data.len(), if config { 4 } else { 8 }) {
            let part = data.get(at..at + size).ok_or(Errno::INVAL)?;
            if config {
                let place = u16::try_from(place).map_err(|_| Errno::INVAL)?;
                self.function.write_config(place, part);
            } else {
                let bar = u8::try_from(region).map_err(|_| Errno::INVAL)?;
                self.function.write_bar(bar, place, part);
            }
        }
        Ok(())
    }

    fn dma_map(&mut self, mapping: DmaMapping) -> Result<(), Errno> {
        self.memory.map(mapping)
    }

    fn dma_unmap(&mut self, iova: u64, size: u64) -> Result<(), Errno> {
        // A worker looks the memory up anew when it has been started again.
        self.while_still(|this| this.memory.unmap(iova, size))
    }

    fn reset(&mut self) -> Result<(), Errno> {
        self.function.reset();
        self.stopped = false;
        self.outgoing.clear();
        self.incoming = Incoming::default();
        // A reset leaves a paused function paused; there is no driver to serve yet.
        self.function.resume().map_err(|error| {
            log("reset", Err(error));
            Errno::IO
        })
    }

    fn migration(&mut self) -> Option<&mut dyn MigrationDevice> {
        Some(self)
    }

    fn dma_log(&mut self) -> Option<&mut dyn DmaLogDevice> {
        Some(self)
    }

    fn attach(&mut self, _memory: ByMessage) {
        // All client memory is mapped by file.
    }

    fn detach(&mut self) {
        // Ends the workers, which may be using the memory.
        self.function.reset();
        self.memory.clear();
        self.fabric.disconnect_all();
    }
}

impl MigrationDevice for NicDevice {
    fn flags(&self) -> MigrationFlags {
        MigrationFlags::all()
    }

    fn arc(&mut self, arc: StateArc) -> Result<(), ArcFailure> {
        tracing::debug!(%arc, "migration state");
        match arc {
            StateArc::RunningToPreCopy | StateArc::RunningP2pToPreCopyP2p => self.begin_precopy(),
            StateArc::PreCopyToRunning
            | StateArc::PreCopyP2pToRunningP2p
            | StateArc::StopCopyToStop => {
                self.outgoing.clear();
                Ok(())
            }
            // It does no peer-to-peer DMA, so there is none to stop.
            StateArc::RunningToRunningP2p
            | StateArc::RunningP2pToRunning
            | StateArc::PreCopyToPreCopyP2p
            | StateArc::PreCopyP2pToPreCopy => Ok(()),
            StateArc::RunningP2pToStop | StateArc::RunningToStop => self.halt(),
            StateArc::StopToRunningP2p | StateArc::StopToRunning => self.go_on(),
            StateArc::PreCopyP2pToStopCopy | StateArc::PreCopyToStopCopy => {
                self.halt()?;
                self.begin_stop_copy()
            }
            StateArc::StopToStopCopy => {
                self.outgoing.clear();
                self.begin_stop_copy()
            }
            StateArc::StopToResuming => {
                self.incoming = Incoming::default();
                Ok(())
            }
            StateArc::ResumingToStop => self.loaded(),
        }
    }

    fn read_data(&mut self, data: &mut [u8]) -> Result<usize, Errno> {
        Ok(self.outgoing.read(data))
    }

    fn write_data(&mut self, data: &[u8]) -> Result<(), Errno> {
        let function = &mut self.function;
        self.incoming
            .take(data, VirtioPciDevice::MAX_STATE_BYTES, |state| {
                function.restore(state).map_err(|error| {
                    log("restore", Err(error));
                    Errno::INVAL
                })
            })
    }

    fn stop_copy_size(&mut self) -> Result<u64, Errno> {
        let unread = u64::try_from(self.outgoing.left()).unwrap_or(u64::MAX);
        Ok(match self.stopped {
            true => unread,
            false => self.last_size.saturating_add(unread),
        })
    }

    /// The first cut is all there is: what changes after it is in the final record.
    fn precopy_info(&mut self) -> Result<PrecopyInfo, Errno> {
        Ok(PrecopyInfo {
            initial_bytes: u64::try_from(self.outgoing.left()).unwrap_or(u64::MAX),
            dirty_bytes: 0,
            reinit: false,
        })
    }
}

impl DmaLogDevice for NicDevice {
    fn start(&mut self, _page_size: u64, ranges: &[Area]) -> Result<u64, Errno> {
        Ok(self.memory.start_log(ranges))
    }

    fn stop(&mut self) -> Result<(), Errno> {
        self.memory.stop_log();
        Ok(())
    }

    fn report(
        &mut self,
        iova: u64,
        length: u64,
        page_size: u64,
        words: &mut [u64],
    ) -> Result<(), Errno> {
        self.memory.report(iova, length, page_size, words)
    }
}
