//! The vfio-user protocol: a device in one process, its VMM in another, a unix socket between.
//!
//! vfio-user carries what VFIO's ioctls do as messages: a server shows a PCI device as regions
//! and interrupts, a client (the VMM) maps guest memory for it by file descriptor, passes
//! eventfds for its interrupts, and drives its migration. This crate is both ends:
//!
//! - [`Client`] for a VMM: thread-safe calls that always end in bounded time, with the server's
//!   errno as a typed error and a dead server noticed and named;
//! - [`ServerDevice`] and [`Server`] for a device: implement the trait, and every message has been
//!   checked before your code sees it.
//!
//! Neither end trusts the other: lengths are bounded before anything is allocated, descriptors
//! are bounded and closed on every error, and a breach of the protocol ends the connection.
//!
//! Migration is VFIO's version 2: [`DeviceState`] and the table of arcs in [`state`], stop-copy,
//! pre-copy and peer-to-peer states, and the log of pages a device wrote (DMA logging). One
//! extension: the estimate of stop-copy data (`MIG_DATA_SIZE`) and the figures of pre-copy
//! (`struct vfio_precopy_info`) by the kernel's feature numbers, which a server that does not know
//! them refuses with ENOTTY.
//!
//! ```
//! use std::os::unix::net::UnixStream;
//! use std::path::Path;
//! use vfio_user::{Client, ClientConfig};
//!
//! let (ours, theirs) = UnixStream::pair()?;
//! drop(theirs); // A server that dies at once:
//! let gone = Client::from_stream(ours, Path::new("nic.sock"), ClientConfig::default());
//! assert!(gone.is_err_and(|error| error.to_string().contains("nic.sock")));
//! # Ok::<(), std::io::Error>(())
//! ```
//!
//! Where to look: [`wire`] for bytes and numbers, [`state`] for the migration table, [`region`]
//! for what a device shows, [`client`] and [`server`] for the ends.

#![forbid(unsafe_code)]

pub mod client;
mod link;
pub mod region;
pub mod server;
pub mod state;
mod transport;
mod version;
pub mod wire;

pub use client::{Client, ClientConfig, ClientError, DmaHandler, GoneHandler};
pub use link::LinkFault;
pub use region::{Area, DeviceInfo, IoEventFd, IrqInfo, Malformed, RegionInfo, RegionMapping};
pub use rustix::io::Errno;
pub use server::{
    ClientMemory, DmaLogDevice, DmaMapping, IrqAction, IrqData, IrqRequest, MigrationDevice,
    Server, ServerDevice, ServerError, Stopper, serve,
};
pub use state::{
    ArcFailure, DataSession, DeviceState, Machine, MigrationFlags, PrecopyInfo, StateArc,
    StateError,
};
pub use transport::TransportError;
pub use version::{Capabilities, MigrationCapability, VersionError};
pub use wire::{Command, DeviceFlags, DmaFlags, Feature, IrqFlags, RegionFlags};
