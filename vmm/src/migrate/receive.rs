//! The destination's side: a thread that listens, builds the VM and takes its state.

use std::sync::Arc;
use std::thread::JoinHandle;

use devices::rtc;
use devices::serial;
use devices::thread::ThreadKind;
use event_monitor::Event;
use parking_lot::Mutex;
use vm_migration::migrate::{
    self, CancelHandle, DestinationHost, DestinationParts, DestinationPhase, DestinationReport,
    Listener, Manifest, MigrationEvent, MigrationStatus, Refusal, Side, Status,
};
use vm_migration::{ErrorChain, SnapshotSink, StateSink};

use super::MigrateError;
use super::describe::misfits;
use crate::api::ReceiveMigrationConfig;
use crate::config::VmConfig;
use crate::machine::{
    BusState, CHIPS_ID, CPUS_ID, CpuState, CpuSwitch, HOTPLUG_ID, Host, Machine, PCI_ID, PlugState,
    VmChips,
};
use crate::migration_events;
use crate::notice::NoticeSender;

/// A VM that arrived and runs.
pub struct Arrived {
    /// Its configuration, with this host's resources.
    pub config: VmConfig,
    /// The VM.
    pub machine: Machine,
    /// How it went.
    pub report: DestinationReport,
}

/// A migration to here that is awaited, going on, or has ended.
pub struct Receiving {
    status: Arc<Status>,
    cancel: CancelHandle,
    thread: Option<JoinHandle<()>>,
}

impl Receiving {
    /// Listens where `request` says and takes the VM that comes. How it ends is told to `done`.
    ///
    /// # Errors
    /// When nobody may listen there, or there is no thread.
    pub fn start(
        request: ReceiveMigrationConfig,
        host: &Host,
        done: NoticeSender<Result<Box<Arrived>, MigrateError>>,
    ) -> Result<Self, MigrateError> {
        let address = request.receiver().map_err(MigrateError::Address)?;
        let listener = Listener::bind(&address).map_err(MigrateError::Transport)?;
        let status = Status::new(Side::Destination(DestinationPhase::Listening));
        let cancel = CancelHandle::new().map_err(MigrateError::Resources)?;
        let (own_status, own_cancel) = (Arc::clone(&status), cancel.clone());
        let own_host = host.clone();
        host.events.tell(Event::MigrationReceiveReady);
        let body = move || {
            let result = serve(&listener, &own_cancel, &own_status, request, own_host);
            drop(listener);
            done.send(result.map(Box::new));
        };
        let thread = host
            .spawner
            .spawn(ThreadKind::MigrationReceive, "migration-recv", body)
            .map_err(MigrateError::Resources)?;
        Ok(Self {
            status,
            cancel,
            thread: Some(thread),
        })
    }

    /// How it is doing.
    pub fn status(&self) -> MigrationStatus {
        self.status.snapshot()
    }

