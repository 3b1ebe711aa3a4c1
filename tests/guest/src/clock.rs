//! The time-stamp counter's frequency, and the longest gap in its use.

use core::arch::x86_64::__cpuid;
use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

use guest_logic::args::Args;

use crate::cpu::{inb, outb, tsc, write_msr};
use crate::smp::MAX_CPUS;

const LEAF_HYPERVISOR: u32 = 0x4000_0000;
const LEAF_HYPERVISOR_FEATURES: u32 = 0x4000_0001;
/// Defined by VMware, offered by several hypervisors: EAX = TSC kHz.
const LEAF_HYPERVISOR_TSC: u32 = 0x4000_0010;
const LEAF_TSC: u32 = 0x15;
const LEAF_FREQUENCY: u32 = 0x16;
/// "KVMKVMKVM\0\0\0" in EBX, ECX, EDX.
const KVM_SIGNATURE: [u32; 3] = [0x4b4d_564b, 0x564b_4d56, 0x4d];
/// KVM_FEATURE_CLOCKSOURCE2.
const FEATURE_KVMCLOCK: u32 = 1 << 3;
/// MSR_KVM_SYSTEM_TIME_NEW.
const MSR_KVMCLOCK: u32 = 0x4b56_4d01;

static TSC_KHZ: AtomicU64 = AtomicU64::new(1_000_000);

/// `struct pvclock_vcpu_time_info` (Linux `asm/pvclock-abi.h`), as words: the
/// fourth holds the multiplier (low half) and the shift (byte 4).
#[repr(C, align(64))]
struct KvmClock([AtomicU64; 8]);
static KVMCLOCK: KvmClock = KvmClock([const { AtomicU64::new(0) }; 8]);

