//! The source's side: a thread that moves the guest away.

use std::sync::Arc;
use std::thread::JoinHandle;

use devices::rtc;
use devices::serial;
use devices::thread::{ThreadKind, ThreadSpawner};
use event_monitor::{Event, EventMonitor};
use hypervisor::DirtyLog;
use parking_lot::Mutex;
use vm_migration::migrate::{
    self, CancelHandle, Manifest, MigrationEvent, MigrationStatus, Report, Side, SourceParts,
    SourcePhase, Status, TooLate,
};
use vm_migration::{DirtySource, ErrorChain, SnapshotSource, StateSource, VmmWriteSource};

use super::MigrateError;
use super::describe as description;
use super::dirty::VcpuDirty;
use crate::api::{DirtySourceInfo, SendMigrationConfig};
use crate::config::VmConfig;
use crate::machine::{
    BusState, CHIPS_ID, CPUS_ID, CpuState, CpuSwitch, HOTPLUG_ID, Machine, PCI_ID,
    PassthroughFunction, PlugState, VmChips,
};
use crate::migration_events;
use crate::notice::NoticeSender;

/// A migration away from here that is going on, or has ended.
pub struct Sending {
    status: Arc<Status>,
    cancel: CancelHandle,
    thread: Option<JoinHandle<()>>,
    dirty_sources: Vec<DirtySourceInfo>,
}

impl Sending {
    /// Starts moving `machine` to where `request` says. How it ends is told to `done`.
    ///
    /// # Errors
    /// When something of the VM cannot be migrated at all, or there is no thread.
    pub fn start(
        machine: &Machine,
        config: &VmConfig,
        request: SendMigrationConfig,
        tools: &Tools,
    ) -> Result<Self, MigrateError> {
        let manifest = description::manifest(machine, config)?;
        let dirty = dirty_sources(&manifest, machine)?;
        let mut parts = SourceParts::new(
            manifest,
            machine.ram().handle().clone(),
            dirty,
            state_sources(machine),
            Box::new(CpuSwitch(Arc::clone(machine.vcpus()))),
        )
        .map_err(MigrateError::Engine)?;
        parts.report_threads = report_threads();
        let address = request.destination().map_err(MigrateError::Address)?;
        let params = request.params();
        let status = Status::new(Side::Source(SourcePhase::Preflight));
        let cancel = CancelHandle::new().map_err(MigrateError::Resources)?;
        let (own_status, own_cancel) = (Arc::clone(&status), cancel.clone());
        let (events, done) = (tools.events.clone(), tools.done.clone());
        events.tell(Event::MigrationStarted);
        let passthrough = machine.devices().passthrough().iter();
        let dirty_sources: Vec<_> = passthrough.map(PassthroughFunction::dirty_source).collect();
        for DirtySourceInfo { id, source, why } in dirty_sources.iter().cloned() {
            events.tell(Event::MigrationDirtySource { id, source, why });
        }
        let body = move || {
            let mut tell = |event: &MigrationEvent| {
                // That is said when what the guest leaves behind is gone.
                if !matches!(
                    event,
                    MigrationEvent::Phase(Side::Source(SourcePhase::Done))
                ) {
                    migration_events::tell(&events, event);
                }
            };
            let result = migrate::transport::connect(&address, &own_cancel)
                .map_err(|error| {
                    let why = ErrorChain(&error).to_string();
                    super::failed_early(
                        &own_status,
                        &events,
                        Side::Source(SourcePhase::Aborted { why }),
                    );
                    MigrateError::Transport(error)
                })
                .and_then(|connection| {
                    migrate::source::run(&mut parts, connection, &params, &own_status, &mut tell)
                        .map_err(MigrateError::Engine)
                });
            // The parts hold the machine's devices: they are let go of before the control loop does,
            // or go to it.
            done.send(result.map_err(|error| SendFailure::new(error, parts)));
        };
        let thread = tools
            .spawner
            .spawn(ThreadKind::MigrationSend, "migration-send", body)
            .map_err(MigrateError::Resources)?;
        Ok(Self {
            status,
            cancel,
            thread: Some(thread),
            dirty_sources,
        })
    }

    /// How it is doing.
    pub fn status(&self) -> MigrationStatus {
        self.status.snapshot()
    }

    /// Where it learns which pages each passthrough device writes.
    pub fn dirty_sources(&self) -> &[DirtySourceInfo] {
        &self.dirty_sources
    }

    /// Asks it to stop.
    ///
    /// # Errors
    /// [`TooLate`] once the guest's owner has changed.
    pub fn cancel(&self) -> Result<(), TooLate> {
        self.cancel.cancel()
    }

