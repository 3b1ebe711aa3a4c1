//! A client of a VMM's REST API on a unix socket.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use http_body_util::{BodyExt, Full};
use hyper::body::Bytes;
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use serde_json::Value;

/// A REST API on a unix socket.
#[derive(Clone, Debug)]
pub struct Api {
    socket: PathBuf,
}

/// What the API answered.
#[derive(Debug)]
pub struct Answer {
    /// HTTP status.
    pub status: StatusCode,
    /// Body; null if empty.
    pub body: Value,
}

impl Api {
    /// The API at `socket`.
    pub fn new(socket: &Path) -> Self {
        Self {
            socket: socket.to_owned(),
        }
    }

    /// One request; any status is an answer.
    ///
    /// # Errors
    /// When there is no answer within 30 s.
    pub fn request(&self, method: Method, name: &str, body: Option<&Value>) -> Result<Answer> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        runtime.block_on(async {
            tokio::time::timeout(Duration::from_secs(30), self.send(method, name, body))
                .await
                .map_err(|_| anyhow!("{name}: no answer from {}", self.socket.display()))?
        })
    }

    /// `GET` that must succeed.
    ///
    /// # Errors
    /// When there is no answer, or it is an error.
    pub fn get(&self, name: &str) -> Result<Value> {
        self.expect(Method::GET, name, None)
    }

    /// `PUT` that must succeed.
    ///
    /// # Errors
    /// When there is no answer, or it is an error.
    pub fn put(&self, name: &str, body: Option<&Value>) -> Result<Value> {
        self.expect(Method::PUT, name, body)
    }

    fn expect(&self, method: Method, name: &str, body: Option<&Value>) -> Result<Value> {
        let answer = self.request(method, name, body)?;
        if !answer.status.is_success() {
            bail!("{name}: {} {}", answer.status, answer.body);
        }
        Ok(answer.body)
    }

    async fn send(&self, method: Method, name: &str, body: Option<&Value>) -> Result<Answer> {
        let stream = tokio::net::UnixStream::connect(&self.socket)
            .await
            .with_context(|| format!("cannot connect to {}", self.socket.display()))?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        let driver = tokio::spawn(connection);
        let body = body.map_or_else(Bytes::new, |value| Bytes::from(value.to_string()));
        let request = Request::builder()
            .method(method)
            .uri(format!("/api/v1/{name}"))
            .header("host", "localhost")
            .header("content-type", "application/json")
            .body(Full::new(body))?;
        let response = sender.send_request(request).await?;
        let status = response.status();
        let bytes = response.into_body().collect().await?.to_bytes();
        driver.abort();
        let body = if bytes.is_empty() {
            Value::Null
        } else {
            serde_json::from_slice(&bytes)
                .unwrap_or_else(|_| Value::String(String::from_utf8_lossy(&bytes).into_owned()))
        };
        Ok(Answer { status, body })
    }
}
