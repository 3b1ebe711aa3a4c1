//! The REST API: what can be asked of the VMM, the channel the questions travel on, and the server.
//!
//! The API thread never touches the VM. It turns each HTTP request into an [`ApiRequest`], hands it
//! with a [`Responder`] to the VMM's control loop through an [`ApiHandle`], and waits for the answer
//! without blocking other requests. The control loop has the [`ApiInbox`] in its poll set
//! and takes the requests one by one; it may keep a responder and answer later.

mod channel;
mod client;
mod counters;
mod error;
mod request;
mod routes;
mod server;
mod socket;

#[cfg(test)]
mod tests;

pub use channel::{ApiHandle, ApiInbox, ApiReceiver, ApiSendError, Responder, channel};
pub use client::{ApiClient, ClientError};
pub use counters::{Counters, Facts, queue_counter, split_queue_counter};
pub use error::{ApiError, ApiStatus};
pub use request::{
    ApiReply, ApiRequest, DirtySourceInfo, PciDeviceInfo, ReceiveDeviceConfig,
    ReceiveMigrationConfig, ReceiveNetConfig, ReceiveUserDeviceConfig, RemoveDeviceConfig,
    SendMigrationConfig, SendMigrationInfo, VmInfo, VmState, VmmPing,
};
pub use routes::BASE_PATH;
pub use server::{ApiServer, MAX_BODY_BYTES, ServerError};
pub use socket::{ApiListener, ApiSocket, SocketError};
pub use vm_migration::migrate::{
    DestinationPhase, DeviceDowntime, Downtime, MigrationStatus, Side, SourcePhase, SourceStatus,
    TimeoutStrategy,
};
