//! How a device's state travels: a preamble, then frames.
//!
//! | Part | Bytes |
//! |---|---|
//! | Preamble | magic `FPTD`, version (2), vendor (2), device (2), reserved (2), all little endian |
//! | Frame | kind (1), length (4), payload |
//!
//! Frames are: device data (any number, given to the device as they come), the VMM's own part
//! (one: configuration space and MSI-X table, once the guest stands still), and the end (one: the
//! number of data bytes, so that a stream cut short is noticed). The parser takes the stream in
//! any pieces, holds no more than the VMM's part, and trusts nothing.

use crate::profile::DeviceIdentity;

/// First bytes of a stream.
const MAGIC: [u8; 4] = *b"FPTD";
/// Version of this format.
const VERSION: u16 = 1;
/// Bytes of the preamble.
const PREAMBLE: usize = 12;
/// Bytes before a frame's payload.
pub(crate) const FRAME_HEADER: usize = 5;
/// Longest device data frame taken.
pub(crate) const MAX_DATA: usize = 16 << 20;
/// Longest part of the VMM taken: 4 KiB of configuration space and 2048 vectors.
pub(crate) const MAX_FRONT: usize = 128 << 10;

const DATA: u8 = 1;
const FRONT: u8 = 2;
const END: u8 = 3;

/// What is wrong with a stream.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum StreamError {
    #[error("it does not start as a device's state does")]
    Magic,
    #[error("it has version {0}, this build reads {VERSION}")]
    Version(u16),
    #[error("it is of device {vendor:04x}:{device:04x}, not of the one here")]
    OtherDevice { vendor: u16, device: u16 },
    #[error("it has a frame of unknown kind {0}")]
    Kind(u8),
    #[error("it has a frame of {0} bytes, which is too long or too short")]
    Length(u32),
    #[error("its parts are out of order")]
    Order,
    #[error("its end tells of {told} bytes of data but there were {seen}")]
    Count { told: u64, seen: u64 },
    #[error("it ends too early")]
    Short,
}

pub(crate) fn preamble(identity: DeviceIdentity) -> Vec<u8> {
    let mut bytes = MAGIC.to_vec();
    for field in [VERSION, identity.vendor, identity.device, 0] {
        bytes.extend_from_slice(&field.to_le_bytes());
    }
    bytes
}

/// The header of a data frame of `len` bytes (bounded by [`MAX_DATA`] by the caller).
pub(crate) fn data_header(len: usize) -> [u8; FRAME_HEADER] {
    header(DATA, len)
}

pub(crate) fn front_frame(state: &[u8]) -> Vec<u8> {
    [&header(FRONT, state.len())[..], state].concat()
}

pub(crate) fn end_frame(data_bytes: u64) -> Vec<u8> {
    [&header(END, 8)[..], &data_bytes.to_le_bytes()].concat()
}

fn header(kind: u8, len: usize) -> [u8; FRAME_HEADER] {
    let [a, b, c, d] = u32::try_from(len).unwrap_or(u32::MAX).to_le_bytes();
    [kind, a, b, c, d]
}

enum At {
    /// Collecting a fixed number of bytes.
    Preamble,
    Header,
    Data(u32),
    Front(u32),
    End,
    Done,
}

/// Takes a stream apart.
pub(crate) struct Parser {
    identity: DeviceIdentity,
    at: At,
    /// Bytes of the part being collected.
    held: Vec<u8>,
    data_bytes: u64,
    front: Option<Vec<u8>>,
}

impl Parser {
    pub(crate) const fn new(identity: DeviceIdentity) -> Self {
        Self {
            identity,
            at: At::Preamble,
            held: Vec::new(),
            data_bytes: 0,
            front: None,
        }
    }

