//! The REST API: what can be asked of the VMM, the channel the questions travel on, and the server.
//!
//! The API thread never touches the VM. It turns each HTTP request into an [`ApiRequest`], hands it
//! with a [`Responder`] to the VMM's control loop through an [`ApiHandle`], and waits for the answer
//! without blocking other requests. The control loop waits on [`ApiInbox::event`] in its poll set
//! and takes the requests one by one; it may keep a responder and answer later.

mod channel;
mod error;
mod request;

pub use channel::{ApiHandle, ApiInbox, ApiReceiver, ApiSendError, Responder, channel};
pub use error::{ApiError, ApiStatus};
pub use request::{
    ApiReply, ApiRequest, Counters, ReceiveMigrationConfig, ReceiveNetConfig,
    ReceiveUserDeviceConfig, SendMigrationConfig, TimeoutStrategy, VmInfo, VmState, VmmPing,
};
