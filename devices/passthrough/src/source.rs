//! The device's state on its way out.

use std::sync::Arc;

use vfio_user::{DeviceState, MigrationFlags};
use vm_migration::{PrecopyRead, StateError, StateSize, StateSource};

use crate::device::Inner;
use crate::stream::{FRAME_HEADER, MAX_DATA, data_header, end_frame, front_frame, preamble};

/// Stop-copy bytes assumed of a device that gives no estimate, if it has sent no more while it
/// ran.
const UNKNOWN_STOP_COPY: u64 = 16 << 20;

/// Least bytes of a buffer to read into.
const MIN_BUFFER: usize = 64;

/// Where a migration of the device is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    /// Not begun.
    Idle,
    /// The device runs; `drained` if it had no more data at the last read.
    Precopy { drained: bool },
    /// The device runs but cannot give data while it does.
    Waiting,
    /// It stands still and gives the rest.
    StopCopy,
    /// All was read.
    Read,
    /// The destination has taken over.
    Finished,
}

/// The state of a passthrough device, to be sent.
pub struct PassthroughSource {
    inner: Arc<Inner>,
    flags: MigrationFlags,
    phase: Phase,
    /// Where an abort goes back to: the guest may have been paused before.
    home: DeviceState,
    /// It may be at rest or stopped, so that an abort wakes it first.
    quiet: bool,
    /// Bytes of the stream that wait to be read, from `at` on.
    pending: Vec<u8>,
    at: usize,
    /// Device data read so far.
    data_bytes: u64,
}

impl PassthroughSource {
    pub(crate) const fn new(inner: Arc<Inner>, flags: MigrationFlags) -> Self {
        Self {
            inner,
            flags,
            phase: Phase::Idle,
            home: DeviceState::Running,
            quiet: false,
            pending: Vec::new(),
            at: 0,
            data_bytes: 0,
        }
    }

    fn set_state(&self, state: DeviceState, operation: &'static str) -> Result<(), StateError> {
        self.inner.change_state(state, operation)
    }

    /// Whether it can be told to start no more peer-to-peer DMA, and has to be.
    fn quiesces(&self) -> bool {
        self.flags.contains(MigrationFlags::P2P) && self.home == DeviceState::Running
    }

    /// What is left of a device that runs, or could.
    fn running_size(&self, told: Option<u64>) -> Result<StateSize, StateError> {
        let total = told.unwrap_or_else(|| UNKNOWN_STOP_COPY.max(self.data_bytes));
        let info = match self.phase {
            Phase::Precopy { .. } => self.inner.backend.precopy_info(),
            _ => Ok(None),
        };
        let info = info.map_err(|cause| self.inner.failed("estimating its state", cause))?;
        let Some(info) = info else {
            // Unknown: all of it, until it had no more to give.
            let drained = match self.phase {
                Phase::Precopy { drained } => drained,
                _ => !self.flags.contains(MigrationFlags::PRE_COPY) || self.phase != Phase::Idle,
            };
            return Ok(StateSize {
                precopy_bytes: if drained { 0 } else { total },
                initial_bytes: 0,
                stop_copy_bytes: if drained { total } else { 0 },
            });
        };
        if info.reinit {
            tracing::info!(device = self.inner.id, "device has begun its pre-copy anew");
        }
        let precopy_bytes = info.initial_bytes.saturating_add(info.dirty_bytes);
        Ok(StateSize {
            precopy_bytes,
            initial_bytes: info.initial_bytes,
            stop_copy_bytes: total.saturating_sub(precopy_bytes),
        })
    }

    fn misuse(&self, operation: &'static str) -> StateError {
        StateError::Failed {
            id: self.inner.id.clone(),
            operation,
            cause: format!("it was called in phase {:?}", self.phase).into(),
        }
    }

    /// Moves waiting bytes of the stream to `buffer`.
    fn take_pending(&mut self, buffer: &mut [u8]) -> usize {
        let rest = self.pending.get(self.at..).unwrap_or_default();
        let len = rest.len().min(buffer.len());
        if let (Some(to), Some(from)) = (buffer.get_mut(..len), rest.get(..len)) {
            to.copy_from_slice(from);
        }
        self.at += len;
        if self.at >= self.pending.len() {
            self.pending.clear();
            self.at = 0;
        }
        len
    }

    /// Reads a frame of device data straight into `buffer`; 0 if there is none.
    fn read_frame(&mut self, buffer: &mut [u8]) -> Result<usize, StateError> {
        let most = buffer.len().min(MAX_DATA);
        let (head, data) = match buffer.get_mut(..most) {
            Some(buffer) if most >= MIN_BUFFER => buffer.split_at_mut(FRAME_HEADER),
            _ => return Err(self.misuse("reading state into too small a buffer")),
        };
        let len = self
            .inner
            .backend
            .read_data(data)
            .map_err(|cause| self.inner.failed("reading its state", cause))?;
        if len == 0 {
            return Ok(0);
        }
        head.copy_from_slice(&data_header(len));
        self.data_bytes = self
            .data_bytes
            .saturating_add(u64::try_from(len).unwrap_or(u64::MAX));
        Ok(FRAME_HEADER + len)
    }

    /// Queues the VMM's part; the guest stands still.
    fn queue_front(&mut self) -> Result<(), StateError> {
        let state = self.inner.front.lock().save();
        let bytes = postcard::to_stdvec(&state).map_err(|cause| StateError::Failed {
            id: self.inner.id.clone(),
            operation: "saving its PCI front",
            cause: Box::new(cause),
        })?;
        self.pending.extend_from_slice(&front_frame(&bytes));
        Ok(())
    }
}

