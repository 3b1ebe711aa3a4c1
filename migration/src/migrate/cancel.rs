//! Calling a migration off from another thread.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use rustix::event::EventfdFlags;

const GOING_ON: u8 = 0;
const CANCELLED: u8 = 1;
const COMMITTED: u8 = 2;

/// It is too late to cancel: the migration is committed or over.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the migration is already committed: the guest belongs to the destination")]
pub struct TooLate;

/// Cancels a migration; clones cancel the same one.
///
/// A cancelled migration stops wherever it is, also when blocked on the network, tells the peer,
/// and puts the source back as if nothing had happened. Cancelling and committing exclude each
/// other: exactly one of them happens.
#[derive(Clone, Debug)]
pub struct CancelHandle(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    state: AtomicU8,
    event: OwnedFd,
}

impl CancelHandle {
    /// A handle for one migration, not yet cancelled.
    pub fn new() -> std::io::Result<Self> {
        let event = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self(Arc::new(Inner {
            state: AtomicU8::new(GOING_ON),
            event,
        })))
    }

    /// Asks the migration to stop. Doing so twice is no error.
    pub fn cancel(&self) -> Result<(), TooLate> {
        let state = &self.0.state;
        match state.compare_exchange(GOING_ON, CANCELLED, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => {
                // The counter of a fresh eventfd has room; waking is all that matters.
                let _ = rustix::io::write(&self.0.event, &1u64.to_ne_bytes());
                Ok(())
            }
            Err(CANCELLED) => Ok(()),
            Err(_) => Err(TooLate),
        }
    }

    /// Whether [`cancel`](Self::cancel) was called in time.
    pub fn is_cancelled(&self) -> bool {
        self.0.state.load(Ordering::Acquire) == CANCELLED
    }

    /// Closes the door to cancelling; false if somebody was faster.
    pub(crate) fn commit(&self) -> bool {
        let state = &self.0.state;
        state
            .compare_exchange(GOING_ON, COMMITTED, Ordering::AcqRel, Ordering::Acquire)
            .is_ok()
    }
}

/// Readable once cancelled; for poll.
impl AsFd for CancelHandle {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.event.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cancel_and_commit_exclude_each_other() {
        let handle = CancelHandle::new().unwrap();
        assert!(!handle.is_cancelled());
        handle.clone().cancel().unwrap();
        handle.cancel().unwrap();
        assert!(handle.is_cancelled());
        assert!(!handle.commit());

        let handle = CancelHandle::new().unwrap();
        assert!(handle.commit());
        assert_eq!(handle.cancel(), Err(TooLate));
        assert!(!handle.is_cancelled());
    }
}
