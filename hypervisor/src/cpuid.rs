//! What the guest's CPUID instruction answers.
//!
//! The VMM starts from what KVM supports ([`crate::Hypervisor::supported_cpuid`]) and makes each
//! vCPU's own table with [`Cpuid::for_vcpu`]: APIC ID and topology (one socket, one thread per
//! core) in leaves 1, 4, 0xb, 0x1f, 0x8000_0008 and 0x8000_001e. KVM's signature leaves stay.
//!
//! Before a migration [`Cpuid::missing_on`] tells what a guest was promised that the destination
//! cannot keep.

use std::fmt;

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use serde::{Deserialize, Serialize};

use crate::Error;

mod features;

pub use features::Register;

/// Flag of an entry: the subleaf matters (KVM_CPUID_FLAG_SIGNIFCANT_INDEX in linux/kvm.h).
const SIGNIFICANT_INDEX: u32 = 1;
/// Leaf 1 ECX: TSC deadline timer.
const TSC_DEADLINE: u32 = 1 << 24;
/// Leaf 1 ECX: a hypervisor is present.
const HYPERVISOR: u32 = 1 << 31;
/// Leaf 1 EDX: the package has several logical processors.
const MULTI_THREADED: u32 = 1 << 28;
/// Leaf 0xb and 0x1f ECX[15:8]: level types (Intel SDM, CPUID).
const LEVEL_THREAD: u32 = 1;
const LEVEL_CORE: u32 = 2;

/// A CPUID table.
#[derive(Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Cpuid {
    entries: Vec<kvm_cpuid_entry2>,
}

impl fmt::Debug for Cpuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Cpuid({} entries)", self.entries.len())
    }
}

/// What the guest was promised and another host cannot keep.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Missing {
    /// The CPUs are of different vendors.
    Vendor {
        /// The guest's vendor string.
        guest: String,
        /// The host's.
        host: String,
    },
    /// A feature bit.
    Feature {
        /// Leaf.
        leaf: u32,
        /// Subleaf.
        subleaf: u32,
        /// Register.
        register: Register,
        /// Bit number.
        bit: u32,
        /// Its usual name, where this build knows one.
        name: Option<&'static str>,
    },
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Vendor { guest, host } => {
                write!(f, "CPU vendor {guest:?} (the host's is {host:?})")
            }
            Self::Feature {
                leaf,
                subleaf,
                register,
                bit,
                name,
            } => {
                let name = name.unwrap_or("a feature");
                write!(
                    f,
                    "{name} (CPUID {leaf:#x}.{subleaf} {register:?} bit {bit})"
                )
            }
        }
    }
}

impl Cpuid {
    /// Takes over KVM's table.
    pub(crate) fn from_kvm(cpuid: &CpuId) -> Self {
        Self {
            entries: cpuid.as_slice().to_vec(),
        }
    }

    /// KVM's form of the table.
    pub(crate) fn to_kvm(&self) -> Result<CpuId, Error> {
        CpuId::from_entries(&self.entries).map_err(|_| Error::TooMany {
            what: "CPUID entries",
            given: self.entries.len(),
            limit: KVM_MAX_CPUID_ENTRIES,
        })
    }

    /// The entries, for a policy that takes features away.
    pub fn entries_mut(&mut self) -> &mut [kvm_cpuid_entry2] {
        &mut self.entries
    }

    /// The entries.
    pub fn entries(&self) -> &[kvm_cpuid_entry2] {
        &self.entries
    }

    /// The entry of `leaf` and `subleaf`.
    pub fn get(&self, leaf: u32, subleaf: u32) -> Option<&kvm_cpuid_entry2> {
        self.entries.iter().find(|entry| {
            let any = entry.flags & SIGNIFICANT_INDEX == 0;
            entry.function == leaf && (any || entry.index == subleaf)
        })
    }

    /// Vendor string of leaf 0.
    pub fn vendor(&self) -> String {
        let Some(leaf) = self.get(0, 0) else {
            return String::new();
        };
        let bytes = [leaf.ebx, leaf.edx, leaf.ecx].map(u32::to_le_bytes);
        String::from_utf8_lossy(bytes.as_flattened()).into_owned()
    }

    /// Sets or clears the TSC deadline timer's bit.
    pub(crate) fn set_tsc_deadline(&mut self, on: bool) {
        for entry in self.entries.iter_mut().filter(|e| e.function == 1) {
            entry.ecx = with(entry.ecx, TSC_DEADLINE, on);
        }
    }

