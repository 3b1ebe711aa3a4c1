//! A migration with everything about it, and what must hold after it.

use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use parking_lot::Mutex;

use super::fakes::*;
use crate::dirty::GuestDirty;
use crate::memory::MemoryHandle;
use crate::migrate::*;

/// Bounds that a loaded machine keeps.
pub(super) const LIMITS: Limits = Limits {
    idle: Duration::from_secs(8),
    standstill: Duration::from_secs(8),
    answer: Duration::from_secs(20),
    beat: Duration::from_millis(100),
};

/// Short bounds, so that tests of silence are quick.
pub(super) const SHORT: Limits = Limits {
    idle: Duration::from_millis(600),
    standstill: Duration::from_millis(600),
    answer: Duration::from_secs(5),
    beat: Duration::from_millis(100),
};

/// Bounds that are short only while the guest stands still.
pub(super) const URGENT: Limits = Limits {
    standstill: Duration::from_millis(600),
    ..LIMITS
};

/// The same connections, less patient.
pub(super) fn impatient((to, from): (Connection, Connection)) -> (Connection, Connection) {
    (to.with_limits(SHORT), from.with_limits(SHORT))
}

/// The source VM.
pub(super) struct Leaving {
    pub(super) parts: SourceParts,
    pub(super) memory: MemoryHandle,
    pub(super) writer: Arc<Writer>,
    pub(super) devices: Vec<DeviceView>,
    pub(super) states: Vec<Vec<u8>>,
}

/// What goes wrong by itself.
#[derive(Clone, Default)]
pub(super) struct Failures {
    pub(super) vcpus: Failure,
    /// In the second device or sink.
    pub(super) device: Failure,
    pub(super) sink: Failure,
    pub(super) resume: Failure,
    /// How fast the second device gives its state and takes it in.
    pub(super) pace: Pace,
    /// What the source's parts were told, and the destination's.
    pub(super) source_events: Events,
    pub(super) sink_events: Events,
}

pub(super) fn manifest() -> Manifest {
    let mut manifest = Manifest::new(PAGE);
    manifest.vcpus = 2;
    manifest.memory = REGIONS.map(|(gpa, len)| MemoryRegion { gpa, len }).to_vec();
    manifest.devices = ["vcpu", "nic", "disk"]
        .map(|id| DeviceManifest {
            id: id.into(),
            kind: id.into(),
            compat: Default::default(),
            migratable: Migratable::Yes,
            max_state_bytes: 16 << 20,
        })
        .to_vec();
    manifest.config = b"{}".to_vec();
    manifest
}

pub(super) fn leaving(failures: &Failures) -> Leaving {
    let memory = new_memory();
    let writer = Arc::new(Writer::default());
    // Two thirds of the pages have something in them.
    for (index, gpa) in pages().enumerate() {
        if index % 3 != 0 {
            writer.write(&memory, gpa + (index as u64 * 8) % PAGE);
        }
    }
    let kinds = [
        (0, "vcpu", 700, 0),
        (1, "nic", 3 << 20, 2 << 20),
        (2, "disk", 100_000, 50_000),
    ];
    let mut devices = Vec::new();
    let mut views = Vec::new();
    let mut states = Vec::new();
    for (index, id, bytes, precopy) in kinds {
        let state: Vec<u8> = (0..bytes)
            .map(|at: u32| at.wrapping_mul(31).wrapping_add(index).to_le_bytes()[1])
            .collect();
        let gpa = u64::from(index) * 2 * PAGE;
        let device = FakeDevice {
            id: id.into(),
            view: DeviceView::default(),
            state: state.clone(),
            precopy,
            sent: 0,
            failure: if index == 1 {
                failures.device.clone()
            } else {
                Failure::default()
            },
            last_write: Some((writer.clone(), memory.clone(), gpa)),
            streamed: index > 0,
            pace: if index == 1 {
                failures.pace
            } else {
                Pace::default()
            },
            events: failures.source_events.clone(),
        };
        views.push(device.view.clone());
        states.push(state);
        devices.push(Box::new(device) as Box<dyn crate::StateSource>);
    }
    let vcpus = Box::new(SourceVcpus(writer.clone(), failures.vcpus.clone()));
    let sources: Vec<Box<dyn crate::DirtySource>> = vec![Box::new(WriterSource(writer.clone()))];
    let parts = SourceParts::new(manifest(), memory.clone(), sources, devices, vcpus).unwrap();
    Leaving {
        parts,
        memory,
        writer,
        devices: views,
        states,
    }
}

