//! The control loop: takes requests and the guest's own wishes one by one.
//!
//! It owns the VM. It never waits for a peer: a migration has threads of its own and tells the
//! loop how it ended. While one runs the loop answers, but changes nothing of the VM.

mod guest;
mod hotplug;

use std::io;

use event_monitor::Event;
use rustix::event::{PollFd, PollFlags, poll};
use vm_migration::ErrorChain;
use vm_migration::migrate::{MigrationEvent, MigrationStatus, Report, Side, SourcePhase};

use crate::api::{
    ApiError, ApiInbox, ApiReply, ApiRequest, ApiStatus, ReceiveMigrationConfig,
    SendMigrationConfig, SendMigrationInfo, VmmPing,
};
use crate::config::VmConfig;
use crate::machine::Host;
use crate::metrics;
use crate::migrate::{Arrived, Leaving, MigrateError, Receiving, SendFailure, Sending, Tools};
use crate::migration_events;
use crate::notice::{self, ExitReason, NoticeInbox, NoticeSender};
use crate::signals::Signals;
use guest::Guest;
use hotplug::Removals;

type Sent = Result<Report, SendFailure>;
type Received = Result<Box<Arrived>, MigrateError>;

/// The migration that is going on or went last.
enum Migration {
    None,
    Sending(Sending),
    /// The guest has gone; the machine it was in goes.
    Leaving(Leaving),
    Receiving(Receiving),
    Over(Box<MigrationStatus>),
}

/// The control loop.
pub struct Control {
    host: Host,
    inbox: ApiInbox,
    exits: NoticeInbox<ExitReason>,
    signals: Signals,
    guest: Guest,
    migration: Migration,
    sent: (NoticeSender<Sent>, NoticeInbox<Sent>),
    left: (NoticeSender<()>, NoticeInbox<()>),
    received: (NoticeSender<Received>, NoticeInbox<Received>),
    /// What the guest asked for while it was being migrated.
    postponed: Option<ExitReason>,
    /// The devices that the guest was asked to eject, and when it is late.
    removals: Removals,
    /// The process serves one VM and ends with it.
    end_with_guest: bool,
}

impl Control {
    /// A loop without a VM. With `end_with_guest` (the VM came from the command line) the process
    /// ends when the guest switches itself off.
    ///
    /// # Errors
    /// When there are no eventfds.
    pub fn new(
        host: Host,
        inbox: ApiInbox,
        exits: NoticeInbox<ExitReason>,
        signals: Signals,
        end_with_guest: bool,
    ) -> io::Result<Self> {
        Ok(Self {
            host,
            inbox,
            exits,
            signals,
            guest: Guest::None,
            migration: Migration::None,
            sent: notice::channel()?,
            left: notice::channel()?,
            received: notice::channel()?,
            postponed: None,
            removals: Removals::default(),
            end_with_guest,
        })
    }

    /// Creates and boots a VM, as the requests `vm.create` and `vm.boot` would.
    ///
    /// # Errors
    /// As theirs.
    pub fn create_and_boot(&mut self, config: VmConfig) -> Result<(), ApiError> {
        self.guest.create(config)?;
        self.guest.boot(&self.host)
    }

    /// Serves until asked to end.
    ///
    /// # Errors
    /// When waiting fails.
    pub fn run(&mut self) -> io::Result<()> {
        while !self.turn()? {}
        self.end_migration();
        Ok(())
    }

