//! What was seen.

use std::collections::BTreeMap;

use test_packets::hash::Report;

use crate::json::Line;
use crate::rxhash::Record;

/// Most wrong packets that are printed.
const PRINTED: u32 = 10;
/// Reports that there are: none, and nine types.
const REPORTS: usize = 10;

/// Counts of packets.
#[derive(Debug)]
pub(super) struct Tally {
    /// Frames seen, each once.
    pub(super) seen: u32,
    /// Packets of others.
    pub(super) foreign: u32,
    wrong: u32,
    numbers: Vec<bool>,
    kinds: BTreeMap<&'static str, u32>,
    reports: [u32; REPORTS],
    queues: Vec<u32>,
}

impl Tally {
    /// Nothing yet, of so many frames.
    pub(super) fn new(count: u32) -> Self {
        Self {
            seen: 0,
            foreign: 0,
            wrong: 0,
            numbers: vec![false; usize::try_from(count).unwrap_or(usize::MAX)],
            kinds: BTreeMap::new(),
            reports: [0; REPORTS],
            queues: Vec::new(),
        }
    }

    /// Counts a frame, if it is for the first time.
    pub(super) fn first_time(&mut self, number: u32) -> bool {
        let at = usize::try_from(number).unwrap_or(usize::MAX);
        let is_first = self.numbers.get(at) == Some(&false);
        if is_first {
            self.numbers[at] = true;
            self.seen += 1;
        }
        is_first
    }

    /// A frame with which all is right.
    pub(super) fn right(&mut self, kind: &'static str, report: Report, queue: Option<u32>) {
        *self.kinds.entry(kind).or_default() += 1;
        if let Some(count) = self.reports.get_mut(usize::from(report.kind)) {
            *count += 1;
        }
        let Some(queue) = queue.and_then(|queue| usize::try_from(queue).ok()) else {
            return;
        };
        if self.queues.len() <= queue {
            self.queues.resize(queue + 1, 0);
        }
        self.queues[queue] += 1;
    }

    /// A frame with which something is wrong; the first few are printed.
    pub(super) fn wrong(
        &mut self,
        what: &str,
        number: u32,
        record: &Record,
        about: &str,
    ) -> anyhow::Result<()> {
        self.wrong += 1;
        if self.wrong <= PRINTED {
            Line::new("wrong")
                .text("what", what)
                .number("number", number)
                .text("about", about)
                .text("hash", &format!("{:08x}", record.hash))
                .number("report", record.report)
                .maybe("queue", record.queue().map(u64::from))
                .number("length", record.length)
                .hex("head", record.head())
                .print()?;
        }
        Ok(())
    }

    /// Whether nothing was wrong.
    pub(super) const fn is_right(&self) -> bool {
        self.wrong == 0
    }

    /// The last line.
    pub(super) fn done(&self, steps_left: usize) -> Line {
        let kinds = self
            .kinds
            .iter()
            .map(|(kind, count)| format!("{kind}:{count}"));
        Line::new("done")
            .number("seen", self.seen)
            .number("wrong", self.wrong)
            .number("foreign", self.foreign)
            .number("steps_left", u32::try_from(steps_left).unwrap_or(u32::MAX))
            .numbers("reports", &self.reports)
            .numbers("queues", &self.queues)
            .text("kinds", &kinds.collect::<Vec<_>>().join(","))
    }
}