/// The destination's host.
pub(super) struct Host {
    pub(super) memory: MemoryHandle,
    pub(super) running: Arc<AtomicBool>,
    pub(super) sinks: Vec<SinkView>,
    pub(super) failures: Failures,
    pub(super) refusals: Vec<Refusal>,
    pub(super) aborted: Option<String>,
    pub(super) prepared: bool,
    /// How long it takes to prepare.
    pub(super) delay: Duration,
    /// How long the first device takes to load.
    pub(super) load_delay: Duration,
}

impl Host {
    pub(super) fn new(failures: &Failures) -> Self {
        Self {
            memory: new_memory(),
            running: Arc::default(),
            sinks: (0..3).map(|_| SinkView::default()).collect(),
            failures: failures.clone(),
            refusals: Vec::new(),
            aborted: None,
            prepared: false,
            delay: Duration::ZERO,
            load_delay: Duration::ZERO,
        }
    }

    pub(super) fn is_running(&self) -> bool {
        self.running.load(Ordering::SeqCst)
    }
}

impl DestinationHost for Host {
    fn prepare(&mut self, manifest: &Manifest) -> Result<DestinationParts, Vec<Refusal>> {
        std::thread::sleep(self.delay);
        assert_eq!(manifest.config, b"{}");
        if !self.refusals.is_empty() {
            return Err(self.refusals.clone());
        }
        self.prepared = true;
        // Not in the manifest's order, on purpose.
        let sinks = ["vcpu", "nic", "disk"]
            .into_iter()
            .enumerate()
            .rev()
            .map(|(index, id)| {
                let failure = if index == 1 {
                    self.failures.sink.clone()
                } else {
                    Failure::default()
                };
                let delay = if index == 0 {
                    self.load_delay
                } else {
                    Duration::ZERO
                };
                let pace = if index == 1 {
                    self.failures.pace
                } else {
                    Pace::default()
                };
                Box::new(FakeSink {
                    id: id.into(),
                    delay,
                    streamed: index > 0,
                    pace,
                    events: self.failures.sink_events.clone(),
                    view: self.sinks[index].clone(),
                    failure,
                }) as Box<dyn crate::StateSink>
            })
            .collect();
        Ok(DestinationParts {
            memory: self.memory.clone(),
            sinks,
            vcpus: Box::new(DestinationVcpus(
                self.running.clone(),
                self.failures.resume.clone(),
            )),
        })
    }

    fn abort(&mut self, why: &str) {
        assert!(self.prepared && self.aborted.is_none());
        self.aborted = Some(why.to_owned());
    }
}

/// What came out.
pub(super) struct Outcome {
    pub(super) source: Result<Report, MigrationError>,
    pub(super) destination: Result<DestinationReport, MigrationError>,
    pub(super) events: Vec<MigrationEvent>,
    pub(super) source_status: MigrationStatus,
    pub(super) destination_status: MigrationStatus,
}

pub(super) fn connection(socket: UnixStream, peer: &str, cancel: &CancelHandle) -> Connection {
    Connection::from_socket(socket.into(), peer, cancel).with_limits(LIMITS)
}

/// A pair of connections, and the handles that cancel each side.
pub(super) fn pair() -> (Connection, Connection) {
    let (a, b) = UnixStream::pair().unwrap();
    let (at_source, at_destination) = (CancelHandle::new().unwrap(), CancelHandle::new().unwrap());
    (
        connection(a, "the destination", &at_source),
        connection(b, "the source", &at_destination),
    )
}