    /// The table of vCPU `index` (also its APIC ID) of `vcpus`.
    pub fn for_vcpu(&self, index: u32, vcpus: u32) -> Self {
        let vcpus = vcpus.max(1);
        let amd = self.vendor() == "AuthenticAMD";
        let mut entries: Vec<_> = self
            .entries
            .iter()
            .filter(|entry| !matches!(entry.function, 0xb | 0x1f))
            .copied()
            .collect();
        for entry in &mut entries {
            fix(entry, index, vcpus, amd);
        }
        let highest = self.get(0, 0).map_or(0, |leaf| leaf.eax);
        for leaf in [0xb, 0x1f] {
            // Leaf 0x1f is offered by the host or not; 0xb alone carries the x2APIC ID.
            if leaf <= highest && (leaf == 0xb || self.get(leaf, 0).is_some()) {
                entries.extend(topology(leaf, index, vcpus));
            }
        }
        Self { entries }
    }

    /// What this (a guest's) table has that `host` (another host's supported one) has not. Empty
    /// means that the guest can run there. Bits that say how things are, rather than what can be
    /// used, are not compared.
    pub fn missing_on(&self, host: &Self) -> Vec<Missing> {
        let (guest_vendor, host_vendor) = (self.vendor(), host.vendor());
        if guest_vendor != host_vendor {
            return vec![Missing::Vendor {
                guest: guest_vendor,
                host: host_vendor,
            }];
        }
        let mut missing = Vec::new();
        for word in features::WORDS {
            let has = |table: &Self| {
                let entry = table.get(word.leaf, word.subleaf);
                entry.map_or(0, |entry| word.register.of(entry))
            };
            let lost = has(self) & !has(host) & !word.ignored;
            missing.extend((0..32).filter(|bit| lost & (1 << bit) != 0).map(|bit| {
                Missing::Feature {
                    leaf: word.leaf,
                    subleaf: word.subleaf,
                    register: word.register,
                    bit,
                    name: features::name(word, bit),
                }
            }));
        }
        missing
    }
}

/// Sets what differs between vCPUs in an entry of the host's table.
fn fix(entry: &mut kvm_cpuid_entry2, index: u32, vcpus: u32, amd: bool) {
    match entry.function {
        1 => {
            // APIC ID, number of logical processors of the package, rest as the host's.
            entry.ebx = (entry.ebx & 0xffff) | (vcpus.min(0xff) << 16) | ((index & 0xff) << 24);
            entry.ecx |= HYPERVISOR;
            entry.edx = with(entry.edx, MULTI_THREADED, vcpus > 1);
        }
        4 if entry.eax & 0x1f != 0 => {
            // Caches of levels 1 and 2 are a core's own, level 3 is the package's.
            let level = (entry.eax >> 5) & 7;
            let sharing = if level >= 3 { vcpus } else { 1 };
            let cores = vcpus.next_power_of_two().min(64);
            entry.eax = (entry.eax & 0x3fff)
                | (sharing.next_power_of_two().min(4096).saturating_sub(1) << 14)
                | (cores.saturating_sub(1) << 26);
        }
        0x8000_0008 if amd => {
            // Number of threads of the package less one, and the width of their IDs.
            let count = vcpus.saturating_sub(1).min(0xff);
            entry.ecx = (entry.ecx & 0xffff_0000) | (id_bits(vcpus) << 12) | count;
        }
        0x8000_001e if amd => {
            // APIC ID; core ID with one thread per core; node 0 of 1.
            (entry.eax, entry.ebx, entry.ecx) = (index, index & 0xff, 0);
        }
        _ => {}
    }
}

/// The extended topology: one thread per core, all cores in one package.
fn topology(leaf: u32, index: u32, vcpus: u32) -> [kvm_cpuid_entry2; 3] {
    let level = |subleaf: u32, kind: u32, shift: u32, count: u32| kvm_cpuid_entry2 {
        function: leaf,
        index: subleaf,
        flags: SIGNIFICANT_INDEX,
        eax: shift,
        ebx: count,
        ecx: subleaf | (kind << 8),
        edx: index,
        ..Default::default()
    };
    [
        level(0, LEVEL_THREAD, 0, 1),
        level(1, LEVEL_CORE, id_bits(vcpus), vcpus),
        level(2, 0, 0, 0),
    ]
}

/// Bits that APIC IDs 0 to `vcpus - 1` take.
fn id_bits(vcpus: u32) -> u32 {
    vcpus.next_power_of_two().trailing_zeros()
}

fn with(word: u32, bits: u32, on: bool) -> u32 {
    if on { word | bits } else { word & !bits }
}

#[cfg(test)]
mod tests;
