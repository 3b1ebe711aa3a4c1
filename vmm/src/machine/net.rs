//! Network cards of a machine, on taps and on vhost-user backends.

mod counters;

use std::collections::BTreeMap;
use std::num::NonZeroU16;
use std::path::PathBuf;
use std::sync::Arc;

use event_monitor::Event;
use net_util::hash::HashTypes;
use net_util::tap::{HashAbi, Tap, TapName, TapQueue};
use virtio_devices::net::{Net, NetBackend, NetOptions, OffloadWatch, QueueSteering, TapSteering};
use virtio_devices::{KernelHelp, VhostUserNet, VhostUserOptions};
use vm_migration::ErrorChain;

use super::devices::{Board, VirtioFunction, function};
use super::{Host, MachineError};
use crate::config::{HashBackend, NetConfig};
use crate::inherited;
use crate::notice::ExitReason;
pub(super) use counters::counters;

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
    let net = on_tap(config, host)?;
    let (counters, offload) = (net.counters(), net.offload());
    let function = function(TAP, Box::new(net), Some(counters), host, board)?;
    let hashes = config.reports_hashes() || config.rss;
    let offer = NetOffer {
        pairs: config.queue_pairs(),
        hash_types: hashes.then(|| config.offered_hash_types()),
    };
    Ok(VirtioFunction {
        net: Some(NetFunction { offer, offload }),
        ..function
    })
}

/// What is known of a network card on a tap.
#[derive(Clone, Debug)]
pub struct NetFunction {
    /// For a migration's manifest.
    pub offer: NetOffer,
    /// What the kernel does for it.
    pub offload: OffloadWatch,
}

impl NetFunction {
    /// Who hashes and steers, for `vm.info`, if hashes are offered.
    pub(super) fn facts(&self) -> Option<BTreeMap<String, String>> {
        self.offer.hash_types?;
        let status = self.offload.status();
        let facts = [
            ("hash_backend", status.hashes.to_string()),
            ("steering", status.steering.to_string()),
            ("hash_backend_reason", status.why),
        ];
        let told = facts.into_iter().filter(|(_, fact)| !fact.is_empty());
        Some(told.map(|(name, fact)| (name.to_owned(), fact)).collect())
    }
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
fn on_tap(config: &NetConfig, host: &Host) -> Result<Net, MachineError> {
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
    let queues: Vec<_> = tap.into_queues().into_iter().map(Arc::new).collect();
    let first = queues.first().cloned();
    let backends = queues
        .into_iter()
        .map(|queue| queue as Arc<dyn NetBackend>)
        .collect();
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
    let net = Net::new(options, backends).map_err(MachineError::device(id))?;
    Ok(match kernel_help(config, first, host)? {
        Some(help) => net.with_kernel_help(help),
        None => net,
    })
}

/// What the kernel may be asked to do for the card of `config`: nothing where it has no choice of
/// queues, or is not to be asked.
fn kernel_help(
    config: &NetConfig,
    queue: Option<Arc<TapQueue>>,
    host: &Host,
) -> Result<Option<KernelHelp>, MachineError> {
    let id = &config.id;
    let required = match config.hash_backend {
        HashBackend::Software => return Ok(None),
        HashBackend::Auto if !config.rss || config.queue_pairs() < 2 => return Ok(None),
        HashBackend::Auto => false,
        HashBackend::Kernel => true,
    };
    let abi = match HashAbi::probe() {
        Ok(HashAbi::None) if required => return Err(MachineError::device(id)(NoKernelHash)),
        Ok(abi) => abi,
        Err(error) if required => return Err(MachineError::device(id)(error)),
        Err(error) => {
            // A card on descriptors works without a way to open taps.
            tracing::debug!(%error, "what the kernel's taps hash is not known");
            HashAbi::None
        }
    };
    let (events, card) = (host.events.clone(), id.clone());
    let program = queue.map(TapSteering::load).transpose();
    let steering = match program {
        Ok(Some(program)) => Ok(Box::new(program) as Box<dyn QueueSteering>),
        Ok(None) => Err("the card has no queue".to_owned()),
        Err(error) => Err(ErrorChain(&error).to_string()),
    };
    Ok(Some(KernelHelp {
        abi,
        steering,
        on_mistrust: Box::new(move |reason| {
            events.tell(Event::HashBackendFallback {
                id: card.clone(),
                reason: reason.to_owned(),
            });
        }),
    }))
}

/// The host's kernel cannot hash, and nothing else will do.
#[derive(Debug, thiserror::Error)]
#[error(
    "hash_backend=kernel, but the taps of this kernel cannot hash (no released kernel's can): use \
     hash_backend=auto"
)]
struct NoKernelHash;
