//! The bus: which device is in which slot, and where its BARs are mapped now.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use parking_lot::{Mutex, RwLock};

use crate::config::{ConfigError, ConfigState, command, offset};
use crate::device::{BarInfo, BarKind};
use crate::{BarMapper, HostBridge, SharedDevice};

/// Device numbers of a bus.
pub const SLOTS: u8 = 32;
/// Longest device identifier in saved state.
const MAX_ID: usize = 256;

/// Why a device cannot be put on the bus, or the bus not restored.
#[derive(Debug, thiserror::Error)]
pub enum PciBusError {
    /// All 32 slots are taken.
    #[error("no free PCI slot for device {id}: a bus has 32 slots")]
    Full {
        /// The device.
        id: String,
    },
    /// The slot does not exist or is taken.
    #[error("PCI slot {slot} is taken or does not exist; device {id} cannot be put there")]
    Taken {
        /// Asked-for slot.
        slot: u8,
        /// The device.
        id: String,
    },
    /// Two devices would have one identifier.
    #[error("there is a device {id} already, in PCI slot {slot}")]
    Duplicate {
        /// The identifier.
        id: String,
        /// Where the first is.
        slot: u8,
    },
    /// Saved by an incompatible build.
    #[error("saved PCI bus has version {found}, this build reads {wanted}")]
    Version {
        /// In the state.
        found: u16,
        /// Understood here.
        wanted: u16,
    },
    /// The saved bus has another device in a slot.
    #[error(
        "PCI slot {slot} has {saved:?} in the saved state and {here:?} here: give both VMs the \
         same devices in the same order"
    )]
    Layout {
        /// Which slot.
        slot: u8,
        /// Device in the state.
        saved: Option<String>,
        /// Device here.
        here: Option<String>,
    },
    /// The host bridge's state does not fit.
    #[error("state of the PCI host bridge")]
    Bridge(#[source] ConfigError),
}

/// Saved state of the bus itself. Untrusted when it comes back.
#[derive(Clone, PartialEq, Eq, Debug, serde::Serialize, serde::Deserialize)]
pub struct PciBusState {
    version: u16,
    /// The address latch of port 0xCF8.
    address: u32,
    bridge: ConfigState,
    /// Which device is in which slot.
    devices: Vec<(u8, String)>,
}

const STATE_VERSION: u16 = 1;

struct Slot {
    device: SharedDevice,
    /// Held for the whole of a configuration write, so that mappings follow in the same order.
    mapped: Mutex<Vec<BarInfo>>,
    /// The guest finds nothing here. Never taken back; set with `mapped` held, so that no write
    /// which is under way maps a BAR after that.
    hidden: AtomicBool,
}

impl Slot {
    fn new(device: SharedDevice) -> Arc<Self> {
        Arc::new(Self {
            device,
            mapped: Mutex::default(),
            hidden: AtomicBool::new(false),
        })
    }

    fn is_hidden(&self) -> bool {
        self.hidden.load(Ordering::Relaxed)
    }
}

/// Bus 0 of the machine, with its host bridge in slot 0. Each device is function 0 of its slot.
pub struct PciBus {
    slots: RwLock<Vec<Option<Arc<Slot>>>>,
    bridge: Arc<Mutex<HostBridge>>,
    mapper: Arc<dyn BarMapper>,
    /// What the guest wrote to port 0xCF8.
    pub(crate) address: AtomicU32,
}

impl PciBus {
    /// A bus with nothing but its host bridge. BARs are mapped by `mapper`.
    pub fn new(mapper: Arc<dyn BarMapper>) -> Arc<Self> {
        let bridge = Arc::new(Mutex::new(HostBridge::new()));
        let mut slots = vec![Some(Slot::new(bridge.clone()))];
        slots.resize_with(usize::from(SLOTS), || None);
        Arc::new(Self {
            slots: RwLock::new(slots),
            bridge,
            mapper,
            address: AtomicU32::new(0),
        })
    }

