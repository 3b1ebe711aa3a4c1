//! What there is of a VM, and what can be done to it.

use event_monitor::{Event, EventMonitor};

use crate::api::{ApiError, Counters, Facts, VmInfo, VmState};
use crate::config::{DirtyLogConfig, VmConfig};
use crate::machine::{Host, Machine, MachineError};
use crate::metrics::VmSnapshot;
use crate::migrate::{Arrived, Stranded};

/// What there is of a VM.
pub(super) enum Guest {
    /// No VM.
    None,
    /// A VM that is configured, not running: never booted, or switched off.
    Off {
        /// Its configuration.
        config: Box<VmConfig>,
        /// Created or shut down.
        state: VmState,
    },
    /// A built VM.
    On {
        /// Whether it runs.
        pace: Pace,
        /// Its configuration.
        config: Box<VmConfig>,
        /// The VM.
        machine: Box<Machine>,
    },
}

/// Whether a built VM runs. Dropped before the machine, whose devices a stranded one holds.
pub(super) enum Pace {
    /// vCPUs and devices run.
    Running,
    /// They stand still, as somebody asked.
    Paused,
    /// They stand still since a migration that ended in the dark: the guest may run elsewhere.
    Stranded(Stranded),
}

fn internal(error: &MachineError) -> ApiError {
    ApiError::internal(error)
}

impl Guest {
    /// A VM that came from another host and runs.
    pub(super) fn arrived(arrived: Arrived) -> Self {
        Self::On {
            config: Box::new(arrived.config),
            machine: Box::new(arrived.machine),
            pace: Pace::Running,
        }
    }

    pub(super) fn create(&mut self, config: VmConfig) -> Result<(), ApiError> {
        match self {
            Self::None => {
                *self = Self::Off {
                    config: Box::new(config),
                    state: VmState::Created,
                };
                Ok(())
            }
            Self::Off { .. } | Self::On { .. } => Err(ApiError::conflict(
                "a VM exists already: delete it first (vm.delete)",
            )),
        }
    }

    pub(super) fn boot(&mut self, host: &Host) -> Result<(), ApiError> {
        let Self::Off { config, .. } = self else {
            return Err(self.cannot("boot"));
        };
        host.events.tell(Event::Booting);
        let machine = Machine::new(config, host).map_err(|error| internal(&error))?;
        machine.load(config).map_err(|error| internal(&error))?;
        machine.resume().map_err(|error| internal(&error))?;
        *self = Self::On {
            config: config.clone(),
            machine: Box::new(machine),
            pace: Pace::Running,
        };
        host.events.tell(Event::Booted);
        Ok(())
    }

    pub(super) fn pause(&mut self, events: &EventMonitor) -> Result<(), ApiError> {
        let Self::On {
            machine,
            pace: pace @ Pace::Running,
            ..
        } = self
        else {
            return Err(self.cannot("pause"));
        };
        events.tell(Event::Pausing);
        machine.pause().map_err(|error| internal(&error))?;
        *pace = Pace::Paused;
        events.tell(Event::Paused);
        Ok(())
    }

    pub(super) fn resume(&mut self, events: &EventMonitor) -> Result<(), ApiError> {
        let (machine, pace) = match self {
            Self::On {
                pace: Pace::Running,
                ..
            }
            | Self::None
            | Self::Off { .. } => return Err(self.cannot("resume")),
            Self::On { machine, pace, .. } => (machine, pace),
        };
        events.tell(Event::Resuming);
        match std::mem::replace(pace, Pace::Running) {
            Pace::Stranded(stranded) => {
                tracing::warn!("the guest that was handed over is resumed here, by request");
                for problem in stranded.take_back() {
                    tracing::error!(problem, "after taking the guest back");
                }
            }
            Pace::Paused | Pace::Running => {
                if let Err(error) = machine.resume() {
                    *pace = Pace::Paused;
                    return Err(internal(&error));
                }
            }
        }
        events.tell(Event::Resumed);
        Ok(())
    }

