//! What a network card writes in front of received packets: any packets into any receive buffers,
//! with and without hash reports and merging. Header, packet and used ring are held against a
//! model; nothing else in guest memory changes.

#![no_main]

use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixDatagram;
use std::sync::Arc;
use std::time::{Duration, Instant};

use arbitrary::{Arbitrary, Unstructured};
use devices::ThreadSpawner;
use libfuzzer_sys::fuzz_target;
use net_util::flow::HEAD_BYTES;
use net_util::hash::{HashConfig, HashKey, HashTypes};
use net_util::header::{HeaderSize, HeaderV1Hash};
use net_util::tap::{HashAbi, KernelHash, Offloads};
use net_util::toeplitz::{PacketHash, PacketHasher};
use virtio_devices::queue::{Queue, QueuePosition, QueueSetup};
use virtio_devices::{
    Activation, ActiveQueue, DeviceInterrupt, Net, NetBackend, NetOptions, VirtioDevice,
};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};
use vm_migration::Gpa;
use vm_migration::memory::{Backing, GuestMemory, MemoryHandle, RamMapping, map_ram};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use zerocopy::{FromBytes, IntoBytes};

/// Bytes of guest memory: rings below [`BUFFERS`], receive buffers behind.
const RAM: usize = 1 << 17;
const BUFFERS: usize = 0x8000;
/// The control queue's command and its answer.
const COMMAND: u64 = 0x7000;
const ANSWER: u64 = 0x7800;
/// Descriptors of each queue; never all of them are used.
const QUEUE_SIZE: u16 = 128;
/// What guest memory is full of.
const FILL: u8 = 0xa5;

const MRG_RXBUF: u64 = 1 << 15;
const CTRL_VQ: u64 = 1 << 17;
const VERSION_1: u64 = 1 << 32;
const HASH_REPORT: u64 = 1 << 57;

#[derive(Arbitrary, Debug)]
struct Input {
    types: u16,
    key: [[u8; 20]; 2],
    hash_report: bool,
    mergeable: bool,
    /// Lengths of the parts of each receive buffer.
    chains: Vec<Vec<u8>>,
    packets: Vec<Vec<u8>>,
}

/// A receive buffer: addresses and lengths of its parts.
#[derive(Debug)]
struct Chain {
    head: u16,
    parts: Vec<(usize, usize)>,
}

impl Chain {
    fn bytes(&self) -> usize {
        self.parts.iter().map(|part| part.1).sum()
    }
}

/// What the host's end is: one end of a socket pair that keeps packets apart.
struct Host(UnixDatagram);

impl AsFd for Host {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl NetBackend for Host {
    fn set_header(&self, _: HeaderSize) -> io::Result<()> {
        Ok(())
    }
    fn set_offloads(&self, _: Offloads) -> io::Result<()> {
        Ok(())
    }
    fn set_attached(&self, _: bool) -> io::Result<()> {
        Ok(())
    }
    fn set_kernel_hash(&self, _: HashAbi, _: Option<&KernelHash<'_>>) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

/// A driver that looks at the rings instead of waiting for interrupts.
struct Deaf;

impl DeviceInterrupt for Deaf {
    fn queue_used(&self, _: u16) {}
    fn queue_event(&self, _: u16) -> Option<EventFd> {
        None
    }
    fn config_changed(&self) {}
    fn needs_reset(&self, reason: &dyn fmt::Display) {
        panic!("the driver did nothing wrong: {reason}");
    }
}

fn wait_for(what: &str, done: impl Fn() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < Duration::from_secs(5), "no {what}");
        std::thread::yield_now();
    }
}

const fn ring(queue: u16) -> u64 {
    0x2000 * queue as u64
}

fn put(memory: &GuestMemory, address: u64, bytes: &[u8]) {
    memory.write_slice(bytes, GuestAddress(address)).unwrap();
}

fn get<const N: usize>(memory: &GuestMemory, address: u64) -> [u8; N] {
    let mut bytes = [0; N];
    memory
        .read_slice(&mut bytes, GuestAddress(address))
        .unwrap();
    bytes
}

/// Writes descriptor `index`; `next` if the chain goes on with the one behind it.
fn describe(memory: &GuestMemory, queue: u16, index: u16, part: (usize, usize), flags: u16) {
    let address = u64::try_from(part.0).unwrap().to_le_bytes();
    let length = u32::try_from(part.1).unwrap().to_le_bytes();
    let behind = (index + 1).to_le_bytes();
    let bytes = [&address[..], &length, &flags.to_le_bytes(), &behind].concat();
    put(memory, ring(queue) + 16 * u64::from(index), &bytes);
}

fn make_available(memory: &GuestMemory, queue: u16, heads: &[u16]) {
    let heads: Vec<u8> = heads.iter().flat_map(|head| head.to_le_bytes()).collect();
    let count = u16::try_from(heads.len() / 2).unwrap().to_le_bytes();
    put(memory, ring(queue) + 0x1004, &heads);
    put(
        memory,
        ring(queue) + 0x1000,
        &[&[0, 0][..], &count].concat(),
    );
}

/// Lays out the receive buffers, as many as there is room for.
fn lay_out(memory: &GuestMemory, wanted: &[Vec<u8>]) -> Vec<Chain> {
    const NEXT: u16 = 1;
    const WRITE: u16 = 2;
    let (mut at, mut index, mut chains) = (BUFFERS, 0, Vec::new());
    for lengths in wanted.iter().filter(|lengths| !lengths.is_empty()) {
        let count = u16::try_from(lengths.len()).unwrap_or(u16::MAX);
        if count >= QUEUE_SIZE - index {
            break;
        }
        let mut parts = Vec::new();
        for length in lengths {
            // Up to 766 bytes, many short ones among them; a gap behind each.
            let length = usize::from(*length);
            let length = 1 + if length < 128 {
                length / 4
            } else {
                (length - 128) * 6
            };
            parts.push((at, length));
            at += length + 3;
        }
        let head = index;
        for (i, part) in parts.iter().enumerate() {
            let more = if i + 1 < parts.len() { NEXT } else { 0 };
            describe(memory, 0, index, *part, WRITE | more);
            index += 1;
        }
        chains.push(Chain { head, parts });
    }
    let heads: Vec<u16> = chains.iter().map(|chain| chain.head).collect();
    make_available(memory, 0, &heads);
    chains
}

/// A packet as it should arrive, in which buffers.
struct Arrival<'a> {
    packet: Vec<u8>,
    chains: &'a [Chain],
}

