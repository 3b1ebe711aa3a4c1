mod answers;
mod receive;

use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::mpsc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use axum::http::Method;
use devices::{ThreadKind, ThreadSpawner};
use hyper::body::Bytes;
use sandbox::{Filters, SeccompMode};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::routes::ROUTES;
use super::*;
use crate::config::VmConfig;

/// A served socket whose requests the test takes out of `inbox`.
struct Fixture {
    _dir: TempDir,
    socket: PathBuf,
    server: Option<ApiServer>,
    inbox: ApiInbox,
}

impl Fixture {
    fn new() -> Self {
        Self::with(&ThreadSpawner::unconfined())
    }

    fn with(spawner: &ThreadSpawner) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("api.sock");
        let (handle, inbox) = channel().unwrap();
        let listener = ApiListener::bind(&socket).unwrap();
        let server = ApiServer::start(listener, handle, spawner).unwrap();
        Self {
            _dir: dir,
            socket,
            server: Some(server),
            inbox,
        }
    }

    fn client(&self) -> ApiClient {
        ApiClient::new(&self.socket).unwrap()
    }

    /// Sends a request on a thread of its own.
    fn ask(
        &self,
        method: Method,
        endpoint: &str,
        body: &str,
    ) -> JoinHandle<Result<Bytes, ClientError>> {
        let client = self.client();
        let (endpoint, body) = (endpoint.to_owned(), Bytes::from(body.to_owned()));
        thread::spawn(move || client.request(method, &endpoint, body))
    }

    /// The next request, waiting for the event as the control loop does.
    fn next(&self) -> (ApiRequest, Responder) {
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            if let Some(message) = self.inbox.take() {
                return message;
            }
            assert!(Instant::now() < deadline, "no request came");
            let mut fds = [rustix::event::PollFd::new(
                &self.inbox,
                rustix::event::PollFlags::IN,
            )];
            let second = rustix::event::Timespec {
                tv_sec: 1,
                tv_nsec: 0,
            };
            rustix::event::poll(&mut fds, Some(&second)).unwrap();
        }
    }

    /// The status and chain a request is refused with before it reaches the control loop.
    fn refused(&self, method: Method, endpoint: &str, body: &str) -> (u16, Vec<String>) {
        refusal(self.ask(method, endpoint, body).join().unwrap())
    }
}

fn refusal(answer: Result<Bytes, ClientError>) -> (u16, Vec<String>) {
    match answer {
        Err(ClientError::Refused { status, chain, .. }) => (status, chain),
        other => panic!("not refused: {other:?}"),
    }
}

