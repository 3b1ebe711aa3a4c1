//! The devices' state streams.

use std::time::{Duration, Instant};

use super::readers::{Chunk, impossible_read, number};
use super::{MigrationError, Source};
use crate::migrate::frame::{FrameBuffer, Kind};
use crate::migrate::protocol::{
    CHUNK_BYTES, DeviceEnd, Manifest, chunk_open, chunk_room, chunk_trim,
};
use crate::state::StateError;

/// Smallest piece read when the bandwidth is limited.
const LEAST_CHUNK: usize = 4096;

/// Longest wait for a device before the peer and the operator are listened to.
pub(super) const LISTEN: Duration = Duration::from_millis(10);

/// What was sent of one device.
#[derive(Debug, Default)]
pub(super) struct Stream {
    pub(super) bytes: u64,
    checksum: u32,
    /// Most bytes in all, as the manifest says.
    limit: u64,
    /// Time spent on sending it.
    pub(super) sending: Duration,
    /// Its end was told.
    ended: bool,
}

/// What was sent of all devices.
#[derive(Debug, Default)]
pub(super) struct Streams(pub(super) Vec<Stream>);

impl Streams {
    pub(super) fn new(manifest: &Manifest) -> Self {
        let stream = |limit| Stream {
            limit,
            ..Stream::default()
        };
        let limits = manifest.devices.iter().map(|device| device.max_state_bytes);
        Self(limits.map(stream).collect())
    }
}

fn failed(doing: &'static str) -> impl FnOnce(StateError) -> MigrationError {
    move |cause| MigrationError::Device { doing, cause }
}

impl Source<'_> {
    /// A new round: every device may send what it has now.
    pub(super) fn begin_device_round(&self) {
        let piece = self.pacer.burst().clamp(LEAST_CHUNK, CHUNK_BYTES);
        self.readers.begin_round(piece);
    }

    /// Bytes of device state that are left to send, as the devices tell, and how long the slowest
    /// of them takes to give its part.
    pub(super) fn devices_left(&mut self) -> Result<(u64, Duration), MigrationError> {
        let left = self.readers.left();
        let mut bytes = left.bytes;
        for (index, device) in self.parts.devices.iter().enumerate() {
            if !self.readers.has(index) {
                let size = device.lock().size();
                let size = size.map_err(failed("telling its state's size"))?;
                bytes = bytes.saturating_add(size.total());
            }
        }
        Ok((bytes, left.reading))
    }

    /// Sends one chunk that a reader has ready; gives its bytes on the wire, 0 if there is none.
    pub(super) fn send_ready_chunk(&mut self) -> Result<u64, MigrationError> {
        let taken = self.readers.take().map_err(failed("reading its state"))?;
        let Some((index, Chunk { mut frame, count })) = taken else {
            return Ok(0);
        };
        let sent = self.send_chunk(index, &mut frame, count);
        self.readers.give_back(index, frame);
        sent
    }

    /// Waits until every reader has ended the read it is in.
    pub(super) fn rest_readers(&mut self) -> Result<(), MigrationError> {
        self.readers.rest();
        while self.readers.is_reading() {
            self.readers.wait_rest(LISTEN);
            self.link.listen_for(Duration::ZERO)?;
        }
        self.readers.check().map_err(failed("reading its state"))
    }

    /// Sends all that is left of every device; the guest stands still. In the manifest's order,
    /// but neighbours that are streamed all at once.
    pub(super) fn send_stop_copy(&mut self) -> Result<(), MigrationError> {
        let count = self.parts.devices.len();
        let mut index = 0;
        while index < count {
            let mut end = index;
            while end < count && self.readers.has(end) {
                end = end.saturating_add(1);
            }
            if end > index {
                self.send_together(index..end)?;
                index = end;
            } else {
                self.send_alone(index)?;
                index = index.saturating_add(1);
            }
        }
        Ok(())
    }

    /// Sends what the readers of these devices give, each device's end as soon as it is there.
    fn send_together(&mut self, devices: std::ops::Range<usize>) -> Result<(), MigrationError> {
        loop {
            let bytes = self.send_ready_chunk()?;
            let mut left = false;
            for index in devices.clone() {
                if !self.readers.has_ended(index) {
                    left = true;
                } else if !self.has_told_end(index) {
                    self.tell_end(index)?;
                }
            }
            if !left {
                return Ok(());
            }
            if bytes == 0 {
                self.readers.wait_news(LISTEN);
            }
            self.link.listen_for(Duration::ZERO)?;
        }
    }

    /// Sends one device's state, read here.
    fn send_alone(&mut self, index: usize) -> Result<(), MigrationError> {
        let Some(device) = self.parts.devices.get(index).cloned() else {
            return Ok(());
        };
        let mut frame = std::mem::take(&mut self.chunk);
        loop {
            let room = chunk_room(&mut frame, number(index), CHUNK_BYTES);
            let count = {
                let mut device = device.lock();
                match device.read_stop_copy(room) {
                    Ok(count) if count > CHUNK_BYTES => {
                        return Err(failed("reading its state")(impossible_read(device.id())));
                    }
                    read => read.map_err(failed("reading its state"))?,
                }
            };
            if count == 0 {
                break;
            }
            self.send_chunk(index, &mut frame, count)?;
            self.link.listen_for(Duration::ZERO)?;
        }
        self.chunk = frame;
        self.tell_end(index)
    }

    /// A device's identifier.
    pub(super) fn id(&self, index: usize) -> String {
        let device = self.parts.manifest.devices.get(index);
        device.map_or_else(String::new, |device| device.id.clone())
    }

    fn has_told_end(&self, index: usize) -> bool {
        self.streams.0.get(index).is_some_and(|stream| stream.ended)
    }

    fn tell_end(&mut self, index: usize) -> Result<(), MigrationError> {
        if let Some(stream) = self.streams.0.get_mut(index) {
            stream.ended = true;
            let end = DeviceEnd {
                index: number(index),
                bytes: stream.bytes,
                checksum: stream.checksum,
            };
            self.link.send_message(Kind::DeviceEnd, &end)?;
        }
        Ok(())
    }

    /// Sends the first `count` bytes of data in the chunk.
    fn send_chunk(
        &mut self,
        index: usize,
        frame: &mut FrameBuffer,
        count: usize,
    ) -> Result<u64, MigrationError> {
        let began = Instant::now();
        chunk_trim(frame, count);
        if let Some(stream) = self.streams.0.get_mut(index) {
            let (_, data) =
                chunk_open(frame.payload()).map_err(|cause| self.link.bad_frame(cause))?;
            let bytes = u64::try_from(count).unwrap_or(u64::MAX);
            stream.bytes = stream.bytes.saturating_add(bytes);
            stream.checksum = crc32c::crc32c_append(stream.checksum, data);
            if stream.bytes > stream.limit {
                let limit = stream.limit;
                let id = self.id(index);
                return Err(MigrationError::StateTooLong { id, limit });
            }
            self.story
                .update(|now| now.device_bytes = now.device_bytes.saturating_add(bytes));
        }
        let bytes = self.link.send(Kind::DeviceChunk, frame)?;
        let bytes = u64::try_from(bytes).unwrap_or(u64::MAX);
        let took = began.elapsed();
        self.bandwidth.sent(bytes, took);
        if let Some(stream) = self.streams.0.get_mut(index) {
            stream.sending = stream.sending.saturating_add(took);
        }
        self.sent.wire_bytes = self.sent.wire_bytes.saturating_add(bytes);
        self.story
            .update(|now| now.bytes = now.bytes.saturating_add(bytes));
        Ok(bytes)
    }
}
