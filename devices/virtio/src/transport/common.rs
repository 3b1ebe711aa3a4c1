//! The common configuration (`struct virtio_pci_common_cfg`, virtio 1.2, section 4.1.4.3) and
//! the device status machine (section 2.1).

use serde::{Deserialize, Serialize};

use super::interrupt::Interrupts;
use crate::device::{VirtioDevice, feature};
use crate::queue::{QueuePosition, QueueSetup};

/// Bytes of the structure up to `queue_device`, without the optional fields.
pub(super) const COMMON_BYTES: usize = 56;

/// Bits of the device status field (section 2.1).
mod status {
    pub(super) const FEATURES_OK: u8 = 8;
    pub(super) const DRIVER_OK: u8 = 4;
    pub(super) const NEEDS_RESET: u8 = 64;
    pub(super) const FAILED: u8 = 128;
    /// ACKNOWLEDGE and DRIVER, which only say that there is a driver.
    pub(super) const PRESENT: u8 = 3;
}

/// How far the driver has come.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub(super) enum Phase {
    /// After a reset: features are being chosen.
    #[default]
    Probing,
    /// FEATURES_OK: features are fixed, queues are being set up.
    Negotiated,
    /// DRIVER_OK: the device serves.
    Live,
    /// The driver gave up; only a reset helps.
    Failed,
}

/// What a register write asks of the transport.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Effect {
    /// Nothing.
    None,
    /// Reset the device.
    Reset,
    /// The driver is ready: serve it.
    Start,
    /// The driver gave up: stop serving.
    Stop,
}

/// Registers of one queue.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub(super) struct QueueRegisters {
    pub(super) size: u16,
    pub(super) enabled: bool,
    pub(super) descriptors: u64,
    pub(super) available: u64,
    pub(super) used: u64,
    /// Where the device stopped; 0 until it has run.
    pub(super) position: QueuePosition,
}

/// All registers but the vectors, which the workers read too.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub(super) struct Registers {
    pub(super) phase: Phase,
    /// ACKNOWLEDGE and DRIVER as written.
    present: u8,
    device_feature_select: u32,
    driver_feature_select: u32,
    pub(super) driver_features: u64,
    queue_select: u16,
    pub(super) queues: Vec<QueueRegisters>,
}

impl Registers {
    /// The registers after a reset, with each queue at its largest size.
    pub(super) fn new(queue_sizes: &[u16]) -> Self {
        Self {
            queues: queue_sizes
                .iter()
                .map(|size| QueueRegisters {
                    size: *size,
                    ..QueueRegisters::default()
                })
                .collect(),
            ..Self::default()
        }
    }

