//! Tests of the console on a socket and a file.

use std::io::Read;
use std::os::unix::net::UnixStream;
use std::path::Path;

use vm_memory::{Bytes, GuestAddress};
use vm_migration::state::{Pause, SaveRestore};

use super::*;
use crate::testing::{
    Driver, Ring, Rounds, is_logged, memory, pages, pci_device, two_views, wait_for,
};

const FEATURES: u64 = feature::RING_EVENT_IDX | feature::RING_INDIRECT_DESC;

fn console(terminal: Terminal) -> (Driver, Vec<Ring>) {
    let memory = memory();
    let console = Console::new("_console0", Arc::new(terminal));
    let mut driver = Driver::new(pci_device(console, &memory, &Arc::default()), &memory);
    let rings = driver.bring_up(FEATURES, &[16, 16]);
    (driver, rings)
}

/// A console on a socket, and a client of it.
fn with_client(path: &Path) -> (Driver, Vec<Ring>, UnixStream) {
    let (driver, rings) = console(Terminal::socket(path).unwrap());
    let client = UnixStream::connect(path).unwrap();
    (driver, rings, client)
}

fn take(driver: &mut Driver, ring: &mut Ring, index: u16) -> u32 {
    driver.kick(index);
    let mut used = None;
    wait_for("used chain", || {
        used = ring.pop_used();
        used.is_some()
    });
    used.unwrap().len
}

fn read(ring: &Ring, address: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    ring.memory
        .read_slice(&mut bytes, GuestAddress(address))
        .unwrap();
    bytes
}

#[test]
fn output_reaches_a_file_whole() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log");
    let (mut driver, mut rings) = console(Terminal::file(&path).unwrap());
    let text: Vec<u8> = (0..10_000_u32).map(|i| i.to_le_bytes()[0]).collect();
    rings[1]
        .memory
        .write_slice(&text, GuestAddress(0x8000))
        .unwrap();
    rings[1].add(&[(0x8000, 3000), (0x8000 + 3000, 7000)], &[]);
    assert_eq!(take(&mut driver, &mut rings[1], 1), 0);
    rings[1].add_indirect(&[(0x8000, 5)], &[]);
    assert_eq!(take(&mut driver, &mut rings[1], 1), 0);
    let mut expected = text.clone();
    expected.extend_from_slice(&text[..5]);
    assert!(std::fs::read(&path).unwrap() == expected);
    // The receive queue of a console without input is kept over a pause all the same.
    driver.device.pause().unwrap();
    driver.device.resume().unwrap();
    rings[1].add(&[(0x8000, 5)], &[]);
    assert_eq!(take(&mut driver, &mut rings[1], 1), 0);
}

#[test]
fn input_waits_for_buffers_and_survives_a_move() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("console");
    let (mut driver, mut rings, mut client) = with_client(&path);
    let rx = &mut rings[0];
    client.write_all(b"hello").unwrap();
    std::thread::sleep(std::time::Duration::from_millis(20));
    assert_eq!(rx.pop_used(), None);
    rx.add(&[], &[(0x8000, 3)]);
    assert_eq!(take(&mut driver, rx, 0), 3);
    assert_eq!(read(rx, 0x8000, 3), b"hel");
    assert!(is_logged(&rx.memory, 0x8000));
    // A buffer taken but not filled comes again after a pause.
    rx.add(&[], &[(0x9000, 1), (0xa000, 16)]);
    assert_eq!(take(&mut driver, rx, 0), 2);
    assert_eq!(read(rx, 0x9000, 1), b"l");
    assert_eq!(read(rx, 0xa000, 1), b"o");
    let head = rx.add(&[], &[(0xb000, 16)]);
    driver.kick(0);
    std::thread::sleep(std::time::Duration::from_millis(20));
    driver.device.pause().unwrap();
    let state = driver.device.save().unwrap();
    let memory = driver.memory.clone();
    drop(driver);
    let other = dir.path().join("other");
    let console = Console::new("_console0", Arc::new(Terminal::socket(&other).unwrap()));
    let mut device = pci_device(console, &memory, &Arc::default());
    device.pause().unwrap();
    device.restore(&state).unwrap();
    device.resume().unwrap();
    let mut driver = Driver::new(device, &memory);
    let mut client = UnixStream::connect(&other).unwrap();
    client.write_all(b"again").unwrap();
    let mut used = None;
    wait_for("input", || {
        used = rings[0].pop_used();
        used.is_some()
    });
    assert_eq!((used.unwrap().head, used.unwrap().len), (head, 5));
    assert_eq!(read(&rings[0], 0xb000, 5), b"again");
    // And out to the new client.
    rings[1].add(&[(0xb000, 5)], &[]);
    take(&mut driver, &mut rings[1], 1);
    let mut out = [0; 5];
    client.read_exact(&mut out).unwrap();
    assert_eq!(&out, b"again");
}

#[test]
fn what_a_console_writes_is_sent_again() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("console");
    let (ours, theirs) = two_views();
    let console = Console::new("_console0", Arc::new(Terminal::socket(&path).unwrap()));
    let mut driver = Driver::new(pci_device(console, &ours, &Arc::default()), &theirs);
    let mut rings = driver.bring_up(FEATURES, &[16, 16]);
    let mut client = UnixStream::connect(&path).unwrap();
    let used = [0, 1].map(|queue: usize| rings[queue].layout.used);
    driver.device.pause().unwrap();
    let mut rounds = Rounds::start(&ours);
    assert_eq!(rounds.next(), pages([]));
    driver.device.resume().unwrap();

    // Input that ends in the second of three pages.
    rings[0].add(&[], &[(0x8ff0, 16), (0xa000, 0x2000)]);
    driver.kick(0);
    client.write_all(&[7; 40]).unwrap();
    wait_for("input", || rings[0].used_index() == 1);
    let mut sent = rounds.next();
    assert!(
        sent.contains(&0x8000) && sent.contains(&0xa000),
        "{sent:x?}"
    );
    driver.device.pause().unwrap();
    sent.append(&mut rounds.next());
    // Both queues' event words are beside their used indices.
    assert_eq!(sent, pages([0x8000, 0xa000, used[0], used[1]]));

    driver.device.resume().unwrap();
    rings[1].add(&[(0x8000, 5)], &[]);
    assert_eq!(take(&mut driver, &mut rings[1], 1), 0);
    driver.device.pause().unwrap();
    assert_eq!(rounds.next(), pages(used), "output is only read");
    assert_eq!(rounds.next(), pages([]));
}

#[test]
fn broken_receive_ring_asks_for_a_reset() {
    let dir = tempfile::tempdir().unwrap();
    let (mut driver, rings, mut client) = with_client(&dir.path().join("console"));
    rings[0].set_u16(rings[0].layout.available + 2, 999);
    driver.kick(0);
    wait_for("reset request", || driver.status() & 64 != 0);
    client.write_all(b"x").unwrap();
    driver.device.pause().unwrap();
    driver.device.resume().unwrap();
    let mut rings = driver.bring_up(FEATURES, &[16, 16]);
    rings[0].add(&[], &[(0x8000, 3)]);
    assert_eq!(take(&mut driver, &mut rings[0], 0), 1);
}
