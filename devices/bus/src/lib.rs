//! What a PC is made of besides CPUs and PCI devices: address spaces and who answers in them,
//! interrupt lines, the threads that serve devices, and the legacy devices.

pub mod bus;
pub mod interrupt;
pub mod thread;

pub use bus::BusDevice;
pub use interrupt::{InterruptError, IrqLine, MsiFabric, MsiLine, MsiMessage};
pub use thread::{ThreadKind, ThreadSpawner};
