//! Devices of this host: the kernel's VFIO as a [`Backend`](crate::Backend).
//!
//! | file | what it is |
//! |---|---|
//! | `sys` | the calls themselves behind the trait [`Kernel`]: all `unsafe`, nothing else |
//! | `uapi` | numbers and structures of `linux/vfio.h` and `linux/iommufd.h` |
//! | `describe` | the kernel's answers taken apart; checked as those of any other |
//! | `host` | how a VM comes by its devices: by groups, or by their own files |
//! | `space` | the map of guest memory that the devices of a VM share |
//! | `container` | its keeper where devices come by groups |
//! | `iommufd` | its keeper where devices have files of their own; page tables that log DMA |
//! | `registry` | the hypervisor's knowledge of all that |
//! | `backend` | one device: regions, interrupts, dirty log |
//! | `watch` | its errors, and the host's wish to have it back |
//! | `feature`, `session` | migration: what the device can, its state, its data |

mod backend;
mod container;
pub mod describe;
mod error;
mod feature;
mod host;
mod iommufd;
mod memory;
mod registry;
mod session;
mod space;
mod sys;
mod uapi;
mod watch;

#[cfg(test)]
mod fake;

pub use backend::KernelVfioBackend;
pub use error::KernelError;
pub use host::{HostVfio, Interface};
pub use iommufd::{Iommufd, Reach};
pub use memory::PinnedRam;
pub use registry::FileRegistry;
pub use sys::{HostKernel, IovaRules, Kernel, LogSpan};
pub use uapi::{Message, Number};
pub use watch::{DeviceNews, NewsHandler};
