//! The side that the guest leaves.
//!
//! ```text
//! Preflight → Setup → Precopy{1} → Precopy{2} → … → Switchover → Finalize → Done
//!     └─────────┴────────┴─────────────┴─────────────────┴─→ Aborted (the guest runs on here)
//! ```
//!
//! What was begun is noted before it is begun, so that whatever happens, exactly that is undone
//! (`rollback`).

mod precopy;
mod readers;
mod rollback;
mod streams;
mod switchover;

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use vm_memory::{GuestAddressSpace, GuestMemoryLoadGuard};

use super::check;
use super::error::MigrationError;
use super::estimate::{Bandwidth, Pacer};
use super::frame::{FrameBuffer, Kind};
use super::link::{Link, Wait};
use super::observer::Observer;
use super::pages::PageBatch;
use super::params::MigrationParams;
use super::phase::SourcePhase;
use super::protocol::{Accept, CHUNK_BYTES, Manifest, Refusal, Refuse};
use super::status::{Downtime, SourceStatus, Status};
use super::story::Story;
use super::transport::Connection;
use crate::addr::PageSize;
use crate::dirty::GuestDirty;
use crate::error_chain::ErrorChain;
use crate::memory::{GuestMemory, MemoryHandle, ram_regions};
use crate::source::DirtySource;
use crate::state::{Pause, StateSource};
use readers::{Readers, SharedSource};
use streams::Streams;

/// The VM that leaves.
///
/// It outlives a failed attempt: all is as before, and what was dirty still is. Run it again, with
/// another connection.
pub struct SourceParts {
    /// What the destination is told.
    pub manifest: Manifest,
    /// Guest RAM.
    pub memory: MemoryHandle,
    /// Everything that writes guest memory.
    pub sources: Vec<Box<dyn DirtySource>>,
    /// The vCPUs; their state is among the devices.
    pub vcpus: Box<dyn Pause>,
    /// Threads that may ask dirty sources at once (see
    /// [`Collect::threads`](crate::dirty::Collect::threads)); 1 unless changed. They are used once
    /// asking one after the other has been seen to take long.
    pub report_threads: usize,
    /// Everything with state, in the manifest's order.
    devices: Vec<SharedSource>,
    dirty: GuestDirty,
}

impl SourceParts {
    /// Puts the parts of a VM together. `devices` is everything with state, in any order. An error
    /// names what does not fit together.
    pub fn new(
        manifest: Manifest,
        memory: MemoryHandle,
        sources: Vec<Box<dyn DirtySource>>,
        mut devices: Vec<Box<dyn StateSource>>,
        vcpus: Box<dyn Pause>,
    ) -> Result<Self, MigrationError> {
        let page = PageSize::new(manifest.page_size).unwrap_or(PageSize::SIZE_4K);
        let dirty = GuestDirty::new(&ram_regions(&memory.memory()), page)?;
        let place = |id: &str| manifest.devices.iter().position(|device| device.id == id);
        devices.sort_by_key(|device| place(device.id()));
        let devices = devices
            .into_iter()
            .map(|device| Arc::new(Mutex::new(device)));
        let devices = devices.collect();
        let parts = Self {
            manifest,
            memory,
            sources,
            devices,
            vcpus,
            report_threads: 1,
            dirty,
        };
        parts.check()?;
        Ok(parts)
    }

    /// Whether it all fits together, and can move at all.
    fn check(&self) -> Result<(), MigrationError> {
        let by = "this host";
        let manifest = &self.manifest;
        let mut refusals = check::manifest(manifest);
        let ids: Vec<String> = self
            .devices
            .iter()
            .map(|device| device.lock().id().to_owned())
            .collect();
        let names = ids.iter().map(String::as_str);
        refusals.extend(check::fits(manifest, by, &self.memory.memory(), names));
        let in_order = ids
            .iter()
            .zip(&manifest.devices)
            .all(|(id, named)| *id == named.id);
        let tracked = self.dirty.page_size().bytes() == manifest.page_size
            && self.dirty.ranges() == check::ranges(manifest);
        if refusals.is_empty() && !(in_order && tracked) {
            refusals.push(Refusal::new(
                "manifest",
                "it was changed since the parts were put together",
                "put them together anew",
            ));
        }
        if refusals.is_empty() {
            return Ok(());
        }
        let by = by.to_owned();
        Err(MigrationError::Refused { by, refusals })
    }

