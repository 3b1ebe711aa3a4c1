//! MSI-X: the vector table and the pending bit array of one function (PCI Local Bus 3.0, §6.8.2).
//!
//! A vector that may be sent has a route on its [`MsiLine`]; one that is masked (by itself, by
//! the function mask, or because MSI-X is off) has none. The line itself remembers a trigger that
//! came while it had no route, so the pending bits are what the lines say.

use std::sync::Arc;

use devices::{InterruptError, MsiLine, MsiMessage};

/// Bytes of a table entry.
const ENTRY_SIZE: u64 = 16;
/// The most vectors a function can have.
pub const MAX_VECTORS: usize = 2048;
/// Message control: MSI-X enable.
const CONTROL_ENABLE: u16 = 1 << 15;
/// Message control: function mask.
const CONTROL_FUNCTION_MASK: u16 = 1 << 14;
/// Vector control: mask bit.
const VECTOR_MASKED: u32 = 1;

/// Why an MSI-X table cannot be made, restored or used.
#[derive(Debug, thiserror::Error)]
pub enum MsixError {
    /// A function has 1 to 2048 vectors.
    #[error("{count} MSI-X vectors asked for; a function has 1 to 2048")]
    Count {
        /// How many were asked for.
        count: usize,
    },
    /// The device has no such vector.
    #[error("MSI-X vector {vector} does not exist; the device has {count}")]
    Vector {
        /// Asked for.
        vector: u16,
        /// How many there are.
        count: u16,
    },
    /// Saved by an incompatible build.
    #[error("saved MSI-X state has version {found}, this build reads {wanted}")]
    Version {
        /// In the state.
        found: u16,
        /// Understood here.
        wanted: u16,
    },
    /// The saved table is of another size.
    #[error(
        "saved MSI-X state has {saved} vectors, the device here has {here}: configure the same \
         number of queues on both ends"
    )]
    Size {
        /// In the state.
        saved: usize,
        /// Of this device.
        here: usize,
    },
    /// The interrupt line refused.
    #[error("MSI-X vector {vector}")]
    Line {
        /// Which vector.
        vector: u16,
        /// Why.
        #[source]
        cause: InterruptError,
    },
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, serde::Serialize, serde::Deserialize)]
struct Entry {
    message: MsiMessage,
    control: u32,
}

/// Saved MSI-X state. Untrusted when it comes back.
#[derive(Clone, PartialEq, Eq, Debug, serde::Serialize, serde::Deserialize)]
pub struct MsixState {
    version: u16,
    control: u16,
    entries: Vec<Entry>,
    /// Indices of vectors with a trigger that waits.
    pending: Vec<u16>,
}

const STATE_VERSION: u16 = 1;

/// MSI-X of one function.
///
/// The owner forwards BAR accesses to the table and the pending bit array, and calls
/// [`set_control`](Self::set_control) after each configuration write.
pub struct Msix {
    lines: Vec<Arc<dyn MsiLine>>,
    entries: Vec<Entry>,
    control: u16,
}

impl std::fmt::Debug for Msix {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Msix")
            .field("control", &self.control)
            .field("entries", &self.entries)
            .finish_non_exhaustive()
    }
}

impl Msix {
    /// A table over `lines`, one vector each, all masked and MSI-X off.
    ///
    /// # Errors
    /// [`MsixError::Count`].
    pub fn new(lines: Vec<Arc<dyn MsiLine>>) -> Result<Self, MsixError> {
        let count = lines.len();
        if !(1..=MAX_VECTORS).contains(&count) {
            return Err(MsixError::Count { count });
        }
        let entry = Entry {
            message: MsiMessage {
                address: 0,
                data: 0,
            },
            control: VECTOR_MASKED,
        };
        Ok(Self {
            lines,
            entries: vec![entry; count],
            control: 0,
        })
    }

    /// Number of vectors, 1 to 2048.
    pub fn vectors(&self) -> u16 {
        u16::try_from(self.lines.len()).unwrap_or(u16::MAX)
    }

    /// Bytes of a table of `vectors`.
    pub const fn table_bytes(vectors: u16) -> u64 {
        // A u16 widens without loss; `from` is not const.
        vectors as u64 * ENTRY_SIZE
    }

    /// Bytes of a pending bit array of `vectors`: 64-bit words.
    pub const fn pending_bytes(vectors: u16) -> u64 {
        (vectors as u64).div_ceil(64) * 8
    }

    /// The line of `vector`, for the worker that triggers it.
    pub fn line(&self, vector: u16) -> Option<&Arc<dyn MsiLine>> {
        self.lines.get(usize::from(vector))
    }

    /// Whether the guest has switched MSI-X on.
    pub fn is_enabled(&self) -> bool {
        self.control & CONTROL_ENABLE != 0
    }

    /// Signals `vector`; while it is masked the signal stays pending.
    ///
    /// # Errors
    /// No such vector, or the line's error.
    pub fn trigger(&self, vector: u16) -> Result<(), MsixError> {
        let line = self.line(vector).ok_or(MsixError::Vector {
            vector,
            count: self.vectors(),
        })?;
        line.trigger()
            .map_err(|cause| MsixError::Line { vector, cause })
    }

    /// Takes the message control register after a configuration write. Cheap if the enable and
    /// function-mask bits are as before.
    pub fn set_control(&mut self, control: u16) {
        let control = control & (CONTROL_ENABLE | CONTROL_FUNCTION_MASK);
        if control != self.control {
            self.control = control;
            for vector in 0..self.vectors() {
                self.route_or_log(vector);
            }
        }
    }

