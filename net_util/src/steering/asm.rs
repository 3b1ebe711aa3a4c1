//! An assembler for the kernel's eBPF, as far as the steering program needs one.
//!
//! Encoding: `Documentation/bpf/standardization/instruction-set.rst` of Linux; constants of uapi
//! `linux/bpf.h` and `linux/bpf_common.h`.

use std::os::fd::{AsRawFd, BorrowedFd};

/// A register: 0 has results, 1 to 5 arguments (lost in a call), 6 to 9 are kept, 10 is the
/// frame's end.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub(super) enum Reg {
    R0,
    R1,
    R2,
    R3,
    R4,
    R6 = 6,
    R7,
    R8,
    R9,
    R10,
}

/// How much a load or store moves.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub(super) enum Size {
    Byte = 0x10,
    Half = 0x08,
    Word = 0x00,
    Double = 0x18,
}

/// A 64-bit operation on a register.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub(super) enum Op {
    Add = 0x00,
    Sub = 0x10,
    Mul = 0x20,
    And = 0x50,
    ShiftLeft = 0x60,
    ShiftRight = 0x70,
    Xor = 0xa0,
    Move = 0xb0,
}

/// When a jump is taken; comparisons are unsigned and of 64 bits.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub(super) enum If {
    Equal = 0x10,
    Greater = 0x20,
    GreaterOrEqual = 0x30,
    AnyBitOf = 0x40,
    NotEqual = 0x50,
    Less = 0xa0,
    LessOrEqual = 0xb0,
}

/// The second operand: a register, or a number that is sign-extended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Operand {
    Reg(Reg),
    Number(i32),
}

impl From<Reg> for Operand {
    fn from(reg: Reg) -> Self {
        Self::Reg(reg)
    }
}

impl From<i32> for Operand {
    fn from(number: i32) -> Self {
        Self::Number(number)
    }
}

/// What is at `base` plus `offset` bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct At {
    pub(super) base: Reg,
    pub(super) offset: i16,
}

/// `struct bpf_insn`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(C)]
pub(super) struct Instruction {
    code: u8,
    /// Destination in the lower half, source in the upper (on little-endian machines).
    registers: u8,
    offset: i16,
    number: i32,
}

/// A place in the program, to which jumps go before or after it is [bound](Assembler::bind).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Label(usize);

/// The program so far.
#[derive(Default)]
pub(super) struct Assembler {
    instructions: Vec<Instruction>,
    /// Where each label is, once bound.
    labels: Vec<Option<usize>>,
    /// Jumps whose distance is to be filled in.
    jumps: Vec<(usize, Label)>,
}

impl Assembler {
    pub(super) fn label(&mut self) -> Label {
        self.labels.push(None);
        Label(self.labels.len() - 1)
    }

    /// `label` is what comes next.
    pub(super) fn bind(&mut self, label: Label) {
        if let Some(place) = self.labels.get_mut(label.0) {
            *place = Some(self.instructions.len());
        }
    }

    pub(super) fn op(&mut self, op: Op, to: Reg, operand: impl Into<Operand>) {
        self.binary(0x07 | op as u8, to, operand.into(), 0);
    }

    /// Makes a number of 16 bits of the network's order one of the machine's.
    pub(super) fn network_to_host_16(&mut self, reg: Reg) {
        self.push(0xdc, reg, 0, 0, 16);
    }

    pub(super) fn load(&mut self, size: Size, to: Reg, from: At) {
        self.push(0x61 | size as u8, to, from.base as u8, from.offset, 0);
    }

    pub(super) fn store(&mut self, size: Size, to: At, from: impl Into<Operand>) {
        match from.into() {
            Operand::Reg(from) => {
                self.push(0x63 | size as u8, to.base, from as u8, to.offset, 0);
            }
            Operand::Number(number) => self.push(0x62 | size as u8, to.base, 0, to.offset, number),
        }
    }

    pub(super) fn jump(&mut self, to: Label) {
        self.jumps.push((self.instructions.len(), to));
        self.push(0x05, Reg::R0, 0, 0, 0);
    }

    pub(super) fn jump_if(&mut self, when: If, left: Reg, right: impl Into<Operand>, to: Label) {
        self.jumps.push((self.instructions.len(), to));
        self.binary(0x05 | when as u8, left, right.into(), 0);
    }

    /// The address of the value in the array map `map`, which has one.
    pub(super) fn map_value(&mut self, to: Reg, map: BorrowedFd<'_>) {
        const BPF_PSEUDO_MAP_VALUE: u8 = 2;
        self.push(0x18, to, BPF_PSEUDO_MAP_VALUE, 0, map.as_raw_fd());
        // The upper half of the number: the offset in the value.
        self.push(0, Reg::R0, 0, 0, 0);
    }

    /// Calls a function of the kernel by its number (`BPF_FUNC_*`).
    pub(super) fn call(&mut self, function: i32) {
        self.push(0x85, Reg::R0, 0, 0, function);
    }

    pub(super) fn exit(&mut self) {
        self.push(0x95, Reg::R0, 0, 0, 0);
    }

