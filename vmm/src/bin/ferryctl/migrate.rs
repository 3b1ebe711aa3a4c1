//! `ferryctl migrate`: both ends of one migration.

#[cfg(test)]
mod tests;

use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use thiserror::Error;
use vmm::api::{
    ApiClient, ClientError, DestinationPhase, MigrationStatus, SendMigrationInfo, Side,
    SourcePhase, VmmPing,
};

use crate::cli::Order;
use crate::report::{Report, human_bytes};
use crate::{Failure, print, print_json};

/// How often both ends are asked how it goes.
const POLL: Duration = Duration::from_millis(100);
/// How many times in a row an end may fail to answer before it is taken for dead.
const PATIENCE: u32 = 20;
/// How long the destination may take to say that the guest runs after the source said so, in polls.
const SETTLE: u32 = 100;

/// Why a migration did not come about.
#[derive(Debug, Error)]
pub(crate) enum MigrateError {
    /// One end is not there.
    #[error("the {end} does not answer")]
    NoEnd {
        /// `source` or `destination`.
        end: &'static str,
        /// Why.
        #[source]
        source: ClientError,
    },
    /// The destination does not want to receive.
    #[error("the destination refuses to receive; nothing has changed")]
    Receive(#[source] ClientError),
    /// The source does not want to send.
    #[error("the source refuses to send; the VM is where it was")]
    Send(#[source] ClientError),
    /// It began and came to nothing.
    #[error("the migration failed; the VM runs on at the source: {why}{other}")]
    Aborted {
        /// The source's reason.
        why: String,
        /// The destination's, or nothing.
        other: String,
    },
    /// The source is gone in the middle.
    #[error("the source stopped answering; the destination says: {destination}")]
    SourceLost {
        /// What the destination is doing.
        destination: String,
        /// Why the source does not answer.
        #[source]
        source: ClientError,
    },
    /// The source has let go and the destination does not say that it runs.
    #[error(
        "the source says the VM has moved, and the destination says: {destination}; look at \
         vm.info there before doing anything"
    )]
    Unsettled {
        /// What the destination is doing.
        destination: String,
    },
}

/// The two ends.
struct Ends {
    source: ApiClient,
    destination: ApiClient,
}

/// Moves a VM and reports.
pub(crate) fn run(order: &Order) -> Result<(), Failure> {
    let ends = Ends {
        source: ApiClient::new(order.from.clone())?,
        destination: ApiClient::new(order.to.clone())?,
    };
    ends.check()?;
    let info = ends.start(order)?;
    let bar = progress_bar(order.json);
    let outcome = ends.watch(&bar);
    bar.finish_and_clear();
    let report = outcome?.learned_from(info.dirty_sources);
    if order.json {
        print_json(&report)
    } else {
        print(&report.to_string())
    }
}

impl Ends {
    /// Both must be there before either is asked for anything.
    fn check(&self) -> Result<(), MigrateError> {
        for (end, client) in [("source", &self.source), ("destination", &self.destination)] {
            client
                .get::<VmmPing>("vmm.ping")
                .map_err(|source| MigrateError::NoEnd { end, source })?;
        }
        Ok(())
    }

    /// The destination first: it must listen when the source connects.
    fn start(&self, order: &Order) -> Result<SendMigrationInfo, MigrateError> {
        let listen = order.listen_url.as_ref().unwrap_or(&order.url);
        let receive = order.devices.receive_config(listen);
        self.destination
            .put_json("vm.receive-migration", &receive)
            .map_err(MigrateError::Receive)?;
        let send = order.limits.send_config(&order.url);
        let answer = self.source.put_for("vm.send-migration", &send);
        let answer = answer.map_err(|error| {
            // Best effort: a destination left listening takes the next migration, or its own
            // cancel-migration.
            let _ = self.destination.put("vm.cancel-migration");
            MigrateError::Send(error)
        })?;
        Ok(answer.unwrap_or_default())
    }

    /// Asks both ends until it is over.
    fn watch(&self, bar: &ProgressBar) -> Result<Report, MigrateError> {
        let mut missed = 0u32;
        loop {
            match self.source.get::<MigrationStatus>("vm.migration") {
                Ok(status) => {
                    missed = 0;
                    show(bar, &status);
                    match &status.side {
                        Side::Source(SourcePhase::Done) => return self.settle(status),
                        Side::Source(SourcePhase::Aborted { why }) => {
                            return Err(self.aborted(why));
                        }
                        Side::Source(_) | Side::Destination(_) => {}
                    }
                }
                Err(source) => {
                    missed = missed.saturating_add(1);
                    if missed >= PATIENCE {
                        let destination = self.destination_says();
                        return Err(MigrateError::SourceLost {
                            destination,
                            source,
                        });
                    }
                }
            }
            std::thread::sleep(POLL);
        }
    }

    /// The source has let go: waits until the destination says that the guest runs.
    fn settle(&self, source: MigrationStatus) -> Result<Report, MigrateError> {
        for _ in 0..SETTLE {
            let destination = self.destination.get::<MigrationStatus>("vm.migration");
            if let Ok(destination) = destination
                && destination.side == Side::Destination(DestinationPhase::Running)
            {
                return Ok(Report::new(source, destination));
            }
            std::thread::sleep(POLL);
        }
        Err(MigrateError::Unsettled {
            destination: self.destination_says(),
        })
    }

    fn aborted(&self, why: &str) -> MigrateError {
        let status = self.destination.get::<MigrationStatus>("vm.migration");
        let other = match status.map(|status| status.side) {
            Ok(Side::Destination(DestinationPhase::Aborted { why: other })) if other != why => {
                format!("; the destination says: {other}")
            }
            _ => String::new(),
        };
        MigrateError::Aborted {
            why: why.to_owned(),
            other,
        }
    }

    /// What the destination is doing, for a message.
    fn destination_says(&self) -> String {
        match self.destination.get::<MigrationStatus>("vm.migration") {
            Ok(status) => phase(&status.side),
            Err(error) => error.to_string(),
        }
    }
}

/// A phase in a word, with its reason if it has one.
fn phase(side: &Side) -> String {
    match side {
        Side::Source(SourcePhase::Aborted { why })
        | Side::Destination(DestinationPhase::Aborted { why }) => format!("aborted: {why}"),
        Side::Source(SourcePhase::Precopy { round }) => format!("precopy, round {round}"),
        Side::Source(phase) => phase.name().to_owned(),
        Side::Destination(phase) => phase.name().to_owned(),
    }
}

fn progress_bar(hidden: bool) -> ProgressBar {
    if hidden {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new(0);
    // A template that is wrong only costs the looks.
    if let Ok(style) = ProgressStyle::with_template("{elapsed:>4} [{bar:30}] {percent:>3}% {msg}") {
        bar.set_style(style.progress_chars("=> "));
    }
    bar
}

/// Shows how it goes: the part of RAM that the destination has as it now is.
fn show(bar: &ProgressBar, status: &MigrationStatus) {
    // Pages of the status are 4 KiB, whatever pages each source tracks.
    let remaining = status.remaining_pages.saturating_mul(4096);
    bar.set_length(status.memory_bytes);
    bar.set_position(status.memory_bytes.saturating_sub(remaining));
    let mut message = phase(&status.side);
    message += &format!(", {} sent", human_bytes(status.bytes));
    if let Some(bandwidth) = status.bandwidth {
        message += &format!(" at {}/s", human_bytes(bandwidth));
    }
    if let Some(estimate) = status.downtime_estimate_us {
        message += &format!(", downtime would be {} ms", estimate.div_ceil(1000));
    }
    bar.set_message(message);
}