/// What should become of the packets: those that arrive, and how many are dropped before the card
/// waits for buffers.
fn expect<'a>(
    input: &Input,
    config: &HashConfig,
    mut free: &'a [Chain],
) -> (Vec<Arrival<'a>>, u64) {
    let hasher = PacketHasher::new(config);
    let header_bytes = if input.hash_report { 20 } else { 12 };
    let (mut arrivals, mut dropped) = (Vec::new(), 0);
    for packet in input.packets.iter().filter(|packet| !packet.is_empty()) {
        let mut taken = 0;
        let mut room = 0;
        let most = if input.mergeable { free.len() } else { 1 };
        while room < packet.len() && taken < most && taken < free.len() {
            room += free[taken].bytes();
            taken += 1;
        }
        if free.is_empty() {
            break;
        }
        if packet.len() < header_bytes || (room < packet.len() && !input.mergeable) {
            dropped += 1;
            continue;
        }
        if room < packet.len() {
            break;
        }
        let (chains, rest) = free.split_at(taken);
        free = rest;
        let mut packet = packet.clone();
        let num_buffers = u16::try_from(taken).unwrap();
        packet[10..12].copy_from_slice(&num_buffers.to_le_bytes());
        if let Ok((header, frame)) = HeaderV1Hash::mut_from_prefix(&mut packet[..])
            && input.hash_report
        {
            let hash: PacketHash = hasher.hash_frame(&frame[..frame.len().min(HEAD_BYTES)]);
            header.set_hash(hash);
        }
        arrivals.push(Arrival { packet, chains });
    }
    (arrivals, dropped)
}

fn queues(memory: &MemoryHandle) -> Vec<ActiveQueue> {
    let queue = |index| {
        let setup = QueueSetup {
            size: QUEUE_SIZE,
            descriptors: ring(index),
            available: ring(index) + 0x1000,
            used: ring(index) + 0x1800,
            event_idx: false,
            indirect: false,
        };
        let position = QueuePosition::default();
        ActiveQueue {
            queue: Queue::new(index, setup, position, &memory.memory()).unwrap(),
            kick: EventFd::new(EFD_NONBLOCK).unwrap(),
        }
    };
    (0..3).map(queue).collect()
}

fn used_count(memory: &GuestMemory, queue: u16) -> u16 {
    u16::from_le_bytes(get(memory, ring(queue) + 0x1802))
}

/// Sets types and key by the control queue.
fn configure(memory: &GuestMemory, kick: &EventFd, config: &HashConfig) {
    let types = config.types.bits().to_le_bytes();
    let key = config.key.as_bytes();
    let command = [&[4, 2][..], &types, &[0; 8], &[40], key].concat();
    put(memory, COMMAND, &command);
    let command = (usize::try_from(COMMAND).unwrap(), command.len());
    describe(memory, 2, 0, command, 1);
    describe(memory, 2, 1, (usize::try_from(ANSWER).unwrap(), 1), 2);
    make_available(memory, 2, &[0]);
    kick.write(1).unwrap();
    wait_for("answer to the command", || used_count(memory, 2) == 1);
    assert_eq!(get(memory, ANSWER), [0]);
}

