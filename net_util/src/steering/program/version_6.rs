//! IPv6: addresses, extension headers, transport.

use super::Reg::{R1, R2, R3, R7, R8, R9};
use super::Size::{Byte, Double, Half, Word};
use super::{MAX_HEADERS, MAX_OPTIONS, Program, bits, stack, types};
use crate::flow;
use crate::hash::HashTypes;
use crate::steering::asm::{At, If, Label, Op};

const ADDRESS_BYTES: i32 = 16;

impl Program {
    /// Addresses of an IPv6 packet, and its chain of extension headers.
    pub(super) fn ip_version_6(&mut self) {
        self.asm.bind(self.labels.version_6);
        self.need(40, self.labels.unclassified);
        self.fetch(0, stack::HEADER_V6, 40);
        self.version(stack::HEADER_V6, 6);
        self.copy_addresses(stack::INPUT, stack::EXTENDED);
        let asm = &mut self.asm;
        let sized = asm.label();
        asm.op(Op::Add, R7, 40);
        asm.load(Half, R1, stack::HEADER_V6.plus(4));
        asm.network_to_host_16(R1);
        asm.op(Op::Add, R1, R7);
        asm.store(Double, stack::DECLARED_END, R1);
        asm.jump_if(If::GreaterOrEqual, R1, R8, sized);
        asm.op(Op::Move, R8, R1);
        asm.bind(sized);
        asm.store(Word, stack::PORTS_V6, 0);
        asm.store(Double, stack::HAS_EXTENSION, 0);
        asm.load(Byte, R1, stack::HEADER_V6.plus(6));
        asm.store(Byte, stack::NEXT, R1);
        self.extension_headers();
    }

    fn extension_headers(&mut self) {
        let unclassified = self.labels.unclassified;
        let asm = &mut self.asm;
        let (next, header, sized) = (asm.label(), asm.label(), asm.label());
        let (authentication, options) = (asm.label(), asm.label());
        let (routing, done) = (asm.label(), asm.label());
        asm.op(Op::Move, R9, MAX_HEADERS + 1);
        asm.bind(next);
        self.hide(R7);
        self.asm.load(Byte, R1, stack::NEXT);
        self.hide(R1);
        let asm = &mut self.asm;
        for extension in (0..=u8::MAX).filter(|next| flow::is_extension(*next)) {
            asm.jump_if(If::Equal, R1, i32::from(extension), header);
        }
        asm.jump(self.labels.transport);

        asm.bind(header);
        asm.op(Op::Sub, R9, 1);
        asm.jump_if(If::Equal, R9, 0, unclassified);
        self.need(8, unclassified);
        self.fetch(0, stack::START, 8);
        let asm = &mut self.asm;
        asm.store(Double, stack::HAS_EXTENSION, 1);
        asm.load(Byte, R1, stack::NEXT);
        asm.load(Byte, R2, stack::START);
        asm.store(Byte, stack::NEXT, R2);
        self.hide(R1);
        let asm = &mut self.asm;
        let closed = asm.label();
        asm.jump_if(If::Equal, R1, i32::from(flow::PROTO_FRAGMENT), closed);
        asm.jump_if(If::Equal, R1, i32::from(flow::PROTO_ENCRYPTED), closed);
        asm.load(Byte, R2, stack::START.plus(1));
        asm.jump_if(
            If::Equal,
            R1,
            i32::from(flow::PROTO_AUTHENTICATION),
            authentication,
        );
        asm.op(Op::Add, R2, 1);
        asm.op(Op::ShiftLeft, R2, 3);
        asm.jump(sized);
        asm.bind(authentication);
        asm.op(Op::Add, R2, 2);
        asm.op(Op::ShiftLeft, R2, 2);
        asm.bind(sized);
        asm.op(Op::Add, R2, R7);
        asm.jump_if(If::Greater, R2, R8, unclassified);
        asm.store(Double, stack::BEHIND, R2);
        asm.jump_if(If::Equal, R1, i32::from(flow::PROTO_DESTINATION), options);
        asm.jump_if(If::Equal, R1, i32::from(flow::PROTO_ROUTING), routing);

        asm.bind(done);
        asm.load(Double, R7, stack::BEHIND);
        asm.jump(next);
        // Behind these nothing can be read: R9 has no types of hash with ports.
        asm.bind(closed);
        asm.op(Op::Move, R9, 0);
        asm.jump(self.labels.choose);
        self.routing_header(routing, done);
        self.destination_options(options, done);
    }

    /// Takes the address in a routing header of type 2 with one segment left.
    fn routing_header(&mut self, start: Label, done: Label) {
        let asm = &mut self.asm;
        asm.bind(start);
        for (place, expected) in [(1, 2), (2, 2), (3, 1)] {
            asm.load(Byte, R1, stack::START.plus(place));
            asm.jump_if(If::NotEqual, R1, expected, done);
        }
        self.fetch(8, stack::EXTENDED.plus(16), ADDRESS_BYTES);
        self.asm.jump(done);
    }

