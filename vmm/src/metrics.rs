//! `GET vm.metrics`: what there is to measure, as OpenMetrics text for Prometheus.
//!
//! Nothing is counted here: a [`Snapshot`] borrows what the parts of the VMM count anyway, and
//! [`render`] writes it down. Metrics of what is not there (no VM, no migration) are left out.

use std::fmt;
use std::sync::atomic::AtomicU64;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::{ConstCounter, Counter};
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::{ConstGauge, Gauge};
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::{Registry, Unit};

use crate::api::{Counters, Downtime, Facts, MigrationStatus, Side, VmState, split_queue_counter};

/// What the metrics are made of.
#[derive(Clone, Copy, Debug)]
pub struct Snapshot<'a> {
    /// Ferry's version.
    pub version: &'a str,
    /// The VM, if there is one.
    pub vm: Option<VmSnapshot<'a>>,
    /// The migration that runs or ran last, if any.
    pub migration: Option<&'a MigrationStatus>,
    /// Events the event monitor dropped because its reader was too slow.
    pub events_dropped: u64,
}

/// What the metrics of a VM are made of.
#[derive(Clone, Copy, Debug)]
pub struct VmSnapshot<'a> {
    /// What it is doing.
    pub state: VmState,
    /// Its virtual CPUs.
    pub vcpus: u32,
    /// Its RAM in bytes.
    pub memory_bytes: u64,
    /// The counters of its devices, as `vm.counters` has them.
    pub counters: &'a Counters,
    /// What is known of its devices, as `vm.info` has it.
    pub facts: &'a Facts,
}

