//! What a network card counts, by name.

use std::collections::BTreeMap;

use net_util::hash::HashReport;
use virtio_devices::net::NetTotals;

use crate::api::queue_counter;

/// The counters by name of a card with these queue pairs: its own and those of each pair.
pub(in crate::machine) fn counters(
    pairs: impl Iterator<Item = NetTotals>,
) -> BTreeMap<String, u64> {
    let mut all = BTreeMap::new();
    let pairs: Vec<NetTotals> = pairs.collect();
    let totals: NetTotals = pairs.iter().copied().sum();
    for (name, value) in [
        ("hashed", totals.hashed()),
        ("announcements", totals.announcements),
    ] {
        all.insert(name.to_owned(), value);
    }
    // Without hash reports, counters of them would only be in the way.
    let reports = totals.hash_reports.iter().any(|count| *count > 0);
    all.extend(named(&totals, reports));
    for (queue, pair) in pairs.iter().enumerate() {
        let named = named(pair, reports);
        all.extend(named.map(|(name, value)| (queue_counter(queue, &name), value)));
    }
    all
}

/// What is counted for each queue pair and for the card.
fn named(totals: &NetTotals, reports: bool) -> impl Iterator<Item = (String, u64)> {
    let counters = [
        ("rx_frames", totals.rx_packets),
        ("rx_bytes", totals.rx_bytes),
        ("rx_dropped", totals.rx_dropped),
        ("rx_handed_over", totals.rx_handed_over),
        ("rx_hand_over_dropped", totals.rx_hand_over_dropped),
        ("tx_frames", totals.tx_packets),
        ("tx_bytes", totals.tx_bytes),
        ("tx_dropped", totals.tx_dropped),
    ];
    let counters = counters.into_iter();
    let counters = counters.map(|(name, value)| (name.to_owned(), value));
    let by_type = HashReport::ALL.into_iter().zip(totals.hash_reports);
    let by_type = by_type.filter(move |_| reports);
    counters.chain(by_type.map(|(report, count)| (format!("hash_{}", report.name()), count)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_card_and_each_of_its_queues_are_counted_by_name() {
        let pair = |rx_packets, udp| NetTotals {
            rx_packets,
            rx_dropped: 1,
            hash_reports: [2, 0, 0, udp, 0, 0, 0, 0, 0, 0],
            ..NetTotals::default()
        };
        let all = counters([pair(10, 8), pair(20, 0)].into_iter());
        for (name, value) in [
            ("rx_frames", 30),
            ("queue0_rx_frames", 10),
            ("queue1_rx_frames", 20),
            ("rx_dropped", 2),
            ("queue1_rx_dropped", 1),
            ("hashed", 8),
            ("hash_none", 4),
            ("hash_udpv4", 8),
            ("queue0_hash_udpv4", 8),
            ("queue1_hash_none", 2),
            ("queue1_hash_udp_ex", 0),
        ] {
            assert_eq!(all.get(name), Some(&value), "{name}");
        }
    }

    #[test]
    fn a_card_that_reports_no_hashes_does_not_list_their_types() {
        let all = counters([NetTotals::default()].into_iter());
        assert_eq!(all.get("queue0_rx_bytes"), Some(&0));
        assert!(!all.keys().any(|name| name.contains("hash_")), "{all:?}");
    }
}
