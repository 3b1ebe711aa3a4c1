//! The control loop: takes requests and the guest's own wishes one by one.
//!
//! It owns the VM. It never waits for a peer: a migration has threads of its own and tells the
//! loop how it ended.

use std::io;

use event_monitor::Event;
use rustix::event::{PollFd, PollFlags, poll};

use crate::api::{ApiError, ApiInbox, ApiReply, ApiRequest, VmInfo, VmState, VmmPing};
use crate::config::VmConfig;
use crate::notice::{ExitReason, NoticeInbox};
use crate::machine::{Host, Machine};
use crate::signals::Signals;

/// What there is of a VM.
enum Guest {
    /// No VM.
    None,
    /// A VM that is configured, not running: never booted, or switched off.
    Off { config: Box<VmConfig>, state: VmState },
    /// A built VM.
    On { config: Box<VmConfig>, machine: Box<Machine>, paused: bool },
}

/// The control loop.
pub struct Control {
    host: Host,
    inbox: ApiInbox,
    exits: NoticeInbox<ExitReason>,
    signals: Signals,
    guest: Guest,
    /// The process serves one VM and ends with it.
    end_with_guest: bool,
}

impl Control {
    /// A loop without a VM. With `end_with_guest` (the VM came from the command line) the process
    /// ends when the guest switches itself off.
    pub fn new(
        host: Host,
        inbox: ApiInbox,
        exits: NoticeInbox<ExitReason>,
        signals: Signals,
        end_with_guest: bool,
    ) -> Self {
        Self { host, inbox, exits, signals, guest: Guest::None, end_with_guest }
    }

    /// Creates and boots a VM, as the requests `vm.create` and `vm.boot` would.
    ///
    /// # Errors
    /// As theirs.
    pub fn create_and_boot(&mut self, config: VmConfig) -> Result<(), ApiError> {
        self.create(config)?;
        self.boot()
    }

    /// Serves until asked to end.
    ///
    /// # Errors
    /// When waiting fails.
    pub fn run(&mut self) -> io::Result<()> {
        loop {
            self.wait()?;
            if self.signals.came() {
                tracing::info!("asked to end by a signal");
                return Ok(());
            }
            while let Some(reason) = self.exits.take() {
                if self.guest_wants(reason) {
                    return Ok(());
                }
            }
            while let Some((request, responder)) = self.inbox.take() {
                let ends = matches!(request, ApiRequest::VmmShutdown);
                let answer = self.answer(request);
                responder.respond(answer);
                if ends {
                    return Ok(());
                }
            }
        }
    }

    fn wait(&self) -> io::Result<()> {
        let mut fds = [
            PollFd::new(&self.inbox, PollFlags::IN),
            PollFd::new(&self.exits, PollFlags::IN),
            PollFd::new(&self.signals, PollFlags::IN),
        ];
        match poll(&mut fds, None) {
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
            ApiRequest::VmCreate(config) => self.create(*config).map(|()| ApiReply::Empty),
            ApiRequest::VmBoot => self.boot().map(|()| ApiReply::Empty),
            ApiRequest::VmInfo => self.info().map(|info| ApiReply::Info(Box::new(info))),
            ApiRequest::VmPause => self.pause().map(|()| ApiReply::Empty),
            ApiRequest::VmResume => self.resume().map(|()| ApiReply::Empty),
            ApiRequest::VmShutdown => self.shutdown().map(|()| ApiReply::Empty),
            ApiRequest::VmDelete => self.delete().map(|()| ApiReply::Empty),
            _ => Err(ApiError::not_found("not yet")),
        }
    }

    fn create(&mut self, config: VmConfig) -> Result<(), ApiError> {
        match self.guest {
            Guest::None => {
                let config = Box::new(config);
                self.guest = Guest::Off { config, state: VmState::Created };
                Ok(())
            }
            Guest::Off { .. } | Guest::On { .. } => {
                Err(ApiError::conflict("a VM exists already: delete it first (vm.delete)"))
            }
        }
    }

