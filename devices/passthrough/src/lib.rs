//! One PCI device of somebody else, passed through to the guest.
//!
//! A [`Passthrough`] is a PCI function on the guest's bus whose BARs and most of whose
//! configuration space are the real device's, reached through a [`Backend`]: a vfio-user server in
//! another process ([`VfioUserBackend`]), or a device of the host behind the kernel's VFIO
//! ([`KernelVfioBackend`]). The VMM answers for itself only what would break out of
//! the guest or be wrong there: BAR addresses, and MSI-X, whose vectors are eventfds that the
//! device signals and KVM delivers.
//!
//! The device reads and writes guest memory on its own, so:
//! - all RAM is mapped for it ([`Passthrough::map_memory`]);
//! - what it writes during a migration comes from its own log, or the next best that there is
//!   ([`DirtyRung`], [`dirty_sources`]);
//! - its state streams out and in over VFIO's migration states ([`Passthrough::state_source`],
//!   [`Passthrough::state_sink`]), with a small frame of the VMM's own.
//!
//! When the backend dies, the guest reads all ones, as from a device that was pulled out, the
//! cause is logged once, and whoever connected it is told.

#![deny(unsafe_code)]

mod areas;
pub mod backend;
pub mod device;
mod dirty;
mod fd;
pub mod front;
mod irqs;
pub mod kernel;
mod pause;
pub mod profile;
mod recovery;
mod rung;
mod sink;
mod source;
mod stream;
pub mod user_backend;

#[cfg(test)]
mod fake;
#[cfg(test)]
mod hotplug_tests;

pub use areas::MappableArea;
pub use backend::{Backend, BackendError, IrqKind, SharedLog};
pub use device::{Passthrough, PassthroughError};
pub use dirty::{PassthroughDirty, dirty_sources};
pub use front::FrontError;
pub use kernel::{DeviceNews, HostKernel, HostVfio, KernelError, KernelVfioBackend};
pub use profile::{DeviceIdentity, DeviceProfile, VirtioOffer};
pub use rung::{DirtyRung, EverythingDirty};
pub use sink::PassthroughSink;
pub use source::PassthroughSource;
pub use user_backend::{GoneCallback, VfioUserBackend, client_config};
pub use vfio_user::MigrationFlags;
