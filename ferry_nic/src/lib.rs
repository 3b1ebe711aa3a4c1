//! A NIC in a process of its own: any virtio device behind a vfio-user server, and the program
//! `ferry-nic` that serves a virtio-net card on a tap.
//!
//! To the guest it is a passthrough virtio NIC that its stock driver binds; to the VMM it is a
//! device of somebody else, with what a SmartNIC's virtual function has: its own dirty log, state
//! that moves over VFIO's migration states with a pre-copy part, and a life apart from the VMM's.
//! A driver that breaks it breaks this process, which holds nothing but a tap and the guest's
//! memory.
//!
//! # Where things are
//! * [`device`]: [`NicDevice`], the PCI function as a [`vfio_user::ServerDevice`].
//! * [`memory`]: the client's memory, mapped as it comes; each region logs what is written to it,
//!   and that log is the device's dirty log.
//! * [`interrupts`]: MSI-X vectors that signal the client's eventfds.
//! * [`migration`]: the state stream.
//! * [`options`]: the program's options.
//!
//! # Threads
//! One thread reads the client's messages and does all that they ask. The card's worker threads
//! (one per queue pair, one for the control queue) share with it only guest memory, eventfds and
//! atomics. They are joined before the device counts as stopped, before client memory is given
//! back, and before a reset is over.

#![deny(unsafe_code)]

pub mod device;
pub mod interrupts;
pub mod memory;
pub mod migration;
pub mod options;
mod os;

pub use device::NicDevice;
pub use os::{block_signals, wait_for_signal};
