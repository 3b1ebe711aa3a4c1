use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::process::Command;

use super::*;

/// Runs `test` with a loopback device of its own, or says why not.
fn with_loopback(name: &str, test: fn()) {
    let namespaced = std::thread::spawn(move || {
        // SAFETY: the thread is new and shares no state that this unshares.
        if unsafe { libc::unshare(libc::CLONE_NEWNET) } < 0 {
            return Err(std::io::Error::last_os_error());
        }
        let up = Command::new("ip")
            .args(["link", "set", "lo", "up"])
            .status()?;
        if !up.success() {
            return Err(std::io::Error::other("`ip link set lo up` failed"));
        }
        test();
        Ok(())
    });
    match namespaced.join() {
        Ok(Ok(())) => {}
        Ok(Err(error)) => println!("SKIP: {name}: no namespace with a loopback: {error}"),
        Err(panic) => std::panic::resume_unwind(panic),
    }
}

fn records(socket: &HashSocket) -> Vec<(Record, Option<FiveTuple>)> {
    let mut records = Vec::new();
    while let Some(record) = socket.next().unwrap() {
        let flow = FiveTuple::parse(record.head());
        records.push((record, flow));
    }
    records
}

/// Linux gives each packet of a TCP socket the socket's own hash.
#[test]
fn packets_of_a_tcp_socket_have_its_hash() {
    with_loopback("packets_of_a_tcp_socket_have_its_hash", || {
        let socket = HashSocket::open("lo", ROOM).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut server, _) = listener.accept().unwrap();
        for _ in 0..10 {
            client.write_all(&[7; 1000]).unwrap();
            server.read_exact(&mut [0; 1000]).unwrap();
        }
        let port = client.local_addr().unwrap().port();
        let mut hashes: Vec<u32> = Vec::new();
        for (record, flow) in records(&socket) {
            let flow = flow.unwrap();
            assert_eq!((flow.version(), flow.protocol), (4, 6));
            assert!(flow.has_port(port));
            if flow.ports.unwrap().0 == port {
                hashes.push(record.hash);
            }
        }
        assert!(hashes.len() >= 10, "{hashes:?}");
        assert!(
            hashes[0] != 0 && hashes.iter().all(|hash| *hash == hashes[0]),
            "{hashes:?}"
        );
        assert_eq!(socket.missed().unwrap(), 0);
    });
}

/// UDP packets get none, and this view does not make one up as `tp_rxhash` does.
#[test]
fn a_packet_without_a_hash_has_none() {
    with_loopback("a_packet_without_a_hash_has_none", || {
        let socket = HashSocket::open("lo", ROOM).unwrap();
        for at in ["127.0.0.1:0", "[::1]:0"] {
            let receiver = UdpSocket::bind(at).unwrap();
            let sender = UdpSocket::bind(at).unwrap();
            sender
                .send_to(&[1; 3], receiver.local_addr().unwrap())
                .unwrap();
            let port = sender.local_addr().unwrap().port();
            let seen = records(&socket);
            let of_ours = |(_, flow): &&(Record, Option<FiveTuple>)| {
                flow.is_some_and(|flow| flow.protocol == 17 && flow.has_port(port))
            };
            let (record, flow) = seen.iter().find(of_ours).unwrap();
            // Over IPv6 the sender itself makes one, for the flow label.
            assert!(record.hash == 0 || at.starts_with('['), "{:x}", record.hash);
            assert_eq!(flow.unwrap().source.is_ipv4(), at.starts_with('1'));
            // Ethernet, IP, UDP, payload: all of it is in the head.
            let length = if at.starts_with('1') {
                14 + 20 + 8 + 3
            } else {
                14 + 40 + 8 + 3
            };
            assert_eq!(
                (record.length, record.head().len()),
                (length, length.try_into().unwrap())
            );
            assert_eq!(record.head()[record.head().len() - 3..], [1; 3]);
        }
    });
}

#[test]
fn packets_beyond_the_queue_are_counted() {
    with_loopback("packets_beyond_the_queue_are_counted", || {
        let socket = HashSocket::open("lo", ROOM).unwrap();
        let receiver = UdpSocket::bind("127.0.0.1:0").unwrap();
        let sender = UdpSocket::bind("127.0.0.1:0").unwrap();
        for _ in 0..8192 + 50 {
            sender
                .send_to(&[1; 200], receiver.local_addr().unwrap())
                .unwrap();
        }
        assert_eq!(socket.missed().unwrap(), 50);
        let seen = records(&socket);
        assert_eq!(seen.len(), 8192);
        assert_eq!(seen[0].0.head().len(), 100);
        assert_eq!(seen[0].0.length, 242);
    });
}

#[test]
fn a_missing_interface_is_told() {
    let error = HashSocket::open("missing0", ROOM).err().unwrap();
    assert!(
        format!("{error:#}").contains("no such interface"),
        "{error:#}"
    );
}
