//! The processor's instructions that Rust has no words for.

use core::arch::asm;

/// Writes a byte to an I/O port.
pub(crate) fn outb(port: u16, value: u8) {
    // SAFETY: port I/O does not touch memory; which device answers is the
    // guest's own affair, it owns the machine.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack)) }
}

/// Reads a byte from an I/O port.
pub(crate) fn inb(port: u16) -> u8 {
    let value;
    // SAFETY: as in `outb`.
    unsafe { asm!("in al, dx", in("dx") port, out("al") value, options(nomem, nostack)) }
    value
}

/// Writes two bytes to an I/O port.
pub(crate) fn outw(port: u16, value: u16) {
    // SAFETY: as in `outb`.
    unsafe { asm!("out dx, ax", in("dx") port, in("ax") value, options(nomem, nostack)) }
}

/// Writes four bytes to an I/O port.
pub(crate) fn outl(port: u16, value: u32) {
    // SAFETY: as in `outb`.
    unsafe { asm!("out dx, eax", in("dx") port, in("eax") value, options(nomem, nostack)) }
}

/// Reads four bytes from an I/O port.
pub(crate) fn inl(port: u16) -> u32 {
    let value;
    // SAFETY: as in `outb`.
    unsafe { asm!("in eax, dx", in("dx") port, out("eax") value, options(nomem, nostack)) }
    value
}

/// The time-stamp counter.
#[inline]
pub(crate) fn tsc() -> u64 {
    // SAFETY: RDTSC is permitted in ring 3 (CR4.TSD is clear) and reads no memory.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// Waits for an interrupt; the ring-0 stub does it, as ring 3 may not.
///
/// Halts for ever unless a timer runs: an interrupt that came before it is not
/// noticed.
pub(crate) fn halt() {
    // SAFETY: #GP in ring 3; `trap.s` recognises it, halts with interrupts on
    // and returns behind it with all registers kept.
    unsafe { asm!("hlt", options(nostack)) }
}

unsafe extern "C" {
    /// Ring-0 function of `trap.s`: reads the MSR in `rcx`.
    fn ring0_read_msr();
    /// Ring-0 function of `trap.s`: writes `rsi` to the MSR in `rcx`.
    fn ring0_write_msr();
    /// Ring-0 function of `trap.s`: returns.
    fn ring0_nothing();
    /// Ring-0 function of `trap.s`: ends the CPU by a triple fault.
    fn ring0_shut_down();
}

/// Calls a ring-0 function of `trap.s`.
fn ring0(function: unsafe extern "C" fn(), rcx: u64, rsi: u64) -> u64 {
    let result;
    // SAFETY: the functions of `trap.s` change no register but those named
    // here, and are entered with a valid ring-0 stack (TSS.RSP0).
    unsafe {
        asm!(
            "int 0x81",
            inout("rax") function as usize => result,
            in("rcx") rcx,
            in("rsi") rsi,
            out("rdx") _,
        );
    }
    let result: u64 = result;
    result
}

/// Reads a model-specific register. A register that does not exist ends the
/// guest with a trap report.
pub(crate) fn read_msr(msr: u32) -> u64 {
    ring0(ring0_read_msr, u64::from(msr), 0)
}

/// Writes a model-specific register.
///
/// # Safety
/// The register must exist, and its effect on memory must be one the program
/// expects.
pub(crate) unsafe fn write_msr(msr: u32, value: u64) {
    ring0(ring0_write_msr, u64::from(msr), value);
}

/// Goes to ring 0 and back.
pub(crate) fn visit_ring0() {
    ring0(ring0_nothing, 0, 0);
}

/// Ends the machine the way no VMM can overlook: by a triple fault.
pub(crate) fn shut_down() {
    ring0(ring0_shut_down, 0, 0);
}
