//! Which CPUID words are feature words, and what their bits are called (Intel SDM vol. 2A, AMD
//! APM vol. 3, and asm/kvm_para.h for leaf 0x4000_0001).

use kvm_bindings::kvm_cpuid_entry2;

/// A register of a CPUID answer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Register {
    /// EAX.
    Eax,
    /// EBX.
    Ebx,
    /// ECX.
    Ecx,
    /// EDX.
    Edx,
}

impl Register {
    pub(super) fn of(self, entry: &kvm_cpuid_entry2) -> u32 {
        match self {
            Self::Eax => entry.eax,
            Self::Ebx => entry.ebx,
            Self::Ecx => entry.ecx,
            Self::Edx => entry.edx,
        }
    }
}

/// A word of feature bits.
pub(super) struct Word {
    pub(super) leaf: u32,
    pub(super) subleaf: u32,
    pub(super) register: Register,
    /// Bits that describe a vCPU's present state or that the VMM sets.
    pub(super) ignored: u32,
}

const fn word(leaf: u32, subleaf: u32, register: Register, ignored: u32) -> Word {
    Word {
        leaf,
        subleaf,
        register,
        ignored,
    }
}

/// Leaf 1 ECX: OSXSAVE follows CR4; the hypervisor bit is the VMM's.
const STATE_1_ECX: u32 = (1 << 27) | (1 << 31);
/// Leaf 1 EDX: HTT is topology.
const STATE_1_EDX: u32 = 1 << 28;
/// Leaf 7 ECX: OSPKE follows CR4.
const STATE_7_ECX: u32 = 1 << 4;
/// Leaf 0x8000_0001 ECX: CmpLegacy is topology.
const STATE_EXT_ECX: u32 = 1 << 1;

pub(super) const WORDS: &[Word] = &[
    word(0x1, 0, Register::Ecx, STATE_1_ECX),
    word(0x1, 0, Register::Edx, STATE_1_EDX),
    word(0x6, 0, Register::Eax, 0),
    word(0x7, 0, Register::Ebx, 0),
    word(0x7, 0, Register::Ecx, STATE_7_ECX),
    word(0x7, 0, Register::Edx, 0),
    word(0x7, 1, Register::Eax, 0),
    word(0x7, 1, Register::Ebx, 0),
    word(0x7, 1, Register::Edx, 0),
    word(0x7, 2, Register::Edx, 0),
    word(0xd, 0, Register::Eax, 0),
    word(0xd, 0, Register::Edx, 0),
    word(0xd, 1, Register::Eax, 0),
    word(0xd, 1, Register::Ecx, 0),
    word(0x4000_0001, 0, Register::Eax, 0),
    word(0x8000_0001, 0, Register::Ecx, STATE_EXT_ECX),
    word(0x8000_0001, 0, Register::Edx, 0),
    word(0x8000_0007, 0, Register::Edx, 0),
    word(0x8000_0008, 0, Register::Ebx, 0),
    word(0x8000_0021, 0, Register::Eax, 0),
];

