//! Tests of the network card against a socket pair and a real tap.

mod control;
mod hostile;
mod kernel;
mod migration;
mod packets;
mod rounds;
mod rss;
mod tap;

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use net_util::header::HeaderSize;
use net_util::tap::{HashAbi, KernelHash, Offloads};
use parking_lot::Mutex;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::testing::{Driver, Ring, TestFabric, Used, memory, pattern, pci_device, wait_for};

const RX: usize = 0;
const TX: usize = 1;
const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
/// Where buffers are in guest memory.
const BUFFERS: u64 = 0x80_0000;
/// Distance of two receive buffers.
const STRIDE: u64 = 0x2000;

/// What the device asked of the backend.
#[derive(Clone, PartialEq, Eq, Debug)]
enum Call {
    Header(HeaderSize),
    Offloads(u32),
    Attach(usize, bool),
    /// The kernel is to hash: report, types, first byte of the key, table, other queue, queues.
    Hash(bool, u32, u8, Vec<u16>, u16, u16),
    /// It is no longer to.
    NoHash,
    /// The program is to steer by this table.
    Program(Vec<u16>),
    /// It is no longer to.
    NoProgram,
}

/// One end of a socket pair that keeps message boundaries, like a tap.
struct Fake {
    index: usize,
    end: OwnedFd,
    calls: Arc<Mutex<Vec<Call>>>,
    hook: Hook,
}

/// Is called while the kernel is told what to hash.
type Hook = Arc<Mutex<Option<Box<dyn Fn() + Send>>>>;

impl AsFd for Fake {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.end.as_fd()
    }
}

impl NetBackend for Fake {
    fn set_header(&self, size: HeaderSize) -> io::Result<()> {
        self.calls.lock().push(Call::Header(size));
        Ok(())
    }

    fn set_offloads(&self, offloads: Offloads) -> io::Result<()> {
        self.calls.lock().push(Call::Offloads(offloads.bits()));
        Ok(())
    }

    fn set_attached(&self, attached: bool) -> io::Result<()> {
        self.calls.lock().push(Call::Attach(self.index, attached));
        Ok(())
    }

    fn set_kernel_hash(&self, _abi: HashAbi, hash: Option<&KernelHash<'_>>) -> io::Result<()> {
        let Some(hash) = hash else {
            self.calls.lock().push(Call::NoHash);
            return Ok(());
        };
        let rss = hash.rss.unwrap();
        self.calls.lock().push(Call::Hash(
            hash.report,
            hash.types.bits(),
            hash.key.as_bytes()[0],
            rss.table.to_vec(),
            rss.unclassified,
            hash.queues,
        ));
        if let Some(hook) = self.hook.lock().as_ref() {
            hook();
        }
        Ok(())
    }
}

/// The host's side of all pairs, and how to make cards on it.
struct Host {
    ends: Vec<OwnedFd>,
    peers: Vec<File>,
    calls: Arc<Mutex<Vec<Call>>>,
    hook: Hook,
    options: NetOptions,
}

impl Host {
    fn new(pairs: usize) -> Self {
        let mut ends = Vec::new();
        let mut peers = Vec::new();
        for _ in 0..pairs {
            let (end, peer) = socketpair(
                AddressFamily::UNIX,
                SocketType::SEQPACKET,
                SocketFlags::NONBLOCK | SocketFlags::CLOEXEC,
                None,
            )
            .unwrap();
            ends.push(end);
            peers.push(File::from(peer));
        }
        Self {
            ends,
            peers,
            calls: Arc::default(),
            hook: Arc::default(),
            options: NetOptions {
                id: "_net0".into(),
                mac: MAC,
                mtu: Some(1500),
                queue_size: 256,
                offloads: true,
                hash_report: true,
                rss: false,
                hash_types: HashTypes::ALL,
            },
        }
    }

    /// A card on these ends; several at different times, for migrations.
    fn net(&self) -> Net {
        let backends = self.ends.iter().enumerate().map(|(index, end)| {
            Arc::new(Fake {
                index,
                end: end.try_clone().unwrap(),
                calls: Arc::clone(&self.calls),
                hook: Arc::clone(&self.hook),
            }) as Arc<dyn NetBackend>
        });
        Net::new(self.options.clone(), backends.collect()).unwrap()
    }

