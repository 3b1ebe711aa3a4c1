//! The seam between a transport and a device.

use std::fmt;
use std::io;
use std::sync::Arc;

use devices::ThreadSpawner;
use vm_migration::memory::MemoryHandle;
use vmm_sys_util::eventfd::EventFd;

use crate::queue::{Queue, RingError};
use crate::vhost_user::VhostUserError;

/// Feature bits that belong to the ring and the transport, not to one kind of device
/// (virtio 1.2, section 6).
pub mod feature {
    /// `VIRTIO_F_INDIRECT_DESC`: descriptors may point to tables of descriptors.
    pub const RING_INDIRECT_DESC: u64 = 1 << 28;
    /// `VIRTIO_F_EVENT_IDX`: both sides say at which index they want to be woken.
    pub const RING_EVENT_IDX: u64 = 1 << 29;
    /// `VIRTIO_F_VERSION_1`: not a legacy device. Always offered, and required.
    pub const VERSION_1: u64 = 1 << 32;
}

/// Kind of a device (virtio 1.2, section 5).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DeviceType {
    /// Network card.
    Net,
    /// Console.
    Console,
    /// Entropy source.
    Entropy,
}

impl DeviceType {
    /// The virtio device ID.
    pub const fn id(self) -> u16 {
        match self {
            Self::Net => 1,
            Self::Console => 3,
            Self::Entropy => 4,
        }
    }

    /// PCI class code: base class, subclass, programming interface.
    pub const fn pci_class(self) -> [u8; 3] {
        match self {
            Self::Net => [0x02, 0x00, 0x00],
            Self::Console => [0x07, 0x80, 0x00],
            Self::Entropy => [0xff, 0x00, 0x00],
        }
    }
}

/// Why a device could not do what its transport asked.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The driver set up fewer queues than the negotiated features need.
    #[error("{device}: the driver left queue {index} disabled, which the device needs")]
    MissingQueue {
        /// Which device.
        device: String,
        /// Number of the queue.
        index: u16,
    },
    /// A queue is not usable.
    #[error("{device}: queue {index} is not usable")]
    Ring {
        /// Which device.
        device: String,
        /// Number of the queue.
        index: u16,
        /// Why.
        #[source]
        cause: RingError,
    },
    /// The host refused something the device needs.
    #[error("{device}: {operation} failed")]
    Host {
        /// Which device.
        device: String,
        /// What was tried.
        operation: &'static str,
        /// What the host said.
        #[source]
        cause: io::Error,
    },
    /// The process that serves the device's queues failed or refused.
    #[error("{device}: its backend cannot serve it")]
    VhostUser {
        /// Which device.
        device: String,
        /// What happened.
        #[source]
        cause: VhostUserError,
    },
    /// A worker thread ended on its own and took its queues with it.
    #[error("{device}: its thread {thread} ended unexpectedly; see the log for the reason")]
    ThreadLost {
        /// Which device.
        device: String,
        /// Name of the thread.
        thread: String,
    },
    /// The device is in the wrong state for the call.
    #[error("{device}: {operation} while the device is {state}")]
    WrongState {
        /// Which device.
        device: String,
        /// What was asked.
        operation: &'static str,
        /// What the device is doing.
        state: &'static str,
    },
    /// Saved state is malformed or does not fit this device.
    #[error("{device}: saved state is not acceptable: {reason}")]
    BadState {
        /// Which device.
        device: String,
        /// What is wrong with it.
        reason: String,
    },
}

/// How a device reaches its driver. All methods may be called from any thread and never block.
pub trait DeviceInterrupt: Send + Sync {
    /// Buffers of queue `index` were used.
    fn queue_used(&self, index: u16);
    /// The eventfd that signals queue `index`'s vector, for another process that raises interrupts
    /// by itself. `None` if there is none now (no vector, or MSI-X is off): then only
    /// [`queue_used`](Self::queue_used) reaches the driver. When the driver changes the vector,
    /// the transport deactivates the device and activates it again.
    fn queue_event(&self, index: u16) -> Option<EventFd>;
    /// Fields of the device's configuration changed.
    fn config_changed(&self);
    /// The driver broke the protocol, or the host fails the device: it has stopped, and asks for
    /// a reset (`DEVICE_NEEDS_RESET`, section 2.1.2). The transport logs `reason`.
    fn needs_reset(&self, reason: &dyn fmt::Display);
}

