//! Devices that come and go while the guest runs.
//!
//! What [`pci::HotPlug`] says between VMM and guest is here done to devices: a new one is made as at
//! boot, with all RAM mapped for it, but its BARs are left to the guest; one that the guest has
//! ejected is taken off the bus, loses the memory, and is closed.

use std::sync::Arc;

use devices::bus::BusDevice;
use parking_lot::Mutex;
use pci::{HotPlug, SLOTS, SharedDevice};
use vm_migration::{ErrorChain, Pause};

use super::devices::{Board, Devices, VirtioFunction, place};
use super::passthrough::{self, PassthroughFunction};
use super::pci::PciRoot;
use super::{Host, Machine, MachineError, net};
use crate::api::{Facts, PciDeviceInfo};
use crate::config::{DeviceConfig, NetConfig, UserDeviceConfig, VmConfig};
use crate::layout;
use crate::notice::ExitReason;

/// The address of function 0 of a slot, as people write it.
fn bdf(slot: u8) -> String {
    format!("0000:00:{slot:02x}.0")
}

/// Puts the registers where ACPI tells the guest that they are.
pub(super) fn registers(
    root: &PciRoot,
    host: &Host,
    board: &Board<'_>,
) -> Result<Arc<HotPlug>, MachineError> {
    let line = board.interrupts.isa_line(layout::HOTPLUG_IRQ);
    let line = line.map_err(MachineError::Interrupts)?;
    let exits = host.exits.clone();
    let on_eject = Box::new(move || exits.send(ExitReason::DeviceEjected));
    let hotplug = HotPlug::new(Arc::clone(root.bus()), line, on_eject);
    let registers: Arc<dyn BusDevice> = hotplug.clone();
    let base = u64::from(layout::HOTPLUG_PORT);
    place(
        board.pio,
        "hot-plug registers",
        base,
        HotPlug::BYTES,
        registers,
    )?;
    Ok(hotplug)
}

impl Devices {
    /// The slots whose device may come and go: all but those of devices that each machine has.
    pub(super) fn ejectable_slots(&self) -> Vec<u8> {
        let fixed = self.virtio.iter().filter(|function| !function.is_card());
        let fixed: Vec<_> = fixed
            .filter_map(|function| self.bus().slot_of(&function.id))
            .collect();
        (1..SLOTS).filter(|slot| !fixed.contains(slot)).collect()
    }

    /// Adds to the facts of devices that may come and go where they are, and whether they are to go.
    pub(super) fn add_places(&self, facts: &mut Facts) {
        let (asked, ejected) = (self.hotplug.asked(), self.hotplug.ejected());
        for slot in self.ejectable_slots() {
            for id in self.ids(&[slot]) {
                let own = facts.entry(id).or_default();
                own.insert("bdf".to_owned(), bdf(slot));
                let removal = match (ejected.contains(&slot), asked.contains(&slot)) {
                    (true, _) => "ejected",
                    (false, true) => "asked for",
                    (false, false) => continue,
                };
                own.insert("removal".to_owned(), removal.to_owned());
            }
        }
    }

    /// The identifiers of devices in these slots.
    fn ids(&self, slots: &[u8]) -> Vec<String> {
        let devices = slots.iter().filter_map(|slot| self.bus().device(*slot));
        devices
            .map(|device| device.lock().id().to_owned())
            .collect()
    }

    /// The devices that the guest was asked to eject, and did not yet.
    pub fn asked_to_go(&self) -> Vec<String> {
        self.ids(&self.hotplug.asked())
    }

    /// The devices that are about to be gone: asked for, or ejected already.
    pub fn on_their_way_out(&self) -> Vec<String> {
        let mut slots = self.hotplug.asked();
        slots.extend(self.hotplug.ejected());
        self.ids(&slots)
    }

    /// Asks the guest to eject device `id`, again if it was asked before.
    ///
    /// # Errors
    /// [`MachineError::UnknownDevice`]; [`MachineError::HotPlug`] if it is part of the machine, or
    /// the guest could not be interrupted.
    pub fn ask_to_go(&self, id: &str) -> Result<(), MachineError> {
        let unknown = || MachineError::UnknownDevice { id: id.to_owned() };
        let slot = self.bus().slot_of(id).ok_or_else(unknown)?;
        self.hotplug
            .ask(slot)
            .map_err(|cause| MachineError::HotPlug {
                id: id.to_owned(),
                cause,
            })
    }

    /// Puts `device` on the bus and tells the guest; without it on the bus, nobody.
    fn plug(&self, device: SharedDevice, slot: Option<u8>) -> Result<PciDeviceInfo, MachineError> {
        let id = device.lock().id().to_owned();
        let slot = self.root.plug(device, slot)?;
        if let Err(error) = self.hotplug.announce(slot) {
            // It is there, and a guest that looks finds it.
            tracing::error!(id, error = %ErrorChain(&error), "the guest is not told of it");
        }
        Ok(PciDeviceInfo { id, bdf: bdf(slot) })
    }

