//! Hot plug: the registers by which the guest is told of devices that came or shall go, and by
//! which it ejects.
//!
//! The bus is flat, with no bridge above a device, so there are no slots of PCI Express that the
//! guest's `pciehp` could drive. ACPI drives them instead, which works for any bus (ACPI 6.5, 6.3):
//! an interrupt makes the guest run a method, which reads the registers here and notifies the
//! slots named there; the slots' `_EJ0` writes the register of ejects. The methods are the VMM's.
//!
//! | offset | register of 32 bits, bit *n* for slot *n* | access |
//! |---|---|---|
//! | 0 | a device came | write 1 to clear |
//! | 4 | the device shall go | write 1 to clear |
//! | 8 | eject | write 1 to eject; reads as 0 |
//!
//! The guest clears a bit when it has taken note, so that no request is lost between its read and
//! the next one. Other accesses than of one whole register have no effect, and read as all ones.
//!
//! # The way out
//! A device goes by steps: it is [asked for](HotPlug::ask) (unless the guest acts by itself); the
//! guest ejects it, from which on it finds nothing in the slot; the VMM, told of that, takes the
//! device [away](HotPlug::freed), at once or, if it must not change now (a migration), later.
//! Nothing is taken from under a guest that does not eject.

use std::sync::Arc;

use devices::{BusDevice, InterruptError, IrqLine};
use parking_lot::Mutex;

use crate::bus::{PciBus, SLOTS};

/// Offsets of the registers.
const CAME: u64 = 0;
const GOES: u64 = 4;
const EJECT: u64 = 8;

/// Why hot plug cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum HotPlugError {
    /// The device is none that can be ejected.
    #[error("the device in PCI slot {slot} is part of the machine and cannot be unplugged")]
    Fixed {
        /// Its slot.
        slot: u8,
    },
    /// The guest could not be interrupted.
    #[error("cannot interrupt the guest about PCI slot {slot}: ask again")]
    Interrupt {
        /// The slot it is about.
        slot: u8,
        /// Why.
        #[source]
        cause: InterruptError,
    },
    /// Saved by an incompatible build.
    #[error("saved hot-plug registers have version {found}, this build reads {wanted}")]
    Version {
        /// In the state.
        found: u16,
        /// Understood here.
        wanted: u16,
    },
}

const STATE_VERSION: u16 = 1;

/// Saved registers. Untrusted when they come back.
#[derive(Clone, Copy, PartialEq, Eq, Debug, serde::Serialize, serde::Deserialize)]
pub struct HotPlugState {
    version: u16,
    came: u32,
    goes: u32,
    asked: u32,
    ejected: u32,
}

/// Sets of slots, bit *n* for slot *n*.
#[derive(Default)]
struct Slots {
    /// The device in it can be ejected.
    ejectable: u32,
    /// A device came, and the guest has not taken note.
    came: u32,
    /// The device shall go, and the guest has not taken note.
    goes: u32,
    /// The device shall go, and the guest has not ejected it.
    asked: u32,
    /// The guest ejected the device, which is not taken away yet.
    ejected: u32,
}

/// The registers, as a device of an address space.
pub struct HotPlug {
    bus: Arc<PciBus>,
    line: Arc<dyn IrqLine>,
    on_eject: Box<dyn Fn() + Send + Sync>,
    slots: Mutex<Slots>,
}

const fn bit(slot: u8) -> u32 {
    // No slot is as high as 32; one that were would be no bit.
    match 1_u32.checked_shl(slot as u32) {
        Some(bit) => bit,
        None => 0,
    }
}

fn numbers(set: u32) -> Vec<u8> {
    (0..SLOTS).filter(|slot| set & bit(*slot) != 0).collect()
}

impl HotPlug {
    /// Ports or bytes of the registers.
    pub const BYTES: u64 = 12;

    /// Registers for the slots of `bus`. The guest is interrupted by `line`; `on_eject` is told on
    /// a vCPU's thread that there is something in [`ejected`](Self::ejected), and must not block.
    pub fn new(
        bus: Arc<PciBus>,
        line: Arc<dyn IrqLine>,
        on_eject: Box<dyn Fn() + Send + Sync>,
    ) -> Arc<Self> {
        Arc::new(Self {
            bus,
            line,
            on_eject,
            slots: Mutex::default(),
        })
    }

    /// The device in `slot`, which was there before the guest, may be ejected.
    pub fn manage(&self, slot: u8) {
        self.slots.lock().ejectable |= bit(slot);
    }

