//! One PCI device of somebody else, passed through to the guest.
//!
//! A [`Passthrough`] is a PCI function on the guest's bus whose BARs and most of whose
//! configuration space are the real device's, reached through a [`Backend`]: a vfio-user server in
//! another process ([`VfioUserBackend`]). The VMM answers for itself only what would break out of
//! the guest or be wrong there: BAR addresses, and MSI-X, whose vectors are eventfds that the
//! device signals and KVM delivers.
//!
//! The device reads and writes guest memory on its own, so:
//! - all RAM is mapped for it by file ([`Passthrough::map_memory`]);
//! - what it writes during a migration comes from its own log ([`Passthrough::dirty_source`]);
//! - its state streams out and in over VFIO's migration states ([`Passthrough::state_source`],
//!   [`Passthrough::state_sink`]), with a small frame of the VMM's own.
//!
//! When the backend dies, the guest reads all ones, as from a device that was pulled out, the
//! cause is logged once, and whoever connected it is told.

#![deny(unsafe_code)]

pub mod backend;
pub mod device;
mod dirty;
mod fd;
pub mod front;
mod pause;
pub mod profile;
mod recovery;
mod sink;
mod source;
mod stream;
pub mod user_backend;

#[cfg(test)]
mod fake;

pub use backend::{Backend, BackendError};
pub use device::{MappableArea, Passthrough, PassthroughError};
pub use dirty::PassthroughDirty;
pub use front::FrontError;
pub use profile::{DeviceIdentity, DeviceProfile, VirtioOffer};
pub use sink::PassthroughSink;
pub use source::PassthroughSource;
pub use user_backend::{GoneCallback, VfioUserBackend, client_config};
pub use vfio_user::MigrationFlags;
