//! The function as bus, VMM and migration see it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use devices::MsiFabric;
use parking_lot::Mutex;
use pci::config::{command, offset};
use pci::{BarInfo, Doorbell, PciDevice};
use vfio_user::wire::PCI_CONFIG_REGION;
use vfio_user::{IoEventFd, MigrationFlags};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
use vm_migration::memory::GuestMemory;
use vm_migration::{ErrorChain, Gpa, RamRegion, StateError};

use crate::areas::{MappableArea, mappable};
use crate::backend::{Backend, BackendError, SharedLog};
use crate::front::{Front, FrontError, Layout, MsixLayout};
use crate::irqs::Irqs;
use crate::profile::DeviceProfile;
use crate::rung::{DirtyRung, FoundLog};
use crate::sink::PassthroughSink;
use crate::source::PassthroughSource;

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

pub(crate) struct Inner {
    pub(crate) id: String,
    pub(crate) backend: Arc<dyn Backend>,
    pub(crate) profile: DeviceProfile,
    /// Never held across a call of the backend but where the guest stands still.
    pub(crate) front: Mutex<Front>,
    layout: Layout,
    irqs: Irqs,
    doorbells: Vec<Doorbell>,
    areas: Vec<MappableArea>,
    mapped: Mutex<Vec<RamRegion>>,
    gone: AtomicBool,
    /// Whether the device logs what it writes, once it was asked.
    logs: OnceLock<bool>,
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
        // Its registers answer only while it decodes memory.
        backend
            .region_write(
                PCI_CONFIG_REGION,
                u64::from(offset::COMMAND),
                &command::MEMORY.to_le_bytes(),
            )
            .map_err(failed("having it decode memory"))?;
        let migration = backend
            .migration()
            .map_err(failed("asking for migration"))?;
        let (front, layout, irqs) =
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
        let msi = layout.msi.map_or(0, |msi| msi.vectors);
        let vectors = layout.msix.as_ref().map_or(msi, |msix| msix.vectors);
        let profile = DeviceProfile::read(&*backend, &front.config, vectors, migration)
            .map_err(failed("describing it for a migration"))?;
        Ok(Self {
            inner: Arc::new(Inner {
                id: id.to_owned(),
                backend,
                profile,
                front: Mutex::new(front),
                layout,
                irqs,
                doorbells,
                areas,
                mapped: Mutex::default(),
                gone: AtomicBool::new(false),
                logs: OnceLock::new(),
            }),
        })
    }

    /// Lets the device access all of guest memory.
    ///
    /// # Errors
    /// [`BackendError::NotShared`] if some of it is private to this process and the device is in
    /// another; the device's.
    pub fn map_memory(&self, memory: &GuestMemory) -> Result<(), PassthroughError> {
        for region in memory.iter() {
            self.inner
                .backend
                .map(region)
                .map_err(|cause| self.failed("mapping guest memory", cause))?;
            self.inner.mapped.lock().push(RamRegion {
                gpa: Gpa(region.start_addr().0),
                len: region.len(),
            });
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
        self.inner
            .reset()
            .map_err(|cause| self.failed("reset", cause))
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

    /// Where a migration can learn which pages the device writes; `consent`: it may be nowhere.
    ///
    /// # Errors
    /// [`StateError::Unsupported`] if there is nothing and no consent; the device's.
    pub fn dirty_rung(&self, consent: bool) -> Result<DirtyRung, StateError> {
        Ok(self.find_log(consent)?.rung())
    }

    pub(crate) fn find_log(&self, consent: bool) -> Result<FoundLog, StateError> {
        let inner = &self.inner;
        if inner.logs()? {
            return Ok(FoundLog::Device);
        }
        let fits = |log: &Arc<dyn SharedLog>| {
            let mut mapped = inner.mapped().into_iter();
            mapped.all(|ram| ram.len <= log.max_region())
        };
        if let Some(log) = inner.backend.shared_log().filter(fits) {
            return Ok(FoundLog::Shared(log));
        }
        match consent {
            true => Ok(FoundLog::Nowhere),
            false => Err(StateError::Unsupported {
                id: inner.id.clone(),
                operation: "logging the pages the device writes",
                remedy: "unplug the device before the migration (vm.remove-device); or consent \
                         with dirty=all (a device of this host) to all memory being copied while \
                         the guest stands still"
                    .to_owned(),
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

    /// Whether it logs what it writes. Asked once: to find out may take a log, which must not be
    /// one of a migration.
    fn logs(&self) -> Result<bool, StateError> {
        if let Some(known) = self.logs.get() {
            return Ok(*known);
        }
        let told = self.backend.can_log();
        let told = told.map_err(|cause| self.failed("asking for its dirty log", cause))?;
        Ok(*self.logs.get_or_init(|| told))
    }

    pub(crate) fn flags(&self) -> Result<MigrationFlags, StateError> {
        self.profile
            .migration
            .ok_or_else(|| StateError::Unsupported {
                id: self.id.clone(),
                operation: "migration",
                remedy: "unplug the device before the migration (vm.remove-device)".to_owned(),
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

    /// Resets the device and what the VMM keeps of it.
    pub(crate) fn reset(&self) -> Result<(), BackendError> {
        self.front.lock().reset();
        // A device that is reset under interrupts that are set up may raise one into nothing.
        let silent = self.silence();
        self.backend.reset()?;
        // A reset that the device does not have leaves it as bus master.
        self.send_command();
        silent
    }

    /// Has the device raise no interrupts.
    pub(crate) fn silence(&self) -> Result<(), BackendError> {
        self.irqs.follow(&*self.backend, None)
    }

    /// Has the device interrupt as the front says.
    pub(crate) fn follow_irqs(&self) -> Result<(), BackendError> {
        let wanted = self.front.lock().wanted_irqs();
        self.irqs.follow(&*self.backend, wanted)
    }

    /// The same after a write of the guest's, which has no way to fail.
    fn follow_irqs_or_log(&self) {
        if !self.is_gone()
            && let Err(error) = self.follow_irqs()
        {
            self.note(&error);
            let error = ErrorChain(&error).to_string();
            tracing::error!(
                device = self.id,
                error,
                "the guest gets no interrupts of it"
            );
        }
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
            self.front.lock().read_config(at, ours);
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
            front.follow_registers();
        }
        // The command register and the MSI-X enable bit are the device's business too.
        if touches(at, data, offset::COMMAND, 2) {
            self.send_command();
        }
        if let Some(msix) = &self.layout.msix
            && touches(at, data, msix.capability.saturating_add(2), 2)
        {
            self.send_msix_control(msix);
            self.follow_irqs_or_log();
        }
        if let Some(msi) = self.layout.msi
            && touches(at, data, msi.capability, msi.len.into())
        {
            self.follow_irqs_or_log();
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
