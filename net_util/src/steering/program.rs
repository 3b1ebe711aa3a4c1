//! The program: flow, hash and table, instruction by instruction.
//!
//! It sees the frame without the virtio-net header, from the Ethernet addresses on; a VLAN tag
//! may be beside the frame (`vlan_present`), which makes no difference to the flow. It follows
//! [`flow::parse`](crate::flow::parse) rule by rule, on the same first [`HEAD_BYTES`] bytes.
//!
//! Bytes of the frame come by `bpf_skb_load_bytes` to fixed places on the stack. Loops count down
//! in a register, so that the kernel's verifier sees them end. It goes through them once for each
//! set of bounds it can tell of a register, which takes it long: `Program::hide` makes it forget
//! them. Without CAP_PERFMON it would tell all states apart and give up after seconds, so it is asked
//! about a small program first ([`probe`]).
//!
//! | register | holds |
//! |---|---|
//! | R6 | the packet (`struct __sk_buff`) |
//! | R7 | how far the frame is parsed |
//! | R8 | where what may be parsed ends |
//! | R9 | a loop's count, or the slot |

use std::os::fd::BorrowedFd;

use super::asm::{Assembler, At, If, Instruction, Label, Op, Reg, Size};
use super::shared::{TABLE_ENTRIES, offset};
use crate::flow::{self, HEAD_BYTES};
use crate::hash::HashTypes;
use crate::toeplitz::MAX_INPUT_BYTES;

mod version_6;

use Reg::{R0, R1, R2, R3, R4, R6, R7, R8, R9, R10};
use Size::{Byte, Double, Half, Word};

// How far the program looks. What goes further has no use and goes to the queue for packets without
// a hash; with more of it the verifier would take longer than starting a VM does.

/// VLAN tags of a frame that a [`SteeringProgram`](super::SteeringProgram) skips.
pub const MAX_TAGS: i32 = 7;
/// Extension headers of an IPv6 packet that it follows.
pub const MAX_HEADERS: i32 = 8;
/// Options of one destination options header that it skips on the way to the home address: as many
/// as the 7 bytes of padding that may be before it, and one.
pub const MAX_OPTIONS: i32 = 8;

const _: () = assert!((MAX_TAGS + MAX_HEADERS).cast_unsigned() as usize <= flow::MAX_HEADERS);

/// Rows that instructions reach from one place, 32 KiB at most: half of them.
const HALF_OF_ROWS: usize = MAX_INPUT_BYTES / 2;

/// `bpf_skb_load_bytes` (uapi `linux/bpf.h`, `BPF_FUNC_*`).
const SKB_LOAD_BYTES: i32 = 26;

/// Of `struct __sk_buff`: bytes of the frame, and whether a VLAN tag is beside it.
const SKB_LEN: At = At {
    base: R6,
    offset: 0,
};
const SKB_VLAN_PRESENT: At = At {
    base: R6,
    offset: 20,
};

const VLAN_TAG_BYTES: i32 = 4;

/// Places on the stack.
mod stack {
    use super::{At, R10};

    const fn at(offset: i16) -> At {
        At { base: R10, offset }
    }

    /// What is hashed: addresses, then ports; 36 bytes.
    pub(super) const INPUT: At = at(-40);
    /// The ports of IPv6 in it.
    pub(super) const PORTS_V6: At = at(-8);
    /// The ports of IPv4 in it.
    pub(super) const PORTS_V4: At = at(-32);
    /// An IPv6 header, whose addresses are then in place.
    pub(super) const HEADER_V6: At = at(-48);
    /// An IPv4 header, whose addresses are then in place.
    pub(super) const HEADER_V4: At = at(-52);
    /// The addresses that the `_EX` types hash.
    pub(super) const EXTENDED: At = at(-88);
    /// The start of a header or option.
    pub(super) const START: At = at(-96);
    /// The slot's address.
    pub(super) const SLOT: At = at(-104);
    /// Zero, which the verifier does not know.
    pub(super) const ZERO: At = at(-160);
    /// The slot's sequence number.
    pub(super) const SEQUENCE: At = at(-112);
    /// Where the packet ends by its header, which may be behind what there is of it.
    pub(super) const DECLARED_END: At = at(-168);
    /// The number of the next header, a byte.
    pub(super) const NEXT: At = at(-120);
    /// Whether there is an extension header.
    pub(super) const HAS_EXTENSION: At = at(-128);
    /// Where the extension header ends.
    pub(super) const BEHIND: At = at(-136);
    /// R8 and R9 while options are looked through.
    pub(super) const KEPT_END: At = at(-144);
    pub(super) const KEPT_COUNT: At = at(-152);
}

