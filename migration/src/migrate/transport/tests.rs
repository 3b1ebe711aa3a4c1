use std::time::{Duration, Instant};

use super::*;

fn round_trip(listener: Listener) {
    let cancel = CancelHandle::new().unwrap();
    let here = connect(listener.address(), &cancel).unwrap();
    let there = listener.accept(None, &cancel).unwrap();
    assert_eq!(here.peer(), listener.address().to_string());
    let patience = Patience {
        idle: Some(Duration::from_secs(5)),
        until: None,
        heed_cancel: true,
    };
    here.write_all(b"over", &patience).unwrap();
    let mut bytes = [0u8; 4];
    there.read_exact(&mut bytes, &patience).unwrap();
    assert_eq!(&bytes, b"over");
    drop(here);
    assert!(matches!(
        there.read_exact(&mut bytes, &patience),
        Err(Stop::Closed)
    ));
}

#[test]
fn unix_sockets_connect_and_leave_no_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let listener = Listener::bind(&Address::Unix(path.clone())).unwrap();
    let mode = std::os::unix::fs::PermissionsExt::mode(&path.metadata().unwrap().permissions());
    assert_eq!(mode & 0o777, 0o600);
    round_trip(listener);
    assert!(!path.exists());
}

#[test]
fn tcp_connects_over_both_families() {
    for host in ["tcp:127.0.0.1:0", "tcp:[::1]:0"] {
        match Listener::bind(&host.parse().unwrap()) {
            Ok(listener) => round_trip(listener),
            Err(error) => eprintln!("SKIP: tcp_connects_over_both_families: {host}: {error}"),
        }
    }
}

#[test]
fn a_taken_path_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let address = Address::Unix(dir.path().join("s"));
    let _first = Listener::bind(&address).unwrap();
    let error = Listener::bind(&address).unwrap_err().to_string();
    assert!(error.contains(&address.to_string()), "{error}");
}

#[test]
fn a_socket_left_behind_is_replaced_and_a_living_one_is_not_disturbed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m");
    let address: Address = format!("unix:{}", path.display()).parse().unwrap();
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    let listener = Listener::bind(&address).unwrap();
    let error = Listener::bind(&address).unwrap_err();
    assert!(matches!(error, TransportError::Listen { .. }), "{error}");
    let cancel = CancelHandle::new().unwrap();
    let accepted = listener.accept(Some(Duration::from_millis(1)), &cancel);
    assert!(matches!(accepted, Err(TransportError::NobodyCame { .. })));
    drop(listener);
    std::fs::write(&path, "precious").unwrap();
    assert!(Listener::bind(&address).is_err());
    assert_eq!(std::fs::read(&path).unwrap(), b"precious");
}

#[test]
fn nobody_listening_is_told_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let cancel = CancelHandle::new().unwrap();
    let address = Address::Unix(dir.path().join("none"));
    let error = connect(&address, &cancel).unwrap_err().to_string();
    assert!(error.contains("receive-migration"), "{error}");
}

#[test]
fn waiting_for_a_source_is_bounded_and_cancellable() {
    let dir = tempfile::tempdir().unwrap();
    let listener = Listener::bind(&Address::Unix(dir.path().join("s"))).unwrap();
    let cancel = CancelHandle::new().unwrap();
    let start = Instant::now();
    let timeout = Some(Duration::from_millis(50));
    assert!(matches!(
        listener.accept(timeout, &cancel),
        Err(TransportError::NobodyCame { .. })
    ));
    let other = cancel.clone();
    let thread = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(50));
        other.cancel().unwrap();
    });
    assert!(matches!(
        listener.accept(None, &cancel),
        Err(TransportError::Cancelled)
    ));
    thread.join().unwrap();
    assert!(start.elapsed() < Duration::from_secs(5));
}

#[test]
fn a_blocked_write_ends_by_timeout_and_by_cancel() {
    let (a, _b) = std::os::unix::net::UnixStream::pair().unwrap();
    let cancel = CancelHandle::new().unwrap();
    let connection = Connection::from_socket(a.into(), "b", &cancel);
    let big = vec![0u8; 16 << 20];
    let patience = Patience {
        idle: Some(Duration::from_millis(50)),
        until: None,
        heed_cancel: true,
    };
    let (done, stop) = connection.write_all(&big, &patience).unwrap_err();
    assert!(done < big.len());
    assert!(matches!(stop, Stop::TimedOut));
    cancel.cancel().unwrap();
    let (_, stop) = connection.write_all(&big, &patience).unwrap_err();
    assert!(matches!(stop, Stop::Cancelled));
}