    /// Asks it to stop. Too late is no error: the guest runs here then.
    pub fn cancel(&self) {
        let _ = self.cancel.cancel();
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

fn serve(
    listener: &Listener,
    cancel: &CancelHandle,
    status: &Status,
    request: ReceiveMigrationConfig,
    host: Host,
) -> Result<Arrived, MigrateError> {
    let connection = listener.accept(None, cancel).map_err(|error| {
        let why = ErrorChain(&error).to_string();
        let side = Side::Destination(DestinationPhase::Aborted { why });
        super::failed_early(status, &host.events, side);
        MigrateError::Transport(error)
    })?;
    let events = host.events.clone();
    events.tell(Event::MigrationReceiveStarted);
    let mut tell = |event: &MigrationEvent| migration_events::tell(&events, event);
    let mut incoming = Incoming {
        host,
        request,
        built: None,
    };
    let arrival = migrate::destination::run(connection, &mut incoming, status, &mut tell)
        .map_err(MigrateError::Engine)?;
    match incoming.built {
        Some((config, machine)) => Ok(Arrived {
            config,
            machine,
            report: arrival.report,
        }),
        None => Err(MigrateError::Resources(std::io::Error::other(
            "the VM was not built",
        ))),
    }
}

/// Builds the VM that a source describes.
struct Incoming {
    host: Host,
    request: ReceiveMigrationConfig,
    built: Option<(VmConfig, Machine)>,
}

impl Incoming {
    fn config(&self, manifest: &Manifest) -> Result<VmConfig, Vec<Refusal>> {
        let refuse = |reason: String| {
            vec![Refusal::new(
                "config",
                reason,
                "run the same release of Ferry on both sides",
            )]
        };
        let mut config: VmConfig =
            serde_json::from_slice(&manifest.config).map_err(|error| refuse(error.to_string()))?;
        self.request.apply_to(&mut config).map_err(|error| {
            vec![Refusal::new(
                "config",
                ErrorChain(&error).to_string(),
                "correct vm.receive-migration",
            )]
        })?;
        config
            .validate()
            .map_err(|error| refuse(ErrorChain(&error).to_string()))
    }
}

impl DestinationHost for Incoming {
    fn prepare(&mut self, manifest: &Manifest) -> Result<DestinationParts, Vec<Refusal>> {
        let config = self.config(manifest)?;
        let machine = Machine::new(&config, &self.host).map_err(|error| {
            let subject = error.device_id().unwrap_or("vm").to_owned();
            vec![Refusal::new(
                subject,
                ErrorChain(&error).to_string(),
                "make the resource available here, or name another in vm.receive-migration",
            )]
        })?;
        let refusals = misfits(manifest, &machine);
        if !refusals.is_empty() {
            return Err(refusals);
        }
        let sinks = sinks(&machine).map_err(|error| {
            vec![Refusal::new(
                "vm",
                ErrorChain(&error).to_string(),
                "give a device that can be migrated",
            )]
        })?;
        let parts = DestinationParts {
            memory: machine.ram().handle().clone(),
            sinks,
            vcpus: Box::new(CpuSwitch(Arc::clone(machine.vcpus()))),
        };
        self.built = Some((config, machine));
        Ok(parts)
    }

    fn abort(&mut self, why: &str) {
        tracing::info!(why, "the VM that was to arrive is dropped");
        self.built = None;
    }
}

fn sinks(machine: &Machine) -> Result<Vec<Box<dyn StateSink>>, vm_migration::StateError> {
    let mut sinks: Vec<Box<dyn StateSink>> = vec![
        Box::new(SnapshotSink::still(
            CHIPS_ID,
            Arc::new(Mutex::new(VmChips(Arc::clone(machine.vm())))),
        )),
        Box::new(SnapshotSink::still(
            CPUS_ID,
            Arc::new(Mutex::new(CpuState(Arc::clone(machine.vcpus())))),
        )),
    ];
    let rtc = Arc::clone(machine.devices().rtc());
    sinks.push(Box::new(SnapshotSink::still(rtc::ID, rtc)));
    if let Some(serial) = machine.devices().serial() {
        sinks.push(Box::new(SnapshotSink::new(serial::ID, Arc::clone(serial))));
    }
    for function in machine.devices().virtio() {
        sinks.push(Box::new(SnapshotSink::new(
            &function.id,
            Arc::clone(&function.device),
        )));
    }
    for function in machine.devices().passthrough() {
        sinks.push(Box::new(function.device.state_sink()?));
    }
    let bus = Arc::new(Mutex::new(BusState(Arc::clone(machine.devices().bus()))));
    sinks.push(Box::new(SnapshotSink::still(PCI_ID, bus)));
    let hotplug = PlugState(Arc::clone(machine.devices().hotplug()));
    let hotplug = Arc::new(Mutex::new(hotplug));
    sinks.push(Box::new(SnapshotSink::still(HOTPLUG_ID, hotplug)));
    Ok(sinks)
}