impl StateSource for PassthroughSource {
    fn id(&self) -> &str {
        &self.inner.id
    }

    fn is_streamed(&self) -> bool {
        true
    }

    fn size(&mut self) -> Result<StateSize, StateError> {
        let told = self
            .inner
            .backend
            .stop_copy_size()
            .map_err(|cause| self.inner.failed("estimating its state", cause))?;
        match self.phase {
            Phase::Idle | Phase::Precopy { .. } | Phase::Waiting => self.running_size(told),
            Phase::StopCopy => Ok(StateSize {
                stop_copy_bytes: told
                    .unwrap_or_else(|| UNKNOWN_STOP_COPY.saturating_sub(self.data_bytes)),
                ..StateSize::default()
            }),
            Phase::Read | Phase::Finished => Ok(StateSize::default()),
        }
    }

    fn start_precopy(&mut self) -> Result<(), StateError> {
        if self.phase != Phase::Idle {
            return Err(self.misuse("starting pre-copy"));
        }
        let now = self.inner.backend.state();
        let now = now.map_err(|cause| self.inner.failed("asking for its state", cause))?;
        // A paused guest's device must not run again for the sake of pre-copy.
        self.home = match now {
            DeviceState::Stop => DeviceState::Stop,
            _ => DeviceState::Running,
        };
        self.pending = preamble(self.inner.profile.identity);
        self.at = 0;
        self.data_bytes = 0;
        self.quiet = false;
        self.phase = Phase::Waiting;
        if self.flags.contains(MigrationFlags::PRE_COPY) && self.home == DeviceState::Running {
            self.set_state(DeviceState::PreCopy, "entering PRE_COPY")?;
            self.phase = Phase::Precopy { drained: false };
        }
        Ok(())
    }

    fn read_precopy(&mut self, buffer: &mut [u8]) -> Result<PrecopyRead, StateError> {
        let drained = match self.phase {
            Phase::Precopy { .. } => false,
            Phase::Waiting => true,
            _ => return Err(self.misuse("reading pre-copy data")),
        };
        let len = self.take_pending(buffer);
        if len != 0 {
            return Ok(PrecopyRead::Data(len));
        }
        if drained {
            return Ok(PrecopyRead::Empty);
        }
        let len = self.read_frame(buffer)?;
        self.phase = Phase::Precopy { drained: len == 0 };
        Ok(match len {
            0 => PrecopyRead::Empty,
            len => PrecopyRead::Data(len),
        })
    }

    fn quiesce(&mut self) -> Result<(), StateError> {
        let target = match self.phase {
            Phase::Precopy { .. } => DeviceState::PreCopyP2p,
            Phase::Waiting => DeviceState::RunningP2p,
            _ => return Err(self.misuse("quiescing")),
        };
        // A device without the state cannot be told apart from one that does no peer-to-peer
        // DMA: it is stopped in its turn.
        if !self.quiesces() {
            return Ok(());
        }
        // Noted first: a change that failed half-way is undone too.
        self.quiet = true;
        self.set_state(target, "quiescing")
    }

    fn stop(&mut self) -> Result<(), StateError> {
        if !matches!(self.phase, Phase::Precopy { .. } | Phase::Waiting) {
            return Err(self.misuse("stopping"));
        }
        self.quiet = true;
        self.set_state(DeviceState::StopCopy, "entering STOP_COPY")?;
        self.phase = Phase::StopCopy;
        self.queue_front()
    }

    fn read_stop_copy(&mut self, buffer: &mut [u8]) -> Result<usize, StateError> {
        if !matches!(self.phase, Phase::StopCopy | Phase::Read) {
            return Err(self.misuse("reading stop-copy data"));
        }
        let len = self.take_pending(buffer);
        if len != 0 || self.phase == Phase::Read {
            return Ok(len);
        }
        let len = self.read_frame(buffer)?;
        if len != 0 {
            return Ok(len);
        }
        self.phase = Phase::Read;
        self.pending = end_frame(self.data_bytes);
        Ok(self.take_pending(buffer))
    }

    fn wake(&mut self) {
        if std::mem::take(&mut self.quiet) && self.quiesces() {
            // The log has what fails, and the abort mends or tells it.
            let _ = self.set_state(DeviceState::RunningP2p, "waking");
        }
    }

    fn abort(&mut self) -> Result<(), StateError> {
        self.pending.clear();
        self.at = 0;
        match std::mem::replace(&mut self.phase, Phase::Idle) {
            Phase::Idle => Ok(()),
            Phase::Finished => {
                self.phase = Phase::Finished;
                Err(self.misuse("aborting"))
            }
            Phase::Precopy { .. } | Phase::Waiting | Phase::StopCopy | Phase::Read => self
                .inner
                .bring_back(self.home, "going on after the migration failed"),
        }
    }

    fn finish(&mut self) -> Result<(), StateError> {
        if self.phase != Phase::Read {
            return Err(self.misuse("finishing"));
        }
        self.phase = Phase::Finished;
        // Ends the data session. Can be slow, so it is not done while the guest stands still.
        self.set_state(DeviceState::Stop, "leaving STOP_COPY")
    }
}

#[cfg(test)]
mod faults;
#[cfg(test)]
mod tests;
