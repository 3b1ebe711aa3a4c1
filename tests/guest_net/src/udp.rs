//! Numbered UDP packets that show what was lost, and how long nothing came.

use std::net::{SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};

use crate::Verdict;
use crate::args::Args;
use crate::json::Line;
use crate::progress::{Gaps, PATIENCE, Schedule};

/// What a packet starts with; its number follows as 64 bits, both big-endian.
const MAGIC: [u8; 8] = *b"ferrynet";
const HEADER_BYTES: usize = 16;
/// Largest payload of a UDP packet over IPv4.
const MAX_BYTES: usize = 65507;
/// Numbers up to here are told apart; one bit each.
const MAX_NUMBERS: u64 = 1 << 26;

/// `udp-seq send`.
pub(crate) fn send(mut args: Args) -> anyhow::Result<Verdict> {
    let to: SocketAddr = args.required("to")?;
    let count = args.option("count")?.unwrap_or(MAX_NUMBERS);
    let rate = args.option("rate")?.unwrap_or(1000);
    let size = args.option("size")?.unwrap_or(64_usize);
    let mut schedule = Schedule::new(args.option("seconds")?);
    args.finish()?;
    ensure!(
        (HEADER_BYTES..=MAX_BYTES).contains(&size),
        "--size {size}: use 16 to {MAX_BYTES}"
    );
    ensure!(
        count <= MAX_NUMBERS,
        "--count {count}: use at most {MAX_NUMBERS}"
    );
    let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let socket = UdpSocket::bind(any)?;

    let mut packet = vec![0; size];
    packet[..8].copy_from_slice(&MAGIC);
    let (mut number, mut errors, mut gaps) = (0_u64, 0_u64, Gaps::new());
    let line = |event, number: u64, errors: u64, gaps: &Gaps| {
        let gap = gaps.longest_ms(Instant::now());
        Line::new(event)
            .number("sent", number)
            .number("errors", errors)
            .number("longest_gap_ms", gap)
    };
    while number < count && !schedule.is_over(Instant::now()) {
        let now = Instant::now();
        if schedule.report_is_due(now) {
            line("progress", number, errors, &gaps).print()?;
        }
        if number >= schedule.due(rate, now) {
            std::thread::sleep(Duration::from_micros(200));
            continue;
        }
        packet[8..HEADER_BYTES].copy_from_slice(&number.to_be_bytes());
        // A network that is away for a while must not end the test: the number counts as sent.
        match socket.send_to(&packet, to) {
            Ok(_) => gaps.event(Instant::now()),
            Err(_) => errors += 1,
        }
        number += 1;
    }
    line("done", number, errors, &gaps).print()?;
    Ok(Verdict::Right)
}

/// Which numbers have come.
#[derive(Debug, Default)]
pub(crate) struct Numbers {
    seen: Vec<u64>,
    /// One more than the highest.
    end: u64,
    received: u64,
    duplicates: u64,
    reordered: u64,
    foreign: u64,
}

impl Numbers {
    /// Takes in a packet.
    pub(crate) fn packet(&mut self, packet: &[u8]) {
        match Self::number(packet) {
            Some(number) => self.take(number),
            None => self.foreign += 1,
        }
    }

    fn number(packet: &[u8]) -> Option<u64> {
        let number = packet.strip_prefix(&MAGIC)?.first_chunk()?;
        Some(u64::from_be_bytes(*number)).filter(|number| *number < MAX_NUMBERS)
    }

    fn take(&mut self, number: u64) {
        // Below MAX_NUMBERS, so it fits.
        let index = usize::try_from(number / 64).unwrap_or(0);
        if index >= self.seen.len() {
            self.seen.resize(index + 1, 0);
        }
        let bit = 1 << (number % 64);
        if self.seen[index] & bit != 0 {
            self.duplicates += 1;
            return;
        }
        self.seen[index] |= bit;
        self.received += 1;
        if number < self.end {
            self.reordered += 1;
        }
        self.end = self.end.max(number + 1);
    }

    /// How many of the numbers up to the highest have not come.
    pub(crate) const fn lost(&self) -> u64 {
        self.end - self.received
    }

    fn line(&self, event: &str, gaps: &Gaps) -> Line {
        Line::new(event)
            .number("received", self.received)
            .number("lost", self.lost())
            .number("duplicates", self.duplicates)
            .number("reordered", self.reordered)
            .number("foreign", self.foreign)
            .number("longest_gap_ms", gaps.longest_ms(Instant::now()))
    }
}

/// `udp-seq recv`.
pub(crate) fn receive(mut args: Args) -> anyhow::Result<Verdict> {
    let at: SocketAddr = args.required("listen")?;
    let count = args.option("count")?.unwrap_or(u64::MAX);
    let idle = args.option("idle")?.map(Duration::from_secs);
    let seconds = args.option("seconds")?;
    args.finish()?;
    let socket = UdpSocket::bind(at).with_context(|| format!("listening on {at}"))?;
    socket.set_read_timeout(Some(PATIENCE))?;
    Line::new("listening")
        .text("address", &socket.local_addr()?.to_string())
        .print()?;

    let (mut numbers, mut gaps) = (Numbers::default(), Gaps::new());
    let mut schedule = Schedule::new(seconds);
    let mut packet = [0; MAX_BYTES];
    while numbers.received < count && !schedule.is_over(Instant::now()) {
        let now = Instant::now();
        if schedule.report_is_due(now) {
            numbers.line("progress", &gaps).print()?;
        }
        if gaps
            .idle(now)
            .zip(idle)
            .is_some_and(|(now, limit)| now >= limit)
        {
            break;
        }
        if let Ok(len) = socket.recv(&mut packet) {
            numbers.packet(&packet[..len]);
            gaps.event(Instant::now());
        }
    }
    numbers.line("done", &gaps).print()?;
    Ok(Verdict::Right)
}

#[cfg(test)]
mod tests;