    /// Puts `device` into the lowest free slot, which is returned.
    ///
    /// # Errors
    /// [`PciBusError::Full`], [`PciBusError::Duplicate`].
    pub fn add(&self, device: SharedDevice) -> Result<u8, PciBusError> {
        self.place(None, device)
    }

    /// Puts `device` into `slot`.
    ///
    /// # Errors
    /// [`PciBusError::Taken`], [`PciBusError::Duplicate`].
    pub fn add_at(&self, slot: u8, device: SharedDevice) -> Result<(), PciBusError> {
        self.place(Some(slot), device).map(|_| ())
    }

    fn place(&self, wanted: Option<u8>, device: SharedDevice) -> Result<u8, PciBusError> {
        let id = device.lock().id().to_owned();
        // Named before the lock on the slots is taken: a device's mutex comes first.
        if let Some(slot) = self.slot_of(&id) {
            return Err(PciBusError::Duplicate { id, slot });
        }
        let entry = Slot::new(device);
        let slot = {
            let mut slots = self.slots.write();
            let mut free = (0..SLOTS).zip(slots.iter_mut()).filter(|(number, held)| {
                held.is_none() && wanted.is_none_or(|wanted| wanted == *number)
            });
            match (free.next(), wanted) {
                (Some((number, held)), _) => {
                    *held = Some(Arc::clone(&entry));
                    number
                }
                (None, Some(slot)) => return Err(PciBusError::Taken { slot, id }),
                (None, None) => return Err(PciBusError::Full { id }),
            }
        };
        self.reconcile(&entry, &mut entry.mapped.lock());
        Ok(slot)
    }

    /// Takes the device out of `slot` and unmaps its BARs. The host bridge stays.
    pub fn remove(&self, slot: u8) -> Option<SharedDevice> {
        if slot == 0 {
            return None;
        }
        let entry = self.slots.write().get_mut(usize::from(slot))?.take()?;
        self.conceal(&entry);
        Some(Arc::clone(&entry.device))
    }

    /// From now on the guest finds nothing in `slot`, as if the device were gone; it is still
    /// there for the VMM, and in the bus's state. The host bridge stays.
    pub fn hide(&self, slot: u8) {
        if let Some(entry) = self.slot(slot).filter(|_| slot != 0) {
            self.conceal(&entry);
        }
    }

    fn conceal(&self, entry: &Slot) {
        let mut mapped = entry.mapped.lock();
        entry.hidden.store(true, Ordering::Relaxed);
        self.reconcile(entry, &mut mapped);
    }

    /// The device in `slot`.
    pub fn device(&self, slot: u8) -> Option<SharedDevice> {
        self.slot(slot).map(|entry| Arc::clone(&entry.device))
    }

    /// All devices with their slots, the host bridge first.
    pub fn devices(&self) -> Vec<(u8, SharedDevice)> {
        self.entries()
            .into_iter()
            .map(|(slot, entry)| (slot, Arc::clone(&entry.device)))
            .collect()
    }

    /// Where the device called `id` is.
    pub fn slot_of(&self, id: &str) -> Option<u8> {
        let found = self
            .entries()
            .into_iter()
            .find(|(_, entry)| entry.device.lock().id() == id);
        found.map(|(slot, _)| slot)
    }

    /// Serves a configuration read of at most a dword, within one dword. Absent devices read as
    /// all ones.
    pub fn read_config(&self, slot: u8, offset: u16, data: &mut [u8]) {
        match self.slot(slot).filter(|entry| !entry.is_hidden()) {
            Some(entry) => entry.device.lock().read_config(offset, data),
            None => data.fill(0xff),
        }
    }

    /// Serves a configuration write of at most a dword, within one dword, and moves the device's
    /// mappings if it asks for that.
    pub fn write_config(&self, slot: u8, offset: u16, data: &[u8]) {
        let Some(entry) = self.slot(slot) else {
            return;
        };
        let mut mapped = entry.mapped.lock();
        if entry.is_hidden() {
            return;
        }
        entry.device.lock().write_config(offset, data);
        self.reconcile(&entry, &mut mapped);
    }

