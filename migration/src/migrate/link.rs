//! A link: frames over a connection, numbered, checked, and never silent.
//!
//! Each side runs a heartbeat that sends [`Kind::Progress`] when nothing else was sent for a
//! while, so that silence always means trouble: a peer that is merely busy is told from one that
//! is gone. How much silence is too much depends on what it costs: see [`Limits::standstill`]. What
//! may take only so long is bounded besides by [`Limits::answer`].

mod heartbeat;

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::frame::{Envelope, FrameBuffer, FrameError, HEADER_BYTES, Kind};
use super::limits::Limits;
use super::protocol::{Abort, decode, encode};
use super::transport::{Connection, Patience, Stop};
use heartbeat::Heartbeat;

/// Why the conversation ended.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The peer sent what is no valid frame, or a frame could not be made.
    #[error("{peer}, {phase}")]
    Frame {
        /// Who.
        peer: String,
        /// What was going on.
        phase: &'static str,
        /// What is wrong with the frame.
        #[source]
        cause: FrameError,
    },
    /// The peer sent a frame that has no place here.
    #[error("{peer}, {phase}: unexpected {kind:?} frame")]
    UnexpectedKind {
        /// Who.
        peer: String,
        /// What was going on.
        phase: &'static str,
        /// The frame's kind.
        kind: Kind,
    },
    /// The connection ended.
    #[error("{peer}, {phase}: the peer closed the connection")]
    PeerClosed {
        /// Who.
        peer: String,
        /// What was going on.
        phase: &'static str,
    },
    /// The peer did not do its part in time.
    #[error("{peer}, {phase}: no {awaited} within {} ms; is the peer or the network dead?",
            after.as_millis())]
    TimedOut {
        /// Who.
        peer: String,
        /// What was going on.
        phase: &'static str,
        /// What was waited for.
        awaited: &'static str,
        /// How long.
        after: Duration,
    },
    /// The peer called the migration off.
    #[error("{peer}, {phase}: the peer aborted the migration: {reason}")]
    PeerAborted {
        /// Who.
        peer: String,
        /// What was going on.
        phase: &'static str,
        /// What the peer said.
        reason: String,
    },
    /// The migration was cancelled on this side.
    #[error("the migration was cancelled on this host")]
    Cancelled,
    /// The system refused to read or write.
    #[error("{peer}, {phase}: the connection failed")]
    Io {
        /// Who.
        peer: String,
        /// What was going on.
        phase: &'static str,
        /// What the system said.
        #[source]
        cause: std::io::Error,
    },
}

/// Time to finish the frame being sent when the migration is cancelled.
const CANCEL_GRACE: Duration = Duration::from_millis(200);

/// Time for each part of a farewell: to say it, and for it to be heard.
const FAREWELL: Duration = Duration::from_secs(1);

/// Patience for what must be over soon and is no longer to be cancelled.
fn hurried(time: Duration) -> Patience {
    Patience {
        idle: None,
        until: Instant::now().checked_add(time),
        heed_cancel: false,
    }
}

/// The sending half, shared with the heartbeat.
#[derive(Debug)]
struct Writer {
    connection: Arc<Connection>,
    sequence: u64,
    /// A frame was sent in part: nothing sensible can follow.
    torn: bool,
    last: Instant,
}

impl Writer {
    /// The frame as it goes on the wire next.
    fn seal<'f>(&self, kind: Kind, frame: &'f mut FrameBuffer) -> Result<&'f [u8], FrameError> {
        frame.seal(kind, self.sequence)
    }

    /// The frame is on the wire.
    fn sent(&mut self) {
        self.sequence = self.sequence.wrapping_add(1);
        self.last = Instant::now();
    }

    /// Sends one small frame, in one go or not at all.
    fn send_small(&mut self, kind: Kind, frame: &mut FrameBuffer, patience: &Patience) -> bool {
        let sent = !self.torn
            && self.seal(kind, frame).is_ok_and(|bytes| {
                match self.connection.write_all(bytes, patience) {
                    Ok(()) => true,
                    Err((done, _)) => {
                        self.torn = done > 0;
                        false
                    }
                }
            });
        if sent {
            self.sent();
        }
        sent
    }
}

/// How long to wait for a frame.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Wait {
    /// As long as the peer shows signs of life.
    Alive,
    /// For an answer: [`Limits::answer`] in all.
    Answer,
}

