//! Requests to a backend over its socket, each with a deadline.
//!
//! No call waits without end: every read and write is non-blocking, and between them the socket
//! is polled until the deadline that [`Connection::begin`] set for all requests of one operation.
//! A backend that sends a byte now and then gains nothing.
//!
//! After any failure but a refusal nobody can know what the backend believes, so the connection
//! is shut down and every later request fails at once.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, Shutdown, SocketAddrUnix, SocketFlags, SocketType,
};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use super::message::{
    Header, LOG_REPLY_MAX, LogArea, MAX_REGIONS, NEED_REPLY, REPLY, Request, VERSION, VERSION_MASK,
};

/// How a request to a backend failed.
#[derive(Debug, thiserror::Error)]
pub enum ExchangeError {
    /// The backend closed the connection, perhaps by dying.
    #[error("the backend closed the connection ({request})")]
    Closed {
        /// What was asked.
        request: Request,
    },
    /// The backend did not take the request or answer it in time.
    #[error("the backend did not answer {request} within {limit:?}")]
    TooSlow {
        /// What was asked.
        request: Request,
        /// How long it had, requests before this one included.
        limit: Duration,
    },
    /// The operating system's error.
    #[error("{operation} of {request} failed")]
    Socket {
        /// What was asked.
        request: Request,
        /// `sending`, `receiving` or `waiting for the answer`.
        operation: &'static str,
        /// What the system said.
        #[source]
        cause: io::Error,
    },
    /// The answer is none to what was asked.
    #[error("the backend's answer to {request} is wrong: {reason}")]
    BadReply {
        /// What was asked.
        request: Request,
        /// What is wrong with it.
        reason: String,
    },
    /// The backend says that it could not do it. The connection can still be used.
    #[error("the backend refuses {request} (code {code})")]
    Refused {
        /// What was asked.
        request: Request,
        /// Its code, whose meaning is its own.
        code: u64,
    },
    /// The connection failed before.
    #[error("the connection to the backend is lost: {reason}")]
    Lost {
        /// How.
        reason: String,
    },
}

/// Connects to whoever listens on `socket`, within `limit`: a plain `connect` waits for as long as
/// the listener's backlog is full.
pub(super) fn connect(socket: &Path, limit: Duration) -> io::Result<UnixStream> {
    let flags = SocketFlags::CLOEXEC;
    let stream = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    set_socket_timeout(&stream, Timeout::Send, Some(limit))?;
    rustix::net::connect(&stream, &SocketAddrUnix::new(socket)?)?;
    Ok(stream.into())
}

/// A connection to a backend.
#[derive(Debug)]
pub(super) struct Connection {
    stream: UnixStream,
    limit: Duration,
    deadline: Instant,
    acknowledged: bool,
    lost: Option<String>,
}

impl Connection {
    /// Takes over `stream`; operations may take `limit`.
    pub(super) fn new(stream: UnixStream, limit: Duration) -> Self {
        Self {
            stream,
            limit,
            deadline: Instant::now() + limit,
            acknowledged: false,
            lost: None,
        }
    }

    /// The socket, to be watched.
    pub(super) fn socket(&self) -> &UnixStream {
        &self.stream
    }

    /// Why the connection is lost, if it is.
    pub(super) fn lost(&self) -> Option<&str> {
        self.lost.as_deref()
    }

    /// Begins an operation: the requests from here on have the limit together.
    pub(super) fn begin(&mut self) {
        self.deadline = Instant::now() + self.limit;
    }

    /// `VHOST_USER_PROTOCOL_F_REPLY_ACK` was negotiated: from now on [`tell`](Self::tell) hears
    /// whether the backend did it.
    pub(super) fn acknowledge(&mut self) {
        self.acknowledged = true;
    }

    /// Ends the connection for `reason`, which later requests fail with.
    pub(super) fn lose(&mut self, reason: String) {
        self.lost.get_or_insert(reason);
        // An error means that it is not connected any more, which is what is wanted.
        let _ = rustix::net::shutdown(&self.stream, Shutdown::Both);
    }

    /// A request without an answer of its own.
    pub(super) fn tell(
        &mut self,
        request: Request,
        body: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), ExchangeError> {
        if !self.acknowledged {
            return self.keep(|this| this.send(request, VERSION, body, fds));
        }
        let code = self.keep(|this| {
            this.send(request, VERSION | NEED_REPLY, body, fds)?;
            this.reply::<u64>(request)
        })?;
        match code {
            0 => Ok(()),
            code => Err(ExchangeError::Refused { request, code }),
        }
    }

    /// A request that is answered by an `R`.
    pub(super) fn ask<R>(&mut self, request: Request, body: &[u8]) -> Result<R, ExchangeError>
    where
        R: FromBytes + IntoBytes,
    {
        self.keep(|this| {
            this.send(request, VERSION, body, &[])?;
            this.reply(request)
        })
    }

    /// A request that is answered by an `R`, or by nothing if the backend cannot do it.
    pub(super) fn try_ask<R>(
        &mut self,
        request: Request,
        body: &[u8],
    ) -> Result<Option<R>, ExchangeError>
    where
        R: FromBytes + IntoBytes,
    {
        self.keep(|this| {
            this.send(request, VERSION, body, &[])?;
            let header = this.header(request)?;
            if header.size == 0 {
                return Ok(None);
            }
            this.body(request, header).map(Some)
        })
    }

    /// `SET_LOG_BASE`, whose answer may hold anything or nothing.
    pub(super) fn set_log(
        &mut self,
        area: LogArea,
        file: BorrowedFd<'_>,
    ) -> Result<(), ExchangeError> {
        let request = Request::SetLogBase;
        self.keep(|this| {
            this.send(request, VERSION, area.as_bytes(), &[file])?;
            let header = this.header(request)?;
            let mut answer = [0; LOG_REPLY_MAX];
            let body = usize::try_from(header.size)
                .ok()
                .and_then(|size| answer.get_mut(..size))
                .ok_or_else(|| bad(request, format!("{} bytes", header.size)))?;
            this.receive(request, body)
        })
    }

