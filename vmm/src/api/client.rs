//! A client of the REST API, for `ferryctl` and tests.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::{Method, Request, header};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use thiserror::Error;
use tokio::net::UnixStream;
use tokio::time::timeout;

use super::routes::BASE_PATH;
use super::server::MAX_BODY_BYTES;

/// How long a request may take, a little more than the server gives its control loop.
const TIMEOUT: Duration = Duration::from_secs(130);

/// Why a request has no good answer.
#[derive(Debug, Error)]
pub enum ClientError {
    /// Nobody answers on the socket.
    #[error("cannot connect to {socket}; is ferry running with --api-socket path={socket}?")]
    Connect {
        /// The socket.
        socket: PathBuf,
        /// The operating system's reason.
        #[source]
        source: io::Error,
    },
    /// The event loop could not be made.
    #[error("cannot make an event loop")]
    Runtime(#[source] io::Error),
    /// The conversation broke.
    #[error("{endpoint}: the connection broke; see ferry's own output")]
    Http {
        /// The endpoint.
        endpoint: String,
        /// The HTTP library's reason.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// No answer in time.
    #[error("{endpoint}: no answer within {} s; ferry may be stuck", TIMEOUT.as_secs())]
    Timeout {
        /// The endpoint.
        endpoint: String,
    },
    /// Ferry says no.
    #[error("{endpoint}: {}", chain.join(": "))]
    Refused {
        /// The endpoint.
        endpoint: String,
        /// The HTTP status.
        status: u16,
        /// The reasons, outermost first.
        chain: Vec<String>,
    },
    /// The answer is not of the form expected.
    #[error("{endpoint}: the answer is not understood; are ferry and ferryctl of one version?")]
    Answer {
        /// The endpoint.
        endpoint: String,
        /// The JSON library's reason.
        #[source]
        source: serde_json::Error,
    },
}

/// Asks one ferry, one connection per request, blocking the thread.
#[derive(Debug)]
pub struct ApiClient {
    socket: PathBuf,
    runtime: tokio::runtime::Runtime,
}

/// A body of `endpoint`'s that cannot be made or read.
fn answer(endpoint: &str) -> impl Fn(serde_json::Error) -> ClientError + '_ {
    |source| ClientError::Answer {
        endpoint: endpoint.to_owned(),
        source,
    }
}

impl ApiClient {
    /// A client of the ferry that serves `socket`. Connects only when asked something.
    ///
    /// # Errors
    /// [`ClientError::Runtime`] if there is no event loop to be had.
    pub fn new(socket: impl Into<PathBuf>) -> Result<Self, ClientError> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(ClientError::Runtime)?;
        let socket = socket.into();
        Ok(Self { socket, runtime })
    }

    /// The socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// `GET endpoint`, its answer read as JSON.
    ///
    /// # Errors
    /// [`ClientError`], [`ClientError::Refused`] if ferry says no.
    pub fn get<T: DeserializeOwned>(&self, endpoint: &str) -> Result<T, ClientError> {
        let bytes = self.request(Method::GET, endpoint, Bytes::new())?;
        serde_json::from_slice(&bytes).map_err(answer(endpoint))
    }

    /// `GET endpoint`, its answer as text.
    ///
    /// # Errors
    /// As [`ApiClient::get`].
    pub fn get_text(&self, endpoint: &str) -> Result<String, ClientError> {
        let bytes = self.request(Method::GET, endpoint, Bytes::new())?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// `PUT endpoint` without a body.
    ///
    /// # Errors
    /// As [`ApiClient::get`].
    pub fn put(&self, endpoint: &str) -> Result<(), ClientError> {
        self.request(Method::PUT, endpoint, Bytes::new()).map(drop)
    }

    /// `PUT endpoint` with `body` as JSON.
    ///
    /// # Errors
    /// As [`ApiClient::get`].
    pub fn put_json(&self, endpoint: &str, body: &impl Serialize) -> Result<(), ClientError> {
        self.put_bytes(endpoint, body).map(drop)
    }

    /// `PUT endpoint` with `body` as JSON; the answer read as JSON, if there is one.
    ///
    /// # Errors
    /// As [`ApiClient::get`].
    pub fn put_for<T: DeserializeOwned>(
        &self,
        endpoint: &str,
        body: &impl Serialize,
    ) -> Result<Option<T>, ClientError> {
        let bytes = self.put_bytes(endpoint, body)?;
        match bytes.is_empty() {
            true => Ok(None),
            false => serde_json::from_slice(&bytes)
                .map(Some)
                .map_err(answer(endpoint)),
        }
    }

    fn put_bytes(&self, endpoint: &str, body: &impl Serialize) -> Result<Bytes, ClientError> {
        let bytes = serde_json::to_vec(body).map_err(answer(endpoint))?;
        self.request(Method::PUT, endpoint, Bytes::from(bytes))
    }

    /// Sends one request; the body of a good answer.
    ///
    /// # Errors
    /// As [`ApiClient::get`].
    pub fn request(
        &self,
        method: Method,
        endpoint: &str,
        body: Bytes,
    ) -> Result<Bytes, ClientError> {
        let exchange = self.exchange(method, endpoint, body);
        let answer = self
            .runtime
            .block_on(async { timeout(TIMEOUT, exchange).await });
        answer.unwrap_or_else(|_| {
            Err(ClientError::Timeout {
                endpoint: endpoint.to_owned(),
            })
        })
    }

    async fn exchange(
        &self,
        method: Method,
        endpoint: &str,
        body: Bytes,
    ) -> Result<Bytes, ClientError> {
        let http = |source: Box<dyn std::error::Error + Send + Sync>| ClientError::Http {
            endpoint: endpoint.to_owned(),
            source,
        };
        let stream = UnixStream::connect(&self.socket).await;
        let stream = stream.map_err(|source| ClientError::Connect {
            socket: self.socket.clone(),
            source,
        })?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|error| http(error.into()))?;
        // Drives the connection until the sender is dropped; errors reach the request.
        tokio::spawn(connection);
        let request = Request::builder()
            .method(method)
            .uri(format!("{BASE_PATH}{endpoint}"))
            .header(header::HOST, "localhost")
            .header(header::CONTENT_TYPE, "application/json")
            .body(Full::new(body))
            .map_err(|error| http(error.into()))?;
        let response = sender.send_request(request).await;
        let (head, body) = response.map_err(|error| http(error.into()))?.into_parts();
        let bytes = Limited::new(body, MAX_BODY_BYTES)
            .collect()
            .await
            .map_err(http)?
            .to_bytes();
        if head.status.is_success() {
            return Ok(bytes);
        }
        let chain = serde_json::from_slice(&bytes)
            .unwrap_or_else(|_| vec![String::from_utf8_lossy(&bytes).into_owned()]);
        Err(ClientError::Refused {
            endpoint: endpoint.to_owned(),
            status: head.status.as_u16(),
            chain,
        })
    }
}
