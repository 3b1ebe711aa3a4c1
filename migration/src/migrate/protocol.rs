//! What the two sides say to each other.
//!
//! ```text
//!   source                                   destination
//!     |-- Manifest ------------------------------>|  checks, opens, maps, pins
//!     |<----------------------- Accept | Refuse --|
//!     |-- Pages*, DeviceChunk* (interleaved) ---->|  ┐
//!     |-- RoundEnd ------------------------------>|  │ each round
//!     |<------------------------------- RoundAck --|  ┘
//!   [vCPUs and devices stop]
//!     |-- Pages*, (DeviceChunk* DeviceEnd)* ----->|  loads each device at its end
//!     |-- Complete ------------------------------>|
//!     |<---------------------------------- Ready --|  holds everything, runs nothing
//!     |-- Commit -------------------------------->|  the guest's owner changes here
//!     |<-------------------------------- Running --|
//!   either, before Commit:  Abort{reason};  either, at any time:  Progress
//! ```
//!
//! Control payloads are `postcard` of the structs here; pages and device chunks are raw bytes
//! (see [`pages`](super::pages)).

use std::collections::BTreeMap;
use std::fmt;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::frame::{FrameBuffer, FrameError, Kind, PROTOCOL_VERSION};
use crate::memory::{GuestMemory, ram_regions};

/// What is to move, told before anything is changed on either side.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Manifest {
    /// [`PROTOCOL_VERSION`] of the source.
    pub protocol: u16,
    /// The source's release of Ferry.
    pub ferry_version: String,
    /// The source host's page size in bytes, at which dirty memory is tracked and sent.
    pub page_size: u64,
    /// Guest RAM, sorted by address.
    pub memory: Vec<MemoryRegion>,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// The guest's CPUID table, as the hypervisor's layer writes it.
    pub cpuid: Vec<u8>,
    /// KVM features that the guest's state needs, by name.
    pub required_kvm_features: Vec<String>,
    /// Everything with state, in the order in which it is stopped, sent and loaded.
    pub devices: Vec<DeviceManifest>,
    /// The VM's configuration, JSON.
    pub config: Vec<u8>,
}

impl Manifest {
    /// A manifest of this build's version with nothing in it; the rest is filled in.
    pub fn new(page_size: u64) -> Self {
        Self {
            protocol: PROTOCOL_VERSION,
            ferry_version: env!("CARGO_PKG_VERSION").to_owned(),
            page_size,
            memory: Vec::new(),
            vcpus: 0,
            cpuid: Vec::new(),
            required_kvm_features: Vec::new(),
            devices: Vec::new(),
            config: Vec::new(),
        }
    }

    /// Bytes of guest RAM in all.
    pub fn memory_bytes(&self) -> u64 {
        self.memory
            .iter()
            .fold(0, |all, region| all.saturating_add(region.len))
    }
}

/// A region of guest RAM.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub struct MemoryRegion {
    /// First guest physical address.
    pub gpa: u64,
    /// Length in bytes.
    pub len: u64,
}

impl MemoryRegion {
    /// The regions of a guest's RAM, for its manifest.
    pub fn all(memory: &GuestMemory) -> Vec<Self> {
        let regions = ram_regions(memory).into_iter();
        regions
            .map(|region| Self {
                gpa: region.gpa.0,
                len: region.len,
            })
            .collect()
    }
}

impl fmt::Display for MemoryRegion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} MiB at {:#x}", self.len >> 20, self.gpa)
    }
}

/// A part of the VM with state.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct DeviceManifest {
    /// Its identifier, unique in the VM and the same on both sides.
    pub id: String,
    /// What it is: `virtio-net`, `passthrough`, `vcpu`…
    pub kind: String,
    /// What must fit at the destination, as names and values that the device's kind knows:
    /// features, vendor and device identifiers, sizes.
    pub compat: BTreeMap<String, String>,
    /// Whether it can move.
    pub migratable: Migratable,
    /// Upper bound in bytes of its state in all.
    pub max_state_bytes: u64,
}

/// Whether a device can move.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Migratable {
    /// It can.
    Yes,
    /// It cannot.
    No {
        /// Why.
        reason: String,
        /// What the operator can do.
        remedy: String,
    },
}

/// One reason why a VM cannot move.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Refusal {
    /// What stands in the way: a device's identifier, `memory`, `cpuid`…
    pub subject: String,
    /// Why.
    pub reason: String,
    /// What the operator can do.
    pub remedy: String,
}

