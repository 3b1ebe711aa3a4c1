//! Reading and writing with bounded patience.

use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, Shutdown};

use super::Connection;
use crate::migrate::cancel::CancelHandle;

/// How long to wait, and whether a cancel ends the wait.
#[derive(Clone, Copy, Debug)]
pub(in crate::migrate) struct Patience {
    /// Longest time without a byte moving; `None` waits as long as it takes.
    pub(in crate::migrate) idle: Option<Duration>,
    /// No longer than until then, whatever moves.
    pub(in crate::migrate) until: Option<Instant>,
    /// Stop when the migration is cancelled. Off while saying goodbye.
    pub(in crate::migrate) heed_cancel: bool,
}

/// Why a read or write did not end well.
#[derive(Debug)]
pub(in crate::migrate) enum Stop {
    /// The peer is gone.
    Closed,
    /// Patience ran out.
    TimedOut,
    /// The migration was cancelled.
    Cancelled,
    /// The system refused.
    Io(std::io::Error),
}

impl From<Errno> for Stop {
    fn from(errno: Errno) -> Self {
        match errno {
            Errno::PIPE | Errno::CONNRESET | Errno::NOTCONN | Errno::CONNABORTED => Self::Closed,
            Errno::TIMEDOUT | Errno::HOSTUNREACH | Errno::NETUNREACH => Self::TimedOut,
            other => Self::Io(other.into()),
        }
    }
}

impl Patience {
    /// When the wait that begins now must be over.
    fn deadline(&self) -> Option<Instant> {
        let idle = self.idle.and_then(|idle| Instant::now().checked_add(idle));
        match (idle, self.until) {
            (Some(idle), Some(until)) => Some(idle.min(until)),
            (one, other) => one.or(other),
        }
    }
}

/// Waits until `fd` is ready for `events`.
fn wait(
    fd: BorrowedFd<'_>,
    events: PollFlags,
    cancel: &CancelHandle,
    patience: &Patience,
) -> Result<(), Stop> {
    let deadline = patience.deadline();
    loop {
        let left = match deadline {
            None => None,
            // Past the deadline it is still looked once, so that a wait of zero is a look.
            Some(deadline) => {
                let left = deadline.saturating_duration_since(Instant::now());
                Timespec::try_from(left).ok()
            }
        };
        // A cancel is not watched for by asking for no event of its descriptor.
        let heed = if patience.heed_cancel {
            PollFlags::IN
        } else {
            PollFlags::empty()
        };
        let mut fds = [
            PollFd::from_borrowed_fd(fd, events),
            PollFd::from_borrowed_fd(cancel.as_fd(), heed),
        ];
        match rustix::event::poll(&mut fds, left.as_ref()) {
            Ok(0) => return Err(Stop::TimedOut),
            Ok(_) => {}
            Err(Errno::INTR) => continue,
            Err(errno) => return Err(errno.into()),
        }
        let [ready, cancelled] = &fds;
        if patience.heed_cancel && !cancelled.revents().is_empty() {
            return Err(Stop::Cancelled);
        }
        // Hang-ups and errors show in the call that follows.
        if !ready.revents().is_empty() {
            return Ok(());
        }
    }
}

/// Waits for a listener or a socket to have something.
pub(super) fn wait_readable(
    fd: BorrowedFd<'_>,
    cancel: &CancelHandle,
    patience: &Patience,
) -> Result<(), Stop> {
    wait(fd, PollFlags::IN, cancel, patience)
}

/// Sleeps; an error means that the migration was cancelled meanwhile.
pub(super) fn pause_for(duration: Duration, cancel: &CancelHandle) -> Result<(), ()> {
    let mut fds = [PollFd::from_borrowed_fd(cancel.as_fd(), PollFlags::IN)];
    let timeout = Timespec::try_from(duration).ok();
    // An interrupted sleep is only shorter.
    let _ = rustix::event::poll(&mut fds, timeout.as_ref());
    if cancel.is_cancelled() {
        Err(())
    } else {
        Ok(())
    }
}

impl Connection {
    /// Writes all of `bytes`. The error says how many the system took before it.
    pub(in crate::migrate) fn write_all(
        &self,
        bytes: &[u8],
        patience: &Patience,
    ) -> Result<(), (usize, Stop)> {
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        let mut done = 0usize;
        while let Some(rest) = bytes.get(done..).filter(|rest| !rest.is_empty()) {
            match rustix::net::send(&self.socket, rest, flags) {
                Ok(count) => done = done.saturating_add(count),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    wait(self.socket.as_fd(), PollFlags::OUT, &self.cancel, patience)
                        .map_err(|stop| (done, stop))?;
                }
                Err(errno) => return Err((done, errno.into())),
            }
        }
        Ok(())
    }

    /// Fills `bytes`.
    pub(in crate::migrate) fn read_exact(
        &self,
        bytes: &mut [u8],
        patience: &Patience,
    ) -> Result<(), Stop> {
        let mut done = 0usize;
        while let Some(rest) = bytes.get_mut(done..).filter(|rest| !rest.is_empty()) {
            match rustix::net::recv(&self.socket, rest, RecvFlags::DONTWAIT) {
                Ok((0, _)) => return Err(Stop::Closed),
                Ok((count, _)) => done = done.saturating_add(count),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => wait_readable(self.socket.as_fd(), &self.cancel, patience)?,
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(())
    }

    /// Waits at most `duration` for something to read: true if there is, false if not.
    pub(in crate::migrate) fn readable_within(&self, duration: Duration) -> Result<bool, Stop> {
        let patience = Patience {
            idle: Some(duration),
            until: None,
            heed_cancel: true,
        };
        match wait_readable(self.socket.as_fd(), &self.cancel, &patience) {
            Ok(()) => Ok(true),
            Err(Stop::TimedOut) => Ok(false),
            Err(stop) => Err(stop),
        }
    }

    /// Whether a small write would be taken whole, at once.
    pub(in crate::migrate) fn writable_now(&self) -> bool {
        let patience = Patience {
            idle: Some(Duration::ZERO),
            until: None,
            heed_cancel: true,
        };
        wait(self.socket.as_fd(), PollFlags::OUT, &self.cancel, &patience).is_ok()
    }

    /// Says that no more comes from this side, and reads away what the peer still sends, so that
    /// closing does not reset the connection under our last frame. Ends at `until`.
    pub(in crate::migrate) fn drain(&self, until: Instant) {
        let _ = rustix::net::shutdown(&self.socket, Shutdown::Write);
        let patience = Patience {
            idle: None,
            until: Some(until),
            heed_cancel: false,
        };
        let mut waste = [0u8; 4096];
        while Instant::now() < until {
            match rustix::net::recv(&self.socket, &mut waste[..], RecvFlags::DONTWAIT) {
                Ok((0, _)) => return,
                Ok(_) | Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    if wait_readable(self.socket.as_fd(), &self.cancel, &patience).is_err() {
                        return;
                    }
                }
                Err(_) => return,
            }
        }
    }

    /// Ends both directions at once; what is not yet sent is lost.
    pub(in crate::migrate) fn cut(&self) {
        let _ = rustix::net::shutdown(&self.socket, Shutdown::Both);
    }
}
