//! Pausing, saving and restoring a virtio PCI function.

use pci::{ConfigState, MsixState};
use serde::{Deserialize, Serialize};
use vm_migration::ErrorChain;
use vm_migration::state::{Pause, SaveRestore, StateError};

use super::common::{Phase, Registers};
use super::{Run, VirtioPciDevice};
use crate::device::DeviceError;
use crate::net::MAX_WAITING_BYTES;

/// Version of [`TransportState`].
const VERSION: u16 = 1;

/// Everything of a function, in the order it is restored.
#[derive(Serialize, Deserialize)]
struct TransportState {
    version: u16,
    config: ConfigState,
    registers: Registers,
    queue_vectors: Vec<u16>,
    config_vector: u16,
    /// ISR, configuration generation, reset request.
    interrupts: (u8, u8, bool),
    msix: MsixState,
    device: Vec<u8>,
}

impl VirtioPciDevice {
    fn bad(&self, reason: impl Into<String>) -> StateError {
        StateError::BadState {
            id: self.id.clone(),
            reason: reason.into(),
        }
    }

    fn failed(
        &self,
        operation: &'static str,
        cause: impl std::error::Error + Send + Sync + 'static,
    ) -> StateError {
        StateError::Failed {
            id: self.id.clone(),
            operation,
            cause: Box::new(cause),
        }
    }

    fn require_paused(&self, operation: &'static str) -> Result<(), StateError> {
        let state = match self.run {
            Run::Paused => return Ok(()),
            Run::Idle => "not paused",
            Run::Serving => "serving",
        };
        Err(self.failed(
            operation,
            DeviceError::WrongState {
                device: self.id.clone(),
                operation,
                state,
            },
        ))
    }

    /// Checks saved registers against the device here, before anything is changed.
    fn check_registers(&self, saved: &TransportState) -> Result<(), StateError> {
        let sizes = self.device.queue_sizes();
        let registers = &saved.registers;
        if registers.queues.len() != sizes.len() || saved.queue_vectors.len() != sizes.len() {
            return Err(self.bad(format!(
                "it has {} queues, the device here has {}: configure the same number on both ends",
                registers.queues.len(),
                sizes.len()
            )));
        }
        for (index, (queue, max)) in registers.queues.iter().zip(sizes).enumerate() {
            if !queue.size.is_power_of_two() || queue.size > *max {
                return Err(self.bad(format!(
                    "queue {index} has size {}, the device here allows powers of two up to {max}",
                    queue.size
                )));
            }
        }
        let missing = registers.driver_features & !self.device.features();
        match registers.phase {
            Phase::Probing | Phase::Failed => Ok(()),
            Phase::Negotiated | Phase::Live if missing != 0 => Err(self.bad(format!(
                "its driver uses features {missing:#x} that the device here does not offer: \
                 configure it, and its host interface, as at the source"
            ))),
            Phase::Negotiated | Phase::Live => registers
                .check_features(self.device.as_ref())
                .map_err(|reason| self.bad(format!("its features are not valid: {reason}"))),
        }
    }
}

impl Pause for VirtioPciDevice {
    fn pause(&mut self) -> Result<(), StateError> {
        let stopped = self.stop();
        self.run = Run::Paused;
        stopped.map_err(|cause| self.failed("pause", cause))
    }

    fn resume(&mut self) -> Result<(), StateError> {
        if self.run != Run::Paused {
            return Ok(());
        }
        self.run = Run::Idle;
        if !self.wants_service() {
            return Ok(());
        }
        match self.activate() {
            Ok(()) => {
                self.run = Run::Serving;
                self.wake_all();
                Ok(())
            }
            Err(error) => {
                self.device.reset();
                let error = self.failed("resume", error);
                crate::device::DeviceInterrupt::needs_reset(
                    self.interrupts.as_ref(),
                    &ErrorChain(&error),
                );
                Err(error)
            }
        }
    }
}

impl SaveRestore for VirtioPciDevice {
    /// Configuration space, 256 vectors, 255 queues and 64 KiB for the device fit with room, and
    /// behind that what a network card has to keep of packets.
    const MAX_STATE_BYTES: usize = (128 << 10) + MAX_WAITING_BYTES;

    fn expected_bytes(&self) -> usize {
        /// Configuration space and the device's own state.
        const FIXED: usize = 2048;
        /// A queue's registers and position, and its vector.
        const PER_QUEUE: usize = 128;
        FIXED + PER_QUEUE * self.kicks.len()
    }

    fn save(&mut self) -> Result<Vec<u8>, StateError> {
        self.require_paused("save")?;
        let device = self
            .device
            .save()
            .map_err(|cause| self.failed("save", cause))?;
        let queues = self.device.queue_sizes().len();
        let state = TransportState {
            version: VERSION,
            config: self.config.save(),
            registers: self.registers.clone(),
            queue_vectors: (0..)
                .take(queues)
                .map(|index| self.interrupts.queue_vector(index))
                .collect(),
            config_vector: self.interrupts.config_vector(),
            interrupts: self.interrupts.save(),
            msix: self.msix.save(),
            device,
        };
        postcard::to_stdvec(&state).map_err(|cause| self.failed("save", cause))
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), StateError> {
        if self.run == Run::Serving {
            return self.require_paused("restore");
        }
        if state.len() > Self::MAX_STATE_BYTES {
            return Err(self.bad(format!("{} bytes is too long", state.len())));
        }
        let (version, _) = postcard::take_from_bytes::<u16>(state)
            .map_err(|error| self.bad(format!("no version: {error}")))?;
        if version != VERSION {
            return Err(self.bad(format!(
                "version {version}, this build reads version {VERSION}"
            )));
        }
        let state: TransportState =
            postcard::from_bytes(state).map_err(|error| self.bad(format!("malformed: {error}")))?;
        self.check_registers(&state)?;

        self.reset_virtio();
        self.run = Run::Paused;
        self.device
            .restore(&state.device)
            .map_err(|cause| self.failed("restore", cause))?;
        self.config
            .restore(&state.config)
            .map_err(|cause| self.failed("restore", cause))?;
        for (index, vector) in (0..).zip(&state.queue_vectors) {
            self.interrupts.set_queue_vector(index, *vector);
        }
        self.interrupts.set_config_vector(state.config_vector);
        self.interrupts.restore(state.interrupts);
        self.registers = state.registers;
        self.follow_msix_control();
        self.msix
            .restore(&state.msix)
            .map_err(|cause| self.failed("restore", cause))?;
        self.interrupts.set_msix_enabled(self.msix.is_enabled());
        Ok(())
    }
}