/// A conversation with the peer.
#[derive(Debug)]
pub(super) struct Link {
    connection: Arc<Connection>,
    writer: Arc<Mutex<Writer>>,
    heartbeat: Heartbeat,
    limits: Limits,
    /// Longest silence of the peer, now.
    silence: Duration,
    expected: u64,
    phase: &'static str,
    /// For small frames.
    scratch: FrameBuffer,
}

impl Link {
    /// Starts a conversation, and its heartbeat. The heartbeat's thread inherits the caller's
    /// system-call filter.
    pub(super) fn new(connection: Connection) -> std::io::Result<Self> {
        let limits = connection.limits();
        let connection = Arc::new(connection);
        let writer = Arc::new(Mutex::new(Writer {
            connection: connection.clone(),
            sequence: 0,
            torn: false,
            last: Instant::now(),
        }));
        let heartbeat = Heartbeat::start(writer.clone(), limits)?;
        Ok(Self {
            connection,
            writer,
            heartbeat,
            limits,
            silence: limits.idle,
            expected: 0,
            phase: "start",
            scratch: FrameBuffer::with_capacity(Kind::Progress.limit()),
        })
    }

    /// Names what is going on, for errors.
    pub(super) fn set_phase(&mut self, phase: &'static str) {
        self.phase = phase;
    }

    /// Whether a guest of ours stands still meanwhile, so that silence is borne for
    /// [`Limits::standstill`] only.
    pub(super) fn set_urgent(&mut self, urgent: bool) {
        self.silence = match urgent {
            true => self.limits.standstill.min(self.limits.idle),
            false => self.limits.idle,
        };
    }

    /// Whom we talk to.
    pub(super) fn peer(&self) -> &str {
        self.connection.peer()
    }

    /// Closes the door to cancelling; an error if the migration was cancelled before.
    pub(super) fn commit(&self) -> Result<(), LinkError> {
        if self.connection.cancel_handle().commit() {
            Ok(())
        } else {
            Err(LinkError::Cancelled)
        }
    }

    /// An error if the migration was cancelled on this side.
    pub(super) fn check_cancel(&self) -> Result<(), LinkError> {
        match self.connection.cancel_handle().is_cancelled() {
            true => Err(LinkError::Cancelled),
            false => Ok(()),
        }
    }

    /// Sends a frame; gives its length. An error means that the peer never gets the whole of it,
    /// unless it is [`LinkError::Cancelled`].
    ///
    /// The writer's lock is held while the peer is slow to read; only the heartbeat shares it, and
    /// does not wait for it.
    pub(super) fn send(&mut self, kind: Kind, frame: &mut FrameBuffer) -> Result<usize, LinkError> {
        let writer = self.writer.clone();
        let mut writer = writer.lock();
        if writer.torn {
            return Err(self.broken(Stop::Closed));
        }
        let bytes = match writer.seal(kind, frame) {
            Ok(bytes) => bytes,
            Err(cause) => return Err(self.bad_frame(cause)),
        };
        let mut done = 0;
        match self.write(bytes, &mut done) {
            Ok(()) => {
                writer.sent();
                Ok(bytes.len())
            }
            Err(LinkError::Cancelled) if done > 0 => {
                // A peer that still reads gets the rest of the frame, so that it can be told why
                // nothing follows.
                let rest = bytes.get(done..).unwrap_or_default();
                match self.connection.write_all(rest, &hurried(CANCEL_GRACE)) {
                    Ok(()) => writer.sent(),
                    Err(_) => writer.torn = true,
                }
                Err(LinkError::Cancelled)
            }
            Err(error) => {
                writer.torn = done > 0;
                Err(error)
            }
        }
    }

    /// Writes bytes, of which `done` were taken. A peer that takes none for a while is listened
    /// to: it may have aborted, it may be busy (loading a device's state, say) and say so, or it
    /// is gone.
    fn write(&mut self, bytes: &[u8], done: &mut usize) -> Result<(), LinkError> {
        let patience = Patience {
            idle: Some(self.limits.beat),
            until: None,
            heed_cancel: true,
        };
        let mut moved = Instant::now();
        let mut heard = moved;
        loop {
            let rest = bytes.get(*done..).unwrap_or_default();
            let (more, stop) = match self.connection.write_all(rest, &patience) {
                Ok(()) => return Ok(()),
                Err(stopped) => stopped,
            };
            *done = done.saturating_add(more);
            if !matches!(stop, Stop::TimedOut) {
                return Err(self.broken(stop));
            }
            let now = Instant::now();
            if more > 0 {
                moved = now;
                heard = now;
            }
            if self.listen()? {
                heard = now;
            }
            if heard.elapsed() >= self.silence || moved.elapsed() >= self.limits.answer {
                return Err(self.stopped(stop, "room in the connection", heard.elapsed()));
            }
        }
    }

