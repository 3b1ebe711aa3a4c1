//! Live migration between two hosts.
//!
//! The files read in the order of the conversation: [`protocol`] is what is said, [`frame`] the
//! envelope, [`pages`] the memory, [`transport`] the way, and then [`source`] and [`destination`]
//! the two who talk. Each is one `run` that goes through the phases of [`phase`] and always ends
//! in one of two ways: the guest runs at the destination, or it runs on at the source as if
//! nothing had happened. There is one exception, which no protocol can avoid: when the connection
//! dies after the source has said `Commit` and before it hears `Running`, the guest stays paused
//! at the source ([`MigrationError::CommitUnacknowledged`]) rather than ever running twice.
//!
//! - *Source*: [`SourceParts::new`], [`transport::connect`], [`source::run`].
//! - *Destination*: [`transport::Listener::bind`], `accept`, [`destination::run`] with a
//!   [`DestinationHost`] that makes the VM.
//! - *Meanwhile, elsewhere*: [`Status::snapshot`], [`CancelHandle::cancel`], [`Observer`].
//!
//! A destination whose connection dies between its `Ready` and the source's `Commit` aborts; if a
//! commit was on its way nevertheless, the source's guest stays paused.

pub mod cancel;
mod check;
pub mod destination;
mod error;
mod estimate;
pub mod frame;
mod limits;
mod link;
mod observer;
pub mod pages;
mod params;
pub mod phase;
pub mod protocol;
pub mod source;
mod status;
mod story;
pub mod transport;

pub use cancel::{CancelHandle, TooLate};
pub use destination::{Arrival, DestinationHost, DestinationParts, DestinationReport};
pub use error::MigrationError;
pub use frame::{FrameError, PROTOCOL_VERSION};
pub use limits::Limits;
pub use link::LinkError;
pub use observer::{MigrationEvent, Observer, RoundReport};
pub use pages::NoSuchMemory;
pub use params::{MigrationParams, TimeoutStrategy};
pub use phase::{DestinationPhase, SourcePhase};
pub use protocol::{DeviceManifest, Manifest, MemoryRegion, Migratable, Refusal};
pub use source::{Report, SourceParts};
pub use status::{DeviceDowntime, Downtime, MigrationStatus, Side, SourceStatus, Status};
pub use transport::{Address, AddressError, Connection, Listener, TransportError};

#[cfg(test)]
mod tests;