    /// Serves a guest read of the table. What lies outside reads as all ones.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        for (at, byte) in positions(offset).zip(data.iter_mut()) {
            let entry = index(at, ENTRY_SIZE).and_then(|i| self.entries.get(i));
            if let Some(entry) = entry {
                *byte = nth_byte(&entry.bytes(), at % ENTRY_SIZE);
            }
        }
    }

    /// Serves a guest write to the table, of one dword or an aligned qword (other sizes are
    /// dropped, as the specification leaves them undefined).
    pub fn write_table(&mut self, offset: u64, data: &[u8]) {
        let length = match data.len() {
            4 => 4,
            8 => 8,
            _ => return,
        };
        if !offset.is_multiple_of(length) {
            return;
        }
        let Some(vector) = index(offset, ENTRY_SIZE) else {
            return;
        };
        let Some(entry) = self.entries.get_mut(vector) else {
            return;
        };
        let mut bytes = entry.bytes();
        let at = usize::try_from(offset % ENTRY_SIZE).unwrap_or(0);
        for (to, from) in bytes.iter_mut().skip(at).zip(data) {
            *to = *from;
        }
        let new = Entry::from_bytes(&bytes);
        if new != *entry {
            *entry = new;
            if let Ok(vector) = u16::try_from(vector) {
                self.route_or_log(vector);
            }
        }
    }

    /// Serves a guest read of the pending bit array. Writes to it are ignored.
    pub fn read_pending(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        for (at, byte) in positions(offset).zip(data.iter_mut()) {
            if at >= Self::pending_bytes(self.vectors()) {
                continue;
            }
            let Some(first) = index(at, 1).and_then(|i| i.checked_mul(8)) else {
                continue;
            };
            let lines = self.lines.iter().skip(first).take(8);
            *byte = lines.zip(0..8_u32).fold(0, |bits, (line, bit)| {
                bits | (u8::from(line.is_pending()) << bit)
            });
        }
    }

    /// Masks everything and switches MSI-X off, as a function-level reset does.
    pub fn reset(&mut self) {
        self.control = 0;
        for entry in &mut self.entries {
            entry.control = VECTOR_MASKED;
        }
        for vector in 0..self.vectors() {
            self.route_or_log(vector);
        }
    }

    /// The state for a migration, of a paused device. Triggers that wait are in it.
    pub fn save(&self) -> MsixState {
        let pending = (0..self.vectors())
            .zip(&self.lines)
            .filter(|(_, line)| line.is_pending())
            .map(|(vector, _)| vector)
            .collect();
        MsixState {
            version: STATE_VERSION,
            control: self.control,
            entries: self.entries.clone(),
            pending,
        }
    }

    /// Takes over saved state: routes what is unmasked and triggers what was pending (delivered
    /// at once if unmasked). Nothing changes if the state does not fit.
    ///
    /// # Errors
    /// State of another version or size, or a line that refuses.
    pub fn restore(&mut self, state: &MsixState) -> Result<(), MsixError> {
        if state.version != STATE_VERSION {
            return Err(MsixError::Version {
                found: state.version,
                wanted: STATE_VERSION,
            });
        }
        let count = self.vectors();
        if state.entries.len() != self.entries.len() {
            return Err(MsixError::Size {
                saved: state.entries.len(),
                here: self.entries.len(),
            });
        }
        if let Some(&vector) = state.pending.iter().find(|vector| **vector >= count) {
            return Err(MsixError::Vector { vector, count });
        }
        self.control = state.control & (CONTROL_ENABLE | CONTROL_FUNCTION_MASK);
        self.entries.clone_from(&state.entries);
        for vector in 0..count {
            self.route(vector)
                .map_err(|cause| MsixError::Line { vector, cause })?;
        }
        for vector in &state.pending {
            self.trigger(*vector)?;
        }
        Ok(())
    }

    fn route(&self, vector: u16) -> Result<(), InterruptError> {
        let index = usize::from(vector);
        let (Some(line), Some(entry)) = (self.lines.get(index), self.entries.get(index)) else {
            return Ok(());
        };
        let masked = entry.control & VECTOR_MASKED != 0
            || self.control & CONTROL_FUNCTION_MASK != 0
            || !self.is_enabled();
        line.route((!masked).then_some(entry.message))
    }

    /// A guest's table write has no way to fail; what the host could not do goes to the log.
    fn route_or_log(&self, vector: u16) {
        if let Err(error) = self.route(vector) {
            tracing::error!(vector, %error, cause = ?error, "MSI-X vector could not be routed");
        }
    }
}

impl Entry {
    fn bytes(&self) -> [u8; 16] {
        let value = u128::from(self.message.address)
            | (u128::from(self.message.data) << 64)
            | (u128::from(self.control) << 96);
        value.to_le_bytes()
    }

    fn from_bytes(bytes: &[u8; 16]) -> Self {
        let [
            a0,
            a1,
            a2,
            a3,
            a4,
            a5,
            a6,
            a7,
            d0,
            d1,
            d2,
            d3,
            c0,
            c1,
            c2,
            c3,
        ] = *bytes;
        Self {
            message: MsiMessage {
                address: u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]),
                data: u32::from_le_bytes([d0, d1, d2, d3]),
            },
            control: u32::from_le_bytes([c0, c1, c2, c3]),
        }
    }
}

/// `offset` and what follows it, ending with the address space.
fn positions(offset: u64) -> impl Iterator<Item = u64> {
    (0..).map_while(move |n| offset.checked_add(n))
}

fn index(offset: u64, size: u64) -> Option<usize> {
    usize::try_from(offset / size).ok()
}

fn nth_byte(bytes: &[u8; 16], n: u64) -> u8 {
    usize::try_from(n)
        .ok()
        .and_then(|n| bytes.get(n).copied())
        .unwrap_or(0xff)
}

#[cfg(test)]
mod tests;
