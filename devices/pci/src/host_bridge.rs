//! The host bridge, 00:00.0: a function without BARs that says what kind of root this is.

use crate::config::{ConfigError, ConfigSpace, ConfigState, Identity};
use crate::device::{BarInfo, Doorbell, PciDevice};

/// The identity of the generic PCI Express host bridge that guests know from other machines
/// (vendor Red Hat, "QEMU PCIe Host bridge" in the PCI ID list); no driver quirks hang on it.
const IDENTITY: Identity = Identity {
    vendor: 0x1b36,
    device: 0x0008,
    revision: 0,
    class: [0x06, 0x00, 0x00],
    subsystem_vendor: 0x1b36,
    subsystem: 0x0008,
};

/// The host bridge.
#[derive(Debug)]
pub struct HostBridge {
    config: ConfigSpace,
}

impl HostBridge {
    /// Identifier on the bus.
    pub const ID: &'static str = "_host_bridge";

    /// A bridge after power-on.
    pub(crate) fn new() -> Self {
        Self {
            config: ConfigSpace::new(&IDENTITY),
        }
    }

    pub(crate) fn save(&self) -> ConfigState {
        self.config.save()
    }

    pub(crate) fn restore(&mut self, state: &ConfigState) -> Result<(), ConfigError> {
        self.config.restore(state)
    }
}

impl PciDevice for HostBridge {
    fn id(&self) -> &str {
        Self::ID
    }

    fn read_config(&mut self, offset: u16, data: &mut [u8]) {
        self.config.read(offset, data);
    }

    fn write_config(&mut self, offset: u16, data: &[u8]) {
        self.config.write(offset, data);
    }

    fn bars(&self) -> Vec<BarInfo> {
        Vec::new()
    }

    fn set_bar_address(&mut self, index: u8, address: u64) {
        self.config.set_bar_address(index, address);
    }

    fn memory_enabled(&self) -> bool {
        self.config.memory_enabled()
    }

    fn read_bar(&mut self, _: u8, _: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn write_bar(&mut self, _: u8, _: u64, _: &[u8]) {}

    fn doorbells(&self) -> Vec<Doorbell> {
        Vec::new()
    }
}
