use std::num::NonZeroU16;

use super::super::tests::{in_namespace, name};
use super::super::{Offloads, Tap};
use super::*;

const V4: HashTypes = HashTypes::TCPV4;
const SIX: HashTypes = HashTypes::from_bits(PLAIN_TYPES);
const ALL_V5: HashAbi = HashAbi::RfcV5 {
    types: SIX,
    rss: true,
};
const ALL_V12: HashAbi = HashAbi::V12 { types: SIX };

fn key() -> HashKey {
    HashKey::from(std::array::from_fn(|i| 0xa0 + u8::try_from(i).unwrap()))
}

const RSS: KernelRss<'static> = KernelRss {
    table: &[1, 0, 3, 2],
    unclassified: 2,
};

fn hash() -> KernelHash<'static> {
    KernelHash {
        report: true,
        rss: Some(RSS),
        types: V4,
        key: key(),
        queues: 4,
    }
}

/// The key as it stands at the end of an argument.
const KEY: &str =
    "a0a1a2a3a4a5a6a7a8a9aaabacadaeafb0b1b2b3b4b5b6b7b8b9babbbcbdbebfc0c1c2c3c4c5c6c7";

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
#[cfg(target_endian = "little")]
fn arguments_are_laid_out_as_the_patches_read_them() {
    let v5 = VnetHashArgument::rfc_v5(3, SIX, &RSS, &key()).unwrap();
    let expected = [
        "0300",
        "0000",
        "3f000000",
        "0300",
        "0200",
        "0100000003000200",
        KEY,
    ]
    .concat();
    assert!(
        hex(v5.as_bytes()).starts_with(&expected),
        "{}",
        hex(v5.as_bytes())
    );
    let v12 = VnetHashArgument::v12(HashTypes::IPV4, &RSS, &key()).unwrap();
    let expected = ["01000000", "0300", "0200", "0100000003000200", KEY].concat();
    assert!(
        hex(v12.as_bytes()).starts_with(&expected),
        "{}",
        hex(v12.as_bytes())
    );
    let off = VnetHashArgument::rfc_v5_off();
    assert!(off.as_bytes().iter().all(|byte| *byte == 0));
    // Two structures, 128 entries and the key.
    assert_eq!(off.as_bytes().len(), 8 + 4 + 256 + 40);
}

#[test]
fn the_longest_argument_ends_with_the_key() {
    let table = [7; 128];
    let rss = KernelRss {
        table: &table,
        unclassified: 0,
    };
    let v5 = VnetHashArgument::rfc_v5(3, SIX, &rss, &key()).unwrap();
    assert!(hex(v5.as_bytes()).ends_with(KEY));
    let v12 = VnetHashArgument::v12(SIX, &rss, &key()).unwrap();
    assert!(hex(v12.as_bytes()).ends_with(&format!("{KEY}00000000")));
}

#[test]
fn tables_of_a_wrong_length_are_refused() {
    for entries in [0, 3, 127, 129, 256] {
        let table = vec![0; entries];
        let rss = KernelRss {
            table: &table,
            unclassified: 0,
        };
        let refused = Err(RssError::TableLength { entries });
        assert_eq!(VnetHashArgument::rfc_v5(3, SIX, &rss, &key()), refused);
        assert_eq!(VnetHashArgument::v12(SIX, &rss, &key()), refused);
    }
}

#[test]
fn answers_are_bounded_and_masked() {
    let cap = |flags: u16, types: u32| {
        let [f0, f1] = flags.to_ne_bytes();
        let [t0, t1, t2, t3] = types.to_ne_bytes();
        HashAbi::from_cap([f0, f1, 0xff, 0xff, t0, t1, t2, t3])
    };
    assert_eq!(cap(3, PLAIN_TYPES), ALL_V5);
    let known = HashTypes::ALL;
    assert_eq!(
        cap(1, u32::MAX),
        HashAbi::RfcV5 {
            types: known,
            rss: false
        }
    );
    // Steering without reports, nothing to hash, and types that nobody knows.
    for (flags, types) in [(2, 0x3f), (0, 0x3f), (3, 0), (3, 0xffff_fe00)] {
        assert_eq!(cap(flags, types), HashAbi::None, "{flags:#x} {types:#x}");
    }
    assert_eq!(HashAbi::from_types(0x3f), ALL_V12);
    assert_eq!(HashAbi::from_types(0x1ff), HashAbi::V12 { types: known });
    // Those of TUNGETQUEUEINDEX, 63 apart, and bits that are no types.
    for answer in (0..63).chain([64, 0xff00, 0x23f, u32::MAX]) {
        assert_eq!(HashAbi::from_types(answer), HashAbi::None, "{answer:#x}");
    }
    assert_eq!(
        (HashAbi::None.types(), ALL_V5.types()),
        (HashTypes::NONE, SIX)
    );
}

