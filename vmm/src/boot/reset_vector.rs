//! Where a PC's processor begins after a reset, and where guests jump to be reset.
//!
//! Linux takes hardware-reduced ACPI for a sign that the firmware is UEFI, and resets by its
//! runtime services instead of the reset register; where there are none it returns to real mode and
//! jumps here, to firmware that is to start afresh. Here is no firmware, so this code asks for
//! the reset.

use vm_migration::memory::GuestMemory;

use super::{BootError, write};
use crate::layout;

/// Puts the code there.
pub(super) fn write_reset_vector(memory: &GuestMemory) -> Result<(), BootError> {
    write(
        memory,
        "reset vector",
        layout::RESET_VECTOR,
        &reset_code(devices::acpi::RESET_PORT, devices::acpi::RESET_VALUE),
    )
}

/// Real-mode code that writes `value` to `port` and stops.
fn reset_code(port: u16, value: u8) -> [u8; 9] {
    let [low, high] = port.to_le_bytes();
    [
        0xba, low, high, // mov dx, port
        0xb0, value, // mov al, value
        0xee,  // out dx, al
        0xf4,  // hlt
        0xeb, 0xfd, // jmp to the hlt
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn port_and_value_are_where_the_instructions_have_them() {
        let code = reset_code(0x602, 1);
        assert_eq!(code, *b"\xba\x02\x06\xb0\x01\xee\xf4\xeb\xfd");
    }
}
