//! The VM's side of a live migration: what [`vm_migration`] sees of a [`Machine`].
//!
//! - `dirty`: KVM's dirty log as a source of dirty pages.
//! - `describe`: what a destination is told of the VM, and whether a VM here fits it.
//! - `send`, `receive`: the threads on either side, [`Sending`] and [`Receiving`].
//! - `leave`: taking down what a guest leaves behind, [`Leaving`].
//!
//! [`Machine`]: crate::machine::Machine

mod describe;
mod dirty;
mod leave;
mod receive;
mod send;

pub use leave::Leaving;
pub use receive::{Arrived, Receiving};
pub use send::{SendFailure, Sending, Stranded, Tools};

use event_monitor::EventMonitor;
use vm_migration::migrate::{MigrationError, MigrationEvent, Side, Status, TransportError};

use crate::config::ConfigError;
use crate::migration_events;

/// Why a migration could not be started, or how it failed.
#[derive(Debug, thiserror::Error)]
pub enum MigrateError {
    /// The URL is none.
    #[error("bad migration URL")]
    Address(#[source] ConfigError),
    /// The other side cannot be reached, or nobody may listen here.
    #[error("cannot connect")]
    Transport(#[source] TransportError),
    /// The migration failed.
    #[error("migration failed")]
    Engine(#[source] MigrationError),
    /// A device does not take part.
    #[error("a device cannot be migrated")]
    Device(#[source] vm_migration::StateError),
    /// The configuration cannot be told.
    #[error("cannot encode the VM's configuration")]
    Config(#[source] serde_json::Error),
    /// The CPU features cannot be told.
    #[error("cannot encode the CPU features")]
    Cpuid(#[source] postcard::Error),
    /// No thread or descriptor is to be had.
    #[error("out of host resources")]
    Resources(#[source] std::io::Error),
}

impl MigrateError {
    /// Whether the guest stands still here and must not simply go on: it may run at the
    /// destination.
    fn guest_is_paused(&self) -> bool {
        matches!(self, Self::Engine(error) if error.guest_is_paused())
    }
}

/// A migration ended before it had a connection: says so as the engine would have.
fn failed_early(status: &Status, events: &EventMonitor, side: Side) {
    status.enter(side.clone());
    migration_events::tell(events, &MigrationEvent::Phase(side));
}
