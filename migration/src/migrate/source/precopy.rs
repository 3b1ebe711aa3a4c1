//! Memory rounds while the guest runs.
//!
//! The first round sends all of RAM. Each later one sends, once, every page that any source
//! reported since; it ends when the destination says that it has them. After each round it is
//! known how much is dirty now, and from that and the measured bandwidth how long the guest would
//! stand still if it moved now.

use std::time::{Duration, Instant};

use super::streams::LISTEN;
use super::{MigrationError, Sent, Source};
use crate::dirty::Collect;
use crate::migrate::frame::Kind;
use crate::migrate::link::Wait;
use crate::migrate::observer::{MigrationEvent, RoundReport};
use crate::migrate::params::TimeoutStrategy;
use crate::migrate::phase::SourcePhase;
use crate::migrate::protocol::Round;
use crate::migrate::status::SourceStatus;

/// Shortest useful round. When so little is dirty that a round takes less, and the guest still
/// cannot move (a device's state is too large, say), rounds would only burn CPU.
const SHORTEST_ROUND: Duration = Duration::from_millis(50);

/// A collection that takes longer asks several sources at once the next time: beside it the start of
/// threads does not show.
const LONG_COLLECTION: Duration = Duration::from_millis(2);

/// What the guest does while pages are sent.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Guest {
    /// It runs: what it writes after a page was read must be reported again.
    Runs,
    /// Nothing writes its memory any more.
    StandsStill,
}

/// How a round ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Ended {
    /// The destination has it.
    Acknowledged,
    /// In the middle, as the migration's time is up.
    OutOfTime,
}

