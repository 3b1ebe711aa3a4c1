//! The side that the guest comes to.
//!
//! ```text
//! Listening → Prepared → Loading → Ready → Running
//!     └──────────┴──────────┴────────┴─→ Aborted (nothing runs here)
//! ```
//!
//! Everything that can be made ready is before the source even starts to send, so that the guest
//! does not wait for it. Everything that arrives is untrusted.

mod loaders;
mod loading;

use std::time::Instant;

use vm_memory::{GuestAddressSpace, GuestMemoryLoadGuard};

use super::check;
use super::error::MigrationError;
use super::frame::Kind;
use super::link::{Link, LinkError, Wait};
use super::observer::Observer;
use super::phase::DestinationPhase;
use super::protocol::{Accept, Commit, Manifest, Ready, Refusal, Refuse, Running};
use super::status::Status;
use super::story::Story;
use super::transport::Connection;
use crate::error_chain::ErrorChain;
use crate::memory::{GuestMemory, MemoryHandle};
use crate::state::{Pause, StateError, StateSink};
use loaders::Loaders;
use loading::Loading;

/// The VM that arrives.
pub struct DestinationParts {
    /// Guest RAM, freshly mapped: pages that this process never wrote are zero.
    pub memory: MemoryHandle,
    /// What takes each device's state; the same set as the manifest's devices, in any order.
    pub sinks: Vec<Box<dyn StateSink>>,
    /// The vCPUs, paused; their state is among the sinks.
    pub vcpus: Box<dyn Pause>,
}

/// Who can make a VM here.
pub trait DestinationHost {
    /// Makes the VM that `manifest` describes, all but its state: opens devices, maps and pins
    /// memory. The manifest is untrusted, and checked for nothing but itself; what does not fit
    /// this host is refused, all of it at once.
    fn prepare(&mut self, manifest: &Manifest) -> Result<DestinationParts, Vec<Refusal>>;

    /// The migration failed after [`prepare`](Self::prepare): drops all that was made. The sinks
    /// have been aborted.
    fn abort(&mut self, why: &str);
}

/// How the arrival went.
#[derive(Clone, PartialEq, Eq, Debug, serde::Serialize)]
pub struct DestinationReport {
    /// From the first byte to the guest running, in ms.
    pub total_ms: u64,
    /// Bytes received.
    pub bytes: u64,
    /// Pages received, zero pages included.
    pub pages: u64,
    /// Of them, zero pages.
    pub zero_pages: u64,
    /// Bytes of device state received.
    pub device_bytes: u64,
    /// Time that loading the devices' states took besides receiving them, in µs.
    pub load_us: u64,
    /// Time it took from the commit until the vCPUs ran, in µs.
    pub run_us: u64,
    /// Whether the source could be told that the guest runs.
    pub acknowledged: bool,
}

/// A guest that arrived and runs.
pub struct Arrival {
    /// What the source told of it.
    pub manifest: Manifest,
    /// Its parts.
    pub parts: DestinationParts,
    /// How it went.
    pub report: DestinationReport,
}

/// Takes the guest that the source on `connection` sends.
///
/// On an error nothing runs here. To be called on a thread of its own, which a `CancelHandle`
/// interrupts.
pub fn run(
    connection: Connection,
    host: &mut dyn DestinationHost,
    status: &Status,
    observer: &mut dyn Observer,
) -> Result<Arrival, MigrationError> {
    let mut story = Story::new(status, observer);
    story.destination(DestinationPhase::Listening);
    let link = match Link::new(connection) {
        Ok(link) => link,
        Err(cause) => {
            let error = MigrationError::System(cause);
            let why = ErrorChain(&error).to_string();
            story.destination(DestinationPhase::Aborted { why });
            return Err(error);
        }
    };
    let mut destination = Destination { link, host, story };
    destination
        .converse()
        .map_err(|cause| destination.say_goodbye(cause))
}

/// An arrival going on.
struct Destination<'a> {
    link: Link,
    host: &'a mut dyn DestinationHost,
    story: Story<'a>,
}

fn failed(doing: &'static str) -> impl FnOnce(StateError) -> MigrationError {
    move |cause| MigrationError::Device { doing, cause }
}

fn refused(refusals: Vec<Refusal>) -> MigrationError {
    MigrationError::Refused {
        by: "this host".to_owned(),
        refusals,
    }
}

