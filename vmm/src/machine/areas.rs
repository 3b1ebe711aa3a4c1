//! Parts of a passthrough device's BARs that the guest reaches without an exit: memory of the
//! device's process, mapped here and given to the guest where the BAR is.

use std::collections::BTreeMap;
use std::sync::Arc;

use hypervisor::{MemorySlot, SlotFlags, Vm};
use parking_lot::Mutex;
use passthrough::MappableArea;
use pci::{BarInfo, BarMapper, BusBarMapper, MapError, SharedDevice};
use vm_memory::mmap::MmapRegionError;
use vm_memory::{FileOffset, GuestAddress, MmapRegion};
use vm_migration::ErrorChain;

/// Why an area stays behind exits. It then works all the same, slowly.
#[derive(Debug, thiserror::Error)]
enum AreaError {
    /// The area's file cannot be used.
    #[error("its file cannot be mapped")]
    Map(#[source] MmapRegionError),
    /// There is no descriptor for it.
    #[error("its file cannot be kept")]
    File(#[source] std::io::Error),
    /// It is not whole pages, or larger than an address space.
    #[error("it is not whole pages")]
    Shape,
    /// The hypervisor has no room for it.
    #[error("the hypervisor does not take it")]
    Slot(#[source] hypervisor::Error),
}

/// Maps BARs as a [`BusBarMapper`] does, and areas of passthrough devices as guest memory.
pub(super) struct AreaMapper {
    inner: BusBarMapper,
    vm: Arc<dyn Vm>,
    /// The areas of each device, by its identifier.
    areas: Mutex<BTreeMap<String, Vec<MappableArea>>>,
    /// The memory slots made for the BAR at an address.
    mapped: Mutex<BTreeMap<u64, Vec<MemorySlot>>>,
}

impl AreaMapper {
    /// A mapper without areas.
    pub(super) fn new(inner: BusBarMapper, vm: Arc<dyn Vm>) -> Self {
        Self {
            inner,
            vm,
            areas: Mutex::default(),
            mapped: Mutex::default(),
        }
    }

    /// From now on the areas of device `id` are mapped with its BARs.
    pub(super) fn add(&self, id: &str, areas: &[MappableArea]) {
        if !areas.is_empty() {
            self.areas.lock().insert(id.to_owned(), areas.to_vec());
        }
    }

    /// The areas of device `id`, whose BARs are not mapped any more, are let go of.
    pub(super) fn forget(&self, id: &str) {
        self.areas.lock().remove(id);
    }

    fn map_area(&self, bar: &BarInfo, area: &MappableArea) -> Result<MemorySlot, AreaError> {
        const PAGE_MASK: u64 = 0xfff;
        let at = bar
            .address
            .checked_add(area.offset)
            .ok_or(AreaError::Shape)?;
        if (at | area.len | area.file_offset) & PAGE_MASK != 0 {
            return Err(AreaError::Shape);
        }
        let len = usize::try_from(area.len).map_err(|_| AreaError::Shape)?;
        let file = area.file.try_clone().map_err(AreaError::File)?;
        let offset = FileOffset::new(file.into(), area.file_offset);
        let region = MmapRegion::<()>::from_file(offset, len).map_err(AreaError::Map)?;
        self.vm
            .add_memory(GuestAddress(at), Arc::new(region), SlotFlags::default())
            .map_err(AreaError::Slot)
    }
}

impl BarMapper for AreaMapper {
    fn map(&self, device: &SharedDevice, bar: &BarInfo) -> Result<(), MapError> {
        self.inner.map(device, bar)?;
        let id = device.lock().id().to_owned();
        let areas: Vec<MappableArea> = match self.areas.lock().get(&id) {
            Some(areas) => areas
                .iter()
                .filter(|area| area.bar == bar.index)
                .cloned()
                .collect(),
            None => return Ok(()),
        };
        let mut slots = Vec::new();
        for area in &areas {
            match self.map_area(bar, area) {
                Ok(slot) => slots.push(slot),
                Err(error) => {
                    tracing::warn!(
                        id,
                        bar = bar.index,
                        error = %ErrorChain(&error),
                        "an area is reached by exits only"
                    );
                }
            }
        }
        self.mapped.lock().insert(bar.address, slots);
        Ok(())
    }

    fn unmap(&self, device: &SharedDevice, bar: &BarInfo) {
        for slot in self.mapped.lock().remove(&bar.address).unwrap_or_default() {
            if let Err(error) = self.vm.remove_memory(slot) {
                tracing::error!(%error, "a passthrough area stays mapped");
            }
        }
        self.inner.unmap(device, bar);
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::path::Path;

    use devices::bus::Bus;
    use hypervisor::{Hypervisor, KvmHypervisor, VmOptions};
    use pci::{BarKind, Doorbell, DoorbellBinder, DoorbellSpace, PciDevice};
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

    use super::*;

    const BASE: u64 = 0xc000_0000;

    /// A function with one BAR of 64 KiB.
    struct Card;

    impl PciDevice for Card {
        fn id(&self) -> &str {
            "card"
        }
        fn read_config(&mut self, _: u16, _: &mut [u8]) {}
        fn write_config(&mut self, _: u16, _: &[u8]) {}
        fn bars(&self) -> Vec<BarInfo> {
            vec![bar()]
        }
        fn set_bar_address(&mut self, _: u8, _: u64) {}
        fn memory_enabled(&self) -> bool {
            true
        }
        fn read_bar(&mut self, _: u8, _: u64, data: &mut [u8]) {
            data.fill(0x5a);
        }
        fn write_bar(&mut self, _: u8, _: u64, _: &[u8]) {}
        fn doorbells(&self) -> Vec<Doorbell> {
            Vec::new()
        }
    }

    struct NoDoorbells;

    type BoxError = Box<dyn std::error::Error + Send + Sync>;

    impl DoorbellBinder for NoDoorbells {
        fn bind(&self, _: DoorbellSpace, _: u64, _: &Doorbell) -> Result<(), BoxError> {
            Ok(())
        }
        fn unbind(&self, _: DoorbellSpace, _: u64, _: &Doorbell) -> Result<(), BoxError> {
            Ok(())
        }
    }

    fn bar() -> BarInfo {
        BarInfo {
            index: 0,
            kind: BarKind::Memory32,
            size: 0x1_0000,
            address: BASE,
        }
    }

    #[test]
    fn areas_become_memory_of_the_guest_while_their_bar_is_mapped() {
        if !Path::new("/dev/kvm").exists() {
            println!("SKIP: areas_become_memory_of_the_guest: there is no /dev/kvm");
            return;
        }
        let kvm = KvmHypervisor::open().unwrap();
        let vm = kvm.create_vm(&VmOptions::default()).unwrap();
        let memory = Arc::new(Bus::new());
        let window = vec![BASE..=BASE + 0xff_ffff];
        let ports = Arc::new(Bus::new());
        let inner = BusBarMapper::new(
            memory.clone(),
            ports,
            window,
            Vec::new(),
            Arc::new(NoDoorbells),
        );
        let mapper = AreaMapper::new(inner, Arc::clone(&vm));
        let file = memfd_create("area", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&file, 0x4000).unwrap();
        let area = |offset, len| MappableArea {
            bar: 0,
            offset,
            len,
            file: Arc::new(File::from(file.try_clone().unwrap()).into()),
            file_offset: 0,
        };
        // The second is not whole pages and stays behind exits.
        mapper.add("card", &[area(0x2000, 0x4000), area(0x8000, 0x800)]);
        let card: SharedDevice = Arc::new(Mutex::new(Card));
        for _ in 0..2 {
            mapper.map(&card, &bar()).unwrap();
            let slots = mapper.mapped.lock().get(&BASE).map(Vec::len);
            assert_eq!(slots, Some(1));
            // The same guest addresses cannot be given twice: they are memory now.
            let other = Arc::new(MmapRegion::<()>::new(0x1000).unwrap());
            let taken = vm.add_memory(GuestAddress(BASE + 0x3000), other, SlotFlags::default());
            assert!(taken.is_err());
            let mut data = [0];
            memory.read(BASE, &mut data);
            assert_eq!(data, [0x5a]);
            mapper.unmap(&card, &bar());
            memory.read(BASE, &mut data);
            assert_eq!(data, [0xff]);
        }
    }
}
