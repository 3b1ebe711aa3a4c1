//! Servers that die, hang or lie, and clients that do: errors in bounded time, no panic.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use crate::common::{FakeDevice, connected, quick};
use proptest::prelude::*;
use vfio_user::wire::{FLAG_ERROR, HEADER_SIZE, Header, TYPE_REPLY};
use vfio_user::{Client, ClientConfig, ClientError, Command, Server, ServerError};
use zerocopy::{FromBytes, IntoBytes};

const LIMIT: Duration = Duration::from_secs(3);

fn assert_gone<T: std::fmt::Debug>(result: Result<T, ClientError>) {
    let error = result.unwrap_err();
    assert!(matches!(error, ClientError::ServerGone { .. }), "{error:?}");
    assert!(error.to_string().contains("test.sock"), "{error}");
}

fn request(command: Command, payload: &[u8]) -> Vec<u8> {
    let header = Header {
        id: 1,
        command: command.number(),
        size: u32::try_from(HEADER_SIZE + payload.len()).unwrap(),
        flags: 0,
        error: 0,
    };
    [header.as_bytes(), payload].concat()
}

const VERSION: &[u8] = b"\0\0\x01\0{}\0";

fn read_header(stream: &mut UnixStream) -> Header {
    let mut bytes = [0; HEADER_SIZE];
    stream.read_exact(&mut bytes).unwrap();
    let header = Header::read_from_bytes(&bytes).unwrap();
    let mut payload = vec![0; usize::try_from(header.size).unwrap() - HEADER_SIZE];
    stream.read_exact(&mut payload).unwrap();
    header
}

/// A client of a server that agrees on the version and then does as `script` says.
fn scripted(
    script: impl FnOnce(UnixStream) + Send + 'static,
) -> (Client, std::thread::JoinHandle<()>) {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let server = std::thread::spawn(move || {
        let header = read_header(&mut theirs);
        answer(&mut theirs, header, 0, VERSION);
        script(theirs);
    });
    let client = Client::from_stream(ours, Path::new("test.sock"), quick()).unwrap();
    (client, server)
}

fn answer(stream: &mut UnixStream, to: Header, flags: u32, payload: &[u8]) {
    let header = Header {
        size: u32::try_from(HEADER_SIZE + payload.len()).unwrap(),
        flags: TYPE_REPLY | flags,
        error: 0,
        ..to
    };
    stream
        .write_all(&[header.as_bytes(), payload].concat())
        .unwrap();
}

#[test]
fn a_server_that_dies_is_noticed_at_once_and_for_good() {
    let (told, hears) = mpsc::channel();
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let server = std::thread::spawn(move || {
        let header = read_header(&mut theirs);
        answer(&mut theirs, header, 0, VERSION);
        read_header(&mut theirs);
        // Dies with a request unanswered.
    });
    let client = Client::from_stream(
        ours,
        Path::new("test.sock"),
        ClientConfig {
            on_gone: Some(Box::new(move |error| {
                told.send(error.to_string()).unwrap();
            })),
            ..ClientConfig::default()
        },
    )
    .unwrap();
    let start = Instant::now();
    assert_gone(client.info());
    assert!(start.elapsed() < LIMIT);
    assert_gone(client.region_read(0, 0, &mut [0; 4]));
    assert!(hears.recv_timeout(LIMIT).unwrap().contains("test.sock"));
    let mut count = [0; 8];
    rustix::io::read(client.gone_event(), &mut count).unwrap();
    assert!(client.gone().is_some());
    server.join().unwrap();
}

#[test]
fn a_server_that_dies_while_nothing_is_asked_is_noticed() {
    let (client, server) = scripted(drop);
    server.join().unwrap();
    let start = Instant::now();
    while client.gone().is_none() {
        assert!(start.elapsed() < LIMIT);
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_server_that_hangs_times_out_for_every_waiting_thread() {
    let (client, server) = scripted(|stream| {
        std::thread::sleep(Duration::from_secs(1));
        drop(stream);
    });
    let start = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| assert_gone(client.info()));
        }
    });
    assert!(start.elapsed() < Duration::from_millis(900));
    server.join().unwrap();
}

#[test]
fn a_server_that_does_not_read_times_out() {
    let (client, server) = scripted(|stream| {
        std::thread::sleep(Duration::from_secs(1));
        drop(stream);
    });
    let start = Instant::now();
    assert_gone(client.region_write(0, 0, &vec![0; 1 << 20]));
    assert!(start.elapsed() < Duration::from_millis(900));
    server.join().unwrap();
}

#[test]
fn replies_that_break_the_protocol_end_the_connection() {
    type Spoil = fn(&mut Header);
    let spoils: [Spoil; 6] = [
        |h| h.id = h.id.wrapping_add(1),
        |h| h.command = 5,
        |h| h.size = 15,
        |h| h.size = u32::MAX,
        |h| h.size = 4096,
        |h| h.flags = 7,
    ];
    for spoil in spoils {
        let (client, server) = scripted(move |mut stream| {
            let mut header = read_header(&mut stream);
            header.flags = TYPE_REPLY;
            spoil(&mut header);
            stream.write_all(header.as_bytes()).unwrap();
            std::thread::sleep(Duration::from_millis(50));
        });
        let start = Instant::now();
        assert_gone(client.info());
        assert!(start.elapsed() < LIMIT);
        server.join().unwrap();
    }
}

