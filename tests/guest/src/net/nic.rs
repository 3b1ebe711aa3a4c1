//! One NIC: receives, checks, answers, keeps.

use core::fmt;

use guest_logic::args::Args;
use guest_logic::frame::{self, Headers, arp_reply};
use guest_logic::packet::{self, Payload};
use guest_logic::rss::{self, Verdict};
use guest_logic::sequence::{Arrival, Tracker};

use crate::clock::{from_ms, to_us};
use crate::cpu::tsc;
use crate::memory::Ram;
use crate::mmio::Mmio;
use crate::serial::{say, say_with};
use crate::traps;

use super::device::{self, Device};
use super::pool::Pool;
use super::queue::{MAX_ENTRIES, Queue, RING_BYTES, Used};

const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
/// The control queue's number when neither MQ nor RSS is negotiated.
const CONTROL: u16 = 2;
/// Header bytes without and with hash reports (5.1.6).
const HEADER: usize = 12;
const HEADER_WITH_HASH: usize = 20;
const HEADER_NUM_BUFFERS: usize = 10;
const HEADER_HASH_VALUE: usize = 12;
const HEADER_HASH_REPORT: usize = 16;
/// VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_HASH_CONFIG.
const COMMAND_HASH_CONFIG: [u8; 2] = [4, 2];
const COMMAND_TIMEOUT_MS: u64 = 2000;

const DEFAULT_KEPT: u64 = 4096;
const DEFAULT_BUFFER_BYTES: u64 = 4096;
/// Largest packet looked at.
const SCRATCH_BYTES: u64 = 65536 + 32;
const TRANSMIT_BUFFER_BYTES: u32 = 4096;
/// Packets taken in one poll.
const BUDGET: usize = 64;

/// Wrong hash reports named in full, and how much of their frames: all headers.
const MAX_REPORTS: u64 = 4;
const REPORTED_BYTES: usize = 64;

/// What a NIC did so far.
#[derive(Default)]
struct Counters {
    rx: u64,
    other: u64,
    bad: u64,
    duplicate: u64,
    tx: u64,
    dropped: u64,
    hash_packets: u64,
    hash_matched: u64,
    hash_mismatched: u64,
    hash_none: u64,
}

/// Buffers for sending: one per descriptor.
struct Outbox {
    memory: Mmio,
    free: [u16; MAX_ENTRIES as usize],
    free_len: usize,
}

/// A NIC and all its state.
pub(crate) struct Nic {
    index: u8,
    device: Device,
    mac: [u8; 6],
    ip: Option<[u8; 4]>,
    echo: bool,
    features: u64,
    hash_types: u32,
    receive: Queue,
    transmit: Queue,
    control: Option<(Queue, Mmio)>,
    pool: Pool,
    /// The buffer each receive descriptor has.
    posted: [u16; MAX_ENTRIES as usize],
    outbox: Outbox,
    scratch: &'static mut [u8],
    tracker: &'static mut Tracker,
    counters: Counters,
    /// CPU vector, and interrupts already served; `None` polls.
    interrupt: Option<(u8, u64)>,
    /// The last poll left work behind.
    pending: bool,
    last_packet: u64,
    packet_gap: u64,
}

