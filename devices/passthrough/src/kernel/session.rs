//! Migration data: the file that a device gives with PRE_COPY, STOP_COPY and RESUMING.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use vfio_user::wire::PRECOPY_INFO_REINIT;
use vfio_user::{DeviceState, PrecopyInfo};
use zerocopy::{FromBytes, IntoBytes};

use super::error::KernelError;
use super::sys::Kernel;
use super::uapi::{Message, PrecopyInfoMsg};

/// How long a device may take to be ready for the next piece.
const PATIENCE: Duration = Duration::from_secs(10);

/// The data session of a device, if its state has one.
pub(crate) struct Session {
    file: Option<OwnedFd>,
    state: DeviceState,
}

impl Session {
    pub(crate) const fn new() -> Self {
        Self {
            file: None,
            state: DeviceState::Running,
        }
    }

    /// The device has entered `state`, which began a session if it gave a file.
    pub(crate) fn enter(
        &mut self,
        kernel: &dyn Kernel,
        state: DeviceState,
        began: Option<OwnedFd>,
    ) -> Result<(), KernelError> {
        self.state = state;
        let has_data = state.is_saving() || state == DeviceState::Resuming;
        match began {
            Some(file) => {
                // Nobody may wait for a device longer than PATIENCE.
                let set = kernel.set_nonblocking(file.as_fd());
                set.map_err(KernelError::refused("make a data session non-blocking"))?;
                self.file = Some(file);
            }
            // From PRE_COPY to STOP_COPY the session goes on.
            None if has_data && self.file.is_some() => {}
            None if has_data => return Err(KernelError::NoSession),
            None => self.file = None,
        }
        Ok(())
    }

    /// The device was reset.
    pub(crate) fn end(&mut self) {
        *self = Self::new();
    }

    fn file(&self) -> Result<BorrowedFd<'_>, KernelError> {
        self.file
            .as_ref()
            .map(AsFd::as_fd)
            .ok_or(KernelError::NoSession)
    }

    /// Reads a piece; 0 if there is no more, for now in PRE_COPY or at all in STOP_COPY.
    pub(crate) fn read(&self, kernel: &dyn Kernel, data: &mut [u8]) -> Result<usize, KernelError> {
        let file = self.file()?;
        let refused = KernelError::refused("read the device's state");
        let running = self.state.is_running();
        let deadline = Instant::now() + PATIENCE;
        loop {
            match kernel.read(file, data) {
                Ok(len) if len > data.len() => {
                    return Err(KernelError::Short {
                        done: data.len(),
                        wanted: len,
                    });
                }
                Ok(len) => return Ok(len),
                // While it runs: more may come.
                Err(Errno::NOMSG) if running => return Ok(0),
                // It still collects; while it runs there is no reason to wait for it.
                Err(Errno::AGAIN) if running => return Ok(0),
                Err(Errno::AGAIN) => wait(kernel, file, false, deadline)?,
                Err(cause) => return Err(refused(cause)),
            }
        }
    }

    /// Writes all of `data`.
    pub(crate) fn write(&self, kernel: &dyn Kernel, mut data: &[u8]) -> Result<(), KernelError> {
        let file = self.file()?;
        let refused = KernelError::refused("write the device's state");
        let mut deadline = Instant::now() + PATIENCE;
        while !data.is_empty() {
            match kernel.write(file, data) {
                Ok(0) => return Err(refused(Errno::NOSPC)),
                Ok(len) => {
                    data = data.get(len..).ok_or(KernelError::Short {
                        done: data.len(),
                        wanted: len,
                    })?;
                    deadline = Instant::now() + PATIENCE;
                }
                Err(Errno::AGAIN) => wait(kernel, file, true, deadline)?,
                Err(cause) => return Err(refused(cause)),
            }
        }
        Ok(())
    }

    /// What the device says can be read while it runs. `None` outside of PRE_COPY.
    pub(crate) fn precopy_info(
        &self,
        kernel: &dyn Kernel,
    ) -> Result<Option<PrecopyInfo>, KernelError> {
        let running = matches!(self.state, DeviceState::PreCopy | DeviceState::PreCopyP2p);
        let (true, Some(file)) = (running, &self.file) else {
            return Ok(None);
        };
        let mut message = [0; size_of::<PrecopyInfoMsg>()];
        match kernel.message(file.as_fd(), Message::PrecopyInfo, &mut message) {
            Ok(_) => {}
            Err(Errno::NOTTY | Errno::OPNOTSUPP) => return Ok(None),
            Err(cause) => {
                return Err(KernelError::refused("tell how much pre-copy data there is")(cause));
            }
        }
        let info = PrecopyInfoMsg::read_from_bytes(message.as_bytes());
        Ok(info.ok().map(|info| PrecopyInfo {
            initial_bytes: info.initial_bytes,
            dirty_bytes: info.dirty_bytes,
            reinit: info.flags & PRECOPY_INFO_REINIT != 0,
        }))
    }
}

/// Waits until the session is ready or it is `deadline`.
fn wait(
    kernel: &dyn Kernel,
    file: BorrowedFd<'_>,
    writable: bool,
    deadline: Instant,
) -> Result<(), KernelError> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(KernelError::Stalled {
                seconds: PATIENCE.as_secs(),
            });
        }
        match kernel.wait(file, writable, left) {
            Ok(true) => return Ok(()),
            // Not ready in time, or a signal.
            Ok(false) | Err(Errno::INTR) => {}
            Err(cause) => return Err(KernelError::refused("wait for the device")(cause)),
        }
    }
}

#[cfg(test)]
mod tests;