/// Names of the features people ask about.
const NAMES: &[(u32, u32, Register, u32, &str)] = &[
    (0x1, 0, Register::Ecx, 0, "SSE3"),
    (0x1, 0, Register::Ecx, 1, "PCLMULQDQ"),
    (0x1, 0, Register::Ecx, 5, "VMX"),
    (0x1, 0, Register::Ecx, 9, "SSSE3"),
    (0x1, 0, Register::Ecx, 12, "FMA"),
    (0x1, 0, Register::Ecx, 13, "CMPXCHG16B"),
    (0x1, 0, Register::Ecx, 17, "PCID"),
    (0x1, 0, Register::Ecx, 19, "SSE4.1"),
    (0x1, 0, Register::Ecx, 20, "SSE4.2"),
    (0x1, 0, Register::Ecx, 21, "x2APIC"),
    (0x1, 0, Register::Ecx, 22, "MOVBE"),
    (0x1, 0, Register::Ecx, 23, "POPCNT"),
    (0x1, 0, Register::Ecx, 24, "TSC deadline timer"),
    (0x1, 0, Register::Ecx, 25, "AES-NI"),
    (0x1, 0, Register::Ecx, 26, "XSAVE"),
    (0x1, 0, Register::Ecx, 28, "AVX"),
    (0x1, 0, Register::Ecx, 29, "F16C"),
    (0x1, 0, Register::Ecx, 30, "RDRAND"),
    (0x7, 0, Register::Ebx, 0, "FSGSBASE"),
    (0x7, 0, Register::Ebx, 3, "BMI1"),
    (0x7, 0, Register::Ebx, 5, "AVX2"),
    (0x7, 0, Register::Ebx, 7, "SMEP"),
    (0x7, 0, Register::Ebx, 8, "BMI2"),
    (0x7, 0, Register::Ebx, 9, "ERMS"),
    (0x7, 0, Register::Ebx, 10, "INVPCID"),
    (0x7, 0, Register::Ebx, 16, "AVX512F"),
    (0x7, 0, Register::Ebx, 17, "AVX512DQ"),
    (0x7, 0, Register::Ebx, 18, "RDSEED"),
    (0x7, 0, Register::Ebx, 19, "ADX"),
    (0x7, 0, Register::Ebx, 20, "SMAP"),
    (0x7, 0, Register::Ebx, 23, "CLFLUSHOPT"),
    (0x7, 0, Register::Ebx, 24, "CLWB"),
    (0x7, 0, Register::Ebx, 28, "AVX512CD"),
    (0x7, 0, Register::Ebx, 29, "SHA"),
    (0x7, 0, Register::Ebx, 30, "AVX512BW"),
    (0x7, 0, Register::Ebx, 31, "AVX512VL"),
    (0x7, 0, Register::Ecx, 2, "UMIP"),
    (0x7, 0, Register::Ecx, 3, "PKU"),
    (0x7, 0, Register::Ecx, 8, "GFNI"),
    (0x7, 0, Register::Ecx, 9, "VAES"),
    (0x7, 0, Register::Ecx, 11, "AVX512_VNNI"),
    (0x7, 0, Register::Ecx, 16, "5-level paging"),
    (0x7, 0, Register::Ecx, 22, "RDPID"),
    (0x7, 0, Register::Edx, 4, "FSRM"),
    (0x7, 0, Register::Edx, 22, "AMX-BF16"),
    (0x7, 0, Register::Edx, 24, "AMX-TILE"),
    (0x7, 0, Register::Edx, 26, "IBRS/IBPB"),
    (0x7, 0, Register::Edx, 27, "STIBP"),
    (0x7, 0, Register::Edx, 29, "ARCH_CAPABILITIES"),
    (0x7, 0, Register::Edx, 31, "SSBD"),
    (0xd, 0, Register::Eax, 2, "AVX state"),
    (0xd, 0, Register::Eax, 5, "AVX-512 opmask state"),
    (0xd, 0, Register::Eax, 6, "AVX-512 ZMM_Hi256 state"),
    (0xd, 0, Register::Eax, 7, "AVX-512 Hi16_ZMM state"),
    (0xd, 0, Register::Eax, 9, "PKRU state"),
    (0xd, 0, Register::Eax, 18, "AMX tile data state"),
    (0xd, 1, Register::Eax, 0, "XSAVEOPT"),
    (0xd, 1, Register::Eax, 1, "XSAVEC"),
    (0xd, 1, Register::Eax, 3, "XSAVES"),
    (0x4000_0001, 0, Register::Eax, 0, "KVM clock"),
    (0x4000_0001, 0, Register::Eax, 3, "KVM clock 2"),
    (
        0x4000_0001,
        0,
        Register::Eax,
        4,
        "KVM asynchronous page faults",
    ),
    (0x4000_0001, 0, Register::Eax, 5, "KVM steal time"),
    (0x4000_0001, 0, Register::Eax, 6, "KVM paravirtual EOI"),
    (0x4000_0001, 0, Register::Eax, 7, "KVM paravirtual unhalt"),
    (0x4000_0001, 0, Register::Eax, 24, "stable KVM clock"),
    (0x8000_0001, 0, Register::Edx, 11, "SYSCALL"),
    (0x8000_0001, 0, Register::Edx, 20, "NX"),
    (0x8000_0001, 0, Register::Edx, 26, "1 GiB pages"),
    (0x8000_0001, 0, Register::Edx, 27, "RDTSCP"),
    (0x8000_0001, 0, Register::Edx, 29, "long mode"),
    (0x8000_0001, 0, Register::Ecx, 2, "SVM"),
    (0x8000_0001, 0, Register::Ecx, 5, "LZCNT"),
    (0x8000_0007, 0, Register::Edx, 8, "invariant TSC"),
];

pub(super) fn name(word: &Word, bit: u32) -> Option<&'static str> {
    NAMES
        .iter()
        .find(|(leaf, subleaf, register, at, _)| {
            (*leaf, *subleaf, *register, *at) == (word.leaf, word.subleaf, word.register, bit)
        })
        .map(|(.., name)| *name)
}
