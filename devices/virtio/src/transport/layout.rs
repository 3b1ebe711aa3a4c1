//! Where things are: the BAR, and the capabilities that tell the driver (virtio 1.2, section
//! 4.1.4).

use pci::{BarError, BarKind, ConfigError, ConfigSpace, Identity, Msix};

use crate::device::DeviceType;

/// The only BAR: registers, doorbells, MSI-X. Each part has a page of its own, so that any can
/// be mapped, trapped or bound by itself.
pub(super) const BAR: u8 = 0;
/// Bytes of the BAR.
pub(super) const BAR_SIZE: u64 = 0x8000;

/// Bytes of a part.
const PART: u64 = 0x1000;
/// `struct virtio_pci_common_cfg`.
const COMMON: u32 = 0x0000;
/// Interrupt status register.
const ISR: u32 = 0x1000;
/// Configuration space of the device kind.
const DEVICE: u32 = 0x2000;
/// Doorbells.
pub(super) const NOTIFY: u32 = 0x3000;
/// MSI-X table.
const MSIX_TABLE: u32 = 0x4000;
/// MSI-X pending bits.
const MSIX_PENDING: u32 = 0x5000;

/// Distance of two queues' doorbells in bytes (`notify_off_multiplier`).
pub(super) const NOTIFY_STEP: u32 = 4;
/// Most queues a device here can have: vectors for all and the configuration fill one page of
/// MSI-X table.
pub(super) const MAX_QUEUES: usize = 255;
/// Bytes of the common configuration up to `queue_device` (no optional fields).
const COMMON_LEN: u32 = 56;

/// PCI vendor ID of virtio devices.
const VENDOR: u16 = 0x1af4;
/// PCI device ID of the modern device with virtio ID 0.
const DEVICE_BASE: u16 = 0x1040;
/// `virtio_pci_cap.cfg_type` (section 4.1.4).
const CFG_COMMON: u8 = 1;
const CFG_NOTIFY: u8 = 2;
const CFG_ISR: u8 = 3;
const CFG_DEVICE: u8 = 4;
const CFG_PCI: u8 = 5;

/// A place in the BAR.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Place {
    /// Offset in the common configuration.
    Common(u64),
    /// Interrupt status register.
    Isr(u64),
    /// Offset in the device's configuration.
    Device(u64),
    /// Offset among the doorbells.
    Notify(u64),
    /// Offset in the MSI-X table.
    MsixTable(u64),
    /// Offset in the MSI-X pending bits.
    MsixPending(u64),
    /// Nothing is there.
    Nothing,
}

impl Place {
    /// What is at `offset` of the BAR.
    pub(super) fn at(offset: u64) -> Self {
        let within = offset % PART;
        match u32::try_from(offset - within) {
            Ok(COMMON) => Self::Common(within),
            Ok(ISR) => Self::Isr(within),
            Ok(DEVICE) => Self::Device(within),
            Ok(NOTIFY) => Self::Notify(within),
            Ok(MSIX_TABLE) => Self::MsixTable(within),
            Ok(MSIX_PENDING) => Self::MsixPending(within),
            _ => Self::Nothing,
        }
    }
}

/// Body of a `virtio_pci_cap` after its length byte.
fn capability(cfg_type: u8, offset: u32, length: u32, more: &[u8]) -> Vec<u8> {
    let mut body = vec![cfg_type, BAR, 0, 0, 0];
    body.extend_from_slice(&offset.to_le_bytes());
    body.extend_from_slice(&length.to_le_bytes());
    body.extend_from_slice(more);
    body
}

/// Why the configuration space could not be laid out.
#[derive(Debug, thiserror::Error)]
pub enum LayoutError {
    /// The BAR.
    #[error("virtio BAR")]
    Bar(#[from] BarError),
    /// A capability.
    #[error("virtio capability")]
    Capability(#[from] ConfigError),
}

/// Configuration space of a modern virtio function, and where in it the window of
/// `VIRTIO_PCI_CAP_PCI_CFG` is.
pub(super) fn config_space(
    kind: DeviceType,
    device_config_len: u16,
    queues: u16,
    vectors: u16,
) -> Result<(ConfigSpace, Window), LayoutError> {
    let device = DEVICE_BASE + kind.id();
    let mut config = ConfigSpace::new(&Identity {
        vendor: VENDOR,
        device,
        // Section 4.1.2.1: modern devices have a revision of at least 1.
        revision: 1,
        class: kind.pci_class(),
        subsystem_vendor: VENDOR,
        subsystem: device,
    });
    config.add_bar(
        BAR,
        BarKind::Memory64 {
            prefetchable: false,
        },
        BAR_SIZE,
    )?;
    let notify_len = u32::from(queues) * NOTIFY_STEP;
    let device_len = u32::from(device_config_len);
    let mut fixed = vec![
        capability(CFG_COMMON, COMMON, COMMON_LEN, &[]),
        capability(CFG_ISR, ISR, 1, &[]),
        capability(CFG_NOTIFY, NOTIFY, notify_len, &NOTIFY_STEP.to_le_bytes()),
    ];
    if device_len != 0 {
        fixed.push(capability(CFG_DEVICE, DEVICE, device_len, &[]));
    }
    for body in fixed {
        config.add_vendor_capability(&body, &vec![0; body.len()])?;
    }
    // The driver writes BAR, offset, length and the data window (section 4.1.4.9).
    let body = capability(CFG_PCI, 0, 0, &[0; 4]);
    let mask = [
        0, 0xff, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff,
    ];
    let window = Window(config.add_vendor_capability(&body, &mask)?);
    config.add_msix_capability(vectors, (BAR, MSIX_TABLE), (BAR, MSIX_PENDING))?;
    debug_assert!(Msix::table_bytes(vectors) <= PART);
    Ok((config, window))
}

/// The capability through which firmware without MMIO reaches the BAR: its offset.
#[derive(Clone, Copy, Debug)]
pub(super) struct Window(u16);

impl Window {
    /// Offsets of `bar`, `offset`, `length` and `pci_cfg_data` in the capability.
    const BAR: u16 = 4;
    const OFFSET: u16 = 8;
    const LENGTH: u16 = 12;
    const DATA: u16 = 16;

    /// Offset of the data bytes in configuration space.
    pub(super) fn data(self) -> u16 {
        self.0 + Self::DATA
    }

    /// Whether an access of `len` bytes at `offset` is one to the data.
    pub(super) fn covers(self, offset: u16, len: usize) -> bool {
        let data = usize::from(self.data());
        let start = usize::from(offset);
        start < data + 4 && start.saturating_add(len) > data
    }

    /// The place in the BAR the driver chose, and the access size, if they are allowed.
    pub(super) fn target(self, config: &ConfigSpace) -> Option<(u64, usize)> {
        let offset = config.u32(self.0 + Self::OFFSET);
        let length = config.u32(self.0 + Self::LENGTH);
        let size = match length {
            1 => 1,
            2 => 2,
            4 => 4,
            _ => return None,
        };
        let allowed = config.u8(self.0 + Self::BAR) == BAR
            && offset.is_multiple_of(length)
            && u64::from(offset) + u64::from(length) <= BAR_SIZE;
        allowed.then_some((u64::from(offset), size))
    }
}
