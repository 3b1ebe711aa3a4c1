//! The endpoints: name, verb, and how the body becomes a request.

use axum::http::Method;
use serde::de::DeserializeOwned;

use super::error::{ApiError, ApiStatus};
use super::request::{ApiRequest, ReceiveMigrationConfig, SendMigrationConfig};
use crate::config::{ConfigError, NewDevice, VmConfig};

/// What all paths begin with.
pub const BASE_PATH: &str = "/api/v1/";

/// One endpoint.
pub(super) struct Route {
    /// Its name: the path after [`BASE_PATH`].
    pub(super) name: &'static str,
    /// Its verb.
    pub(super) method: Method,
    /// Makes the request of the body.
    pub(super) parse: fn(&[u8]) -> Result<ApiRequest, ApiError>,
}

/// All endpoints. `openapi.json` describes the same ones; a test compares the two.
pub(super) const ROUTES: &[Route] = &[
    get("vmm.ping", |body| bare(body, ApiRequest::VmmPing)),
    put("vmm.shutdown", |body| bare(body, ApiRequest::VmmShutdown)),
    put("vm.create", create),
    put("vm.boot", |body| bare(body, ApiRequest::VmBoot)),
    get("vm.info", |body| bare(body, ApiRequest::VmInfo)),
    get("vm.counters", |body| bare(body, ApiRequest::VmCounters)),
    put("vm.pause", |body| bare(body, ApiRequest::VmPause)),
    put("vm.resume", |body| bare(body, ApiRequest::VmResume)),
    put("vm.shutdown", |body| bare(body, ApiRequest::VmShutdown)),
    put("vm.delete", |body| bare(body, ApiRequest::VmDelete)),
    put("vm.add-device", |body| add(body, NewDevice::Host)),
    put("vm.add-user-device", |body| add(body, NewDevice::User)),
    put("vm.add-net", |body| add(body, NewDevice::Net)),
    put("vm.remove-device", |body| {
        Ok(ApiRequest::VmRemoveDevice(json(body)?))
    }),
    put("vm.send-migration", send),
    put("vm.receive-migration", receive),
    get("vm.migration", |body| bare(body, ApiRequest::VmMigration)),
    put("vm.cancel-migration", |body| {
        bare(body, ApiRequest::VmCancelMigration)
    }),
    get("vm.metrics", |body| bare(body, ApiRequest::VmMetrics)),
];

const fn get(name: &'static str, parse: fn(&[u8]) -> Result<ApiRequest, ApiError>) -> Route {
    let method = Method::GET;
    Route {
        name,
        method,
        parse,
    }
}

const fn put(name: &'static str, parse: fn(&[u8]) -> Result<ApiRequest, ApiError>) -> Route {
    let method = Method::PUT;
    Route {
        name,
        method,
        parse,
    }
}

fn create(body: &[u8]) -> Result<ApiRequest, ApiError> {
    let config = json::<VmConfig>(body)?.validate();
    Ok(ApiRequest::VmCreate(Box::new(config.map_err(refused)?)))
}

/// The sense of the device is checked with the configuration that it is added to.
fn add<T: DeserializeOwned>(
    body: &[u8],
    device: fn(T) -> NewDevice,
) -> Result<ApiRequest, ApiError> {
    Ok(ApiRequest::VmAddDevice(Box::new(device(json(body)?))))
}

fn send(body: &[u8]) -> Result<ApiRequest, ApiError> {
    let config = json::<SendMigrationConfig>(body)?.validate();
    Ok(ApiRequest::VmSendMigration(Box::new(
        config.map_err(refused)?,
    )))
}

fn receive(body: &[u8]) -> Result<ApiRequest, ApiError> {
    let config = json::<ReceiveMigrationConfig>(body)?.validate();
    Ok(ApiRequest::VmReceiveMigration(Box::new(
        config.map_err(refused)?,
    )))
}

/// The body is well formed and makes no sense.
fn refused(error: ConfigError) -> ApiError {
    ApiError::bad_request(&error).context("the configuration is refused")
}

/// `request`, if the body is as good as empty: some clients send `null` or `{}` there.
fn bare(body: &[u8], request: ApiRequest) -> Result<ApiRequest, ApiError> {
    match body.trim_ascii() {
        b"" | b"null" | b"{}" => Ok(request),
        _ => Err(ApiError::message(
            ApiStatus::BadRequest,
            format!("{} takes no body; leave it out", request.endpoint()),
        )),
    }
}

fn json<T: DeserializeOwned>(body: &[u8]) -> Result<T, ApiError> {
    serde_json::from_slice(body)
        .map_err(|error| ApiError::bad_request(&error).context("the body is not what is expected"))
}
