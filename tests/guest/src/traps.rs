//! Interrupt descriptors, and what happens on an exception nobody expects.

use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::boot_info::read_physical;
use crate::power;
use crate::serial::{flush, say};

/// First vector of `trap.s`'s interrupt stubs.
pub(crate) const FIRST_INTERRUPT: u8 = 0x40;
/// The local APIC timer's vector.
pub(crate) const TIMER: u8 = FIRST_INTERRUPT;
/// Vector for interrupts the CPU sends itself.
pub(crate) const SELF: u8 = FIRST_INTERRUPT + 1;
/// Vector of the first NIC; the n-th has the n-th after it.
pub(crate) const FIRST_NIC: u8 = FIRST_INTERRUPT + 8;

const INTERRUPTS: usize = 32;
const SELECTOR_CODE64: u64 = 0x10;
const GATE_INTERRUPT: u64 = 0xe;
const GATE_TRAP: u64 = 0xf;
const SERVICE_VECTOR: usize = 0x81;

type Idt = [AtomicU64; 512];

unsafe extern "C" {
    static idt: Idt;
    static exception_stubs: u8;
    static interrupt_stubs: u8;
    static spurious_stub: u8;
    fn ring0_call();
    fn trap_report_entry();
    static trap_vector: AtomicU64;
    static trap_error: AtomicU64;
    static trap_rip: AtomicU64;
    static trap_cr2: AtomicU64;
    static trap_resume: AtomicU64;
    static interrupt_counts: [AtomicU64; INTERRUPTS];
}

fn set_gate(vector: usize, handler: u64, kind: u64, callable_from_ring3: bool) {
    // SAFETY: the table of `boot.s`, 256 entries of two words, never freed.
    let table = unsafe { &idt };
    let privilege = if callable_from_ring3 { 3 << 45 } else { 0 };
    let low = (handler & 0xffff)
        | SELECTOR_CODE64 << 16
        | kind << 40
        | privilege
        | 1 << 47
        | ((handler >> 16) & 0xffff) << 48;
    table[vector * 2 + 1].store(handler >> 32, Relaxed);
    table[vector * 2].store(low, Relaxed);
}

/// Fills the interrupt descriptor table. CPUs started later share it.
pub(crate) fn install() {
    let exceptions = (&raw const exception_stubs).addr() as u64;
    let interrupts = (&raw const interrupt_stubs).addr() as u64;
    let spurious = (&raw const spurious_stub).addr() as u64;
    for vector in 0..256 {
        set_gate(vector, spurious, GATE_INTERRUPT, false);
    }
    for (vector, offset) in (0..32).zip((0..).step_by(16)) {
        set_gate(vector, exceptions + offset, GATE_INTERRUPT, vector == 3);
    }
    for (index, offset) in (0..INTERRUPTS).zip((0..).step_by(32)) {
        let vector = usize::from(FIRST_INTERRUPT) + index;
        set_gate(vector, interrupts + offset, GATE_INTERRUPT, false);
    }
    let service: unsafe extern "C" fn() = ring0_call;
    set_gate(SERVICE_VECTOR, service as usize as u64, GATE_TRAP, true);
    resume_at(trap_report_entry);
}

/// Where ring 3 goes on after an exception.
fn resume_at(entry: unsafe extern "C" fn()) {
    // SAFETY: a word of `trap.s`, read only by its stubs.
    unsafe { &trap_resume }.store(entry as usize as u64, Relaxed);
}

/// How often an interrupt vector was served.
pub(crate) fn interrupts(vector: u8) -> u64 {
    // SAFETY: a table of `trap.s`, only ever counted up by its stubs.
    let counts = unsafe { &interrupt_counts };
    counts
        .get(usize::from(vector.wrapping_sub(FIRST_INTERRUPT)))
        .map_or(0, |count| count.load(Relaxed))
}

/// What an exception left behind: vector, error code, instruction, address.
fn last_exception() -> [u64; 4] {
    // SAFETY: words of `trap.s`, written by its stubs only.
    unsafe { [&trap_vector, &trap_error, &trap_rip, &trap_cr2] }.map(|word| word.load(Relaxed))
}

/// Runs an undefined instruction and says which vector it raised; `None` when
/// it raised none.
pub(crate) fn provoke_undefined_instruction() -> Option<u64> {
    let raised: u64;
    // SAFETY: the stub resumes at label 2 with the stack pointer it had, as
    // `ud2` pushes nothing in ring 3; the old resume address is put back.
    unsafe {
        core::arch::asm!(
            "mov {old}, [{resume}]",
            "lea {raised}, [rip + 2f]",
            "mov [{resume}], {raised}",
            "xor {raised:e}, {raised:e}",
            "ud2",
            "jmp 3f",
            "2: mov {raised:e}, 1",
            "3: mov [{resume}], {old}",
            resume = in(reg) &raw const trap_resume,
            old = out(reg) _,
            raised = out(reg) raised,
        );
    }
    (raised == 1).then(|| last_exception()[0])
}

/// Where [`crash`] reads: canonical, and never mapped by `paging`.
const NOWHERE: u64 = 0x7fff_dead_b000;

/// Reads memory that is not mapped; the trap report ends the guest.
pub(crate) fn crash() -> ! {
    // SAFETY: not sound, on purpose: the read never completes, the exception
    // stub goes on in `trap_report`.
    let _: u64 = unsafe { read_physical(NOWHERE) };
    power::park()
}

/// Ends the guest with a report of the exception that happened.
#[unsafe(no_mangle)]
extern "C" fn trap_report() -> ! {
    let [vector, error, rip, cr2] = last_exception();
    say!(
        "TRAP {{\"vector\":{vector},\"error\":\"{error:#x}\",\"rip\":\"{rip:#x}\",\"cr2\":\"{cr2:#x}\"}}"
    );
    flush();
    power::park()
}