impl At {
    /// `bytes` further.
    const fn plus(self, bytes: i16) -> Self {
        Self {
            base: self.base,
            offset: self.offset + bytes,
        }
    }
}

/// The program, for the map it is steered by; `None` if it has a defect.
pub(super) fn assemble(map: BorrowedFd<'_>) -> Option<Vec<Instruction>> {
    let mut asm = Assembler::default();
    let labels = Labels {
        unclassified: asm.label(),
        version_4: asm.label(),
        version_6: asm.label(),
        transport: asm.label(),
        choose: asm.label(),
        hash_v4: asm.label(),
        hash_v6: asm.label(),
        look_up: asm.label(),
    };
    let mut program = Program { asm, labels };
    program.start(map);
    program.ethernet();
    program.ip_version_4();
    program.ip_version_6();
    program.transport_v6();
    program.choose_v6();
    program.hash_and_look_up();
    program.asm.finish()
}

/// A program of which the verifier asks all that it asks of the real one: it reads the stack at a
/// place that depends on the packet, as only programs of who has CAP_PERFMON may.
pub(super) fn probe() -> Option<Vec<Instruction>> {
    let mut asm = Assembler::default();
    let at = |base| At { base, offset: -8 };
    asm.store(Double, at(R10), 0);
    asm.op(Op::Move, R6, R1);
    asm.load(Word, R1, SKB_LEN);
    asm.op(Op::And, R1, 7);
    asm.op(Op::Move, R2, R10);
    asm.op(Op::Add, R2, R1);
    asm.load(Byte, R0, at(R2));
    asm.exit();
    asm.finish()
}

/// Places that several parts jump to.
struct Labels {
    /// There is no hash, or no sure one.
    unclassified: Label,
    version_4: Label,
    version_6: Label,
    transport: Label,
    choose: Label,
    hash_v4: Label,
    hash_v6: Label,
    look_up: Label,
}

struct Program {
    asm: Assembler,
    labels: Labels,
}

impl Program {
    /// Finds the active slot and the end of the head.
    fn start(&mut self, map: BorrowedFd<'_>) {
        let asm = &mut self.asm;
        asm.op(Op::Move, R6, R1);
        asm.map_value(R9, map);
        asm.load(Double, R1, slot(offset::ZERO));
        asm.store(Double, stack::ZERO, R1);
        asm.load(Word, R1, slot(offset::ACTIVE));
        asm.op(Op::And, R1, 1);
        asm.op(Op::Mul, R1, offset::SLOT_BYTES);
        asm.op(Op::Add, R9, R1);
        asm.op(Op::Add, R9, offset::SLOTS);
        asm.store(Double, stack::SLOT, R9);
        asm.load(Word, R1, slot(offset::SEQUENCE));
        asm.store(Double, stack::SEQUENCE, R1);
        asm.jump_if(If::AnyBitOf, R1, 1, self.labels.unclassified);
        // Who reads the tap finds a tag that is beside the frame in it.
        let (no_tag, whole) = (asm.label(), asm.label());
        let head = i32::try_from(HEAD_BYTES).unwrap_or(0);
        asm.load(Word, R8, SKB_LEN);
        asm.load(Word, R1, SKB_VLAN_PRESENT);
        asm.op(Op::Move, R2, head);
        asm.jump_if(If::Equal, R1, 0, no_tag);
        asm.op(Op::Move, R2, head - VLAN_TAG_BYTES);
        asm.bind(no_tag);
        asm.jump_if(If::LessOrEqual, R8, R2, whole);
        asm.op(Op::Move, R8, R2);
        asm.bind(whole);
        self.hide(R8);
    }

