//! What devices count, and how their queues' counters are called.

use std::collections::BTreeMap;

/// Counters by device id (`vcpus` for the vCPUs), then by counter name.
///
/// Those of a network card's queue pairs are beside the card's own, which are their sums, under
/// the names that [`queue_counter`] gives them.
pub type Counters = BTreeMap<String, BTreeMap<String, u64>>;

/// Facts about devices: by device id, then by what it is about.
pub type Facts = BTreeMap<String, BTreeMap<String, String>>;

/// What counter `name` of queue pair `queue` is called among a device's counters.
///
/// ```
/// assert_eq!(vmm::api::queue_counter(3, "rx_bytes"), "queue3_rx_bytes");
/// ```
pub fn queue_counter(queue: usize, name: &str) -> String {
    format!("queue{queue}_{name}")
}

/// The queue pair and the counter's name in it; `None` if `name` is of the whole device.
///
/// ```
/// assert_eq!(vmm::api::split_queue_counter("queue3_rx_bytes"), Some((3, "rx_bytes")));
/// assert_eq!(vmm::api::split_queue_counter("rx_bytes"), None);
/// ```
pub fn split_queue_counter(name: &str) -> Option<(usize, &str)> {
    let (queue, name) = name.strip_prefix("queue")?.split_once('_')?;
    Some((queue.parse().ok()?, name))
}
