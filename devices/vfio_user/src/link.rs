//! Requests, replies and the commands of the other side over one socket.
//!
//! Both ends are the same: any thread may [`request`](Link::request), one thread takes the peer's
//! commands by [`next_command`](Link::next_command). There is no reader of its own: whoever waits
//! for something reads the socket, delivers what is not for it, and hands the reading on when it
//! has what it wanted. So a reply costs no change of thread where only one waits, a command
//! handler may itself make a request, and nobody ever waits for a thread that does not read.
//!
//! The first fault ends the connection for everybody and for good: after a timeout or a malformed
//! header nothing that follows could be trusted to belong to anything.

use std::collections::VecDeque;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, MutexGuard};
use rustix::io::Errno;
use zerocopy::IntoBytes;

use crate::transport::{Transport, TransportError};
use crate::wire::{
    Command, FLAG_ERROR, FLAG_NO_REPLY, HEADER_SIZE, Header, MAX_COMMAND_PAYLOAD, TYPE_COMMAND,
    TYPE_MASK, TYPE_REPLY,
};

/// Commands kept while their taker is busy with a request of its own.
const MAX_QUEUED: usize = 64;

/// Bytes of such commands.
const MAX_QUEUED_BYTES: usize = 16 << 20;

/// What ended a connection.
#[derive(Debug, thiserror::Error)]
pub enum LinkFault {
    /// The socket.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// The answer to a command did not come in time.
    #[error("no reply to {command:?} within {waited:?}")]
    NoReply {
        /// What was asked.
        command: Command,
        /// How long it was waited for.
        waited: Duration,
    },
    /// The peer broke the protocol.
    #[error("the peer broke the protocol: {0}")]
    Protocol(&'static str),
    /// This end closed it.
    #[error("the connection was closed at this end")]
    ClosedHere,
}

/// Why a request got no answer.
#[derive(Debug)]
pub(crate) enum RequestError {
    /// The connection ended.
    Gone(Arc<LinkFault>),
    /// The peer answered with an errno.
    Refused(Errno),
}

/// What is sent as a command or reply: a fixed part, bulk data, descriptors.
#[derive(Clone, Copy, Default)]
pub(crate) struct Outgoing<'a> {
    pub(crate) fixed: &'a [u8],
    pub(crate) data: &'a [u8],
    pub(crate) fds: &'a [BorrowedFd<'a>],
}

/// What a request may be answered with.
#[derive(Clone, Copy)]
pub(crate) struct Expect {
    /// Longest payload.
    pub(crate) payload: usize,
    /// Most descriptors.
    pub(crate) fds: usize,
    /// When the connection is given up.
    pub(crate) timeout: Duration,
}

/// A command of the peer.
#[derive(Debug)]
pub(crate) struct Incoming {
    pub(crate) id: u16,
    /// As on the wire: perhaps a command unknown here.
    pub(crate) command: u16,
    pub(crate) wants_reply: bool,
    pub(crate) payload: Vec<u8>,
    pub(crate) fds: Vec<OwnedFd>,
}

enum Slot {
    Waiting,
    Done(Result<usize, Errno>, Vec<OwnedFd>),
}

struct Waiter {
    id: u16,
    command: Command,
    expect: Expect,
    buffer: Vec<u8>,
    slot: Slot,
}

#[derive(Default)]
struct State {
    next_id: u16,
    waiters: Vec<Waiter>,
    commands: VecDeque<Incoming>,
    queued_bytes: usize,
    reading: bool,
    fault: Option<Arc<LinkFault>>,
}

impl State {
    fn waiter(&mut self, id: u16) -> Option<&mut Waiter> {
        self.waiters.iter_mut().find(|waiter| waiter.id == id)
    }

    fn fresh_id(&mut self) -> u16 {
        // Waiters are threads, so there are always free ids among 65536.
        loop {
            let id = self.next_id;
            self.next_id = self.next_id.wrapping_add(1);
            if self.waiters.iter().all(|waiter| waiter.id != id) {
                return id;
            }
        }
    }
}

/// A connection.
pub(crate) struct Link {
    transport: Transport,
    /// Held while a message is written, so that messages do not mix.
    sending: Mutex<()>,
    state: Mutex<State>,
    changed: Condvar,
    /// Deadline of a reply's write.
    reply_timeout: Duration,
}

impl Link {
    pub(crate) fn new(stream: UnixStream, timeout: Duration) -> Self {
        Self {
            transport: Transport::new(stream, timeout),
            sending: Mutex::new(()),
            state: Mutex::new(State::default()),
            changed: Condvar::new(),
            reply_timeout: timeout,
        }
    }

    /// Ends the connection; every waiter gets [`LinkFault::ClosedHere`].
    pub(crate) fn close(&self) {
        self.fail(LinkFault::ClosedHere);
    }

    /// What ended the connection, if it has ended.
    pub(crate) fn fault(&self) -> Option<Arc<LinkFault>> {
        self.state.lock().fault.clone()
    }

