//! From what the migration engine tells to what the event monitor writes.

use event_monitor::{Event, EventMonitor};
use vm_migration::migrate::{DestinationPhase, MigrationEvent, Side, SourcePhase};

/// Tells `monitor` what the engine told. Never blocks, as the engine demands.
///
/// Each phase is told, and each end: `migration-finished` or `-failed` at the source,
/// `migration-receive-finished` or `-failed` at the destination. That a migration begins the engine
/// does not tell: whoever starts it tells `migration-started`, `migration-receive-ready` or
/// `migration-receive-started`.
pub fn tell(monitor: &EventMonitor, event: &MigrationEvent) {
    match event {
        MigrationEvent::Round(round) => monitor.tell(Event::MigrationMemoryIteration {
            id: round.round.into(),
            bytes: round.wire_bytes,
            dirty_pages: round.dirty_pages,
            took_ms: round.took_us / 1000,
        }),
        MigrationEvent::DirtyLogRestarted { source, why } => {
            monitor.tell(Event::MigrationDirtyLogRestarted {
                id: source.clone(),
                reason: why.clone(),
            });
        }
        MigrationEvent::DeviceReset { device, why } => {
            monitor.tell(Event::MigrationDeviceReset {
                id: device.clone(),
                reason: why.clone(),
            });
        }
        MigrationEvent::Phase(side) => {
            let (end, phase) = match side {
                Side::Source(phase) => (event_monitor::Side::Source, phase.name()),
                Side::Destination(phase) => (event_monitor::Side::Destination, phase.name()),
            };
            monitor.tell(Event::MigrationPhase {
                side: end,
                phase: phase.into(),
            });
            if let Some(outcome) = outcome(side) {
                monitor.tell(outcome);
            }
        }
    }
}

/// The event that says that a migration is over, if `side` is in its last phase.
fn outcome(side: &Side) -> Option<Event> {
    match side {
        Side::Source(SourcePhase::Done) => Some(Event::MigrationFinished),
        Side::Source(SourcePhase::Aborted { why }) => Some(Event::MigrationFailed {
            reason: why.clone(),
        }),
        Side::Source(
            SourcePhase::Preflight
            | SourcePhase::Setup
            | SourcePhase::Precopy { .. }
            | SourcePhase::Switchover
            | SourcePhase::Finalize,
        ) => None,
        Side::Destination(DestinationPhase::Running) => Some(Event::MigrationReceiveFinished),
        Side::Destination(DestinationPhase::Aborted { why }) => {
            Some(Event::MigrationReceiveFailed {
                reason: why.clone(),
            })
        }
        Side::Destination(
            DestinationPhase::Listening
            | DestinationPhase::Prepared
            | DestinationPhase::Loading
            | DestinationPhase::Ready,
        ) => None,
    }
}

#[cfg(test)]
mod tests {
    use vm_migration::migrate::RoundReport;

    use super::*;

    #[test]
    fn phases_rounds_and_ends_are_told() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let (monitor, writer) = EventMonitor::new(file.reopen().unwrap());
        let aborted = SourcePhase::Aborted {
            why: "cut".to_owned(),
        };
        let round = RoundReport {
            round: 1,
            memory_bytes: 8192,
            zero_bytes: 4096,
            wire_bytes: 5000,
            took_us: 7999,
            dirty_pages: 3,
            sources: Vec::new(),
            bandwidth: None,
            downtime_estimate_us: 1,
        };
        for event in [
            MigrationEvent::Phase(Side::Source(SourcePhase::Precopy { round: 1 })),
            MigrationEvent::Round(round),
            MigrationEvent::DirtyLogRestarted {
                source: "nic0".to_owned(),
                why: "EIO".to_owned(),
            },
            MigrationEvent::DeviceReset {
                device: "nic1".to_owned(),
                why: "EBUSY".to_owned(),
            },
            MigrationEvent::Phase(Side::Source(aborted)),
            MigrationEvent::Phase(Side::Destination(DestinationPhase::Running)),
        ] {
            tell(&monitor, &event);
        }
        drop(monitor);
        writer.run();
        let text = std::fs::read_to_string(file.path()).unwrap();
        let told: Vec<String> = text
            .lines()
            .map(|line| {
                let line: serde_json::Value = serde_json::from_str(line).unwrap();
                format!("{} {}", line["event"].as_str().unwrap(), line["properties"])
            })
            .collect();
        assert_eq!(
            told,
            [
                r#"migration-phase {"phase":"precopy","side":"source"}"#,
                r#"migration-memory-iteration {"bytes":"5000","dirty_pages":"3","id":"1","took_ms":"7"}"#,
                r#"migration-dirty-log-restarted {"id":"nic0","reason":"EIO"}"#,
                r#"migration-device-reset {"id":"nic1","reason":"EBUSY"}"#,
                r#"migration-phase {"phase":"aborted","side":"source"}"#,
                r#"migration-failed {"reason":"cut"}"#,
                r#"migration-phase {"phase":"running","side":"destination"}"#,
                "migration-receive-finished null",
            ]
        );
    }
}
