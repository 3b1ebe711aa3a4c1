//! A packet socket whose filter notes the hash of each packet that comes in.

use std::ffi::{CString, c_int};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use anyhow::{Context, bail};

use super::bpf::{HELPER_MAP_PUSH_ELEM, HELPER_SKB_LOAD_BYTES, Insn, QueueMap, load_socket_filter};

/// Bytes of each packet that are noted.
const HEAD: u8 = 100;
const HEAD_BYTES: usize = HEAD as usize;
/// What the filter puts into the queue: hash, queue mapping, length, and the first bytes.
const RECORD: u8 = 12 + HEAD;
const RECORD_BYTES: usize = RECORD as usize;
/// How many packets may come before we look.
const QUEUE_RECORDS: u32 = 8192;

/// Offsets in `struct __sk_buff` (uapi `linux/bpf.h`).
mod skb {
    pub(super) const LEN: i16 = 0;
    pub(super) const PKT_TYPE: i16 = 4;
    pub(super) const QUEUE_MAPPING: i16 = 12;
    pub(super) const HASH: i16 = 68;
}

/// Sent by this host (uapi `linux/if_packet.h`).
const PACKET_OUTGOING: i32 = 4;
/// Bytes of an Ethernet header; what is shorter is no packet.
const ETHERNET_BYTES: i32 = 14;

/// What the filter noted of a packet.
#[derive(Clone, Debug)]
pub(crate) struct Record {
    /// `skb->hash` as the driver set it; 0 if it set none.
    pub(crate) hash: u32,
    /// `skb->queue_mapping`: one more than the receive queue; 0 if the driver did not say.
    queue_mapping: u32,
    /// The packet's length in bytes.
    pub(crate) length: u32,
    head: [u8; HEAD_BYTES],
}

impl Record {
    fn parse(bytes: &[u8; RECORD_BYTES]) -> Self {
        let number = |at: usize| {
            let mut number = [0; 4];
            number.copy_from_slice(&bytes[at..at + 4]);
            u32::from_ne_bytes(number)
        };
        let mut head = [0; HEAD_BYTES];
        head.copy_from_slice(&bytes[12..]);
        Self {
            hash: number(0),
            queue_mapping: number(4),
            length: number(8),
            head,
        }
    }

    /// The packet's first bytes.
    pub(crate) fn head(&self) -> &[u8] {
        let length = usize::try_from(self.length).unwrap_or(HEAD_BYTES);
        &self.head[..length.min(HEAD_BYTES)]
    }

    /// The receive queue, if the driver said.
    pub(crate) const fn queue(&self) -> Option<u32> {
        self.queue_mapping.checked_sub(1)
    }
}

/// The filter: notes each incoming packet in `queue`; keeps it only if there is no room.
fn filter(queue: &QueueMap<RECORD_BYTES>) -> Vec<Insn> {
    const CONTEXT: u8 = 6;
    const LENGTH: u8 = 7;
    const FRAME: u8 = 10;
    // The record lies at the end of the stack frame, its head at the end of that.
    let record = -i16::from(RECORD);
    let head = -i16::from(HEAD);
    let mut program = vec![
        Insn::copy(CONTEXT, 1),
        Insn::set(0, 0),
        Insn::load32(1, CONTEXT, skb::PKT_TYPE),
        Insn::skip_if_equal(1, PACKET_OUTGOING, 2),
        Insn::load32(LENGTH, CONTEXT, skb::LEN),
        Insn::skip_if_at_least(LENGTH, ETHERNET_BYTES, 1),
        Insn::exit(),
    ];
    for (offset, field) in [(0, skb::HASH), (4, skb::QUEUE_MAPPING), (8, skb::LEN)] {
        program.push(Insn::load32(1, CONTEXT, field));
        program.push(Insn::store32(FRAME, record + offset, 1));
    }
    // The verifier lets no byte of the record stay unwritten.
    program.extend(
        (head..0)
            .step_by(4)
            .map(|offset| Insn::clear32(FRAME, offset)),
    );
    program.extend([
        Insn::copy(4, LENGTH),
        Insn::skip_if_at_most(4, i32::from(HEAD), 1),
        Insn::set(4, i32::from(HEAD)),
        Insn::copy(1, CONTEXT),
        Insn::set(2, 0),
        Insn::copy(3, FRAME),
        Insn::add(3, i32::from(head)),
        Insn::call(HELPER_SKB_LOAD_BYTES),
    ]);
    program.extend(Insn::map(1, queue));
    program.extend([
        Insn::copy(2, FRAME),
        Insn::add(2, i32::from(record)),
        Insn::set(3, 0),
        Insn::call(HELPER_MAP_PUSH_ELEM),
        Insn::skip_if_equal(0, 0, 1),
        // Keep one byte: the socket counts it as a packet.
        Insn::set(0, 1),
        Insn::exit(),
    ]);
    program
}

