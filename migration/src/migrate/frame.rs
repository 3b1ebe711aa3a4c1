//! Frames: the envelope every message of a migration travels in.
//!
//! ```text
//!  0        4       6    7     8              16      20         24
//!  +--------+-------+----+-----+--------------+-------+----------+-- - -
//!  | magic  |version|kind|flags|   sequence   |length | checksum | payload
//!  +--------+-------+----+-----+--------------+-------+----------+-- - -
//! ```
//!
//! All numbers are little endian. `length` counts the payload only, and is held against the
//! limit of the frame's kind before any memory is set aside for it. `checksum` is the CRC-32C of
//! the first 20 bytes and the payload. `sequence` counts the frames of one direction from 0.

use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// First four bytes of each frame.
pub const MAGIC: [u8; 4] = *b"FRYM";

/// The version of the protocol that this build speaks; both ends must speak the same.
pub const PROTOCOL_VERSION: u16 = 2;

/// Bytes of a frame's header.
pub const HEADER_BYTES: usize = size_of::<Header>();

/// Bytes of the header that the checksum covers: all but the checksum itself.
const CHECKED_HEADER_BYTES: usize = HEADER_BYTES - size_of::<U32>();

/// A frame's header, as it lies on the wire.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Header {
    magic: [u8; 4],
    version: U16,
    kind: u8,
    flags: u8,
    sequence: U64,
    length: U32,
    checksum: U32,
}

/// What a frame says. The comment tells who says it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u8)]
pub enum Kind {
    /// Source: what is to move.
    Manifest = 1,
    /// Destination: everything is prepared.
    Accept = 2,
    /// Destination: why this VM cannot move here.
    Refuse = 3,
    /// Source: pages of guest memory.
    Pages = 4,
    /// Source: a round of memory is complete.
    RoundEnd = 5,
    /// Destination: the round is in guest memory.
    RoundAck = 6,
    /// Source: a piece of one device's state.
    DeviceChunk = 7,
    /// Source: one device's state is complete.
    DeviceEnd = 8,
    /// Source: everything was sent.
    Complete = 9,
    /// Destination: everything is loaded; nothing runs.
    Ready = 10,
    /// Source: run it. From here on the source does not resume by itself.
    Commit = 11,
    /// Destination: the guest runs.
    Running = 12,
    /// Both: the migration is off, and why.
    Abort = 13,
    /// Both: still there.
    Progress = 14,
}

impl Kind {
    /// All kinds, for tables and tests.
    pub const ALL: [Self; 14] = [
        Self::Manifest,
        Self::Accept,
        Self::Refuse,
        Self::Pages,
        Self::RoundEnd,
        Self::RoundAck,
        Self::DeviceChunk,
        Self::DeviceEnd,
        Self::Complete,
        Self::Ready,
        Self::Commit,
        Self::Running,
        Self::Abort,
        Self::Progress,
    ];

    /// The number on the wire.
    pub const fn code(self) -> u8 {
        self as u8
    }

    /// The kind of this number on the wire.
    pub fn from_code(code: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.code() == code)
    }

    /// The longest payload in bytes that a frame of this kind may have.
    pub const fn limit(self) -> usize {
        match self {
            // Holds the VM's configuration, its CPUID and a description of each device.
            Self::Manifest => 4 << 20,
            Self::Refuse => 1 << 20,
            Self::Pages | Self::DeviceChunk => 1 << 20,
            Self::Abort => 16 << 10,
            Self::Accept => 4 << 10,
            // A number of up to ten bytes for each of up to 1024 devices.
            Self::Ready => 16 << 10,
            Self::RoundEnd
            | Self::RoundAck
            | Self::DeviceEnd
            | Self::Complete
            | Self::Commit
            | Self::Running
            | Self::Progress => 64,
        }
    }
}

