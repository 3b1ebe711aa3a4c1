//! Tests of the card against the tests' own backend, and against peers that misbehave.

mod hostile;
mod log;
mod serving;

use std::fs::File;
use std::io::{Read, Write};
use std::sync::Arc;

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use vhost_backend::{Backend, Faults, Port};

use super::*;
use crate::testing::{
    Driver, Ring, TestFabric, Used, pattern, pci_device, shared_memory, wait_for,
};

const RX: usize = 0;
const TX: usize = 1;
const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
/// Where buffers are in guest memory.
const BUFFERS: u64 = 0x80_0000;
/// Distance of two buffers.
const STRIDE: u64 = 0x2000;

fn options(pairs: u16) -> VhostUserOptions {
    VhostUserOptions {
        id: "_net0".into(),
        socket: PathBuf::from("test.sock"),
        mac: MAC,
        mtu: Some(1500),
        pairs,
        queue_size: 256,
    }
}

/// A backend, and the far ends of its ports.
struct Host {
    backend: Backend,
    peers: Vec<File>,
    _dir: tempfile::TempDir,
}

impl Host {
    fn new(pairs: u16, faults: Faults) -> Self {
        let mut ports: Vec<Port> = Vec::new();
        let mut peers = Vec::new();
        for _ in 0..pairs {
            let (end, peer) = socketpair(
                AddressFamily::UNIX,
                SocketType::SEQPACKET,
                SocketFlags::NONBLOCK | SocketFlags::CLOEXEC,
                None,
            )
            .unwrap();
            ports.push(Box::new(end));
            peers.push(File::from(peer));
        }
        let dir = tempfile::tempdir().unwrap();
        let backend = Backend::start(&dir.path().join("net.sock"), ports, faults).unwrap();
        Self {
            backend,
            peers,
            _dir: dir,
        }
    }

    fn net(&self) -> VhostUserNet {
        let options = VhostUserOptions {
            socket: self.backend.socket().to_owned(),
            ..options(u16::try_from(self.peers.len()).unwrap())
        };
        VhostUserNet::connect(options, &ThreadSpawner::unconfined(), Box::new(|_| ())).unwrap()
    }

    /// A card with its driver, up and running with `features`.
    fn card(&self, features: u64, sizes: &[u16]) -> Card {
        let memory = shared_memory();
        let mut card = self.silent_card(&memory);
        card.rings = card.driver.bring_up(features, sizes);
        card
    }

    /// A card without a driver.
    fn silent_card(&self, memory: &MemoryHandle) -> Card {
        let fabric = Arc::default();
        let net = self.net();
        let handle = net.handle();
        let device = pci_device(net, memory, &fabric);
        Card {
            driver: Driver::new(device, memory),
            rings: Vec::new(),
            fabric,
            handle,
        }
    }

    /// Sends a packet into the backend.
    fn send(&self, pair: usize, payload: &[u8]) {
        let packet = [&[0; 12][..], payload].concat();
        (&self.peers[pair]).write_all(&packet).unwrap();
    }

    /// The next packet out of the backend.
    #[track_caller]
    fn receive(&self, pair: usize) -> Vec<u8> {
        let mut packet = vec![0; 70_000];
        let mut got = 0;
        wait_for("packet", || {
            (&self.peers[pair])
                .read(&mut packet)
                .map(|len| got = len)
                .is_ok()
        });
        packet.truncate(got);
        packet
    }
}

struct Card {
    driver: Driver,
    rings: Vec<Ring>,
    fabric: Arc<TestFabric>,
    handle: VhostUserHandle,
}

impl Card {
    /// Makes buffer `index` of `len` bytes available for receiving, and kicks if wanted.
    fn post(&mut self, ring: usize, index: u64, len: u32) {
        self.rings[ring].add(&[], &[(BUFFERS + index * STRIDE, len)]);
        self.kick_if_wanted(ring);
    }

    /// Sends `payload` from buffer `index`.
    fn transmit(&mut self, ring: usize, index: u64, payload: &[u8]) {
        let packet = [&[0; 12][..], payload].concat();
        let at = BUFFERS + index * STRIDE;
        self.put(at, &packet);
        let len = u32::try_from(packet.len()).unwrap();
        self.rings[ring].add(&[(at, len)], &[]);
        self.kick_if_wanted(ring);
    }

    fn kick_if_wanted(&mut self, ring: usize) {
        if self.rings[ring].needs_kick(1) {
            self.driver.kick(u16::try_from(ring).unwrap());
        }
    }

    #[track_caller]
    fn used(&mut self, ring: usize) -> Used {
        self.rings[ring].wait_used()
    }

    fn bytes(&self, address: u64, len: usize) -> Vec<u8> {
        self.rings[RX].bytes(address, len)
    }

    fn put(&self, address: u64, bytes: &[u8]) {
        self.rings[RX].put(address, bytes);
    }

    /// The packet in receive buffer `index`.
    fn received(&self, index: u64, len: usize) -> Vec<u8> {
        self.bytes(BUFFERS + index * STRIDE, len)[12..].to_vec()
    }

    /// Sends a command on the control queue `ring`; the answer.
    #[track_caller]
    fn command(&mut self, ring: usize, command: &[u8]) -> u8 {
        let (at, answer) = (0x60_0000, 0x60_8000);
        self.put(at, command);
        self.put(answer, &[0xff]);
        let len = u32::try_from(command.len()).unwrap();
        self.rings[ring].add(&[(at, len)], &[(answer, 1)]);
        self.driver.kick(u16::try_from(ring).unwrap());
        assert_eq!(self.used(ring).len, 1);
        self.bytes(answer, 1)[0]
    }
}