#[test]
fn the_document_describes_the_routes_and_the_types() {
    let document: Value = serde_json::from_str(include_str!("openapi.json")).unwrap();
    let mut documented: Vec<(String, String)> = Vec::new();
    for (path, verbs) in document["paths"].as_object().unwrap() {
        for verb in verbs.as_object().unwrap().keys() {
            documented.push((path.trim_start_matches('/').to_owned(), verb.to_uppercase()));
        }
    }
    let mut served: Vec<(String, String)> = ROUTES
        .iter()
        .map(|route| (route.name.to_owned(), route.method.to_string()))
        .collect();
    documented.sort();
    served.sort();
    assert_eq!(documented, served);

    let full = json!({
        "cpus": {"boot_vcpus": 1},
        "memory": {"size": 2 << 20, "shared": true, "hugepages": true, "hugepage_size": 2 << 20,
            "dirty_log": "ring", "dirty_ring_entries": 1024},
        "payload": {"kernel": "k", "initramfs": "i", "cmdline": "c"},
        "net": [{"tap": "t", "mtu": 1500, "rss": true, "hash_types": ["ipv4"],
            "hash_backend": "software", "pci_device_id": 9},
            {"vhost_user": true, "vhost_socket": "v"}],
        "serial": {"mode": "File", "file": "f"},
        "console": {"mode": "Socket", "socket": "s"},
        "devices": [{"path": "/sys/bus/pci/devices/0000:01:00.0", "dirty": "all",
            "give_back": true, "pci_device_id": 7}],
        "user_devices": [{"socket": "x", "pci_device_id": 8}],
    });
    let config: VmConfig = serde_json::from_value(full).unwrap();
    let config = config.validate().unwrap();
    let schemas = &document["components"]["schemas"];
    let as_json = |value: &VmConfig| serde_json::to_value(value).unwrap();
    let vm = as_json(&config);
    let covers = |schema: &str, value: &Value| {
        let known = schemas[schema]["properties"].as_object().unwrap();
        for key in value.as_object().unwrap().keys() {
            assert!(
                known.contains_key(key),
                "{schema}.{key} is not in the document"
            );
        }
    };
    covers("VmConfig", &vm);
    for (schema, key) in [
        ("CpusConfig", "cpus"),
        ("MemoryConfig", "memory"),
        ("PayloadConfig", "payload"),
        ("RngConfig", "rng"),
        ("ConsoleConfig", "serial"),
        ("ConsoleConfig", "console"),
    ] {
        covers(schema, &vm[key]);
    }
    covers("NetConfig", &vm["net"][0]);
    covers("NetConfig", &vm["net"][1]);
    covers("DeviceConfig", &vm["devices"][0]);
    covers("UserDeviceConfig", &vm["user_devices"][0]);
    let send = SendMigrationConfig {
        max_bandwidth: Some(1),
        ..SendMigrationConfig::new("unix:/x")
    };
    covers("SendMigrationConfig", &serde_json::to_value(&send).unwrap());
    let mut status = vm_migration::migrate::Status::source().snapshot();
    status.downtime = Some(Downtime {
        devices: vec![DeviceDowntime::default()],
        ..Downtime::default()
    });
    let status = serde_json::to_value(status).unwrap();
    covers("MigrationStatus", &status);
    let known = &schemas["MigrationStatus"]["properties"]["downtime"]["properties"];
    let downtime = status["downtime"].as_object().unwrap();
    assert!(downtime.keys().all(|key| known.get(key).is_some()));
    let device = downtime["devices"][0].as_object().unwrap();
    let known = &known["devices"]["items"]["properties"];
    assert!(device.keys().all(|key| known.get(key).is_some()));
    let json = serde_json::to_value(send.params()).unwrap();
    assert_eq!(json["downtime_ms"], 300);
}

#[test]
fn each_endpoint_becomes_its_request() {
    let fixture = Fixture::new();
    for route in ROUTES {
        let body = match route.name {
            "vm.create" => r#"{"payload": {"kernel": "/k"}}"#,
            "vm.add-device" => r#"{"path": "/sys/x"}"#,
            "vm.add-user-device" => r#"{"socket": "/s"}"#,
            "vm.add-net" => r#"{"tap": "t"}"#,
            "vm.remove-device" => r#"{"id": "nic"}"#,
            "vm.send-migration" => r#"{"destination_url": "unix:/x"}"#,
            "vm.receive-migration" => r#"{"receiver_url": "unix:/x"}"#,
            _ => "",
        };
        let answer = fixture.ask(route.method.clone(), route.name, body);
        let (request, responder) = fixture.next();
        assert_eq!(request.endpoint(), route.name);
        responder.respond(Ok(ApiReply::Empty));
        assert_eq!(answer.join().unwrap().unwrap().len(), 0);
    }
}

#[test]
fn answers_are_json_or_text() {
    let fixture = Fixture::new();
    let ping = VmmPing {
        build_version: "v0".to_owned(),
        version: "0.1.0".to_owned(),
        pid: 1,
        features: Vec::new(),
    };
    let answer = fixture.ask(Method::GET, "vmm.ping", "");
    fixture.next().1.respond(Ok(ApiReply::Ping(ping.clone())));
    let bytes = answer.join().unwrap().unwrap();
    assert_eq!(serde_json::from_slice::<VmmPing>(&bytes).unwrap(), ping);

    let answer = fixture.ask(Method::GET, "vm.metrics", "");
    fixture
        .next()
        .1
        .respond(Ok(ApiReply::Metrics("ferry_x 1\n".to_owned())));
    assert_eq!(answer.join().unwrap().unwrap(), "ferry_x 1\n");
}

