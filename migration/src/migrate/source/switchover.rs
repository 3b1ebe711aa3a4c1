//! The guest stands still: everything else goes over, and then the guest.

use std::time::{Duration, Instant};

use super::precopy::{Guest, micros_of};
use super::{MigrationError, Sent, Source};
use crate::migrate::frame::Kind;
use crate::migrate::link::{LinkError, Wait};
use crate::migrate::phase::SourcePhase;
use crate::migrate::protocol::{Commit, Complete, Ready, Running};
use crate::migrate::status::Downtime;

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
        let mut downtime = Downtime::default();
        self.stand_still(&mut lap, &mut downtime)?;
        self.collect(Guest::StandsStill)?;
        downtime.final_sync = lap.next();
        while self.send_pages(Guest::StandsStill)? > 0 {
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
        self.parts.dirty.acknowledge();
        self.sent = Sent::default();
        lap.next();
        self.hand_over()?;
        downtime.commit = lap.next();
        downtime.total = lap.total();
        self.story.update(|now| now.downtime = Some(downtime));
        Ok(downtime)
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
        for device in &mut self.parts.devices {
            device.quiesce().map_err(|cause| MigrationError::Device {
                doing: "coming to rest",
                cause,
            })?;
        }
        downtime.quiesce = lap.next();
        for device in &mut self.parts.devices {
            device.stop().map_err(|cause| MigrationError::Device {
                doing: "stopping",
                cause,
            })?;
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
