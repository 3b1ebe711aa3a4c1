//! Parts of a machine that are no devices but have state that moves: the vCPUs, and what the
//! hypervisor keeps for the whole VM (interrupt chips, timer, clock).

use std::sync::Arc;

use hypervisor::{Vcpu, VcpuState, Vm, VmState};
use pci::{HotPlug, PciBus};
use vm_migration::{Pause, SaveRestore, StateError, saved};

use crate::config::MAX_VCPUS;
use crate::vcpu::Vcpus;

/// Identifier of the vCPUs' state.
pub(crate) const CPUS_ID: &str = "vcpus";
/// Identifier of the PCI bus's state.
pub(crate) const PCI_ID: &str = "pci";
/// Identifier of the state of hot plug.
pub(crate) const HOTPLUG_ID: &str = "hotplug";
/// Identifier of the state the hypervisor keeps for the whole VM.
pub(crate) const CHIPS_ID: &str = "vm";

/// Of the form of the vCPUs' state.
const VERSION: u16 = 1;

fn failed(
    id: &str,
    operation: &'static str,
    cause: impl Into<Box<dyn std::error::Error + Send + Sync>>,
) -> StateError {
    StateError::Failed {
        id: id.into(),
        operation,
        cause: cause.into(),
    }
}

/// All vCPUs as one part. They are paused and resumed by the migration engine itself, not as a
/// device, so that they stop first and start last.
pub struct CpuState(pub Arc<Vcpus>);

impl SaveRestore for CpuState {
    // A constant of small numbers.
    const MAX_STATE_BYTES: usize = VcpuState::MAX_BYTES * MAX_VCPUS as usize;

    fn expected_bytes(&self) -> usize {
        /// XSAVE area, local APIC, CPUID and a few hundred MSRs.
        const PER_CPU: usize = 16 << 10;
        PER_CPU * self.0.cpus().len()
    }

    fn save(&mut self) -> Result<Vec<u8>, StateError> {
        let mut cpus = Vec::new();
        for cpu in self.0.cpus() {
            let mut cpu = cpu.lock();
            let state = cpu.save().map_err(|cause| failed(CPUS_ID, "save", cause))?;
            mark_paused(&**cpu);
            cpus.push(
                state
                    .encode()
                    .map_err(|cause| failed(CPUS_ID, "save", cause))?,
            );
        }
        saved::encode(CPUS_ID, VERSION, &cpus)
    }

    fn restore(&mut self, bytes: &[u8]) -> Result<(), StateError> {
        let cpus: Vec<Vec<u8>> = saved::decode(CPUS_ID, VERSION, Self::MAX_STATE_BYTES, bytes)?;
        let (here, there) = (self.0.cpus().len(), cpus.len());
        if here != there {
            return Err(StateError::BadState {
                id: CPUS_ID.into(),
                reason: format!("{there} vCPUs were saved, {here} are here"),
            });
        }
        for (cpu, bytes) in self.0.cpus().iter().zip(&cpus) {
            let state =
                VcpuState::decode(bytes).map_err(|cause| failed(CPUS_ID, "decode", cause))?;
            cpu.lock()
                .restore(&state)
                .map_err(|cause| failed(CPUS_ID, "restore", cause))?;
        }
        Ok(())
    }
}

/// Tells the guest's clock watchdog that it stood still, so that it does not cry.
fn mark_paused(cpu: &dyn Vcpu) {
    if let Err(error) = cpu.mark_paused() {
        tracing::debug!(%error, "the guest cannot be told that it stood still");
    }
}

/// Interrupt chips, timer and clock.
pub struct VmChips(pub Arc<dyn Vm>);

impl SaveRestore for VmChips {
    const MAX_STATE_BYTES: usize = VmState::MAX_BYTES;

    fn expected_bytes(&self) -> usize {
        /// Three chips of 512 bytes, the timer and the clock.
        const ABOUT: usize = 2048;
        ABOUT
    }

    fn save(&mut self) -> Result<Vec<u8>, StateError> {
        let state = self
            .0
            .save()
            .map_err(|cause| failed(CHIPS_ID, "save", cause))?;
        state
            .encode()
            .map_err(|cause| failed(CHIPS_ID, "save", cause))
    }

    fn restore(&mut self, bytes: &[u8]) -> Result<(), StateError> {
        let state = VmState::decode(bytes).map_err(|cause| failed(CHIPS_ID, "decode", cause))?;
        self.0
            .restore(&state)
            .map_err(|cause| failed(CHIPS_ID, "restore", cause))
    }
}

/// The PCI bus. It is restored after the devices on it, and then maps their BARs.
pub struct BusState(pub Arc<PciBus>);

impl SaveRestore for BusState {
    // 32 names and a host bridge.
    const MAX_STATE_BYTES: usize = 64 << 10;

    fn expected_bytes(&self) -> usize {
        /// The bridge's registers, and the names of the devices.
        const ABOUT: usize = 1024;
        ABOUT
    }

    fn save(&mut self) -> Result<Vec<u8>, StateError> {
        postcard::to_stdvec(&self.0.save()).map_err(|cause| failed(PCI_ID, "save", cause))
    }

    fn restore(&mut self, bytes: &[u8]) -> Result<(), StateError> {
        let state = postcard::from_bytes(bytes).map_err(|error| StateError::BadState {
            id: PCI_ID.into(),
            reason: error.to_string(),
        })?;
        self.0
            .restore(&state)
            .map_err(|cause| failed(PCI_ID, "restore", cause))
    }
}

/// The hot-plug registers. Restored after the bus, some of whose devices the guest may have ejected.
pub struct PlugState(pub Arc<HotPlug>);

impl SaveRestore for PlugState {
    // A version and four sets of slots.
    const MAX_STATE_BYTES: usize = 64;

    fn expected_bytes(&self) -> usize {
        Self::MAX_STATE_BYTES
    }

    fn save(&mut self) -> Result<Vec<u8>, StateError> {
        postcard::to_stdvec(&self.0.save()).map_err(|cause| failed(HOTPLUG_ID, "save", cause))
    }

    fn restore(&mut self, bytes: &[u8]) -> Result<(), StateError> {
        let state = postcard::from_bytes(bytes).map_err(|error| StateError::BadState {
            id: HOTPLUG_ID.into(),
            reason: error.to_string(),
        })?;
        self.0
            .restore(&state)
            .map_err(|cause| failed(HOTPLUG_ID, "restore", cause))
    }
}

/// The vCPUs' switch, for the migration engine.
pub struct CpuSwitch(pub Arc<Vcpus>);

impl Pause for CpuSwitch {
    fn pause(&mut self) -> Result<(), StateError> {
        self.0
            .pause()
            .map_err(|cause| failed(CPUS_ID, "pause", cause))
    }

    fn resume(&mut self) -> Result<(), StateError> {
        self.0
            .resume()
            .map_err(|cause| failed(CPUS_ID, "resume", cause))
    }
}