#[test]
fn defaults_of_a_migration_are_cloud_hypervisors() {
    let fixture = Fixture::new();
    let body = r#"{"destination_url": "tcp:host:1"}"#;
    let answer = fixture.ask(Method::PUT, "vm.send-migration", body);
    let (request, responder) = fixture.next();
    let ApiRequest::VmSendMigration(config) = request else {
        panic!("{request:?}");
    };
    assert_eq!(*config, SendMigrationConfig::new("tcp:host:1"));
    assert_eq!((config.downtime_ms, config.timeout_s), (300, 3600));
    responder.respond(Ok(ApiReply::Empty));
    answer.join().unwrap().unwrap();
}

#[test]
fn wrong_requests_are_refused_with_a_status_and_a_chain() {
    let fixture = Fixture::new();
    let (status, chain) = fixture.refused(Method::PUT, "vm.create", "{");
    assert_eq!((status, chain.len()), (400, 2));
    let (status, chain) = fixture.refused(Method::PUT, "vm.create", r#"{"payload": {}, "gpu": 1}"#);
    assert_eq!(status, 400);
    assert!(chain[1].contains("unknown field `gpu`"), "{chain:?}");
    let (status, chain) = fixture.refused(Method::PUT, "vm.create", r#"{"payload": {}}"#);
    assert_eq!(status, 400);
    assert!(chain[1].contains("--kernel"), "{chain:?}");
    assert_eq!(fixture.refused(Method::PUT, "vm.boot", "{\"x\": 1}").0, 400);
    let twice =
        r#"{"receiver_url": "unix:/x", "net": [{"id": "a", "tap": "t"}, {"id": "a", "tap": "u"}]}"#;
    assert_eq!(
        fixture
            .refused(Method::PUT, "vm.receive-migration", twice)
            .0,
        400
    );
    let nowhere = r#"{"destination_url": "host:1"}"#;
    let (status, chain) = fixture.refused(Method::PUT, "vm.send-migration", nowhere);
    assert_eq!(status, 400);
    assert!(chain[2].contains("unix:PATH or tcp:HOST:PORT"), "{chain:?}");
    assert_eq!(fixture.refused(Method::GET, "vm.nothing", "").0, 404);
    assert_eq!(fixture.refused(Method::PUT, "vm.info", "").0, 405);
    assert_eq!(fixture.refused(Method::POST, "vm.boot", "").0, 405);
    let deep = "[".repeat(100_000);
    assert_eq!(fixture.refused(Method::PUT, "vm.create", &deep).0, 400);
    let large = "x".repeat(MAX_BODY_BYTES + 1);
    assert_eq!(fixture.refused(Method::PUT, "vm.create", &large).0, 413);
}

#[test]
fn the_control_loops_refusal_reaches_the_client_whole() {
    let fixture = Fixture::new();
    let answer = fixture.ask(Method::PUT, "vm.pause", "");
    let error = ApiError::conflict("the VM is not running; boot it first").context("vm.pause");
    fixture.next().1.respond(Err(error));
    let (status, chain) = refusal(answer.join().unwrap());
    assert_eq!(status, 409);
    assert_eq!(chain, ["vm.pause", "the VM is not running; boot it first"]);
}

#[test]
fn a_dropped_responder_is_an_answer_too() {
    let fixture = Fixture::new();
    let answer = fixture.ask(Method::PUT, "vm.boot", "");
    drop(fixture.next());
    assert_eq!(refusal(answer.join().unwrap()).0, 500);
}

#[test]
fn one_request_does_not_wait_for_another() {
    let fixture = Fixture::new();
    let slow = fixture.ask(Method::PUT, "vm.boot", "");
    let (_, later) = fixture.next();
    // Neither an owed answer nor clients that stop in the middle hold up the next one.
    let mut half = UnixStream::connect(&fixture.socket).unwrap();
    half.write_all(b"PUT /api/v1/vm.create HTTP/1.1\r\nContent-Length: 9\r\n\r\n{")
        .unwrap();
    let _silent = UnixStream::connect(&fixture.socket).unwrap();
    let ping = fixture.ask(Method::GET, "vm.info", "");
    fixture.next().1.respond(Ok(ApiReply::Empty));
    ping.join().unwrap().unwrap();
    later.respond(Ok(ApiReply::Empty));
    slow.join().unwrap().unwrap();
}

#[test]
fn a_control_loop_that_does_not_listen_fills_up_and_no_more() {
    let fixture = Fixture::new();
    let asked: Vec<_> = (0..20)
        .map(|_| fixture.ask(Method::GET, "vm.info", ""))
        .collect();
    let deadline = Instant::now() + Duration::from_secs(10);
    while asked.iter().filter(|one| one.is_finished()).count() < 4 {
        assert!(Instant::now() < deadline, "nobody was refused");
        thread::sleep(Duration::from_millis(5));
    }
    for _ in 0..16 {
        fixture.next().1.respond(Ok(ApiReply::Empty));
    }
    let answers: Vec<_> = asked.into_iter().map(|one| one.join().unwrap()).collect();
    let (good, refused): (Vec<_>, Vec<_>) = answers.into_iter().partition(Result::is_ok);
    assert_eq!((good.len(), refused.len()), (16, 4));
    assert!(refused.into_iter().all(|one| refusal(one).0 == 429));
}

#[test]
fn stopping_lets_the_last_answer_out_and_removes_the_socket() {
    let mut fixture = Fixture::new();
    let idle = UnixStream::connect(&fixture.socket).unwrap();
    let answer = fixture.ask(Method::PUT, "vmm.shutdown", "");
    let (_, responder) = fixture.next();
    responder.respond(Ok(ApiReply::Empty));
    let began = Instant::now();
    fixture.server.take().unwrap().stop();
    answer.join().unwrap().unwrap();
    assert!(
        began.elapsed() < Duration::from_secs(2),
        "an idle client held up the end"
    );
    assert!(!fixture.socket.exists());
    drop(idle);
}

/// In a process of its own, which a forbidden call ends with a message.
#[test]
fn the_api_is_served_under_its_filter() {
    const CHILD: &str = "FERRY_API_TEST_CONFINED";
    if std::env::var_os(CHILD).is_none() {
        let mut child = std::process::Command::new(std::env::current_exe().unwrap());
        let test = "api::tests::the_api_is_served_under_its_filter";
        child.args(["--exact", test, "--nocapture"]);
        // As Filters::new has it in ferry, where there are no threads before.
        child.envs([(CHILD, "1"), ("MALLOC_ARENA_MAX", "1")]);
        let output = child.output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{said}");
        return;
    }
    let filters = Filters::new("test", ThreadKind::Api, SeccompMode::Enforce).unwrap();
    let mut fixture = Fixture::with(&filters.spawner());
    let answer = fixture.ask(Method::GET, "vm.metrics", "");
    let long = ApiReply::Metrics("x".repeat(1 << 20));
    fixture.next().1.respond(Ok(long));
    assert_eq!(answer.join().unwrap().unwrap().len(), 1 << 20);
    assert_eq!(fixture.refused(Method::GET, "vm.nothing", "").0, 404);
    let large = "x".repeat(MAX_BODY_BYTES + 1);
    assert_eq!(fixture.refused(Method::PUT, "vm.create", &large).0, 413);
    let mut garbage = UnixStream::connect(&fixture.socket).unwrap();
    garbage.write_all(b"\0\0\r\n\r\n").unwrap();
    let _ = garbage.read(&mut [0; 64]);
    fixture.server.take().unwrap().stop();
    assert!(!fixture.socket.exists());
}

#[test]
fn garbage_is_answered_with_400_or_cut() {
    let fixture = Fixture::new();
    for garbage in [
        &b"\0\0\0\0\r\n\r\n"[..],
        b"GET / HTTP/9.9\r\n\r\n",
        &[0x16; 300_000],
    ] {
        let mut stream = UnixStream::connect(&fixture.socket).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(10)))
            .unwrap();
        // The server may close before it has taken everything.
        let _ = stream.write_all(garbage);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        let text = String::from_utf8_lossy(&answer);
        assert!(text.is_empty() || text.starts_with("HTTP/1.1 4"), "{text}");
    }
    let answer = fixture.ask(Method::GET, "vm.info", "");
    fixture.next().1.respond(Ok(ApiReply::Empty));
    answer.join().unwrap().unwrap();
}