    /// The error for a failed write. A peer that gave up says why before it closes.
    fn broken(&mut self, stop: Stop) -> LinkError {
        match stop {
            Stop::Closed | Stop::Io(_) => match self.last_words() {
                Some(reason) => self.aborted(reason),
                None => self.stopped(stop, "room in the connection", self.silence),
            },
            Stop::TimedOut | Stop::Cancelled => {
                self.stopped(stop, "room in the connection", self.silence)
            }
        }
    }

    /// Sends a small message.
    pub(super) fn send_message<T: Serialize>(
        &mut self,
        kind: Kind,
        message: &T,
    ) -> Result<(), LinkError> {
        let mut frame = std::mem::take(&mut self.scratch);
        let sent = match encode(kind, message, &mut frame) {
            Ok(()) => self.send(kind, &mut frame).map(drop),
            Err(cause) => Err(self.bad_frame(cause)),
        };
        self.scratch = frame;
        sent
    }

    /// Receives the next frame that says something into `payload`.
    pub(super) fn receive(
        &mut self,
        payload: &mut Vec<u8>,
        wait: Wait,
        awaited: &'static str,
    ) -> Result<Kind, LinkError> {
        let patience = self.patience(wait);
        loop {
            match self.receive_any(payload, &patience, awaited)? {
                Kind::Progress => {
                    if patience.until.is_some_and(|until| Instant::now() >= until) {
                        return Err(self.stopped(Stop::TimedOut, awaited, self.limits.answer));
                    }
                }
                kind => return Ok(kind),
            }
        }
    }

    /// Receives one message of this kind, and nothing else.
    pub(super) fn receive_message<T: DeserializeOwned>(
        &mut self,
        kind: Kind,
        wait: Wait,
        awaited: &'static str,
    ) -> Result<T, LinkError> {
        let mut payload = Vec::new();
        let found = self.receive(&mut payload, wait, awaited)?;
        if found != kind {
            return Err(self.unexpected(found));
        }
        self.decode(kind, &payload)
    }

    /// Decodes a payload.
    pub(super) fn decode<T: DeserializeOwned>(
        &self,
        kind: Kind,
        payload: &[u8],
    ) -> Result<T, LinkError> {
        decode(kind, payload).map_err(|cause| self.bad_frame(cause))
    }

    /// Sleeps for `duration` while hearing whether the peer aborts or somebody cancels. A zero
    /// duration only looks.
    pub(super) fn listen_for(&mut self, duration: Duration) -> Result<(), LinkError> {
        let end = Instant::now().checked_add(duration);
        loop {
            let left = end.map_or(Duration::ZERO, |end| {
                end.saturating_duration_since(Instant::now())
            });
            match self.connection.readable_within(left) {
                Ok(false) => return Ok(()),
                Ok(true) => self.hear_sign()?,
                Err(stop) => return Err(self.stopped(stop, "frame", duration)),
            }
        }
    }

    /// Whether the peer gave a sign of life since it was last listened to.
    fn listen(&mut self) -> Result<bool, LinkError> {
        let mut heard = false;
        loop {
            match self.connection.readable_within(Duration::ZERO) {
                Ok(false) => return Ok(heard),
                Ok(true) => self.hear_sign()?,
                Err(stop) => return Err(self.stopped(stop, "frame", Duration::ZERO)),
            }
            heard = true;
        }
    }

    /// Receives a frame that can only be a sign of life.
    fn hear_sign(&mut self) -> Result<(), LinkError> {
        let patience = self.patience(Wait::Alive);
        let mut payload = Vec::new();
        match self.receive_any(&mut payload, &patience, "frame")? {
            Kind::Progress => Ok(()),
            kind => Err(self.unexpected(kind)),
        }
    }

    /// Tells the peer why the migration is off, and ends the conversation. Takes two seconds at
    /// most.
    pub(super) fn farewell(&mut self, reason: &str) {
        const LONGEST_REASON: usize = 4096;
        self.heartbeat.stop();
        let end = reason.floor_char_boundary(LONGEST_REASON);
        let message = Abort {
            reason: reason.get(..end).unwrap_or_default().to_owned(),
        };
        let mut frame = FrameBuffer::default();
        let said = encode(Kind::Abort, &message, &mut frame).is_ok()
            && self
                .writer
                .lock()
                .send_small(Kind::Abort, &mut frame, &hurried(FAREWELL));
        if said {
            self.connection.drain(Instant::now() + FAREWELL);
        }
        self.connection.cut();
    }

