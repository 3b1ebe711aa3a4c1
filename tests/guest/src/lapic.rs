//! The local interrupt controller, in its memory-mapped (xAPIC) form.

use crate::mmio::Mmio;
use crate::traps::{SELF, TIMER};

// SAFETY: the architecture's default place, mapped by `boot.s`.
const LAPIC: Mmio = unsafe { Mmio::new(0xfee0_0000, 0x1000) };

const TASK_PRIORITY: u64 = 0x80;
const SPURIOUS: u64 = 0xf0;
const COMMAND_LOW: u64 = 0x300;
const COMMAND_HIGH: u64 = 0x310;
const TIMER_ENTRY: u64 = 0x320;
const TIMER_COUNT: u64 = 0x380;
const TIMER_DIVIDE: u64 = 0x3e0;

const SOFTWARE_ENABLE: u32 = 0x1ff;
const PERIODIC: u32 = 1 << 17;
const DIVIDE_BY_1: u32 = 0xb;
const TO_SELF: u32 = 1 << 18;
const INIT: u32 = 0x4500;
const START_UP: u32 = 0x4600;
/// Bus cycles per microsecond: KVM's and QEMU's LAPIC timers run at 1 GHz.
const BUS_MHZ: u32 = 1000;

/// Turns this CPU's controller on; all vectors may come.
pub(crate) fn enable() {
    LAPIC.write(SPURIOUS, SOFTWARE_ENABLE);
    LAPIC.write(TASK_PRIORITY, 0u32);
}

/// Interrupts this CPU every `us` microseconds.
pub(crate) fn start_timer(us: u32) {
    LAPIC.write(TIMER_DIVIDE, DIVIDE_BY_1);
    LAPIC.write(TIMER_ENTRY, u32::from(TIMER) | PERIODIC);
    LAPIC.write(TIMER_COUNT, us.saturating_mul(BUS_MHZ));
}

/// Stops the timer.
pub(crate) fn stop_timer() {
    LAPIC.write(TIMER_COUNT, 0u32);
}

/// Interrupts this CPU once.
pub(crate) fn interrupt_self() {
    LAPIC.write(COMMAND_LOW, u32::from(SELF) | TO_SELF);
}

/// Puts another CPU into its initial state.
pub(crate) fn send_init(cpu: u8) {
    LAPIC.write(COMMAND_HIGH, u32::from(cpu) << 24);
    LAPIC.write(COMMAND_LOW, INIT);
}

/// Starts another CPU in real mode at `page * 4096`.
pub(crate) fn send_start_up(cpu: u8, page: u8) {
    LAPIC.write(COMMAND_HIGH, u32::from(cpu) << 24);
    LAPIC.write(COMMAND_LOW, START_UP | u32::from(page));
}
