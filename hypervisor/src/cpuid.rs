//! The CPU features a guest sees.

use crate::{CpuId, CpuIdEntry, HypervisorError, Result};

/// CPUID.1:ECX: running under a hypervisor.
const HYPERVISOR_BIT: u32 = 1 << 31;
/// CPUID.1:ECX: TSC deadline timer.
const TSC_DEADLINE_BIT: u32 = 1 << 24;
/// CPUID.1:EDX: multi-threading, that is leaf 1's count of logical processors is valid.
const HTT_BIT: u32 = 1 << 28;

/// What vCPU `id` of `count` sees: the host's supported features with this vCPU's APIC id, and a
/// topology of one package with `count` cores of one thread.
///
/// # Errors
/// When the table gets too large.
pub fn guest_cpuid(supported: &CpuId, id: u32, count: u32) -> Result<CpuId> {
    let mut entries: Vec<CpuIdEntry> = supported
        .as_slice()
        .iter()
        .copied()
        .filter(|entry| !matches!(entry.function, 0xb | 0x1f))
        .collect();
    for entry in &mut entries {
        match (entry.function, entry.index) {
            (0x1, _) => {
                let logical = count.min(0xff) << 16;
                entry.ebx = (entry.ebx & 0xffff) | logical | (id << 24);
                entry.ecx |= HYPERVISOR_BIT | TSC_DEADLINE_BIT;
                if count > 1 {
                    entry.edx |= HTT_BIT;
                } else {
                    entry.edx &= !HTT_BIT;
                }
            }
            // Cache parameters: bits 31..26 cores in the package, 25..14 threads that share.
            (0x4, _) if entry.eax & 0x1f != 0 => {
                let cores = count.saturating_sub(1).min(0x3f) << 26;
                entry.eax = (entry.eax & 0x3fff) | cores;
            }
            // AMD: cores in the package, and bits of the APIC id that number them.
            (0x8000_0008, _) => {
                entry.ecx = (entry.ecx & !0xf0ff)
                    | (id_bits(count) << 12)
                    | count.saturating_sub(1).min(0xff);
            }
            (0x8000_001e, _) => {
                entry.eax = id;
                entry.ebx = (entry.ebx & !0xffff) | (id & 0xff);
            }
            _ => {}
        }
    }
    let max_basic = supported
        .as_slice()
        .iter()
        .find(|e| e.function == 0)
        .map_or(0, |e| e.eax);
    if max_basic >= 0xb {
        entries.extend(topology(0xb, id, count));
    }
    if max_basic >= 0x1f {
        entries.extend(topology(0x1f, id, count));
    }
    CpuId::from_entries(&entries).map_err(|_| HypervisorError::TooManyEntries("CPUID"))
}

fn id_bits(count: u32) -> u32 {
    count.next_power_of_two().trailing_zeros()
}

/// Extended topology: a thread level of one, a core level of `count`, and the level that ends it.
fn topology(function: u32, id: u32, count: u32) -> [CpuIdEntry; 3] {
    // KVM_CPUID_FLAG_SIGNIFCANT_INDEX: the sub-leaf matters.
    let level = |index: u32, shift: u32, number: u32, kind: u32| CpuIdEntry {
        function,
        index,
        flags: 1,
        eax: shift,
        ebx: number,
        ecx: index | (kind << 8),
        edx: id,
        ..Default::default()
    };
    [
        level(0, 0, 1, 1),
        level(1, id_bits(count), count, 2),
        level(2, 0, 0, 0),
    ]
}