/// What is wrong with a frame.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The bytes are not a frame of this protocol at all.
    #[error("not a Ferry migration frame: it starts with {found:02x?}; is the address right?")]
    BadMagic {
        /// The first bytes.
        found: [u8; 4],
    },
    /// The peer speaks another version.
    #[error(
        "the peer speaks migration protocol {theirs}, this side speaks {ours}: use the same \
         release of Ferry on both hosts"
    )]
    WrongVersion {
        /// The version of this build.
        ours: u16,
        /// The version in the frame.
        theirs: u16,
    },
    /// The frame is of no known kind.
    #[error("frame of unknown kind {code}")]
    UnknownKind {
        /// The number on the wire.
        code: u8,
    },
    /// The frame has flags that this version does not know.
    #[error("{kind:?} frame with unknown flags {flags:#04x}")]
    UnknownFlags {
        /// The frame's kind.
        kind: Kind,
        /// The flags on the wire.
        flags: u8,
    },
    /// The payload is longer than its kind allows.
    #[error("{kind:?} frame of {length} bytes; the limit is {limit}")]
    TooLong {
        /// The frame's kind.
        kind: Kind,
        /// The length said.
        length: u64,
        /// The limit of the kind.
        limit: usize,
    },
    /// The frame was changed on its way.
    #[error("{kind:?} frame {sequence} arrived corrupted (checksum mismatch)")]
    BadChecksum {
        /// The frame's kind, if that is to be believed.
        kind: Kind,
        /// The frame's number, if that is to be believed.
        sequence: u64,
    },
    /// A frame was lost, repeated or injected.
    #[error("{kind:?} frame has number {found}, expected {expected}")]
    OutOfOrder {
        /// The frame's kind.
        kind: Kind,
        /// The number expected.
        expected: u64,
        /// The number found.
        found: u64,
    },
    /// The payload is not what its kind should hold.
    #[error("malformed {kind:?} frame: {reason}")]
    Malformed {
        /// The frame's kind.
        kind: Kind,
        /// What is wrong.
        reason: String,
    },
}

/// A header whose fields were checked; the payload is still to come.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Envelope {
    /// What the payload is.
    pub kind: Kind,
    /// The frame's number in its direction.
    pub sequence: u64,
    /// Bytes of payload; within the kind's limit.
    pub length: usize,
    checksum: u32,
    header_checksum: u32,
}

impl Envelope {
    /// Checks the header that these bytes hold.
    pub fn parse(bytes: &[u8; HEADER_BYTES]) -> Result<Self, FrameError> {
        let header: Header = zerocopy::transmute!(*bytes);
        if header.magic != MAGIC {
            return Err(FrameError::BadMagic {
                found: header.magic,
            });
        }
        if header.version.get() != PROTOCOL_VERSION {
            return Err(FrameError::WrongVersion {
                ours: PROTOCOL_VERSION,
                theirs: header.version.get(),
            });
        }
        let kind =
            Kind::from_code(header.kind).ok_or(FrameError::UnknownKind { code: header.kind })?;
        if header.flags != 0 {
            return Err(FrameError::UnknownFlags {
                kind,
                flags: header.flags,
            });
        }
        let length = within_limit(kind, u64::from(header.length.get()))?;
        let (checked, _) = bytes.split_at(CHECKED_HEADER_BYTES);
        Ok(Self {
            kind,
            sequence: header.sequence.get(),
            length,
            checksum: header.checksum.get(),
            header_checksum: crc32c::crc32c(checked),
        })
    }

    /// Checks that `payload` is what was sent under this header.
    pub fn verify(&self, payload: &[u8]) -> Result<(), FrameError> {
        if crc32c::crc32c_append(self.header_checksum, payload) == self.checksum {
            Ok(())
        } else {
            Err(FrameError::BadChecksum {
                kind: self.kind,
                sequence: self.sequence,
            })
        }
    }
}

fn within_limit(kind: Kind, length: u64) -> Result<usize, FrameError> {
    match usize::try_from(length) {
        Ok(bytes) if bytes <= kind.limit() => Ok(bytes),
        _ => Err(FrameError::TooLong {
            kind,
            length,
            limit: kind.limit(),
        }),
    }
}

/// An empty frame, to be filled with a payload and sealed. Keeps its memory when reused.
#[derive(Debug, Default)]
pub struct FrameBuffer {
    bytes: Vec<u8>,
}

impl FrameBuffer {
    /// A buffer that holds a payload of `capacity` bytes without growing.
    pub fn with_capacity(capacity: usize) -> Self {
        let mut bytes = Vec::with_capacity(HEADER_BYTES.saturating_add(capacity));
        bytes.resize(HEADER_BYTES, 0);
        Self { bytes }
    }

    /// Forgets the payload.
    pub fn clear(&mut self) {
        self.bytes.clear();
        self.bytes.resize(HEADER_BYTES, 0);
    }

    /// Makes the payload `length` bytes long; new bytes are zero.
    pub fn resize(&mut self, length: usize) {
        self.bytes.resize(HEADER_BYTES.saturating_add(length), 0);
    }

    /// The payload.
    pub fn payload(&self) -> &[u8] {
        self.bytes.get(HEADER_BYTES..).unwrap_or_default()
    }

    /// The payload, to be written.
    pub fn payload_mut(&mut self) -> &mut [u8] {
        self.bytes.get_mut(HEADER_BYTES..).unwrap_or_default()
    }

    /// Adds to the payload.
    pub fn extend(&mut self, bytes: &[u8]) {
        if self.bytes.len() < HEADER_BYTES {
            self.clear();
        }
        self.bytes.extend_from_slice(bytes);
    }

