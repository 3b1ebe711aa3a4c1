//! The guest stands still: everything else goes over, and then the guest.

use std::time::{Duration, Instant};

use super::precopy::{Guest, micros_of};
use super::{MigrationError, Sent, Source};
use crate::migrate::frame::Kind;
use crate::migrate::link::{LinkError, Wait};
use crate::migrate::phase::SourcePhase;
use crate::migrate::protocol::{Commit, Complete, Ready, Running};
use crate::migrate::status::{DeviceDowntime, Downtime};

/// Measures one part of the downtime after the other.
struct Lap {
    began: Instant,
    last: Instant,
}

impl Lap {
    fn start() -> Self {
        let began = Instant::now();
        Self { began, last: began }
    }

    /// µs since the last lap.
    fn next(&mut self) -> u64 {
        let now = Instant::now();
        let took = now.duration_since(self.last);
        self.last = now;
        micros_of(took)
    }

    /// µs since the start.
    fn total(&self) -> u64 {
        micros_of(self.began.elapsed())
    }
}

impl Source<'_> {
    /// Stops the guest, sends the rest, and hands the guest over.
    pub(super) fn switchover(&mut self) -> Result<Downtime, MigrationError> {
        let mut lap = Lap::start();
        let mut downtime = Downtime {
            devices: self.no_times(),
            ..Downtime::default()
        };
        self.stand_still(&mut lap, &mut downtime)?;
        self.collect(Guest::StandsStill)?;
        downtime.final_sync = lap.next();
        // The devices are read meanwhile; what of them is ready takes turns with memory.
        while self.send_pages(Guest::StandsStill)? > 0 {
            self.send_ready_chunk()?;
            self.link.listen_for(Duration::ZERO)?;
        }
        downtime.memory = lap.next();
        self.send_stop_copy()?;
        let complete = Complete {
            memory_bytes: self.sent.memory_bytes,
        };
        self.link.send_message(Kind::Complete, &complete)?;
        downtime.device_state = lap.next();
        let awaited = "word that everything is loaded";
        let ready: Ready = self
            .link
            .receive_message(Kind::Ready, Wait::Answer, awaited)?;
        downtime.destination_load = ready.load_us;
        self.complete_times(&mut downtime.devices, &ready.devices_us);
        self.parts.dirty.acknowledge();
        self.sent = Sent::default();
        lap.next();
        self.hand_over()?;
        downtime.commit = lap.next();
        downtime.total = lap.total();
        let told = downtime.clone();
        self.story.update(|now| now.downtime = Some(told));
        Ok(downtime)
    }

    /// The devices' parts of a downtime that begins.
    fn no_times(&mut self) -> Vec<DeviceDowntime> {
        let streams = self.streams.0.iter_mut();
        streams
            .zip(&self.parts.manifest.devices)
            .map(|(stream, device)| {
                stream.sending = Duration::ZERO;
                DeviceDowntime {
                    id: device.id.clone(),
                    // What is sent by the end less this.
                    bytes: stream.bytes,
                    ..DeviceDowntime::default()
                }
            })
            .collect()
    }

    /// All is loaded at the destination, which took `loads` µs, device by device.
    fn complete_times(&self, times: &mut [DeviceDowntime], loads: &[u64]) {
        for (index, (time, stream)) in times.iter_mut().zip(&self.streams.0).enumerate() {
            time.bytes = stream.bytes.saturating_sub(time.bytes);
            time.read = micros_of(self.readers.stopped_took(index));
            time.send = micros_of(stream.sending);
            time.load = loads.get(index).copied().unwrap_or_default();
        }
    }

    /// Stops everything that writes guest memory: the vCPUs; then all devices start nothing more
    /// that another could see; only then do they stop entirely.
    fn stand_still(
        &mut self,
        lap: &mut Lap,
        downtime: &mut Downtime,
    ) -> Result<(), MigrationError> {
        self.begun.vcpus = true;
        self.link.set_urgent(true);
        self.parts
            .vcpus
            .pause()
            .map_err(|cause| MigrationError::Vcpus {
                done: "paused",
                cause,
            })?;
        downtime.pause_vcpus = lap.next();
        for (device, time) in self.parts.devices.iter().zip(&mut downtime.devices) {
            let began = Instant::now();
            let quiet = device.lock().quiesce();
            time.quiesce = micros_of(began.elapsed());
            quiet.map_err(|cause| MigrationError::Device {
                doing: "coming to rest",
                cause,
            })?;
        }
        downtime.quiesce = lap.next();
        let devices = self.parts.devices.iter().zip(&mut downtime.devices);
        for (index, (device, time)) in devices.enumerate() {
            let began = Instant::now();
            let stopped = device.lock().stop();
            time.stop = micros_of(began.elapsed());
            stopped.map_err(|cause| MigrationError::Device {
                doing: "stopping",
                cause,
            })?;
            // It is read while the others stop.
            self.readers.begin_stop_copy(index);
        }
        downtime.stop = lap.next();
        Ok(())
    }

    /// The guest's owner changes here. As long as the `Commit` is not wholly sent, the destination
    /// cannot have it, and the guest is ours; from then on it is not, whatever we hear or not.
    fn hand_over(&mut self) -> Result<(), MigrationError> {
        self.link.listen_for(Duration::ZERO)?;
        self.link.commit()?;
        self.link.send_message(Kind::Commit, &Commit)?;
        self.committed = true;
        // Giving up brings the guest back no more: from here patience is better.
        self.link.set_urgent(false);
        self.enter(SourcePhase::Finalize);
        let awaited = "word that the guest runs";
        let running = self
            .link
            .receive_message::<Running>(Kind::Running, Wait::Answer, awaited);
        match running {
            Ok(running) => {
                tracing::debug!(run_us = running.run_us, "the guest runs at the destination");
                Ok(())
            }
            Err(LinkError::PeerAborted { peer, reason, .. }) => {
                Err(MigrationError::DestinationFailed { peer, reason })
            }
            Err(cause) => Err(MigrationError::CommitUnacknowledged {
                peer: self.link.peer().to_owned(),
                cause: Box::new(cause.into()),
            }),
        }
    }
}
