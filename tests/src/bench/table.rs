//! The results as text.

use std::fmt::Write;

use super::migration::{MigrationRow, ratio};
use super::stats::{Summary, figure};
use super::tracking::TrackingRow;
use super::{Results, Vmm};

/// Everything.
pub(super) fn render(results: &Results) -> String {
    let mut out = String::new();
    let machine = &results.machine;
    // Writing to a String cannot fail.
    let _ = writeln!(
        out,
        "{}, {} CPUs, Linux {}, load {} to {}\n{}\nMedian (smallest–largest). Ratio: Ferry's median \
         over QEMU's with the same memory; below 1 is better.\n",
        machine.cpu, machine.cpus, machine.kernel, machine.load[0], machine.load[1], machine.qemu
    );
    startup(&mut out, results);
    migrations(&mut out, &results.migrations);
    tracking(&mut out, &results.tracking);
    out
}

fn show(summary: Option<Summary>) -> String {
    summary.map_or_else(|| "-".to_owned(), |summary| summary.show())
}

fn startup(out: &mut String, results: &Results) {
    if results.startup.is_empty() {
        return;
    }
    let _ = writeln!(
        out,
        "{:54} {:>24} {:>24} {:>6}",
        "start-up and memory", "Ferry", "QEMU microvm", "ratio"
    );
    for row in &results.startup {
        let ratio = match (row.ferry, row.qemu) {
            (Some(ferry), Some(qemu)) if qemu.median > 0.0 => {
                format!("{:.2}", ferry.median / qemu.median)
            }
            _ => "-".to_owned(),
        };
        let what = format!("{}, {}", row.what, row.unit);
        let (ferry, qemu) = (show(row.ferry), show(row.qemu));
        let _ = writeln!(out, "{what:54} {ferry:>24} {qemu:>24} {ratio:>6}");
    }
    out.push('\n');
}

fn migrations(out: &mut String, rows: &[MigrationRow]) {
    let mut case = None;
    for row in rows {
        if case != Some(row.case) {
            case = Some(row.case);
            let _ = writeln!(
                out,
                "\nmigration over {}, guest dirties {} MiB/s, downtime target {} ms\n\
                 {:16} {:>20} {:>22} {:>22} {:>9} {:>17} {:>18} {:>6}",
                row.case.transport,
                row.case.rate,
                row.case.downtime_target_ms,
                "",
                "total ms",
                "reported downtime ms",
                "gap by guest ms",
                "sent MiB",
                "CPU ms",
                "ratio tot/gap/CPU",
                "wrong"
            );
        }
        let ratios = if row.contender.vmm == Vmm::Ferry {
            let show =
                |ratio: Option<f64>| ratio.map_or("-".to_owned(), |ratio| format!("{ratio:.2}"));
            let total = show(ratio(rows, row, |row| row.total_ms));
            let gap = show(ratio(rows, row, |row| row.gap_ms));
            format!("{total}/{gap}/{}", show(ratio(rows, row, |row| row.cpu_ms)))
        } else {
            String::new()
        };
        let wrong: u64 = row.samples.iter().map(|sample| sample.corrupt).sum();
        let _ = writeln!(
            out,
            "{:16} {:>20} {:>22} {:>22} {:>9} {:>17} {ratios:>18} {wrong:>6}",
            row.contender.name(),
            show(row.total_ms),
            show(row.downtime_ms),
            show(row.gap_ms),
            row.sent_mib
                .map_or("-".to_owned(), |sent| figure(sent.median)),
            show(row.cpu_ms),
        );
        for failure in &row.failures {
            let _ = writeln!(out, "{:16} failed: {failure}", "");
        }
    }
}

fn tracking(out: &mut String, rows: &[TrackingRow]) {
    let mut rate = None;
    for row in rows {
        if rate != Some(row.rate) {
            rate = Some(row.rate);
            let _ = writeln!(
                out,
                "\ndirty tracking, guest of {} MiB writes {} MiB/s\n\
                 {:20} {:>22} {:>20} {:>16} {:>28} {:>6}",
                row.memory_mib,
                row.rate,
                "dirty_log",
                "total ms",
                "tracking ms",
                "% of total",
                "guest's speed meanwhile, %",
                "wrong"
            );
        }
        let wrong: u64 = row.samples.iter().map(|sample| sample.corrupt).sum();
        let _ = writeln!(
            out,
            "{:20} {:>22} {:>20} {:>16} {:>28} {wrong:>6}",
            row.dirty_log,
            show(row.summary(|sample| sample.total_ms)),
            show(row.summary(|sample| sample.tracking_ms)),
            show(row.summary(|sample| sample.tracking_percent)),
            show(row.summary(|sample| sample.guest_speed_percent)),
        );
        for failure in &row.failures {
            let _ = writeln!(out, "{:20} failed: {failure}", "");
        }
    }
}
