//! The backend over a vfio-user server.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::sync::Arc;

use devices::{ThreadKind, ThreadSpawner};
use vfio_user::client::FeatureOperation;
use vfio_user::wire::MAX_LOG_RANGES;
use vfio_user::{
    Area, Client, ClientConfig, ClientError, DeviceInfo, DeviceState, DmaFlags, DmaHandler, Errno,
    Feature, IoEventFd, MigrationFlags, PrecopyInfo, RegionInfo,
};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryRegion};
use vm_migration::memory::{GuestRegion, MemoryHandle};
use vm_migration::{ErrorChain, Gpa, IovaBitmap, IovaRange, PageSize, RamRegion};

use crate::backend::{Backend, BackendError, IrqKind, SharedLog};

/// Told once when the device is gone, on the connection's thread; must not call the device.
pub type GoneCallback = Box<dyn FnOnce(&BackendError) + Send>;

/// A device in another process, behind a unix socket.
pub struct VfioUserBackend {
    client: Client,
}

impl VfioUserBackend {
    /// Connects to the server at `socket`. `memory` serves a server that reads or writes guest
    /// memory by message, and logs what it writes.
    ///
    /// # Errors
    /// [`ClientError`], which names the socket.
    pub fn connect(
        socket: &Path,
        memory: MemoryHandle,
        spawner: &ThreadSpawner,
        on_gone: GoneCallback,
    ) -> Result<Self, ClientError> {
        let config = client_config(memory, spawner, on_gone);
        Ok(Self {
            client: Client::connect(socket, config)?,
        })
    }

    /// The same over a client that is connected already.
    pub const fn from_client(client: Client) -> Self {
        Self { client }
    }
}

/// Settings of a client for [`VfioUserBackend::from_client`].
pub fn client_config(
    memory: MemoryHandle,
    spawner: &ThreadSpawner,
    on_gone: GoneCallback,
) -> ClientConfig {
    let spawner = spawner.clone();
    ClientConfig {
        dma: Some(Arc::new(GuestDma(memory))),
        on_gone: Some(Box::new(move |error| {
            let chain = io::Error::other(ErrorChain(error).to_string());
            on_gone(&BackendError::Gone(Box::new(chain)));
        })),
        spawn: Box::new(move |name, body| spawner.spawn(ThreadKind::VfioUser, name, body)),
        ..ClientConfig::default()
    }
}

/// Guest memory for a server that has no file for it.
struct GuestDma(MemoryHandle);

impl DmaHandler for GuestDma {
    fn read(&self, iova: u64, data: &mut [u8]) -> Result<(), Errno> {
        self.0
            .memory()
            .read_slice(data, GuestAddress(iova))
            .map_err(|_| Errno::FAULT)
    }

    fn write(&self, iova: u64, data: &[u8]) -> Result<(), Errno> {
        // Marks the write log as every write through vm-memory does.
        self.0
            .memory()
            .write_slice(data, GuestAddress(iova))
            .map_err(|_| Errno::FAULT)
    }
}

/// Puts a client's error into the seam's terms.
fn failed(operation: &'static str) -> impl Fn(ClientError) -> BackendError {
    move |error| match error {
        ClientError::ServerGone { .. } => BackendError::Gone(Box::new(error)),
        _ => BackendError::Failed {
            operation,
            cause: Box::new(error),
        },
    }
}

impl Backend for VfioUserBackend {
    fn info(&self) -> Result<DeviceInfo, BackendError> {
        self.client.info().map_err(failed("describe itself"))
    }

    fn region(&self, index: u32) -> Result<RegionInfo, BackendError> {
        let result = self.client.region_info(index);
        result.map_err(failed("describe a region"))
    }

    fn io_events(&self, index: u32, size: u64) -> Result<Vec<IoEventFd>, BackendError> {
        match self.client.region_io_fds(index, size) {
            // Optional in the protocol: accesses then go by message.
            Err(ClientError::Refused { .. }) => Ok(Vec::new()),
            other => other.map_err(failed("give its doorbells")),
        }
    }

    fn region_read(&self, region: u32, offset: u64, data: &mut [u8]) -> Result<(), BackendError> {
        let result = self.client.region_read(region, offset, data);
        result.map_err(failed("read a region"))
    }

    fn region_write(&self, region: u32, offset: u64, data: &[u8]) -> Result<(), BackendError> {
        let result = self.client.region_write(region, offset, data);
        result.map_err(failed("write a region"))
    }

