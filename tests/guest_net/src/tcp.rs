//! A TCP stream of known bytes that may be stalled for long, but must not lose or change any.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use anyhow::Context;

use crate::args::Args;
use crate::json::Line;
use crate::pattern::{self, Crc32c};
use crate::progress::{Gaps, PATIENCE, Schedule};
use crate::{Verdict, stop};

/// Which bytes the stream has.
const SEED: u64 = 0x0074_6370;
/// Bytes per call.
const CHUNK: usize = 64 << 10;

/// What was sent or received so far.
struct Stream {
    bytes: u64,
    crc: Crc32c,
    gaps: Gaps,
}

impl Stream {
    fn new() -> Self {
        Self {
            bytes: 0,
            crc: Crc32c::new(),
            gaps: Gaps::new(),
        }
    }

    fn add(&mut self, bytes: &[u8], now: Instant) {
        self.crc.update(bytes);
        // A chunk's length fits.
        self.bytes += u64::try_from(bytes.len()).unwrap_or(0);
        self.gaps.event(now);
    }

    fn line(&self, event: &str, now: Instant) -> Line {
        Line::new(event)
            .number("bytes", self.bytes)
            .text("crc32c", &format!("{:08x}", self.crc.value()))
            .number("longest_gap_ms", self.gaps.longest_ms(now))
    }
}

/// A call that came back without having done anything.
fn is_idle(error: &std::io::Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted
    )
}

/// `tcp-send`.
pub(crate) fn send(mut args: Args) -> anyhow::Result<Verdict> {
    let to: SocketAddr = args.required("to")?;
    let limit = args.option("bytes")?.unwrap_or(u64::MAX);
    let rate = args.option("rate")?.unwrap_or(u64::MAX);
    let seconds = args.option("seconds")?;
    let wait = Duration::from_secs(args.option("wait")?.unwrap_or(10));
    args.finish()?;
    let connection = connect(to, wait).with_context(|| format!("connecting to {to}"))?;
    connection.set_write_timeout(Some(PATIENCE))?;
    send_over(connection, Schedule::new(seconds), limit, rate)
}

/// Connects to a receiver that may be a while in coming.
fn connect(to: SocketAddr, wait: Duration) -> std::io::Result<TcpStream> {
    let start = Instant::now();
    loop {
        match TcpStream::connect_timeout(&to, Duration::from_secs(1)) {
            Err(_) if start.elapsed() < wait && !stop::requested() => std::thread::sleep(PATIENCE),
            result => return result,
        }
    }
}

fn send_over(
    mut connection: TcpStream,
    mut schedule: Schedule,
    limit: u64,
    rate: u64,
) -> anyhow::Result<Verdict> {
    let mut stream = Stream::new();
    let mut chunk = [0; CHUNK];
    while stream.bytes < limit && !schedule.is_over(Instant::now()) {
        let now = Instant::now();
        if schedule.report_is_due(now) {
            stream.line("progress", now).print()?;
        }
        let due = schedule
            .due(rate, now)
            .min(limit)
            .saturating_sub(stream.bytes);
        if due == 0 {
            std::thread::sleep(Duration::from_millis(1));
            continue;
        }
        let len = usize::try_from(due).map_or(CHUNK, |due| due.min(CHUNK));
        let chunk = &mut chunk[..len];
        pattern::fill(SEED, stream.bytes, chunk);
        match connection.write(chunk) {
            Ok(sent) => stream.add(&chunk[..sent], Instant::now()),
            Err(error) if is_idle(&error) => {}
            Err(error) => {
                stream
                    .line("broken", Instant::now())
                    .text("error", &error.to_string())
                    .print()?;
                return Err(error).context("sending");
            }
        }
    }
    connection.shutdown(std::net::Shutdown::Write)?;
    stream.line("done", Instant::now()).print()?;
    Ok(Verdict::Right)
}

/// `tcp-recv`.
pub(crate) fn receive(mut args: Args) -> anyhow::Result<Verdict> {
    let at: SocketAddr = args.required("listen")?;
    args.finish()?;
    let listener = TcpListener::bind(at).with_context(|| format!("listening on {at}"))?;
    let at = listener.local_addr()?;
    Line::new("listening")
        .text("address", &at.to_string())
        .print()?;
    listener.set_nonblocking(true)?;
    let connection = loop {
        match listener.accept() {
            Ok((connection, _)) => break connection,
            Err(error) if is_idle(&error) && !stop::requested() => {
                std::thread::sleep(PATIENCE / 10)
            }
            Err(error) => return Err(error).context("waiting for a connection"),
        }
    };
    connection.set_nonblocking(false)?;
    connection.set_read_timeout(Some(PATIENCE))?;
    receive_over(connection, Schedule::new(None))
}

fn receive_over(mut connection: TcpStream, mut schedule: Schedule) -> anyhow::Result<Verdict> {
    let mut stream = Stream::new();
    let mut first_wrong = None;
    let mut chunk = [0; CHUNK];
    let error = loop {
        let now = Instant::now();
        if schedule.report_is_due(now) {
            stream
                .line("progress", now)
                .maybe("first_wrong_byte", first_wrong)
                .print()?;
        }
        if schedule.is_over(now) {
            break None;
        }
        match connection.read(&mut chunk) {
            Ok(0) => break None,
            Ok(len) => {
                let received = &chunk[..len];
                let wrong = || pattern::mismatch(SEED, stream.bytes, received);
                first_wrong = first_wrong.or_else(wrong);
                stream.add(received, Instant::now());
            }
            Err(error) if is_idle(&error) => {}
            Err(error) => break Some(error),
        }
    };
    let event = if error.is_some() { "broken" } else { "done" };
    stream
        .line(event, Instant::now())
        .maybe("first_wrong_byte", first_wrong)
        .print()?;
    match error {
        Some(error) => Err(error).context("receiving"),
        None => Ok(Verdict::of(first_wrong.is_none())),
    }
}

#[cfg(test)]
mod tests;
