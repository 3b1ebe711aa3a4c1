//! What came out, for people and for programs.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};
use vm_migration::migrate::{DeviceDowntime, MigrationStatus};

use crate::traffic::TrafficCounts;

/// Packets that may be in flight or in a queue besides those sent while nobody listened: a burst
/// of the generator, twice.
const IN_FLIGHT: u64 = 128;

/// What the guest found.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GuestOutcome {
    /// `native`, or `linux` with its kernel.
    pub kind: String,
    /// Guest RAM.
    pub memory_mib: u64,
    /// Pages whose every byte was checked at the destination.
    pub pages_verified: u64,
    /// Of them, those that were wrong.
    pub pages_corrupt: u64,
    /// The longest the guest stood still by its own clock, in ms.
    pub max_gap_ms: f64,
}

/// What the VMM says of the migration.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MigrationOutcome {
    /// Rounds of memory.
    pub rounds: u32,
    /// From the request until the guest ran at the destination, in ms.
    pub total_ms: u64,
    /// How long the guest was stopped, in ms.
    pub downtime_ms: f64,
    /// Bytes sent.
    pub bytes: u64,
    /// Pages that each writer of guest memory dirtied meanwhile.
    pub dirty_pages: BTreeMap<String, u64>,
    /// What each device took of the downtime.
    pub devices: Vec<DeviceDowntime>,
}

/// The hashes that the guest found in received packets.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct HashOutcome {
    /// Packets with room for a hash.
    pub packets: u64,
    /// Those whose hash is the one computed independently.
    pub matched: u64,
    /// Those whose hash is not.
    pub mismatched: u64,
    /// Who computes the hashes: `software`, or the host's tap.
    pub backend: String,
}

/// Packets through all NICs.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct NicOutcome {
    /// Sent by the host.
    pub sent: u64,
    /// Received by the guest and, where it echoes, seen again.
    pub received: u64,
    /// The others.
    pub lost: u64,
}

/// An outcome with what people are told besides, for a demo that runs in another.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Full {
    /// The outcome.
    pub outcome: Outcome,
    /// [`Outcome::problems`].
    pub problems: Vec<String>,
    /// [`Outcome::notes`].
    pub notes: Vec<String>,
}

impl From<Outcome> for Full {
    fn from(outcome: Outcome) -> Self {
        Self {
            problems: outcome.problems.clone(),
            notes: outcome.notes.clone(),
            outcome,
        }
    }
}

impl From<Full> for Outcome {
    fn from(full: Full) -> Self {
        Self {
            problems: full.problems,
            notes: full.notes,
            ..full.outcome
        }
    }
}

/// Everything.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    /// What the guest found.
    pub guest: GuestOutcome,
    /// What the VMM says of the migration.
    pub migration: MigrationOutcome,
    /// Hashes of received packets.
    pub hash: HashOutcome,
    /// Packets.
    pub nic: NicOutcome,
    /// The same with a stock Linux guest in the lab, where this machine's KVM cannot run one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lab: Option<Box<Outcome>>,
    /// What must not be, one line each; empty in a good run. Told on standard error.
    #[serde(skip)]
    pub problems: Vec<String>,
    /// Further lines for people.
    #[serde(skip)]
    pub notes: Vec<String>,
}

impl MigrationOutcome {
    /// From the source's last status.
    pub fn new(status: &MigrationStatus) -> Self {
        Self {
            rounds: status.rounds,
            total_ms: status.elapsed_ms,
            downtime_ms: ms(status
                .downtime
                .as_ref()
                .map_or(0, |downtime| downtime.total)),
            bytes: status.bytes,
            dirty_pages: status
                .sources
                .iter()
                .map(|source| (source.id.clone(), source.total_pages))
                .collect(),
            devices: status
                .downtime
                .as_ref()
                .map_or_else(Vec::new, |downtime| downtime.devices.clone()),
        }
    }
}

/// Milliseconds with one digit.
pub fn ms(us: u64) -> f64 {
    let tenths = u32::try_from(us / 100).unwrap_or(u32::MAX);
    f64::from(tenths) / 10.0
}

