//! Devices of this host: the kernel's VFIO as a [`Backend`](crate::Backend).
//!
//! | file | what it is |
//! |---|---|
//! | `sys` | the calls themselves behind the trait [`Kernel`]: all `unsafe`, nothing else |
//! | `uapi` | numbers and structures of `linux/vfio.h` |
//! | `describe` | the kernel's answers taken apart; checked as those of any other |
//! | `container` | groups, and the map of guest memory that the devices of a VM share |
//! | `backend` | one device: regions, interrupts, dirty log |
//! | `watch` | its errors, and the host's wish to have it back |
//! | `feature`, `session` | migration: what the device can, its state, its data |

mod backend;
mod container;
pub mod describe;
mod error;
mod feature;
mod memory;
mod session;
mod sys;
mod uapi;
mod watch;

#[cfg(test)]
mod fake;

pub use backend::KernelVfioBackend;
pub use container::Groups;
pub use error::KernelError;
pub use memory::PinnedRam;
pub use sys::{HostKernel, Kernel, LogSpan};
pub use uapi::{Message, Number};
pub use watch::{DeviceNews, NewsHandler};