/// A packet socket on one interface.
pub(crate) struct HashSocket {
    socket: OwnedFd,
    queue: QueueMap<RECORD_BYTES>,
}

impl HashSocket {
    /// Starts to note what comes in at `interface`.
    pub(crate) fn open(interface: &str) -> anyhow::Result<Self> {
        let name = CString::new(interface).context("the interface's name")?;
        // SAFETY: the name is a string that outlives the call.
        let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
        if index == 0 {
            bail!("no such interface: {}", io::Error::last_os_error());
        }
        let queue = QueueMap::new(QUEUE_RECORDS).context("making a queue for a filter")?;
        let filter = load_socket_filter(&filter(&queue)).context("loading a socket filter")?;
        // No protocol yet: packets shall not come before the filter is there.
        let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
        // SAFETY: no addresses are passed.
        let socket = unsafe { libc::socket(libc::AF_PACKET, kind, 0) };
        if socket < 0 {
            return Err(io::Error::last_os_error()).context("opening a packet socket");
        }
        // SAFETY: the kernel has just made it and gave it to nobody else.
        let socket = unsafe { OwnedFd::from_raw_fd(socket) };
        attach(&socket, &filter).context("attaching the socket filter")?;
        bind(&socket, index).context("binding the packet socket")?;
        Ok(Self { socket, queue })
    }

    /// The next packet that was noted, if there is any.
    pub(crate) fn next(&self) -> anyhow::Result<Option<Record>> {
        let record = self.queue.pop().context("reading the filter's queue")?;
        Ok(record.map(|bytes| Record::parse(&bytes)))
    }

    /// How many packets were not noted because the queue was full, since the last call.
    pub(crate) fn missed(&self) -> anyhow::Result<u32> {
        let mut counts = libc::tpacket_stats {
            tp_packets: 0,
            tp_drops: 0,
        };
        let mut len = libc::socklen_t::try_from(size_of_val(&counts))?;
        // SAFETY: the kernel writes at most `len` bytes, the size of the struct.
        let result = unsafe {
            libc::getsockopt(
                self.socket.as_raw_fd(),
                libc::SOL_PACKET,
                libc::PACKET_STATISTICS,
                (&raw mut counts).cast(),
                &raw mut len,
            )
        };
        if result < 0 {
            return Err(io::Error::last_os_error()).context("reading the socket's statistics");
        }
        // Dropped ones are among the packets.
        Ok(counts.tp_packets)
    }
}

fn attach(socket: &OwnedFd, filter: &OwnedFd) -> io::Result<()> {
    let filter: c_int = filter.as_raw_fd();
    let len = libc::socklen_t::try_from(size_of_val(&filter)).map_err(io::Error::other)?;
    // SAFETY: the kernel reads one int.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_BPF,
            (&raw const filter).cast(),
            len,
        )
    };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

fn bind(socket: &OwnedFd, index: u32) -> io::Result<()> {
    let number = |number: i32| u16::try_from(number).map_err(io::Error::other);
    let address = libc::sockaddr_ll {
        sll_family: number(libc::AF_PACKET)?,
        sll_protocol: number(libc::ETH_P_ALL)?.to_be(),
        sll_ifindex: i32::try_from(index).map_err(io::Error::other)?,
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 0,
        sll_addr: [0; 8],
    };
    let len = libc::socklen_t::try_from(size_of_val(&address)).map_err(io::Error::other)?;
    // SAFETY: the kernel reads `len` bytes of the address, the size of the struct.
    let result = unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), len) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}
