//! The handle that tells and the writer that writes, with a bounded queue between them.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use serde::Serialize;

use crate::event::Event;

/// Events that may wait for the writer; what comes beyond is dropped and counted.
pub const QUEUE_DEPTH: usize = 1024;

/// An event and its moment.
#[derive(Debug)]
struct Record {
    at: Duration,
    event: Event,
}

/// What handles and writer share under one lock, which is only ever held for a few instructions.
#[derive(Debug)]
struct State {
    queue: VecDeque<Record>,
    /// Events lost since the last record in the queue.
    dropped: u64,
    /// Events lost in all.
    dropped_total: u64,
    /// There are handles left.
    told: bool,
    /// There is a writer left.
    written: bool,
    /// The writer has taken a record and not yet written it.
    busy: bool,
}

#[derive(Debug)]
struct Shared {
    start: Instant,
    state: Mutex<State>,
    /// Signalled when the queue gets a record or the last handle goes.
    news: Condvar,
    /// Signalled when all is written or the writer goes.
    idle: Condvar,
}

/// The last handle to go tells the writer so.
#[derive(Debug)]
struct Teller(Arc<Shared>);

impl Drop for Teller {
    fn drop(&mut self) {
        self.0.state.lock().told = false;
        self.0.news.notify_one();
    }
}

/// A handle to tell events with. Clones tell the same writer.
#[derive(Clone)]
pub struct EventMonitor {
    teller: Option<Arc<Teller>>,
}

impl fmt::Debug for EventMonitor {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_struct("EventMonitor")
            .field("enabled", &self.teller.is_some())
            .finish()
    }
}

impl EventMonitor {
    /// A monitor that writes to `sink`, and the writer a thread must [run](EventWriter::run).
    /// Timestamps count from now.
    pub fn new(sink: impl Into<OwnedFd>) -> (Self, EventWriter) {
        let shared = Arc::new(Shared {
            start: Instant::now(),
            state: Mutex::new(State {
                queue: VecDeque::new(),
                dropped: 0,
                dropped_total: 0,
                told: true,
                written: true,
                busy: false,
            }),
            news: Condvar::new(),
            idle: Condvar::new(),
        });
        let writer = EventWriter {
            shared: Arc::clone(&shared),
            sink: sink.into(),
        };
        let teller = Some(Arc::new(Teller(shared)));
        (Self { teller }, writer)
    }

    /// A monitor that forgets what it is told.
    pub fn disabled() -> Self {
        Self { teller: None }
    }

    /// Tells `event`, stamped now. Never waits for the reader: if [`QUEUE_DEPTH`] events wait
    /// already, this one is dropped and counted.
    pub fn tell(&self, event: Event) {
        let Some(teller) = &self.teller else { return };
        let shared = &teller.0;
        let mut state = shared.state.lock();
        if state.queue.len() >= QUEUE_DEPTH || !state.written {
            state.dropped = state.dropped.saturating_add(1);
            state.dropped_total = state.dropped_total.saturating_add(1);
            return;
        }
        // Stamped under the lock, so that the order in the queue is the order of the stamps.
        let at = shared.start.elapsed();
        if state.dropped > 0 {
            let count = std::mem::take(&mut state.dropped);
            let event = Event::Dropped { count };
            state.queue.push_back(Record { at, event });
        }
        state.queue.push_back(Record { at, event });
        drop(state);
        shared.news.notify_one();
    }

    /// How many events were dropped since the start.
    pub fn dropped(&self) -> u64 {
        match &self.teller {
            Some(teller) => teller.0.state.lock().dropped_total,
            None => 0,
        }
    }

    /// Waits until all that was told is written, at most `timeout`; whether it is. For the end of
    /// the process, where the last events are the ones that matter.
    pub fn flush(&self, timeout: Duration) -> bool {
        let Some(teller) = &self.teller else {
            return true;
        };
        let shared = &teller.0;
        let deadline = Instant::now().checked_add(timeout);
        let mut state = shared.state.lock();
        let mut late = false;
        while state.written && (state.busy || !state.queue.is_empty()) && !late {
            late = match deadline {
                Some(deadline) => shared.idle.wait_until(&mut state, deadline).timed_out(),
                None => {
                    shared.idle.wait(&mut state);
                    false
                }
            };
        }
        state.queue.is_empty() && !state.busy
    }
}

/// Writes events to the sink, on the thread that [runs](EventWriter::run) it.
#[derive(Debug)]
pub struct EventWriter {
    shared: Arc<Shared>,
    sink: OwnedFd,
}

/// One line of output.
#[derive(Serialize)]
struct Line<'a> {
    timestamp: Timestamp,
    source: &'a str,
    event: &'a str,
    properties: &'a Event,
}

#[derive(Serialize)]
struct Timestamp {
    secs: u64,
    nanos: u32,
}

impl EventWriter {
    /// Writes events until the last handle is dropped or the sink is broken.
    pub fn run(self) {
        let mut line = Vec::new();
        while let Some(record) = self.next() {
            line.clear();
            let written = encode(&record, &mut line).and_then(|()| self.write(&line));
            if let Err(error) = written {
                tracing::warn!(%error, "the event sink is broken; no more events are written");
                return;
            }
        }
    }

    /// The next record, once there is one; `None` when there will be none.
    fn next(&self) -> Option<Record> {
        let mut state = self.shared.state.lock();
        state.busy = false;
        loop {
            if let Some(record) = state.queue.pop_front() {
                state.busy = true;
                return Some(record);
            }
            if state.dropped > 0 {
                let count = std::mem::take(&mut state.dropped);
                state.busy = true;
                return Some(Record {
                    at: self.shared.start.elapsed(),
                    event: Event::Dropped { count },
                });
            }
            self.shared.idle.notify_all();
            if !state.told {
                return None;
            }
            self.shared.news.wait(&mut state);
        }
    }

    /// Writes all of `bytes`, waiting for the reader where the sink does not block by itself.
    fn write(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            match rustix::io::write(&self.sink, bytes) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => bytes = bytes.get(count..).unwrap_or_default(),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    let mut fds = [PollFd::new(&self.sink, PollFlags::OUT)];
                    match poll(&mut fds, None) {
                        Ok(_) | Err(Errno::INTR) => {}
                        Err(error) => return Err(error.into()),
                    }
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

impl Drop for EventWriter {
    fn drop(&mut self) {
        let mut state = self.shared.state.lock();
        let lost = u64::try_from(state.queue.len()).unwrap_or(u64::MAX);
        state.dropped_total = state.dropped_total.saturating_add(lost);
        state.queue.clear();
        state.written = false;
        state.busy = false;
        self.shared.idle.notify_all();
    }
}

/// Appends `record` to `line` as JSON with a newline.
fn encode(record: &Record, line: &mut Vec<u8>) -> io::Result<()> {
    let parts = Line {
        timestamp: Timestamp {
            secs: record.at.as_secs(),
            nanos: record.at.subsec_nanos(),
        },
        source: record.event.source(),
        event: record.event.name(),
        properties: &record.event,
    };
    serde_json::to_writer(&mut *line, &parts)?;
    line.push(b'\n');
    Ok(())
}
