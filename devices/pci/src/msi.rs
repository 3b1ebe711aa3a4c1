//! MSI of one function that is passed through (PCI Local Bus 3.0, §6.8.1).
//!
//! The registers are those of the function's capability, in its [`ConfigSpace`]; here are the routes
//! that follow from them. As with MSI-X, a vector that may be sent has a route on its [`MsiLine`],
//! and the line remembers a trigger that came while it had none.

use std::sync::Arc;

use devices::{InterruptError, MsiLine, MsiMessage};

use crate::config::{ConfigError, ConfigSpace};

/// Message control: MSI enable.
const ENABLE: u16 = 1;
/// Message control: log2 of the vectors that the function asks for.
const CAPABLE_SHIFT: u16 = 1;
/// Message control: log2 of the vectors that the guest gives it.
const GIVEN_SHIFT: u16 = 4;
/// Message control: the bits of either.
const COUNT_MASK: u16 = 7;
/// Message control: the address has 64 bits.
const WIDE: u16 = 1 << 7;
/// Message control: vectors can be masked one by one.
const MASKABLE: u16 = 1 << 8;
/// log2 of the most vectors there can be.
const MOST_LOG2: u16 = 5;

/// Where the registers of a capability are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MsiRegisters {
    at: u16,
    wide: bool,
    maskable: bool,
    /// Vectors that the function asks for.
    vectors: u16,
}

impl MsiRegisters {
    /// Those of the capability at `at`.
    pub fn new(config: &ConfigSpace, at: u16) -> Self {
        let control = config.u16(at.saturating_add(2));
        let capable = (control >> CAPABLE_SHIFT & COUNT_MASK).min(MOST_LOG2);
        Self {
            at,
            wide: control & WIDE != 0,
            maskable: control & MASKABLE != 0,
            vectors: 1 << capable,
        }
    }

    /// Vectors that the function asks for, 1 to 32.
    pub const fn vectors(&self) -> u16 {
        self.vectors
    }

    /// Bytes of the capability.
    pub const fn len(&self) -> u16 {
        let masks = if self.maskable { 10 } else { 0 };
        // Two bytes of nothing stand between the data and the masks.
        let data = self.data() + 2;
        data + masks
    }

    /// A capability has bytes.
    pub const fn is_empty(&self) -> bool {
        false
    }

    /// Offset of the data in the capability.
    const fn data(&self) -> u16 {
        if self.wide { 12 } else { 8 }
    }

    fn control(&self, config: &ConfigSpace) -> u16 {
        config.u16(self.at.saturating_add(2))
    }

    fn message(&self, config: &ConfigSpace) -> MsiMessage {
        let low = u64::from(config.u32(self.at.saturating_add(4)));
        let high = match self.wide {
            true => u64::from(config.u32(self.at.saturating_add(8))),
            false => 0,
        };
        MsiMessage {
            address: low | high << 32,
            data: u32::from(config.u16(self.at.saturating_add(self.data()))),
        }
    }

    fn masks(&self, config: &ConfigSpace) -> u32 {
        match self.maskable {
            true => config.u32(self.at.saturating_add(self.data() + 4)),
            false => 0,
        }
    }
}

/// MSI of one function.
pub struct Msi {
    registers: MsiRegisters,
    lines: Vec<Arc<dyn MsiLine>>,
}

impl Msi {
    /// MSI with one line for each vector that the function asks for. The registers become the
    /// guest's to write.
    ///
    /// # Errors
    /// [`ConfigError`] if the capability does not lie in configuration space.
    pub fn new(
        registers: MsiRegisters,
        lines: Vec<Arc<dyn MsiLine>>,
        config: &mut ConfigSpace,
    ) -> Result<Self, ConfigError> {
        let at = registers.at;
        let data = registers.data();
        // What is in the image is how the function was left, not how it comes out of a reset.
        let control = registers.control(config) & !(ENABLE | COUNT_MASK << GIVEN_SHIFT);
        config.set_bytes(at.saturating_add(2), &control.to_le_bytes())?;
        let registers_len = usize::from(registers.len() - 4);
        config.set_bytes(at.saturating_add(4), &vec![0; registers_len])?;
        config.set_writable(
            at.saturating_add(2),
            &(ENABLE | COUNT_MASK << GIVEN_SHIFT).to_le_bytes(),
        )?;
        config.set_writable(at.saturating_add(4), &0xffff_fffc_u32.to_le_bytes())?;
        if registers.wide {
            config.set_writable(at.saturating_add(8), &[0xff; 4])?;
        }
        config.set_writable(at.saturating_add(data), &[0xff; 2])?;
        if registers.maskable {
            config.set_writable(at.saturating_add(data + 4), &[0xff; 4])?;
        }
        Ok(Self { registers, lines })
    }

    /// How many vectors the guest has switched on, if any.
    pub fn enabled(&self, config: &ConfigSpace) -> Option<u16> {
        let control = self.registers.control(config);
        let given = (control >> GIVEN_SHIFT & COUNT_MASK).min(MOST_LOG2);
        (control & ENABLE != 0).then(|| (1 << given).min(self.registers.vectors))
    }

    /// Routes each vector as the registers say, after they changed. Cheap if they did not.
    pub fn follow(&self, config: &ConfigSpace) {
        for (vector, line) in (0_u16..).zip(&self.lines) {
            if let Err(error) = line.route(self.route(config, vector)) {
                tracing::error!(vector, %error, cause = ?error, "MSI vector could not be routed");
            }
        }
    }

    /// What is sent for a vector; `None` while it may not be.
    fn route(&self, config: &ConfigSpace, vector: u16) -> Option<MsiMessage> {
        let count = self.enabled(config)?;
        let masked = self.registers.masks(config) & 1_u32.checked_shl(u32::from(vector))? != 0;
        if vector >= count || masked {
            return None;
        }
        let message = self.registers.message(config);
        // The function puts the vector's number into the lowest bits of the data.
        let data = message.data & !u32::from(count - 1) | u32::from(vector);
        Some(MsiMessage { data, ..message })
    }

    /// Shows in the pending register which vectors have a trigger that waits.
    ///
    /// # Errors
    /// [`ConfigError`] if the capability does not lie in configuration space.
    pub fn show_pending(&self, config: &mut ConfigSpace) -> Result<(), ConfigError> {
        let pending = self.pending().into_iter();
        self.set_pending(config, pending.fold(0, |bits, vector| bits | 1 << vector))
    }

    /// Clears the pending register, which is not part of saved registers.
    ///
    /// # Errors
    /// [`ConfigError`] if the capability does not lie in configuration space.
    pub fn hide_pending(&self, config: &mut ConfigSpace) -> Result<(), ConfigError> {
        self.set_pending(config, 0)
    }

    fn set_pending(&self, config: &mut ConfigSpace, bits: u32) -> Result<(), ConfigError> {
        if !self.registers.maskable {
            return Ok(());
        }
        let at = self.registers.at.saturating_add(self.registers.data() + 8);
        config.set_bytes(at, &bits.to_le_bytes())
    }

    /// The vectors with a trigger that waits, for a migration.
    pub fn pending(&self) -> Vec<u16> {
        (0_u16..32)
            .zip(&self.lines)
            .filter(|(_, line)| line.is_pending())
            .map(|(vector, _)| vector)
            .collect()
    }

    /// Triggers what was pending where it was saved; numbers that do not exist are dropped.
    ///
    /// # Errors
    /// A line's.
    pub fn restore_pending(&self, pending: &[u16]) -> Result<(), InterruptError> {
        for vector in pending {
            if let Some(line) = self.lines.get(usize::from(*vector)) {
                line.trigger()?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