impl Source<'_> {
    /// Sends rounds until the guest can move within the downtime, or must.
    pub(super) fn precopy(&mut self) -> Result<(), MigrationError> {
        let mut round = 0u32;
        loop {
            round = round.saturating_add(1);
            self.enter(SourcePhase::Precopy { round });
            let began = Instant::now();
            self.sent = Sent::default();
            if self.round(round)? == Ended::OutOfTime {
                return self.out_of_time();
            }
            let sent = self.sent;
            self.sent = Sent::default();
            self.collect(Guest::Runs)?;
            let estimate = self.estimate()?;
            self.tell_round(round, sent, began, estimate);
            if estimate <= self.params.downtime() && self.readers.unready().is_empty() {
                return Ok(());
            }
            if self.time_is_up() {
                return self.out_of_time();
            }
            self.rest()?;
        }
    }

    fn time_is_up(&self) -> bool {
        self.deadline
            .is_some_and(|deadline| Instant::now() >= deadline)
    }

    /// Sends everything that is dirty, devices taking turns with memory.
    fn round(&mut self, round: u32) -> Result<Ended, MigrationError> {
        self.begin_device_round();
        let shortest = Instant::now().checked_add(SHORTEST_ROUND);
        loop {
            let memory = self.send_pages(Guest::Runs)?;
            let device = self.send_ready_chunk()?;
            let bytes = memory.saturating_add(device);
            if bytes == 0 {
                // Devices that still read have the rest of a shortest round; then the next begins
                // beside them.
                let over = shortest.is_none_or(|end| Instant::now() >= end);
                if over || !self.readers.is_reading() {
                    break;
                }
                self.readers.wait_news(LISTEN);
            }
            let now = Instant::now();
            let wait = self.pacer.pay(bytes, now);
            self.link.listen_for(wait)?;
            self.bandwidth.sent(0, wait);
            if self.time_is_up() {
                return Ok(Ended::OutOfTime);
            }
        }
        self.end_round(round)?;
        Ok(Ended::Acknowledged)
    }

    /// Sends one frame of dirty pages; gives its bytes on the wire, 0 if nothing is dirty.
    pub(super) fn send_pages(&mut self, guest: Guest) -> Result<u64, MigrationError> {
        let began = Instant::now();
        let parts = &mut *self.parts;
        let sources = match guest {
            Guest::Runs => parts.sources.as_mut_slice(),
            Guest::StandsStill => &mut [],
        };
        self.batch.reset();
        loop {
            let room = u64::try_from(self.batch.room()).unwrap_or(u64::MAX);
            if room == 0 {
                break;
            }
            let Some(run) = parts.dirty.next_run(room, sources)? else {
                break;
            };
            let len = usize::try_from(run.len).unwrap_or(usize::MAX);
            self.batch.append(&self.memory, run.gpa, len)?;
        }
        if self.batch.is_empty() {
            return Ok(0);
        }
        let counts = self.batch.is_mostly_data();
        let (frame, tally) = self.batch.finish();
        let bytes = self.link.send(Kind::Pages, frame)?;
        let bytes = u64::try_from(bytes).unwrap_or(u64::MAX);
        // Zero pages take time and no bandwidth: their frames would belie it.
        if counts {
            self.bandwidth.sent(bytes, began.elapsed());
        }
        let sent = &mut self.sent;
        sent.memory_bytes = sent.memory_bytes.saturating_add(tally.memory_bytes);
        sent.zero_bytes = sent.zero_bytes.saturating_add(tally.zero_bytes);
        sent.wire_bytes = sent.wire_bytes.saturating_add(bytes);
        let pages = tally.memory_bytes / self.page_bytes.max(1);
        let zero_pages = tally.zero_bytes / self.page_bytes.max(1);
        self.story.update(|now| {
            now.bytes = now.bytes.saturating_add(bytes);
            now.pages = now.pages.saturating_add(pages);
            now.zero_pages = now.zero_pages.saturating_add(zero_pages);
            now.remaining_pages = now.remaining_pages.saturating_sub(pages);
        });
        Ok(bytes)
    }

    /// Says that the round is complete and waits until the destination has it.
    fn end_round(&mut self, round: u32) -> Result<(), MigrationError> {
        let message = Round {
            round,
            memory_bytes: self.sent.memory_bytes,
        };
        let asked = Instant::now();
        self.link.send_message(Kind::RoundEnd, &message)?;
        let awaited = "acknowledgement of the round";
        let answer: Round = self
            .link
            .receive_message(Kind::RoundAck, Wait::Answer, awaited)?;
        if answer != message {
            return Err(MigrationError::MemoryMissing {
                sent: message.memory_bytes,
                received: answer.memory_bytes,
            });
        }
        let waited = asked.elapsed();
        self.bandwidth.acknowledged(waited);
        let latency = self.costs.latency.map_or(waited, |old| old.min(waited));
        self.costs.latency = Some(latency);
        self.parts.dirty.acknowledge();
        let bandwidth = self.bandwidth.measured();
        self.story.update(|now| {
            now.rounds = round;
            now.bandwidth = bandwidth;
        });
        Ok(())
    }

    /// Asks all sources what was written and adds it to what is dirty.
    pub(super) fn collect(&mut self, guest: Guest) -> Result<(), MigrationError> {
        let how = Collect {
            restarts: match guest {
                Guest::Runs => self.restarts,
                // Sending everything while the guest stands still is no answer.
                Guest::StandsStill => 0,
            },
            threads: if self.costs.collect > LONG_COLLECTION {
                self.parts.report_threads
            } else {
                1
            },
        };
        let parts = &mut *self.parts;
        let before = parts.dirty.dirty_pages();
        let began = Instant::now();
        let reports = parts.dirty.collect(&mut parts.sources, how)?;
        self.costs.collect = began.elapsed();
        let dirty = parts.dirty.dirty_pages();
        let tracking = parts
            .dirty
            .tracking_time()
            .saturating_sub(self.tracking_before);
        let since = self.collected.replace(began).unwrap_or(self.started);
        let micros = began.duration_since(since).as_micros().max(1);
        let rate = u128::from(dirty.saturating_sub(before)).saturating_mul(1_000_000) / micros;
        for report in &reports {
            if let Some(why) = &report.failure {
                self.restarts = self.restarts.saturating_sub(1);
                self.story.tell(&MigrationEvent::DirtyLogRestarted {
                    source: report.id.clone(),
                    why: why.clone(),
                });
            }
        }
        self.story.update(|now| {
            now.remaining_pages = dirty;
            now.dirty_pages_per_second = u64::try_from(rate).ok();
            now.tracking_us = micros_of(tracking);
            let old = std::mem::take(&mut now.sources);
            now.sources = reports
                .into_iter()
                .map(|report| {
                    let before = old.iter().find(|source| source.id == report.id);
                    SourceStatus::after(report, before)
                })
                .collect();
        });
        Ok(())
    }

    /// How long the guest would stand still if it moved now: what is left of memory and of the
    /// devices' states over the bandwidth, or what the slowest device takes to give its part if that
    /// is longer; a last look at all sources, and two questions (`Complete`, `Commit`) with their
    /// answers.
    pub(super) fn estimate(&mut self) -> Result<Duration, MigrationError> {
        let memory = self
            .parts
            .dirty
            .dirty_pages()
            .saturating_mul(self.page_bytes);
        let (devices, reading) = self.devices_left()?;
        let bytes = memory.saturating_add(devices);
        let latency = self.costs.latency.unwrap_or_default();
        let estimate = self
            .bandwidth
            .time_for(bytes)
            .max(reading)
            .saturating_add(self.costs.collect)
            .saturating_add(latency.saturating_mul(2));
        self.story
            .update(|now| now.downtime_estimate_us = Some(micros_of(estimate)));
        Ok(estimate)
    }

    /// Lets a little time pass when there is little to send, then looks again.
    fn rest(&mut self) -> Result<(), MigrationError> {
        let dirty = self
            .parts
            .dirty
            .dirty_pages()
            .saturating_mul(self.page_bytes);
        // A round beside devices that read takes its time by itself.
        if dirty >= self.bandwidth.bytes_in(SHORTEST_ROUND) || self.readers.is_reading() {
            return Ok(());
        }
        let left = self.deadline.map_or(SHORTEST_ROUND, |deadline| {
            deadline.saturating_duration_since(Instant::now())
        });
        self.link.listen_for(SHORTEST_ROUND.min(left))?;
        self.collect(Guest::Runs)
    }

    /// The time is up: gives up, or moves the guest all the same.
    fn out_of_time(&mut self) -> Result<(), MigrationError> {
        match self.params.timeout_strategy {
            TimeoutStrategy::Ignore => Ok(()),
            TimeoutStrategy::Cancel => {
                let estimate = self.estimate()?;
                let unready = self.readers.unready();
                if estimate <= self.params.downtime() && !unready.is_empty() {
                    let named = unready.into_iter().map(|index| self.id(index));
                    return Err(MigrationError::DevicesNotReady {
                        timeout_s: self.params.timeout_s,
                        ids: named.collect::<Vec<_>>().join(", "),
                    });
                }
                Err(MigrationError::TimedOut {
                    timeout_s: self.params.timeout_s,
                    remaining_pages: self.parts.dirty.dirty_pages(),
                    estimate_ms: micros_of(estimate) / 1000,
                })
            }
        }
    }

    fn tell_round(&mut self, round: u32, sent: Sent, began: Instant, estimate: Duration) {
        let now = self.story.snapshot();
        self.story.tell(&MigrationEvent::Round(RoundReport {
            round,
            memory_bytes: sent.memory_bytes,
            zero_bytes: sent.zero_bytes,
            wire_bytes: sent.wire_bytes,
            took_us: micros_of(began.elapsed()),
            dirty_pages: now.remaining_pages,
            sources: now.sources,
            bandwidth: now.bandwidth,
            downtime_estimate_us: micros_of(estimate),
        }));
    }
}

/// Whole microseconds.
pub(super) fn micros_of(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