#[test]
fn an_error_reply_without_an_errno_is_still_an_error() {
    let (client, server) = scripted(|mut stream| {
        for errno in [0, 4096, u32::MAX] {
            let header = read_header(&mut stream);
            let reply = Header {
                size: 16,
                flags: TYPE_REPLY | FLAG_ERROR,
                error: errno,
                ..header
            };
            stream.write_all(reply.as_bytes()).unwrap();
        }
    });
    for _ in 0..3 {
        let error = client.info().unwrap_err();
        assert_eq!(error.refused(), Some(vfio_user::Errno::IO));
    }
    server.join().unwrap();
}

#[test]
fn a_reply_of_another_length_is_malformed_but_the_connection_lives() {
    let (client, server) = scripted(|mut stream| {
        let header = read_header(&mut stream);
        answer(&mut stream, header, 0, &[0; 8]);
        let header = read_header(&mut stream);
        answer(&mut stream, header, 0, &[0; 16]);
    });
    assert!(matches!(client.info(), Err(ClientError::BadReply { .. })));
    client.info().unwrap();
    server.join().unwrap();
}

#[test]
fn a_server_of_another_version_is_named() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let server = std::thread::spawn(move || {
        let header = read_header(&mut theirs);
        answer(&mut theirs, header, 0, b"\x01\0\0\0");
    });
    let error = Client::from_stream(ours, Path::new("test.sock"), quick())
        .err()
        .unwrap();
    assert!(matches!(error, ClientError::Version { .. }), "{error:?}");
    assert!(error.to_string().contains("test.sock"));
    server.join().unwrap();
}

#[test]
fn a_server_with_another_client_is_told_from_a_dead_one() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("device.sock");
    let server = Server::bind(&path).unwrap();
    let stopper = server.stopper();
    let thread = std::thread::spawn(move || server.run(&mut FakeDevice::new()));
    let first = Client::connect(&path, ClientConfig::default()).unwrap();
    let start = Instant::now();
    let error = Client::connect(&path, quick()).err().unwrap();
    assert!(matches!(error, ClientError::Busy { .. }), "{error:?}");
    assert!(start.elapsed() < LIMIT);
    first.info().unwrap();
    stopper.stop().unwrap();
    thread.join().unwrap().unwrap();
}

#[test]
fn a_full_backlog_does_not_hold_a_client_up() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("device.sock");
    let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    rustix::net::listen(&listener, 1).unwrap();
    let start = Instant::now();
    // Nobody accepts: the first ones take the places there are.
    let waiting: Vec<_> = (0..6)
        .map(|_| {
            let path = path.clone();
            std::thread::spawn(move || Client::connect(&path, quick()).err().unwrap())
        })
        .collect();
    let errors: Vec<_> = waiting
        .into_iter()
        .map(|thread| thread.join().unwrap())
        .collect();
    assert!(start.elapsed() < LIMIT);
    let full = |error: &ClientError| matches!(error, ClientError::Connect { .. });
    assert!(errors.iter().any(full), "{errors:?}");
}

#[test]
fn nobody_listening_is_named() {
    let error = Client::connect(Path::new("/nonexistent/x.sock"), quick())
        .err()
        .unwrap();
    assert!(error.to_string().contains("/nonexistent/x.sock"), "{error}");
}

#[test]
fn a_server_serves_one_client_after_another_and_stops() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("device.sock");
    let server = Server::bind(&path).unwrap();
    let stopper = server.stopper();
    let mut device = FakeDevice::new();
    let shared = std::sync::Arc::clone(&device.shared);
    let thread = std::thread::spawn(move || server.run(&mut device));
    for round in 1..=3 {
        let client = Client::connect(&path, ClientConfig::default()).unwrap();
        client.region_write(0, 0, &[7; 4]).unwrap();
        drop(client);
        let start = Instant::now();
        while shared.lock().resets < round {
            assert!(start.elapsed() < LIMIT);
            std::thread::sleep(Duration::from_millis(2));
        }
    }
    assert!(matches!(
        Server::bind(&path),
        Err(ServerError::Listen { .. })
    ));
    // Stopped while a client is connected.
    let client = Client::connect(&path, ClientConfig::default()).unwrap();
    let mut data = [0; 4];
    client.region_read(0, 0, &mut data).unwrap();
    assert_eq!(data, [0; 4], "the device was reset between clients");
    stopper.stop().unwrap();
    thread.join().unwrap().unwrap();
    assert!(client.info().is_err());
    assert!(!path.exists());
}

#[test]
fn a_stale_socket_file_is_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("device.sock");
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    assert!(path.exists());
    Server::bind(&path).unwrap();
}