type UnsignedGauge = Gauge<u64, AtomicU64>;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DeviceLabels {
    device: String,
    counter: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct QueueLabels {
    device: String,
    queue: usize,
    counter: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct FactLabels {
    device: String,
    fact: String,
    value: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct SourceLabels {
    source: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StateLabels {
    state: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PhaseLabels {
    side: &'static str,
    phase: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PartLabels {
    part: &'static str,
}

/// Writes `snapshot` as OpenMetrics text.
///
/// # Errors
/// Those of the encoder, which has none of its own when it writes to memory.
pub fn render(snapshot: &Snapshot<'_>) -> Result<String, fmt::Error> {
    let mut registry = Registry::with_prefix("ferry");
    let build = Info::new(vec![("version", snapshot.version.to_owned())]);
    registry.register("build", "The program", build);
    registry.register(
        "events_dropped",
        "Events dropped because the reader of the event monitor was too slow",
        ConstCounter::new(snapshot.events_dropped),
    );
    if let Some(vm) = &snapshot.vm {
        register_vm(&mut registry, vm);
    }
    if let Some(migration) = snapshot.migration {
        register_migration(registry.sub_registry_with_prefix("migration"), migration);
    }
    let mut text = String::new();
    encode(&mut text, &registry)?;
    Ok(text)
}

fn register_vm(registry: &mut Registry, vm: &VmSnapshot<'_>) {
    let state = Family::<StateLabels, UnsignedGauge>::default();
    for (known, name) in [
        (VmState::Created, "created"),
        (VmState::Running, "running"),
        (VmState::Paused, "paused"),
        (VmState::Shutdown, "shutdown"),
    ] {
        let labels = StateLabels { state: name };
        state
            .get_or_create(&labels)
            .set(u64::from(known == vm.state));
    }
    registry.register("vm_state", "1 for the state the VM is in", state);
    let vcpus = ConstGauge::new(vm.vcpus);
    registry.register("vm_vcpus", "Virtual CPUs", vcpus);
    let memory = ConstGauge::new(vm.memory_bytes);
    registry.register_with_unit("vm_memory", "Guest RAM", Unit::Bytes, memory);
    register_devices(registry, vm);
}

fn register_devices(registry: &mut Registry, vm: &VmSnapshot<'_>) {
    let counters = Family::<DeviceLabels, Counter>::default();
    let queues = Family::<QueueLabels, Counter>::default();
    for (device, values) in vm.counters {
        for (counter, value) in values {
            let device = device.clone();
            if let Some((queue, counter)) = split_queue_counter(counter) {
                let labels = QueueLabels {
                    device,
                    queue,
                    counter: counter.to_owned(),
                };
                queues.get_or_create(&labels).inc_by(*value);
            } else {
                let counter = counter.clone();
                let labels = DeviceLabels { device, counter };
                counters.get_or_create(&labels).inc_by(*value);
            }
        }
    }
    registry.register(
        "device",
        "Counters of the devices, as vm.counters has them",
        counters,
    );
    registry.register(
        "device_queue",
        "Counters of the devices' queue pairs; those of the devices are their sums",
        queues,
    );
    let facts = Family::<FactLabels, UnsignedGauge>::default();
    for (device, known) in vm.facts {
        for (fact, value) in known {
            let labels = FactLabels {
                device: device.clone(),
                fact: fact.clone(),
                value: value.clone(),
            };
            facts.get_or_create(&labels).set(1);
        }
    }
    registry.register(
        "device_fact",
        "1 for what is known of the devices, as vm.info has it",
        facts,
    );
}

fn register_migration(registry: &mut Registry, status: &MigrationStatus) {
    let (side, phase) = match &status.side {
        Side::Source(phase) => ("source", phase.name()),
        Side::Destination(phase) => ("destination", phase.name()),
    };
    let current = Family::<PhaseLabels, UnsignedGauge>::default();
    current.get_or_create(&PhaseLabels { side, phase }).set(1);
    registry.register("phase", "1 for the phase the migration is in", current);
    let counters = [
        (
            "rounds",
            "Rounds of memory completed",
            u64::from(status.rounds),
        ),
        ("wire_bytes", "Bytes sent or received", status.bytes),
        (
            "pages",
            "Pages sent or received, zero pages included",
            status.pages,
        ),
        ("zero_pages", "Pages found to be zero", status.zero_pages),
        (
            "device_bytes",
            "Bytes of device state sent or received",
            status.device_bytes,
        ),
    ];
    for (name, help, value) in counters {
        registry.register(name, help, ConstCounter::new(value));
    }
    let remaining = ConstGauge::new(status.remaining_pages);
    registry.register("remaining_pages", "Pages dirty and not yet sent", remaining);
    let dirty = Family::<SourceLabels, Counter>::default();
    for source in &status.sources {
        let labels = SourceLabels {
            source: source.id.clone(),
        };
        dirty.get_or_create(&labels).inc_by(source.total_pages);
    }
    registry.register("dirty_pages", "Pages each dirty source reported", dirty);
    if let Some(downtime) = &status.downtime {
        register_downtime(registry, downtime);
    }
}

fn register_downtime(registry: &mut Registry, downtime: &Downtime) {
    let parts = Family::<PartLabels, UnsignedGauge>::default();
    for (part, microseconds) in [
        ("pause_vcpus", downtime.pause_vcpus),
        ("quiesce", downtime.quiesce),
        ("stop", downtime.stop),
        ("final_sync", downtime.final_sync),
        ("memory", downtime.memory),
        ("device_state", downtime.device_state),
        ("destination_load", downtime.destination_load),
        ("commit", downtime.commit),
        ("total", downtime.total),
    ] {
        parts.get_or_create(&PartLabels { part }).set(microseconds);
    }
    registry.register(
        "downtime_microseconds",
        "How long the guest stood still, by part; total is not their sum where they overlap",
        parts,
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bare_process_has_metrics_too() {
        let text = render(&Snapshot {
            version: "1.2.3",
            vm: None,
            migration: None,
            events_dropped: 5,
        })
        .unwrap();
        assert!(
            text.contains("ferry_build_info{version=\"1.2.3\"} 1\n"),
            "{text}"
        );
        assert!(text.contains("ferry_events_dropped_total 5\n"), "{text}");
        assert!(text.ends_with("# EOF\n"));
        assert!(!text.contains("ferry_vm"));
    }

    #[test]
    fn a_migrating_vm_is_measured() {
        let mut counters = Counters::new();
        let nic = counters.entry("_net0".to_owned()).or_default();
        nic.insert("rx_bytes".to_owned(), 7);
        nic.insert("queue1_rx_bytes".to_owned(), 5);
        let mut facts = Facts::new();
        let nic = facts.entry("_net0".to_owned()).or_default();
        nic.insert("steering".to_owned(), "ebpf".to_owned());
        let json = r#"{"side": "source", "phase": {"name": "precopy", "round": 2}, "elapsed_ms": 1,
            "rounds": 1, "bytes": 99, "pages": 10, "zero_pages": 4, "memory_bytes": 1024,
            "device_bytes": 3, "remaining_pages": 12, "dirty_pages_per_second": null,
            "sources": [{"id": "kvm", "granularity": 4096, "precision": "exact", "last_pages": 1,
                         "total_pages": 77, "last_report_us": 12}],
            "bandwidth": null, "downtime_estimate_us": null,
            "downtime": {"pause_vcpus": 100, "quiesce": 0, "stop": 0, "final_sync": 0, "memory": 0,
                         "device_state": 0, "destination_load": 0, "commit": 0, "total": 42100},
            "aborted": null}"#;
        let status: MigrationStatus = serde_json::from_str(json).unwrap();
        let vm = VmSnapshot {
            state: VmState::Running,
            vcpus: 2,
            memory_bytes: 1 << 30,
            counters: &counters,
            facts: &facts,
        };
        let text = render(&Snapshot {
            version: "1",
            vm: Some(vm),
            migration: Some(&status),
            events_dropped: 0,
        })
        .unwrap();
        for line in [
            "ferry_vm_state{state=\"running\"} 1",
            "ferry_vm_state{state=\"paused\"} 0",
            "ferry_vm_vcpus 2",
            "ferry_vm_memory_bytes 1073741824",
            "ferry_device_total{device=\"_net0\",counter=\"rx_bytes\"} 7",
            "ferry_device_queue_total{device=\"_net0\",queue=\"1\",counter=\"rx_bytes\"} 5",
            "ferry_device_fact{device=\"_net0\",fact=\"steering\",value=\"ebpf\"} 1",
            "ferry_migration_phase{side=\"source\",phase=\"precopy\"} 1",
            "ferry_migration_wire_bytes_total 99",
            "ferry_migration_remaining_pages 12",
            "ferry_migration_dirty_pages_total{source=\"kvm\"} 77",
            "ferry_migration_downtime_microseconds{part=\"total\"} 42100",
        ] {
            assert!(
                text.contains(&format!("{line}\n")),
                "{line} is not in:\n{text}"
            );
        }
    }
}