impl Refusal {
    /// A refusal.
    pub fn new(
        subject: impl Into<String>,
        reason: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self {
            subject: subject.into(),
            reason: reason.into(),
            remedy: remedy.into(),
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}: {}", self.subject, self.reason, self.remedy)
    }
}

/// Payload of [`Kind::Accept`].
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(super) struct Accept {
    /// The destination's release of Ferry.
    pub(super) ferry_version: String,
}

/// Payload of [`Kind::Refuse`].
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(super) struct Refuse {
    pub(super) refusals: Vec<Refusal>,
}

/// Payload of [`Kind::RoundEnd`] and [`Kind::RoundAck`].
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(super) struct Round {
    /// Which, from 1.
    pub(super) round: u32,
    /// Bytes of guest memory, zero pages included, that the round's frames told.
    pub(super) memory_bytes: u64,
}

/// Payload of [`Kind::DeviceEnd`].
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(super) struct DeviceEnd {
    /// Place in [`Manifest::devices`].
    pub(super) index: u16,
    /// Bytes in all chunks.
    pub(super) bytes: u64,
    /// CRC-32C over all chunks.
    pub(super) checksum: u32,
}

/// Payload of [`Kind::Complete`].
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(super) struct Complete {
    /// Bytes of guest memory told since the last `RoundEnd`.
    pub(super) memory_bytes: u64,
}

/// Payload of [`Kind::Ready`].
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(super) struct Ready {
    /// Time that loading the devices' states took besides receiving them, in µs.
    pub(super) load_us: u64,
    /// Time it took to take in each device's state since the last round, in µs, in the manifest's
    /// order.
    pub(super) devices_us: Vec<u64>,
}

/// Payload of [`Kind::Commit`].
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(super) struct Commit;

/// Payload of [`Kind::Running`].
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(super) struct Running {
    /// Time it took from `Commit` until the vCPUs ran, in µs.
    pub(super) run_us: u64,
}

/// Payload of [`Kind::Abort`].
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(super) struct Abort {
    pub(super) reason: String,
}

/// Bytes of a device chunk before its data: the device's index and a reserved zero, u16 each.
const CHUNK_HEADER_BYTES: usize = 4;

/// Most bytes of device state in one frame. Half the limit, for fair turns with memory frames.
pub(super) const CHUNK_BYTES: usize = 512 << 10;

/// Puts room for a chunk of `device` into `frame` and gives where its data goes.
pub(super) fn chunk_room(frame: &mut FrameBuffer, device: u16, bytes: usize) -> &mut [u8] {
    frame.resize(CHUNK_HEADER_BYTES.saturating_add(bytes));
    let [a, b] = device.to_le_bytes();
    match frame.payload_mut().split_first_chunk_mut() {
        Some((header, data)) => {
            *header = [a, b, 0, 0];
            data
        }
        None => &mut [],
    }
}

/// Cuts a chunk's data to what was read.
pub(super) fn chunk_trim(frame: &mut FrameBuffer, bytes: usize) {
    frame.resize(CHUNK_HEADER_BYTES.saturating_add(bytes));
}

/// The device and the data of a chunk.
pub(super) fn chunk_open(payload: &[u8]) -> Result<(u16, &[u8]), FrameError> {
    match payload.split_first_chunk() {
        Some(([a, b, 0, 0], data)) => Ok((u16::from_le_bytes([*a, *b]), data)),
        _ => Err(FrameError::Malformed {
            kind: Kind::DeviceChunk,
            reason: "no valid chunk header".into(),
        }),
    }
}

/// Encodes a control message into `frame`.
pub(super) fn encode<T: Serialize>(
    kind: Kind,
    message: &T,
    frame: &mut FrameBuffer,
) -> Result<(), FrameError> {
    frame.clear();
    let bytes = postcard::to_stdvec(message).map_err(|error| FrameError::Malformed {
        kind,
        reason: error.to_string(),
    })?;
    frame.extend(&bytes);
    Ok(())
}

/// Decodes a control message that fills the whole payload.
pub(super) fn decode<T: DeserializeOwned>(kind: Kind, payload: &[u8]) -> Result<T, FrameError> {
    let malformed = |reason: String| FrameError::Malformed { kind, reason };
    match postcard::take_from_bytes(payload) {
        Ok((message, [])) => Ok(message),
        Ok((_, rest)) => Err(malformed(format!("{} bytes too many", rest.len()))),
        Err(error) => Err(malformed(error.to_string())),
    }
}

#[cfg(test)]
mod tests;
