//! What a guest can know of a device from outside, and what a migration needs of it.
//!
//! Two devices take each other's state only if these fit. All of it is read once, when the device
//! is connected and before any driver touches it, so that the preflight of a migration can
//! compare both ends while nothing has changed yet.

use pci::config::{CONFIG_SPACE_SIZE, offset};
use pci::{BarInfo, BarKind, Capability, ConfigSpace};
use vfio_user::MigrationFlags;

use crate::backend::{Backend, BackendError};

/// PCI vendor ID of virtio devices.
const VIRTIO_VENDOR: u16 = 0x1af4;
/// PCI device IDs of modern virtio devices are this and the virtio device ID (virtio 1.2,
/// section 4.1.2).
const VIRTIO_MODERN: u16 = 0x1040;
/// Virtio device ID of a network card.
const VIRTIO_NET: u16 = 1;
/// `VIRTIO_NET_F_MTU`.
const NET_F_MTU: u64 = 1 << 3;
/// Offset of `mtu` in the configuration of a network card (section 5.1.4).
const NET_MTU: u64 = 10;

/// `cfg_type` of the common and of the device's own configuration (section 4.1.4).
const CFG_COMMON: u8 = 1;
const CFG_DEVICE: u8 = 4;
/// Registers of `struct virtio_pci_common_cfg` (section 4.1.4.3).
const DEVICE_FEATURE_SELECT: u64 = 0;
const DEVICE_FEATURE: u64 = 4;
const NUM_QUEUES: u64 = 18;
const QUEUE_SELECT: u64 = 22;
const QUEUE_SIZE: u64 = 24;
/// Bytes of it that every device has.
const COMMON_BYTES: u32 = 56;

/// Queues whose size is asked for. More than any device here has; each costs two messages.
const MOST_QUEUES: u16 = 512;

/// What a driver binds to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DeviceIdentity {
    /// Vendor ID.
    pub vendor: u16,
    /// Device ID.
    pub device: u16,
    /// Subsystem vendor ID.
    pub subsystem_vendor: u16,
    /// Subsystem ID.
    pub subsystem: u16,
    /// Revision ID.
    pub revision: u8,
}

impl DeviceIdentity {
    pub(crate) fn of(config: &ConfigSpace) -> Self {
        Self {
            vendor: config.u16(offset::VENDOR),
            device: config.u16(offset::DEVICE),
            subsystem_vendor: config.u16(offset::SUBSYSTEM_VENDOR),
            subsystem: config.u16(offset::SUBSYSTEM),
            revision: config.u8(offset::REVISION),
        }
    }
}

/// What a virtio device offers to any driver.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct VirtioOffer {
    /// The features, as the bits of virtio 1.2, section 6.
    pub features: u64,
    /// Largest size of each queue.
    pub queue_sizes: Vec<u16>,
    /// The MTU in bytes that a network card tells.
    pub mtu: Option<u16>,
}

/// What can be known of a device before its driver runs.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DeviceProfile {
    /// What it is.
    pub identity: DeviceIdentity,
    /// Its BARs; addresses say nothing here.
    pub bars: Vec<BarInfo>,
    /// Its MSI-X vectors.
    pub vectors: u16,
    /// CRC-32C of the part of configuration space that the guest cannot write.
    pub config_digest: u32,
    /// What its migration can do; `None` if it cannot be migrated.
    pub migration: Option<MigrationFlags>,
    /// What it offers if it is a modern virtio device.
    pub virtio: Option<VirtioOffer>,
}

impl DeviceProfile {
    /// Asks the device behind `backend`, which no driver has touched. Leaves selectors of a virtio
    /// device changed: a reset is to follow.
    pub(crate) fn read(
        backend: &dyn Backend,
        config: &ConfigSpace,
        vectors: u16,
        migration: Option<MigrationFlags>,
    ) -> Result<Self, BackendError> {
        let identity = DeviceIdentity::of(config);
        Ok(Self {
            identity,
            bars: config.bars(),
            vectors,
            config_digest: digest(config),
            migration,
            virtio: virtio(backend, config, identity)?,
        })
    }
}