    /// Waits for the thread, which has told how it ended or is about to.
    pub fn join(&mut self) {
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the migration's thread panicked");
        }
    }
}

/// What a migration's thread needs besides the VM.
pub struct Tools {
    /// Where the thread comes from.
    pub spawner: ThreadSpawner,
    /// Where events go.
    pub events: EventMonitor,
    /// Where the end is told.
    pub done: NoticeSender<Result<Report, SendFailure>>,
}

/// A guest could not be moved.
pub struct SendFailure {
    /// Why.
    pub error: MigrateError,
    /// The guest, if it stands still because nobody here knows whether it runs at the destination.
    /// Else it runs on here.
    pub stranded: Option<Stranded>,
}

impl SendFailure {
    fn new(error: MigrateError, parts: SourceParts) -> Self {
        let paused = error.guest_is_paused();
        Self {
            error,
            stranded: paused.then(|| Stranded(Box::new(parts))),
        }
    }
}

/// A guest that was handed over to a destination which never said that it runs there. Its dirty
/// logs still run and its devices are stopped as for a migration, which only the migration's own
/// parts can undo.
pub struct Stranded(Box<SourceParts>);

impl Stranded {
    /// Lets the guest run here, for an operator who knows that it does not run there. All is
    /// tried; gives what failed.
    pub fn take_back(mut self) -> Vec<String> {
        self.0.take_back()
    }
}

/// How many dirty sources are asked at once: as many as this process has CPUs. They wait for
/// devices and other processes more than they compute, but to more threads than that the guest's
/// vCPUs would lose time.
fn report_threads() -> usize {
    const MOST: u32 = 8;
    let cpus = rustix::thread::sched_getaffinity(None).map_or(1, |set| set.count());
    usize::try_from(cpus.clamp(1, MOST)).unwrap_or(1)
}

/// All writers of guest memory.
fn dirty_sources(
    manifest: &Manifest,
    machine: &Machine,
) -> Result<Vec<Box<dyn DirtySource>>, MigrateError> {
    let regions = machine.ram().regions();
    let log: Arc<dyn DirtyLog> = Arc::clone(machine.vm()) as _;
    let vcpus = VcpuDirty::new(log, machine.slots(), &regions);
    let vmm = VmmWriteSource::new(machine.ram().handle().clone());
    let mut sources: Vec<Box<dyn DirtySource>> = vec![Box::new(vcpus), Box::new(vmm)];
    // Those that cannot be moved are refused by the manifest, which says why. Of all others the
    // writes must be known.
    let memory = machine.ram().handle();
    let backends = machine.devices().virtio().iter();
    for vhost in backends.filter_map(|function| function.vhost.as_ref()) {
        if let Ok(source) = vhost.dirty_source(memory) {
            sources.push(Box::new(source));
        }
    }
    let movable = machine.devices().passthrough().iter();
    let movable = movable.filter(|function| description::is_movable(manifest, &function.id));
    let devices = movable.map(|function| (&function.device, function.all_dirty));
    sources.extend(passthrough::dirty_sources(devices).map_err(MigrateError::Device)?);
    Ok(sources)
}

/// All parts with state, in the manifest's order.
fn state_sources(machine: &Machine) -> Vec<Box<dyn StateSource>> {
    let mut sources: Vec<Box<dyn StateSource>> = vec![
        Box::new(SnapshotSource::still(
            CHIPS_ID,
            Arc::new(Mutex::new(VmChips(Arc::clone(machine.vm())))),
        )),
        Box::new(SnapshotSource::still(
            CPUS_ID,
            Arc::new(Mutex::new(CpuState(Arc::clone(machine.vcpus())))),
        )),
    ];
    let rtc = Arc::clone(machine.devices().rtc());
    sources.push(Box::new(SnapshotSource::still(rtc::ID, rtc)));
    if let Some(serial) = machine.devices().serial() {
        sources.push(Box::new(SnapshotSource::new(
            serial::ID,
            Arc::clone(serial),
        )));
    }
    for function in machine.devices().virtio() {
        sources.push(Box::new(SnapshotSource::new(
            &function.id,
            Arc::clone(&function.device),
        )));
    }
    for function in machine.devices().passthrough() {
        if let Ok(source) = function.device.state_source() {
            sources.push(Box::new(source));
        }
    }
    let bus = Arc::new(Mutex::new(BusState(Arc::clone(machine.devices().bus()))));
    sources.push(Box::new(SnapshotSource::still(PCI_ID, bus)));
    let hotplug = PlugState(Arc::clone(machine.devices().hotplug()));
    let hotplug = Arc::new(Mutex::new(hotplug));
    sources.push(Box::new(SnapshotSource::still(HOTPLUG_ID, hotplug)));
    sources
}
