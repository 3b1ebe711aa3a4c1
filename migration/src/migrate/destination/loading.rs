//! Taking in memory and device state.

use std::time::{Duration, Instant};

use super::failed;
use super::loaders::{Failure, Loaders, Stopped};
use crate::memory::GuestMemory;
use crate::migrate::error::MigrationError;
use crate::migrate::frame::{HEADER_BYTES, Kind};
use crate::migrate::link::Link;
use crate::migrate::pages::Pages;
use crate::migrate::protocol::{Complete, DeviceEnd, Manifest, Ready, Round, chunk_open};
use crate::migrate::status::MigrationStatus;
use crate::state::StateSink;

/// Who takes a device's state in.
enum Taker<'a> {
    /// A loader.
    Loader,
    /// This thread.
    Here(&'a mut dyn StateSink),
}

/// What arrived of one device.
struct Stream<'a> {
    id: String,
    limit: u64,
    bytes: u64,
    checksum: u32,
    /// All of it is there: it is loaded, or a loader does that.
    ended: bool,
    taker: Taker<'a>,
    /// Time it took in this thread since the last round.
    took: Duration,
}

impl Stream<'_> {
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
    loaders: &'a Loaders,
    page_bytes: u64,
    streams: Vec<Stream<'a>>,
    /// Bytes of memory told of since the last round's end.
    round_bytes: u64,
    /// Time spent on loading, and on waiting for loaders.
    load: Duration,
    /// Since the status was last told: pages, zero pages, bytes of device state.
    news: (u64, u64, u64),
}

fn micros_of(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

fn stopped(stopped: Stopped) -> MigrationError {
    match stopped {
        Stopped::Device(Failure { doing, cause }) => MigrationError::Device { doing, cause },
        Stopped::Link(error) => error.into(),
    }
}

fn wide(bytes: usize) -> u64 {
    u64::try_from(bytes).unwrap_or(u64::MAX)
}

impl<'a> Loading<'a> {
    /// Nothing has arrived. Every device has a loader but for those told of by
    /// [`load_here`](Self::load_here).
    pub(super) fn new(manifest: &Manifest, memory: &'a GuestMemory, loaders: &'a Loaders) -> Self {
        let streams = manifest.devices.iter().map(|device| Stream {
            id: device.id.clone(),
            limit: device.max_state_bytes,
            bytes: 0,
            checksum: 0,
            ended: false,
            taker: Taker::Loader,
            took: Duration::ZERO,
        });
        Self {
            memory,
            loaders,
            page_bytes: manifest.page_size.max(1),
            streams: streams.collect(),
            round_bytes: 0,
            load: Duration::ZERO,
            news: (0, 0, 0),
        }
    }

    /// The device at `index` is loaded by this thread, into `sink`.
    pub(super) fn load_here(&mut self, index: usize, sink: &'a mut dyn StateSink) {
        if let Some(stream) = self.streams.get_mut(index) {
            stream.taker = Taker::Here(sink);
        }
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

    /// The source says that a round is complete: whether we have it all, the devices' state
    /// taken in too, so that what a device does at the first of it is not the guest's time.
    pub(super) fn round_end(&mut self, round: Round, link: &Link) -> Result<Round, MigrationError> {
        self.compare(round.memory_bytes)?;
        self.loaders.wait_taken(link).map_err(stopped)?;
        self.loaders.take_times();
        for stream in &mut self.streams {
            stream.took = Duration::ZERO;
        }
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

    /// A piece of one device's state, which a loader may keep, leaving another buffer.
    pub(super) fn chunk(
        &mut self,
        payload: &mut Vec<u8>,
        link: &Link,
    ) -> Result<(), MigrationError> {
        let (number, data) = chunk_open(payload).map_err(|cause| link.bad_frame(cause))?;
        let stream = find(&mut self.streams, number)?;
        if stream.ended {
            return Err(stream.broken("more came after its end"));
        }
        let bytes = wide(data.len());
        stream.bytes = stream.bytes.saturating_add(bytes);
        if stream.bytes > stream.limit {
            return Err(MigrationError::StateTooLong {
                id: stream.id.clone(),
                limit: stream.limit,
            });
        }
        stream.checksum = crc32c::crc32c_append(stream.checksum, data);
        match &mut stream.taker {
            Taker::Loader => {
                let index = usize::from(number);
                self.loaders.push(index, payload, link).map_err(stopped)?;
            }
            Taker::Here(sink) => {
                let began = Instant::now();
                sink.write(data).map_err(failed("taking its state"))?;
                stream.took = stream.took.saturating_add(began.elapsed());
            }
        }
        self.news.2 = bytes;
        Ok(())
    }

    /// One device's state is complete: loads it, while others still arrive. Devices load in the
    /// manifest's order but for neighbours that have loaders, which load at once.
    pub(super) fn device_end(&mut self, end: DeviceEnd, link: &Link) -> Result<(), MigrationError> {
        let index = usize::from(end.index);
        let stream = find(&mut self.streams, end.index)?;
        if stream.ended {
            return Err(stream.broken("it ended twice"));
        }
        if stream.bytes != end.bytes {
            return Err(stream.broken("its length differs"));
        }
        if stream.checksum != end.checksum {
            return Err(stream.broken("its checksum differs"));
        }
        stream.ended = true;
        let has_loader = matches!(stream.taker, Taker::Loader);
        let early = self
            .streams
            .iter()
            .take(index)
            .any(|before| !before.ended && has_loader != matches!(before.taker, Taker::Loader));
        let stream = find(&mut self.streams, end.index)?;
        if early {
            return Err(stream.broken("it ended before a device that is loaded before it"));
        }
        let began = Instant::now();
        match &mut stream.taker {
            Taker::Loader => self.loaders.finish(index),
            Taker::Here(sink) => {
                self.loaders.wait_loaded(index, link).map_err(stopped)?;
                let own = Instant::now();
                sink.finish_load().map_err(failed("loading its state"))?;
                stream.took = stream.took.saturating_add(own.elapsed());
            }
        }
        self.load = self.load.saturating_add(began.elapsed());
        Ok(())
    }

    /// The source says that it sent everything: waits until it is loaded, and says what that took,
    /// if we have it all.
    pub(super) fn complete(
        &mut self,
        complete: Complete,
        link: &Link,
    ) -> Result<Ready, MigrationError> {
        self.compare(complete.memory_bytes)?;
        if let Some(stream) = self.streams.iter().find(|stream| !stream.ended) {
            return Err(stream.broken("it never ended"));
        }
        let began = Instant::now();
        let count = self.streams.len();
        self.loaders.wait_loaded(count, link).map_err(stopped)?;
        self.load = self.load.saturating_add(began.elapsed());
        for (index, took) in self.loaders.take_times() {
            if let Some(stream) = self.streams.get_mut(index) {
                stream.took = took;
            }
        }
        let times = self.streams.iter().map(|stream| micros_of(stream.took));
        Ok(Ready {
            load_us: micros_of(self.load),
            devices_us: times.collect(),
        })
    }
}

/// The stream of a device that a frame names.
fn find<'s, 'a>(
    streams: &'s mut [Stream<'a>],
    number: u16,
) -> Result<&'s mut Stream<'a>, MigrationError> {
    let found = streams.get_mut(usize::from(number));
    found.ok_or_else(|| MigrationError::StateBroken {
        id: format!("device {number} ({:?})", Kind::DeviceChunk),
        reason: "the manifest has no such device",
    })
}