    fn enable_irqs(&self, kind: IrqKind, eventfds: &[BorrowedFd<'_>]) -> Result<(), BackendError> {
        let result = self.client.set_irq_eventfds(kind.index(), 0, eventfds);
        result.map_err(failed("take its interrupt eventfds"))
    }

    fn disable_irqs(&self, kind: IrqKind) -> Result<(), BackendError> {
        let result = self.client.clear_irqs(kind.index());
        result.map_err(failed("switch its interrupts off"))
    }

    fn map(&self, region: &GuestRegion) -> Result<(), BackendError> {
        let gpa = Gpa(region.start_addr().0);
        let file = region.file_offset();
        let file = file.ok_or(BackendError::NotShared { gpa })?;
        let flags = DmaFlags::READ | DmaFlags::WRITE;
        let place = Some((file.file().as_fd(), file.start()));
        let result = self.client.dma_map(gpa.0, region.len(), flags, place);
        result.map_err(failed("map guest memory"))
    }

    fn unmap(&self, ram: RamRegion) -> Result<(), BackendError> {
        let result = self.client.dma_unmap(ram.gpa.0, ram.len);
        result.map_err(failed("unmap guest memory"))
    }

    fn reset(&self) -> Result<(), BackendError> {
        self.client.reset().map_err(failed("reset"))
    }

    fn migration(&self) -> Result<Option<MigrationFlags>, BackendError> {
        let result = self.client.migration_flags();
        result.map_err(failed("describe its migration"))
    }

    fn state(&self) -> Result<DeviceState, BackendError> {
        let result = self.client.device_state();
        result.map_err(failed("tell its migration state"))
    }

    fn set_state(&self, state: DeviceState) -> Result<(), BackendError> {
        let result = self.client.set_device_state(state);
        result.map_err(failed("change its migration state"))
    }

    fn precopy_info(&self) -> Result<Option<PrecopyInfo>, BackendError> {
        let result = self.client.precopy_info();
        result.map_err(failed("tell what there is to read of it"))
    }

    fn stop_copy_size(&self) -> Result<Option<u64>, BackendError> {
        let result = self.client.stop_copy_size();
        result.map_err(failed("estimate its state"))
    }

    fn read_data(&self, data: &mut [u8]) -> Result<usize, BackendError> {
        let most = data.len().min(self.client.server().data_xfer());
        let result = self
            .client
            .read_migration_data(data.get_mut(..most).unwrap_or_default());
        result.map_err(failed("give its state"))
    }

    fn write_data(&self, data: &[u8]) -> Result<(), BackendError> {
        let result = self.client.write_migration_data(data);
        result.map_err(failed("take its state"))
    }

    fn can_log(&self) -> Result<bool, BackendError> {
        use FeatureOperation::{Get, Set};
        for (feature, operation) in [
            (Feature::DmaLoggingStart, Set),
            (Feature::DmaLoggingReport, Get),
        ] {
            let has = self.client.probe_feature(feature, operation);
            if !has.map_err(failed("describe its dirty log"))? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn max_log_ranges(&self) -> usize {
        MAX_LOG_RANGES
    }

    fn start_log(&self, page: PageSize, ranges: &[IovaRange]) -> Result<PageSize, BackendError> {
        let operation = "start its dirty log";
        let mut areas = Vec::with_capacity(ranges.len());
        for range in ranges {
            let size = range.len().ok_or_else(|| BackendError::Failed {
                operation,
                cause: "a range of all 2^64 addresses cannot be logged".into(),
            })?;
            areas.push(Area {
                offset: range.first().0,
                size,
            });
        }
        let chosen = self
            .client
            .start_dma_logging(page.bytes(), &areas)
            .map_err(failed(operation))?;
        PageSize::new(chosen).ok_or_else(|| BackendError::Failed {
            operation,
            cause: "it chose a page size that is not a power of two".into(),
        })
    }

    fn stop_log(&self) -> Result<(), BackendError> {
        let result = self.client.stop_dma_logging();
        result.map_err(failed("stop its dirty log"))
    }

    fn report_log(&self, bitmap: &mut IovaBitmap) -> Result<(), BackendError> {
        let operation = "report its dirty log";
        let (range, page) = (bitmap.range(), bitmap.page_size().bytes());
        let len = range.len().ok_or_else(|| BackendError::Failed {
            operation,
            cause: "a range of all 2^64 addresses cannot be reported".into(),
        })?;
        let result = self
            .client
            .report_dma_log(range.first().0, len, page, bitmap.words_mut());
        result.map_err(failed(operation))
    }

    fn shared_log(&self) -> Option<Arc<dyn SharedLog>> {
        None
    }
}

#[cfg(test)]
mod tests;