    /// Takes the next piece; device data goes to `sink`.
    pub(crate) fn take<E: From<StreamError>>(
        &mut self,
        piece: &[u8],
        mut sink: impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut rest = piece;
        while !rest.is_empty() {
            match self.at {
                At::Preamble => {
                    if let Some(bytes) = self.collect(&mut rest, PREAMBLE) {
                        self.check_preamble(&bytes)?;
                        self.at = At::Header;
                    }
                }
                At::Header => {
                    if let Some(bytes) = self.collect(&mut rest, FRAME_HEADER) {
                        self.at = self.frame(&bytes)?;
                    }
                }
                At::Data(left) => {
                    let here = rest.len().min(usize::try_from(left).unwrap_or(usize::MAX));
                    let (data, after) = rest.split_at(here);
                    rest = after;
                    sink(data)?;
                    let here = u32::try_from(here).unwrap_or(left);
                    self.data_bytes = self.data_bytes.saturating_add(u64::from(here));
                    self.at = match left - here {
                        0 => At::Header,
                        left => At::Data(left),
                    };
                }
                At::Front(len) => {
                    let len = usize::try_from(len).unwrap_or(usize::MAX);
                    if let Some(bytes) = self.collect(&mut rest, len) {
                        self.front = Some(bytes);
                        self.at = At::Header;
                    }
                }
                At::End => {
                    if let Some(bytes) = self.collect(&mut rest, 8) {
                        let told = bytes.try_into().map(u64::from_le_bytes).unwrap_or(0);
                        let seen = self.data_bytes;
                        if told != seen {
                            return Err(StreamError::Count { told, seen }.into());
                        }
                        self.at = At::Done;
                    }
                }
                At::Done => return Err(StreamError::Order.into()),
            }
        }
        Ok(())
    }

    /// The VMM's part, of a stream that is complete.
    pub(crate) fn finish(self) -> Result<Vec<u8>, StreamError> {
        match (self.at, self.front) {
            (At::Done, Some(front)) => Ok(front),
            _ => Err(StreamError::Short),
        }
    }

    /// Collects `len` bytes over as many pieces as it takes.
    fn collect(&mut self, rest: &mut &[u8], len: usize) -> Option<Vec<u8>> {
        let missing = len.saturating_sub(self.held.len()).min(rest.len());
        let (here, after) = rest.split_at(missing);
        *rest = after;
        self.held.extend_from_slice(here);
        (self.held.len() == len).then(|| std::mem::take(&mut self.held))
    }

    fn check_preamble(&self, bytes: &[u8]) -> Result<(), StreamError> {
        let Some((magic, fields)) = bytes.split_first_chunk::<4>() else {
            return Err(StreamError::Magic);
        };
        if *magic != MAGIC {
            return Err(StreamError::Magic);
        }
        let mut fields = fields
            .chunks_exact(2)
            .map(|pair| pair.try_into().map_or(0, u16::from_le_bytes));
        let mut next = || fields.next().unwrap_or(0);
        let (version, vendor, device) = (next(), next(), next());
        if version != VERSION {
            return Err(StreamError::Version(version));
        }
        if (vendor, device) != (self.identity.vendor, self.identity.device) {
            return Err(StreamError::OtherDevice { vendor, device });
        }
        Ok(())
    }

    fn frame(&self, bytes: &[u8]) -> Result<At, StreamError> {
        let Some((&kind, len)) = bytes.split_first() else {
            return Err(StreamError::Short);
        };
        let len = len.try_into().map_or(0, u32::from_le_bytes);
        let fits = |most: usize| usize::try_from(len).is_ok_and(|len| (1..=most).contains(&len));
        match kind {
            DATA if fits(MAX_DATA) => Ok(At::Data(len)),
            FRONT if self.front.is_some() => Err(StreamError::Order),
            FRONT if fits(MAX_FRONT) => Ok(At::Front(len)),
            END if self.front.is_none() => Err(StreamError::Order),
            END if len == 8 => Ok(At::End),
            DATA | FRONT | END => Err(StreamError::Length(len)),
            other => Err(StreamError::Kind(other)),
        }
    }
}

#[cfg(test)]
mod tests;