    pub(super) fn shutdown(&mut self, events: &EventMonitor) -> Result<(), ApiError> {
        let Self::On {
            config, machine, ..
        } = self
        else {
            return Err(self.cannot("switch off"));
        };
        // A guest that is off has ejected all that it was to eject.
        let gone = machine.devices().on_their_way_out();
        if !gone.is_empty() {
            machine.pin_slots(config);
        }
        for id in gone {
            config.remove_device(&id);
            events.tell(Event::DeviceRemoved { id });
        }
        *self = Self::Off {
            config: config.clone(),
            state: VmState::Shutdown,
        };
        events.tell(Event::Shutdown);
        Ok(())
    }

    pub(super) fn delete(&mut self, events: &EventMonitor) -> Result<(), ApiError> {
        if matches!(self, Self::None) {
            return Err(self.cannot("delete"));
        }
        *self = Self::None;
        events.tell(Event::Deleted);
        Ok(())
    }

    /// A VM that runs, for something that needs one.
    pub(super) fn running(&self, what: &str) -> Result<(&VmConfig, &Machine), ApiError> {
        match self {
            Self::On {
                config,
                machine,
                pace: Pace::Running,
            } => Ok((config, machine)),
            Self::None | Self::Off { .. } | Self::On { .. } => Err(self.cannot(what)),
        }
    }

    /// A migration left the guest standing still.
    pub(super) fn strand(&mut self, stranded: Stranded) {
        if let Self::On { pace, .. } = self {
            *pace = Pace::Stranded(stranded);
        }
    }

    fn state(&self) -> Option<(&VmConfig, VmState)> {
        match self {
            Self::None => None,
            Self::Off { config, state } => Some((config, *state)),
            Self::On {
                config,
                pace: Pace::Running,
                ..
            } => Some((config, VmState::Running)),
            Self::On { config, .. } => Some((config, VmState::Paused)),
        }
    }

    pub(super) fn info(&self) -> Result<VmInfo, ApiError> {
        let (config, state) = self.state().ok_or_else(|| self.cannot("describe"))?;
        Ok(VmInfo {
            config: config.clone(),
            state,
            memory_actual_size: config.memory.size,
            devices: self.facts(),
            dirty_log: self.dirty_log(),
        })
    }

    fn dirty_log(&self) -> Option<DirtyLogConfig> {
        match self {
            Self::On { machine, .. } => Some(machine.vm().dirty_log_method().into()),
            Self::None | Self::Off { .. } => None,
        }
    }

    pub(super) fn facts(&self) -> Facts {
        let Self::On { machine, .. } = self else {
            return Facts::new();
        };
        machine.devices().facts()
    }

    pub(super) fn counters(&self) -> Result<Counters, ApiError> {
        match self {
            Self::On { machine, .. } => Ok(machine.counters()),
            Self::None | Self::Off { .. } => Err(self.cannot("count")),
        }
    }

    pub(super) fn metrics<'a>(
        &self,
        counters: &'a Counters,
        facts: &'a Facts,
    ) -> Option<VmSnapshot<'a>> {
        let (config, state) = self.state()?;
        Some(VmSnapshot {
            state,
            vcpus: config.cpus.boot_vcpus,
            memory_bytes: config.memory.size,
            counters,
            facts,
        })
    }

    /// Why the VM cannot do `what` in the state it is in.
    pub(super) fn cannot(&self, what: &str) -> ApiError {
        match self {
            Self::None => ApiError::not_found(format!(
                "there is no VM to {what}: create one first (vm.create)"
            )),
            Self::Off { state, .. } => ApiError::conflict(format!(
                "cannot {what} a VM that is {}",
                if *state == VmState::Created {
                    "not booted"
                } else {
                    "shut down"
                }
            )),
            Self::On { pace, .. } => {
                let state = match pace {
                    Pace::Running => "running",
                    Pace::Paused => "paused",
                    Pace::Stranded(_) => "paused, as it was handed over to another host",
                };
                ApiError::conflict(format!("cannot {what} a VM that is {state}"))
            }
        }
    }
}
