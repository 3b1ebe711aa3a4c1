//! What a tap's kernel is told to hash, read back as the patches to `tun.c` read it, and any answer
//! to the question what it can hash.

#![no_main]

use arbitrary::{Arbitrary, Unstructured};
use libfuzzer_sys::fuzz_target;
use net_util::hash::{HashKey, HashTypes};
use net_util::tap::{HashAbi, KernelRss, VnetHashArgument};

#[derive(Debug, Arbitrary)]
struct Input {
    cap: [u8; 8],
    types: u32,
    flags: u16,
    unclassified: u16,
    key: ([u8; 32], [u8; 8]),
    table: Vec<u16>,
    /// Cuts the table to this power of two, so that lengths are right often enough.
    power: Option<u8>,
}

/// A reader like the kernel's `copy_from_user`: it goes where the argument says.
struct Kernel<'a>(&'a [u8]);

impl Kernel<'_> {
    fn bytes(&mut self, len: usize) -> Vec<u8> {
        let (head, rest) = self.0.split_at_checked(len).expect("a read past the end");
        self.0 = rest;
        head.to_vec()
    }

    fn u16(&mut self) -> u16 {
        u16::from_ne_bytes(self.bytes(2).try_into().expect("two bytes"))
    }

    fn u32(&mut self) -> u32 {
        u32::from_ne_bytes(self.bytes(4).try_into().expect("four bytes"))
    }

    /// Mask, unclassified queue, table and key.
    fn rss(&mut self, input: &Input, key: &HashKey) {
        let mask = self.u16();
        assert!((u32::from(mask) + 1).is_power_of_two() && mask < 128);
        assert_eq!(self.u16(), input.unclassified);
        let table: Vec<_> = (0..=mask).map(|_| self.u16()).collect();
        assert_eq!(table, input.table);
        assert_eq!(self.bytes(40), key.as_bytes());
        assert!(self.0.iter().all(|byte| *byte == 0));
    }
}

fn answers(input: &Input) {
    let known = 0x1ff;
    match HashAbi::from_cap(input.cap) {
        HashAbi::None => {}
        HashAbi::RfcV5 { types, .. } => assert!(types.bits() & !known == 0 && !types.is_empty()),
        other @ HashAbi::V12 { .. } => panic!("{other:?}"),
    }
    match HashAbi::from_types(input.types) {
        HashAbi::None => {}
        HashAbi::V12 { types } => assert_eq!(types.bits(), input.types & known),
        other @ HashAbi::RfcV5 { .. } => panic!("{other:?}"),
    }
}

fuzz_target!(|bytes: &[u8]| {
    let Ok(mut input) = Input::arbitrary(&mut Unstructured::new(bytes)) else {
        return;
    };
    answers(&input);
    if let Some(power) = input.power {
        input.table.resize(1 << (power % 10), input.unclassified);
    }
    let entries = input.table.len();
    let sound = entries.is_power_of_two() && entries <= 128;
    let rss = KernelRss {
        table: &input.table,
        unclassified: input.unclassified,
    };
    let (types, key) = (HashTypes::from_bits(input.types), HashKey::from(input.key));

    let argument = VnetHashArgument::rfc_v5(input.flags, types, &rss, &key);
    assert_eq!(argument.is_ok(), sound);
    if let Ok(argument) = argument {
        let mut kernel = Kernel(argument.as_bytes());
        assert_eq!((kernel.u16(), kernel.u16()), (input.flags, 0));
        assert_eq!(kernel.u32(), input.types);
        kernel.rss(&input, &key);
    }
    let argument = VnetHashArgument::v12(types, &rss, &key);
    assert_eq!(argument.is_ok(), sound);
    if let Ok(argument) = argument {
        let mut kernel = Kernel(argument.as_bytes());
        assert_eq!(kernel.u32(), input.types);
        kernel.rss(&input, &key);
    }
});
