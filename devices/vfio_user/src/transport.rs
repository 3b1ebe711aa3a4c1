//! Whole messages over a unix stream socket, with file descriptors and deadlines.
//!
//! The socket is never waited on without end except for the first byte of a next message: once a
//! message has begun, all of it must come within the deadline or the stall time, and a write that
//! the peer does not take within its deadline fails. Short reads and writes are completed.
//! Descriptors that came along belong to [`OwnedFd`]s from the first moment, so every way out
//! closes them.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, Shutdown,
};
use zerocopy::{FromZeros, IntoBytes};

use crate::wire::{HEADER_SIZE, Header, MAX_MSG_FDS};

/// Why the socket cannot be used any more.
#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    /// The peer closed the connection, perhaps by dying.
    #[error("the peer closed the connection")]
    Closed,
    /// The peer did not take or give bytes in time.
    #[error("the peer did not answer in time")]
    TimedOut,
    /// The operating system's error.
    #[error("socket {operation} failed")]
    Io {
        /// `send`, `receive` or `wait`.
        operation: &'static str,
        /// What it said.
        #[source]
        source: Errno,
    },
    /// A message came with more descriptors than this end ever takes.
    #[error("the peer sent more than {MAX_MSG_FDS} file descriptors in one message")]
    TooManyFds,
}

/// One end of a connection.
#[derive(Debug)]
pub(crate) struct Transport {
    stream: UnixStream,
    /// Longest pause within a message that is being received.
    stall: Duration,
}

impl Transport {
    /// Takes over `stream`; a message that has begun must be complete within `stall`.
    pub(crate) fn new(stream: UnixStream, stall: Duration) -> Self {
        Self { stream, stall }
    }

    /// Ends the connection in both directions: every call on either end returns now.
    pub(crate) fn shutdown(&self) {
        // An error means that it is not connected any more, which is what is wanted.
        let _ = rustix::net::shutdown(&self.stream, Shutdown::Both);
    }

    /// Sends `parts` as one message with `fds`.
    pub(crate) fn send(
        &self,
        parts: [&[u8]; 3],
        fds: &[BorrowedFd<'_>],
        deadline: Instant,
    ) -> Result<(), TransportError> {
        let mut parts = parts;
        let mut fds = fds;
        while parts.iter().any(|part| !part.is_empty()) {
            let sent = match self.send_some(parts, fds) {
                Ok(sent) => sent,
                Err(Errno::INTR) => continue,
                Err(Errno::AGAIN) => {
                    self.wait(PollFlags::OUT, Some(deadline))?;
                    continue;
                }
                Err(Errno::PIPE | Errno::CONNRESET | Errno::NOTCONN) => {
                    return Err(TransportError::Closed);
                }
                Err(source) => {
                    return Err(TransportError::Io {
                        operation: "send",
                        source,
                    });
                }
            };
            // The kernel attaches descriptors to the first byte that it takes.
            fds = &[];
            advance(&mut parts, sent);
        }
        Ok(())
    }

    fn send_some(&self, parts: [&[u8]; 3], fds: &[BorrowedFd<'_>]) -> Result<usize, Errno> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_MSG_FDS))];
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

    /// Receives the next header and the descriptors that came with it. `deadline` is for its
    /// first byte; `None` waits for as long as the connection lasts.
    pub(crate) fn receive_header(
        &self,
        fds: &mut Vec<OwnedFd>,
        deadline: Option<Instant>,
    ) -> Result<Header, TransportError> {
        let mut header = Header::new_zeroed();
        let bytes = header.as_mut_bytes();
        let got = self.receive_some(bytes, fds, deadline)?;
        if let Some(rest) = bytes.get_mut(got..HEADER_SIZE) {
            self.receive_exact(rest, fds)?;
        }
        Ok(header)
    }

    /// Fills `buffer` with bytes of the message that has begun.
    pub(crate) fn receive_exact(
        &self,
        buffer: &mut [u8],
        fds: &mut Vec<OwnedFd>,
    ) -> Result<(), TransportError> {
        let deadline = Instant::now() + self.stall;
        let mut rest = buffer;
        while !rest.is_empty() {
            let got = self.receive_some(rest, fds, Some(deadline))?;
            rest = rest.get_mut(got..).unwrap_or_default();
        }
        Ok(())
    }

    /// Receives at least one byte.
    fn receive_some(
        &self,
        buffer: &mut [u8],
        fds: &mut Vec<OwnedFd>,
        deadline: Option<Instant>,
    ) -> Result<usize, TransportError> {
        loop {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_MSG_FDS))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let received = rustix::net::recvmsg(
                &self.stream,
                &mut [IoSliceMut::new(buffer)],
                &mut control,
                RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC,
            );
            match received {
                Ok(message) => {
                    for item in control.drain() {
                        if let RecvAncillaryMessage::ScmRights(received) = item {
                            fds.extend(received);
                        }
                    }
                    if message.flags.contains(ReturnFlags::CTRUNC) || fds.len() > MAX_MSG_FDS {
                        return Err(TransportError::TooManyFds);
                    }
                    if message.bytes == 0 {
                        return Err(TransportError::Closed);
                    }
                    return Ok(message.bytes);
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => self.wait(PollFlags::IN, deadline)?,
                Err(Errno::CONNRESET | Errno::NOTCONN) => return Err(TransportError::Closed),
                Err(source) => {
                    return Err(TransportError::Io {
                        operation: "receive",
                        source,
                    });
                }
            }
        }
    }

    /// Waits until the socket is ready, fails or has been closed; the call after it tells which.
    fn wait(&self, events: PollFlags, deadline: Option<Instant>) -> Result<(), TransportError> {
        loop {
            let timeout = match deadline {
                None => None,
                Some(deadline) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return Err(TransportError::TimedOut);
                    }
                    Timespec::try_from(left).ok()
                }
            };
            let mut set = [PollFd::from_borrowed_fd(self.stream.as_fd(), events)];
            match rustix::event::poll(&mut set, timeout.as_ref()) {
                Ok(0) | Err(Errno::INTR) => {}
                Ok(_) => return Ok(()),
                Err(source) => {
                    return Err(TransportError::Io {
                        operation: "wait",
                        source,
                    });
                }
            }
        }
    }
}