/// A number of bytes for people.
pub fn bytes(count: u64) -> String {
    const UNITS: [&str; 4] = ["KiB", "MiB", "GiB", "TiB"];
    let mut tenths = count.saturating_mul(10) / 1024;
    let mut unit = 0;
    while tenths >= 10_240 && unit + 1 < UNITS.len() {
        tenths /= 1024;
        unit += 1;
    }
    format!(
        "{}.{} {}",
        tenths / 10,
        tenths % 10,
        UNITS.get(unit).copied().unwrap_or_default()
    )
}

/// A number with its thousands apart.
pub fn thousands(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// The most packets of a flow that may be lost while its link moves: those sent in the longest
/// silence, and those in flight.
pub fn explained_loss(packets_per_second: u32, silence_ms: u64) -> u64 {
    u64::from(packets_per_second)
        .saturating_mul(silence_ms)
        .div_ceil(1000)
        .saturating_add(IN_FLIGHT)
}

/// What is wrong with the packets of one NIC, if anything.
pub fn traffic_problem(nic: &str, rate: u32, counts: &TrafficCounts) -> Option<String> {
    let silence = u64::try_from(counts.max_gap.as_millis()).unwrap_or(u64::MAX);
    let explained = explained_loss(rate, silence);
    if counts.bad != 0 {
        return Some(format!("{nic}: {} packets came back changed", counts.bad));
    }
    if counts.received == 0 {
        return Some(format!("{nic}: no packet came back"));
    }
    (counts.lost() > explained).then(|| {
        format!(
            "{nic}: {} packets were lost; the link's move ({silence} ms of silence) explains at \
             most {explained}",
            counts.lost()
        )
    })
}

impl Outcome {
    /// Everything that must not be, the lab's part included.
    pub fn all_problems(&self) -> Vec<String> {
        let mut all = self.problems.clone();
        let numbers = [
            (self.guest.pages_corrupt, "pages are corrupt"),
            (self.hash.mismatched, "hashes are wrong"),
        ];
        for (count, what) in numbers {
            if count != 0 {
                all.push(format!("{count} {what}"));
            }
        }
        if self.guest.pages_verified == 0 {
            all.push("no page was verified".to_owned());
        }
        if self.hash.matched == 0 {
            all.push("no packet had a right hash".to_owned());
        }
        if let Some(lab) = &self.lab {
            all.extend(
                lab.all_problems()
                    .into_iter()
                    .map(|problem| format!("in the lab: {problem}")),
            );
        }
        all
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            guest,
            migration,
            hash,
            nic,
            ..
        } = self;
        writeln!(
            out,
            "A running guest ({}) moved from one Ferry process to another, with both its NICs.",
            guest.kind
        )?;
        writeln!(
            out,
            "  memory     {} MiB; {} pages checked byte by byte at the destination, {} wrong",
            guest.memory_mib,
            thousands(guest.pages_verified),
            guest.pages_corrupt
        )?;
        writeln!(
            out,
            "  migration  {} in {} ms and {} rounds of memory",
            bytes(migration.bytes),
            thousands(migration.total_ms),
            migration.rounds
        )?;
        writeln!(
            out,
            "  downtime   {} ms as Ferry counts it; the guest's own clock stood still for {} ms at most",
            migration.downtime_ms, guest.max_gap_ms
        )?;
        for device in migration.devices.iter().filter(|device| device.read > 0) {
            writeln!(
                out,
                "             {}: {} ms to come to rest, {} to stop, {} to read, {} to send, {} to load",
                device.id,
                ms(device.quiesce),
                ms(device.stop),
                ms(device.read),
                ms(device.send),
                ms(device.load)
            )?;
        }
        let dirtied: Vec<String> = migration
            .dirty_pages
            .iter()
            .map(|(id, pages)| format!("{id} {}", thousands(*pages)))
            .collect();
        writeln!(
            out,
            "  written    meanwhile, in pages, by {}",
            dirtied.join(", ")
        )?;
        writeln!(
            out,
            "  packets    {} sent through both NICs, {} arrived, {} lost",
            thousands(nic.sent),
            thousands(nic.received),
            thousands(nic.lost)
        )?;
        writeln!(
            out,
            "  hashes     {} packets came with a hash by {}: {} as computed independently, {} not",
            thousands(hash.packets),
            hash.backend,
            thousands(hash.matched),
            hash.mismatched
        )?;
        for note in &self.notes {
            writeln!(out, "             {note}")?;
        }
        if let Some(lab) = &self.lab {
            writeln!(
                out,
                "\nThis machine's KVM runs no stock Linux guest; in the lab (an emulated host):\n{lab}"
            )?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn counts(sent: u64, received: u64, gap_ms: u64) -> TrafficCounts {
        TrafficCounts {
            sent,
            received,
            max_gap: Duration::from_millis(gap_ms),
            ..TrafficCounts::default()
        }
    }

    #[test]
    fn loss_is_explained_by_silence_only() {
        assert_eq!(traffic_problem("a", 1000, &counts(5000, 4900, 20)), None);
        assert_eq!(traffic_problem("a", 1000, &counts(5000, 4500, 400)), None);
        assert!(traffic_problem("a", 1000, &counts(5000, 4500, 20)).is_some());
        assert!(traffic_problem("a", 1000, &counts(100, 0, 0)).is_some());
        let mut changed = counts(100, 100, 0);
        changed.bad = 1;
        assert!(traffic_problem("a", 1000, &changed).is_some());
    }

    #[test]
    fn numbers_are_readable() {
        assert_eq!(thousands(1_234_567), "1,234,567");
        assert_eq!(thousands(12), "12");
        assert_eq!(bytes(1 << 30), "1.0 GiB");
        assert_eq!(bytes(1536), "1.5 KiB");
        assert!((ms(23_456) - 23.4).abs() < 1e-9);
    }

    #[test]
    fn json_has_exactly_the_documented_keys() {
        let outcome = sample();
        let value = serde_json::to_value(&outcome).unwrap();
        let keys: Vec<&String> = value.as_object().unwrap().keys().collect();
        assert_eq!(keys, ["guest", "hash", "migration", "nic"]);
        assert_eq!(value["migration"]["dirty_pages"]["vcpus"], 7);
        assert!(outcome.all_problems().is_empty());
        assert!(outcome.to_string().contains("net1: 0 ms to come to rest"));
    }

    #[test]
    fn each_kind_of_damage_is_a_problem() {
        for damage in [
            |outcome: &mut Outcome| outcome.guest.pages_corrupt = 1,
            |outcome: &mut Outcome| outcome.guest.pages_verified = 0,
            |outcome: &mut Outcome| outcome.hash.mismatched = 1,
            |outcome: &mut Outcome| outcome.hash.matched = 0,
            |outcome: &mut Outcome| outcome.problems.push("x".to_owned()),
        ] {
            let mut outcome = sample();
            damage(&mut outcome);
            assert_eq!(outcome.all_problems().len(), 1);
            let mut whole = sample();
            whole.lab = Some(Box::new(outcome));
            assert_eq!(whole.all_problems().len(), 1);
        }
    }

    fn sample() -> Outcome {
        Outcome {
            guest: GuestOutcome {
                kind: "native".to_owned(),
                memory_mib: 64,
                pages_verified: 100,
                pages_corrupt: 0,
                max_gap_ms: 1.5,
            },
            migration: MigrationOutcome {
                rounds: 2,
                total_ms: 100,
                downtime_ms: 5.0,
                bytes: 1 << 20,
                dirty_pages: BTreeMap::from([("vcpus".to_owned(), 7)]),
                devices: vec![DeviceDowntime {
                    id: "net1".to_owned(),
                    read: 1200,
                    ..DeviceDowntime::default()
                }],
            },
            hash: HashOutcome {
                packets: 10,
                matched: 10,
                mismatched: 0,
                backend: "software".to_owned(),
            },
            nic: NicOutcome::default(),
            lab: None,
            problems: Vec::new(),
            notes: Vec::new(),
        }
    }
}
