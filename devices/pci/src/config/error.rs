//! What can be wrong with a configuration space.

/// Why a BAR cannot be added.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum BarError {
    /// There are registers 0 to 5, and a 64-bit BAR takes two.
    #[error("BAR {index} does not exist or has no second register for 64 bits")]
    Index {
        /// Register index.
        index: u8,
    },
    /// A register is taken.
    #[error("BAR {index} is in use already")]
    InUse {
        /// Register index.
        index: u8,
    },
    /// Size not a power of two, too small (16 bytes of memory, 4 ports) or too large for the
    /// register's width.
    #[error("BAR {index}: {size:#x} bytes is not a power of two within the kind's limits")]
    Size {
        /// Register index.
        index: u8,
        /// Asked-for size.
        size: u64,
    },
}

/// Why a configuration space cannot be laid out or restored.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ConfigError {
    /// No room before offset 256.
    #[error("capability {id:#04x} of {length} bytes does not fit below offset 256")]
    CapabilityRoom {
        /// Capability ID.
        id: u8,
        /// Bytes with header.
        length: usize,
    },
    /// Body and write mask must have one length.
    #[error("capability {id:#04x}: body of {body} bytes but write mask of {mask}")]
    CapabilityMask {
        /// Capability ID.
        id: u8,
        /// Bytes of the body.
        body: usize,
        /// Bytes of the mask.
        mask: usize,
    },
    /// An image's capability list loops, leaves its area, or is misaligned.
    #[error("capability list is malformed at offset {offset:#x}")]
    CapabilityChain {
        /// Where the walk stopped.
        offset: u16,
    },
    /// An image shorter than the header or longer than 4096 bytes.
    #[error("configuration space image has {length} bytes, wanted 64 to 4096")]
    ImageLength {
        /// Its length.
        length: usize,
    },
    /// The image is of a bridge.
    #[error("header type {header_type:#04x} is not a type 0 (endpoint) header")]
    HeaderType {
        /// What the image has.
        header_type: u8,
    },
    /// Access beyond the end.
    #[error("offset {offset:#x} with {length} bytes is outside configuration space")]
    Range {
        /// First byte.
        offset: u16,
        /// Number of bytes.
        length: usize,
    },
    /// Saved by an incompatible build.
    #[error("saved configuration space has version {found}, this build reads {wanted}")]
    Version {
        /// In the state.
        found: u16,
        /// Understood here.
        wanted: u16,
    },
    /// A read-only byte of the saved state differs: it is another device.
    #[error(
        "saved configuration space is of a different device: offset {offset:#x} is {saved:#04x} \
         there and {here:#04x} here"
    )]
    Mismatch {
        /// First differing byte.
        offset: u16,
        /// Saved value (read-only bits).
        saved: u8,
        /// Value here (read-only bits).
        here: u8,
    },
}
