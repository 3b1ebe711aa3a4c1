//! How the guest ends.

use guest_logic::args::Args;

use crate::cpu::{halt, outb, outw, shut_down, tsc};
use crate::serial::flush;

/// QEMU's q35 and pc: PM1a control, SLP_EN with sleep type 0.
const DEFAULT_PORT: u64 = 0x604;
const DEFAULT_VALUE: u64 = 0x2000;
const I8042_COMMAND: u16 = 0x64;
const I8042_RESET: u8 = 0xfe;
/// How long each way may take before the next is tried, in TSC cycles.
const PATIENCE: u64 = 1_000_000_000;

/// Says everything queued, then powers the machine off: `poweroff_value` to
/// `poweroff_port` (one byte when it fits in one, else two), and a keyboard
/// controller reset for machines that have no such port.
pub(crate) fn off(args: &Args<'_>) -> ! {
    flush();
    let port = u16::try_from(args.number("poweroff_port", DEFAULT_PORT)).unwrap_or(0x604);
    let value = args.number("poweroff_value", DEFAULT_VALUE);
    match (u8::try_from(value), u16::try_from(value)) {
        (Ok(byte), _) => outb(port, byte),
        (_, Ok(word)) => outw(port, word),
        _ => {}
    }
    wait();
    outb(I8042_COMMAND, I8042_RESET);
    wait();
    shut_down();
    park()
}

fn wait() {
    let asked = tsc();
    while tsc().wrapping_sub(asked) < PATIENCE {
        core::hint::spin_loop();
    }
}

/// Does nothing, for ever.
pub(crate) fn park() -> ! {
    loop {
        halt();
    }
}
