//! The registers of hardware-reduced ACPI: sleep control, sleep status, reset (ACPI 6.5, 4.8.3.7
//! and 4.8.3.6).

use std::sync::Arc;

use crate::bus::BusDevice;

/// First port of the registers.
pub const BASE_PORT: u16 = 0x600;
/// How many ports they take.
pub const PORTS: u16 = 3;
/// Sleep control register: `SLP_EN` in bit 5, the sleep type in bits 2 to 4.
pub const SLEEP_CONTROL_PORT: u16 = BASE_PORT;
/// Sleep status register.
pub const SLEEP_STATUS_PORT: u16 = BASE_PORT + 1;
/// Reset register.
pub const RESET_PORT: u16 = BASE_PORT + 2;
/// What the reset register takes.
pub const RESET_VALUE: u8 = 1;
/// The sleep type of S5 (off), as the `\_S5` object gives it.
pub const S5_SLEEP_TYPE: u8 = 5;

const SLEEP_ENABLE: u8 = 1 << 5;

/// What the guest can ask of the machine.
pub trait PowerRequests: Send + Sync {
    /// The guest resets the machine.
    fn reset(&self);
    /// The guest switches the machine off.
    fn power_off(&self);
}

/// The registers as a device.
pub struct AcpiPower {
    requests: Arc<dyn PowerRequests>,
}

impl AcpiPower {
    /// Registers that pass on what the guest asks.
    pub fn new(requests: Arc<dyn PowerRequests>) -> Self {
        Self { requests }
    }
}

impl BusDevice for AcpiPower {
    fn read(&self, _: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let &[value] = data else { return };
        let port = u64::from(BASE_PORT) + offset;
        let off = SLEEP_ENABLE | (S5_SLEEP_TYPE << 2);
        if port == u64::from(SLEEP_CONTROL_PORT) && value & 0x3c == off {
            self.requests.power_off();
        } else if port == u64::from(RESET_PORT) && value == RESET_VALUE {
            self.requests.reset();
        }
    }
}

/// Command port of an i8042, as an offset from its data port.
const I8042_COMMAND: u64 = 4;
/// "Pulse output bit 0": resets a PC.
const I8042_RESET: u8 = 0xfe;
/// Ports of an i8042, from its data port.
pub const I8042_PORTS: u16 = 5;

/// An i8042 keyboard controller that knows one command: reset.
pub struct I8042 {
    requests: Arc<dyn PowerRequests>,
}

impl I8042 {
    /// A controller that passes on the reset.
    pub fn new(requests: Arc<dyn PowerRequests>) -> Self {
        Self { requests }
    }
}

impl BusDevice for I8042 {
    fn read(&self, _: u64, data: &mut [u8]) {
        // Nothing in either buffer, so that a guest waiting for room goes on at once.
        data.fill(0);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if offset == I8042_COMMAND && data == [I8042_RESET] {
            self.requests.reset();
        }
    }
}

/// A port whose writes are dropped (a PC's diagnostic port).
pub struct Sink;

impl BusDevice for Sink {
    fn read(&self, _: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn write(&self, _: u64, _: &[u8]) {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering};

    #[derive(Default)]
    struct Count {
        resets: AtomicU32,
        offs: AtomicU32,
    }

    impl PowerRequests for Count {
        fn reset(&self) {
            self.resets.fetch_add(1, Ordering::Relaxed);
        }
        fn power_off(&self) {
            self.offs.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[test]
    fn only_the_right_values_count() {
        let count = Arc::new(Count::default());
        let acpi = AcpiPower::new(count.clone());
        for value in 0..=255u8 {
            acpi.write(0, &[value]);
            acpi.write(1, &[value]);
            acpi.write(2, &[value]);
        }
        acpi.write(0, &[0x34, 0]);
        // S5 with SLP_EN is bits 2 to 5; the other four bits do not matter.
        assert_eq!(count.offs.load(Ordering::Relaxed), 16);
        assert_eq!(count.resets.load(Ordering::Relaxed), 1);
        let keyboard = I8042::new(count.clone());
        keyboard.write(0, &[0xfe]);
        keyboard.write(4, &[0xfd]);
        assert_eq!(count.resets.load(Ordering::Relaxed), 1);
        keyboard.write(4, &[0xfe]);
        assert_eq!(count.resets.load(Ordering::Relaxed), 2);
    }
}