    /// The queue set-ups and positions of the queues the driver enabled.
    pub(super) fn enabled_queues(
        &self,
    ) -> impl Iterator<Item = (u16, QueueSetup, QueuePosition)> + '_ {
        let event_idx = self.driver_features & feature::RING_EVENT_IDX != 0;
        let indirect = self.driver_features & feature::RING_INDIRECT_DESC != 0;
        (0..)
            .zip(&self.queues)
            .filter(|(_, q)| q.enabled)
            .map(move |(index, q)| {
                let setup = QueueSetup {
                    size: q.size,
                    descriptors: q.descriptors,
                    available: q.available,
                    used: q.used,
                    event_idx,
                    indirect,
                };
                (index, setup, q.position)
            })
    }

    /// The device status field.
    pub(super) fn status(&self, interrupts: &Interrupts) -> u8 {
        let phase = match self.phase {
            Phase::Probing => 0,
            Phase::Negotiated => status::FEATURES_OK,
            Phase::Live => status::FEATURES_OK | status::DRIVER_OK,
            Phase::Failed => status::FAILED,
        };
        let broken = if interrupts.is_broken() {
            status::NEEDS_RESET
        } else {
            0
        };
        self.present | phase | broken
    }

    /// Serves a read.
    pub(super) fn read(
        &self,
        device: &dyn VirtioDevice,
        interrupts: &Interrupts,
        offset: u64,
        data: &mut [u8],
    ) {
        let mut image = Vec::with_capacity(COMMON_BYTES);
        let mut put = |bytes: &[u8]| image.extend_from_slice(bytes);
        let queue = self.selected().copied().unwrap_or_default();
        // A queue that does not exist has size 0 (section 4.1.4.3.1).
        let exists = self.selected().is_some();
        let notify_off = if exists { self.queue_select } else { 0 };
        put(&self.device_feature_select.to_le_bytes());
        put(&word(device.features(), self.device_feature_select).to_le_bytes());
        put(&self.driver_feature_select.to_le_bytes());
        put(&word(self.driver_features, self.driver_feature_select).to_le_bytes());
        put(&interrupts.config_vector().to_le_bytes());
        put(&u16::try_from(self.queues.len())
            .unwrap_or(u16::MAX)
            .to_le_bytes());
        put(&[self.status(interrupts), interrupts.generation()]);
        put(&self.queue_select.to_le_bytes());
        put(&queue.size.to_le_bytes());
        put(&interrupts.queue_vector(self.queue_select).to_le_bytes());
        put(&u16::from(queue.enabled).to_le_bytes());
        put(&notify_off.to_le_bytes());
        put(&queue.descriptors.to_le_bytes());
        put(&queue.available.to_le_bytes());
        put(&queue.used.to_le_bytes());
        data.fill(0);
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        for (to, from) in data.iter_mut().zip(image.iter().skip(start)) {
            *to = *from;
        }
    }

    /// Serves a write. Accesses that do not fit a field are dropped.
    pub(super) fn write(
        &mut self,
        device: &dyn VirtioDevice,
        interrupts: &Interrupts,
        offset: u64,
        data: &[u8],
    ) -> Effect {
        match (offset, data) {
            (0, &[a, b, c, d]) => self.device_feature_select = u32::from_le_bytes([a, b, c, d]),
            (8, &[a, b, c, d]) => self.driver_feature_select = u32::from_le_bytes([a, b, c, d]),
            (12, &[a, b, c, d]) => self.write_features(u32::from_le_bytes([a, b, c, d])),
            (16, &[a, b]) => interrupts.set_config_vector(u16::from_le_bytes([a, b])),
            (20, &[value]) => return self.write_status(device, value),
            (22, &[a, b]) => self.queue_select = u16::from_le_bytes([a, b]),
            (26, &[a, b]) => {
                interrupts.set_queue_vector(self.queue_select, u16::from_le_bytes([a, b]));
            }
            (24..56, _) => self.write_queue(device, offset, data),
            _ => {}
        }
        Effect::None
    }

    fn write_features(&mut self, value: u32) {
        // Features are fixed once agreed upon (section 3.1.1).
        if self.phase == Phase::Probing {
            let value = u64::from(value);
            match self.driver_feature_select {
                0 => self.driver_features = self.driver_features & !0xffff_ffff | value,
                1 => self.driver_features = self.driver_features & 0xffff_ffff | value << 32,
                _ => {}
            }
        }
    }

    fn write_status(&mut self, device: &dyn VirtioDevice, value: u8) -> Effect {
        if value == 0 {
            return Effect::Reset;
        }
        // Bits are only ever added (section 2.1.1); a write that leaves one out keeps it.
        self.present |= value & status::PRESENT;
        if value & status::FAILED != 0 {
            let was_live = self.phase == Phase::Live;
            self.phase = Phase::Failed;
            return if was_live { Effect::Stop } else { Effect::None };
        }
        if self.phase == Phase::Probing && value & status::FEATURES_OK != 0 {
            match self.check_features(device) {
                Ok(()) => self.phase = Phase::Negotiated,
                Err(reason) => tracing::warn!(
                    device = device.id(),
                    features = format_args!("{:#x}", self.driver_features),
                    reason,
                    "the driver's choice of features is refused"
                ),
            }
        }
        if self.phase == Phase::Negotiated && value & status::DRIVER_OK != 0 {
            self.phase = Phase::Live;
            return Effect::Start;
        }
        Effect::None
    }

    /// Whether the driver's features are ones the device can serve.
    pub(super) fn check_features(&self, device: &dyn VirtioDevice) -> Result<(), &'static str> {
        if self.driver_features & !device.features() != 0 {
            return Err("a feature that is not offered");
        }
        if self.driver_features & feature::VERSION_1 == 0 {
            return Err("no VIRTIO_F_VERSION_1: legacy drivers are not served");
        }
        device.check_features(self.driver_features)
    }

    fn write_queue(&mut self, device: &dyn VirtioDevice, offset: u64, data: &[u8]) {
        let negotiated = self.phase == Phase::Negotiated;
        let max = device
            .queue_sizes()
            .get(usize::from(self.queue_select))
            .copied()
            .unwrap_or(0);
        let Some(queue) = self.queues.get_mut(usize::from(self.queue_select)) else {
            return;
        };
        // Section 3.1.1: queues are set up between FEATURES_OK and DRIVER_OK, and section
        // 4.1.4.3.2: before they are enabled.
        if !negotiated || queue.enabled {
            return;
        }
        match (offset, data) {
            (24, &[a, b]) => {
                let size = u16::from_le_bytes([a, b]);
                if size.is_power_of_two() && size <= max {
                    queue.size = size;
                }
            }
            (28, &[1, 0]) => queue.enabled = true,
            (32..40, _) => patch(&mut queue.descriptors, offset - 32, data),
            (40..48, _) => patch(&mut queue.available, offset - 40, data),
            (48..56, _) => patch(&mut queue.used, offset - 48, data),
            _ => {}
        }
    }

    fn selected(&self) -> Option<&QueueRegisters> {
        self.queues.get(usize::from(self.queue_select))
    }
}

/// 32 bits of a feature set, as the driver selects them.
fn word(features: u64, select: u32) -> u32 {
    let [a, b, c, d, e, f, g, h] = features.to_le_bytes();
    match select {
        0 => u32::from_le_bytes([a, b, c, d]),
        1 => u32::from_le_bytes([e, f, g, h]),
        _ => 0,
    }
}

/// Writes a half or all of a 64-bit register; other accesses are dropped.
fn patch(register: &mut u64, at: u64, data: &[u8]) {
    let mut bytes = register.to_le_bytes();
    match (at, data) {
        (0, &[a, b, c, d]) => {
            let [to @ .., _, _, _, _] = &mut bytes;
            *to = [a, b, c, d];
        }
        (4, &[a, b, c, d]) => {
            let [_, _, _, _, to @ ..] = &mut bytes;
            *to = [a, b, c, d];
        }
        (0, &[a, b, c, d, e, f, g, h]) => bytes = [a, b, c, d, e, f, g, h],
        _ => return,
    }
    *register = u64::from_le_bytes(bytes);
}
