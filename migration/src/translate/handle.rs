//! Changing the map of a device, from any thread.

use std::sync::Arc;

use super::map::{IovaMap, MapError, Mapping};
use super::state::State;
use crate::addr::IovaRange;
use crate::source::DirtyError;
use crate::sync::Mutex;

/// Why a change of a map was refused, or did not go smoothly.
#[derive(Debug, thiserror::Error)]
pub enum ChangeError<E> {
    /// It cannot be. Nothing changed, and the device was not touched.
    #[error("the device's map cannot be changed so")]
    Map(#[from] MapError),
    /// The device's own mapping could not be made or removed. The table is as before: a mapping
    /// that was to come is not there, one that was to go still is.
    #[error("the device's mapping could not be changed")]
    Device(#[source] E),
    /// The mapping is gone, but what was written to it could not be learnt. All reports fail until
    /// the log is started anew, so that everything becomes dirty; there is nothing more to do here.
    #[error("what the device wrote before its mapping went is not known: everything is sent again")]
    Log(#[source] DirtyError),
}

/// Changes the map of a [`Translated`](super::Translated) log, whether or not it runs; clones change
/// the same one.
///
/// A call may wait for one window of a report, and a report for a call.
#[derive(Clone)]
pub struct MapHandle {
    state: Arc<Mutex<State>>,
}

impl MapHandle {
    pub(super) fn new(state: Arc<Mutex<State>>) -> Self {
        Self { state }
    }

    /// Adds `mapping`; `install` makes it for the device, which may write to it from then on.
    ///
    /// `install` is called with the map locked: it must not use this handle, nor collect.
    ///
    /// # Errors
    /// [`ChangeError::Map`], [`ChangeError::Device`].
    pub fn map<E>(
        &self,
        mapping: Mapping,
        install: impl FnOnce() -> Result<(), E>,
    ) -> Result<(), ChangeError<E>> {
        self.state.lock().add(mapping, install)
    }

    /// Takes away all mappings in `range`, each whole. `remove` does it for the device: when it
    /// returns, the device writes by them no more. What was written until then is kept for the next
    /// report, if a log runs.
    ///
    /// `remove` is called with the map locked: it must not use this handle, nor collect.
    ///
    /// # Errors
    /// [`ChangeError::Map`] if `range` cuts a mapping, [`ChangeError::Device`],
    /// [`ChangeError::Log`].
    pub fn unmap<E>(
        &self,
        range: IovaRange,
        remove: impl FnOnce() -> Result<(), E>,
    ) -> Result<(), ChangeError<E>> {
        self.state.lock().remove(range, remove)
    }

    /// The map as it is now.
    pub fn current(&self) -> IovaMap {
        self.state.lock().map().clone()
    }

    /// How many pages of 4 KiB the log named that are mapped to no RAM, since this was made: writes
    /// to another device, or to nowhere. A page counts each time it is named.
    pub fn pages_outside_ram(&self) -> u64 {
        self.state.lock().pages_outside_ram()
    }
}
