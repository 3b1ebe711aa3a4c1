//! What a migration was like, for people and for programs.

use std::collections::BTreeMap;
use std::fmt;

use serde::Serialize;
use vmm::api::{DeviceDowntime, DirtySourceInfo, Downtime, MigrationStatus};

/// A finished migration.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    /// Rounds of memory, the last one included.
    rounds: u32,
    /// From the start until the guest ran at the destination, in milliseconds.
    total_ms: u64,
    /// How long the guest stood still, in milliseconds.
    downtime_ms: f64,
    /// Bytes the source sent.
    bytes: u64,
    /// Pages found dirty, by source.
    dirty_pages: BTreeMap<String, u64>,
    /// Where the migration learned which pages each passthrough device wrote.
    dirty_sources: Vec<DirtySourceInfo>,
    /// The source's last word.
    source: MigrationStatus,
    /// The destination's.
    destination: MigrationStatus,
}

impl Report {
    pub(crate) fn new(source: MigrationStatus, destination: MigrationStatus) -> Self {
        let dirty = source.sources.iter();
        let downtime = source
            .downtime
            .as_ref()
            .map_or(0, |downtime| downtime.total);
        Self {
            rounds: source.rounds,
            total_ms: source.elapsed_ms,
            downtime_ms: milliseconds(downtime),
            bytes: source.bytes,
            dirty_pages: dirty.map(|one| (one.id.clone(), one.total_pages)).collect(),
            dirty_sources: Vec::new(),
            source,
            destination,
        }
    }
}

impl Report {
    /// With what the source said when it began.
    pub(crate) fn learned_from(mut self, dirty_sources: Vec<DirtySourceInfo>) -> Self {
        self.dirty_sources = dirty_sources;
        self
    }
}

impl fmt::Display for Report {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let status = &self.source;
        writeln!(
            out,
            "The VM has moved. It took {:.2} s; the guest stood still for {:.1} ms of it.\n",
            milliseconds(self.total_ms),
            self.downtime_ms
        )?;
        writeln!(
            out,
            "Memory    {} in {} rounds; {} pages, {} of them zero",
            human_bytes(status.memory_bytes),
            self.rounds,
            status.pages,
            status.zero_pages
        )?;
        writeln!(
            out,
            "Sent      {}, {} of it device state{}",
            human_bytes(status.bytes),
            human_bytes(status.device_bytes),
            match status.bandwidth {
                Some(bandwidth) => format!(", at {}/s", human_bytes(bandwidth)),
                None => String::new(),
            }
        )?;
        if let Some(downtime) = &status.downtime {
            writeln!(out, "Downtime  {:.1} ms", milliseconds(downtime.total))?;
            for (what, microseconds) in breakdown(downtime) {
                writeln!(
                    out,
                    "          {:>8.1} ms  {what}",
                    milliseconds(microseconds)
                )?;
            }
        }
        if let Some(downtime) = &status.downtime {
            write_devices(out, &downtime.devices)?;
        }
        writeln!(out, "Dirtied   (pages in all reports, by who reports them)")?;
        for source in &status.sources {
            writeln!(
                out,
                "          {:>11}  {} (last report took {} µs)",
                source.total_pages, source.id, source.last_report_us
            )?;
        }
        for DirtySourceInfo { id, source, why } in &self.dirty_sources {
            writeln!(out, "Logged by {source} for {id}, as {why}")?;
        }
        Ok(())
    }
}

/// Times below this, in µs, show as nothing.
const NOTHING: u64 = 50;

/// What each device took of the downtime, unless it took nothing worth the line.
fn write_devices(out: &mut fmt::Formatter<'_>, devices: &[DeviceDowntime]) -> fmt::Result {
    let parts = |one: &DeviceDowntime| [one.quiesce, one.stop, one.read, one.send, one.load];
    let shown = |one: &&DeviceDowntime| parts(one).iter().any(|part| *part >= NOTHING);
    if !devices.iter().any(|one| shown(&one)) {
        return Ok(());
    }
    writeln!(
        out,
        "          ms:     rest     stop     read     sent   loaded  (in part at once)"
    )?;
    for one in devices.iter().filter(shown) {
        write!(out, "             ")?;
        for part in parts(one) {
            write!(out, "{:>8.1} ", milliseconds(part))?;
        }
        writeln!(out, " {}, {}", one.id, human_bytes(one.bytes))?;
    }
    Ok(())
}

