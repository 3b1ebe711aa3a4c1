//! PCI: configuration space, base address registers, MSI-X, and the bus that joins them to the
//! guest's address spaces.
//!
//! # How the parts fit
//! * A device implements [`PciDevice`]. It usually owns a [`ConfigSpace`] (the type 0 header, its
//!   BARs and capabilities, with write masks) and an [`Msix`] (the vector table and pending bits
//!   over [`devices::MsiLine`]s), and forwards accesses to them.
//! * [`PciBus`] holds up to 32 devices (bus 0, function 0 of each slot). It answers the guest's
//!   configuration accesses through two windows: [`EcamWindow`] (memory mapped, 4 KiB per
//!   function) and [`ConfigPorts`] (ports 0xCF8/0xCFC). Absent devices read as all ones.
//! * When the guest moves a BAR or switches decoding on or off, the bus tells its [`BarMapper`].
//!   [`BusBarMapper`] is the usual one: it puts the BAR on a [`devices::Bus`] and has a
//!   [`DoorbellBinder`] bind the device's doorbells to eventfds in the kernel.
//! * Devices come and go while the guest runs: [`HotPlug`] tells the guest and takes its ejects.
//!
//! # Lock order
//! 0. that of [`HotPlug`],
//! 1. the slot's mapping lock (private to the bus; one configuration write per device at a time),
//! 2. the device's mutex,
//! 3. the locks inside the mapper and the address space.
//!
//! The device's mutex is released before the mapper is called, and an address space calls a
//! device with none of its own locks held; so 2 and 3 are never nested in opposite order. A
//! device may trigger interrupts and use its own address-space handles under its mutex.
#![forbid(unsafe_code)]

pub mod bus;
pub mod config;
pub mod device;
pub mod host_bridge;
pub mod hotplug;
pub mod mapper;
pub mod msi;
pub mod msix;
pub mod windows;

pub use bus::{PciBus, PciBusError, PciBusState, SLOTS};
pub use config::{BarError, Capability, ConfigError, ConfigSpace, ConfigState, Identity};
pub use device::{BarInfo, BarKind, Doorbell, PciDevice};
pub use host_bridge::HostBridge;
pub use hotplug::{HotPlug, HotPlugError, HotPlugState};
pub use mapper::{BarMapper, BusBarMapper, DoorbellBinder, DoorbellSpace, MapError};
pub use msi::{Msi, MsiRegisters};
pub use msix::{Msix, MsixError, MsixState};
pub use windows::{ConfigPorts, EcamWindow};

/// A device as the bus and the device manager share it.
pub type SharedDevice = std::sync::Arc<parking_lot::Mutex<dyn PciDevice>>;