impl Nic {
    /// Negotiates and sets up queues and memory; receives after [`Nic::start`].
    pub(crate) fn new(
        device: Device,
        index: u8,
        args: &Args<'_>,
        ram: &mut Ram,
    ) -> Result<Self, &'static str> {
        const MEMORY: &str = "no memory for buffers";
        let features = device.negotiate(wanted_features(args), device::FEATURE_VERSION_1)?;
        let event_index = features & device::FEATURE_EVENT_INDEX != 0;
        let vector = args.flag("irq").then_some(traps::FIRST_NIC + index);
        let mut rings = || ram.take_dma(RING_BYTES).ok_or(MEMORY);
        let receive = device.queue(
            RECEIVE,
            rings()?,
            event_index,
            vector.map(|vector| (0, vector)),
        )?;
        let transmit = device.queue(TRANSMIT, rings()?, event_index, None)?;
        let control = if features & device::FEATURE_CONTROL != 0 {
            let queue = device.queue(CONTROL, rings()?, event_index, None)?;
            Some((queue, ram.take_dma(4096).ok_or(MEMORY)?))
        } else {
            None
        };
        let kept = u16::try_from(args.number("retain", DEFAULT_KEPT)).unwrap_or(u16::MAX);
        let buffers = kept.saturating_add(receive.entries());
        let bytes = args.number("rxbuf", DEFAULT_BUFFER_BYTES).clamp(64, 65536);
        let bytes = u32::try_from(bytes).unwrap_or(4096);
        let out_bytes = u64::from(transmit.entries()) * u64::from(TRANSMIT_BUFFER_BYTES);
        let mut outbox = Outbox {
            memory: ram.take_dma(out_bytes).ok_or(MEMORY)?,
            free: [0; MAX_ENTRIES as usize],
            free_len: usize::from(transmit.entries()),
        };
        for (slot, descriptor) in outbox.free.iter_mut().zip(0..) {
            *slot = descriptor;
        }
        Ok(Self {
            index,
            mac: device.mac(),
            ip: own_address(args, index),
            echo: args.number("echo", 1) != 0,
            features,
            hash_types: if has_hash(features) {
                device.hash_types()
            } else {
                0
            },
            receive,
            transmit,
            control,
            pool: Pool::new(index, buffers, bytes, ram).ok_or(MEMORY)?,
            posted: [0; MAX_ENTRIES as usize],
            outbox,
            scratch: ram.take_slice(SCRATCH_BYTES).ok_or(MEMORY)?,
            tracker: ram.take_slice(1).and_then(<[_]>::first_mut).ok_or(MEMORY)?,
            counters: Counters::default(),
            interrupt: vector.map(|vector| (vector, 0)),
            pending: true,
            last_packet: 0,
            packet_gap: 0,
            device,
        })
    }

    /// Lets the device work: hash types told, then buffers offered, so that no
    /// packet comes before the device knows what to report.
    pub(crate) fn start(&mut self) {
        for queue in [&self.receive, &self.transmit] {
            queue.want_interrupt(false);
        }
        self.device.start();
        if has_hash(self.features) && !self.configure_hash() {
            say!("FAIL nic {}: hash configuration refused", self.index);
        }
        for descriptor in 0..self.receive.entries() {
            self.post(descriptor);
        }
        self.receive.kick();
    }

    /// Its slot on the bus.
    pub(crate) const fn slot(&self) -> u8 {
        self.device.slot()
    }

    /// Takes the device away from the memory that it knows.
    pub(crate) fn stop(&mut self) {
        if let Err(why) = self.device.reset() {
            say!("FAIL nic {}: {why}", self.index);
        }
    }

    /// Offers the oldest kept buffer with a free receive descriptor.
    fn post(&mut self, descriptor: u16) {
        if let Some(buffer) = self.pool.give_up_oldest() {
            self.posted[usize::from(descriptor)] = buffer;
            let (address, len) = (self.pool.address(buffer), self.pool.buffer_bytes());
            self.receive.offer(descriptor, address, len, true);
        }
    }

    /// VIRTIO_NET_CTRL_MQ_HASH_CONFIG with all types and our key (5.1.6.5.6.4).
    fn configure_hash(&mut self) -> bool {
        const DATA: u64 = 64;
        const ACK: u64 = 2048;
        let Some((queue, memory)) = &mut self.control else {
            return false;
        };
        let mut data = [0; 13 + rss::KEY.len()];
        data[0..4].copy_from_slice(&self.hash_types.to_le_bytes());
        data[12] = rss::KEY.len().to_le_bytes()[0];
        data[13..].copy_from_slice(&rss::KEY);
        memory.copy_in(0, &COMMAND_HASH_CONFIG);
        memory.copy_in(DATA, &data);
        memory.write(ACK, 0xffu8);
        let base = memory.base();
        queue.want_interrupt(false);
        queue.offer_command([(base, 2), (base + DATA, 13 + 40), (base + ACK, 1)]);
        queue.kick();
        let start = tsc();
        while !queue.has_used() {
            if tsc() - start > from_ms(COMMAND_TIMEOUT_MS) {
                return false;
            }
        }
        queue.next_used();
        memory.read::<u8>(ACK) == 0
    }

    /// Takes what came, answers it; whether there was work.
    pub(crate) fn poll(&mut self, now: u64) -> bool {
        if let Some((vector, served)) = &mut self.interrupt {
            let count = traps::interrupts(*vector);
            if count == *served && !self.pending {
                return false;
            }
            *served = count;
        }
        while let Some(used) = self.transmit.next_used() {
            self.outbox.free[self.outbox.free_len] = used.descriptor;
            self.outbox.free_len += 1;
        }
        let mut taken = 0;
        while taken < BUDGET
            && let Some(used) = self.receive.next_used()
        {
            self.take(&used, now);
            taken += 1;
        }
        self.pending = taken == BUDGET;
        if !self.pending && self.interrupt.is_some() {
            self.receive.want_interrupt(true);
            self.pending = self.receive.has_used();
        }
        self.receive.kick();
        self.transmit.kick();
        taken != 0
    }

    fn header_bytes(&self) -> usize {
        if has_hash(self.features) {
            HEADER_WITH_HASH
        } else {
            HEADER
        }
    }

    /// Gathers a packet from its buffers into the scratch, then handles it.
    fn take(&mut self, first: &Used, now: u64) {
        let mut len = self.take_buffer(first, 0);
        if self.features & device::FEATURE_MERGEABLE != 0 {
            let buffers = self.scratch_u16(HEADER_NUM_BUFFERS);
            for _ in 1..buffers {
                let Some(used) = self.receive.next_used() else {
                    self.counters.bad += 1;
                    return;
                };
                len += self.take_buffer(&used, len);
            }
        }
        if len < self.header_bytes() {
            self.counters.bad += 1;
            return;
        }
        self.handle(len, now);
    }

    fn take_buffer(&mut self, used: &Used, at: usize) -> usize {
        let descriptor = used.descriptor;
        let Some(&buffer) = self.posted.get(usize::from(descriptor)) else {
            self.counters.bad += 1;
            return 0;
        };
        let len = self.pool.receive(buffer, used.len, &mut self.scratch[at..]);
        self.post(descriptor);
        len
    }

    fn scratch_u16(&self, at: usize) -> u16 {
        u16::from_le_bytes([self.scratch[at], self.scratch[at + 1]])
    }

    fn handle(&mut self, len: usize, now: u64) {
        self.judge_hash(len);
        let (header, own_mac) = (self.header_bytes(), self.mac);
        let frame = &mut self.scratch[header..len];
        if let Some(reply) = self.ip.and_then(|ip| arp_reply(frame, own_mac, ip)) {
            frame[..reply.len()].copy_from_slice(&reply);
            self.counters.other += 1;
            self.send(header + reply.len());
            return;
        }
        let udp = frame::headers(frame).and_then(|headers: Headers| {
            headers
                .udp_payload(frame)
                .map(|data| (headers, packet::read(data)))
        });
        match udp {
            Some((headers, Payload::Good(label))) => {
                let mine = frame[..6] == own_mac;
                if mine && self.echo {
                    headers.turn_back(frame, own_mac);
                }
                self.count(label, now);
                if mine && self.echo {
                    self.send(len);
                }
            }
            Some((_, Payload::Damaged)) => self.counters.bad += 1,
            Some((_, Payload::Foreign)) | None => self.counters.other += 1,
        }
    }

    fn count(&mut self, label: packet::Label, now: u64) {
        match self.tracker.observe(label.run, label.flow, label.sequence) {
            Arrival::New => self.counters.rx += 1,
            Arrival::Duplicate => self.counters.duplicate += 1,
        }
        if self.last_packet != 0 {
            self.packet_gap = self.packet_gap.max(now - self.last_packet);
        }
        self.last_packet = now;
    }

    fn judge_hash(&mut self, len: usize) {
        if !has_hash(self.features) {
            return;
        }
        let value = u32::from(self.scratch_u16(HEADER_HASH_VALUE))
            | u32::from(self.scratch_u16(HEADER_HASH_VALUE + 2)) << 16;
        let kind = self.scratch_u16(HEADER_HASH_REPORT);
        let verdict = rss::judge(
            &self.scratch[HEADER_WITH_HASH..len],
            self.hash_types,
            kind,
            value,
        );
        let counters = &mut self.counters;
        counters.hash_packets += 1;
        match verdict {
            Verdict::Matched => counters.hash_matched += 1,
            Verdict::Mismatched => {
                counters.hash_mismatched += 1;
                if counters.hash_mismatched <= MAX_REPORTS {
                    report_hash(
                        self.index,
                        kind,
                        value,
                        &self.scratch[HEADER_WITH_HASH..len],
                    );
                }
            }
            Verdict::None => counters.hash_none += 1,
            Verdict::Unjudged => {}
        }
    }

    /// Sends the scratch's first `len` bytes, whose header is made zero.
    fn send(&mut self, len: usize) {
        let header = self.header_bytes();
        let bytes = match u32::try_from(len) {
            Ok(bytes) if bytes <= TRANSMIT_BUFFER_BYTES && self.outbox.free_len > 0 => bytes,
            _ => {
                self.counters.dropped += 1;
                return;
            }
        };
        self.outbox.free_len -= 1;
        let descriptor = self.outbox.free[self.outbox.free_len];
        let at = u64::from(descriptor) * u64::from(TRANSMIT_BUFFER_BYTES);
        self.scratch[..header].fill(0);
        self.outbox.memory.copy_in(at, &self.scratch[..len]);
        self.transmit
            .offer(descriptor, self.outbox.memory.base() + at, bytes, false);
        self.counters.tx += 1;
    }

    /// Received buffers kept and re-checked.
    pub(crate) fn pool(&mut self) -> &mut Pool {
        &mut self.pool
    }

    /// Writes the counters as a JSON object; the gap starts anew.
    pub(crate) fn report(&mut self, line: &mut dyn fmt::Write) -> fmt::Result {
        let Counters {
            rx,
            other,
            bad,
            duplicate,
            tx,
            dropped,
            ..
        } = self.counters;
        let Counters {
            hash_packets,
            hash_matched,
            hash_mismatched,
            hash_none,
            ..
        } = self.counters;
        let gap = to_us(core::mem::take(&mut self.packet_gap));
        let interrupts = self
            .interrupt
            .map_or(0, |(vector, _)| traps::interrupts(vector));
        write!(
            line,
            "{{\"rx\":{rx},\"rx_other\":{other},\"rx_bad\":{bad},\"rx_lost\":{},\"rx_dup\":{duplicate},\
             \"tx\":{tx},\"tx_drop\":{dropped},\"gap_us\":{gap},\"irqs\":{interrupts},\"kicks\":{},\
             \"rx_pages_corrupt\":{},\"hash_packets\":{hash_packets},\"hash_matched\":{hash_matched},\
             \"hash_mismatched\":{hash_mismatched},\"hash_none\":{hash_none}}}",
            self.tracker.lost(),
            self.receive.kicks + self.transmit.kicks,
            self.pool.corrupt,
        )
    }
}