/// The parts of the downtime in the order they happen, in microseconds.
fn breakdown(downtime: &Downtime) -> [(&'static str, u64); 8] {
    [
        ("stopping the vCPUs", downtime.pause_vcpus),
        ("bringing the devices to rest", downtime.quiesce),
        ("stopping the devices", downtime.stop),
        ("the last dirty reports", downtime.final_sync),
        ("sending the last pages", downtime.memory),
        ("sending the devices' state", downtime.device_state),
        ("loading it at the destination", downtime.destination_load),
        ("starting the guest there", downtime.commit),
    ]
}

/// A thousandth of `value`, for people: above 2^52 it is not exact.
fn milliseconds(value: u64) -> f64 {
    let whole = u32::try_from(value / 1000).unwrap_or(u32::MAX);
    let rest = u32::try_from(value % 1000).unwrap_or_default();
    f64::from(whole) + f64::from(rest) / 1000.0
}

/// Bytes with the unit that leaves one to four digits before the point.
pub(crate) fn human_bytes(bytes: u64) -> String {
    let units = [("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)];
    for (unit, shift) in units {
        let whole = bytes >> shift;
        if whole > 0 {
            let tenths = ((bytes >> (shift - 10)) & 1023).saturating_mul(10) / 1024;
            return format!("{whole}.{tenths} {unit}");
        }
    }
    format!("{bytes} B")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_read_well() {
        assert_eq!(human_bytes(0), "0 B");
        assert_eq!(human_bytes(1023), "1023 B");
        assert_eq!(human_bytes(1536), "1.5 KiB");
        assert_eq!(human_bytes(1 << 30), "1.0 GiB");
        assert_eq!(human_bytes(u64::MAX), "16777215.9 TiB");
        assert_eq!(milliseconds(12_345).to_string(), "12.345");
    }

    #[test]
    fn the_report_names_the_parts() {
        let json = r#"{"side": "source", "phase": {"name": "done"}, "elapsed_ms": 1234, "rounds": 3,
            "bytes": 2048, "pages": 10, "zero_pages": 4, "memory_bytes": 1073741824,
            "device_bytes": 1024, "remaining_pages": 0, "dirty_pages_per_second": null,
            "sources": [{"id": "kvm", "granularity": 4096, "precision": "exact", "last_pages": 1,
                         "total_pages": 77, "last_report_us": 12}],
            "bandwidth": 1048576, "downtime_estimate_us": null,
            "downtime": {"pause_vcpus": 100, "quiesce": 0, "stop": 0, "final_sync": 0, "memory": 0,
                         "device_state": 0, "destination_load": 0, "commit": 0, "total": 42100,
                "devices": [{"id": "nic0", "quiesce": 100, "stop": 2200, "read": 33300, "send": 400,
                             "load": 5500, "bytes": 2048},
                            {"id": "rtc", "quiesce": 0, "stop": 3, "read": 0, "send": 9, "load": 1,
                             "bytes": 9}]},
            "aborted": null}"#;
        let status: MigrationStatus = serde_json::from_str(json).unwrap();
        let log = DirtySourceInfo {
            id: "nic0".to_owned(),
            source: "device DMA log".to_owned(),
            why: "the device logs its own writes".to_owned(),
        };
        let report = Report::new(status.clone(), status).learned_from(vec![log]);
        let text = report.to_string();
        for part in [
            "1.23 s",
            "42.1 ms",
            "1.0 GiB in 3 rounds",
            "77  kvm",
            "0.1 ms  stopping the vCPUs",
            "0.1      2.2     33.3      0.4      5.5  nic0, 2.0 KiB",
            "Logged by device DMA log for nic0, as the device logs its own writes",
        ] {
            assert!(text.contains(part), "{part} is not in:\n{text}");
        }
        assert!(!text.contains("rtc"), "it took nothing:\n{text}");
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!(json["dirty_pages"]["kvm"], 77);
        assert_eq!(json["dirty_sources"][0]["id"], "nic0");
        assert_eq!(json["downtime_ms"], 42.1);
    }
}
