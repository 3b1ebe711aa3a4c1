//! Taking in memory and device state.

use std::time::{Duration, Instant};

use super::failed;
use crate::memory::GuestMemory;
use crate::migrate::error::MigrationError;
use crate::migrate::frame::{HEADER_BYTES, Kind};
use crate::migrate::link::Link;
use crate::migrate::pages::Pages;
use crate::migrate::protocol::{Complete, DeviceEnd, Manifest, Round, chunk_open};
use crate::migrate::status::MigrationStatus;
use crate::state::StateSink;

/// What arrived of one device.
#[derive(Debug)]
struct Stream {
    id: String,
    limit: u64,
    bytes: u64,
    checksum: u32,
    loaded: bool,
}

impl Stream {
    fn broken(&self, reason: &'static str) -> MigrationError {
        MigrationError::StateBroken {
            id: self.id.clone(),
            reason,
        }
    }
}

/// The state of loading.
pub(super) struct Loading<'a> {
    memory: &'a GuestMemory,
    page_bytes: u64,
    streams: Vec<Stream>,
    /// Bytes of memory told of since the last round's end.
    round_bytes: u64,
    load: Duration,
    /// Since the status was last told: pages, zero pages, bytes of device state.
    news: (u64, u64, u64),
}

fn wide(bytes: usize) -> u64 {
    u64::try_from(bytes).unwrap_or(u64::MAX)
}

impl<'a> Loading<'a> {
    pub(super) fn new(manifest: &Manifest, memory: &'a GuestMemory) -> Self {
        let streams = manifest.devices.iter().map(|device| Stream {
            id: device.id.clone(),
            limit: device.max_state_bytes,
            bytes: 0,
            checksum: 0,
            loaded: false,
        });
        Self {
            memory,
            page_bytes: manifest.page_size.max(1),
            streams: streams.collect(),
            round_bytes: 0,
            load: Duration::ZERO,
            news: (0, 0, 0),
        }
    }

    /// Time spent in loading state, in µs.
    pub(super) fn load_us(&self) -> u64 {
        u64::try_from(self.load.as_micros()).unwrap_or(u64::MAX)
    }

    /// Tells the status of one frame's payload.
    pub(super) fn tell(&mut self, now: &mut MigrationStatus, payload: usize) {
        let (pages, zero_pages, device_bytes) = std::mem::take(&mut self.news);
        let bytes = wide(payload).saturating_add(wide(HEADER_BYTES));
        now.bytes = now.bytes.saturating_add(bytes);
        now.pages = now.pages.saturating_add(pages);
        now.zero_pages = now.zero_pages.saturating_add(zero_pages);
        now.device_bytes = now.device_bytes.saturating_add(device_bytes);
    }

    /// Pages of memory.
    pub(super) fn pages(&mut self, payload: &[u8], link: &Link) -> Result<(), MigrationError> {
        let pages = Pages::open(payload).map_err(|cause| link.bad_frame(cause))?;
        let tally = pages.apply(self.memory)?;
        self.round_bytes = self.round_bytes.saturating_add(tally.memory_bytes);
        self.news.0 = tally.memory_bytes / self.page_bytes;
        self.news.1 = tally.zero_bytes / self.page_bytes;
        Ok(())
    }

    /// The source says that a round is complete: whether we have it all.
    pub(super) fn round_end(&mut self, round: Round) -> Result<Round, MigrationError> {
        self.compare(round.memory_bytes)?;
        Ok(round)
    }

    fn compare(&mut self, sent: u64) -> Result<(), MigrationError> {
        let received = std::mem::take(&mut self.round_bytes);
        if received == sent {
            Ok(())
        } else {
            Err(MigrationError::MemoryMissing { sent, received })
        }
    }

    /// A piece of one device's state.
    pub(super) fn chunk(
        &mut self,
        payload: &[u8],
        sinks: &mut [Box<dyn StateSink>],
        link: &Link,
    ) -> Result<(), MigrationError> {
        let (index, data) = chunk_open(payload).map_err(|cause| link.bad_frame(cause))?;
        let (stream, sink) = find(&mut self.streams, sinks, index)?;
        if stream.loaded {
            return Err(stream.broken("more came after its end"));
        }
        stream.bytes = stream.bytes.saturating_add(wide(data.len()));
        if stream.bytes > stream.limit {
            return Err(MigrationError::StateTooLong {
                id: stream.id.clone(),
                limit: stream.limit,
            });
        }
        stream.checksum = crc32c::crc32c_append(stream.checksum, data);
        sink.write(data).map_err(failed("taking its state"))?;
        self.news.2 = wide(data.len());
        Ok(())
    }

    /// One device's state is complete: loads it, while others still arrive.
    pub(super) fn device_end(
        &mut self,
        end: DeviceEnd,
        sinks: &mut [Box<dyn StateSink>],
    ) -> Result<(), MigrationError> {
        let (stream, sink) = find(&mut self.streams, sinks, end.index)?;
        if stream.loaded {
            return Err(stream.broken("it ended twice"));
        }
        if stream.bytes != end.bytes {
            return Err(stream.broken("its length differs"));
        }
        if stream.checksum != end.checksum {
            return Err(stream.broken("its checksum differs"));
        }
        stream.loaded = true;
        let began = Instant::now();
        sink.finish_load().map_err(failed("loading its state"))?;
        self.load = self.load.saturating_add(began.elapsed());
        Ok(())
    }

    /// The source says that it sent everything: whether we have it all.
    pub(super) fn complete(&mut self, complete: Complete) -> Result<(), MigrationError> {
        self.compare(complete.memory_bytes)?;
        match self.streams.iter().find(|stream| !stream.loaded) {
            None => Ok(()),
            Some(stream) => Err(stream.broken("it never ended")),
        }
    }
}

/// The stream and the sink of a device that a frame names.
fn find<'s>(
    streams: &'s mut [Stream],
    sinks: &'s mut [Box<dyn StateSink>],
    index: u16,
) -> Result<(&'s mut Stream, &'s mut dyn StateSink), MigrationError> {
    let place = usize::from(index);
    match (streams.get_mut(place), sinks.get_mut(place)) {
        (Some(stream), Some(sink)) => Ok((stream, sink.as_mut())),
        _ => Err(MigrationError::StateBroken {
            id: format!("device {index} ({:?})", Kind::DeviceChunk),
            reason: "the manifest has no such device",
        }),
    }
}
