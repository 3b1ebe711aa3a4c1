//! A packet socket whose filter notes the hash of each packet that comes in.

use std::ffi::{CString, c_int};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use anyhow::{Context, bail};

use super::bpf::{HELPER_MAP_PUSH_ELEM, HELPER_SKB_LOAD_BYTES, Insn, ProgramKind, QueueMap, load};
use super::record::{HEAD, RECORD, RECORD_BYTES, Record, field};

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

/// The filter: notes each incoming packet in `queue`; keeps it only if there is no room.
fn filter(queue: &QueueMap<RECORD_BYTES>) -> Vec<Insn> {
    const CONTEXT: u8 = 6;
    const LENGTH: u8 = 7;
    const FRAME: u8 = 10;
    let (record, head) = (-RECORD, -HEAD);
    let mut program = vec![
        Insn::copy(CONTEXT, 1),
        Insn::set(0, 0),
        Insn::load32(1, CONTEXT, skb::PKT_TYPE),
        Insn::skip_if_equal(1, PACKET_OUTGOING, 2),
        Insn::load32(LENGTH, CONTEXT, skb::LEN),
        Insn::skip_if_at_least(LENGTH, ETHERNET_BYTES, 1),
        Insn::exit(),
    ];
    // The verifier lets no byte of the record stay unwritten.
    let all = (record..0).step_by(4);
    program.extend(all.map(|offset| Insn::put32(FRAME, offset, 0)));
    for (offset, of_skb) in [
        (field::HASH, skb::HASH),
        (field::QUEUE_MAPPING, skb::QUEUE_MAPPING),
        (field::LENGTH, skb::LEN),
    ] {
        program.push(Insn::load32(1, CONTEXT, of_skb));
        program.push(Insn::store32(FRAME, record + offset, 1));
    }
    program.extend([
        Insn::copy(4, LENGTH),
        Insn::skip_if_at_most(4, HEAD.into(), 1),
        Insn::set(4, HEAD.into()),
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
    /// Starts to note what comes in at `interface`, up to `room` packets before they are asked for.
    pub(crate) fn open(interface: &str, room: u32) -> anyhow::Result<Self> {
        let index = index_of(interface)?;
        let queue = QueueMap::new(room).context("making a queue for a filter")?;
        let filter = load(ProgramKind::SocketFilter, &filter(&queue));
        let filter = filter.context("loading a socket filter")?;
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

/// The number of an interface.
pub(super) fn index_of(interface: &str) -> anyhow::Result<u32> {
    let name = CString::new(interface).context("the interface's name")?;
    // SAFETY: the name is a string that outlives the call.
    let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
    if index == 0 {
        bail!("no such interface: {}", io::Error::last_os_error());
    }
    Ok(index)
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
