//! From the simple traits to the streaming ones.
//!
//! Most parts of a VM have little state: they are stopped, and all of it is one blob.
//! [`SnapshotSource`] and [`SnapshotSink`] make such a part (it is only [`SaveRestore`], and
//! [`Pause`] if it acts by itself) migratable.

use std::sync::Arc;

use parking_lot::Mutex;

use crate::state::{
    Pause, PrecopyRead, SaveRestore, StateError, StateSink, StateSize, StateSource,
};

/// Stops or starts a part.
type Switch<T> = fn(&mut T) -> Result<(), StateError>;

/// How a part is stopped and started: not at all, if it acts only when a vCPU does.
struct Switches<T> {
    pause: Switch<T>,
    resume: Switch<T>,
}

impl<T: Pause> Switches<T> {
    const ACTIVE: Self = Self {
        pause: T::pause,
        resume: T::resume,
    };
}

impl<T> Switches<T> {
    const STILL: Self = Self {
        pause: |_| Ok(()),
        resume: |_| Ok(()),
    };
}

/// Sends a part whose state is one bounded blob.
pub struct SnapshotSource<T> {
    id: String,
    part: Arc<Mutex<T>>,
    switches: Switches<T>,
    paused: bool,
    blob: Vec<u8>,
    sent: usize,
}

impl<T: Pause + SaveRestore> SnapshotSource<T> {
    /// For a part that acts by itself, and is paused when devices come to rest.
    pub fn new(id: impl Into<String>, part: Arc<Mutex<T>>) -> Self {
        Self::with(id.into(), part, Switches::ACTIVE)
    }
}

impl<T: SaveRestore> SnapshotSource<T> {
    /// For a part that stands still whenever the vCPUs do: the vCPUs' own state, an interrupt
    /// chip, a clock, a port device.
    pub fn still(id: impl Into<String>, part: Arc<Mutex<T>>) -> Self {
        Self::with(id.into(), part, Switches::STILL)
    }

    fn with(id: String, part: Arc<Mutex<T>>, switches: Switches<T>) -> Self {
        Self {
            id,
            part,
            switches,
            paused: false,
            blob: Vec::new(),
            sent: 0,
        }
    }

    /// For the device's manifest.
    pub const MAX_STATE_BYTES: usize = T::MAX_STATE_BYTES;
}

impl<T: SaveRestore> StateSource for SnapshotSource<T> {
    fn id(&self) -> &str {
        &self.id
    }

    /// It is a blob in memory.
    fn is_streamed(&self) -> bool {
        false
    }

    /// Before the state is saved, the most it can be.
    fn size(&mut self) -> Result<StateSize, StateError> {
        let left = if self.blob.is_empty() {
            self.part.lock().expected_bytes()
        } else {
            self.blob.len().saturating_sub(self.sent)
        };
        Ok(StateSize {
            precopy_bytes: 0,
            initial_bytes: 0,
            stop_copy_bytes: u64::try_from(left).unwrap_or(u64::MAX),
        })
    }

    /// There is nothing to send while the guest runs.
    fn start_precopy(&mut self) -> Result<(), StateError> {
        Ok(())
    }

    fn read_precopy(&mut self, _buffer: &mut [u8]) -> Result<PrecopyRead, StateError> {
        Ok(PrecopyRead::Empty)
    }

    fn quiesce(&mut self) -> Result<(), StateError> {
        // Noted first: a pause that failed half-way is undone too.
        self.paused = true;
        (self.switches.pause)(&mut self.part.lock())
    }

    fn stop(&mut self) -> Result<(), StateError> {
        let blob = self.part.lock().save()?;
        if blob.len() > T::MAX_STATE_BYTES {
            return Err(StateError::BadState {
                id: self.id.clone(),
                reason: too_long(blob.len(), T::MAX_STATE_BYTES),
            });
        }
        self.blob = blob;
        self.sent = 0;
        Ok(())
    }

    fn read_stop_copy(&mut self, buffer: &mut [u8]) -> Result<usize, StateError> {
        let rest = self.blob.get(self.sent..).unwrap_or_default();
        let count = rest.len().min(buffer.len());
        if let (Some(to), Some(from)) = (buffer.get_mut(..count), rest.get(..count)) {
            to.copy_from_slice(from);
        }
        self.sent = self.sent.saturating_add(count);
        Ok(count)
    }

    /// It reaches no other part but through guest memory and the vCPUs.
    fn wake(&mut self) {}

    fn abort(&mut self) -> Result<(), StateError> {
        self.blob = Vec::new();
        self.sent = 0;
        if std::mem::take(&mut self.paused) {
            (self.switches.resume)(&mut self.part.lock())?;
        }
        Ok(())
    }

    /// The part stays paused: its guest runs elsewhere.
    fn finish(&mut self) -> Result<(), StateError> {
        self.blob = Vec::new();
        Ok(())
    }
}

/// Receives a part whose state is one bounded blob.
pub struct SnapshotSink<T> {
    id: String,
    part: Arc<Mutex<T>>,
    switches: Switches<T>,
    blob: Vec<u8>,
    running: bool,
}

impl<T: Pause + SaveRestore> SnapshotSink<T> {
    /// For a part that acts by itself. It is paused now, and runs when the guest does.
    pub fn new(id: impl Into<String>, part: Arc<Mutex<T>>) -> Self {
        Self::with(id.into(), part, Switches::ACTIVE)
    }
}

impl<T: SaveRestore> SnapshotSink<T> {
    /// For a part that acts only when a vCPU does.
    pub fn still(id: impl Into<String>, part: Arc<Mutex<T>>) -> Self {
        Self::with(id.into(), part, Switches::STILL)
    }

    fn with(id: String, part: Arc<Mutex<T>>, switches: Switches<T>) -> Self {
        Self {
            id,
            part,
            switches,
            blob: Vec::new(),
            running: false,
        }
    }
}

impl<T: SaveRestore> StateSink for SnapshotSink<T> {
    fn id(&self) -> &str {
        &self.id
    }

    /// It is a blob in memory.
    fn is_streamed(&self) -> bool {
        false
    }

    /// The part was made before; there is no more to do.
    fn prepare(&mut self) -> Result<(), StateError> {
        Ok(())
    }

    fn write(&mut self, chunk: &[u8]) -> Result<(), StateError> {
        let length = self.blob.len().saturating_add(chunk.len());
        if length > T::MAX_STATE_BYTES {
            return Err(StateError::BadState {
                id: self.id.clone(),
                reason: too_long(length, T::MAX_STATE_BYTES),
            });
        }
        self.blob.extend_from_slice(chunk);
        Ok(())
    }

    fn finish_load(&mut self) -> Result<(), StateError> {
        let blob = std::mem::take(&mut self.blob);
        self.part.lock().restore(&blob)
    }

    /// It reaches no other part but through guest memory and the vCPUs.
    fn wake(&mut self) -> Result<(), StateError> {
        Ok(())
    }

    fn run(&mut self) -> Result<(), StateError> {
        self.running = true;
        (self.switches.resume)(&mut self.part.lock())
    }

    fn abort(&mut self) -> Result<(), StateError> {
        self.blob = Vec::new();
        if std::mem::take(&mut self.running) {
            (self.switches.pause)(&mut self.part.lock())?;
        }
        Ok(())
    }
}

fn too_long(length: usize, limit: usize) -> String {
    format!("{length} bytes; this part's state has at most {limit}")
}

#[cfg(test)]
mod tests;
