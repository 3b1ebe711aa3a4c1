//! Waiting for several files at once.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::event::Timespec;
pub(crate) use rustix::event::epoll::EventFlags;
use rustix::event::epoll::{self, CreateFlags, Event, EventData};
use rustix::io::Errno;
use vmm_sys_util::eventfd::EventFd;

/// Most events taken by one wait. A worker has fewer files.
const EVENTS: usize = 8;

/// An epoll instance whose files are told apart by tokens.
pub(crate) struct Poll {
    epoll: OwnedFd,
    ready: Vec<Event>,
}

impl Poll {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self {
            epoll: epoll::create(CreateFlags::CLOEXEC)?,
            ready: Vec::with_capacity(EVENTS),
        })
    }

    /// Watches `file` for `events`.
    pub(crate) fn add(&self, file: impl AsFd, token: u64, events: EventFlags) -> io::Result<()> {
        Ok(epoll::add(
            &self.epoll,
            file,
            EventData::new_u64(token),
            events,
        )?)
    }

    /// Watches an eventfd for signals.
    pub(crate) fn add_event(&self, event: &EventFd, token: u64) -> io::Result<()> {
        self.add(event_fd(event), token, EventFlags::IN)
    }

    /// Watches `file` for other events, and looks at once whether one holds, also if it is
    /// edge-triggered.
    pub(crate) fn rearm(&self, file: impl AsFd, token: u64, events: EventFlags) -> io::Result<()> {
        Ok(epoll::modify(
            &self.epoll,
            file,
            EventData::new_u64(token),
            events,
        )?)
    }

    /// Waits for events, not at all if `busy`, and hands each to `each`.
    pub(crate) fn wait(&mut self, busy: bool, each: impl FnMut(u64, EventFlags)) -> io::Result<()> {
        self.wait_for(busy.then_some(Duration::ZERO), each)
    }

    /// Waits for events, at most for `timeout`, and hands each to `each`.
    pub(crate) fn wait_for(
        &mut self,
        timeout: Option<Duration>,
        mut each: impl FnMut(u64, EventFlags),
    ) -> io::Result<()> {
        // Only a time of centuries does not fit, and that is as good as none.
        let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
        self.ready.clear();
        let buffer = rustix::buffer::spare_capacity(&mut self.ready);
        match epoll::wait(&self.epoll, buffer, timeout.as_ref()) {
            // A signal: the caller comes back.
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        for event in self.ready.drain(..) {
            // Copied out: the structure is packed.
            let (data, flags) = (event.data, event.flags);
            each(data.u64(), flags);
        }
        Ok(())
    }
}

/// The file of an eventfd, for interfaces that want it with its lifetime.
pub(crate) fn event_fd(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the eventfd owns the descriptor and is borrowed for as long as the result lives.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

/// Takes the count out of an eventfd that was seen readable.
pub(crate) fn clear(event: &EventFd) {
    // An empty one only says that someone else was faster.
    let _ = event.read();
}