#[test]
fn sockets_are_private_and_only_dead_ones_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("api.sock");
    let live = ApiListener::bind(&path).unwrap();
    let mode = std::fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    assert!(matches!(
        ApiListener::bind(&path),
        Err(SocketError::InUse { .. })
    ));
    drop(live);
    assert!(!path.exists());
    // Bound and dropped without removing the file: what a killed process leaves behind.
    drop(UnixListener::bind(&path).unwrap());
    assert!(path.exists());
    drop(ApiListener::bind(&path).unwrap());
    std::fs::write(&path, "precious").unwrap();
    assert!(matches!(
        ApiListener::bind(&path),
        Err(SocketError::NotASocket { .. })
    ));
    assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    let missing = dir.path().join("no/dir/api.sock");
    assert!(matches!(
        ApiListener::bind(&missing),
        Err(SocketError::Listen { .. })
    ));
    let long = PathBuf::from(format!("/tmp/{}", "x".repeat(200)));
    assert!(matches!(
        ApiListener::bind(&long),
        Err(SocketError::Listen { .. })
    ));
}

#[test]
fn an_inherited_socket_must_listen() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("api.sock");
    let bound = UnixListener::bind(&path).unwrap();
    let socket: ApiSocket = format!("fd={}", bound.as_raw_fd()).parse().unwrap();
    let listener = ApiListener::open(&socket).unwrap();
    drop(listener);
    assert!(path.exists(), "the file is the supervisor's");
    let (pair, _other) = UnixStream::pair().unwrap();
    let refused = ApiListener::inherited(pair.as_raw_fd());
    assert!(matches!(refused, Err(SocketError::Inherited { .. })));
    assert!(matches!(
        ApiListener::inherited(99_999),
        Err(SocketError::Inherited { .. })
    ));
    for (text, good) in [
        ("path=/x", true),
        ("/x", true),
        ("fd=0", true),
        ("fd=x", false),
        ("", false),
        ("path=", false),
        ("x=y", false),
    ] {
        assert_eq!(text.parse::<ApiSocket>().is_ok(), good, "{text}");
    }
}

#[test]
fn the_start_up_code_can_ask_by_itself() {
    let (handle, inbox) = channel().unwrap();
    let (done, finished) = mpsc::channel();
    let asker = thread::spawn(move || {
        let answer = handle.send(ApiRequest::VmBoot).unwrap().wait();
        done.send(answer.is_ok()).unwrap();
        drop(handle);
    });
    let request = std::iter::repeat_with(|| inbox.take()).find_map(|message| message);
    request.unwrap().1.respond(Ok(ApiReply::Empty));
    assert!(finished.recv_timeout(Duration::from_secs(10)).unwrap());
    asker.join().unwrap();
    let (handle, inbox) = channel().unwrap();
    drop(inbox);
    assert!(matches!(
        handle.send(ApiRequest::VmBoot),
        Err(ApiSendError::Closed)
    ));
}
