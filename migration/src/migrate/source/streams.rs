//! The devices' state streams.

use std::time::Instant;

use super::{MigrationError, Source};
use crate::migrate::frame::Kind;
use crate::migrate::protocol::{
    CHUNK_BYTES, DeviceEnd, Manifest, chunk_open, chunk_room, chunk_trim,
};
use crate::state::{PrecopyRead, StateError};

/// Smallest piece read when the bandwidth is limited.
const LEAST_CHUNK: usize = 4096;

/// What was sent of one device.
#[derive(Debug, Default)]
struct Stream {
    bytes: u64,
    checksum: u32,
    /// Most bytes in all, as the manifest says.
    limit: u64,
    /// Bytes it may still send in this round; bounds a device that always has more.
    turn: u64,
}

/// What was sent of all devices, and whose turn it is.
#[derive(Debug, Default)]
pub(super) struct Streams {
    streams: Vec<Stream>,
    next: usize,
}

impl Streams {
    pub(super) fn new(manifest: &Manifest) -> Self {
        let stream = |limit| Stream {
            limit,
            ..Stream::default()
        };
        let limits = manifest.devices.iter().map(|device| device.max_state_bytes);
        Self {
            streams: limits.map(stream).collect(),
            next: 0,
        }
    }

    /// The next device, in turn, that may send in this round.
    fn take_turn(&mut self) -> Option<usize> {
        let count = self.streams.len();
        let turns = (self.next..count).chain(0..self.next.min(count));
        let found = turns.into_iter().find(|index| {
            self.streams
                .get(*index)
                .is_some_and(|stream| stream.turn > 0)
        })?;
        self.next = found.saturating_add(1);
        Some(found)
    }
}

fn failed(doing: &'static str) -> impl FnOnce(StateError) -> MigrationError {
    move |cause| MigrationError::Device { doing, cause }
}

fn impossible_read(id: &str) -> StateError {
    StateError::BadState {
        id: id.to_owned(),
        reason: "it says that it read more than the buffer holds".into(),
    }
}

impl Source<'_> {
    /// A new round: every device may send what it has now.
    pub(super) fn begin_turns(&mut self) -> Result<(), MigrationError> {
        for (device, stream) in self.parts.devices.iter_mut().zip(&mut self.streams.streams) {
            let size = device.size().map_err(failed("telling its state's size"))?;
            stream.turn = size.precopy_bytes;
        }
        Ok(())
    }

    /// Bytes of device state that are left to send, as the devices tell.
    pub(super) fn device_bytes_left(&mut self) -> Result<u64, MigrationError> {
        let mut left = 0u64;
        for device in &mut self.parts.devices {
            let size = device.size().map_err(failed("telling its state's size"))?;
            left = left
                .saturating_add(size.precopy_bytes)
                .saturating_add(size.stop_copy_bytes);
        }
        Ok(left)
    }

    /// Sends one chunk of the device whose turn it is; gives its bytes on the wire, 0 if no
    /// device has anything.
    pub(super) fn send_precopy_chunk(&mut self) -> Result<u64, MigrationError> {
        let most = self.pacer.burst().clamp(LEAST_CHUNK, CHUNK_BYTES);
        while let Some(index) = self.streams.take_turn() {
            let (Some(device), Some(stream)) = (
                self.parts.devices.get_mut(index),
                self.streams.streams.get_mut(index),
            ) else {
                break;
            };
            let room = chunk_room(&mut self.chunk, number(index), most);
            let read = device
                .read_precopy(room)
                .map_err(failed("reading its state"))?;
            match read {
                PrecopyRead::Data(count) if count > most => {
                    return Err(failed("reading its state")(impossible_read(device.id())));
                }
                PrecopyRead::Empty | PrecopyRead::Data(0) => stream.turn = 0,
                PrecopyRead::Data(count) => {
                    let bytes = u64::try_from(count).unwrap_or(u64::MAX);
                    stream.turn = stream.turn.saturating_sub(bytes);
                    return self.send_chunk(index, count);
                }
            }
        }
        Ok(0)
    }

    /// Sends all that is left of every device; the guest stands still.
    pub(super) fn send_stop_copy(&mut self) -> Result<(), MigrationError> {
        for index in 0..self.parts.devices.len() {
            while let Some(device) = self.parts.devices.get_mut(index) {
                let room = chunk_room(&mut self.chunk, number(index), CHUNK_BYTES);
                let count = device
                    .read_stop_copy(room)
                    .map_err(failed("reading its state"))?;
                if count > CHUNK_BYTES {
                    return Err(failed("reading its state")(impossible_read(device.id())));
                }
                if count == 0 {
                    break;
                }
                self.send_chunk(index, count)?;
                self.link.listen_for(std::time::Duration::ZERO)?;
            }
            if let Some(stream) = self.streams.streams.get(index) {
                let end = DeviceEnd {
                    index: number(index),
                    bytes: stream.bytes,
                    checksum: stream.checksum,
                };
                self.link.send_message(Kind::DeviceEnd, &end)?;
            }
        }
        Ok(())
    }

    /// Sends the first `count` bytes read into the chunk.
    fn send_chunk(&mut self, index: usize, count: usize) -> Result<u64, MigrationError> {
        let began = Instant::now();
        chunk_trim(&mut self.chunk, count);
        if let Some(stream) = self.streams.streams.get_mut(index) {
            let (_, data) =
                chunk_open(self.chunk.payload()).map_err(|cause| self.link.bad_frame(cause))?;
            let bytes = u64::try_from(count).unwrap_or(u64::MAX);
            stream.bytes = stream.bytes.saturating_add(bytes);
            stream.checksum = crc32c::crc32c_append(stream.checksum, data);
            if stream.bytes > stream.limit {
                let id = self.parts.devices.get(index).map(|device| device.id());
                return Err(MigrationError::StateTooLong {
                    id: id.unwrap_or_default().to_owned(),
                    limit: stream.limit,
                });
            }
            self.story
                .update(|now| now.device_bytes = now.device_bytes.saturating_add(bytes));
        }
        let bytes = self.link.send(Kind::DeviceChunk, &mut self.chunk)?;
        let bytes = u64::try_from(bytes).unwrap_or(u64::MAX);
        self.bandwidth.sent(bytes, began.elapsed());
        self.sent.wire_bytes = self.sent.wire_bytes.saturating_add(bytes);
        self.story
            .update(|now| now.bytes = now.bytes.saturating_add(bytes));
        Ok(bytes)
    }
}

/// A device's number on the wire; the manifest's check holds their count far below the limit.
fn number(index: usize) -> u16 {
    u16::try_from(index).unwrap_or(u16::MAX)
}