/// What is in guest memory from [`BUFFERS`] on, held against what should be.
fn check(memory: &GuestMemory, chains: &[Chain], arrivals: &[Arrival<'_>]) {
    let mut found = vec![0; RAM - BUFFERS];
    memory
        .read_slice(&mut found, GuestAddress(BUFFERS.try_into().unwrap()))
        .unwrap();
    let part = |part: &(usize, usize)| part.0 - BUFFERS..part.0 - BUFFERS + part.1;
    let mut used = 0;
    for (number, Arrival { packet, chains }) in arrivals.iter().enumerate() {
        let parts = chains.iter().flat_map(|chain| &chain.parts);
        let mut bytes: Vec<u8> = parts
            .flat_map(|range| found[part(range)].to_vec())
            .collect();
        bytes.truncate(packet.len());
        assert_eq!(bytes, *packet, "packet {number}");
        let mut left = packet.len();
        for chain in *chains {
            let length = left.min(chain.bytes());
            left -= length;
            let entry = ring(0) + 0x1804 + 8 * used;
            let head = u32::from_le_bytes(get(memory, entry));
            let written = u32::from_le_bytes(get(memory, entry + 4));
            assert_eq!(head, u32::from(chain.head), "packet {number}");
            assert_eq!(usize::try_from(written), Ok(length), "packet {number}");
            used += 1;
        }
    }
    assert_eq!(u64::from(used_count(memory, 0)), used);
    // Nothing was written between the buffers.
    for range in chains.iter().flat_map(|chain| &chain.parts) {
        found[part(range)].fill(FILL);
    }
    assert!(found.iter().all(|byte| *byte == FILL));
}

fn live(input: &Input) {
    let ram = RamMapping {
        gpa: Gpa(0),
        len: u64::try_from(RAM).unwrap(),
        backing: Backing::Anonymous,
    };
    let handle = MemoryHandle::new(map_ram(vec![ram]).unwrap());
    let memory = handle.memory().into_inner();
    put(&memory, BUFFERS.try_into().unwrap(), &[FILL; RAM - BUFFERS]);
    let chains = lay_out(&memory, &input.chains);
    let config = HashConfig {
        types: HashTypes::from_bits(u32::from(input.types) & HashTypes::ALL.bits()),
        key: HashKey::padded(input.key.as_bytes()).unwrap(),
    };
    let (arrivals, dropped) = expect(input, &config, &chains);

    let (ours, theirs) = UnixDatagram::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    let options = NetOptions {
        id: "fuzz".into(),
        mac: [2, 0, 0, 0, 0, 1],
        mtu: None,
        queue_size: QUEUE_SIZE,
        offloads: true,
        hash_report: true,
        rss: false,
        hash_types: HashTypes::ALL,
    };
    let mut card = Net::new(options, vec![Arc::new(Host(ours))]).unwrap();
    let optional = [
        (input.hash_report, HASH_REPORT),
        (input.mergeable, MRG_RXBUF),
    ];
    let chosen = optional.iter().filter(|(on, _)| *on);
    let features = chosen.fold(VERSION_1 | CTRL_VQ, |all, (_, feature)| all | feature);
    let queues = queues(&handle);
    let kick = queues[2].kick.try_clone().unwrap();
    card.activate(Activation {
        memory: handle,
        queues,
        interrupt: Arc::new(Deaf),
        features,
        spawner: ThreadSpawner::unconfined(),
    })
    .unwrap();
    if input.hash_report {
        configure(&memory, &kick, &config);
    }
    for packet in input.packets.iter().filter(|packet| !packet.is_empty()) {
        theirs.send(packet).unwrap();
    }
    let counters = card.counters();
    let arrived = u64::try_from(arrivals.len()).unwrap();
    wait_for("packets", || {
        let totals = counters.totals();
        totals.rx_packets >= arrived && totals.rx_dropped >= dropped
    });
    card.deactivate().unwrap();
    assert_eq!(counters.totals().rx_packets, arrived);
    check(&memory, &chains, &arrivals);
}

fuzz_target!(|bytes: &[u8]| {
    let mut unstructured = Unstructured::new(bytes);
    if let Ok(mut input) = unstructured.arbitrary::<Input>() {
        // As many as a socket holds, and of a size that all buffers together may hold.
        input.packets.truncate(8);
        input.chains.truncate(usize::from(QUEUE_SIZE));
        live(&input);
    }
});
