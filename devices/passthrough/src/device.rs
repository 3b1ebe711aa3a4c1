//! The function as bus, VMM and migration see it.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use devices::MsiFabric;
use parking_lot::Mutex;
use pci::config::offset;
use pci::{BarInfo, Doorbell, PciDevice};
use vfio_user::wire::PCI_CONFIG_REGION;
use vfio_user::{IoEventFd, MigrationFlags, RegionMapping};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
use vm_migration::memory::GuestMemory;
use vm_migration::{Gpa, RamRegion, StateError, Translated};

use crate::backend::{Backend, BackendError};
use crate::dirty::PassthroughDirty;
use crate::front::{Front, FrontError, Layout, MsixLayout};
use crate::profile::DeviceProfile;
use crate::sink::PassthroughSink;
use crate::source::PassthroughSource;

/// Page size of mappings of BARs into the guest.
const PAGE: u64 = 4096;

/// Why a device cannot be passed through.
#[derive(Debug, thiserror::Error)]
pub enum PassthroughError {
    /// The device cannot be shown to the guest.
    #[error("{id}: the device cannot be passed through")]
    Front {
        /// Identifier of the device.
        id: String,
        /// Why.
        #[source]
        cause: FrontError,
    },
    /// Guest memory is not in files that can be given to the device.
    #[error(
        "{id}: guest memory at {gpa} cannot be shared with the device: start with --memory shared=on"
    )]
    NotShared {
        /// Identifier of the device.
        id: String,
        /// Where the private memory is.
        gpa: Gpa,
    },
    /// The device failed.
    #[error("{id}: {operation} failed")]
    Backend {
        /// Identifier of the device.
        id: String,
        /// What was tried.
        operation: &'static str,
        /// What it said.
        #[source]
        cause: BackendError,
    },
}

/// A part of a BAR that may be mapped into the guest: accesses then cause no exit.
#[derive(Clone, Debug)]
pub struct MappableArea {
    /// BAR index.
    pub bar: u8,
    /// Offset in the BAR in bytes.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// The file to map.
    pub file: Arc<OwnedFd>,
    /// Offset in the file of the area's first byte.
    pub file_offset: u64,
}

pub(crate) struct Inner {
    pub(crate) id: String,
    pub(crate) backend: Arc<dyn Backend>,
    pub(crate) profile: DeviceProfile,
    /// Never held across a call of the backend but where the guest stands still.
    pub(crate) front: Mutex<Front>,
    layout: Layout,
    doorbells: Vec<Doorbell>,
    areas: Vec<MappableArea>,
    mapped: Mutex<Vec<RamRegion>>,
    gone: AtomicBool,
}

/// A device passed through to the guest; clones are handles on the same one.
#[derive(Clone)]
pub struct Passthrough {
    pub(crate) inner: Arc<Inner>,
}

impl Passthrough {
    /// Shows the device behind `backend` to the guest as `id`, with interrupt vectors of `fabric`.
    /// A [`reset`](Self::reset) is to follow: looking at a device leaves traces in it.
    ///
    /// # Errors
    /// [`PassthroughError::Front`], [`PassthroughError::Backend`].
    pub fn new(
        id: &str,
        backend: Arc<dyn Backend>,
        fabric: &dyn MsiFabric,
    ) -> Result<Self, PassthroughError> {
        let failed = |operation| {
            move |cause| PassthroughError::Backend {
                id: id.to_owned(),
                operation,
                cause,
            }
        };
        let migration = backend
            .migration()
            .map_err(failed("asking for migration"))?;
        let (front, layout) =
            Front::new(&*backend, fabric).map_err(|cause| PassthroughError::Front {
                id: id.to_owned(),
                cause,
            })?;
        let mut doorbells = Vec::new();
        let mut areas = Vec::new();
        for bar in front.config.bars() {
            let region = u32::from(bar.index);
            let events = backend.io_events(region, bar.size);
            let events = events.map_err(failed("asking for doorbells"))?;
            doorbells.extend(events.into_iter().map(|event| doorbell(bar.index, event)));
            let info = backend.region(region).map_err(failed("describing a BAR"))?;
            if let Some(mapping) = info.mapping {
                areas.extend(mappable(bar.index, mapping, layout.msix.as_ref()));
            }
        }
        let vectors = layout.msix.as_ref().map_or(0, |msix| msix.vectors);
        let profile = DeviceProfile::read(&*backend, &front.config, vectors, migration)
            .map_err(failed("describing it for a migration"))?;
        Ok(Self {
            inner: Arc::new(Inner {
                id: id.to_owned(),
                backend,
                profile,
                front: Mutex::new(front),
                layout,
                doorbells,
                areas,
                mapped: Mutex::default(),
                gone: AtomicBool::new(false),
            }),
        })
    }

