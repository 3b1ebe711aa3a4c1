//! Putting the source back as if nothing had happened.

use super::{Begun, MigrationError, Source, SourceParts};
use crate::error_chain::ErrorChain;
use crate::migrate::link::LinkError;
use crate::migrate::observer::MigrationEvent;
use crate::migrate::phase::SourcePhase;
use crate::state::StateError;

/// How putting back went.
#[derive(Debug, Default)]
pub(super) struct PutBack {
    /// What failed.
    pub(super) problems: Vec<String>,
    /// Devices that run only because they were reset, and why.
    resets: Vec<(String, String)>,
}

/// Undoes what was begun. Everything is tried, whatever fails.
///
/// The guest first: devices run again before the vCPUs that use them, in the reverse of the order
/// in which they came to rest, and none before all are awake. That nobody looks at what it writes
/// any more is cleaned up after.
pub(super) fn put_back(parts: &mut SourceParts, begun: Begun) -> PutBack {
    let PutBack {
        mut problems,
        mut resets,
    } = PutBack::default();
    parts.dirty.put_back();
    let devices = parts.devices.iter().take(begun.devices).rev();
    for device in devices.clone() {
        device.lock().wake();
    }
    for device in devices {
        let Err(error) = device.lock().abort() else {
            continue;
        };
        let problem = ErrorChain(&error).to_string();
        if let StateError::Reset { id, cause, .. } = error {
            resets.push((id, ErrorChain(&*cause).to_string()));
        }
        problems.push(problem);
    }
    if begun.vcpus
        && let Err(error) = parts.vcpus.resume()
    {
        problems.push(format!(
            "the vCPUs could not be resumed: {}",
            ErrorChain(&error)
        ));
    }
    for source in parts.sources.iter_mut().take(begun.sources).rev() {
        if let Err(error) = source.stop() {
            problems.push(ErrorChain(&error).to_string());
        }
    }
    PutBack { problems, resets }
}

impl Source<'_> {
    /// Ends a failed migration: gives the error to return.
    pub(super) fn give_up(mut self, cause: MigrationError) -> MigrationError {
        let why = cause.chain();
        if self.committed {
            self.link.close();
            self.story.source(SourcePhase::Aborted { why });
            return cause;
        }
        // They hold devices as long as they read.
        self.readers.quit();
        let PutBack { problems, resets } = put_back(self.parts, self.begun);
        for (device, why) in resets {
            self.story
                .tell(&MigrationEvent::DeviceReset { device, why });
        }
        let error = if problems.is_empty() {
            cause
        } else {
            MigrationError::RollBack {
                cause: Box::new(cause),
                problems,
            }
        };
        // The guest runs again; now there is time for courtesy. A destination that does not hear
        // it notices that the connection is gone, and without a commit it never runs.
        if matches!(error, MigrationError::Link(LinkError::PeerAborted { .. })) {
            self.link.close();
        } else {
            self.link.farewell(&why);
        }
        let why = error.chain();
        self.story.source(SourcePhase::Aborted { why });
        error
    }
}