    /// Which memory the destination of the last attempt does not have.
    pub fn dirty(&self) -> &GuestDirty {
        &self.dirty
    }

    #[cfg(test)]
    pub(super) fn dirty_mut(&mut self) -> &mut GuestDirty {
        &mut self.dirty
    }

    /// Makes the guest run here again after [`MigrationError::CommitUnacknowledged`] or
    /// [`MigrationError::DestinationFailed`]. Only for an operator who knows that it does not run
    /// at the destination. All parts are tried; the problems met are returned.
    pub fn take_back(&mut self) -> Vec<String> {
        let begun = Begun {
            sources: self.sources.len(),
            devices: self.devices.len(),
            vcpus: true,
        };
        rollback::put_back(self, begun).problems
    }
}

/// How a migration went.
#[derive(Clone, PartialEq, Debug, serde::Serialize)]
pub struct Report {
    /// Rounds of memory before the switchover.
    pub rounds: u32,
    /// From start to the guest running at the destination, in ms.
    pub total_ms: u64,
    /// Bytes sent.
    pub bytes: u64,
    /// Pages sent, zero pages included.
    pub pages: u64,
    /// Of them, zero pages.
    pub zero_pages: u64,
    /// Bytes of device state sent.
    pub device_bytes: u64,
    /// Measured bytes per second.
    pub bandwidth: Option<u64>,
    /// How long the guest stood still, and why.
    pub downtime: Downtime,
    /// What each dirty source reported.
    pub sources: Vec<SourceStatus>,
    /// Time spent on finding dirty pages (reports, merging, clearing at the sources), in µs.
    pub tracking_us: u64,
    /// What could not be cleaned up here. The guest runs at the destination all the same.
    pub warnings: Vec<String>,
}

/// What was begun and is to be undone.
#[derive(Clone, Copy, Debug, Default)]
struct Begun {
    /// The first so many dirty sources.
    sources: usize,
    /// The first so many devices.
    devices: usize,
    /// The vCPUs' pause.
    vcpus: bool,
}

/// Moves the guest to the destination that `connection` leads to.
///
/// On an error the guest runs on here, except where
/// [`guest_is_paused`](MigrationError::guest_is_paused) says otherwise. Takes as long as it takes;
/// to be called on a thread of its own, which a `CancelHandle` interrupts.
pub fn run(
    parts: &mut SourceParts,
    connection: Connection,
    params: &MigrationParams,
    status: &Status,
    observer: &mut dyn Observer,
) -> Result<Report, MigrationError> {
    let mut story = Story::new(status, observer);
    story.source(SourcePhase::Preflight);
    let link = match Link::new(connection) {
        Ok(link) => link,
        Err(cause) => {
            let error = MigrationError::System(cause);
            let why = ErrorChain(&error).to_string();
            story.source(SourcePhase::Aborted { why });
            return Err(error);
        }
    };
    let mut source = Source::new(parts, link, params, story);
    match source.converse() {
        Ok(report) => Ok(report),
        Err(cause) => Err(source.give_up(cause)),
    }
}

/// A migration going on.
struct Source<'a> {
    parts: &'a mut SourceParts,
    memory: GuestMemoryLoadGuard<GuestMemory>,
    link: Link,
    params: &'a MigrationParams,
    story: Story<'a>,
    begun: Begun,
    /// The destination may run the guest.
    committed: bool,
    streams: Streams,
    readers: Readers,
    batch: PageBatch,
    chunk: FrameBuffer,
    bandwidth: Bandwidth,
    pacer: Pacer,
    started: Instant,
    deadline: Option<Instant>,
    page_bytes: u64,
    collected: Option<Instant>,
    /// Dirty logs that may still be started anew.
    restarts: u32,
    /// What tracking had cost before this migration, of the same parts.
    tracking_before: Duration,
    costs: Costs,
    /// Of the frames since the last `RoundEnd`.
    sent: Sent,
}

/// What was measured and will be paid again in the switchover.
#[derive(Clone, Copy, Debug, Default)]
struct Costs {
    /// Asking all dirty sources.
    collect: Duration,
    /// A question and its answer.
    latency: Option<Duration>,
}

/// What was sent in one round.
#[derive(Clone, Copy, Debug, Default)]
struct Sent {
    memory_bytes: u64,
    zero_bytes: u64,
    wire_bytes: u64,
}