    /// Skips VLAN tags.
    fn ethernet(&mut self) {
        let (next, tag) = (self.asm.label(), self.asm.label());
        self.asm.op(Op::Move, R7, 12);
        self.asm.op(Op::Move, R9, MAX_TAGS + 1);
        self.asm.bind(next);
        self.need(2, self.labels.unclassified);
        self.fetch(0, stack::START, 2);
        let asm = &mut self.asm;
        asm.load(Half, R1, stack::START);
        asm.network_to_host_16(R1);
        asm.op(Op::Add, R7, 2);
        asm.jump_if(
            If::Equal,
            R1,
            i32::from(flow::ETHERTYPE_IPV4),
            self.labels.version_4,
        );
        asm.jump_if(
            If::Equal,
            R1,
            i32::from(flow::ETHERTYPE_IPV6),
            self.labels.version_6,
        );
        for ethertype in [flow::ETHERTYPE_VLAN, flow::ETHERTYPE_QINQ] {
            asm.jump_if(If::Equal, R1, i32::from(ethertype), tag);
        }
        asm.jump(self.labels.unclassified);
        asm.bind(tag);
        asm.op(Op::Add, R7, 2);
        asm.op(Op::Sub, R9, 1);
        asm.jump_if(If::NotEqual, R9, 0, next);
        asm.jump(self.labels.unclassified);
    }

    /// Addresses and ports of an IPv4 packet, as far as the types that are on want them.
    fn ip_version_4(&mut self) {
        let unclassified = self.labels.unclassified;
        self.asm.bind(self.labels.version_4);
        self.need(20, unclassified);
        self.fetch(0, stack::HEADER_V4, 20);
        self.version(stack::HEADER_V4, 4);
        let asm = &mut self.asm;
        asm.load(Byte, R1, stack::HEADER_V4);
        asm.op(Op::And, R1, 0xf);
        asm.op(Op::ShiftLeft, R1, 2);
        asm.jump_if(If::Less, R1, 20, unclassified);
        // R1 becomes where the payload starts, R2 where it ends.
        asm.op(Op::Add, R1, R7);
        asm.jump_if(If::Greater, R1, R8, unclassified);
        asm.load(Half, R2, stack::HEADER_V4.plus(2));
        asm.network_to_host_16(R2);
        asm.op(Op::Add, R2, R7);
        asm.jump_if(If::Less, R2, R1, unclassified);
        asm.store(Double, stack::DECLARED_END, R2);
        asm.op(Op::Move, R7, R1);
        self.ports_v4();
    }

    fn ports_v4(&mut self) {
        let asm = &mut self.asm;
        let (tcp, ports, addresses) = (asm.label(), asm.label(), asm.label());
        asm.store(Word, stack::PORTS_V4, 0);
        asm.load(Half, R1, stack::HEADER_V4.plus(6));
        asm.network_to_host_16(R1);
        asm.op(Op::Move, R9, 0);
        asm.jump_if(If::AnyBitOf, R1, 0x3fff, addresses);
        asm.load(Byte, R1, stack::HEADER_V4.plus(9));
        asm.op(Op::Move, R9, bits(HashTypes::TCPV4));
        asm.jump_if(If::Equal, R1, i32::from(flow::PROTO_TCP), tcp);
        asm.op(Op::Move, R9, bits(HashTypes::UDPV4));
        asm.jump_if(If::Equal, R1, i32::from(flow::PROTO_UDP), ports);
        asm.op(Op::Move, R9, 0);
        asm.jump(addresses);
        asm.bind(tcp);
        asm.bind(ports);
        // A packet that ends before its ports has none.
        let none = asm.label();
        self.ports(stack::PORTS_V4, none);
        let asm = &mut self.asm;
        asm.jump(addresses);
        asm.bind(none);
        asm.op(Op::Move, R9, 0);

        // R9 has the type that hashes the ports, if there are any.
        asm.bind(addresses);
        asm.load(Double, R1, stack::SLOT);
        asm.load(Word, R1, types(R1));
        asm.op(Op::And, R9, R1);
        asm.jump_if(If::NotEqual, R9, 0, self.labels.hash_v4);
        asm.store(Word, stack::PORTS_V4, 0);
        asm.jump_if(If::AnyBitOf, R1, bits(HashTypes::IPV4), self.labels.hash_v4);
        asm.jump(self.labels.unclassified);
    }