    /// Waits once and does what there is to do; says whether to end.
    fn turn(&mut self) -> io::Result<bool> {
        self.wait()?;
        if self.signals.came() {
            tracing::info!("asked to end by a signal");
            return Ok(true);
        }
        if self.take_results() {
            return Ok(true);
        }
        self.tell_overdue();
        while let Some(reason) = self.exits.take() {
            if self.guest_wants(reason) {
                return Ok(true);
            }
        }
        while let Some((request, responder)) = self.inbox.take() {
            let ends = matches!(request, ApiRequest::VmmShutdown) | self.settle_migration();
            let answer = self.answer(request);
            responder.respond(answer);
            if ends {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn wait(&self) -> io::Result<()> {
        let mut fds = [
            PollFd::new(&self.inbox, PollFlags::IN),
            PollFd::new(&self.exits, PollFlags::IN),
            PollFd::new(&self.signals, PollFlags::IN),
            PollFd::new(&self.sent.1, PollFlags::IN),
            PollFd::new(&self.left.1, PollFlags::IN),
            PollFd::new(&self.received.1, PollFlags::IN),
        ];
        match poll(&mut fds, self.removals.patience().as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    fn answer(&mut self, request: ApiRequest) -> Result<ApiReply, ApiError> {
        match request {
            ApiRequest::VmmPing => Ok(ApiReply::Ping(ping())),
            ApiRequest::VmmShutdown => {
                self.host.events.tell(Event::VmmShutdown);
                Ok(ApiReply::Empty)
            }
            ApiRequest::VmInfo => self.guest.info().map(|info| ApiReply::Info(Box::new(info))),
            ApiRequest::VmCounters => self.guest.counters().map(ApiReply::Counters),
            ApiRequest::VmMigration => self.status().map(|now| ApiReply::Migration(Box::new(now))),
            ApiRequest::VmCancelMigration => self.cancel().map(|()| ApiReply::Empty),
            ApiRequest::VmMetrics => self.metrics().map(ApiReply::Metrics),
            ApiRequest::VmCreate(_)
            | ApiRequest::VmBoot
            | ApiRequest::VmPause
            | ApiRequest::VmResume
            | ApiRequest::VmShutdown
            | ApiRequest::VmDelete
            | ApiRequest::VmAddDevice(_)
            | ApiRequest::VmRemoveDevice(_)
            | ApiRequest::VmSendMigration(_)
            | ApiRequest::VmReceiveMigration(_) => self.change(request),
        }
    }

    /// Requests that change the VM, which a migration forbids.
    fn change(&mut self, request: ApiRequest) -> Result<ApiReply, ApiError> {
        if self.is_migrating() {
            return Err(ApiError::conflict(format!(
                "{} is not possible during a migration: wait for its end or cancel it \
                 (vm.cancel-migration)",
                request.endpoint()
            )));
        }
        let changed = match request {
            ApiRequest::VmAddDevice(device) => return self.add_device(*device),
            ApiRequest::VmRemoveDevice(device) => self.remove_device(&device.id),
            ApiRequest::VmCreate(config) => self.guest.create(*config),
            ApiRequest::VmBoot => self.guest.boot(&self.host),
            ApiRequest::VmPause => self.guest.pause(&self.host.events),
            ApiRequest::VmResume => {
                let resumed = self.guest.resume(&self.host.events);
                self.take_ejected();
                resumed
            }
            ApiRequest::VmShutdown => self.guest.shutdown(&self.host.events),
            ApiRequest::VmDelete => self.guest.delete(&self.host.events),
            ApiRequest::VmSendMigration(request) => return self.send(*request),
            ApiRequest::VmReceiveMigration(request) => self.receive(*request),
            other => Err(ApiError::not_found(format!(
                "{} changes nothing",
                other.endpoint()
            ))),
        };
        changed.map(|()| ApiReply::Empty)
    }

    /// Whether a migration goes on, during which nothing of the VM changes.
    fn is_migrating(&self) -> bool {
        match self.migration {
            Migration::Sending(_) | Migration::Leaving(_) | Migration::Receiving(_) => true,
            Migration::None | Migration::Over(_) => false,
        }
    }

    fn metrics(&self) -> Result<String, ApiError> {
        let migration = self.status().ok();
        let counters = self.guest.counters().unwrap_or_default();
        let facts = self.guest.facts();
        let snapshot = metrics::Snapshot {
            version: env!("CARGO_PKG_VERSION"),
            vm: self.guest.metrics(&counters, &facts),
            migration: migration.as_ref(),
            events_dropped: self.host.events.dropped(),
        };
        metrics::render(&snapshot).map_err(|error| ApiError::internal(&error))
    }
}

/// Migration.
impl Control {
    fn status(&self) -> Result<MigrationStatus, ApiError> {
        match &self.migration {
            Migration::None => Err(ApiError::not_found("there has been no migration")),
            Migration::Sending(sending) => Ok(sending.status()),
            Migration::Leaving(leaving) => Ok(leaving.status()),
            Migration::Receiving(receiving) => Ok(receiving.status()),
            Migration::Over(status) => Ok((**status).clone()),
        }
    }

    fn send(&mut self, request: SendMigrationConfig) -> Result<ApiReply, ApiError> {
        let (config, machine) = self.guest.running("migrate")?;
        let tools = Tools {
            spawner: self.host.spawner.clone(),
            events: self.host.events.clone(),
            done: self.sent.0.clone(),
        };
        let sending = Sending::start(machine, config, request, &tools)
            .map_err(|error| ApiError::new(ApiStatus::Conflict, &error))?;
        let dirty_sources = sending.dirty_sources().to_vec();
        self.migration = Migration::Sending(sending);
        Ok(match dirty_sources.is_empty() {
            true => ApiReply::Empty,
            false => ApiReply::Sending(SendMigrationInfo { dirty_sources }),
        })
    }

    fn receive(&mut self, request: ReceiveMigrationConfig) -> Result<(), ApiError> {
        if !matches!(self.guest, Guest::None) {
            return Err(ApiError::conflict(
                "a VM exists here already: delete it first (vm.delete)",
            ));
        }
        let receiving = Receiving::start(request, &self.host, self.received.0.clone())
            .map_err(|error| ApiError::new(ApiStatus::Conflict, &error))?;
        self.migration = Migration::Receiving(receiving);
        Ok(())
    }

    fn cancel(&mut self) -> Result<(), ApiError> {
        match &self.migration {
            Migration::Sending(sending) => sending.cancel().map_err(|_| too_late()),
            Migration::Leaving(_) => Err(too_late()),
            Migration::Receiving(receiving) => {
                receiving.cancel();
                Ok(())
            }
            Migration::None | Migration::Over(_) => {
                Err(ApiError::conflict("there is no migration to cancel"))
            }
        }
    }

    /// Takes note of migrations that have ended; says whether the process shall end.
    fn take_results(&mut self) -> bool {
        let mut ends = false;
        while let Some(result) = self.sent.1.take() {
            ends |= self.was_sent(result);
        }
        while let Some(()) = self.left.1.take() {
            self.migration_over();
            let done = MigrationEvent::Phase(Side::Source(SourcePhase::Done));
            migration_events::tell(&self.host.events, &done);
        }
        while let Some(result) = self.received.1.take() {
            self.was_received(result);
        }
        ends
    }

    /// Who has seen the last phase of a migration (in `vm.migration`, in an event) may ask for the
    /// VM at once, and shall find it where that says. So if the thread has entered its last phase,
    /// its result is waited for, which is on its way: a thread has at most to close its
    /// connection, which takes no more than a second even if the peer hangs. Says whether the
    /// process shall end.
    fn settle_migration(&mut self) -> bool {
        let over = match &self.migration {
            Migration::Sending(sending) => sending.status().is_over(),
            Migration::Receiving(receiving) => receiving.status().is_over(),
            Migration::None | Migration::Leaving(_) | Migration::Over(_) => false,
        };
        if !over {
            return false;
        }
        self.migration_over();
        self.take_results()
    }

    /// The guest has left, or stays; says whether the process shall end.
    fn was_sent(&mut self, result: Sent) -> bool {
        self.migration_over();
        let postponed = self.postponed.take();
        match result {
            Ok(report) => {
                tracing::info!(
                    total_ms = report.total_ms,
                    "the guest runs at the destination"
                );
                for warning in &report.warnings {
                    tracing::warn!(warning, "after the migration");
                }
                self.leave();
                false
            }
            Err(failure) => {
                let error = ErrorChain(&failure.error);
                tracing::error!(%error, "the guest could not be migrated");
                if let Some(stranded) = failure.stranded {
                    self.guest.strand(stranded);
                    return false;
                }
                self.take_ejected();
                postponed.is_some_and(|reason| self.guest_wants(reason))
            }
        }
    }

    /// Takes down the machine whose guest has gone.
    fn leave(&mut self) {
        let guest = std::mem::replace(&mut self.guest, Guest::None);
        if let (Guest::On { machine, .. }, Migration::Over(status)) = (guest, &self.migration) {
            let (spawner, done) = (&self.host.spawner, self.left.0.clone());
            let leaving = Leaving::start(machine, status.clone(), spawner, done);
            self.migration = Migration::Leaving(leaving);
        }
    }

    fn was_received(&mut self, result: Received) {
        self.migration_over();
        match result {
            Ok(arrived) => {
                tracing::info!(total_ms = arrived.report.total_ms, "a guest has arrived");
                self.guest = Guest::arrived(*arrived);
                self.take_ejected();
                for id in self.guest.asked_to_go() {
                    self.removals.asked(id);
                }
            }
            Err(error) => {
                tracing::error!(error = %ErrorChain(&error), "no guest has arrived");
            }
        }
    }

    /// Keeps the last status of a migration whose thread has told how it ended.
    fn migration_over(&mut self) {
        let over = match &mut self.migration {
            Migration::Sending(sending) => {
                sending.join();
                Box::new(sending.status())
            }
            Migration::Leaving(leaving) => leaving.finish(),
            Migration::Receiving(receiving) => {
                receiving.join();
                Box::new(receiving.status())
            }
            Migration::None | Migration::Over(_) => return,
        };
        self.migration = Migration::Over(over);
    }

    /// The process ends: a migration that can still be stopped is.
    fn end_migration(&mut self) {
        // Too late means that it is as good as over.
        let _ = self.cancel();
        // Once for the migration, once for the machine that a guest which has gone leaves behind.
        // A guest that arrived meanwhile ends with the process, as any other.
        for _ in 0..2 {
            self.migration_over();
            self.take_results();
        }
    }
}

/// The guest's own wishes.
impl Control {
    /// Does what the guest asks or suffers; says whether the process shall end.
    fn guest_wants(&mut self, reason: ExitReason) -> bool {
        let reason = match reason {
            ExitReason::DeviceLost { id, reason } => {
                tracing::error!(id, reason, "a device is gone");
                let lost = id.clone();
                self.host.events.tell(Event::DeviceLost { id, reason });
                self.lost(&lost);
                return false;
            }
            ExitReason::DeviceWanted { id } => {
                tracing::warn!(
                    id,
                    "the host wants the device back: remove it (vm.remove-device)"
                );
                let wanted = id.clone();
                self.host.events.tell(Event::DeviceRemovalRequested { id });
                self.wanted(&wanted);
                return false;
            }
            ExitReason::DeviceEjected => {
                self.take_ejected();
                return false;
            }
            reason => reason,
        };
        if let Migration::Sending(sending) = &self.migration {
            tracing::info!(
                ?reason,
                "the guest stops during its migration, which is cancelled"
            );
            // Too late cannot be: a vCPU that has ended does not get through the switchover.
            let _ = sending.cancel();
            self.postponed = Some(reason);
            return false;
        }
        match reason {
            ExitReason::Reset => self.reset(),
            ExitReason::PowerOff => {
                tracing::info!("the guest switched itself off");
                self.off()
            }
            ExitReason::Failed(reason) => {
                tracing::error!(reason, "the guest cannot go on; it is switched off");
                self.off()
            }
            ExitReason::DeviceLost { .. }
            | ExitReason::DeviceWanted { .. }
            | ExitReason::DeviceEjected => false,
        }
    }

    fn off(&mut self) -> bool {
        // Late news of a VM that is off already says nothing new.
        let _ = self.guest.shutdown(&self.host.events);
        self.end_with_guest
    }

    fn reset(&mut self) -> bool {
        tracing::info!("the guest resets");
        let again = self
            .guest
            .shutdown(&self.host.events)
            .and_then(|()| self.guest.boot(&self.host));
        match again {
            Ok(()) => false,
            Err(error) => {
                tracing::error!(
                    chain = error.chain.join(": "),
                    "the guest cannot be booted again"
                );
                self.end_with_guest
            }
        }
    }
}

fn too_late() -> ApiError {
    ApiError::conflict("too late: the guest belongs to the destination already")
}

fn ping() -> VmmPing {
    let version = env!("CARGO_PKG_VERSION").to_owned();
    VmmPing {
        build_version: format!("ferry v{version}"),
        version,
        pid: std::process::id(),
        features: Vec::new(),
    }
}
