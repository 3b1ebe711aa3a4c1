//! Tests of CPUID tables.

use super::*;

fn entry(function: u32, index: u32, words: [u32; 4]) -> kvm_cpuid_entry2 {
    let [eax, ebx, ecx, edx] = words;
    kvm_cpuid_entry2 {
        function,
        index,
        flags: u32::from(matches!(function, 4 | 7 | 0xb | 0xd)),
        eax,
        ebx,
        ecx,
        edx,
        ..Default::default()
    }
}

fn table() -> Cpuid {
    let [b, d, c] = [*b"Genu", *b"ineI", *b"ntel"].map(u32::from_le_bytes);
    Cpuid {
        entries: vec![
            entry(0, 0, [0x16, b, c, d]),
            entry(1, 0, [0x306c1, 0xff20_0800, 0x81202000, 0x1fc9_fbff]),
            entry(4, 0, [0x121, 0, 0, 0]),
            entry(4, 3, [0x163, 0, 0, 0]),
            entry(4, 4, [0; 4]),
            entry(7, 0, [0, 0x20, 0, 0]),
            entry(0xb, 0, [1, 2, 0x100, 77]),
            entry(0x4000_0000, 0, [0x4000_0001, 1, 2, 3]),
        ],
    }
}

#[test]
fn each_vcpu_has_its_own_apic_id() {
    let cpuid = table().for_vcpu(3, 6);
    let leaf = cpuid.get(1, 0).unwrap();
    assert_eq!(leaf.ebx, 0x0306_0800);
    assert_ne!(leaf.ecx & HYPERVISOR, 0);
    assert_ne!(leaf.edx & MULTI_THREADED, 0);
    let levels: Vec<_> = cpuid.entries.iter().filter(|e| e.function == 0xb).collect();
    let words: Vec<_> = levels
        .iter()
        .map(|e| [e.eax, e.ebx, e.ecx, e.edx])
        .collect();
    assert_eq!(words, [[0, 1, 0x100, 3], [3, 6, 0x201, 3], [0, 0, 2, 3]]);
    assert_eq!(
        cpuid.get(4, 0).unwrap().eax,
        0x121 | (7 << 26),
        "level 1: one core"
    );
    assert_eq!(cpuid.get(4, 3).unwrap().eax, 0x163 | (7 << 14) | (7 << 26));
    assert_eq!(cpuid.get(4, 4).unwrap().eax, 0, "no cache");
    assert!(cpuid.get(0x1f, 0).is_none());
    assert_eq!(
        cpuid.get(0x4000_0000, 0).unwrap().ebx,
        1,
        "KVM's signature stays"
    );
    let single = table().for_vcpu(0, 1);
    assert_eq!(single.get(1, 0).unwrap().edx & MULTI_THREADED, 0);
    assert_eq!(single.get(0xb, 1).unwrap().eax, 0);
}

#[test]
fn missing_features_are_named() {
    let guest = table().for_vcpu(1, 2);
    assert_eq!(guest.missing_on(&table()), []);
    let mut host = table();
    host.entries_mut()[5].ebx = 0;
    host.entries_mut()[1].ecx &= !(1 << 21);
    let missing = guest.missing_on(&host);
    let texts: Vec<_> = missing.iter().map(ToString::to_string).collect();
    assert_eq!(
        texts,
        [
            "x2APIC (CPUID 0x1.0 Ecx bit 21)",
            "AVX2 (CPUID 0x7.0 Ebx bit 5)"
        ]
    );
    host.entries_mut()[0].ecx = u32::from_le_bytes(*b"cAMD");
    let other = guest.missing_on(&host);
    assert!(matches!(&other[..], [Missing::Vendor { guest, .. }] if guest == "GenuineIntel"));
}

#[test]
fn too_many_entries_are_refused() {
    let cpuid = Cpuid {
        entries: vec![entry(0, 0, [0; 4]); 1000],
    };
    assert!(matches!(
        cpuid.to_kvm(),
        Err(Error::TooMany { given: 1000, .. })
    ));
}