    /// A device came into `slot`: it may be ejected, and the guest is told.
    ///
    /// # Errors
    /// [`HotPlugError::Interrupt`]; the guest learns of it with the next interrupt.
    pub fn announce(&self, slot: u8) -> Result<(), HotPlugError> {
        {
            let mut slots = self.slots.lock();
            slots.ejectable |= bit(slot);
            slots.came |= bit(slot);
        }
        self.interrupt(slot)
    }

    /// The device in `slot` shall go: the guest is asked to eject it, again if it was before.
    ///
    /// # Errors
    /// [`HotPlugError::Fixed`]; [`HotPlugError::Interrupt`], then the guest learns of it with the
    /// next interrupt.
    pub fn ask(&self, slot: u8) -> Result<(), HotPlugError> {
        {
            let mut slots = self.slots.lock();
            if slots.ejectable & bit(slot) == 0 {
                return Err(HotPlugError::Fixed { slot });
            }
            if slots.ejected & bit(slot) != 0 {
                return Ok(());
            }
            slots.goes |= bit(slot);
            slots.asked |= bit(slot);
        }
        self.interrupt(slot)
    }

    fn interrupt(&self, slot: u8) -> Result<(), HotPlugError> {
        self.line
            .trigger()
            .map_err(|cause| HotPlugError::Interrupt { slot, cause })
    }

    /// The slots whose device the guest was asked to eject, and did not yet.
    pub fn asked(&self) -> Vec<u8> {
        numbers(self.slots.lock().asked)
    }

    /// The slots whose device the guest has ejected, to be taken away.
    pub fn ejected(&self) -> Vec<u8> {
        numbers(self.slots.lock().ejected)
    }

    /// The device of `slot` was taken away: the slot is free.
    pub fn freed(&self, slot: u8) {
        let mut slots = self.slots.lock();
        let slots = &mut *slots;
        for set in [
            &mut slots.ejectable,
            &mut slots.came,
            &mut slots.goes,
            &mut slots.asked,
            &mut slots.ejected,
        ] {
            *set &= !bit(slot);
        }
    }

    /// The guest ejects the devices of `set`.
    fn eject(&self, set: u32) {
        {
            let mut slots = self.slots.lock();
            let new = set & slots.ejectable & !slots.ejected;
            if new == 0 {
                return;
            }
            // Under the lock: once a slot is in the set its device may be taken away and another
            // put there.
            for slot in numbers(new) {
                self.bus.hide(slot);
            }
            slots.ejected |= new;
            slots.came &= !new;
            slots.goes &= !new;
            slots.asked &= !new;
        }
        (self.on_eject)();
    }

    /// The registers' state.
    pub fn save(&self) -> HotPlugState {
        let slots = self.slots.lock();
        HotPlugState {
            version: STATE_VERSION,
            came: slots.came,
            goes: slots.goes,
            asked: slots.asked,
            ejected: slots.ejected,
        }
    }

    /// Takes over saved registers, of a bus with the same devices in the same slots. The guest is
    /// interrupted if there is anything for it, as nobody knows whether it was.
    ///
    /// # Errors
    /// [`HotPlugError::Version`], [`HotPlugError::Interrupt`].
    pub fn restore(&self, state: &HotPlugState) -> Result<(), HotPlugError> {
        if state.version != STATE_VERSION {
            return Err(HotPlugError::Version {
                found: state.version,
                wanted: STATE_VERSION,
            });
        }
        let waits = {
            let mut slots = self.slots.lock();
            // Slots that hold nothing which can be ejected cannot be in any of the sets.
            let ours = slots.ejectable;
            slots.ejected = state.ejected & ours;
            let here = ours & !slots.ejected;
            slots.came = state.came & here;
            slots.goes = state.goes & here;
            slots.asked = state.asked & here;
            for slot in numbers(slots.ejected) {
                self.bus.hide(slot);
            }
            slots.came | slots.goes
        };
        match numbers(waits).first() {
            Some(slot) => self.interrupt(*slot),
            None => Ok(()),
        }
    }
}

impl BusDevice for HotPlug {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let Ok(register) = <&mut [u8; 4]>::try_from(&mut *data) else {
            return data.fill(0xff);
        };
        let slots = self.slots.lock();
        let value = match offset {
            CAME => slots.came,
            GOES => slots.goes,
            EJECT => 0,
            _ => u32::MAX,
        };
        *register = value.to_le_bytes();
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let Ok(register) = <[u8; 4]>::try_from(data) else {
            return;
        };
        let value = u32::from_le_bytes(register);
        match offset {
            CAME => self.slots.lock().came &= !value,
            GOES => self.slots.lock().goes &= !value,
            EJECT => self.eject(value),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests;
