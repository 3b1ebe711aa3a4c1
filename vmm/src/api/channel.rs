//! The channel between those who ask (the API thread, the start-up code) and the control loop.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, SyncSender, TrySendError};

use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;
use thiserror::Error;
use tokio::sync::oneshot;

use super::error::{ApiError, ApiStatus};
use super::request::{ApiReply, ApiRequest};

/// Requests that may wait for the control loop; more are refused with 429.
const QUEUE_DEPTH: usize = 16;

type Message = (ApiRequest, Responder);

/// Why a request could not be handed over.
#[derive(Debug, Error)]
pub enum ApiSendError {
    /// The control loop has too much to do.
    #[error("{QUEUE_DEPTH} requests are waiting already; try again later")]
    Full,
    /// The control loop is gone.
    #[error("the VMM is shutting down")]
    Closed,
    /// The control loop could not be woken.
    #[error("the VMM could not be woken")]
    Wake(#[source] io::Error),
}

impl From<ApiSendError> for ApiError {
    fn from(error: ApiSendError) -> Self {
        let status = match error {
            ApiSendError::Full => ApiStatus::TooManyRequests,
            ApiSendError::Closed | ApiSendError::Wake(_) => ApiStatus::Internal,
        };
        Self::new(status, &error)
    }
}

/// A new channel: the asking end, which may be cloned, and the control loop's end.
///
/// # Errors
/// The operating system's, if there is no eventfd to be had.
pub fn channel() -> io::Result<(ApiHandle, ApiInbox)> {
    let event = Arc::new(eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?);
    let (sender, receiver) = mpsc::sync_channel(QUEUE_DEPTH);
    let handle = ApiHandle {
        sender,
        event: Arc::clone(&event),
    };
    Ok((handle, ApiInbox { receiver, event }))
}

/// Hands requests to the control loop. Never blocks.
#[derive(Clone, Debug)]
pub struct ApiHandle {
    sender: SyncSender<Message>,
    event: Arc<OwnedFd>,
}

impl ApiHandle {
    /// Hands `request` over and wakes the control loop; the answer comes out of the receiver.
    ///
    /// # Errors
    /// [`ApiSendError`] if the control loop is busy, gone or cannot be woken.
    pub fn send(&self, request: ApiRequest) -> Result<ApiReceiver, ApiSendError> {
        let (responder, receiver) = Responder::new();
        match self.sender.try_send((request, responder)) {
            Ok(()) => {}
            Err(TrySendError::Full(_)) => return Err(ApiSendError::Full),
            Err(TrySendError::Disconnected(_)) => return Err(ApiSendError::Closed),
        }
        match rustix::io::write(&self.event, &1u64.to_ne_bytes()) {
            // A full counter says "wake up" as well as any other.
            Ok(_) | Err(Errno::AGAIN) => Ok(receiver),
            Err(error) => Err(ApiSendError::Wake(error.into())),
        }
    }
}

/// The control loop's end. Its descriptor is readable while requests may be waiting: to be watched,
/// not read.
#[derive(Debug)]
pub struct ApiInbox {
    receiver: Receiver<Message>,
    event: Arc<OwnedFd>,
}

impl AsFd for ApiInbox {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}

impl ApiInbox {
    /// The next waiting request, `None` when there is none. To be called until it says `None`
    /// each time the descriptor is readable.
    pub fn take(&self) -> Option<(ApiRequest, Responder)> {
        // Drain the event first: a request sent after the queue was found empty then wakes again.
        // The eventfd is non-blocking, and "nothing there" is no news.
        let _ = rustix::io::read(&self.event, &mut [0u8; 8]);
        self.receiver.try_recv().ok()
    }
}

/// Takes the one answer to a request. Dropped unused, it answers with an internal error.
#[derive(Debug)]
pub struct Responder(oneshot::Sender<Result<ApiReply, ApiError>>);

impl Responder {
    /// A responder and where its answer comes out.
    pub fn new() -> (Self, ApiReceiver) {
        let (sender, receiver) = oneshot::channel();
        (Self(sender), ApiReceiver(receiver))
    }

    /// Gives the answer. Never blocks; an asker who has left is no error.
    pub fn respond(self, answer: Result<ApiReply, ApiError>) {
        if self.0.send(answer).is_err() {
            tracing::debug!("an API client left before its answer");
        }
    }
}

/// Where the answer to one request comes out.
#[derive(Debug)]
pub struct ApiReceiver(oneshot::Receiver<Result<ApiReply, ApiError>>);

impl ApiReceiver {
    /// Waits for the answer, in asynchronous code.
    ///
    /// # Errors
    /// The control loop's, or an internal error if it dropped the request.
    pub async fn answer(self) -> Result<ApiReply, ApiError> {
        self.0.await.unwrap_or_else(|_| Err(dropped()))
    }

    /// Waits for the answer, blocking the thread. Not for the control loop's own thread, which
    /// would wait for itself.
    ///
    /// # Errors
    /// As [`ApiReceiver::answer`].
    pub fn wait(self) -> Result<ApiReply, ApiError> {
        self.0.blocking_recv().unwrap_or_else(|_| Err(dropped()))
    }
}

fn dropped() -> ApiError {
    ApiError::message(
        ApiStatus::Internal,
        "the VMM dropped the request without an answer",
    )
}
