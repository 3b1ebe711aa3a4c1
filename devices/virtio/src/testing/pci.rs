//! A driver that sets up a [`VirtioPciDevice`] through its registers.

use std::sync::Arc;

use devices::ThreadSpawner;
use pci::PciDevice;
use vm_migration::memory::MemoryHandle;

use super::{Ring, RingLayout, TestFabric, snapshot};
use crate::device::{VirtioDevice, feature};
use crate::transport::{VirtioPciDevice, VirtioPciParts};

/// `device` as a PCI function.
pub(crate) fn pci_device(
    device: impl VirtioDevice + 'static,
    memory: &MemoryHandle,
    fabric: &Arc<TestFabric>,
) -> VirtioPciDevice {
    VirtioPciDevice::new(VirtioPciParts {
        device: Box::new(device),
        memory: memory.clone(),
        fabric: Arc::clone(fabric) as Arc<dyn devices::MsiFabric>,
        spawner: ThreadSpawner::unconfined(),
    })
    .unwrap()
}

/// A function and the driver's way to it.
pub(crate) struct Driver {
    pub(crate) device: VirtioPciDevice,
    pub(crate) memory: MemoryHandle,
}

impl Driver {
    pub(crate) fn new(device: VirtioPciDevice, memory: &MemoryHandle) -> Self {
        Self {
            device,
            memory: memory.clone(),
        }
    }

    pub(crate) fn read8(&mut self, offset: u64) -> u8 {
        let mut data = [0; 1];
        self.device.read_bar(0, offset, &mut data);
        data[0]
    }

    pub(crate) fn read16(&mut self, offset: u64) -> u16 {
        let mut data = [0; 2];
        self.device.read_bar(0, offset, &mut data);
        u16::from_le_bytes(data)
    }

    pub(crate) fn read32(&mut self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.device.read_bar(0, offset, &mut data);
        u32::from_le_bytes(data)
    }

    pub(crate) fn write8(&mut self, offset: u64, value: u8) {
        self.device.write_bar(0, offset, &[value]);
    }

    pub(crate) fn write16(&mut self, offset: u64, value: u16) {
        self.device.write_bar(0, offset, &value.to_le_bytes());
    }

    pub(crate) fn write32(&mut self, offset: u64, value: u32) {
        self.device.write_bar(0, offset, &value.to_le_bytes());
    }

    pub(crate) fn write64(&mut self, offset: u64, value: u64) {
        let bytes = value.to_le_bytes();
        self.device.write_bar(0, offset, &bytes[..4]);
        self.device.write_bar(0, offset + 4, &bytes[4..]);
    }

    pub(crate) fn status(&mut self) -> u8 {
        self.read8(20)
    }

    pub(crate) fn offered(&mut self) -> u64 {
        self.write32(0, 0);
        let low = self.read32(4);
        self.write32(0, 1);
        u64::from(low) | u64::from(self.read32(4)) << 32
    }

    /// Resets and negotiates; whether the device took the features.
    pub(crate) fn negotiate(&mut self, features: u64) -> bool {
        self.write8(20, 0);
        assert_eq!(self.status(), 0);
        self.write8(20, 1);
        self.write8(20, 3);
        let bytes = features.to_le_bytes();
        for (select, half) in (0_u32..).zip(bytes.chunks(4)) {
            self.write32(8, select);
            self.device.write_bar(0, 12, half);
        }
        self.write8(20, 11);
        self.status() & 8 != 0
    }

    /// Sets up and enables queue `index`; the vector is its number.
    pub(crate) fn set_up_queue(&mut self, index: u16, layout: RingLayout) {
        self.write16(22, index);
        self.write16(24, layout.size);
        assert_eq!(self.read16(24), layout.size);
        self.write16(26, index);
        assert_eq!(self.read16(26), index);
        self.write64(32, layout.descriptors);
        self.write64(40, layout.available);
        self.write64(48, layout.used);
        self.write16(28, 1);
        assert_eq!(self.read16(28), 1);
    }

    /// Switches MSI-X on and routes vector `n` to data `n`.
    pub(crate) fn enable_msix(&mut self, vectors: u16) {
        for vector in 0..vectors {
            let entry = 0x4000 + u64::from(vector) * 16;
            self.write32(entry, 0xfee0_0000);
            self.write32(entry + 8, u32::from(vector));
            self.write32(entry + 12, 0);
        }
        let at = self.msix_capability();
        self.device.write_config(at + 2, &0x8000_u16.to_le_bytes());
    }

    /// Switches MSI-X off.
    pub(crate) fn disable_msix(&mut self) {
        let at = self.msix_capability();
        self.device.write_config(at + 2, &0_u16.to_le_bytes());
    }

    fn msix_capability(&mut self) -> u16 {
        let mut pointer = [0];
        self.device.read_config(0x34, &mut pointer);
        loop {
            let at = u16::from(pointer[0]);
            assert_ne!(at, 0, "no MSI-X capability");
            let mut header = [0; 2];
            self.device.read_config(at, &mut header);
            if header[0] == 0x11 {
                return at;
            }
            pointer[0] = header[1];
        }
    }

    /// The whole way to DRIVER_OK with rings of `sizes` at 1 MiB and on; the configuration has
    /// the vector after the queues'.
    pub(crate) fn bring_up(&mut self, features: u64, sizes: &[u16]) -> Vec<Ring> {
        let rings = self.bring_up_unserved(features, sizes);
        assert_eq!(self.status(), 15);
        rings
    }

    /// The same for a device that may not serve.
    pub(crate) fn bring_up_unserved(&mut self, features: u64, sizes: &[u16]) -> Vec<Ring> {
        assert!(self.negotiate(features | feature::VERSION_1));
        let vectors = self.read16(18) + 1;
        self.enable_msix(vectors);
        self.write16(16, vectors - 1);
        let event_idx = features & feature::RING_EVENT_IDX != 0;
        let memory = snapshot(&self.memory);
        let mut rings = Vec::new();
        for (index, size) in (0_u16..).zip(sizes) {
            let layout = RingLayout::at(0x10_0000 + u64::from(index) * 0x4_0000, *size);
            rings.push(Ring::new(Arc::clone(&memory), layout, event_idx));
            self.set_up_queue(index, layout);
        }
        self.write8(20, 15);
        rings
    }

    /// Kicks queue `index`.
    pub(crate) fn kick(&mut self, index: u16) {
        self.write16(0x3000 + u64::from(index) * 4, index);
    }
}
