//! virtio devices: the ring, the PCI transport, and the network, console and entropy devices.
//!
//! # Where things are
//! * [`queue`]: the device's side of a virtqueue. All that the driver wrote is checked here.
//! * [`device`]: the seam. A [`VirtioDevice`] is told by its transport to
//!   [`activate`](VirtioDevice::activate) with queues, features and a way to raise interrupts,
//!   and to give the queues back.
//! * [`transport`]: [`VirtioPciDevice`], any such device as a PCI function.
//! * [`net`]: the network card on a tap.
//! * [`vhost_user`]: the network card whose queues another process serves.
//! * [`console`]: the console.
//! * [`rng`]: the entropy device.
//!
//! # Threads
//! A vCPU's accesses to registers come in under the device's mutex. The work is done by worker
//! threads (one per queue pair of a network card, one per other device) that own their queues,
//! share only atomics with the registers, and never take that mutex. Stopping a device joins its
//! threads, so when [`VirtioDevice::deactivate`] returns, guest memory is still.
//!
//! # The driver is hostile
//! Whatever it does to rings, descriptors and registers, the device neither panics nor loops: it
//! stops, sets `DEVICE_NEEDS_RESET` and logs why.

pub mod console;
pub mod device;
pub mod net;
mod poll;
pub mod queue;
pub mod rng;
mod server;
pub mod transport;
pub mod vhost_user;
mod worker;

#[cfg(test)]
mod testing;

pub use console::Console;
pub use device::{
    Activation, ActiveQueue, DeviceError, DeviceInterrupt, DeviceType, VirtioDevice, feature,
};
pub use net::{KernelHelp, Net, NetBackend, NetCounters, NetError, NetOptions, NetTotals};
pub use rng::{EntropySource, Rng};
pub use transport::{TransportError, VirtioPciDevice, VirtioPciParts};
pub use vhost_user::{
    VhostUserDirty, VhostUserError, VhostUserHandle, VhostUserNet, VhostUserOptions,
};
