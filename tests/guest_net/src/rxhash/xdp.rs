//! An XDP program that notes the header of each packet: hash and report, as the device wrote them.
//!
//! A driver that has XDP run gives programs a packet that lies in the very buffer that the device filled, behind
//! the header. So the program moves the packet's start back over the header and reads it. Only what is
//! behind a header of 20 bytes makes sense here: `VIRTIO_NET_F_HASH_REPORT` must have been negotiated.

use std::os::fd::OwnedFd;

use anyhow::Context;

use super::bpf::{
    HELPER_MAP_PUSH_ELEM, HELPER_XDP_ADJUST_HEAD, HELPER_XDP_GET_BUFF_LEN, HELPER_XDP_LOAD_BYTES,
    Insn, ProgramKind, QueueMap, attach_xdp, load,
};
use super::filter::index_of;
use super::record::{HEAD, RECORD, RECORD_BYTES, Record, field};

/// Bytes of the header: `struct virtio_net_hdr_v1_hash` (uapi `linux/virtio_net.h`).
const HEADER: i16 = 20;
/// Where its hash and its report are.
const HASH_AT: i16 = 12;
const REPORT_AT: i16 = 16;
/// Bytes of an Ethernet header.
const ETHERNET_BYTES: i32 = 14;
/// The queue's number in `struct xdp_md` (uapi `linux/bpf.h`).
const RX_QUEUE_INDEX: i16 = 16;

// `enum xdp_action`.
const XDP_ABORTED: i32 = 0;
const XDP_DROP: i32 = 1;
const XDP_PASS: i32 = 2;

/// The program: notes each packet in `queue`, drops those of [`test_packets`] and passes the others on.
fn program(queue: &QueueMap<RECORD_BYTES>) -> Vec<Insn> {
    const CONTEXT: u8 = 6;
    const LENGTH: u8 = 7;
    const FRAME: u8 = 10;
    let (record, head) = (-RECORD, -HEAD);
    let header = record - HEADER;
    // The bytes of a frame's source address that say that it is one of the test's; at an even address.
    let mark = head + 6;
    let mut program = vec![
        Insn::copy(CONTEXT, 1),
        Insn::set(2, -i32::from(HEADER)),
        Insn::call(HELPER_XDP_ADJUST_HEAD),
        Insn::skip_if_equal(0, 0, 2),
        Insn::set(0, XDP_ABORTED),
        Insn::exit(),
        Insn::copy(1, CONTEXT),
        Insn::call(HELPER_XDP_GET_BUFF_LEN),
        Insn::copy(LENGTH, 0),
        Insn::add(LENGTH, -i32::from(HEADER)),
        Insn::skip_if_at_least(LENGTH, ETHERNET_BYTES, 2),
        Insn::set(0, XDP_ABORTED),
        Insn::exit(),
    ];
    let all = (header..0).step_by(4);
    program.extend(all.map(|offset| Insn::put32(FRAME, offset, 0)));
    program.extend(load_bytes(CONTEXT, 0, header, Insn::set(4, HEADER.into())));
    program.extend([
        Insn::load32(1, FRAME, header + HASH_AT),
        Insn::store32(FRAME, record + field::HASH, 1),
        Insn::load16(1, FRAME, header + REPORT_AT),
        Insn::store32(FRAME, record + field::REPORT, 1),
        Insn::store32(FRAME, record + field::LENGTH, LENGTH),
        Insn::load32(1, CONTEXT, RX_QUEUE_INDEX),
        Insn::add(1, 1),
        Insn::store32(FRAME, record + field::QUEUE_MAPPING, 1),
        Insn::skip_if_at_most(LENGTH, HEAD.into(), 1),
        Insn::set(LENGTH, HEAD.into()),
    ]);
    program.extend(load_bytes(
        CONTEXT,
        HEADER.into(),
        head,
        Insn::copy(4, LENGTH),
    ));
    program.extend(Insn::map(1, queue));
    program.extend([
        Insn::copy(2, FRAME),
        Insn::add(2, record.into()),
        Insn::set(3, 0),
        Insn::call(HELPER_MAP_PUSH_ELEM),
        Insn::load16(1, FRAME, mark),
        Insn::set(0, XDP_DROP),
        // In memory's order, as it was loaded.
        Insn::skip_if_equal(1, u16::from_ne_bytes([0x02, 0xfe]).into(), 4),
        Insn::copy(1, CONTEXT),
        Insn::set(2, HEADER.into()),
        Insn::call(HELPER_XDP_ADJUST_HEAD),
        Insn::set(0, XDP_PASS),
        Insn::exit(),
    ]);
    program
}

/// Copies so many bytes as `length` puts into register 4, from `offset` of the packet to `to` of the stack.
fn load_bytes(context: u8, offset: i32, to: i16, length: Insn) -> [Insn; 6] {
    [
        Insn::copy(1, context),
        Insn::set(2, offset),
        Insn::copy(3, 10),
        Insn::add(3, to.into()),
        length,
        Insn::call(HELPER_XDP_LOAD_BYTES),
    ]
}

/// The program on an interface, for as long as this lives.
pub(crate) struct HeaderProgram {
    queue: QueueMap<RECORD_BYTES>,
    _link: OwnedFd,
}

impl HeaderProgram {
    /// Starts to note what comes in at `interface`, up to `room` packets before they are asked for.
    pub(crate) fn open(interface: &str, room: u32) -> anyhow::Result<Self> {
        let index = index_of(interface)?;
        let queue = QueueMap::new(room).context("making a queue for a program")?;
        let program = load(ProgramKind::Xdp, &program(&queue)).context("loading an XDP program")?;
        let link = attach_xdp(&program, index).context("attaching the XDP program")?;
        Ok(Self { queue, _link: link })
    }

    /// The next packet that was noted, if there is any.
    pub(crate) fn next(&self) -> anyhow::Result<Option<Record>> {
        let record = self.queue.pop().context("reading the program's queue")?;
        Ok(record.map(|bytes| Record::parse(&bytes)))
    }
}