    fn fail(&self, fault: LinkFault) -> Arc<LinkFault> {
        let mut state = self.state.lock();
        let fault = Arc::clone(state.fault.get_or_insert_with(|| Arc::new(fault)));
        state.commands.clear();
        state.queued_bytes = 0;
        drop(state);
        self.transport.shutdown();
        self.changed.notify_all();
        fault
    }

    /// Sends a command and waits for its reply, whose payload is put into `buffer`; gives its
    /// length and the descriptors that came along.
    pub(crate) fn request(
        &self,
        command: Command,
        outgoing: Outgoing<'_>,
        expect: Expect,
        buffer: &mut Vec<u8>,
    ) -> Result<(usize, Vec<OwnedFd>), RequestError> {
        let deadline = Instant::now() + expect.timeout;
        let id = {
            let mut state = self.state.lock();
            if let Some(fault) = &state.fault {
                return Err(RequestError::Gone(Arc::clone(fault)));
            }
            let id = state.fresh_id();
            state.waiters.push(Waiter {
                id,
                command,
                expect,
                buffer: std::mem::take(buffer),
                slot: Slot::Waiting,
            });
            id
        };
        let header = Header {
            id,
            command: command.number(),
            size: message_size(outgoing),
            flags: TYPE_COMMAND,
            error: 0,
        };
        let sent = self.send(&header, outgoing, deadline);
        let outcome = match sent {
            Ok(()) => self.wait_for(id, deadline),
            Err(fault) => Err(fault),
        };
        self.collect(id, command, expect, outcome, buffer)
    }

    /// Takes the waiter out again and turns what happened into the caller's result.
    fn collect(
        &self,
        id: u16,
        command: Command,
        expect: Expect,
        outcome: Result<(), Arc<LinkFault>>,
        buffer: &mut Vec<u8>,
    ) -> Result<(usize, Vec<OwnedFd>), RequestError> {
        let mut state = self.state.lock();
        let at = state.waiters.iter().position(|waiter| waiter.id == id);
        let waiter = at.map(|at| state.waiters.swap_remove(at));
        drop(state);
        if let Some(waiter) = waiter {
            *buffer = waiter.buffer;
            if let Slot::Done(result, fds) = waiter.slot {
                return match result {
                    Ok(len) => Ok((len, fds)),
                    Err(errno) => Err(RequestError::Refused(errno)),
                };
            }
        }
        let fault = match outcome {
            Err(fault) => fault,
            Ok(()) => self.fail(LinkFault::NoReply {
                command,
                waited: expect.timeout,
            }),
        };
        Err(RequestError::Gone(fault))
    }

    /// Waits until the waiter `id` has its reply, the connection is gone, or the deadline passed
    /// (`Ok` with the slot still waiting).
    fn wait_for(&self, id: u16, deadline: Instant) -> Result<(), Arc<LinkFault>> {
        self.wait_until(Some(deadline), |state| {
            state
                .waiter(id)
                .is_none_or(|waiter| matches!(waiter.slot, Slot::Done(..)))
        })
        .map(drop)
    }

    /// Waits for the peer's next command, for as long as the connection lasts.
    pub(crate) fn next_command(&self) -> Result<Incoming, Arc<LinkFault>> {
        loop {
            let mut state = self.wait_until(None, |state| !state.commands.is_empty())?;
            if let Some(incoming) = state.commands.pop_front() {
                state.queued_bytes = state.queued_bytes.saturating_sub(incoming.payload.len());
                return Ok(incoming);
            }
        }
    }

