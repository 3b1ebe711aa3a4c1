//! An answer that says no: an HTTP status and the chain of reasons.

use std::error::Error;
use std::fmt;

/// The HTTP statuses the API answers errors with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ApiStatus {
    /// 400: the request itself is wrong.
    BadRequest,
    /// 404: no such endpoint, or no VM.
    NotFound,
    /// 405: the endpoint has other verbs.
    MethodNotAllowed,
    /// 408: the request did not arrive whole in time.
    RequestTimeout,
    /// 409: not in the VM's present state.
    Conflict,
    /// 413: the body is too large.
    PayloadTooLarge,
    /// 429: too many requests are waiting.
    TooManyRequests,
    /// 500: it was tried and failed.
    Internal,
}

impl ApiStatus {
    /// The number on the wire.
    pub fn code(self) -> u16 {
        match self {
            Self::BadRequest => 400,
            Self::NotFound => 404,
            Self::MethodNotAllowed => 405,
            Self::RequestTimeout => 408,
            Self::Conflict => 409,
            Self::PayloadTooLarge => 413,
            Self::TooManyRequests => 429,
            Self::Internal => 500,
        }
    }
}

/// Why a request was refused or failed. Its body on the wire is the chain as a JSON array of
/// strings, outermost first, as Cloud Hypervisor writes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApiError {
    /// The HTTP status.
    pub status: ApiStatus,
    /// The error and its sources, outermost first; never empty.
    pub chain: Vec<String>,
}

impl ApiError {
    /// An error with `status` and the messages of `error` and all its sources.
    pub fn new(status: ApiStatus, error: &(dyn Error + 'static)) -> Self {
        let chain =
            std::iter::successors(Some(error), |one: &&(dyn Error + 'static)| (*one).source());
        Self {
            status,
            chain: chain.map(ToString::to_string).collect(),
        }
    }

    /// An error with `status` and one message.
    pub fn message(status: ApiStatus, message: impl Into<String>) -> Self {
        Self {
            status,
            chain: vec![message.into()],
        }
    }

    /// 400: the request itself is wrong.
    pub fn bad_request(error: &(dyn Error + 'static)) -> Self {
        Self::new(ApiStatus::BadRequest, error)
    }

    /// 409: not in the VM's present state; `message` says what the state is and what to do.
    pub fn conflict(message: impl Into<String>) -> Self {
        Self::message(ApiStatus::Conflict, message)
    }

    /// 404: there is nothing of that name; `message` says what is missing.
    pub fn not_found(message: impl Into<String>) -> Self {
        Self::message(ApiStatus::NotFound, message)
    }

    /// 500: it was tried and failed.
    pub fn internal(error: &(dyn Error + 'static)) -> Self {
        Self::new(ApiStatus::Internal, error)
    }

    /// The same error, with `message` said first.
    #[must_use]
    pub fn context(mut self, message: impl Into<String>) -> Self {
        self.chain.insert(0, message.into());
        self
    }
}

impl fmt::Display for ApiError {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{}", self.chain.join(": "))
    }
}

impl Error for ApiError {}
