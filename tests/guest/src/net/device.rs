//! A virtio-net function over PCI (virtio 1.2, 4.1 and 5.1): finding its
//! registers, negotiating, setting up queues.

use crate::clock::from_ms;
use crate::cpu::tsc;
use crate::mmio::Mmio;
use crate::pci::Function;

use super::queue::{MAX_ENTRIES, Queue, QueueSetup};

const VENDOR: u16 = 0x1af4;
const DEVICE_NET: u16 = 0x1041;
const CAPABILITY_VENDOR: u8 = 0x09;
const CAPABILITY_MSIX: u8 = 0x11;
const CONFIG_COMMON: u8 = 1;
const CONFIG_NOTIFY: u8 = 2;
const CONFIG_DEVICE: u8 = 4;

// Common configuration (4.1.4.3).
const DEVICE_FEATURE_SELECT: u64 = 0;
const DEVICE_FEATURE: u64 = 4;
const DRIVER_FEATURE_SELECT: u64 = 8;
const DRIVER_FEATURE: u64 = 12;
const CONFIG_MSIX_VECTOR: u64 = 16;
const DEVICE_STATUS: u64 = 20;
const QUEUE_SELECT: u64 = 22;
const QUEUE_SIZE: u64 = 24;
const QUEUE_MSIX_VECTOR: u64 = 26;
const QUEUE_ENABLE: u64 = 28;
const QUEUE_NOTIFY_OFF: u64 = 30;
const QUEUE_ADDRESSES: u64 = 32;
const COMMON_BYTES: u64 = 56;
const NO_VECTOR: u16 = 0xffff;

const STATUS_ACKNOWLEDGE: u8 = 1;
const STATUS_DRIVER: u8 = 2;
const STATUS_DRIVER_OK: u8 = 4;
const STATUS_FEATURES_OK: u8 = 8;

/// VIRTIO_NET_F_MAC.
pub(crate) const FEATURE_MAC: u64 = 1 << 5;
/// VIRTIO_NET_F_MRG_RXBUF.
pub(crate) const FEATURE_MERGEABLE: u64 = 1 << 15;
/// VIRTIO_NET_F_CTRL_VQ.
pub(crate) const FEATURE_CONTROL: u64 = 1 << 17;
/// VIRTIO_F_EVENT_IDX.
pub(crate) const FEATURE_EVENT_INDEX: u64 = 1 << 29;
/// VIRTIO_F_VERSION_1.
pub(crate) const FEATURE_VERSION_1: u64 = 1 << 32;
/// VIRTIO_F_ACCESS_PLATFORM: addresses are the guest's own, which they are.
pub(crate) const FEATURE_ACCESS_PLATFORM: u64 = 1 << 33;
/// VIRTIO_NET_F_HASH_REPORT.
pub(crate) const FEATURE_HASH_REPORT: u64 = 1 << 57;

/// Offset of `supported_hash_types` in the device's configuration (5.1.4).
const CONFIG_HASH_TYPES: u64 = 20;
const NET_CONFIG_BYTES: u64 = 24;

const RESET_TIMEOUT_MS: u64 = 2000;

/// Whether a function is a modern virtio-net function.
pub(crate) fn is_net(function: &Function) -> bool {
    function.identity() == (VENDOR, DEVICE_NET)
}

/// A function's registers.
pub(crate) struct Device {
    common: Mmio,
    config: Mmio,
    /// Doorbells: their memory's place, and how far apart they are.
    notify_bar: (u8, u32, u64),
    notify_multiplier: u32,
    msix: Option<Mmio>,
    function: Function,
}

