//! What the device has been told, and what follows from it for a packet.

use anyhow::{Context, ensure};
use test_packets::hash::{Key, Report};
use test_packets::{Flow, Random};

use super::plan::Step;
use crate::ethtool::{Interface, RXH_ADDRESSES, RXH_PORTS, weighted};

/// `VIRTIO_NET_F_HASH_REPORT` and `VIRTIO_NET_F_RSS` (VIRTIO 1.4 §5.1.3).
const F_HASH_REPORT: usize = 57;
const F_RSS: usize = 60;
/// Bytes of a key that ethtool sets.
const KEY_BYTES: usize = 40;

/// Which queue a packet comes by.
#[derive(Clone, PartialEq, Eq, Debug)]
enum Steering {
    /// Any of so many: the device chooses as it likes.
    Automatic(u32),
    /// That in the table at the hash; the first, if there is none.
    Table(Vec<u32>),
}

/// Hashes and steering.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Setting {
    /// The types of hash that are on.
    pub(super) types: u32,
    /// Whether the driver puts them into packets.
    pub(super) shown: bool,
    key: Key,
    steering: Steering,
}

impl Setting {
    /// What must be reported of a packet with this flow.
    pub(super) fn report(&self, flow: Option<&Flow>) -> Report {
        self.key.report(flow, self.types)
    }

    /// Whether a packet with this report may come by `queue`.
    pub(super) fn steers(&self, report: Report, queue: u32) -> bool {
        match &self.steering {
            Steering::Automatic(pairs) => queue < *pairs,
            // Linux names the first queue as that of unclassified packets.
            Steering::Table(_) if report.kind == 0 => queue == 0,
            Steering::Table(table) => {
                let at = usize::try_from(report.value).unwrap_or(0) % table.len().max(1);
                table.get(at) == Some(&queue)
            }
        }
    }
}

/// The interface, and what of its driver's settings cannot be asked for.
pub(super) struct Device {
    name: String,
    interface: Interface,
    has_reports: bool,
    has_rss: bool,
    /// The last command that chose the steering was one with a table.
    by_table: bool,
}

impl Device {
    pub(super) fn open(name: &str) -> anyhow::Result<Self> {
        let path = format!("/sys/class/net/{name}/device/features");
        let features = std::fs::read(&path).context(path)?;
        let has = |feature| features.get(feature) == Some(&b'1');
        Ok(Self {
            name: name.to_owned(),
            interface: Interface::new(name)?,
            has_reports: has(F_HASH_REPORT),
            has_rss: has(F_RSS),
            by_table: false,
        })
    }

    /// Its hardware address.
    pub(super) fn mac(&self) -> anyhow::Result<[u8; 6]> {
        let path = format!("/sys/class/net/{}/address", self.name);
        let text = std::fs::read_to_string(&path).with_context(|| path.clone())?;
        let bytes = text
            .trim()
            .split(':')
            .map(|byte| u8::from_str_radix(byte, 16));
        let bytes = bytes
            .collect::<Result<Vec<_>, _>>()
            .with_context(|| path.clone())?;
        ensure!(bytes.len() == 6, "{path}: {text}");
        let mut mac = [0; 6];
        mac.copy_from_slice(&bytes);
        Ok(mac)
    }

    /// Takes a step; what is set then, as the driver says.
    pub(super) fn apply(&mut self, step: &Step) -> anyhow::Result<Setting> {
        let interface = &self.interface;
        let before = interface.steering()?;
        // All but `-L` send the whole setting, table and all, and what is sent last counts.
        let mut by_table = self.has_rss;
        match step {
            Step::Rxhash(on) => interface
                .set_rxhash(*on)
                .context("was VIRTIO_NET_F_HASH_REPORT or VIRTIO_NET_F_RSS negotiated?")?,
            Step::Key(seed) => interface.set_key(&Random::new(*seed, 0).vec(KEY_BYTES))?,
            Step::Equal(queues) => {
                ensure!(*queues > 0, "no queues");
                let table: Vec<u32> = (0..*queues).cycle().take(before.table.len()).collect();
                interface.set_table(&table)?;
            }
            Step::Weight(weights) => {
                interface.set_table(&weighted(before.table.len(), weights)?)?
            }
            Step::Flow(kind, ports) => {
                interface.set_flow(kind, RXH_ADDRESSES | if *ports { RXH_PORTS } else { 0 })?;
            }
            Step::Pairs(pairs) => {
                interface.set_pairs(*pairs)?;
                // A driver that leaves the table as it was has sent the number of pairs alone, and the device chooses
                // the queues again; one that makes a new table has sent that.
                by_table = self.has_rss && interface.steering()?.table != before.table;
            }
        }
        self.by_table = by_table;
        self.setting()
    }

    fn setting(&self) -> anyhow::Result<Setting> {
        let steering = self.interface.steering()?;
        let on = self
            .interface
            .rxhash()
            .context("asking whether hashes are on")?;
        ensure!(
            !self.by_table || !steering.table.is_empty(),
            "RSS without a table"
        );
        Ok(Setting {
            types: if on { self.interface.types()? } else { 0 },
            shown: on && self.has_reports,
            key: Key::new(&steering.key),
            steering: if self.by_table {
                Steering::Table(steering.table)
            } else {
                Steering::Automatic(self.interface.pairs()?)
            },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_names_the_queue_of_each_packet() {
        let setting = |steering| Setting {
            types: 0x3f,
            shown: true,
            key: Key::new(&[]),
            steering,
        };
        let by_table = setting(Steering::Table(vec![3, 2, 1, 0]));
        let report = |kind, value| Report { kind, value };
        assert!(by_table.steers(report(1, 0), 3) && by_table.steers(report(1, 5), 2));
        assert!(!by_table.steers(report(1, 5), 3));
        assert!(by_table.steers(report(0, 0), 0) && !by_table.steers(report(0, 0), 3));
        let automatic = setting(Steering::Automatic(2));
        assert!(automatic.steers(report(1, 5), 0) && automatic.steers(report(1, 5), 1));
        assert!(!automatic.steers(report(1, 5), 2));
    }
}
