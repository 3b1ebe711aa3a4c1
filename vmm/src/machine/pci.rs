//! The PCI bus of a machine: where BARs go, and doorbells bound in the kernel.

use std::sync::Arc;

use hypervisor::{IoAddress, Vm};
use passthrough::MappableArea;
use pci::{
    BusBarMapper, ConfigPorts, Doorbell, DoorbellBinder, DoorbellSpace, EcamWindow, PciBus,
    SharedDevice,
};
use vm_allocator::{AddressAllocator, AllocPolicy};
use vm_memory::GuestAddress;

use super::areas::AreaMapper;
use super::devices::{Board, place};
use super::error::MachineError;
use crate::layout;

type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// Binds doorbells to eventfds in the hypervisor.
struct KernelDoorbells(Arc<dyn Vm>);

impl KernelDoorbells {
    fn address(space: DoorbellSpace, address: u64) -> Result<IoAddress, BoxError> {
        Ok(match space {
            DoorbellSpace::Memory => IoAddress::Mmio(GuestAddress(address)),
            DoorbellSpace::Io => IoAddress::Pio(u16::try_from(address)?),
        })
    }
}

impl DoorbellBinder for KernelDoorbells {
    fn bind(
        &self,
        space: DoorbellSpace,
        address: u64,
        doorbell: &Doorbell,
    ) -> Result<(), BoxError> {
        let at = Self::address(space, address)?;
        self.0
            .register_ioeventfd(&doorbell.eventfd, at, doorbell.size, doorbell.datamatch)?;
        Ok(())
    }

    fn unbind(
        &self,
        space: DoorbellSpace,
        address: u64,
        doorbell: &Doorbell,
    ) -> Result<(), BoxError> {
        let at = Self::address(space, address)?;
        self.0
            .unregister_ioeventfd(&doorbell.eventfd, at, doorbell.size, doorbell.datamatch)?;
        Ok(())
    }
}

/// The bus, with the room that is left in its memory window.
pub(super) struct PciRoot {
    bus: Arc<PciBus>,
    mapper: Arc<AreaMapper>,
    room: AddressAllocator,
}

impl PciRoot {
    /// An empty bus that answers in the machine's address spaces.
    pub(super) fn new(board: &Board<'_>) -> Result<Self, MachineError> {
        let last = layout::PCI_MMIO_START + layout::PCI_MMIO_SIZE - 1;
        let mapper = BusBarMapper::new(
            Arc::clone(board.mmio),
            Arc::clone(board.pio),
            vec![layout::PCI_MMIO_START..=last],
            Vec::new(),
            Arc::new(KernelDoorbells(Arc::clone(board.vm))),
        );
        let mapper = Arc::new(AreaMapper::new(mapper, Arc::clone(board.vm)));
        let bus = PciBus::new(mapper.clone());
        let ecam = Arc::new(EcamWindow::new(Arc::clone(&bus)));
        place(
            board.mmio,
            "PCI ECAM",
            layout::ECAM_START,
            layout::ECAM_SIZE,
            ecam,
        )?;
        let ports = Arc::new(ConfigPorts::new(Arc::clone(&bus)));
        place(
            board.pio,
            "PCI configuration ports",
            u64::from(layout::PCI_CONFIG_PORT),
            8,
            ports,
        )?;
        let room = AddressAllocator::new(layout::PCI_MMIO_START, layout::PCI_MMIO_SIZE)
            .map_err(|error| MachineError::device("the PCI root")(error.to_string()))?;
        Ok(Self { bus, mapper, room })
    }

    /// Puts a device on the bus, into `slot` if one is given, and gives its BARs addresses, as
    /// firmware would. Gives the slot.
    pub(super) fn add(
        &mut self,
        device: SharedDevice,
        slot: Option<u8>,
    ) -> Result<u8, MachineError> {
        {
            let mut device = device.lock();
            let id = device.id().to_owned();
            for bar in device.bars() {
                // Whole pages, so that no two devices share one.
                let size = bar.size.max(0x1000);
                let range = self
                    .room
                    .allocate(size, size, AllocPolicy::FirstMatch)
                    .map_err(|_| MachineError::NoRoom { id: id.clone() })?;
                device.set_bar_address(bar.index, range.start());
            }
        }
        self.plug(device, slot)
    }

    /// Puts a device on the bus, into `slot` if one is given, and leaves it to the guest to give
    /// its BARs addresses. Gives the slot.
    pub(super) fn plug(&self, device: SharedDevice, slot: Option<u8>) -> Result<u8, MachineError> {
        let id = device.lock().id().to_owned();
        let placed = match slot {
            Some(slot) => self.bus.add_at(slot, device).map(|()| slot),
            None => self.bus.add(device),
        };
        placed.map_err(MachineError::device(&id))
    }

    /// Takes the device out of `slot`; on return the guest does not reach it.
    pub(super) fn unplug(&self, slot: u8) {
        if let Some(device) = self.bus.remove(slot) {
            self.mapper.forget(device.lock().id());
        }
    }

    /// Lets the guest reach these areas of device `id` without exits.
    pub(super) fn add_areas(&self, id: &str, areas: &[MappableArea]) {
        self.mapper.add(id, areas);
    }

    /// Undoes [`add_areas`](Self::add_areas) of a device that is not on the bus.
    pub(super) fn forget_areas(&self, id: &str) {
        self.mapper.forget(id);
    }

    /// The bus.
    pub(super) fn bus(&self) -> &Arc<PciBus> {
        &self.bus
    }
}