impl Device {
    /// Finds the registers and resets the function.
    pub(crate) fn new(function: Function) -> Result<Self, &'static str> {
        let (mut common, mut config, mut notify, mut msix) = (None, None, None, None);
        for (capability, at) in function.capabilities() {
            if capability == CAPABILITY_MSIX {
                msix = Some(at);
            }
            if capability != CAPABILITY_VENDOR {
                continue;
            }
            let (bar, offset) = (function.read8(at + 4), function.read32(at + 8));
            match function.read8(at + 3) {
                CONFIG_COMMON => common = common.or(function.bar(bar, offset, COMMON_BYTES)),
                CONFIG_DEVICE => config = config.or(function.bar(bar, offset, NET_CONFIG_BYTES)),
                CONFIG_NOTIFY => {
                    let len = u64::from(function.read32(at + 12));
                    notify = notify.or(Some(((bar, offset, len), function.read32(at + 16))));
                }
                _ => {}
            }
        }
        let (notify_bar, notify_multiplier) = notify.ok_or("no doorbells")?;
        let device = Self {
            common: common.ok_or("no common configuration")?,
            config: config.ok_or("no device configuration")?,
            notify_bar,
            notify_multiplier,
            msix: msix.and_then(|at| function.enable_msix(at)),
            function,
        };
        function.enable();
        device.reset()?;
        Ok(device)
    }

    /// Its slot on the bus.
    pub(crate) const fn slot(&self) -> u8 {
        self.function.slot().0
    }

    /// Has the function forget all that it was told.
    pub(crate) fn reset(&self) -> Result<(), &'static str> {
        self.common.write(DEVICE_STATUS, 0u8);
        let start = tsc();
        while self.common.read::<u8>(DEVICE_STATUS) != 0 {
            if tsc() - start > from_ms(RESET_TIMEOUT_MS) {
                return Err("does not come out of reset");
            }
        }
        self.add_status(STATUS_ACKNOWLEDGE);
        self.add_status(STATUS_DRIVER);
        Ok(())
    }

    fn add_status(&self, bit: u8) {
        let status: u8 = self.common.read(DEVICE_STATUS);
        self.common.write(DEVICE_STATUS, status | bit);
    }

    /// Takes what of `wanted` is offered; `needed` must be among it.
    pub(crate) fn negotiate(&self, wanted: u64, needed: u64) -> Result<u64, &'static str> {
        let half = |select: u32| {
            self.common.write(DEVICE_FEATURE_SELECT, select);
            u64::from(self.common.read::<u32>(DEVICE_FEATURE))
        };
        let taken = (half(0) | half(1) << 32) & wanted;
        if taken & needed != needed {
            return Err("a needed feature is not offered");
        }
        let [a, b, c, d, e, f, g, h] = taken.to_le_bytes();
        for (select, half) in (0u32..).zip([[a, b, c, d], [e, f, g, h]]) {
            self.common.write(DRIVER_FEATURE_SELECT, select);
            self.common.write(DRIVER_FEATURE, u32::from_le_bytes(half));
        }
        self.add_status(STATUS_FEATURES_OK);
        if self.common.read::<u8>(DEVICE_STATUS) & STATUS_FEATURES_OK == 0 {
            return Err("features refused");
        }
        Ok(taken)
    }

    /// The function's MAC address.
    pub(crate) fn mac(&self) -> [u8; 6] {
        core::array::from_fn(|index| self.config.read(index as u64))
    }

    /// The hash types the function can report.
    pub(crate) fn hash_types(&self) -> u32 {
        self.config.read(CONFIG_HASH_TYPES)
    }

    /// Sets a queue up over zeroed rings. `interrupt` is the vector for it:
    /// MSI-X table entry and CPU vector.
    pub(crate) fn queue(
        &self,
        number: u16,
        rings: Mmio,
        event_index: bool,
        interrupt: Option<(u16, u8)>,
    ) -> Result<Queue, &'static str> {
        self.common.write(QUEUE_SELECT, number);
        let offered: u16 = self.common.read(QUEUE_SIZE);
        let entries = offered.min(MAX_ENTRIES);
        if entries < 4 {
            return Err("a queue is missing or too small");
        }
        self.common.write(QUEUE_SIZE, entries);
        for (index, address) in (0..).zip(Queue::addresses(&rings)) {
            let at = QUEUE_ADDRESSES + 8 * index;
            let [a, b, c, d, e, f, g, h] = address.to_le_bytes();
            self.common.write(at, u32::from_le_bytes([a, b, c, d]));
            self.common.write(at + 4, u32::from_le_bytes([e, f, g, h]));
        }
        self.route(interrupt)?;
        let slot = self.common.read::<u16>(QUEUE_NOTIFY_OFF);
        let (bar, offset, len) = self.notify_bar;
        let at = u64::from(slot) * u64::from(self.notify_multiplier);
        let doorbells = self.function.bar(bar, offset, len).ok_or("no doorbells")?;
        let doorbell = doorbells.part(at, 2);
        self.common.write(QUEUE_ENABLE, 1u16);
        Ok(Queue::new(
            rings,
            QueueSetup {
                number,
                entries,
                doorbell,
                event_index,
            },
        ))
    }

    /// Gives the selected queue its MSI-X entry and that entry its message.
    fn route(&self, interrupt: Option<(u16, u8)>) -> Result<(), &'static str> {
        self.common.write(CONFIG_MSIX_VECTOR, NO_VECTOR);
        let Some((entry, vector)) = interrupt else {
            self.common.write(QUEUE_MSIX_VECTOR, NO_VECTOR);
            return Ok(());
        };
        let table = self.msix.as_ref().ok_or("no MSI-X")?;
        let at = u64::from(entry) * 16;
        // To local APIC 0, fixed, edge (SDM volume 3, 10.11).
        for (offset, word) in [(0, 0xfee0_0000), (4, 0), (8, u32::from(vector)), (12, 0)] {
            table.write(at + offset, word);
        }
        self.common.write(QUEUE_MSIX_VECTOR, entry);
        if self.common.read::<u16>(QUEUE_MSIX_VECTOR) == entry {
            Ok(())
        } else {
            Err("MSI-X vector refused")
        }
    }

    /// Lets the function work.
    pub(crate) fn start(&self) {
        self.add_status(STATUS_DRIVER_OK);
    }
}