impl<'a> Source<'a> {
    fn new(
        parts: &'a mut SourceParts,
        link: Link,
        params: &'a MigrationParams,
        story: Story<'a>,
    ) -> Self {
        let pacer = Pacer::new(params.bandwidth_limit());
        let page = parts.dirty.page_size();
        let started = Instant::now();
        let memory_bytes = parts.manifest.memory_bytes();
        story.update(|now| now.memory_bytes = memory_bytes);
        Self {
            memory: parts.memory.memory(),
            streams: Streams::new(&parts.manifest),
            readers: Readers::none(),
            batch: PageBatch::new(page, pacer.burst()),
            chunk: FrameBuffer::with_capacity(CHUNK_BYTES),
            bandwidth: Bandwidth::default(),
            begun: Begun::default(),
            committed: false,
            deadline: started.checked_add(params.timeout()),
            page_bytes: page.bytes(),
            collected: None,
            restarts: params.dirty_log_restarts,
            tracking_before: parts.dirty.tracking_time(),
            costs: Costs::default(),
            sent: Sent::default(),
            parts,
            link,
            params,
            story,
            pacer,
            started,
        }
    }

    fn enter(&mut self, phase: SourcePhase) {
        self.link.set_phase(phase.name());
        self.story.source(phase);
    }

    fn converse(&mut self) -> Result<Report, MigrationError> {
        self.link.set_phase(SourcePhase::Preflight.name());
        self.preflight()?;
        self.enter(SourcePhase::Setup);
        self.setup()?;
        self.precopy()?;
        // What a device takes to end a read is not the guest's time.
        self.rest_readers()?;
        self.enter(SourcePhase::Switchover);
        let downtime = self.switchover()?;
        self.finalize(downtime)
    }

    /// Asks whether the VM can move there, before anything is changed here.
    fn preflight(&mut self) -> Result<(), MigrationError> {
        self.parts.check()?;
        self.link
            .send_message(Kind::Manifest, &self.parts.manifest)?;
        let mut payload = Vec::new();
        let awaited = "answer to the manifest";
        match self.link.receive(&mut payload, Wait::Answer, awaited)? {
            Kind::Accept => {
                let accept: Accept = self.link.decode(Kind::Accept, &payload)?;
                tracing::debug!(version = accept.ferry_version, "destination is prepared");
                Ok(())
            }
            Kind::Refuse => {
                let refuse: Refuse = self.link.decode(Kind::Refuse, &payload)?;
                Err(MigrationError::Refused {
                    by: self.link.peer().to_owned(),
                    refusals: refuse.refusals,
                })
            }
            kind => Err(self.link.unexpected(kind).into()),
        }
    }

    /// Starts all that says what changes. All memory is marked only after every source runs, so
    /// that no write falls between.
    fn setup(&mut self) -> Result<(), MigrationError> {
        let ranges = self.parts.dirty.ranges().to_vec();
        for source in &mut self.parts.sources {
            self.begun.sources = self.begun.sources.saturating_add(1);
            source.start(&ranges)?;
        }
        for device in &self.parts.devices {
            self.begun.devices = self.begun.devices.saturating_add(1);
            let started = device.lock().start_precopy();
            started.map_err(|cause| MigrationError::Device {
                doing: "starting its pre-copy",
                cause,
            })?;
        }
        let readers = self.readers.start(&self.parts.devices);
        readers.map_err(MigrationError::System)?;
        self.parts.dirty.mark_all();
        let all = self.parts.dirty.dirty_pages();
        self.story.update(|now| now.remaining_pages = all);
        Ok(())
    }

    /// The destination runs the guest: lets go of everything here.
    fn finalize(&mut self, downtime: Downtime) -> Result<Report, MigrationError> {
        let mut warnings = Vec::new();
        self.readers.quit();
        for device in &self.parts.devices {
            if let Err(error) = device.lock().finish() {
                warnings.push(ErrorChain(&error).to_string());
            }
        }
        for source in &mut self.parts.sources {
            if let Err(error) = source.stop() {
                warnings.push(ErrorChain(&error).to_string());
            }
        }
        self.enter(SourcePhase::Done);
        let now = self.story.snapshot();
        Ok(Report {
            rounds: now.rounds,
            total_ms: now.elapsed_ms,
            bytes: now.bytes,
            pages: now.pages,
            zero_pages: now.zero_pages,
            device_bytes: now.device_bytes,
            bandwidth: now.bandwidth,
            downtime,
            sources: now.sources,
            tracking_us: now.tracking_us,
            warnings,
        })
    }
}
