//! Moving packets between rings and ports.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use crate::log::Log;
use crate::requests::Device;

/// Bytes of a virtio-net header before a packet.
const HEADER: usize = 12;
/// Where `num_buffers` is in it.
const NUM_BUFFERS: std::ops::Range<usize> = 10..12;
/// Longest packet with its header.
const PACKET: usize = 65_550 + HEADER;
/// Packets moved at once, so that the front end is heard in between.
const BURST: usize = 64;

/// One ring.
pub(crate) struct Ring {
    pub(crate) queue: Queue,
    pub(crate) enabled: bool,
    pub(crate) kick: Option<EventFd>,
    pub(crate) call: Option<EventFd>,
    /// Where writes of the used ring are logged.
    pub(crate) log_at: Option<u64>,
    /// Its port has packets that no buffer was there for.
    starved: bool,
}

/// Where what a ring writes is noted.
pub(crate) struct Notes<'a> {
    pub(crate) buffers: Option<&'a Log>,
    pub(crate) used: Option<&'a Log>,
}

impl Notes<'_> {
    fn used_ring(&self, ring: &Ring, offset: u64, len: u64) {
        if let (Some(log), Some(at)) = (self.used, ring.log_at) {
            log.mark(at + offset, len);
        }
    }
}

impl Ring {
    pub(crate) fn new(size: u16) -> Result<Self, virtio_queue::Error> {
        Ok(Self {
            queue: Queue::new(size)?,
            enabled: false,
            kick: None,
            call: None,
            log_at: None,
            starved: false,
        })
    }

    /// Whether it is started and enabled.
    pub(crate) fn runs(&self) -> bool {
        self.enabled && self.queue.ready()
    }

    fn complete(
        &mut self,
        memory: &GuestMemoryMmap,
        notes: &Notes<'_>,
        head: u16,
        len: u32,
    ) -> Result<(), virtio_queue::Error> {
        let slot = u64::from(self.queue.next_used() % self.queue.size());
        self.queue.add_used(memory, head, len)?;
        notes.used_ring(self, 4 + slot * 8, 8);
        notes.used_ring(self, 2, 2);
        Ok(())
    }

    /// Whether there is more to do after all.
    fn ask_for_kicks(
        &mut self,
        memory: &GuestMemoryMmap,
        notes: &Notes<'_>,
    ) -> Result<bool, virtio_queue::Error> {
        let more = self.queue.enable_notification(memory)?;
        if self.queue.event_idx_enabled() {
            notes.used_ring(self, 4 + u64::from(self.queue.size()) * 8, 2);
        } else {
            notes.used_ring(self, 0, 2);
        }
        Ok(more)
    }

    fn interrupt(&mut self, memory: &GuestMemoryMmap) -> Result<(), virtio_queue::Error> {
        if self.queue.needs_notification(memory)?
            && let Some(call) = &self.call
        {
            // A full counter is an interrupt as well.
            let _ = call.write(1);
        }
        Ok(())
    }
}

impl Device {
    /// What there is to wait for besides the front end.
    pub(crate) fn awaited(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        let kicks = self.rings.iter().filter(|ring| ring.runs());
        let kicks = kicks.filter_map(|ring| ring.kick.as_ref().map(event_fd));
        let receivers = self.rings.iter().step_by(2).zip(&self.ports);
        let ports = receivers.filter(|(ring, _)| ring.runs() && !ring.starved);
        kicks.chain(ports.map(|(_, port)| port.as_fd()))
    }

    /// Moves what there is.
    pub(crate) fn move_packets(&mut self) {
        for ring in &mut self.rings {
            if let Some(kick) = &ring.kick
                && kick.read().is_ok()
            {
                ring.starved = false;
            }
        }
        let Some(memory) = self.memory.clone() else {
            return;
        };
        let notes = Notes {
            buffers: self.log.as_ref().filter(|_| self.logs_buffers()),
            used: self
                .log
                .as_ref()
                .filter(|_| !self.faults.forgets_used_rings),
        };
        for (pair, port) in self.rings.chunks_mut(2).zip(&self.ports) {
            let [receive, transmit] = pair else { continue };
            let moved = receive_packets(receive, port.as_fd(), &memory, &notes)
                .and_then(|()| transmit_packets(transmit, port.as_fd(), &memory, &notes));
            if let Err(error) = moved {
                tracing::error!(%error, "the driver's ring is broken");
            }
        }
    }
}