/// CRC-32C of what the guest cannot change.
fn digest(config: &ConfigSpace) -> u32 {
    let mut fixed = config.clone();
    fixed.reset();
    let mut image = [0; CONFIG_SPACE_SIZE];
    fixed.read(0, &mut image);
    crc32c::crc32c(&image)
}

/// A structure of a virtio device in one of its BARs.
#[derive(Clone, Copy)]
struct Structure {
    bar: u32,
    offset: u64,
    len: u32,
}

impl Structure {
    /// The first one of this type that lies within a memory BAR.
    fn find(config: &ConfigSpace, cfg_type: u8) -> Option<Self> {
        let capabilities = config.capabilities().into_iter();
        capabilities
            .filter(|(at, id)| *id == Capability::VENDOR && config.u8(at + 3) == cfg_type)
            .find_map(|(at, _)| {
                let bar = config.bar(config.u8(at + 4))?;
                let (offset, len) = (config.u32(at + 8), config.u32(at + 12));
                let end = u64::from(offset) + u64::from(len);
                (bar.kind != BarKind::Io && end <= bar.size).then_some(Self {
                    bar: u32::from(bar.index),
                    offset: u64::from(offset),
                    len,
                })
            })
    }

    fn read<const N: usize>(
        self,
        backend: &dyn Backend,
        register: u64,
    ) -> Result<[u8; N], BackendError> {
        let mut value = [0; N];
        backend.region_read(self.bar, self.offset + register, &mut value)?;
        Ok(value)
    }

    fn read_u16(self, backend: &dyn Backend, register: u64) -> Result<u16, BackendError> {
        self.read(backend, register).map(u16::from_le_bytes)
    }

    fn write(self, backend: &dyn Backend, register: u64, value: &[u8]) -> Result<(), BackendError> {
        backend.region_write(self.bar, self.offset + register, value)
    }
}

/// What a virtio device offers; `None` for other devices and for one whose registers are not
/// where the specification has them.
fn virtio(
    backend: &dyn Backend,
    config: &ConfigSpace,
    identity: DeviceIdentity,
) -> Result<Option<VirtioOffer>, BackendError> {
    if identity.vendor != VIRTIO_VENDOR || identity.device < VIRTIO_MODERN {
        return Ok(None);
    }
    let common = Structure::find(config, CFG_COMMON).filter(|found| found.len >= COMMON_BYTES);
    let Some(common) = common else {
        return Ok(None);
    };
    let mut halves = [0; 2];
    for (select, half) in (0_u32..).zip(&mut halves) {
        common.write(backend, DEVICE_FEATURE_SELECT, &select.to_le_bytes())?;
        *half = u32::from_le_bytes(common.read(backend, DEVICE_FEATURE)?);
    }
    let [low, high] = halves.map(u64::from);
    let features = low | high << 32;
    let queues = common.read_u16(backend, NUM_QUEUES)?.min(MOST_QUEUES);
    let mut queue_sizes = Vec::with_capacity(usize::from(queues));
    for queue in 0..queues {
        common.write(backend, QUEUE_SELECT, &queue.to_le_bytes())?;
        queue_sizes.push(common.read_u16(backend, QUEUE_SIZE)?);
    }
    let tells_mtu = identity.device == VIRTIO_MODERN + VIRTIO_NET && features & NET_F_MTU != 0;
    let own = Structure::find(config, CFG_DEVICE)
        .filter(|own| tells_mtu && u64::from(own.len) >= NET_MTU + 2);
    let mtu = own.map(|own| own.read_u16(backend, NET_MTU)).transpose()?;
    Ok(Some(VirtioOffer {
        features,
        queue_sizes,
        mtu,
    }))
}

#[cfg(test)]
mod tests;
