//! The results as text.

use std::fmt::Write;

use crate::Machine;
use crate::measure::{Row, Summary};
use crate::plan::{DEVICES, Results};

/// Everything.
pub(crate) fn render(machine: &Machine, results: &Results) -> String {
    let mut out = String::new();
    // Writing to a String cannot fail.
    let _ = writeln!(
        out,
        "{}, {} CPUs of which one is used, Linux {}, load {} to {}\n\
         Median (smallest-largest) in ms, caches swept before each sample. sync: all sources asked and \
         dirty pages\ncounted; of it, reports: in the (simulated) sources, own: the rest. walk: all runs \
         taken. ack: acknowledged.",
        machine.cpu, machine.cpus, machine.kernel, machine.load[0], machine.load[1]
    );
    let _ = writeln!(
        out,
        "\n{DEVICES} devices, by the guest's size (x: sync of one guest over that of the guest before, \
         / sizes: the same of\nthe sizes)\n{:28} {} {:>11} {:>13} {:>12}",
        "dirty", HEAD, "bitmaps MiB", "sync us/GiB", "x / sizes"
    );
    let mut before: Option<&Row> = None;
    for row in &results.by_size {
        let before = before.replace(row).filter(|before| before.fill == row.fill);
        let label = format!("{:17}{:>7} GiB", row.fill.name(), row.gib);
        let _ = writeln!(
            out,
            "{label:28} {} {:>11.2} {:>13.2} {:>12}",
            figures(row),
            mib(row.bitmap_bytes),
            row.sync_ms.median * 1000.0 / float(row.gib),
            before.map_or("-".to_owned(), |before| growth(before, row)),
        );
    }
    part(
        &mut out,
        "by the number of devices",
        &results.by_devices,
        |row| format!("{:17}{:>6} dev.", row.fill.name(), row.sources),
    );
    part(
        &mut out,
        "by kind of source, 1 % dirty",
        &results.by_kind,
        |row| row.who.clone(),
    );
    for row in results.rows() {
        if let Some(wrong) = &row.wrong {
            let _ = writeln!(
                out,
                "WRONG: {} GiB, {}, {}: {wrong}",
                row.gib,
                row.fill.name(),
                row.who
            );
        }
    }
    out
}

const HEAD: &str =
    "                   sync   reports       own                    walk  ns/run       ack";

fn part(out: &mut String, title: &str, rows: &[Row], label: impl Fn(&Row) -> String) {
    let gib = rows.first().map_or(0, |row| row.gib);
    let _ = writeln!(out, "\n{gib} GiB, {title}\n{:28} {HEAD}", "");
    for row in rows {
        let _ = writeln!(out, "{:28} {}", label(row), figures(row));
    }
}

fn figures(row: &Row) -> String {
    let per_run = row.walk_ms.median * 1e6 / float(row.runs.max(1));
    format!(
        "{:>23} {:>9} {:>9} {:>23} {:>7} {:>9}",
        show(row.sync_ms),
        figure(row.reports_ms.median),
        figure(row.own_ms.median),
        show(row.walk_ms),
        if row.runs == 0 {
            "-".to_owned()
        } else {
            figure(per_run)
        },
        figure(row.acknowledge_ms.median),
    )
}

/// How a sync grew from one guest to the next, and how the guest did.
fn growth(before: &Row, row: &Row) -> String {
    format!(
        "{} / {}",
        figure(row.sync_ms.median / before.sync_ms.median.max(f64::MIN_POSITIVE)),
        figure(float(row.gib) / float(before.gib))
    )
}

fn show(summary: Summary) -> String {
    format!(
        "{} ({}-{})",
        figure(summary.median),
        figure(summary.min),
        figure(summary.max)
    )
}

/// A figure with as many digits as it is worth.
fn figure(value: f64) -> String {
    let digits = match value.abs() {
        100.0.. => 0,
        10.0.. => 1,
        1.0.. => 2,
        _ => 3,
    };
    format!("{value:.digits$}")
}

/// A number as one that may have a fraction; those here are far below 2^53.
pub(crate) fn float(number: u64) -> f64 {
    let high = u32::try_from(number >> 32).unwrap_or(u32::MAX);
    let low = u32::try_from(number & u64::from(u32::MAX)).unwrap_or(u32::MAX);
    f64::from(high) * 4_294_967_296.0 + f64::from(low)
}

/// Bytes as MiB.
pub(crate) fn mib(bytes: u64) -> f64 {
    float(bytes) / f64::from(1 << 20)
}