/// A queue, and what wakes the device when the driver added to it.
#[derive(Debug)]
pub struct ActiveQueue {
    /// The queue.
    pub queue: Queue,
    /// Signalled by the driver's kicks.
    pub kick: EventFd,
}

/// All that a device needs to serve its driver.
pub struct Activation {
    /// Guest memory.
    pub memory: MemoryHandle,
    /// The queues the driver enabled, in order of their numbers.
    pub queues: Vec<ActiveQueue>,
    /// The way to the driver.
    pub interrupt: Arc<dyn DeviceInterrupt>,
    /// Negotiated features, a subset of those offered.
    pub features: u64,
    /// Where worker threads come from.
    pub spawner: ThreadSpawner,
}

impl fmt::Debug for Activation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Activation")
            .field("queues", &self.queues)
            .field("features", &format_args!("{:#x}", self.features))
            .finish_non_exhaustive()
    }
}

/// A virtio device without its transport.
///
/// Calls come in this order: [`activate`](Self::activate) when the driver is ready,
/// [`deactivate`](Self::deactivate) to pause, [`activate`](Self::activate) with the same queues
/// to go on, and [`reset`](Self::reset) at any time. [`save`](Self::save) and
/// [`restore`](Self::restore) are called on a device that is not active; after a restore the
/// first activation goes on where the saved device stopped.
pub trait VirtioDevice: Send {
    /// Identifier in the VM's configuration, for messages and thread names.
    fn id(&self) -> &str;

    /// Kind of device.
    fn device_type(&self) -> DeviceType;

    /// Features offered, [`feature::VERSION_1`] among them.
    fn features(&self) -> u64;

    /// Whether the driver may use just these features together (a subset of those offered).
    ///
    /// # Errors
    /// What is missing or contradictory, for the log; `FEATURES_OK` is then refused.
    fn check_features(&self, features: u64) -> Result<(), &'static str>;

    /// Largest size of each queue; the number of entries is the number of queues.
    fn queue_sizes(&self) -> &[u16];

    /// Size of the device's configuration space in bytes.
    fn config_len(&self) -> u16;

    /// Reads the device's configuration space. Bytes beyond its end read as zero.
    fn read_config(&self, offset: u16, data: &mut [u8]);

    /// Writes the device's configuration space. Fields the driver may not write do not change.
    fn write_config(&mut self, offset: u16, data: &[u8]);

    /// Serves the driver until [`deactivate`](Self::deactivate) or [`reset`](Self::reset).
    ///
    /// # Errors
    /// Any [`DeviceError`]; the queues are lost, and the device must be reset.
    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError>;

    /// Stops all worker threads at a boundary between two requests and gives the queues back in
    /// order of their numbers. On return nothing of the device writes guest memory. Everything
    /// else (what was negotiated on control queues, say) is kept.
    ///
    /// # Errors
    /// [`DeviceError::ThreadLost`]; no thread runs any more all the same.
    fn deactivate(&mut self) -> Result<Vec<Queue>, DeviceError>;

    /// Stops all worker threads and forgets everything the driver did.
    fn reset(&mut self);

    /// The device's own state, versioned.
    ///
    /// # Errors
    /// [`DeviceError::WrongState`] if the device is active.
    fn save(&self) -> Result<Vec<u8>, DeviceError>;

    /// Takes over state from [`save`](Self::save) on another instance. Untrusted.
    ///
    /// # Errors
    /// [`DeviceError::BadState`], or [`DeviceError::WrongState`] if the device is active.
    fn restore(&mut self, state: &[u8]) -> Result<(), DeviceError>;
}

/// Copies `data.len()` bytes of `config` from `offset`; what is beyond its end is zero.
pub(crate) fn read_config_bytes(config: &[u8], offset: u16, data: &mut [u8]) {
    data.fill(0);
    let rest = config.get(usize::from(offset)..).unwrap_or_default();
    for (to, from) in data.iter_mut().zip(rest) {
        *to = *from;
    }
}
