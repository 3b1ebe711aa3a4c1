//! What a PC is made of besides CPUs and PCI devices: address spaces and who answers in them,
//! interrupt lines, the threads that serve devices, and the legacy devices.
//!
//! # How the parts fit
//! - [`Bus`] is an address space. vCPU threads bring accesses to it, and it hands each to the
//!   [`BusDevice`] registered there, with no lock held.
//! - A device interrupts by an [`IrqLine`] (a pin) or by [`MsiLine`]s from an [`MsiFabric`]. Both
//!   are traits, so the same device serves a guest of this process or a client of another one.
//! - [`ThreadSpawner`] makes the threads. Each has a [`ThreadKind`], which names its system-call
//!   filter.
//! - [`serial`], [`rtc`], [`acpi`] are the legacy devices a guest finds; [`terminal`] is what a console is
//!   connected to on the host.

pub mod acpi;
pub mod bus;
pub mod interrupt;
pub mod rtc;
pub mod serial;
pub mod terminal;
pub mod thread;

pub use bus::{Bus, BusDevice, BusError};
pub use interrupt::{InterruptError, IrqLine, MsiFabric, MsiLine, MsiMessage};
pub use thread::{ThreadKind, ThreadSpawner};
