//! `ferryctl top`: what the devices do, queue by queue, per second.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::io::{self, ErrorKind, IsTerminal, Write as _};
use std::time::{Duration, Instant};

use vmm::api::{ApiClient, Counters, VmInfo, VmState, split_queue_counter};

use crate::Failure;
use crate::cli::Watch;
use crate::report::human_bytes;

/// Clears a terminal and goes to its upper left corner (ECMA-48: CUP, ED).
const CLEAR: &str = "\x1b[H\x1b[2J";
/// What the name of a counter of hash reports starts with; the type follows.
const REPORT: &str = "hash_";

/// Shows rates until `watch.count` screens are shown, or for ever.
pub(crate) fn run(client: &ApiClient, watch: &Watch) -> Result<(), Failure> {
    let between = if io::stdout().is_terminal() {
        CLEAR
    } else {
        "\n"
    };
    let mut before = Sample::take(client)?;
    let mut shown = 0;
    while watch.count.is_none_or(|count| shown < count) {
        std::thread::sleep(Duration::from_millis(watch.interval_ms));
        let now = Sample::take(client)?;
        let text = format!("{between}{}", screen(&before, &now));
        match io::stdout().lock().write_all(text.as_bytes()) {
            // Whoever reads has read enough.
            Err(error) if error.kind() == ErrorKind::BrokenPipe => return Ok(()),
            written => written?,
        }
        before = now;
        shown += 1;
    }
    Ok(())
}

/// What the VM said at one time.
struct Sample {
    at: Instant,
    info: VmInfo,
    counters: Counters,
}

impl Sample {
    fn take(client: &ApiClient) -> Result<Self, Failure> {
        let info = client.get("vm.info")?;
        let counters = client.get("vm.counters")?;
        Ok(Self {
            at: Instant::now(),
            info,
            counters,
        })
    }
}

/// The counters of one queue, or of all of a device: now, and how much more than before.
#[derive(Default)]
struct Row<'a> {
    counters: BTreeMap<&'a str, (u64, u64)>,
    milliseconds: u64,
}

impl Row<'_> {
    fn total(&self, name: &str) -> u64 {
        self.counters.get(name).map_or(0, |(total, _)| *total)
    }

    fn per_second(&self, name: &str) -> u64 {
        let more = self.counters.get(name).map_or(0, |(_, more)| *more);
        per_second(more, self.milliseconds)
    }
}

/// Rounded, so that what happened once in a while is not lost for a slow clock.
fn per_second(more: u64, milliseconds: u64) -> u64 {
    let half = milliseconds / 2;
    more.saturating_mul(1000).saturating_add(half) / milliseconds.max(1)
}

/// The screen for what happened from `before` to `now`.
fn screen(before: &Sample, now: &Sample) -> String {
    let elapsed = now.at.saturating_duration_since(before.at).as_millis();
    let milliseconds = u64::try_from(elapsed).unwrap_or(u64::MAX).max(1);
    let vcpus = now.info.config.cpus.boot_vcpus;
    let mut out = format!(
        "{}, {vcpus} vCPU{}, {}; per second of the last {}.{} s\n",
        state(now.info.state),
        if vcpus == 1 { "" } else { "s" },
        human_bytes(now.info.memory_actual_size),
        milliseconds / 1000,
        milliseconds % 1000 / 100,
    );
    let known = now.info.devices.keys().chain(now.counters.keys());
    for device in known.collect::<BTreeSet<_>>() {
        let facts = now.info.devices.get(device).into_iter().flatten();
        let facts: Vec<String> = facts
            .map(|(fact, value)| format!("{fact}: {value}"))
            .collect();
        let _ = writeln!(out, "\n{device}  {}", facts.join(", "));
        let rows = rows(
            before.counters.get(device),
            now.counters.get(device),
            milliseconds,
        );
        if rows.len() > 1 {
            write_queues(&mut out, &rows);
        } else {
            write_plain(&mut out, &rows);
        }
    }
    out
}

const fn state(state: VmState) -> &'static str {
    match state {
        VmState::Created => "created",
        VmState::Running => "running",
        VmState::Paused => "paused",
        VmState::Shutdown => "shut down",
    }
}

/// A device's counters by queue pair; `None` is the device as a whole, and comes last.
fn rows<'a>(
    before: Option<&BTreeMap<String, u64>>,
    now: Option<&'a BTreeMap<String, u64>>,
    milliseconds: u64,
) -> Vec<(Option<usize>, Row<'a>)> {
    let mut all: BTreeMap<usize, Row<'a>> = BTreeMap::new();
    let empty = || Row {
        milliseconds,
        ..Row::default()
    };
    let mut whole = empty();
    for (name, total) in now.into_iter().flatten() {
        let earlier = before.and_then(|before| before.get(name));
        // A counter starts anew with a new VM.
        let more = total.saturating_sub(earlier.copied().unwrap_or(0));
        let (row, name) = match split_queue_counter(name) {
            Some((queue, name)) => (all.entry(queue).or_insert_with(empty), name),
            None => (&mut whole, name.as_str()),
        };
        row.counters.insert(name, (*total, more));
    }
    let queues = all.into_iter().map(|(queue, row)| (Some(queue), row));
    queues.chain([(None, whole)]).collect()
}