/// Finds the frequency; says from where: `tsc=` MHz on the command line, else
/// the first of CPUID 0x40000010, CPUID 0x15, kvmclock's scale, the PIT,
/// CPUID 0x16, and if none answers 1000 MHz is assumed.
pub(crate) fn calibrate(args: &Args<'_>) -> &'static str {
    let sources: [(&str, &dyn Fn() -> Option<u64>); 6] = [
        ("argument", &|| Some(args.number("tsc", 0) * 1000)),
        ("cpuid-0x40000010", &hypervisor_leaf),
        ("cpuid-0x15", &tsc_leaf),
        ("kvmclock", &kvmclock),
        ("pit", &pit),
        ("cpuid-0x16", &frequency_leaf),
    ];
    for (name, source) in sources {
        if let Some(khz) = source().filter(|&khz| khz != 0) {
            TSC_KHZ.store(khz, Relaxed);
            return name;
        }
    }
    "assumed"
}

/// Cycles per millisecond.
pub(crate) fn tsc_khz() -> u64 {
    TSC_KHZ.load(Relaxed)
}

/// Cycles to microseconds.
pub(crate) fn to_us(cycles: u64) -> u64 {
    (u128::from(cycles) * 1000 / u128::from(tsc_khz()))
        .try_into()
        .unwrap_or(u64::MAX)
}

/// Milliseconds to cycles.
pub(crate) fn from_ms(ms: u64) -> u64 {
    ms * tsc_khz()
}

fn highest_hypervisor_leaf() -> u32 {
    // Leaf 1 ECX bit 31: a hypervisor is there. Without it the leaf is noise.
    if __cpuid(1).ecx >> 31 == 0 {
        0
    } else {
        __cpuid(LEAF_HYPERVISOR).eax
    }
}

fn hypervisor_leaf() -> Option<u64> {
    (highest_hypervisor_leaf() >= LEAF_HYPERVISOR_TSC)
        .then(|| u64::from(__cpuid(LEAF_HYPERVISOR_TSC).eax))
}

fn tsc_leaf() -> Option<u64> {
    if __cpuid(0).eax < LEAF_TSC {
        return None;
    }
    let leaf = __cpuid(LEAF_TSC);
    (u64::from(leaf.ecx) * u64::from(leaf.ebx)).checked_div(u64::from(leaf.eax) * 1000)
}

fn frequency_leaf() -> Option<u64> {
    (__cpuid(0).eax >= LEAF_FREQUENCY)
        .then(|| u64::from(__cpuid(LEAF_FREQUENCY).eax & 0xffff) * 1000)
}

/// kvmclock publishes nanoseconds per cycle as a 32.32 multiplier and a shift;
/// it is turned on for one look only.
fn kvmclock() -> Option<u64> {
    let leaf = __cpuid(LEAF_HYPERVISOR);
    let is_kvm = highest_hypervisor_leaf() > LEAF_HYPERVISOR
        && [leaf.ebx, leaf.ecx, leaf.edx] == KVM_SIGNATURE;
    if !is_kvm || __cpuid(LEAF_HYPERVISOR_FEATURES).eax & FEATURE_KVMCLOCK == 0 {
        return None;
    }
    let at = core::ptr::from_ref(&KVMCLOCK).addr() as u64;
    // SAFETY: the MSR exists (feature bit); KVM writes 32 bytes at `at`, a
    // static of 64 bytes made of atomics, until the second write stops it.
    unsafe { write_msr(MSR_KVMCLOCK, at | 1) };
    let mut scale = 0;
    for _ in 0..1000 {
        scale = KVMCLOCK.0[3].load(Relaxed);
        if scale != 0 {
            break;
        }
    }
    // SAFETY: as above; bit 0 clear turns it off.
    unsafe { write_msr(MSR_KVMCLOCK, 0) };
    let [m0, m1, m2, m3, shift, ..] = scale.to_le_bytes();
    let multiplier = u128::from(u32::from_le_bytes([m0, m1, m2, m3]));
    // ns = (cycles << shift) * multiplier >> 32, so kHz is its inverse.
    let scaled = (1_000_000u128 << 32).checked_div(multiplier)?;
    let shift = i8::from_le_bytes([shift]);
    let magnitude = u32::from(shift.unsigned_abs());
    let khz = if shift >= 0 {
        scaled.checked_shr(magnitude)
    } else {
        scaled.checked_shl(magnitude)
    };
    khz.and_then(|khz| khz.try_into().ok())
}

/// Counts TSC cycles over 10 ms of the PIT's channel 2.
fn pit() -> Option<u64> {
    const CONTROL: u16 = 0x43;
    const CHANNEL_2: u16 = 0x42;
    const GATE: u16 = 0x61;
    const OUT_BIT: u8 = 1 << 5;
    const TICKS: u16 = 11932;
    const LIMIT: u64 = 1_000_000_000;
    let gate = inb(GATE);
    outb(GATE, (gate & !2) | 1);
    outb(CONTROL, 0xb0);
    let [low, high] = TICKS.to_le_bytes();
    outb(CHANNEL_2, low);
    outb(CHANNEL_2, high);
    let start = tsc();
    if inb(GATE) & OUT_BIT != 0 {
        // Already expired: there is no such timer.
        return None;
    }
    while inb(GATE) & OUT_BIT == 0 {
        if tsc().wrapping_sub(start) > LIMIT {
            return None;
        }
    }
    let cycles = tsc().wrapping_sub(start);
    outb(GATE, gate);
    Some(cycles / 10)
}

/// The gaps of one CPU's use of its counter. All the guest's loops call
/// [`beat`]; the longest time between two calls is the longest the CPU stood
/// still.
struct Beats {
    last: AtomicU64,
    tick: AtomicU64,
    ever: AtomicU64,
}

static BEATS: [Beats; MAX_CPUS] = [const {
    Beats {
        last: AtomicU64::new(0),
        tick: AtomicU64::new(0),
        ever: AtomicU64::new(0),
    }
}; MAX_CPUS];

/// Notes that this CPU runs; returns the counter.
#[inline]
pub(crate) fn beat(cpu: usize) -> u64 {
    let now = tsc();
    let beats = &BEATS[cpu];
    let gap = now.saturating_sub(beats.last.load(Relaxed));
    beats.last.store(now, Relaxed);
    if gap > beats.tick.load(Relaxed) {
        beats.tick.store(gap, Relaxed);
        if gap > beats.ever.load(Relaxed) {
            beats.ever.store(gap, Relaxed);
        }
    }
    now
}

/// Forgets all gaps of one CPU; its next beat starts anew.
pub(crate) fn reset_gaps(cpu: usize) {
    let beats = &BEATS[cpu];
    beats.last.store(tsc(), Relaxed);
    beats.tick.store(0, Relaxed);
    beats.ever.store(0, Relaxed);
}

/// Longest gap in cycles since this was last asked, and ever.
pub(crate) fn take_gaps(cpu: usize) -> (u64, u64) {
    let beats = &BEATS[cpu];
    (beats.tick.swap(0, Relaxed), beats.ever.load(Relaxed))
}