    /// Waits until the backend has dealt with everything it was told, for requests that are not
    /// acknowledged: it takes them in order, so an answer to a last one will do.
    pub(super) fn settle(&mut self) -> Result<(), ExchangeError> {
        if self.acknowledged {
            return Ok(());
        }
        self.ask::<u64>(Request::GetFeatures, &[]).map(drop)
    }

    /// Does `exchange` unless the connection is lost; a failure loses it.
    fn keep<T>(
        &mut self,
        exchange: impl FnOnce(&mut Self) -> Result<T, ExchangeError>,
    ) -> Result<T, ExchangeError> {
        if let Some(reason) = &self.lost {
            return Err(ExchangeError::Lost {
                reason: reason.clone(),
            });
        }
        exchange(self).inspect_err(|error| self.lose(error.to_string()))
    }

    fn send(
        &self,
        request: Request,
        flags: u32,
        body: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), ExchangeError> {
        let header = Header {
            request: request.code(),
            flags,
            // Bodies are structures of this crate, all far below the limit.
            size: u32::try_from(body.len()).unwrap_or(u32::MAX),
        };
        let (mut head, mut body, mut fds) = (header.as_bytes(), body, fds);
        while !head.is_empty() || !body.is_empty() {
            match self.send_some([head, body], fds) {
                Ok(sent) => {
                    // The kernel attaches descriptors to the first byte that it takes.
                    fds = &[];
                    let of_head = sent.min(head.len());
                    head = head.get(of_head..).unwrap_or_default();
                    body = body.get(sent - of_head..).unwrap_or_default();
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => self.wait(request, PollFlags::OUT)?,
                Err(errno) => return Err(failed(request, "sending", errno)),
            }
        }
        Ok(())
    }

    fn send_some(&self, parts: [&[u8]; 2], fds: &[BorrowedFd<'_>]) -> Result<usize, Errno> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_REGIONS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(Errno::TOOBIG);
        }
        rustix::net::sendmsg(
            &self.stream,
            &parts.map(IoSlice::new),
            &mut control,
            SendFlags::NOSIGNAL | SendFlags::DONTWAIT,
        )
    }

    /// The answer to `request`, of just the size of an `R`.
    fn reply<R: FromBytes + IntoBytes>(&self, request: Request) -> Result<R, ExchangeError> {
        let header = self.header(request)?;
        self.body(request, header)
    }

    /// What follows `header`.
    fn body<R: FromBytes + IntoBytes>(
        &self,
        request: Request,
        header: Header,
    ) -> Result<R, ExchangeError> {
        if usize::try_from(header.size) != Ok(size_of::<R>()) {
            let reason = format!("{} bytes instead of {}", header.size, size_of::<R>());
            return Err(bad(request, reason));
        }
        let mut body = R::new_zeroed();
        self.receive(request, body.as_mut_bytes())?;
        Ok(body)
    }

    /// The header of the answer to `request`.
    fn header(&self, request: Request) -> Result<Header, ExchangeError> {
        let mut header = Header::new_zeroed();
        self.receive(request, header.as_mut_bytes())?;
        if header.request != request.code() {
            return Err(bad(request, format!("it is one to {}", header.request)));
        }
        if header.flags & (VERSION_MASK | REPLY) != VERSION | REPLY {
            return Err(bad(request, format!("its flags are {:#x}", header.flags)));
        }
        Ok(header)
    }

    /// Fills `buffer`. Descriptors are not taken: the kernel drops them.
    fn receive(&self, request: Request, buffer: &mut [u8]) -> Result<(), ExchangeError> {
        let mut rest = buffer;
        while !rest.is_empty() {
            let received = rustix::net::recvmsg(
                &self.stream,
                &mut [IoSliceMut::new(rest)],
                &mut RecvAncillaryBuffer::default(),
                RecvFlags::DONTWAIT,
            );
            match received {
                Ok(message) if message.bytes == 0 => {
                    return Err(ExchangeError::Closed { request });
                }
                Ok(message) => rest = rest.get_mut(message.bytes..).unwrap_or_default(),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => self.wait(request, PollFlags::IN)?,
                Err(errno) => return Err(failed(request, "receiving", errno)),
            }
        }
        Ok(())
    }

    /// Waits until the socket is ready, fails or has been closed; the call after it tells which.
    fn wait(&self, request: Request, events: PollFlags) -> Result<(), ExchangeError> {
        loop {
            let left = self.deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let limit = self.limit;
                return Err(ExchangeError::TooSlow { request, limit });
            }
            let timeout = Timespec {
                tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: left.subsec_nanos().into(),
            };
            let mut fds = [PollFd::from_borrowed_fd(self.stream.as_fd(), events)];
            match rustix::event::poll(&mut fds, Some(&timeout)) {
                Ok(0) | Err(Errno::INTR) => {}
                Ok(_) => return Ok(()),
                Err(errno) => return Err(failed(request, "waiting for the answer", errno)),
            }
        }
    }
}

/// Whether the backend hung up or the system failed.
fn failed(request: Request, operation: &'static str, errno: Errno) -> ExchangeError {
    match errno {
        Errno::PIPE | Errno::CONNRESET | Errno::NOTCONN => ExchangeError::Closed { request },
        errno => ExchangeError::Socket {
            request,
            operation,
            cause: errno.into(),
        },
    }
}

fn bad(request: Request, reason: String) -> ExchangeError {
    ExchangeError::BadReply { request, reason }
}
