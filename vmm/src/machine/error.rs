//! What can go wrong with a machine.

use std::io;

use devices::bus::BusError;
use devices::interrupt::InterruptError;
use devices::terminal::TerminalError;
use vm_migration::StateError;

use crate::acpi::AcpiError;
use crate::boot::BootError;
use crate::memory::MemoryError;
use crate::vcpu::VcpuError;

/// Why a machine cannot be built or do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// The hypervisor refused.
    #[error("the hypervisor cannot {operation}")]
    Hypervisor {
        /// What was asked.
        operation: &'static str,
        /// Why it refused.
        #[source]
        cause: hypervisor::Error,
    },
    /// There is no RAM.
    #[error("cannot make guest RAM")]
    Memory(#[source] MemoryError),
    /// Interrupts cannot be set up.
    #[error("cannot set up interrupts")]
    Interrupts(#[source] InterruptError),
    /// vCPUs cannot start, stop or go on.
    #[error("vCPUs")]
    Vcpu(#[source] VcpuError),
    /// There is nothing to boot.
    #[error("there is no kernel: give --kernel (payload.kernel)")]
    NoKernel,
    /// The kernel cannot be loaded.
    #[error("cannot load the guest")]
    Boot(#[source] BootError),
    /// The tables cannot be written.
    #[error("cannot write ACPI tables")]
    Acpi(#[source] AcpiError),
    /// A console cannot be connected.
    #[error("cannot connect {device}")]
    Terminal {
        /// Which console.
        device: &'static str,
        /// Why.
        #[source]
        cause: TerminalError,
    },
    /// A device cannot be made.
    #[error("cannot make device {id}")]
    Device {
        /// Which device.
        id: String,
        /// Why.
        #[source]
        cause: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A device cannot be put on its bus.
    #[error("cannot place {what}")]
    Bus {
        /// What was to be placed.
        what: String,
        /// Why not.
        #[source]
        cause: BusError,
    },
    /// A device cannot stop or go on.
    #[error("a device cannot {operation}")]
    State {
        /// What was asked.
        operation: &'static str,
        /// Why not.
        #[source]
        cause: StateError,
    },
    /// An eventfd or thread is not to be had.
    #[error("out of host resources for {what}")]
    Resources {
        /// What for.
        what: &'static str,
        /// What the system said.
        #[source]
        cause: io::Error,
    },
    /// There is no such device on the PCI bus.
    #[error("there is no device {id} to remove: vm.info lists those there are")]
    UnknownDevice {
        /// What was asked for.
        id: String,
    },
    /// A device does not come or go.
    #[error("cannot plug or unplug device {id}")]
    HotPlug {
        /// Which device.
        id: String,
        /// Why.
        #[source]
        cause: pci::HotPlugError,
    },
    /// The bus is full.
    #[error("no room on the PCI bus for {id}")]
    NoRoom {
        /// Which device.
        id: String,
    },
}

impl MachineError {
    /// An error of the hypervisor in `operation`.
    pub(crate) fn hypervisor(operation: &'static str) -> impl Fn(hypervisor::Error) -> Self + Copy {
        move |cause| Self::Hypervisor { operation, cause }
    }

    /// The device it is about, if it is about one.
    pub fn device_id(&self) -> Option<&str> {
        match self {
            Self::Device { id, .. }
            | Self::NoRoom { id }
            | Self::HotPlug { id, .. }
            | Self::UnknownDevice { id } => Some(id),
            _ => None,
        }
    }

    /// An error in making device `id`.
    pub(crate) fn device<E>(id: &str) -> impl FnOnce(E) -> Self
    where
        E: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let id = id.to_owned();
        move |cause| Self::Device {
            id,
            cause: cause.into(),
        }
    }
}