    /// Ends the conversation after our last word, making sure that it arrives.
    pub(super) fn close(&mut self) {
        self.heartbeat.stop();
        self.connection
            .drain(Instant::now() + Duration::from_secs(1));
        self.connection.cut();
    }

    /// The error for a frame that has no place here.
    pub(super) fn unexpected(&self, kind: Kind) -> LinkError {
        LinkError::UnexpectedKind {
            peer: self.peer().to_owned(),
            phase: self.phase,
            kind,
        }
    }

    /// The error for a frame that is wrong in itself.
    pub(super) fn bad_frame(&self, cause: FrameError) -> LinkError {
        LinkError::Frame {
            peer: self.peer().to_owned(),
            phase: self.phase,
            cause,
        }
    }

    fn patience(&self, wait: Wait) -> Patience {
        Patience {
            idle: Some(self.silence),
            until: match wait {
                Wait::Alive => None,
                Wait::Answer => Instant::now().checked_add(self.limits.answer),
            },
            heed_cancel: true,
        }
    }

    /// Receives one frame, of whatever kind but `Abort`, which is an error.
    fn receive_any(
        &mut self,
        payload: &mut Vec<u8>,
        patience: &Patience,
        awaited: &'static str,
    ) -> Result<Kind, LinkError> {
        let kind = match self.read_frame(payload, patience) {
            Ok(kind) => kind,
            Err(ReadError::Frame(cause)) => return Err(self.bad_frame(cause)),
            Err(ReadError::Stop(stop)) => {
                return Err(self.stopped(stop, awaited, self.silence));
            }
        };
        if kind == Kind::Abort {
            let message: Abort = self.decode(kind, payload)?;
            return Err(self.aborted(message.reason));
        }
        Ok(kind)
    }

    fn read_frame(
        &mut self,
        payload: &mut Vec<u8>,
        patience: &Patience,
    ) -> Result<Kind, ReadError> {
        let mut header = [0u8; HEADER_BYTES];
        self.connection.read_exact(&mut header, patience)?;
        let envelope = Envelope::parse(&header)?;
        payload.resize(envelope.length, 0);
        self.connection.read_exact(payload, patience)?;
        envelope.verify(payload)?;
        if envelope.sequence != self.expected {
            return Err(ReadError::Frame(FrameError::OutOfOrder {
                kind: envelope.kind,
                expected: self.expected,
                found: envelope.sequence,
            }));
        }
        self.expected = self.expected.wrapping_add(1);
        Ok(envelope.kind)
    }

    /// After a failed write: the reason the peer gave, if it gave one.
    fn last_words(&mut self) -> Option<String> {
        let patience = Patience {
            idle: Some(Duration::from_millis(20)),
            until: Instant::now().checked_add(Duration::from_millis(200)),
            heed_cancel: false,
        };
        let mut payload = Vec::new();
        loop {
            match self.read_frame(&mut payload, &patience) {
                Ok(Kind::Abort) => {
                    return decode::<Abort>(Kind::Abort, &payload)
                        .ok()
                        .map(|abort| abort.reason);
                }
                Ok(_) => {}
                Err(_) => return None,
            }
        }
    }

    fn aborted(&self, reason: String) -> LinkError {
        LinkError::PeerAborted {
            peer: self.peer().to_owned(),
            phase: self.phase,
            reason,
        }
    }

    fn stopped(&self, stop: Stop, awaited: &'static str, after: Duration) -> LinkError {
        let (peer, phase) = (self.peer().to_owned(), self.phase);
        match stop {
            Stop::Closed => LinkError::PeerClosed { peer, phase },
            Stop::TimedOut => LinkError::TimedOut {
                peer,
                phase,
                awaited,
                after,
            },
            Stop::Cancelled => LinkError::Cancelled,
            Stop::Io(cause) => LinkError::Io { peer, phase, cause },
        }
    }
}

#[derive(Debug)]
enum ReadError {
    Frame(FrameError),
    Stop(Stop),
}

impl From<FrameError> for ReadError {
    fn from(cause: FrameError) -> Self {
        Self::Frame(cause)
    }
}

impl From<Stop> for ReadError {
    fn from(stop: Stop) -> Self {
        Self::Stop(stop)
    }
}