    /// Lets the device access all of guest memory.
    ///
    /// # Errors
    /// [`PassthroughError::NotShared`] if some of it is private to this process; the device's.
    pub fn map_memory(&self, memory: &GuestMemory) -> Result<(), PassthroughError> {
        for region in memory.iter() {
            let gpa = Gpa(region.start_addr().0);
            let file = region
                .file_offset()
                .ok_or_else(|| PassthroughError::NotShared {
                    id: self.inner.id.clone(),
                    gpa,
                })?;
            let ram = RamRegion {
                gpa,
                len: region.len(),
            };
            let fd: BorrowedFd<'_> = file.file().as_fd();
            self.inner
                .backend
                .map(ram, fd, file.start())
                .map_err(|cause| self.failed("mapping guest memory", cause))?;
            self.inner.mapped.lock().push(ram);
        }
        Ok(())
    }

    /// Takes all access to guest memory away again; on return the device makes none.
    ///
    /// # Errors
    /// The device's: it must be thought to access the memory still.
    pub fn unmap_memory(&self) -> Result<(), PassthroughError> {
        loop {
            let Some(ram) = self.inner.mapped.lock().last().copied() else {
                return Ok(());
            };
            self.inner
                .backend
                .unmap(ram)
                .map_err(|cause| self.failed("unmapping guest memory", cause))?;
            self.inner.mapped.lock().pop();
        }
    }

    /// Resets the device and the function, as when the guest reboots. Mapped memory and
    /// interrupts stay.
    ///
    /// # Errors
    /// The device's.
    pub fn reset(&self) -> Result<(), PassthroughError> {
        let reset = self.inner.backend.reset();
        self.inner.front.lock().reset();
        reset.map_err(|cause| self.failed("reset", cause))
    }

    /// Identifier in the VM's configuration.
    pub fn id(&self) -> &str {
        &self.inner.id
    }

    /// What it was when it was connected, for the preflight of a migration.
    pub fn profile(&self) -> &DeviceProfile {
        &self.inner.profile
    }

    /// The parts of its BARs that may be mapped into the guest.
    pub fn mappable_areas(&self) -> &[MappableArea] {
        &self.inner.areas
    }

    /// The pages the device writes, as a source for a migration.
    ///
    /// # Errors
    /// [`StateError::Unsupported`] if the device does not log them.
    pub fn dirty_source(&self) -> Result<Translated<PassthroughDirty>, StateError> {
        let can = self.inner.backend.can_log();
        match can.map_err(|cause| self.inner.failed("asking for its dirty log", cause))? {
            true => {
                let log = PassthroughDirty::new(Arc::clone(&self.inner));
                Ok(Translated::identity(log))
            }
            false => Err(StateError::Unsupported {
                id: self.inner.id.clone(),
                operation: "logging the pages the device writes",
                remedy: "unplug the device before the migration".to_owned(),
            }),
        }
    }

    /// Its state, to be sent.
    ///
    /// # Errors
    /// [`StateError::Unsupported`] if the device cannot be migrated.
    pub fn state_source(&self) -> Result<PassthroughSource, StateError> {
        let flags = self.inner.flags()?;
        Ok(PassthroughSource::new(Arc::clone(&self.inner), flags))
    }

    /// Where its state is received.
    ///
    /// # Errors
    /// [`StateError::Unsupported`] if the device cannot be migrated.
    pub fn state_sink(&self) -> Result<PassthroughSink, StateError> {
        self.inner.flags()?;
        Ok(PassthroughSink::new(Arc::clone(&self.inner)))
    }

    fn failed(&self, operation: &'static str, cause: BackendError) -> PassthroughError {
        PassthroughError::Backend {
            id: self.inner.id.clone(),
            operation,
            cause,
        }
    }
}

impl Inner {
    pub(crate) fn failed(&self, operation: &'static str, cause: BackendError) -> StateError {
        StateError::Failed {
            id: self.id.clone(),
            operation,
            cause: Box::new(cause),
        }
    }

    pub(crate) fn flags(&self) -> Result<MigrationFlags, StateError> {
        self.profile
            .migration
            .ok_or_else(|| StateError::Unsupported {
                id: self.id.clone(),
                operation: "migration",
                remedy: "unplug the device before the migration".to_owned(),
            })
    }

