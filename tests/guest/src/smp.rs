//! Starting the other CPUs. Their local APIC numbers are taken to be 1, 2, …

use core::cell::UnsafeCell;
use core::ptr::{copy_nonoverlapping, without_provenance_mut};
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::cpu::tsc;
use crate::serial::say;
use crate::{clock, dirty, lapic};

/// Most CPUs served.
pub(crate) const MAX_CPUS: usize = 16;
/// Where the trampoline is copied: RAM on every PC, unused by then.
const TRAMPOLINE_PAGE: u8 = 0x70;
const TRAMPOLINE: usize = 0x7_0000;
/// Selector of CPU 0's task state; each CPU's descriptor takes 16 bytes.
const FIRST_TSS_SELECTOR: u64 = 0x40;
const START_TIMEOUT_MS: u64 = 2000;

const RING0_STACK: usize = 8192;
const RING3_STACK: usize = 32768;
/// Task state with its I/O bitmap and the closing byte.
const TSS_BYTES: usize = 0x68 + 8192 + 1;
const TSS_LIMIT: u64 = 0x2068;

/// What one CPU needs for itself.
#[repr(C, align(64))]
struct Private {
    ring0: UnsafeCell<[u8; RING0_STACK]>,
    ring3: UnsafeCell<[u8; RING3_STACK]>,
    tss: UnsafeCell<[u8; TSS_BYTES]>,
}
// SAFETY: CPU n alone uses element n - 1, after CPU 0 prepared it.
unsafe impl Sync for Private {}

static PRIVATE: [Private; MAX_CPUS - 1] = [const {
    Private {
        ring0: UnsafeCell::new([0; RING0_STACK]),
        ring3: UnsafeCell::new([0; RING3_STACK]),
        tss: UnsafeCell::new([0; TSS_BYTES]),
    }
}; MAX_CPUS - 1];

static ALIVE: [AtomicBool; MAX_CPUS] = [const { AtomicBool::new(false) }; MAX_CPUS];

unsafe extern "C" {
    static ap_trampoline: u8;
    static ap_trampoline_end: u8;
    static ap_boot: [AtomicU64; 4];
    static tss_descriptors: [AtomicU64; 2 * MAX_CPUS];
}

/// Starts CPUs 1 to `wanted - 1`, one after the other; returns how many CPUs
/// run then, CPU 0 included.
pub(crate) fn start(wanted: usize) -> usize {
    let wanted = wanted.clamp(1, MAX_CPUS);
    if wanted > 1 {
        let from = &raw const ap_trampoline;
        let len = (&raw const ap_trampoline_end).addr() - from.addr();
        // SAFETY: `boot.s`'s bytes to a page of low RAM no Rust object occupies.
        unsafe { copy_nonoverlapping(from, without_provenance_mut(TRAMPOLINE), len) };
    }
    let mut running = 1;
    for (cpu, apic) in (1..wanted).zip(1..) {
        prepare(cpu);
        if !start_one(cpu, apic) {
            say!("NOTE cpu {cpu} did not start");
            break;
        }
        running += 1;
    }
    running
}

/// Lays out a CPU's task state and tells `boot.s` about its stacks.
fn prepare(cpu: usize) {
    let private = &PRIVATE[cpu - 1];
    let ring0_top = private.ring0.get().addr() + RING0_STACK;
    let ring3_top = private.ring3.get().addr() + RING3_STACK - 8;
    let tss = private.tss.get().addr() as u64;
    // SAFETY: the CPU does not run yet, so nobody else looks at its task state.
    let state = unsafe { &mut *private.tss.get() };
    state[4..12].copy_from_slice(&(ring0_top as u64).to_le_bytes());
    state[0x66] = 0x68;
    state[TSS_BYTES - 1] = 0xff;
    // SAFETY: tables of `boot.s` that live for ever; the CPU that reads them
    // is started after these stores.
    let (descriptors, boot) = unsafe { (&tss_descriptors, &ap_boot) };
    // 64-bit TSS, present, privilege 0 (SDM volume 3, 7.2.3).
    let low = TSS_LIMIT | (tss & 0xff_ffff) << 16 | 0x89 << 40 | (tss >> 24 & 0xff) << 56;
    descriptors[2 * cpu].store(low, Ordering::SeqCst);
    descriptors[2 * cpu + 1].store(tss >> 32, Ordering::SeqCst);
    let index = cpu as u64;
    let values = [
        ring0_top as u64,
        ring3_top as u64,
        FIRST_TSS_SELECTOR + 16 * index,
        index,
    ];
    for (slot, value) in boot.iter().zip(values) {
        slot.store(value, Ordering::SeqCst);
    }
}

fn start_one(cpu: usize, apic: u8) -> bool {
    lapic::send_init(apic);
    wait(1, || false);
    lapic::send_start_up(apic, TRAMPOLINE_PAGE);
    wait(START_TIMEOUT_MS, || ALIVE[cpu].load(Ordering::SeqCst))
}

/// Waits until `done`, at most `ms`; whether it was done.
fn wait(ms: u64, done: impl Fn() -> bool) -> bool {
    let start = tsc();
    while !done() {
        if tsc().wrapping_sub(start) > clock::from_ms(ms) {
            return false;
        }
        core::hint::spin_loop();
    }
    true
}

/// Where `boot.s` brings each further CPU, in ring 3.
#[unsafe(no_mangle)]
extern "C" fn ap_main(cpu: usize) -> ! {
    lapic::enable();
    ALIVE[cpu].store(true, Ordering::SeqCst);
    dirty::work_forever(cpu)
}
