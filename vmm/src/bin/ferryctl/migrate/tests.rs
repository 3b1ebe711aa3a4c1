use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use clap::Parser;
use devices::ThreadSpawner;
use serde_json::{Value, json};
use tempfile::TempDir;
use vmm::api::{ApiError, ApiListener, ApiReply, ApiRequest, ApiServer, channel};

use super::*;
use crate::cli::{Cli, Verb};

/// A ferry that only answers, as `script` says.
struct Fake {
    socket: PathBuf,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Vec<&'static str>>>,
    _server: ApiServer,
}

type Script = dyn FnMut(&ApiRequest) -> Result<ApiReply, ApiError> + Send;

impl Fake {
    fn start(dir: &TempDir, name: &str, mut script: Box<Script>) -> Self {
        let socket = dir.path().join(name);
        let (handle, inbox) = channel().unwrap();
        let listener = ApiListener::bind(&socket).unwrap();
        let server = ApiServer::start(listener, handle, &ThreadSpawner::unconfined()).unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = thread::spawn(move || {
            let mut heard = Vec::new();
            while !stopped.load(Ordering::Relaxed) {
                while let Some((request, responder)) = inbox.take() {
                    if heard.last() != Some(&request.endpoint()) {
                        heard.push(request.endpoint());
                    }
                    responder.respond(script(&request));
                }
                thread::sleep(Duration::from_millis(1));
            }
            heard
        });
        Self {
            socket,
            stop,
            thread: Some(thread),
            _server: server,
        }
    }

    /// The endpoints that were asked for, repetitions left out.
    fn heard(mut self) -> Vec<&'static str> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap()
    }
}

fn status(side: &str, phase: Value) -> ApiReply {
    let status = json!({
        "side": side, "phase": phase, "elapsed_ms": 5, "rounds": 2, "bytes": 4096, "pages": 1,
        "zero_pages": 0, "memory_bytes": 1 << 20, "device_bytes": 0, "remaining_pages": 1,
        "dirty_pages_per_second": 3, "sources": [], "bandwidth": 1000,
        "downtime_estimate_us": 7000, "downtime": null, "aborted": null,
    });
    ApiReply::Migration(Box::new(serde_json::from_value(status).unwrap()))
}

/// A script that answers pings, takes orders and gives the phases in turn, the last one for ever.
fn phases(side: &'static str, phases: Vec<Value>) -> Box<Script> {
    let mut next = 0;
    Box::new(move |request| match request {
        ApiRequest::VmmPing => Ok(ApiReply::Ping(VmmPing {
            build_version: String::new(),
            version: String::new(),
            pid: 1,
            features: Vec::new(),
        })),
        ApiRequest::VmMigration => {
            let phase = phases[next.min(phases.len() - 1)].clone();
            next += 1;
            Ok(status(side, phase))
        }
        _ => Ok(ApiReply::Empty),
    })
}

fn order(source: &Fake, destination: &Fake) -> Order {
    order_between(&source.socket, &destination.socket)
}

fn order_between(from: &std::path::Path, to: &std::path::Path) -> Order {
    let (from, to) = (from.to_str().unwrap(), to.to_str().unwrap());
    let url = "unix:/tmp/x";
    let arguments = [
        "ferryctl", "migrate", "--from", from, "--to", to, "--url", url, "--json",
    ];
    match Cli::parse_from(arguments).verb {
        Verb::Migrate(order) => order,
        other => panic!("{other:?}"),
    }
}

#[test]
fn both_ends_are_driven_in_order() {
    let dir = tempfile::tempdir().unwrap();
    let precopy = json!({"name": "precopy", "round": 1});
    let source = phases(
        "source",
        vec![json!({"name": "setup"}), precopy, json!({"name": "done"})],
    );
    let source = Fake::start(&dir, "a", source);
    let destination = vec![json!({"name": "ready"}), json!({"name": "running"})];
    let destination = Fake::start(&dir, "b", phases("destination", destination));
    run(&order(&source, &destination)).unwrap();
    assert_eq!(
        source.heard(),
        ["vmm.ping", "vm.send-migration", "vm.migration"]
    );
    assert_eq!(
        destination.heard(),
        ["vmm.ping", "vm.receive-migration", "vm.migration"]
    );
}

#[test]
fn an_abort_tells_both_reasons() {
    let dir = tempfile::tempdir().unwrap();
    let source = vec![json!({"name": "aborted", "why": "cut"})];
    let source = Fake::start(&dir, "a", phases("source", source));
    let destination = vec![json!({"name": "aborted", "why": "no room"})];
    let destination = Fake::start(&dir, "b", phases("destination", destination));
    let error = run(&order(&source, &destination)).unwrap_err().to_string();
    assert!(
        error.contains("cut; the destination says: no room"),
        "{error}"
    );
}

#[test]
fn a_source_that_refuses_frees_the_destination() {
    let dir = tempfile::tempdir().unwrap();
    let mut pings = phases("source", vec![json!({"name": "preflight"})]);
    let refuse: Box<Script> = Box::new(move |request| match request {
        ApiRequest::VmSendMigration(_) => Err(ApiError::conflict("there is no VM; create one")),
        _ => pings(request),
    });
    let source = Fake::start(&dir, "a", refuse);
    let destination = phases("destination", vec![json!({"name": "listening"})]);
    let destination = Fake::start(&dir, "b", destination);
    let error = run(&order(&source, &destination)).unwrap_err();
    let cause = error.source().unwrap().to_string();
    assert!(cause.contains("there is no VM; create one"), "{cause}");
    let heard = destination.heard();
    assert_eq!(
        heard,
        ["vmm.ping", "vm.receive-migration", "vm.cancel-migration"]
    );
}

#[test]
fn an_end_that_is_not_there_is_named_before_anything_is_done() {
    let dir = tempfile::tempdir().unwrap();
    let source = phases("source", vec![json!({"name": "preflight"})]);
    let source = Fake::start(&dir, "a", source);
    let missing = dir.path().join("b");
    let error = run(&order_between(&source.socket, &missing)).unwrap_err();
    assert_eq!(error.to_string(), "the destination does not answer");
    assert_eq!(source.heard(), ["vmm.ping"]);
}