    /// Whether its migration has this feature.
    pub(crate) fn has(&self, feature: MigrationFlags) -> bool {
        let flags = self.profile.migration;
        flags.is_some_and(|flags| flags.contains(feature))
    }

    /// The RAM the device may access.
    pub(crate) fn mapped(&self) -> Vec<RamRegion> {
        self.mapped.lock().clone()
    }

    #[cfg(test)]
    pub(crate) fn map_for_test(&self, ram: RamRegion) {
        self.mapped.lock().push(ram);
    }

    /// Notes and logs once that the device is gone.
    fn note(&self, error: &BackendError) {
        if error.is_gone() {
            if !self.gone.swap(true, Ordering::Relaxed) {
                let cause = std::error::Error::source(error).map(ToString::to_string);
                tracing::error!(
                    device = self.id,
                    cause,
                    "device is gone; it reads as all ones"
                );
            }
        } else {
            let cause = std::error::Error::source(error).map(ToString::to_string);
            // The guest can do this at will, so it must not fill the log.
            tracing::debug!(device = self.id, %error, cause, "access of the guest failed");
        }
    }

    fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Relaxed)
    }

    fn device_read(&self, region: u32, at: u64, data: &mut [u8]) {
        if self.is_gone() {
            return data.fill(0xff);
        }
        if let Err(error) = self.backend.region_read(region, at, data) {
            self.note(&error);
            data.fill(0xff);
        }
    }

    fn device_write(&self, region: u32, at: u64, data: &[u8]) {
        if self.is_gone() {
            return;
        }
        if let Err(error) = self.backend.region_write(region, at, data) {
            self.note(&error);
        }
    }

    fn read_config(&self, at: u16, data: &mut [u8]) {
        let (any, all) = self.layout.emulated.any_all(at, data.len());
        if self.is_gone() {
            return data.fill(0xff);
        }
        if !all {
            self.device_read(PCI_CONFIG_REGION, u64::from(at), data);
        }
        if any {
            let mut ours = [0; 8];
            let ours = ours.get_mut(..data.len()).unwrap_or_default();
            self.front.lock().config.read(at, ours);
            for ((index, byte), mine) in (usize::from(at)..).zip(data.iter_mut()).zip(ours) {
                if self.layout.emulated.has(index) {
                    *byte = *mine;
                }
            }
        }
    }

    fn write_config(&self, at: u16, data: &[u8]) {
        {
            let mut front = self.front.lock();
            front.config.write(at, data);
            front.follow_msix_control();
        }
        // The command register and the MSI-X enable bit are the device's business too.
        if touches(at, data, offset::COMMAND, 2) {
            self.send_command();
        }
        if let Some(msix) = &self.layout.msix
            && touches(at, data, msix.capability.saturating_add(2), 2)
        {
            self.send_msix_control(msix);
        }
        for (index, byte) in (at..).zip(data) {
            if !self.layout.emulated.has(usize::from(index)) {
                // Registers wider than a byte want to be written at once if they can be.
                let (any, _) = self.layout.emulated.any_all(at, data.len());
                if !any {
                    return self.device_write(PCI_CONFIG_REGION, u64::from(at), data);
                }
                self.device_write(PCI_CONFIG_REGION, u64::from(index), &[*byte]);
            }
        }
    }

    fn send_command(&self) {
        let command = self.front.lock().config.command().to_le_bytes();
        self.device_write(PCI_CONFIG_REGION, u64::from(offset::COMMAND), &command);
    }

    fn send_msix_control(&self, msix: &MsixLayout) {
        let at = msix.capability.saturating_add(2);
        let control = self.front.lock().config.u16(at).to_le_bytes();
        self.device_write(PCI_CONFIG_REGION, u64::from(at), &control);
    }

    /// Gives the device the eventfds of its interrupts, again.
    pub(crate) fn send_eventfds(&self) -> Result<(), BackendError> {
        let lines: Vec<_> = match &self.front.lock().msix {
            Some(msix) => (0..msix.vectors())
                .filter_map(|vector| msix.line(vector).cloned())
                .collect(),
            None => return Ok(()),
        };
        let eventfds: Vec<_> = lines
            .iter()
            .map(|line| crate::fd::borrow(line.eventfd()))
            .collect();
        self.backend.set_msix(&eventfds)
    }

    /// Makes the device agree with a front that was restored.
    pub(crate) fn send_front(&self) {
        self.send_command();
        if let Some(msix) = &self.layout.msix {
            self.send_msix_control(msix);
        }
    }
}