    /// Takes away what the guest has ejected; gives the identifiers.
    fn take_ejected(&mut self) -> Vec<String> {
        let mut gone = Vec::new();
        for slot in self.hotplug.ejected() {
            let ids = self.ids(&[slot]);
            self.root.unplug(slot);
            for id in &ids {
                self.let_go(id);
            }
            // After that the slot may be given away.
            self.hotplug.freed(slot);
            gone.extend(ids);
        }
        gone
    }

    /// Closes device `id`, which is on the bus no more.
    fn let_go(&mut self, id: &str) {
        let found = self
            .passthrough
            .iter()
            .position(|function| function.id == id);
        if let Some(at) = found {
            close(&self.passthrough.remove(at));
        }
        let found = self.virtio.iter().position(|function| function.id == id);
        if let Some(at) = found {
            stop(&self.virtio.remove(at));
        }
    }
}

/// Takes the guest's memory from a device. One that is dead or refuses is closed all the same, by
/// which the kernel, or the end of the connection, does it.
fn close(function: &PassthroughFunction) {
    let device = &function.device;
    let closed = device.reset().and_then(|()| device.unmap_memory());
    if let Err(error) = closed.or_else(|_| device.unmap_memory()) {
        let id = &function.id;
        tracing::warn!(id, error = %ErrorChain(&error), "a device was not unmapped in order");
    }
}

/// Joins the threads of a virtio device.
fn stop(function: &VirtioFunction) {
    if let Err(error) = function.device.lock().pause() {
        let id = &function.id;
        tracing::warn!(id, error = %ErrorChain(&error), "a device did not stop in order");
    }
}

impl Machine {
    /// Devices, and what new ones are plugged into.
    fn split(&mut self) -> (&mut Devices, Board<'_>) {
        let board = Board {
            vm: &self.vm,
            ram: &self.ram,
            interrupts: &self.interrupts,
            pio: &self.spaces.pio,
            mmio: &self.spaces.mmio,
        };
        (&mut self.devices, board)
    }

    /// Opens a device of the host and plugs it in.
    ///
    /// # Errors
    /// [`MachineError::Device`]; nothing changed then.
    pub fn add_device(
        &mut self,
        config: &DeviceConfig,
        host: &Host,
    ) -> Result<PciDeviceInfo, MachineError> {
        let (devices, board) = self.split();
        let function = passthrough::host_device(config, &devices.vfio, host, &board)?;
        devices.plug_passthrough(function, config.pci_device_id)
    }

    /// Connects to the server of a device and plugs it in.
    ///
    /// # Errors
    /// [`MachineError::Device`]; nothing changed then.
    pub fn add_user_device(
        &mut self,
        config: &UserDeviceConfig,
        host: &Host,
    ) -> Result<PciDeviceInfo, MachineError> {
        let (devices, board) = self.split();
        let function = passthrough::user_device(config, host, &board)?;
        devices.plug_passthrough(function, config.pci_device_id)
    }

    /// Makes a network card and plugs it in.
    ///
    /// # Errors
    /// [`MachineError::Device`]; nothing changed then.
    pub fn add_net(
        &mut self,
        config: &NetConfig,
        host: &Host,
    ) -> Result<PciDeviceInfo, MachineError> {
        let (devices, board) = self.split();
        let card = net::card(config, host, &board)?;
        let plugged = devices.plug(card.device.clone(), config.pci_device_id)?;
        devices.virtio.push(card);
        Ok(plugged)
    }

    /// Takes away what the guest has ejected; gives the identifiers.
    pub fn take_ejected(&mut self) -> Vec<String> {
        self.devices.take_ejected()
    }

    /// Writes down in `config` in which slot each device is, so that a machine that is made of it
    /// has them there.
    pub fn pin_slots(&self, config: &mut VmConfig) {
        config.pin_slots(|id| self.devices.bus().slot_of(id));
    }
}

impl Devices {
    fn plug_passthrough(
        &mut self,
        function: PassthroughFunction,
        slot: Option<u8>,
    ) -> Result<PciDeviceInfo, MachineError> {
        let (id, areas) = (&function.id, function.device.mappable_areas());
        self.root.add_areas(id, areas);
        let device = Arc::new(Mutex::new(function.device.clone()));
        match self.plug(device, slot) {
            Ok(plugged) => {
                self.passthrough.push(function);
                Ok(plugged)
            }
            Err(error) => {
                self.root.forget_areas(id);
                close(&function);
                Err(error)
            }
        }
    }
}