/// Sends bytes to a server and closes; the server must end by itself.
fn serve_bytes(bytes: &[u8]) -> Result<(), ServerError> {
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    let thread = std::thread::spawn(move || vfio_user::serve(theirs, &mut FakeDevice::new()));
    ours.set_read_timeout(Some(LIMIT)).unwrap();
    // A server that has had enough closes early.
    let _ = ours.write_all(bytes);
    let _ = ours.shutdown(std::net::Shutdown::Write);
    let mut answers = Vec::new();
    let _ = ours.read_to_end(&mut answers);
    thread.join().unwrap()
}

#[test]
fn clients_that_break_the_protocol_are_dropped() {
    assert!(matches!(
        serve_bytes(&request(Command::GetInfo, &[0; 16])),
        Err(ServerError::NoVersion(4))
    ));
    assert!(matches!(
        serve_bytes(&request(Command::Version, b"\x09\0\0\0")),
        Err(ServerError::Version(_))
    ));
    let mut huge = request(Command::RegionWrite, &[]);
    huge[4..8].copy_from_slice(&u32::MAX.to_ne_bytes());
    let first = request(Command::Version, VERSION);
    assert!(matches!(
        serve_bytes(&[first.as_slice(), &huge].concat()),
        Err(ServerError::Connection(_))
    ));
    let mut short = request(Command::GetInfo, &[]);
    short[4..8].copy_from_slice(&8_u32.to_ne_bytes());
    assert!(matches!(
        serve_bytes(&[first.as_slice(), &short].concat()),
        Err(ServerError::Connection(_))
    ));
    assert!(serve_bytes(&first).is_ok());
}

#[test]
fn a_thousand_requests_in_a_row_are_taken() {
    let mut bytes = request(Command::Version, VERSION);
    for _ in 0..1000 {
        bytes.extend(request(Command::GetInfo, &[0; 16]));
    }
    serve_bytes(&bytes).unwrap();
}

fn hostile_message() -> impl Strategy<Value = Vec<u8>> {
    (
        0_u16..20,
        prop::collection::vec(any::<u8>(), 0..96),
        0_u32..4,
    )
        .prop_map(|(command, payload, op)| {
            let mut payload = payload;
            // Get features past the check of flags often.
            if command == 16 && payload.len() >= 8 {
                payload[6] = [1, 2, 4, 7][usize::try_from(op).unwrap()];
                payload[7] = 0;
                payload[5] = 0;
                payload[4] %= 11;
            }
            let header = Header {
                id: command,
                command,
                size: u32::try_from(HEADER_SIZE + payload.len()).unwrap(),
                flags: 0,
                error: 0,
            };
            [header.as_bytes(), &payload].concat()
        })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn a_server_survives_any_messages(messages in prop::collection::vec(hostile_message(), 0..24)) {
        let mut bytes = request(Command::Version, VERSION);
        bytes.extend(messages.concat());
        let _ = serve_bytes(&bytes);
    }

    #[test]
    fn a_server_survives_any_bytes(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = serve_bytes(&bytes);
        let first = request(Command::Version, VERSION);
        let _ = serve_bytes(&[first, bytes].concat());
    }

    #[test]
    fn a_client_survives_any_reply(
        payload in prop::collection::vec(any::<u8>(), 0..120),
        flags in prop::sample::select(vec![0_u32, 0, 0, FLAG_ERROR]),
    ) {
        let reply = payload.clone();
        let (client, server) = scripted(move |mut stream| {
            for _ in 0..9 {
                let mut bytes = [0; HEADER_SIZE];
                if stream.read_exact(&mut bytes).is_err() {
                    return;
                }
                let header = Header::read_from_bytes(&bytes).unwrap();
                let mut rest = vec![0; usize::try_from(header.size).unwrap() - HEADER_SIZE];
                if stream.read_exact(&mut rest).is_err() {
                    return;
                }
                let answer = Header {
                    size: u32::try_from(HEADER_SIZE + reply.len()).unwrap(),
                    flags: TYPE_REPLY | flags,
                    ..header
                };
                if stream.write_all(&[answer.as_bytes(), &reply].concat()).is_err() {
                    return;
                }
            }
        });
        let start = Instant::now();
        let _ = client.region_info(0);
        let _ = client.region_io_fds(0, 0x1000);
        let _ = client.irq_info(2);
        let _ = client.region_read(0, 0, &mut [0; 32]);
        let _ = client.migration_flags();
        let _ = client.device_state();
        let _ = client.read_migration_data(&mut [0; 64]);
        let _ = client.report_dma_log(0, 4096, 4096, &mut [0]);
        let _ = client.info();
        prop_assert!(start.elapsed() < LIMIT);
        drop(client);
        server.join().unwrap();
    }
}

#[test]
fn a_dropped_client_leaves_no_thread_behind() {
    let (client, _, served) = connected(quick());
    let start = Instant::now();
    drop(client);
    served.join().unwrap().unwrap();
    assert!(start.elapsed() < LIMIT);
}