/// Runs both sides to their end.
pub(super) fn migrate(
    leaving: &mut Leaving,
    host: &mut Host,
    params: &MigrationParams,
    (to, from): (Connection, Connection),
) -> Outcome {
    let (source_status, destination_status) = (Status::source(), Status::destination());
    let events = Arc::new(Mutex::new(Vec::new()));
    let noted = events.clone();
    let mut observer = move |event: &MigrationEvent| noted.lock().push(event.clone());
    let (source, destination) = std::thread::scope(|scope| {
        let destination = scope.spawn(|| {
            let mut nobody = |_: &MigrationEvent| {};
            destination::run(from, host, &destination_status, &mut nobody)
                .map(|arrival| arrival.report)
        });
        let parts = &mut leaving.parts;
        let source = source::run(parts, to, params, &source_status, &mut observer);
        (source, destination.join().unwrap())
    });
    let events = std::mem::take(&mut *events.lock());
    Outcome {
        source,
        destination,
        events,
        source_status: source_status.snapshot(),
        destination_status: destination_status.snapshot(),
    }
}

/// Whatever happened, this holds.
pub(super) fn check(leaving: &mut Leaving, host: &Host, outcome: &Outcome) {
    let source_runs = !leaving.writer.is_paused();
    assert!(
        !(source_runs && host.is_running()),
        "the guest runs twice: {:?} / {:?}",
        outcome.source,
        outcome.destination
    );
    match &outcome.source {
        Ok(_) => check_moved(leaving, host, outcome),
        Err(error) if error.guest_is_paused() => {
            assert!(!source_runs);
            assert!(matches!(
                outcome.source_status.side,
                Side::Source(SourcePhase::Aborted { .. })
            ));
        }
        Err(_) => check_stayed(leaving, host, outcome),
    }
    if outcome.destination.is_err() {
        assert!(!host.is_running());
        assert_eq!(host.prepared, host.aborted.is_some());
        for sink in &host.sinks {
            let mode = *sink.mode.lock();
            assert!(
                matches!(mode, SinkMode::Fresh | SinkMode::Aborted),
                "{mode:?}"
            );
        }
    }
}

fn check_moved(leaving: &Leaving, host: &Host, outcome: &Outcome) {
    outcome.destination.as_ref().unwrap();
    assert!(host.is_running());
    assert!(differences(&leaving.memory, &host.memory).is_empty());
    assert!(!leaving.writer.is_tracking());
    for (view, state) in host.sinks.iter().zip(&leaving.states) {
        assert_eq!(*view.mode.lock(), SinkMode::Running);
        assert!(*view.state.lock() == *state);
    }
    for view in &leaving.devices {
        assert_eq!(*view.mode.lock(), Mode::Gone);
    }
}

fn check_stayed(leaving: &mut Leaving, host: &Host, outcome: &Outcome) {
    assert!(!leaving.writer.is_paused());
    assert!(!leaving.writer.is_tracking());
    for view in &leaving.devices {
        assert_eq!(*view.mode.lock(), Mode::Running);
    }
    assert!(matches!(
        outcome.source_status.side,
        Side::Source(SourcePhase::Aborted { .. })
    ));
    assert!(outcome.source_status.aborted.is_some());
    // Every page that the destination does not have is known to be dirty.
    let writer = leaving.writer.clone();
    let still = writer.hold_still();
    let known = known_dirty(leaving);
    if outcome.source_status.rounds > 0 || leaving.parts.dirty().dirty_pages() > 0 {
        for gpa in differences(&leaving.memory, &host.memory) {
            assert!(known.contains(&gpa), "page {gpa:#x} was lost");
        }
    }
    assert_eq!(leaving.parts.dirty().in_flight_pages(), 0);
    drop(still);
}

/// Pages that are dirty, or that the writer has not reported yet.
pub(super) fn known_dirty(leaving: &mut Leaving) -> std::collections::BTreeSet<u64> {
    let mut known = leaving.writer.pending();
    let dirty: &mut GuestDirty = leaving.parts.dirty_mut();
    while let Some(run) = dirty.next_run(u64::MAX, &mut []).unwrap() {
        known.extend((run.gpa.0..run.gpa.0 + run.len).step_by(4096));
    }
    dirty.put_back();
    known
}