    /// Writes the header before the payload and gives the frame as it goes on the wire.
    pub fn seal(&mut self, kind: Kind, sequence: u64) -> Result<&[u8], FrameError> {
        if self.bytes.len() < HEADER_BYTES {
            self.clear();
        }
        let length = u64::try_from(self.payload().len()).unwrap_or(u64::MAX);
        within_limit(kind, length)?;
        let mut header = Header {
            magic: MAGIC,
            version: PROTOCOL_VERSION.into(),
            kind: kind.code(),
            flags: 0,
            sequence: sequence.into(),
            length: u32::try_from(length).unwrap_or(u32::MAX).into(),
            checksum: 0.into(),
        };
        let (checked, _) = header.as_bytes().split_at(CHECKED_HEADER_BYTES);
        let checksum = crc32c::crc32c_append(crc32c::crc32c(checked), self.payload());
        header.checksum = checksum.into();
        let (room, _) = self.bytes.split_at_mut(HEADER_BYTES);
        room.copy_from_slice(header.as_bytes());
        Ok(&self.bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sealed(kind: Kind, sequence: u64, payload: &[u8]) -> Vec<u8> {
        let mut buffer = FrameBuffer::default();
        buffer.extend(payload);
        buffer.seal(kind, sequence).unwrap().to_vec()
    }

    fn open(frame: &[u8]) -> Result<(Kind, u64, Vec<u8>), FrameError> {
        let (header, payload) = frame.split_at(HEADER_BYTES);
        let envelope = Envelope::parse(header.try_into().unwrap())?;
        envelope.verify(payload)?;
        assert_eq!(envelope.length, payload.len());
        Ok((envelope.kind, envelope.sequence, payload.to_vec()))
    }

    proptest! {
        #[test]
        fn what_is_sealed_opens(kind in prop::sample::select(Kind::ALL.to_vec()),
                                sequence: u64,
                                payload in prop::collection::vec(any::<u8>(), 0..64)) {
            let frame = sealed(kind, sequence, &payload);
            prop_assert_eq!(open(&frame), Ok((kind, sequence, payload)));
        }

        #[test]
        fn any_flipped_bit_is_noticed(payload in prop::collection::vec(any::<u8>(), 1..64),
                                      bit in 0usize..8, place: prop::sample::Index) {
            let mut frame = sealed(Kind::RoundEnd, 7, &payload);
            let at = place.index(frame.len());
            frame[at] ^= 1 << bit;
            // A changed length is noticed by the reader, who then has other bytes to check.
            if !(16..20).contains(&at) {
                prop_assert!(open(&frame).is_err());
            } else if let Ok(envelope) = Envelope::parse(frame[..HEADER_BYTES].try_into().unwrap()) {
                prop_assert!(envelope.verify(&frame[HEADER_BYTES..]).is_err());
            }
        }

        #[test]
        fn any_header_is_survived(bytes: [u8; HEADER_BYTES]) {
            let _ = Envelope::parse(&bytes);
        }
    }

    #[test]
    fn each_fault_has_its_name() {
        let good = sealed(Kind::Commit, 3, &[]);
        let mut bad = good.clone();
        bad[0] = b'X';
        assert_eq!(open(&bad), Err(FrameError::BadMagic { found: *b"XRYM" }));
        let mut bad = good.clone();
        bad[4] = 9;
        let error = open(&bad).unwrap_err();
        assert_eq!(error, FrameError::WrongVersion { ours: 2, theirs: 9 });
        assert!(error.to_string().contains("protocol 9") && error.to_string().contains("speaks 2"));
        let mut bad = good.clone();
        bad[6] = 200;
        assert_eq!(open(&bad), Err(FrameError::UnknownKind { code: 200 }));
        let mut bad = good.clone();
        bad[7] = 1;
        let kind = Kind::Commit;
        assert_eq!(open(&bad), Err(FrameError::UnknownFlags { kind, flags: 1 }));
        let mut bad = good.clone();
        bad[18] = 1;
        let (length, limit) = (65536, 64);
        assert_eq!(
            open(&bad),
            Err(FrameError::TooLong {
                kind,
                length,
                limit
            })
        );
        let mut bad = good;
        bad[8] ^= 1;
        assert_eq!(
            open(&bad),
            Err(FrameError::BadChecksum { kind, sequence: 2 })
        );
    }

    #[test]
    fn an_oversized_payload_is_not_sealed() {
        let mut buffer = FrameBuffer::default();
        buffer.resize(65);
        assert!(matches!(
            buffer.seal(Kind::Commit, 0),
            Err(FrameError::TooLong { length: 65, .. })
        ));
    }

    #[test]
    fn codes_are_distinct() {
        for kind in Kind::ALL {
            assert_eq!(Kind::from_code(kind.code()), Some(kind));
        }
    }
}
