//! The device's state on its way in.

use std::sync::Arc;

use vfio_user::{DeviceState, MigrationFlags};
use vm_migration::{StateError, StateSink};

use crate::backend::BackendError;
use crate::device::Inner;
use crate::front::FrontState;
use crate::stream::{Parser, StreamError};

enum Phase {
    /// Not begun.
    Idle,
    /// The device is in RESUMING and takes data.
    Loading(Parser),
    /// All is loaded; the device stands.
    Loaded,
    /// It runs.
    Running,
    /// Something failed; only an abort helps.
    Failed,
}

/// Where the state of a passthrough device is received.
pub struct PassthroughSink {
    inner: Arc<Inner>,
    phase: Phase,
}

/// What can go wrong with a piece.
enum Piece {
    Stream(StreamError),
    Device(BackendError),
}

impl From<StreamError> for Piece {
    fn from(error: StreamError) -> Self {
        Self::Stream(error)
    }
}

impl PassthroughSink {
    pub(crate) const fn new(inner: Arc<Inner>) -> Self {
        Self {
            inner,
            phase: Phase::Idle,
        }
    }

    fn bad(&self, reason: impl ToString) -> StateError {
        StateError::BadState {
            id: self.inner.id.clone(),
            reason: reason.to_string(),
        }
    }

    fn misuse(&self, operation: &'static str) -> StateError {
        StateError::Failed {
            id: self.inner.id.clone(),
            operation,
            cause: "it was called out of order".into(),
        }
    }

    fn load(&self, parser: Parser) -> Result<(), StateError> {
        let front = parser.finish().map_err(|error| self.bad(error))?;
        let front: FrontState = postcard::from_bytes(&front)
            .map_err(|error| self.bad(format!("its PCI front is malformed: {error}")))?;
        let restored = self.inner.front.lock().restore(&front);
        restored.map_err(|reason| self.bad(reason))?;
        // An interrupt that waits in the state finds somebody to signal.
        self.inner
            .follow_irqs()
            .map_err(|cause| self.inner.failed("taking its interrupts", cause))?;
        // The device checks and takes what it was given.
        self.inner
            .change_state(DeviceState::Stop, "loading its state")?;
        self.inner.send_front();
        Ok(())
    }
}

impl StateSink for PassthroughSink {
    fn id(&self) -> &str {
        &self.inner.id
    }

    fn is_streamed(&self) -> bool {
        true
    }

    fn prepare(&mut self) -> Result<(), StateError> {
        if !matches!(self.phase, Phase::Idle) {
            return Err(self.misuse("preparing"));
        }
        // It may have got part of the way if it fails: then an abort resets it too.
        self.phase = Phase::Failed;
        self.inner
            .change_state(DeviceState::Resuming, "entering RESUMING")?;
        self.phase = Phase::Loading(Parser::new(self.inner.profile.identity));
        Ok(())
    }

    fn write(&mut self, chunk: &[u8]) -> Result<(), StateError> {
        let Phase::Loading(parser) = &mut self.phase else {
            return Err(self.misuse("writing state"));
        };
        let backend = &self.inner.backend;
        let taken = parser.take(chunk, |data| {
            backend.write_data(data).map_err(Piece::Device)
        });
        taken.map_err(|error| {
            self.phase = Phase::Failed;
            match error {
                Piece::Stream(error) => self.bad(error),
                Piece::Device(cause) => self.inner.failed("taking its state", cause),
            }
        })
    }

    fn finish_load(&mut self) -> Result<(), StateError> {
        match std::mem::replace(&mut self.phase, Phase::Failed) {
            Phase::Loading(parser) => {
                self.load(parser)?;
                self.phase = Phase::Loaded;
                Ok(())
            }
            other => {
                self.phase = other;
                Err(self.misuse("loading state"))
            }
        }
    }

    fn wake(&mut self) -> Result<(), StateError> {
        if !matches!(self.phase, Phase::Loaded) {
            return Err(self.misuse("waking"));
        }
        match self.inner.has(MigrationFlags::P2P) {
            true => self
                .inner
                .change_state(DeviceState::RunningP2p, "waking it"),
            false => Ok(()),
        }
    }

    fn run(&mut self) -> Result<(), StateError> {
        if !matches!(self.phase, Phase::Loaded) {
            return Err(self.misuse("running"));
        }
        self.inner
            .change_state(DeviceState::Running, "starting it")?;
        self.phase = Phase::Running;
        Ok(())
    }

    fn abort(&mut self) -> Result<(), StateError> {
        match std::mem::replace(&mut self.phase, Phase::Idle) {
            Phase::Idle => Ok(()),
            // RESUMING has no way out but a reset.
            Phase::Loading(_) | Phase::Loaded | Phase::Running | Phase::Failed => {
                let reset = self.inner.reset();
                reset.map_err(|cause| self.inner.failed("resetting it", cause))
            }
        }
    }
}
