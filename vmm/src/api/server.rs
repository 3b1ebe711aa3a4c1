//! The HTTP server: one thread, one current-thread runtime, one unix socket.

use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use axum::Router;
use axum::body::{Body, to_bytes};
use axum::http::{HeaderValue, Method, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodFilter, on};
use devices::{ThreadKind, ThreadSpawner};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use thiserror::Error;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use super::channel::ApiHandle;
use super::error::{ApiError, ApiStatus};
use super::request::ApiReply;
use super::routes::{BASE_PATH, ROUTES, Route};
use super::socket::{ApiListener, SocketFile};

/// The largest body that is read, as in Cloud Hypervisor.
pub const MAX_BODY_BYTES: usize = 4 << 20;
/// Connections served at once; more wait in the socket's backlog.
const MAX_CONNECTIONS: usize = 64;
/// How long a client may take to send the head of a request, or sit idle between two.
const HEAD_TIMEOUT: Duration = Duration::from_secs(60);
/// How long a client may take to send a body.
const BODY_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the control loop may take to answer. Booting a VM on huge pages is the slowest thing.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(120);
/// How long answers on their way may take to leave when the server stops.
const STOP_GRACE: Duration = Duration::from_secs(2);
/// The pause after a failed accept, so that running out of descriptors does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Why the server could not be started.
#[derive(Debug, Error)]
pub enum ServerError {
    /// The runtime could not be made.
    #[error("cannot make the API server's event loop")]
    Runtime(#[source] io::Error),
    /// The socket could not be handed to the runtime.
    #[error("cannot serve the API socket; if it was passed by fd, check that it listens")]
    Listener(#[source] io::Error),
    /// The thread could not be started.
    #[error("cannot start the API thread")]
    Thread(#[source] io::Error),
}

/// The running server. Dropped, it stops.
#[derive(Debug)]
pub struct ApiServer {
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl ApiServer {
    /// Serves `listener` on a new thread; requests go to `handle`.
    ///
    /// # Errors
    /// [`ServerError`] if the runtime, the socket or the thread is not to be had.
    pub fn start(
        listener: ApiListener,
        handle: ApiHandle,
        spawner: &ThreadSpawner,
    ) -> Result<Self, ServerError> {
        let ApiListener { listener, file } = listener;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(ServerError::Runtime)?;
        listener
            .set_nonblocking(true)
            .map_err(ServerError::Listener)?;
        let listener = {
            let _context = runtime.enter();
            UnixListener::from_std(listener).map_err(ServerError::Listener)?
        };
        let (stop, stopped) = oneshot::channel();
        let serve = move || {
            runtime.block_on(serve(listener, file, router(&handle), stopped));
            runtime.shutdown_background();
        };
        let thread = spawner
            .spawn(ThreadKind::Api, "api", serve)
            .map_err(ServerError::Thread)?;
        Ok(Self {
            stop: Some(stop),
            thread: Some(thread),
        })
    }

    /// Stops accepting, lets answers already given leave (for at most two seconds), removes the
    /// socket and waits for the thread. Not to be called while the control loop owes answers
    /// somebody waits for: they get none.
    pub fn stop(mut self) {
        self.finish();
    }

    fn finish(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the API thread panicked");
        }
    }
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        self.finish();
    }
}

/// Accepts connections until `stopped`, then lets them finish.
async fn serve(
    listener: UnixListener,
    file: Option<SocketFile>,
    router: Router,
    mut stopped: oneshot::Receiver<()>,
) {
    let room = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let (closing, close) = watch::channel(());
    let mut connections = JoinSet::new();
    loop {
        let accept = async {
            let place = Arc::clone(&room).acquire_owned().await;
            (place, listener.accept().await)
        };
        let (place, accepted) = tokio::select! {
            _ = &mut stopped => break,
            Some(_) = connections.join_next() => continue,
            accepted = accept => accepted,
        };
        match accepted {
            Ok((stream, _)) => {
                let connection = connection(stream, router.clone(), close.clone());
                connections.spawn(async move {
                    connection.await;
                    drop(place);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "API connection not accepted");
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
    drop((listener, file, closing));
    let finish = async { while connections.join_next().await.is_some() {} };
    if timeout(STOP_GRACE, finish).await.is_err() {
        tracing::debug!("API connections cut at the end");
    }
}

/// Serves one connection until the client leaves or `close` changes.
async fn connection(stream: UnixStream, router: Router, mut close: watch::Receiver<()>) {
    let mut builder = hyper::server::conn::http1::Builder::new();
    builder
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT);
    let service = TowerToHyperService::new(router);
    let mut connection = pin!(builder.serve_connection(TokioIo::new(stream), service));
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        // An error means that the other end is gone, which is how the server says it stops.
        _ = close.changed() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "API connection ended");
    }
}

fn router(handle: &ApiHandle) -> Router {
    let mut router = Router::new();
    for route in ROUTES {
        let filter = match route.method {
            Method::GET => MethodFilter::GET,
            _ => MethodFilter::PUT,
        };
        let handle = handle.clone();
        let answer = move |body: Body| async move { answer(route, handle, body).await };
        router = router.route(&format!("{BASE_PATH}{}", route.name), on(filter, answer));
    }
    router
        .method_not_allowed_fallback(|| async {
            refusal(&ApiError::message(
                ApiStatus::MethodNotAllowed,
                "this endpoint has another verb: GET for those that only look, PUT for the others",
            ))
        })
        .fallback(|| async {
            refusal(&ApiError::not_found(
                "no such endpoint; all begin with /api/v1/, and openapi.json lists them",
            ))
        })
}

/// Answers one request.
async fn answer(route: &'static Route, handle: ApiHandle, body: Body) -> Response {
    match ask(route, handle, body).await {
        Ok(reply) => success(reply),
        Err(error) => {
            tracing::info!(endpoint = route.name, status = error.status.code(), %error, "refused");
            refusal(&error)
        }
    }
}

async fn ask(route: &'static Route, handle: ApiHandle, body: Body) -> Result<ApiReply, ApiError> {
    let body = match timeout(BODY_TIMEOUT, to_bytes(body, MAX_BODY_BYTES)).await {
        Ok(Ok(body)) => body,
        Ok(Err(error)) => return Err(body_error(&error)),
        Err(_) => {
            return Err(ApiError::message(
                ApiStatus::RequestTimeout,
                format!(
                    "the body did not arrive within {} s",
                    BODY_TIMEOUT.as_secs()
                ),
            ));
        }
    };
    let receiver = handle.send((route.parse)(&body)?)?;
    match timeout(ANSWER_TIMEOUT, receiver.answer()).await {
        Ok(answer) => answer,
        Err(_) => Err(ApiError::message(
            ApiStatus::Internal,
            format!(
                "{} is not done after {} s and goes on; look at vm.info",
                route.name,
                ANSWER_TIMEOUT.as_secs()
            ),
        )),
    }
}

/// A body that could not be read: too large, or cut.
fn body_error(error: &axum::Error) -> ApiError {
    let mut source = std::error::Error::source(error);
    while let Some(inner) = source {
        if inner.is::<http_body_util::LengthLimitError>() {
            return ApiError::message(
                ApiStatus::PayloadTooLarge,
                format!("the body is larger than {MAX_BODY_BYTES} bytes"),
            );
        }
        source = inner.source();
    }
    ApiError::bad_request(error)
}

fn success(reply: ApiReply) -> Response {
    let json = match reply {
        ApiReply::Empty => return StatusCode::NO_CONTENT.into_response(),
        ApiReply::Metrics(text) => {
            // The content type of OpenMetrics, which Prometheus asks for.
            let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
            return (
                ([(header::CONTENT_TYPE, HeaderValue::from_static(kind))]),
                text,
            )
                .into_response();
        }
        ApiReply::Ping(ping) => serde_json::to_vec(&ping),
        ApiReply::Sending(sending) => serde_json::to_vec(&sending),
        ApiReply::Device(device) => serde_json::to_vec(&device),
        ApiReply::Info(info) => serde_json::to_vec(&info),
        ApiReply::Counters(counters) => serde_json::to_vec(&counters),
        ApiReply::Migration(status) => serde_json::to_vec(&status),
    };
    match json {
        Ok(bytes) => json_response(StatusCode::OK, bytes),
        Err(error) => refusal(&ApiError::internal(&error).context("the answer is not JSON")),
    }
}

fn refusal(error: &ApiError) -> Response {
    let status =
        StatusCode::from_u16(error.status.code()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    // A list of strings is always JSON.
    let bytes = serde_json::to_vec(&error.chain).unwrap_or_default();
    json_response(status, bytes)
}

fn json_response(status: StatusCode, bytes: Vec<u8>) -> Response {
    let kind = HeaderValue::from_static("application/json");
    (status, [(header::CONTENT_TYPE, kind)], bytes).into_response()
}