/// Whether a write of `data` at `at` touches the register of `len` bytes at `register`.
fn touches(at: u16, data: &[u8], register: u16, len: usize) -> bool {
    let (start, register) = (usize::from(at), usize::from(register));
    start < register + len && register < start + data.len()
}

/// A doorbell of the device in `bar`.
fn doorbell(bar: u8, event: IoEventFd) -> Doorbell {
    Doorbell {
        bar,
        offset: event.offset,
        size: u8::try_from(event.size).unwrap_or(0),
        datamatch: event.datamatch,
        eventfd: crate::fd::into_event(event.fd),
    }
}

/// What of `bar` the guest may reach without an exit.
fn mappable(bar: u8, mapping: RegionMapping, msix: Option<&MsixLayout>) -> Vec<MappableArea> {
    let file = Arc::new(mapping.fd);
    // The sums do not wrap: the client has checked areas and offset against each other.
    let spans = mapping.areas.into_iter().flat_map(|area| {
        let span = (area.offset, area.offset + area.size);
        without_msix(bar, span, msix)
    });
    spans
        .map(|(start, end)| MappableArea {
            bar,
            offset: start,
            len: end - start,
            file: Arc::clone(&file),
            file_offset: mapping.offset + start,
        })
        .collect()
}

/// The parts of `span` in `bar` whose pages hold no MSI-X structure: those must be trapped.
fn without_msix(bar: u8, span: (u64, u64), msix: Option<&MsixLayout>) -> Vec<(u64, u64)> {
    let mut spans = vec![span];
    for place in msix.into_iter().flat_map(|msix| [msix.table, msix.pending]) {
        if place.bar != bar {
            continue;
        }
        let hole = (
            place.offset / PAGE * PAGE,
            (place.offset + place.len).next_multiple_of(PAGE),
        );
        spans = spans
            .into_iter()
            .flat_map(|(start, end)| [(start, end.min(hole.0)), (start.max(hole.1), end)])
            .filter(|(start, end)| start < end)
            .collect();
    }
    spans
}

impl PciDevice for Passthrough {
    fn id(&self) -> &str {
        &self.inner.id
    }

    fn read_config(&mut self, offset: u16, data: &mut [u8]) {
        self.inner.read_config(offset, data);
    }

    fn write_config(&mut self, offset: u16, data: &[u8]) {
        self.inner.write_config(offset, data);
    }

    fn bars(&self) -> Vec<BarInfo> {
        self.inner.front.lock().config.bars()
    }

    fn set_bar_address(&mut self, index: u8, address: u64) {
        self.inner
            .front
            .lock()
            .config
            .set_bar_address(index, address);
    }

    fn memory_enabled(&self) -> bool {
        self.inner.front.lock().config.memory_enabled()
    }

    fn read_bar(&mut self, bar: u8, offset: u64, data: &mut [u8]) {
        let inner = &self.inner;
        if let Some(layout) = &inner.layout.msix {
            let table = layout.table.within(bar, offset);
            let pending = layout.pending.within(bar, offset);
            if table.is_some() || pending.is_some() {
                if inner.is_gone() {
                    return data.fill(0xff);
                }
                if let Some(msix) = &inner.front.lock().msix {
                    match (table, pending) {
                        (Some(at), _) => msix.read_table(at, data),
                        (None, at) => msix.read_pending(at.unwrap_or(0), data),
                    }
                }
                return;
            }
        }
        inner.device_read(u32::from(bar), offset, data);
    }

    fn write_bar(&mut self, bar: u8, offset: u64, data: &[u8]) {
        let inner = &self.inner;
        if let Some(layout) = &inner.layout.msix {
            if let Some(at) = layout.table.within(bar, offset) {
                if let Some(msix) = &mut inner.front.lock().msix {
                    msix.write_table(at, data);
                }
                return;
            }
            if layout.pending.within(bar, offset).is_some() {
                return;
            }
        }
        inner.device_write(u32::from(bar), offset, data);
    }

    fn doorbells(&self) -> Vec<Doorbell> {
        let mut doorbells = Vec::with_capacity(self.inner.doorbells.len());
        for doorbell in &self.inner.doorbells {
            match doorbell.eventfd.try_clone() {
                Ok(eventfd) => doorbells.push(Doorbell {
                    eventfd,
                    ..*doorbell
                }),
                // The write then goes by message.
                Err(error) => {
                    tracing::warn!(device = self.inner.id, %error, "doorbell stays in user space");
                }
            }
        }
        doorbells
    }
}

#[cfg(test)]
mod tests;