/// Drops the first `sent` bytes of `parts`.
fn advance(parts: &mut [&[u8]; 3], sent: usize) {
    let mut left = sent;
    for part in parts {
        let taken = left.min(part.len());
        *part = part.get(taken..).unwrap_or_default();
        left -= taken;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair() -> (Transport, Transport) {
        let (a, b) = UnixStream::pair().unwrap();
        let stall = Duration::from_millis(200);
        (Transport::new(a, stall), Transport::new(b, stall))
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(5)
    }

    const HEADER: Header = Header {
        id: 7,
        command: 9,
        size: 16,
        flags: 0,
        error: 0,
    };

    #[test]
    fn a_message_larger_than_the_socket_buffer_arrives_whole() {
        let (a, b) = pair();
        let data: Vec<u8> = (0..3_000_000_u32).map(|i| i.to_le_bytes()[1]).collect();
        let file = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap();
        let expected = data.clone();
        let sender = std::thread::spawn(move || {
            a.send([HEADER.as_bytes(), &data, b"tail"], &[file.as_fd()], soon())
                .unwrap();
        });
        let mut fds = Vec::new();
        assert_eq!(b.receive_header(&mut fds, Some(soon())).unwrap(), HEADER);
        let mut body = vec![0; expected.len() + 4];
        b.receive_exact(&mut body, &mut fds).unwrap();
        sender.join().unwrap();
        assert_eq!(&body[..expected.len()], &expected[..]);
        assert_eq!(&body[expected.len()..], b"tail");
        assert_eq!(fds.len(), 1);
    }

    #[test]
    fn a_stalled_message_times_out() {
        let (a, b) = pair();
        a.send([&HEADER.as_bytes()[..5], &[], &[]], &[], soon())
            .unwrap();
        let error = b.receive_header(&mut Vec::new(), None).unwrap_err();
        assert!(matches!(error, TransportError::TimedOut));
    }

    #[test]
    fn a_peer_that_does_not_read_times_the_sender_out() {
        let (a, _b) = pair();
        let data = vec![0; 8 << 20];
        let start = Instant::now();
        let error = a
            .send([&data, &[], &[]], &[], start + Duration::from_millis(200))
            .unwrap_err();
        assert!(matches!(error, TransportError::TimedOut));
        assert!(start.elapsed() < Duration::from_secs(3));
    }

    #[test]
    fn a_closed_peer_is_told_from_a_slow_one() {
        let (a, b) = pair();
        drop(a);
        let error = b.receive_header(&mut Vec::new(), None).unwrap_err();
        assert!(matches!(error, TransportError::Closed));
        let error = b
            .send([HEADER.as_bytes(), &[], &[]], &[], soon())
            .unwrap_err();
        assert!(matches!(error, TransportError::Closed));
    }

    #[test]
    fn descriptors_over_the_limit_end_the_connection() {
        let (a, b) = pair();
        let file = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap();
        let many = vec![file.as_fd(); MAX_MSG_FDS];
        // Twice the limit, in two halves of one header.
        a.send([&HEADER.as_bytes()[..8], &[], &[]], &many, soon())
            .unwrap();
        a.send([&HEADER.as_bytes()[8..], &[], &[]], &many, soon())
            .unwrap();
        let error = b.receive_header(&mut Vec::new(), None).unwrap_err();
        assert!(matches!(error, TransportError::TooManyFds));
    }
}