    /// Takes the first home address among destination options.
    fn destination_options(&mut self, start: Label, done: Label) {
        let unclassified = self.labels.unclassified;
        let asm = &mut self.asm;
        let (next, counted, last) = (asm.label(), asm.label(), asm.label());
        let (long, skip, end) = (asm.label(), asm.label(), asm.label());
        asm.bind(start);
        asm.store(Double, stack::KEPT_END, R8);
        asm.store(Double, stack::KEPT_COUNT, R9);
        asm.load(Double, R8, stack::BEHIND);
        self.hide(R8);
        let asm = &mut self.asm;
        asm.op(Op::Add, R7, 2);
        asm.op(Op::Move, R9, MAX_OPTIONS + 1);

        asm.bind(next);
        self.hide(R7);
        self.asm.jump_if(If::GreaterOrEqual, R7, R8, end);
        self.need(2, last);
        self.fetch(0, stack::START, 2);
        let asm = &mut self.asm;
        asm.load(Byte, R1, stack::START);
        asm.jump_if(If::NotEqual, R1, 0, long);
        // One byte of padding, the only option without a length.
        asm.op(Op::Add, R7, 1);
        asm.jump(counted);
        asm.bind(long);
        asm.op(Op::Add, R7, 2);
        asm.load(Byte, R2, stack::START.plus(1));
        asm.op(Op::Move, R3, R7);
        asm.op(Op::Add, R3, R2);
        asm.jump_if(If::Greater, R3, R8, unclassified);
        asm.jump_if(If::NotEqual, R1, i32::from(flow::OPTION_HOME_ADDRESS), skip);
        asm.jump_if(If::NotEqual, R2, ADDRESS_BYTES, skip);
        self.fetch(0, stack::EXTENDED, ADDRESS_BYTES);
        let asm = &mut self.asm;
        asm.jump(end);
        asm.bind(skip);
        asm.op(Op::Move, R7, R3);
        asm.bind(counted);
        asm.op(Op::Sub, R9, 1);
        asm.jump_if(If::NotEqual, R9, 0, next);
        asm.jump(unclassified);

        // Only that padding has room in a single byte.
        asm.bind(last);
        self.fetch(0, stack::START, 1);
        let asm = &mut self.asm;
        asm.load(Byte, R1, stack::START);
        asm.jump_if(If::NotEqual, R1, 0, unclassified);
        asm.bind(end);
        asm.load(Double, R8, stack::KEPT_END);
        asm.load(Double, R9, stack::KEPT_COUNT);
        asm.jump(done);
    }

    /// Fetches the ports of an IPv6 packet, and puts into R9 the types that hash them.
    pub(super) fn transport_v6(&mut self) {
        let choose = self.labels.choose;
        let asm = &mut self.asm;
        let (tcp, ports, none) = (asm.label(), asm.label(), asm.label());
        asm.bind(self.labels.transport);
        asm.op(Op::Move, R9, bits(HashTypes::TCPV6 | HashTypes::TCP_EX));
        asm.jump_if(If::Equal, R1, i32::from(flow::PROTO_TCP), tcp);
        asm.op(Op::Move, R9, bits(HashTypes::UDPV6 | HashTypes::UDP_EX));
        asm.jump_if(If::Equal, R1, i32::from(flow::PROTO_UDP), ports);
        asm.bind(none);
        asm.op(Op::Move, R9, 0);
        asm.jump(choose);
        asm.bind(tcp);
        asm.bind(ports);
        self.ports(stack::PORTS_V6, none);
    }

    /// Chooses among the types that are on, those of extension headers first.
    pub(super) fn choose_v6(&mut self) {
        let asm = &mut self.asm;
        let (plain, extended) = (asm.label(), asm.label());
        asm.bind(self.labels.choose);
        asm.load(Double, R1, stack::SLOT);
        asm.load(Word, R1, types(R1));
        asm.op(Op::And, R9, R1);
        asm.load(Double, R2, stack::HAS_EXTENSION);
        asm.jump_if(If::Equal, R2, 0, plain);
        let with_ports = HashTypes::TCP_EX | HashTypes::UDP_EX;
        asm.jump_if(If::AnyBitOf, R9, bits(with_ports), extended);
        let no_ports = asm.label();
        asm.jump_if(If::AnyBitOf, R1, bits(HashTypes::IP_EX), no_ports);

        asm.bind(plain);
        let with_ports = HashTypes::TCPV6 | HashTypes::UDPV6;
        asm.jump_if(If::AnyBitOf, R9, bits(with_ports), self.labels.hash_v6);
        asm.store(Word, stack::PORTS_V6, 0);
        asm.jump_if(If::AnyBitOf, R1, bits(HashTypes::IPV6), self.labels.hash_v6);
        asm.jump(self.labels.unclassified);

        asm.bind(no_ports);
        asm.store(Word, stack::PORTS_V6, 0);
        asm.bind(extended);
        self.copy_addresses(stack::EXTENDED, stack::INPUT);
        self.asm.jump(self.labels.hash_v6);
    }

    /// Copies two IPv6 addresses. Changes R1.
    fn copy_addresses(&mut self, from: At, to: At) {
        for place in [0, 8, 16, 24] {
            self.asm.load(Double, R1, from.plus(place));
            self.asm.store(Double, to.plus(place), R1);
        }
    }
}