    /// Hashes the input, and ends with the queue that the table has for it.
    fn hash_and_look_up(&mut self) {
        const V4_BYTES: usize = 12;
        self.asm.bind(self.labels.hash_v6);
        self.asm.load(Double, R9, stack::SLOT);
        self.asm.op(Op::Move, R0, 0);
        self.rows(0..HALF_OF_ROWS);
        let half = i32::try_from(HALF_OF_ROWS).unwrap_or(0);
        self.asm
            .op(Op::Add, R9, half * i32::from(offset::ROW_BYTES));
        self.rows(HALF_OF_ROWS..MAX_INPUT_BYTES);
        self.asm.jump(self.labels.look_up);

        self.asm.bind(self.labels.hash_v4);
        self.asm.load(Double, R9, stack::SLOT);
        self.asm.op(Op::Move, R0, 0);
        self.rows(0..V4_BYTES);

        let asm = &mut self.asm;
        asm.bind(self.labels.look_up);
        asm.load(Double, R9, stack::SLOT);
        asm.op(Op::And, R0, i32::try_from(TABLE_ENTRIES - 1).unwrap_or(0));
        asm.op(Op::ShiftLeft, R0, 1);
        asm.op(Op::Add, R0, R9);
        asm.load(
            Half,
            R0,
            At {
                base: R0,
                offset: offset::TABLE,
            },
        );
        // Whether the slot was the same all the time.
        asm.load(Word, R1, slot(offset::SEQUENCE));
        asm.load(Double, R2, stack::SEQUENCE);
        asm.jump_if(If::NotEqual, R1, R2, self.labels.unclassified);
        asm.exit();

        asm.bind(self.labels.unclassified);
        asm.load(Double, R9, stack::SLOT);
        asm.load(Half, R0, slot(offset::UNCLASSIFIED));
        asm.exit();
    }

    /// XORs into R0 what the input's bytes have in their rows, of which the first half is counted
    /// from R9 and the rest from the second half's start.
    fn rows(&mut self, bytes: std::ops::Range<usize>) {
        let asm = &mut self.asm;
        for byte in bytes {
            let place = i16::try_from(byte).unwrap_or(0);
            let row = i16::try_from(byte % HALF_OF_ROWS).unwrap_or(0);
            asm.load(Byte, R1, stack::INPUT.plus(place));
            asm.op(Op::ShiftLeft, R1, 2);
            asm.op(Op::Add, R1, R9);
            let share = At {
                base: R1,
                offset: offset::ROWS + row * offset::ROW_BYTES,
            };
            asm.load(Word, R1, share);
            asm.op(Op::Xor, R0, R1);
        }
    }

    /// Makes the verifier forget what it knows of a number. Changes R3.
    fn hide(&mut self, number: Reg) {
        self.asm.load(Double, R3, stack::ZERO);
        self.asm.op(Op::Xor, number, R3);
    }

    /// Goes on if `bytes` more may be parsed, and to `otherwise` if not. Changes R1.
    fn need(&mut self, bytes: i32, otherwise: Label) {
        self.asm.op(Op::Move, R1, R7);
        self.asm.op(Op::Add, R1, bytes);
        self.asm.jump_if(If::Greater, R1, R8, otherwise);
    }

    /// Fetches ports. Goes to `none` if the packet ends before them by its header; if they are only
    /// cut off there is no telling what they are. Changes R0 to R5.
    fn ports(&mut self, to: At, none: Label) {
        self.asm.op(Op::Move, R1, R7);
        self.asm.op(Op::Add, R1, 4);
        self.asm.load(Double, R2, stack::DECLARED_END);
        self.asm.jump_if(If::Greater, R1, R2, none);
        self.need(4, self.labels.unclassified);
        self.fetch(0, to, 4);
    }

    /// Copies bytes of the frame from `ahead` of R7 on. Changes R0 to R5.
    fn fetch(&mut self, ahead: i32, to: At, bytes: i32) {
        let asm = &mut self.asm;
        asm.op(Op::Move, R1, R6);
        asm.op(Op::Move, R2, R7);
        asm.op(Op::Add, R2, ahead);
        asm.op(Op::Move, R3, to.base);
        asm.op(Op::Add, R3, i32::from(to.offset));
        asm.op(Op::Move, R4, bytes);
        asm.call(SKB_LOAD_BYTES);
        asm.jump_if(If::NotEqual, R0, 0, self.labels.unclassified);
    }

    /// Goes on if the IP header is of `version`. Changes R1.
    fn version(&mut self, header: At, version: i32) {
        self.asm.load(Byte, R1, header);
        self.asm.op(Op::ShiftRight, R1, 4);
        self.asm
            .jump_if(If::NotEqual, R1, version, self.labels.unclassified);
    }
}

/// What is at `offset` of the slot in R9.
const fn slot(offset: i16) -> At {
    At { base: R9, offset }
}

/// The types that are on, in the slot whose address is in `slot`.
const fn types(slot: Reg) -> At {
    At {
        base: slot,
        offset: offset::TYPES,
    }
}

/// The bits of `types` as a number in an instruction.
fn bits(types: HashTypes) -> i32 {
    types.bits().cast_signed()
}