impl Destination<'_> {
    fn enter(&mut self, phase: DestinationPhase) {
        self.link.set_phase(phase.name());
        self.story.destination(phase);
    }

    fn converse(&mut self) -> Result<Arrival, MigrationError> {
        self.link.set_phase(DestinationPhase::Listening.name());
        let manifest: Manifest =
            self.link
                .receive_message(Kind::Manifest, Wait::Answer, "manifest")?;
        let refusals = check::manifest(&manifest);
        if !refusals.is_empty() {
            return Err(refused(refusals));
        }
        let mut parts = self.host.prepare(&manifest).map_err(refused)?;
        let mut prepared = 0;
        match self.arrive(&manifest, &mut parts, &mut prepared) {
            Ok(report) => Ok(Arrival {
                manifest,
                parts,
                report,
            }),
            Err(cause) => Err(self.undo(parts, prepared, cause)),
        }
    }

    /// Everything after the VM was made.
    fn arrive(
        &mut self,
        manifest: &Manifest,
        parts: &mut DestinationParts,
        prepared: &mut usize,
    ) -> Result<DestinationReport, MigrationError> {
        let memory = prepare(manifest, parts, prepared)?;
        let memory_bytes = manifest.memory_bytes();
        self.story.update(|now| now.memory_bytes = memory_bytes);
        let accept = Accept {
            ferry_version: env!("CARGO_PKG_VERSION").to_owned(),
        };
        self.link.send_message(Kind::Accept, &accept)?;
        self.enter(DestinationPhase::Prepared);
        let ready = self.load(manifest, &memory, &mut parts.sinks)?;
        let load_us = ready.load_us;
        let run_us = self.take_over(parts, &ready)?;
        let acknowledged = self.acknowledge(run_us);
        let now = self.story.snapshot();
        Ok(DestinationReport {
            total_ms: now.elapsed_ms,
            bytes: now.bytes,
            pages: now.pages,
            zero_pages: now.zero_pages,
            device_bytes: now.device_bytes,
            load_us,
            run_us,
            acknowledged,
        })
    }

    /// Receives memory and state; gives what the source is told of it.
    fn load(
        &mut self,
        manifest: &Manifest,
        memory: &GuestMemory,
        sinks: &mut [Box<dyn StateSink>],
    ) -> Result<Ready, MigrationError> {
        let loaders = Loaders::default();
        std::thread::scope(|scope| {
            let _quit = loaders.quit_on_drop();
            let mut loading = Loading::new(manifest, memory, &loaders);
            for (index, sink) in sinks.iter_mut().enumerate() {
                if sink.is_streamed() {
                    let started = loaders.start(scope, index, sink.as_mut());
                    started.map_err(MigrationError::System)?;
                } else {
                    loading.load_here(index, sink.as_mut());
                }
            }
            self.receive_all(&mut loading)
        })
    }

    /// Receives until the source says that this was all.
    fn receive_all(&mut self, loading: &mut Loading<'_>) -> Result<Ready, MigrationError> {
        let mut payload = Vec::new();
        let mut begun = false;
        loop {
            let awaited = "memory or device state";
            let kind = self.link.receive(&mut payload, Wait::Alive, awaited)?;
            let bytes = payload.len();
            if !std::mem::replace(&mut begun, true) {
                self.enter(DestinationPhase::Loading);
            }
            match kind {
                Kind::Pages => loading.pages(&payload, &self.link)?,
                Kind::DeviceChunk => loading.chunk(&mut payload, &self.link)?,
                Kind::DeviceEnd => {
                    let end = self.link.decode(kind, &payload)?;
                    loading.device_end(end, &self.link)?;
                }
                Kind::RoundEnd => {
                    let round = self.link.decode(kind, &payload)?;
                    let answer = loading.round_end(round, &self.link)?;
                    self.link.send_message(Kind::RoundAck, &answer)?;
                    self.story.update(|now| now.rounds = answer.round);
                }
                Kind::Complete => {
                    let complete = self.link.decode(kind, &payload)?;
                    return loading.complete(complete, &self.link);
                }
                Kind::Manifest
                | Kind::Accept
                | Kind::Refuse
                | Kind::RoundAck
                | Kind::Ready
                | Kind::Commit
                | Kind::Running
                | Kind::Abort
                | Kind::Progress => return Err(self.link.unexpected(kind).into()),
            }
            self.story.update(|now| loading.tell(now, bytes));
        }
    }

    /// Everything is here: waits for the word to run it, and runs it. Gives the time from the
    /// word until the vCPUs ran.
    fn take_over(
        &mut self,
        parts: &mut DestinationParts,
        ready: &Ready,
    ) -> Result<u64, MigrationError> {
        self.enter(DestinationPhase::Ready);
        self.link.send_message(Kind::Ready, ready)?;
        let _: Commit = self
            .link
            .receive_message(Kind::Commit, Wait::Answer, "commit")?;
        self.link.commit()?;
        let began = Instant::now();
        // None runs before all are awake, so that none meets another that stands still.
        for sink in &mut parts.sinks {
            sink.wake().map_err(failed("waking"))?;
        }
        for sink in &mut parts.sinks {
            sink.run().map_err(failed("starting to run"))?;
        }
        if let Err(cause) = parts.vcpus.resume() {
            // Some may run. Before the source hears that it failed, none may.
            let cause = match parts.vcpus.pause() {
                Ok(()) => cause,
                Err(again) => {
                    tracing::error!(error = %ErrorChain(&again), "vCPUs could not be stopped again");
                    // Without a word the source must take it that the guest runs here.
                    self.link.close();
                    cause
                }
            };
            return Err(MigrationError::Vcpus {
                done: "resumed",
                cause,
            });
        }
        Ok(u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX))
    }

    /// Tells the source that the guest runs; whether it arrives changes nothing here.
    fn acknowledge(&mut self, run_us: u64) -> bool {
        let told = self.link.send_message(Kind::Running, &Running { run_us });
        self.enter(DestinationPhase::Running);
        if let Err(error) = &told {
            tracing::warn!(
                error = %ErrorChain(error),
                "the guest runs here, and the source could not be told: its copy stays paused"
            );
        }
        self.link.close();
        told.is_ok()
    }

    /// Drops what was made; gives the error with what else went wrong.
    fn undo(
        &mut self,
        mut parts: DestinationParts,
        prepared: usize,
        cause: MigrationError,
    ) -> MigrationError {
        let mut problems = Vec::new();
        for sink in parts.sinks.iter_mut().take(prepared).rev() {
            if let Err(error) = sink.abort() {
                problems.push(ErrorChain(&error).to_string());
            }
        }
        drop(parts);
        self.host.abort(&cause.chain());
        if problems.is_empty() {
            return cause;
        }
        MigrationError::RollBack {
            cause: Box::new(cause),
            problems,
        }
    }

    /// Tells the source, unless it knows; gives the error back.
    fn say_goodbye(&mut self, error: MigrationError) -> MigrationError {
        match error.root() {
            MigrationError::Refused { refusals, .. } => self.refuse(refusals),
            MigrationError::Link(LinkError::PeerAborted { .. }) => self.link.close(),
            cause => self.link.farewell(&cause.chain()),
        }
        let why = error.chain();
        self.story.destination(DestinationPhase::Aborted { why });
        error
    }

    /// Tells the source why the VM cannot move here.
    fn refuse(&mut self, refusals: &[Refusal]) {
        let refuse = Refuse {
            refusals: refusals.to_vec(),
        };
        match self.link.send_message(Kind::Refuse, &refuse) {
            Ok(()) => self.link.close(),
            // Too many to fit a frame, perhaps: then in short.
            Err(error) => self.link.farewell(&ErrorChain(&error).to_string()),
        }
    }
}

/// Makes everything ready that can be before the state comes.
fn prepare(
    manifest: &Manifest,
    parts: &mut DestinationParts,
    prepared: &mut usize,
) -> Result<GuestMemoryLoadGuard<GuestMemory>, MigrationError> {
    let memory = parts.memory.memory();
    let ids = parts.sinks.iter().map(|sink| sink.id());
    let refusals = check::fits(manifest, "the destination", &memory, ids);
    if !refusals.is_empty() {
        return Err(refused(refusals));
    }
    // From here the sinks are in the order of the manifest, by which frames name them.
    let place = |id: &str| manifest.devices.iter().position(|device| device.id == id);
    parts.sinks.sort_by_key(|sink| place(sink.id()));
    for sink in &mut parts.sinks {
        *prepared = prepared.saturating_add(1);
        sink.prepare().map_err(|error| {
            // Nothing has changed at the source yet: a refusal.
            refused(vec![Refusal::new(
                sink.id(),
                ErrorChain(&error).to_string(),
                "make the device available on the destination",
            )])
        })?;
    }
    Ok(memory)
}