#[test]
fn only_what_the_patches_do_right_is_asked_for() {
    let tap = name("t0");
    for abi in [ALL_V5, ALL_V12] {
        assert_eq!(check(&tap, abi, &hash()).unwrap(), RSS);
        let silent = KernelHash {
            report: false,
            ..hash()
        };
        assert_eq!(check(&tap, abi, &silent).unwrap(), RSS);
        let refusal = |hash| check(&tap, abi, &hash).unwrap_err();
        let no_rss = KernelHash {
            rss: None,
            ..hash()
        };
        assert!(matches!(
            refusal(no_rss),
            VnetHashError::ReportWithoutRss { .. }
        ));
        let nothing = KernelHash {
            report: false,
            ..no_rss
        };
        assert!(matches!(refusal(nothing), VnetHashError::Nothing { .. }));
        let types = |types| KernelHash { types, ..hash() };
        let extended = refusal(types(HashTypes::IPV4 | HashTypes::TCP_EX));
        assert!(matches!(
            extended,
            VnetHashError::Types { supported: SIX, .. }
        ));
        for without_v4 in [HashTypes::NONE, HashTypes::IPV6 | HashTypes::TCPV6] {
            let refused = refusal(types(without_v4));
            assert!(
                matches!(refused, VnetHashError::NoV4Type { .. }),
                "{refused}"
            );
        }
        let queues = |queues| KernelHash { queues, ..hash() };
        let single = refusal(queues(1));
        assert!(matches!(
            single,
            VnetHashError::TooFewQueues { queues: 1, .. }
        ));
        let source = |error| match error {
            VnetHashError::Rss { source, .. } => source,
            other => panic!("{other}"),
        };
        let unclassified = RssError::Unclassified {
            queue: 2,
            queues: 2,
        };
        assert_eq!(source(refusal(queues(2))), unclassified);
        let entry = RssError::Entry {
            index: 2,
            queue: 3,
            queues: 3,
        };
        assert_eq!(source(refusal(queues(3))), entry);
    }
    let refusal = |abi| check(&tap, abi, &hash()).unwrap_err();
    assert!(matches!(
        refusal(HashAbi::None),
        VnetHashError::NoAbi { .. }
    ));
    let types = SIX;
    let reports_only = HashAbi::RfcV5 { types, rss: false };
    assert!(matches!(refusal(reports_only), VnetHashError::NoRss { .. }));
}

#[test]
fn a_loaded_steering_program_is_named() {
    let error = failed(&name("t0"), "TUNSETVNETHASH", Errno::BUSY);
    assert!(matches!(error, VnetHashError::SteeringLoaded { .. }));
    assert!(
        error.to_string().contains("eBPF steering program"),
        "{error}"
    );
}

/// A tap of two queues.
fn two_queues() -> Tap {
    let tap = Tap::open(&name("t0"), NonZeroU16::new(2).unwrap()).unwrap();
    tap.queues()[0].set_offloads(Offloads::NONE).unwrap();
    tap
}

const TWO_QUEUES: KernelRss<'static> = KernelRss {
    table: &[0, 1],
    unclassified: 0,
};

/// On a kernel with the patches (the lab has one) this sets and clears for real.
#[test]
fn the_running_kernel_is_asked() {
    in_namespace("the_running_kernel_is_asked", || {
        let tap = two_queues();
        let queue = &tap.queues()[0];
        let hash = KernelHash {
            rss: Some(TWO_QUEUES),
            types: HashTypes::IPV4 | HashTypes::TCPV4,
            queues: 2,
            ..hash()
        };
        match HashAbi::probe().unwrap() {
            HashAbi::None => {
                println!("this kernel's taps cannot hash");
                for abi in [ALL_V5, ALL_V12] {
                    queue.set_header_size(HeaderSize::V1Hash).unwrap();
                    for refused in [queue.set_vnet_hash(abi, &hash), queue.clear_vnet_hash(abi)] {
                        let error = refused.unwrap_err();
                        assert!(matches!(error, VnetHashError::Failed { .. }), "{error}");
                    }
                }
            }
            abi @ (HashAbi::RfcV5 { .. } | HashAbi::V12 { .. }) => {
                println!("this kernel's taps hash: {abi:?}");
                queue.set_header_size(HeaderSize::V1Hash).unwrap();
                queue.set_vnet_hash(abi, &hash).unwrap();
                queue.clear_vnet_hash(abi).unwrap();
                // Again, and with RSS alone.
                let rss_alone = KernelHash {
                    report: false,
                    ..hash
                };
                queue.set_vnet_hash(abi, &rss_alone).unwrap();
                queue.clear_vnet_hash(abi).unwrap();
            }
        }
        queue.set_header_size(HeaderSize::V1).unwrap();
        for abi in [ALL_V5, ALL_V12] {
            let error = queue.set_vnet_hash(abi, &hash).unwrap_err();
            let VnetHashError::HeaderSize { bytes: 12, .. } = error else {
                panic!("{error}")
            };
        }
    });
}