fn transmit_packets(
    ring: &mut Ring,
    port: BorrowedFd<'_>,
    memory: &Arc<GuestMemoryMmap>,
    notes: &Notes<'_>,
) -> Result<(), virtio_queue::Error> {
    if !ring.runs() {
        return Ok(());
    }
    let mut moved = 0;
    loop {
        while let Some(chain) = ring.queue.pop_descriptor_chain(Arc::clone(memory)) {
            let head = chain.head_index();
            let packet = gather(chain, memory);
            // A port that is full loses packets, as a network does.
            let _ = rustix::io::write(port, &packet);
            ring.complete(memory, notes, head, 0)?;
            moved += 1;
        }
        if !ring.ask_for_kicks(memory, notes)? {
            break;
        }
    }
    if moved != 0 {
        ring.interrupt(memory)?;
    }
    Ok(())
}

fn receive_packets(
    ring: &mut Ring,
    port: BorrowedFd<'_>,
    memory: &Arc<GuestMemoryMmap>,
    notes: &Notes<'_>,
) -> Result<(), virtio_queue::Error> {
    if !ring.runs() {
        return Ok(());
    }
    let mut packet = vec![0; PACKET];
    let mut moved = 0;
    while moved < BURST {
        let Some(chain) = ring.queue.pop_descriptor_chain(Arc::clone(memory)) else {
            if ring.ask_for_kicks(memory, notes)? {
                continue;
            }
            ring.starved = true;
            break;
        };
        let len = match rustix::io::read(port, &mut packet[..]) {
            Ok(len) if len > HEADER => len,
            _ => {
                ring.queue.go_to_previous_position();
                break;
            }
        };
        if let Some(field) = packet.get_mut(NUM_BUFFERS) {
            field.copy_from_slice(&1_u16.to_le_bytes());
        }
        let head = chain.head_index();
        let written = scatter(chain, memory, notes, packet.get(..len).unwrap_or_default());
        ring.complete(memory, notes, head, written)?;
        moved += 1;
    }
    if moved != 0 {
        ring.interrupt(memory)?;
    }
    Ok(())
}

/// The bytes of a chain of the driver's.
fn gather(chain: DescriptorChain<Arc<GuestMemoryMmap>>, memory: &GuestMemoryMmap) -> Vec<u8> {
    let mut packet = Vec::new();
    for part in chain.readable() {
        let mut bytes = vec![0; usize::try_from(part.len()).unwrap_or(0).min(PACKET)];
        if memory.read_slice(&mut bytes, part.addr()).is_ok() {
            packet.extend_from_slice(&bytes);
        }
    }
    packet
}

/// Puts `packet` into a chain of the driver's; how many bytes there was room for.
fn scatter(
    chain: DescriptorChain<Arc<GuestMemoryMmap>>,
    memory: &GuestMemoryMmap,
    notes: &Notes<'_>,
    packet: &[u8],
) -> u32 {
    let mut rest = packet;
    let mut written = 0;
    for part in chain.writable() {
        let take = usize::try_from(part.len()).unwrap_or(0).min(rest.len());
        let (now, later) = rest.split_at(take);
        if now.is_empty() || memory.write_slice(now, part.addr()).is_err() {
            break;
        }
        if let (Some(log), Ok(len)) = (notes.buffers, u64::try_from(take)) {
            log.mark(part.addr().0, len);
        }
        written += u32::try_from(take).unwrap_or(0);
        rest = later;
    }
    written
}

/// The used index in memory.
pub(crate) fn used_index(queue: &Queue, memory: &GuestMemoryMmap) -> io::Result<u16> {
    let index = queue.used_idx(memory, Ordering::Acquire);
    index.map(|index| index.0).map_err(io::Error::other)
}

/// The file of an eventfd, for interfaces that want it with its lifetime.
pub(crate) fn event_fd(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the eventfd owns the descriptor and is borrowed for as long as the result lives.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}