    fn boot(&mut self) -> Result<(), ApiError> {
        let Guest::Off { config, .. } = &self.guest else { return Err(self.not("boot")) };
        self.host.events.tell(Event::Booting);
        let machine = build(config, &self.host)?;
        self.guest = Guest::On {
            config: config.clone(),
            machine: Box::new(machine),
            paused: false,
        };
        self.host.events.tell(Event::Booted);
        Ok(())
    }

    fn info(&self) -> Result<VmInfo, ApiError> {
        let (config, state) = match &self.guest {
            Guest::None => return Err(self.not("describe")),
            Guest::Off { config, state } => (config, *state),
            Guest::On { config, paused: true, .. } => (config, VmState::Paused),
            Guest::On { config, paused: false, .. } => (config, VmState::Running),
        };
        Ok(VmInfo {
            config: (**config).clone(),
            state,
            memory_actual_size: config.memory.size,
            devices: Default::default(),
        })
    }

    fn pause(&mut self) -> Result<(), ApiError> {
        let Guest::On { machine, paused: paused @ false, .. } = &mut self.guest else {
            return Err(self.not("pause"));
        };
        self.host.events.tell(Event::Pausing);
        machine.pause().map_err(|error| ApiError::internal(&error))?;
        *paused = true;
        self.host.events.tell(Event::Paused);
        Ok(())
    }

    fn resume(&mut self) -> Result<(), ApiError> {
        let Guest::On { machine, paused: paused @ true, .. } = &mut self.guest else {
            return Err(self.not("resume"));
        };
        self.host.events.tell(Event::Resuming);
        machine.resume().map_err(|error| ApiError::internal(&error))?;
        *paused = false;
        self.host.events.tell(Event::Resumed);
        Ok(())
    }

    fn shutdown(&mut self) -> Result<(), ApiError> {
        let Guest::On { config, .. } = &self.guest else { return Err(self.not("switch off")) };
        self.guest = Guest::Off { config: config.clone(), state: VmState::Shutdown };
        self.host.events.tell(Event::Shutdown);
        Ok(())
    }

    fn delete(&mut self) -> Result<(), ApiError> {
        if matches!(self.guest, Guest::None) {
            return Err(self.not("delete"));
        }
        self.guest = Guest::None;
        self.host.events.tell(Event::Deleted);
        Ok(())
    }

    /// Why the VM cannot do `what` in the state it is in.
    fn not(&self, what: &str) -> ApiError {
        match &self.guest {
            Guest::None => ApiError::not_found(format!(
                "there is no VM to {what}: create one first (vm.create)"
            )),
            Guest::Off { state, .. } => {
                ApiError::conflict(format!("cannot {what} a VM that is {state:?}"))
            }
            Guest::On { paused, .. } => {
                let state = if *paused { "paused" } else { "running" };
                ApiError::conflict(format!("cannot {what} a VM that is {state}"))
            }
        }
    }

    /// Does what the guest asks or suffers; says whether the process shall end.
    fn guest_wants(&mut self, reason: ExitReason) -> bool {
        match reason {
            ExitReason::PowerOff => {
                tracing::info!("the guest switched itself off");
                // Late news of a VM that is off already says nothing new.
                let _ = self.shutdown();
                self.end_with_guest
            }
            ExitReason::Reset => {
                tracing::info!("the guest resets");
                let done = self.shutdown().and_then(|()| self.boot());
                if let Err(error) = done {
                    tracing::error!(?error, "the guest could not be booted again");
                    return self.end_with_guest;
                }
                false
            }
            ExitReason::Failed(reason) => {
                tracing::error!(reason, "the guest cannot go on; it is switched off");
                let _ = self.shutdown();
                self.end_with_guest
            }
            ExitReason::DeviceLost { id, reason } => {
                tracing::error!(id, reason, "a device is gone");
                self.host.events.tell(Event::DeviceLost { id, reason });
                false
            }
        }
    }
}

fn build(config: &VmConfig, host: &Host) -> Result<Machine, ApiError> {
    let failed = |error: crate::machine::MachineError| ApiError::internal(&error);
    let machine = Machine::new(config, host).map_err(failed)?;
    machine.load(config).map_err(failed)?;
    machine.resume().map_err(failed)?;
    Ok(machine)
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