    /// The program; `None` if a jump goes nowhere or too far.
    pub(super) fn finish(mut self) -> Option<Vec<Instruction>> {
        for (from, label) in self.jumps {
            let to = self.labels.get(label.0).copied().flatten()?;
            // Counted from the instruction behind the jump.
            let distance = i64::try_from(to).ok()? - i64::try_from(from).ok()? - 1;
            self.instructions.get_mut(from)?.offset = i16::try_from(distance).ok()?;
        }
        Some(self.instructions)
    }

    fn binary(&mut self, code: u8, left: Reg, right: Operand, offset: i16) {
        match right {
            Operand::Reg(right) => self.push(code | 0x08, left, right as u8, offset, 0),
            Operand::Number(number) => self.push(code, left, 0, offset, number),
        }
    }

    fn push(&mut self, code: u8, to: Reg, from: u8, offset: i16, number: i32) {
        self.instructions.push(Instruction {
            code,
            registers: from << 4 | to as u8,
            offset,
            number,
        });
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    fn bytes(program: &[Instruction]) -> Vec<[u8; 8]> {
        let bytes = |i: &Instruction| {
            let [o0, o1] = i.offset.to_le_bytes();
            let [n0, n1, n2, n3] = i.number.to_le_bytes();
            [i.code, i.registers, o0, o1, n0, n1, n2, n3]
        };
        program.iter().map(bytes).collect()
    }

    #[test]
    fn instructions_are_encoded_as_the_kernel_reads_them() {
        assert_eq!(size_of::<Instruction>(), 8);
        let mut asm = Assembler::default();
        let at = |base, offset| At { base, offset };
        asm.op(Op::Move, Reg::R6, Reg::R1);
        asm.op(Op::And, Reg::R1, 15);
        asm.op(Op::Sub, Reg::R9, 1);
        asm.op(Op::Xor, Reg::R0, Reg::R1);
        asm.network_to_host_16(Reg::R2);
        asm.load(Size::Half, Reg::R1, at(Reg::R10, -40));
        asm.load(Size::Word, Reg::R8, at(Reg::R6, 20));
        asm.store(Size::Double, at(Reg::R10, -8), Reg::R9);
        asm.store(Size::Byte, at(Reg::R10, -9), 7);
        asm.call(26);
        asm.exit();
        let expected = [
            [0xbf, 0x16, 0, 0, 0, 0, 0, 0],
            [0x57, 0x01, 0, 0, 15, 0, 0, 0],
            [0x17, 0x09, 0, 0, 1, 0, 0, 0],
            [0xaf, 0x10, 0, 0, 0, 0, 0, 0],
            [0xdc, 0x02, 0, 0, 16, 0, 0, 0],
            [0x69, 0xa1, 0xd8, 0xff, 0, 0, 0, 0],
            [0x61, 0x68, 20, 0, 0, 0, 0, 0],
            [0x7b, 0x9a, 0xf8, 0xff, 0, 0, 0, 0],
            [0x72, 0x0a, 0xf7, 0xff, 7, 0, 0, 0],
            [0x85, 0, 0, 0, 26, 0, 0, 0],
            [0x95, 0, 0, 0, 0, 0, 0, 0],
        ];
        assert_eq!(bytes(&asm.finish().unwrap()), expected);
    }

    #[test]
    fn jumps_are_counted_from_the_next_instruction() {
        let mut asm = Assembler::default();
        let (back, ahead) = (asm.label(), asm.label());
        asm.bind(back);
        asm.jump_if(If::NotEqual, Reg::R1, 6, ahead);
        asm.jump_if(If::LessOrEqual, Reg::R7, Reg::R8, back);
        asm.jump(ahead);
        asm.exit();
        asm.bind(ahead);
        asm.exit();
        let expected = [
            [0x55, 0x01, 3, 0, 6, 0, 0, 0],
            [0xbd, 0x87, 0xfe, 0xff, 0, 0, 0, 0],
            [0x05, 0, 1, 0, 0, 0, 0, 0],
            [0x95, 0, 0, 0, 0, 0, 0, 0],
            [0x95, 0, 0, 0, 0, 0, 0, 0],
        ];
        assert_eq!(bytes(&asm.finish().unwrap()), expected);
    }

    #[test]
    fn a_map_is_named_by_its_descriptor() {
        let file = std::io::stdin();
        let mut asm = Assembler::default();
        asm.map_value(Reg::R9, file.as_fd());
        let expected = [[0x18, 0x29, 0, 0, 0, 0, 0, 0], [0; 8]];
        assert_eq!(bytes(&asm.finish().unwrap()), expected);
    }

    #[test]
    fn jumps_to_nowhere_are_no_program() {
        let mut asm = Assembler::default();
        let nowhere = asm.label();
        asm.jump(nowhere);
        assert_eq!(asm.finish(), None);
        let mut asm = Assembler::default();
        let far = asm.label();
        asm.jump(far);
        for _ in 0..40_000 {
            asm.exit();
        }
        asm.bind(far);
        assert_eq!(asm.finish(), None);
    }
}