/// A table: a line for each queue pair, and one for all.
fn write_queues(out: &mut String, rows: &[(Option<usize>, Row<'_>)]) {
    let _ = writeln!(
        out,
        "  queue  received        bytes  moved    dropped      sent        bytes    dropped  \
         hash reports"
    );
    for (queue, row) in rows {
        let queue = queue.map_or("all".to_owned(), |queue| queue.to_string());
        let dropped = row
            .total("rx_dropped")
            .saturating_add(row.total("rx_hand_over_dropped"));
        let reports = row.counters.keys().filter_map(|name| {
            let kind = name.strip_prefix(REPORT)?;
            let rate = row.per_second(name);
            (rate > 0).then(|| format!("{kind} {rate}"))
        });
        let reports: Vec<String> = reports.collect();
        let _ = writeln!(
            out,
            "  {queue:>5} {:>9} {:>12} {:>6} {dropped:>10} {:>9} {:>12} {:>10}  {}",
            row.per_second("rx_frames"),
            human_bytes(row.per_second("rx_bytes")),
            row.per_second("rx_handed_over"),
            row.per_second("tx_frames"),
            human_bytes(row.per_second("tx_bytes")),
            row.total("tx_dropped"),
            reports.join(", "),
        );
    }
}

/// A line for each counter of a device without queues.
fn write_plain(out: &mut String, rows: &[(Option<usize>, Row<'_>)]) {
    for (_, row) in rows {
        for (name, (total, _)) in &row.counters {
            let _ = writeln!(out, "  {name} {total} (+{}/s)", row.per_second(name));
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn sample(at: Instant, counters: serde_json::Value) -> Sample {
        let info = json!({
            "config": {"payload": {"kernel": "/k"}, "cpus": {"boot_vcpus": 2, "max_vcpus": 2}},
            "state": "Running",
            "memory_actual_size": 1_u64 << 30,
            "devices": {"_net0": {"hash_backend": "software", "steering": "ebpf"}},
        });
        Sample {
            at,
            info: serde_json::from_value(info).unwrap(),
            counters: serde_json::from_value(counters).unwrap(),
        }
    }

    #[test]
    fn queues_are_shown_by_what_they_do_per_second() {
        let start = Instant::now();
        let before = sample(
            start,
            json!({"_net0": {"rx_frames": 100, "queue0_rx_frames": 100, "queue1_rx_frames": 0}}),
        );
        let now = sample(
            start + Duration::from_millis(2000),
            json!({
                "_net0": {
                    "rx_frames": 3100, "rx_bytes": 4096, "rx_dropped": 7, "hash_tcpv4": 3000,
                    "queue0_rx_frames": 1100, "queue0_rx_dropped": 7,
                    "queue1_rx_frames": 2000, "queue1_hash_tcpv4": 3000, "queue1_hash_udpv4": 0,
                },
                "vcpus": {"dirty_ring_full": 12},
            }),
        );
        let text = screen(&before, &now);
        let lines: Vec<Vec<&str>> = text
            .lines()
            .map(|line| line.split_whitespace().collect())
            .collect();
        for words in [
            &["0", "500", "0", "B", "0", "7", "0", "0", "B", "0"][..],
            &[
                "1", "1000", "0", "B", "0", "0", "0", "0", "B", "0", "tcpv4", "1500",
            ],
            &[
                "all", "1500", "2.0", "KiB", "0", "7", "0", "0", "B", "0", "tcpv4", "1500",
            ],
            &["dirty_ring_full", "12", "(+6/s)"],
            &["_net0", "hash_backend:", "software,", "steering:", "ebpf"],
        ] {
            assert!(
                lines.contains(&words.to_vec()),
                "{words:?} is not in:\n{text}"
            );
        }
        assert!(text.starts_with("running, 2 vCPUs, 1.0 GiB; per second of the last 2.0 s\n"));
        assert!(!text.contains("udpv4"), "there was none:\n{text}");
    }

    #[test]
    fn counters_that_start_anew_show_no_rate() {
        let start = Instant::now();
        let before = sample(start, json!({"vcpus": {"dirty_ring_full": 50}}));
        let now = sample(start, json!({"vcpus": {"dirty_ring_full": 3}}));
        assert!(screen(&before, &now).contains("dirty_ring_full 3 (+0/s)"));
    }
}