    /// Makes the mappings follow the device's registers after something else than a
    /// configuration write changed them (a reset, a restore).
    pub fn refresh(&self, slot: u8) {
        if let Some(entry) = self.slot(slot) {
            self.reconcile(&entry, &mut entry.mapped.lock());
        }
    }

    /// The state of the bus and its bridge; devices save their own.
    pub fn save(&self) -> PciBusState {
        // The bridge is a device too: its guard must be gone before the names are collected.
        let bridge = self.bridge.lock().save();
        PciBusState {
            version: STATE_VERSION,
            address: self.address.load(Ordering::Relaxed),
            bridge,
            devices: self.names(),
        }
    }

    /// Takes over saved state of a bus with the same devices in the same slots, whose own states
    /// were restored before, and maps the BARs where they now are.
    ///
    /// # Errors
    /// [`PciBusError::Version`], [`PciBusError::Layout`], [`PciBusError::Bridge`].
    pub fn restore(&self, state: &PciBusState) -> Result<(), PciBusError> {
        if state.version != STATE_VERSION {
            return Err(PciBusError::Version {
                found: state.version,
                wanted: STATE_VERSION,
            });
        }
        let here = self.names();
        for slot in 0..SLOTS {
            let name = |devices: &[(u8, String)]| {
                let found = devices.iter().find(|(at, _)| *at == slot);
                found.map(|(_, id)| id.chars().take(MAX_ID).collect::<String>())
            };
            let (saved, here) = (name(&state.devices), name(&here));
            if saved != here {
                return Err(PciBusError::Layout { slot, saved, here });
            }
        }
        self.bridge
            .lock()
            .restore(&state.bridge)
            .map_err(PciBusError::Bridge)?;
        self.address.store(state.address, Ordering::Relaxed);
        (0..SLOTS).for_each(|slot| self.refresh(slot));
        Ok(())
    }

    fn names(&self) -> Vec<(u8, String)> {
        self.entries()
            .into_iter()
            .map(|(slot, entry)| (slot, entry.device.lock().id().to_owned()))
            .collect()
    }

    fn entries(&self) -> Vec<(u8, Arc<Slot>)> {
        let slots = self.slots.read();
        let held = (0..SLOTS).zip(slots.iter());
        held.filter_map(|(slot, entry)| Some((slot, Arc::clone(entry.as_ref()?))))
            .collect()
    }

    fn slot(&self, slot: u8) -> Option<Arc<Slot>> {
        self.slots.read().get(usize::from(slot))?.clone()
    }

    /// Unmaps what is no longer decoded where it was, then maps what is new. What cannot be
    /// mapped (a guest may program any address) stays unmapped until it moves again.
    fn reconcile(&self, entry: &Slot, mapped: &mut Vec<BarInfo>) {
        let wanted = match entry.is_hidden() {
            true => Vec::new(),
            false => decoded(&entry.device),
        };
        mapped.retain(|bar| {
            let stays = wanted.contains(bar);
            if !stays {
                self.mapper.unmap(&entry.device, bar);
            }
            stays
        });
        for bar in wanted {
            if mapped.contains(&bar) {
                continue;
            }
            match self.mapper.map(&entry.device, &bar) {
                Ok(()) => mapped.push(bar),
                Err(error) => tracing::debug!(?bar, %error, "BAR not mapped"),
            }
        }
    }
}

/// The BARs a device answers at now.
fn decoded(device: &SharedDevice) -> Vec<BarInfo> {
    let mut device = device.lock();
    let mut register = [0; 2];
    device.read_config(offset::COMMAND, &mut register);
    let ports = u16::from_le_bytes(register) & command::IO != 0;
    let memory = device.memory_enabled();
    let mut bars = device.bars();
    bars.retain(|bar| match bar.kind {
        BarKind::Io => ports,
        BarKind::Memory32 | BarKind::Memory64 { .. } => memory,
    });
    bars
}

#[cfg(test)]
pub(crate) mod tests;
