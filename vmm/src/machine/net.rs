//! Network cards of a machine, on taps and on vhost-user backends.

use std::collections::BTreeMap;
use std::num::NonZeroU16;
use std::path::PathBuf;
use std::sync::Arc;

use net_util::hash::HashTypes;
use net_util::tap::{Tap, TapName};
use virtio_devices::net::{Net, NetBackend, NetOptions, NetTotals};
use virtio_devices::{VhostUserNet, VhostUserOptions};

use super::devices::{Board, VirtioFunction, function};
use super::{Host, MachineError};
use crate::config::NetConfig;
use crate::inherited;
use crate::notice::ExitReason;

/// The kind of a card on a tap.
pub const TAP: &str = "virtio-net";
/// The kind of a card whose queues another process serves.
pub(super) const VHOST_USER: &str = "vhost-user-net";

/// The card of `config`.
pub(super) fn card(
    config: &NetConfig,
    host: &Host,
    board: &Board<'_>,
) -> Result<VirtioFunction, MachineError> {
    if let Some(socket) = config.vhost_socket.as_ref().filter(|_| config.vhost_user) {
        let net = on_backend(config, socket.clone(), host)?;
        let vhost = Some(net.handle());
        let function = function(VHOST_USER, Box::new(net), None, host, board)?;
        return Ok(VirtioFunction { vhost, ..function });
    }
    let net = on_tap(config)?;
    let counters = net.counters();
    let function = function(TAP, Box::new(net), Some(counters), host, board)?;
    let hashes = config.reports_hashes() || config.rss;
    Ok(VirtioFunction {
        offer: Some(NetOffer {
            pairs: config.queue_pairs(),
            hash_types: hashes.then(|| config.offered_hash_types()),
        }),
        ..function
    })
}

/// What a card on a tap offers its driver besides features.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NetOffer {
    /// Queue pairs.
    pub pairs: u16,
    /// Types of hashes, if hashes are offered.
    pub hash_types: Option<HashTypes>,
}

/// A card on the vhost-user backend that listens on `socket`.
fn on_backend(
    config: &NetConfig,
    socket: PathBuf,
    host: &Host,
) -> Result<VhostUserNet, MachineError> {
    let id = config.id.clone();
    let (exits, gone) = (host.exits.clone(), id.clone());
    let on_lost = Box::new(move |reason: &str| {
        exits.send(ExitReason::DeviceLost {
            id: gone,
            reason: reason.to_owned(),
        });
    });
    let options = VhostUserOptions {
        id: id.clone(),
        socket,
        mac: config.mac.map(|mac| mac.0).unwrap_or_default(),
        mtu: config.mtu,
        pairs: config.queue_pairs(),
        queue_size: config.queue_size,
    };
    VhostUserNet::connect(options, &host.spawner, on_lost).map_err(MachineError::device(&id))
}

/// A card on a tap.
fn on_tap(config: &NetConfig) -> Result<Net, MachineError> {
    let id = &config.id;
    let pairs = NonZeroU16::new(config.num_queues / 2).unwrap_or(NonZeroU16::MIN);
    let tap = match &config.tap {
        Some(name) => {
            let name = TapName::new(name).map_err(MachineError::device(id))?;
            let tap = Tap::open(&name, pairs).map_err(MachineError::device(id))?;
            tap.set_up().map_err(MachineError::device(id))?;
            tap
        }
        None => {
            let fds = config
                .fds
                .iter()
                .map(|fd| inherited::duplicate(*fd))
                .collect::<Result<Vec<_>, _>>()
                .map_err(MachineError::device(id))?;
            Tap::from_fds(fds).map_err(MachineError::device(id))?
        }
    };
    let mut backends: Vec<Arc<dyn NetBackend>> = Vec::new();
    for queue in tap.into_queues() {
        backends.push(Arc::new(queue));
    }
    let options = NetOptions {
        id: id.clone(),
        mac: config.mac.map(|mac| mac.0).unwrap_or_default(),
        mtu: config.mtu,
        queue_size: config.queue_size,
        offloads: true,
        hash_report: config.reports_hashes(),
        rss: config.rss,
        hash_types: config.offered_hash_types(),
    };
    Net::new(options, backends).map_err(MachineError::device(id))
}

/// A card's counters by name.
pub(super) fn counters(totals: &NetTotals) -> BTreeMap<String, u64> {
    let named = [
        ("rx_frames", totals.rx_packets),
        ("rx_bytes", totals.rx_bytes),
        ("rx_dropped", totals.rx_dropped),
        ("rx_handed_over", totals.rx_handed_over),
        ("rx_hand_over_dropped", totals.rx_hand_over_dropped),
        ("tx_frames", totals.tx_packets),
        ("tx_bytes", totals.tx_bytes),
        ("tx_dropped", totals.tx_dropped),
        ("hashed", totals.hashed()),
        ("announcements", totals.announcements),
    ];
    named
        .into_iter()
        .map(|(name, value)| (name.to_owned(), value))
        .collect()
}