    /// The heart: until `done`, read if nobody reads, else sleep until something was delivered.
    fn wait_until(
        &self,
        deadline: Option<Instant>,
        mut done: impl FnMut(&mut State) -> bool,
    ) -> Result<MutexGuard<'_, State>, Arc<LinkFault>> {
        let mut state = self.state.lock();
        loop {
            if done(&mut state) {
                return Ok(state);
            }
            if let Some(fault) = &state.fault {
                return Err(Arc::clone(fault));
            }
            if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                return Ok(state);
            }
            if state.reading {
                match deadline {
                    None => self.changed.wait(&mut state),
                    Some(deadline) => {
                        self.changed.wait_until(&mut state, deadline);
                    }
                }
                continue;
            }
            state.reading = true;
            drop(state);
            let read = self.read_message(deadline);
            if let Err(fault) = read {
                self.fail(fault);
            }
            state = self.state.lock();
            state.reading = false;
            // Whoever slept may have what it wants, or must read now.
            self.changed.notify_all();
        }
    }

    /// Reads one message and delivers it. No bytes until `deadline` is no fault: the waiter whose
    /// deadline it is decides.
    fn read_message(&self, deadline: Option<Instant>) -> Result<(), LinkFault> {
        let mut fds = Vec::new();
        let header = match self.transport.receive_header(&mut fds, deadline) {
            Ok(header) => header,
            Err(TransportError::TimedOut)
                if deadline.is_some_and(|deadline| Instant::now() >= deadline) =>
            {
                return Ok(());
            }
            Err(error) => return Err(error.into()),
        };
        let payload = usize::try_from(header.size)
            .ok()
            .and_then(|size| size.checked_sub(HEADER_SIZE))
            .ok_or(LinkFault::Protocol("a message shorter than its header"))?;
        match header.flags & TYPE_MASK {
            TYPE_COMMAND => self.read_command(&header, payload, fds),
            TYPE_REPLY => self.read_reply(&header, payload, fds),
            _ => Err(LinkFault::Protocol(
                "a message that is neither command nor reply",
            )),
        }
    }

    fn read_command(
        &self,
        header: &Header,
        payload: usize,
        mut fds: Vec<OwnedFd>,
    ) -> Result<(), LinkFault> {
        if payload > MAX_COMMAND_PAYLOAD {
            return Err(LinkFault::Protocol(
                "a command longer than the negotiated limit",
            ));
        }
        {
            let mut state = self.state.lock();
            if state.commands.len() >= MAX_QUEUED
                || state.queued_bytes.saturating_add(payload) > MAX_QUEUED_BYTES
            {
                return Err(LinkFault::Protocol(
                    "too many commands without waiting for replies",
                ));
            }
            state.queued_bytes += payload;
        }
        let mut bytes = vec![0; payload];
        self.transport.receive_exact(&mut bytes, &mut fds)?;
        self.state.lock().commands.push_back(Incoming {
            id: header.id,
            command: header.command,
            wants_reply: header.flags & FLAG_NO_REPLY == 0,
            payload: bytes,
            fds,
        });
        Ok(())
    }

    fn read_reply(
        &self,
        header: &Header,
        payload: usize,
        mut fds: Vec<OwnedFd>,
    ) -> Result<(), LinkFault> {
        let (mut buffer, expect) = {
            let mut state = self.state.lock();
            let waiter = state
                .waiter(header.id)
                .filter(|waiter| matches!(waiter.slot, Slot::Waiting))
                .ok_or(LinkFault::Protocol("a reply to nothing that was asked"))?;
            if waiter.command.number() != header.command {
                return Err(LinkFault::Protocol("a reply for another command"));
            }
            if payload > waiter.expect.payload {
                return Err(LinkFault::Protocol("a reply longer than was asked for"));
            }
            (std::mem::take(&mut waiter.buffer), waiter.expect)
        };
        if buffer.len() < payload {
            buffer.resize(payload, 0);
        }
        if let Some(bytes) = buffer.get_mut(..payload) {
            self.transport.receive_exact(bytes, &mut fds)?;
        }
        if fds.len() > expect.fds {
            return Err(LinkFault::Protocol(
                "a reply with more descriptors than was asked for",
            ));
        }
        let result = match header.flags & FLAG_ERROR {
            0 => Ok(payload),
            _ => Err(errno_from_wire(header.error)),
        };
        // The waiter may have given up meanwhile; then the reply is of no use to anybody.
        if let Some(waiter) = self.state.lock().waiter(header.id) {
            waiter.buffer = buffer;
            waiter.slot = Slot::Done(result, fds);
        }
        Ok(())
    }

    /// Answers a command; does nothing if it wants no answer.
    pub(crate) fn reply(
        &self,
        incoming: &Incoming,
        result: Result<Outgoing<'_>, Errno>,
    ) -> Result<(), Arc<LinkFault>> {
        if !incoming.wants_reply {
            return Ok(());
        }
        let (outgoing, flags, error) = match result {
            Ok(outgoing) => (outgoing, TYPE_REPLY, 0),
            Err(errno) => (
                Outgoing::default(),
                TYPE_REPLY | FLAG_ERROR,
                errno.raw_os_error().unsigned_abs(),
            ),
        };
        let header = Header {
            id: incoming.id,
            command: incoming.command,
            size: message_size(outgoing),
            flags,
            error,
        };
        self.send(&header, outgoing, Instant::now() + self.reply_timeout)
    }

    fn send(
        &self,
        header: &Header,
        outgoing: Outgoing<'_>,
        deadline: Instant,
    ) -> Result<(), Arc<LinkFault>> {
        let sent = match self.sending.try_lock_until(deadline) {
            Some(_turn) => self.transport.send(
                [header.as_bytes(), outgoing.fixed, outgoing.data],
                outgoing.fds,
                deadline,
            ),
            None => Err(TransportError::TimedOut),
        };
        sent.map_err(|error| self.fail(error.into()))
    }
}

/// Bytes of the whole message. What is sent is bounded by the limits in [`crate::wire`].
fn message_size(outgoing: Outgoing<'_>) -> u32 {
    let len = HEADER_SIZE + outgoing.fixed.len() + outgoing.data.len();
    u32::try_from(len).unwrap_or(u32::MAX)
}

/// An errno of the peer; EIO where it gives none or nonsense.
fn errno_from_wire(number: u32) -> Errno {
    match i32::try_from(number) {
        // Errno panics outside of the kernel's range.
        Ok(raw @ 1..=4095) => Errno::from_raw_os_error(raw),
        _ => Errno::IO,
    }
}
