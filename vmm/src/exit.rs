//! What the guest, or the failure of a part, asks of the control loop.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Why a guest does not go on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ExitReason {
    /// The guest reset itself.
    Reset,
    /// The guest switched itself off.
    PowerOff,
    /// A vCPU cannot go on.
    Failed(String),
    /// A device is gone.
    DeviceLost {
        /// Which device.
        id: String,
        /// What happened.
        reason: String,
    },
}

/// `KVM_SYSTEM_EVENT_SHUTDOWN` (linux/kvm.h).
const SYSTEM_EVENT_SHUTDOWN: u32 = 1;
/// `KVM_SYSTEM_EVENT_RESET`.
const SYSTEM_EVENT_RESET: u32 = 2;

impl ExitReason {
    /// The reason behind a KVM system event.
    pub fn from_system_event(kind: u32) -> Self {
        match kind {
            SYSTEM_EVENT_SHUTDOWN => Self::PowerOff,
            SYSTEM_EVENT_RESET => Self::Reset,
            other => Self::Failed(format!("KVM system event {other}")),
        }
    }
}

/// Tells the control loop. Cheap to clone.
#[derive(Clone)]
pub struct ExitSender {
    sender: Sender<ExitReason>,
    event: Arc<EventFd>,
}

/// The control loop's end.
pub struct ExitInbox {
    receiver: Receiver<ExitReason>,
    event: Arc<EventFd>,
}

/// A new channel for exits.
///
/// # Errors
/// When there is no eventfd.
pub fn channel() -> io::Result<(ExitSender, ExitInbox)> {
    let event = Arc::new(EventFd::new(EFD_NONBLOCK)?);
    let (sender, receiver) = mpsc::channel();
    Ok((ExitSender { sender, event: Arc::clone(&event) }, ExitInbox { receiver, event }))
}

impl ExitSender {
    /// Sends; a control loop that is gone needs no news.
    pub fn send(&self, reason: ExitReason) {
        if self.sender.send(reason).is_ok()
            && let Err(error) = self.event.write(1)
        {
            tracing::error!(%error, "cannot wake the control loop");
        }
    }
}

impl ExitInbox {
    /// The next news, if any.
    pub fn take(&self) -> Option<ExitReason> {
        // Drained first, so that news sent after the last one was taken wakes again.
        let _ = self.event.read();
        self.receiver.try_recv().ok()
    }
}

impl AsFd for ExitInbox {
    /// Readable while there may be news.
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the eventfd is open as long as `self`, which the borrow does not outlive.
        unsafe { BorrowedFd::borrow_raw(self.event.as_raw_fd()) }
    }
}
