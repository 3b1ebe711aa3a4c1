//! News for the control loop: what the guest asks or suffers, how a migration ended.

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
    /// The guest has ejected a device.
    DeviceEjected,
    /// The host wants a device back.
    DeviceWanted {
        /// Which device.
        id: String,
    },
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

/// Tells the control loop something. Cheap to clone.
pub struct NoticeSender<T> {
    sender: Sender<T>,
    event: Arc<EventFd>,
}

impl<T> Clone for NoticeSender<T> {
    fn clone(&self) -> Self {
        Self {
            sender: self.sender.clone(),
            event: Arc::clone(&self.event),
        }
    }
}

/// The control loop's end.
pub struct NoticeInbox<T> {
    receiver: Receiver<T>,
    event: Arc<EventFd>,
}

/// A sender of guests' exits.
pub type ExitSender = NoticeSender<ExitReason>;

/// A new channel.
///
/// # Errors
/// When there is no eventfd.
pub fn channel<T>() -> io::Result<(NoticeSender<T>, NoticeInbox<T>)> {
    let event = Arc::new(EventFd::new(EFD_NONBLOCK)?);
    let (sender, receiver) = mpsc::channel();
    Ok((
        NoticeSender {
            sender,
            event: Arc::clone(&event),
        },
        NoticeInbox { receiver, event },
    ))
}

impl<T> NoticeSender<T> {
    /// Sends; a control loop that is gone needs no news.
    pub fn send(&self, notice: T) {
        if self.sender.send(notice).is_ok()
            && let Err(error) = self.event.write(1)
        {
            tracing::error!(%error, "cannot wake the control loop");
        }
    }
}

impl<T> NoticeInbox<T> {
    /// The next news, if any.
    pub fn take(&self) -> Option<T> {
        // Drained first, so that news sent after the last one was taken wakes again.
        let _ = self.event.read();
        self.receiver.try_recv().ok()
    }
}

impl<T> AsFd for NoticeInbox<T> {
    /// Readable while there may be news.
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the eventfd is open as long as `self`, which the borrow does not outlive.
        unsafe { BorrowedFd::borrow_raw(self.event.as_raw_fd()) }
    }
}
