//! The thread beside a backend's connection: it notices when the backend hangs up, and passes on
//! what the backend signals through Ferry (errors, and interrupts of queues that have no vector).

use std::io;
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use super::session::Session;
use crate::poll::{EventFlags, Poll, event_fd};
use crate::worker::Work;

const STOP: u64 = 0;
const SOCKET: u64 = 1;
const ERRORS: u64 = 2;
/// Token of queue 0; the others follow.
const QUEUES: u64 = 3;

/// What the thread works on.
pub(super) struct Watch {
    session: Arc<Session>,
}

impl Watch {
    pub(super) fn new(session: Arc<Session>) -> Self {
        Self { session }
    }

    fn watch(&self, stop: &EventFd) -> io::Result<()> {
        let session = &self.session;
        let mut poll = Poll::new()?;
        poll.add_event(stop, STOP)?;
        let socket = session.watched()?;
        poll.add(socket, SOCKET, EventFlags::RDHUP | EventFlags::ET)?;
        // Edge-triggered, and never read: each signal is an edge whatever the count is, and a read
        // could be made to wait by the backend, which has the same open file.
        let signal = EventFlags::IN | EventFlags::ET;
        poll.add(event_fd(&session.errors), ERRORS, signal)?;
        for (token, relay) in (QUEUES..).zip(&session.relays) {
            poll.add(event_fd(relay), token, signal)?;
        }
        let mut stopped = false;
        while !stopped {
            poll.wait(false, |token, _| match token {
                STOP => stopped = true,
                SOCKET => session.hung_up(),
                ERRORS => session.queue_failed(),
                token => {
                    if let Ok(index) = u16::try_from(token.saturating_sub(QUEUES)) {
                        session.relay(index);
                    }
                }
            })?;
        }
        Ok(())
    }
}

impl Work for Watch {
    fn run(&mut self, stop: &EventFd) {
        if let Err(error) = self.watch(stop) {
            // Unwatched, it could die without anybody noticing.
            self.session
                .give_up(&format!("its connection cannot be watched: {error}"));
        }
    }
}