    /// A card with its driver, up and running with `features`.
    fn card(&self, features: u64, sizes: &[u16]) -> Card {
        card_of(self.net(), features, sizes)
    }

    fn send(&self, packet: &[u8]) {
        (&self.peers[0]).write_all(packet).unwrap();
    }

    /// The next packet from the guest, if there is one.
    fn receive(&self) -> Option<Vec<u8>> {
        let mut packet = vec![0; 70_000];
        let len = (&self.peers[0]).read(&mut packet).ok()?;
        packet.truncate(len);
        Some(packet)
    }
}

/// The card `net` with its driver, up and running with `features`.
fn card_of(net: Net, features: u64, sizes: &[u16]) -> Card {
    let memory = memory();
    let fabric = Arc::default();
    let counters = net.counters();
    let device = pci_device(net, &memory, &fabric);
    let mut driver = Driver::new(device, &memory);
    let rings = driver.bring_up(features, sizes);
    Card {
        driver,
        rings,
        fabric,
        counters,
    }
}

struct Card {
    driver: Driver,
    rings: Vec<Ring>,
    fabric: Arc<TestFabric>,
    counters: Arc<NetCounters>,
}

impl Card {
    /// Makes buffer `index` of `len` bytes available for receiving, and kicks if wanted.
    fn post(&mut self, index: u64, len: u32) {
        self.rings[RX].add(&[], &[(BUFFERS + index * STRIDE, len)]);
        if self.rings[RX].needs_kick(1) {
            self.driver.kick(0);
        }
    }

    fn used(&mut self, queue: usize) -> Used {
        self.rings[queue].wait_used()
    }

    /// Bytes of receive buffer `index`.
    fn buffer(&self, index: u64, len: usize) -> Vec<u8> {
        self.bytes(BUFFERS + index * STRIDE, len)
    }

    fn bytes(&self, address: u64, len: usize) -> Vec<u8> {
        self.rings[RX].bytes(address, len)
    }

    fn put(&self, address: u64, bytes: &[u8]) {
        self.rings[RX].put(address, bytes);
    }

    /// Sends a command on the control queue `queue`, in pieces of the given lengths; the answer.
    fn command(&mut self, queue: u16, command: &[u8], pieces: &[usize]) -> u8 {
        let at = 0x60_0000;
        let answer = 0x60_8000;
        self.put(answer, &[0xff]);
        let mut readable = Vec::new();
        let mut offset = 0;
        for len in pieces.iter().copied().chain([usize::MAX]) {
            let rest = &command[offset..];
            let piece = &rest[..len.min(rest.len())];
            if !piece.is_empty() {
                // Each piece on its own, not side by side.
                let address = at + u64::try_from(offset).unwrap() * 0x10;
                self.put(address, piece);
                readable.push((address, u32::try_from(piece.len()).unwrap()));
            }
            offset += piece.len();
        }
        let ring = usize::from(queue);
        self.rings[ring].add(&readable, &[(answer, 1)]);
        self.driver.kick(queue);
        assert_eq!(self.used(ring).len, 1);
        self.bytes(answer, 1)[0]
    }
}

/// A TCP segment over IPv4 without options: the first of the well-known hash test vectors.
fn tcp_frame() -> Vec<u8> {
    let mut frame = vec![0; 14 + 20 + 20];
    frame[12..14].copy_from_slice(&[8, 0]);
    frame[14] = 0x45;
    frame[16..18].copy_from_slice(&40_u16.to_be_bytes());
    frame[23] = 6;
    frame[26..30].copy_from_slice(&[66, 9, 149, 187]);
    frame[30..34].copy_from_slice(&[161, 142, 100, 80]);
    frame[34..36].copy_from_slice(&2794_u16.to_be_bytes());
    frame[36..38].copy_from_slice(&1766_u16.to_be_bytes());
    frame[46] = 0x50;
    frame
}