/// What is said about a NIC once, as the inside of a JSON object.
impl fmt::Display for Nic {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, f] = self.mac;
        write!(
            out,
            "\"mac\":\"{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}\",\"features\":\"{:#x}\",\
             \"header\":{},\"hash_types\":{},\"entries\":{},\"irq\":{}",
            self.features,
            self.header_bytes(),
            self.hash_types,
            self.receive.entries(),
            self.interrupt.is_some(),
        )
    }
}

/// Names a packet whose hash report is wrong, with the start of its frame.
fn report_hash(nic: u8, kind: u16, value: u32, frame: &[u8]) {
    say_with(|line| {
        write!(
            line,
            "ERROR {{\"nic\":{nic},\"what\":\"hash\",\"report\":{kind},\"value\":\"{value:#010x}\",\"frame\":\""
        )?;
        frame
            .iter()
            .take(REPORTED_BYTES)
            .try_for_each(|byte| write!(line, "{byte:02x}"))?;
        write!(line, "\"}}")
    });
}

const fn has_hash(features: u64) -> bool {
    features & device::FEATURE_HASH_REPORT != 0
}

fn wanted_features(args: &Args<'_>) -> u64 {
    let optional = |key, default, feature| {
        if args.number(key, default) != 0 {
            feature
        } else {
            0
        }
    };
    device::FEATURE_VERSION_1
        | device::FEATURE_ACCESS_PLATFORM
        | device::FEATURE_MAC
        | optional("mrg", 1, device::FEATURE_MERGEABLE)
        | optional("evidx", 1, device::FEATURE_EVENT_INDEX)
        | optional(
            "hash",
            0,
            device::FEATURE_HASH_REPORT | device::FEATURE_CONTROL,
        )
}

/// `ip0=` for NIC 0, and so on.
fn own_address(args: &Args<'_>, index: u8) -> Option<[u8; 4]> {
    let key = [b'i', b'p', b'0' + index];
    core::str::from_utf8(&key)
        .ok()
        .and_then(|key| args.ipv4(key))
}
