use std::thread;

use super::*;

fn pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (server, _) = listener.accept().unwrap();
    client.set_write_timeout(Some(PATIENCE)).unwrap();
    server.set_read_timeout(Some(PATIENCE)).unwrap();
    (client, server)
}

#[test]
fn a_stream_arrives_right_though_the_reader_stalls() {
    let (client, server) = pair();
    let sender = thread::spawn(|| send_over(client, Schedule::new(None), 20 << 20, u64::MAX));
    // Longer than the sender's patience, with more than the buffers hold to come.
    thread::sleep(PATIENCE * 3);
    assert_eq!(
        receive_over(server, Schedule::new(None)).unwrap(),
        Verdict::Right
    );
    assert_eq!(sender.join().unwrap().unwrap(), Verdict::Right);
}

#[test]
fn a_wrong_byte_is_found() {
    let (mut client, server) = pair();
    let mut bytes = vec![0; 100_000];
    pattern::fill(SEED, 0, &mut bytes);
    bytes[77_777] ^= 4;
    client.write_all(&bytes).unwrap();
    drop(client);
    assert_eq!(
        receive_over(server, Schedule::new(None)).unwrap(),
        Verdict::Wrong
    );
}

#[test]
fn a_rate_is_kept() {
    let (client, server) = pair();
    let start = Instant::now();
    let sender = thread::spawn(|| send_over(client, Schedule::new(None), 300_000, 1_000_000));
    assert_eq!(
        receive_over(server, Schedule::new(None)).unwrap(),
        Verdict::Right
    );
    assert_eq!(sender.join().unwrap().unwrap(), Verdict::Right);
    assert!(
        start.elapsed() >= Duration::from_millis(290),
        "{:?}",
        start.elapsed()
    );
}

#[test]
fn the_receiver_may_come_later() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let at = listener.local_addr().unwrap();
    drop(listener);
    assert!(connect(at, Duration::ZERO).is_err());
    let late = thread::spawn(move || {
        thread::sleep(PATIENCE * 2);
        TcpListener::bind(at).unwrap().accept().map(drop)
    });
    connect(at, Duration::from_secs(10)).unwrap();
    late.join().unwrap().unwrap();
}
