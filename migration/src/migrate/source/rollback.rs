//! Putting the source back as if nothing had happened.

use super::{Begun, MigrationError, Source, SourceParts};
use crate::error_chain::ErrorChain;
use crate::migrate::link::LinkError;
use crate::migrate::phase::SourcePhase;

/// Undoes what was begun. Everything is tried, whatever fails; gives what failed.
///
/// The guest first: devices run again before the vCPUs that use them, in the reverse of the order
/// in which they came to rest. That nobody looks at what it writes any more is cleaned up after.
pub(super) fn put_back(parts: &mut SourceParts, begun: Begun) -> Vec<String> {
    let mut problems = Vec::new();
    parts.dirty.put_back();
    for device in parts.devices.iter_mut().take(begun.devices).rev() {
        if let Err(error) = device.abort() {
            problems.push(ErrorChain(&error).to_string());
        }
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
    problems
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
        let problems = put_back(self.parts, self.begun);
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
