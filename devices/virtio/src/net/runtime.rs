//! What the driver sets at runtime, shared by the device, its control queue and its workers.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use net_util::config::{STATUS_ANNOUNCE, STATUS_LINK_UP};
use net_util::ctrl::RssConfig;
use net_util::hash::HashConfig;
use net_util::tap::Offloads;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use super::backend::NetBackend;
use super::ctrl::{Command, Refusal, Target};
use super::exchange::{Batch, Exchange};
use super::header::ClassifierCell;
use super::offload::{HashedBy, KernelHelp, Offload, Wish};

/// What is hashed and who chooses the queue; the last command that set either holds.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(super) enum Hashing {
    /// The host chooses the queue; hashes are only reported.
    Automatic(HashConfig),
    /// The driver's table does, by the hash.
    Table(RssConfig),
}

impl Hashing {
    /// What is hashed.
    pub(super) fn config(&self) -> &HashConfig {
        match self {
            Self::Automatic(config) => config,
            Self::Table(table) => table.hash(),
        }
    }
}

impl Default for Hashing {
    fn default() -> Self {
        Self::Automatic(HashConfig::default())
    }
}

/// Everything the driver sets; the default is the state after a reset.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(super) struct Runtime {
    /// Queue pairs in use.
    pub(super) pairs: u16,
    /// Offloads the driver chose by command, as feature bits; else those negotiated hold.
    pub(super) offloads: Option<u64>,
    /// What is hashed, and why.
    pub(super) hashing: Hashing,
    /// The driver has been asked to announce itself and has not yet done so.
    pub(super) announce: bool,
}

impl Default for Runtime {
    fn default() -> Self {
        Self {
            pairs: 1,
            offloads: None,
            hashing: Hashing::default(),
            announce: false,
        }
    }
}

/// The link status field of a card's configuration; `announce` asks the driver to announce the guest
/// (virtio 1.2, section 5.1.4).
pub(crate) fn link_status(announce: bool) -> u16 {
    if announce {
        STATUS_LINK_UP | STATUS_ANNOUNCE
    } else {
        STATUS_LINK_UP
    }
}

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
#[error("{operation}: {cause}")]
struct HostError {
    /// What was tried.
    operation: &'static str,
    /// What the host said.
    #[source]
    cause: io::Error,
}

/// The driver that is served.
#[derive(Clone, Copy, Debug, Default)]
struct Served {
    /// Hashes are reported to it.
    report: bool,
    /// Workers hand packets to each other.
    hands_over: bool,
    /// Queues of the interface that are attached; 0 if that is not known.
    attached: u16,
}

/// The runtime settings and what they act on.
pub(super) struct Shared {
    backends: Vec<Arc<dyn NetBackend>>,
    runtime: Mutex<Runtime>,
    pub(super) classifier: Arc<ClassifierCell>,
    /// The kernel's help, if it is to be asked.
    offload: Mutex<Option<Offload>>,
    /// What the driver that is served negotiated.
    served: Mutex<Served>,
    /// The way of packets from one pair to another, if RSS is offered.
    pub(super) exchange: Option<Arc<Exchange>>,
    /// While the workers do not run: packets that were read and not delivered, by pair.
    waiting: Mutex<BTreeMap<u16, Batch>>,
}

impl Shared {
    pub(super) fn new(backends: Vec<Arc<dyn NetBackend>>, exchange: Option<Arc<Exchange>>) -> Self {
        let runtime = Runtime::default();
        Self {
            backends,
            classifier: Arc::new(ClassifierCell::new(&runtime.hashing, runtime.pairs)),
            runtime: Mutex::new(runtime),
            offload: Mutex::new(None),
            served: Mutex::default(),
            exchange,
            waiting: Mutex::default(),
        }
    }

    pub(super) fn backends(&self) -> &[Arc<dyn NetBackend>] {
        &self.backends
    }

    pub(super) fn runtime(&self) -> Runtime {
        self.runtime.lock().clone()
    }

    /// Has the kernel help from the next activation on.
    pub(super) fn set_help(&self, help: KernelHelp) {
        self.classifier.trust.tell(help.on_mistrust);
        *self.offload.lock() = Some(Offload::new(help.abi, help.steering));
    }

    /// Tells the kernel that it is not to help.
    pub(super) fn decline_help(&self) {
        if let (Some(offload), Some(first)) = (self.offload.lock().as_mut(), self.backends.first())
        {
            offload.clear(first.as_ref());
        }
    }

    /// A driver is served from now on, and hashes are reported to it if `report`; if `hands_over`,
    /// workers hand packets to each other. Attaches the queues in use and has the kernel help.
    pub(super) fn begin(&self, report: bool, hands_over: bool) -> io::Result<()> {
        let Runtime { pairs, hashing, .. } = self.runtime();
        {
            let mut served = self.served.lock();
            served.report = report;
            served.hands_over = hands_over;
        }
        self.attach_at_least(pairs)?;
        let kernel = self.ask_for_help(&hashing, pairs);
        self.classifier.set(&hashing, pairs, kernel);
        Ok(())
    }

    /// Has the kernel do what it can; whether it reports hashes.
    fn ask_for_help(&self, hashing: &Hashing, pairs: u16) -> bool {
        let mut offload = self.offload.lock();
        let (Some(offload), Some(first)) = (offload.as_mut(), self.backends.first()) else {
            return false;
        };
        self.classifier.look_away();
        let trust = &self.classifier.trust;
        let wish = Wish {
            hashing,
            pairs,
            report: self.served.lock().report,
            trusted: trust.is_whole(),
        };
        let status = offload.apply(first.as_ref(), wish);
        let kernel = status.hashes == HashedBy::Kernel;
        trust.set_status(status);
        kernel
    }

    /// Replaces all settings at once; the host is told at the next activation.
    pub(super) fn replace(&self, runtime: Runtime) {
        self.classifier.set(&runtime.hashing, runtime.pairs, false);
        *self.runtime.lock() = runtime;
    }

    /// Packets that wait for `pair` until workers run again, behind those that wait already.
    pub(super) fn put_waiting(&self, pair: u16, packets: Batch) {
        if !packets.is_empty() {
            self.waiting.lock().entry(pair).or_default().append(packets);
        }
    }

    /// Takes the packets that wait for `pair`.
    pub(super) fn take_waiting(&self, pair: u16) -> Batch {
        self.waiting.lock().remove(&pair).unwrap_or_default()
    }

    /// Copies of all packets that wait.
    pub(super) fn waiting(&self) -> Vec<(u16, Vec<Vec<u8>>)> {
        let waiting = self.waiting.lock();
        let packets = |(pair, batch): (&u16, &Batch)| (*pair, batch.to_packets());
        waiting.iter().map(packets).collect()
    }

    /// The driver reset the card; the workers have stopped.
    pub(super) fn reset(&self) {
        self.forget_waiting();
        self.classifier.trust.heal();
        *self.served.lock() = Served::default();
        self.replace(Runtime::default());
    }

    /// Forgets all packets that wait; the workers have stopped.
    pub(super) fn forget_waiting(&self) {
        self.collect();
        self.waiting.lock().clear();
    }

    /// Takes what is on its way between workers, all of which have stopped.
    pub(super) fn collect(&self) {
        if let Some(exchange) = &self.exchange {
            for (pair, _) in (0..).zip(&self.backends) {
                self.put_waiting(pair, exchange.drain(pair));
            }
        }
    }

    /// The link status field of the configuration.
    pub(super) fn status(&self) -> u16 {
        link_status(self.runtime.lock().announce)
    }

    /// The driver announced itself.
    pub(super) fn announced(&self) {
        self.runtime.lock().announce = false;
    }

    pub(super) fn set_hash(&self, config: HashConfig) {
        let pairs = self.runtime.lock().pairs;
        self.publish(Hashing::Automatic(config), pairs);
    }

    /// From now on `hashing` holds and `pairs`, all of which are attached, are in use.
    fn publish(&self, hashing: Hashing, pairs: u16) {
        let kernel = self.ask_for_help(&hashing, pairs);
        self.classifier.set(&hashing, pairs, kernel);
        let mut runtime = self.runtime.lock();
        runtime.hashing = hashing;
        runtime.pairs = pairs;
    }

    /// Uses the first `pairs` pairs, and the host chooses among them. What is hashed stays.
    pub(super) fn set_pairs(&self, pairs: u16) -> io::Result<()> {
        let hash = *self.runtime.lock().hashing.config();
        self.steer(Hashing::Automatic(hash), pairs)
    }

    /// Steers by `table`.
    pub(super) fn set_table(&self, table: RssConfig) -> io::Result<()> {
        // What the driver sends passes the tap's queues too, so these are attached as well.
        let pairs = table.receive_queues().max(table.transmit_queues());
        self.steer(Hashing::Table(table), pairs)
    }

    /// Uses the first `pairs` pairs by `hashing`. On error all is as before.
    fn steer(&self, hashing: Hashing, pairs: u16) -> io::Result<()> {
        let before = self.served.lock().attached;
        // First those that come into use, before packets are steered to them.
        self.attach_or_put_back(before.max(pairs), before)?;
        let old = self.runtime();
        self.publish(hashing, pairs);
        if let Err(error) = self.attach_at_least(pairs) {
            self.publish(old.hashing, old.pairs);
            return Err(error);
        }
        Ok(())
    }

    /// Attaches the first `pairs` queues, and detaches the others unless that would lose packets.
    ///
    /// The kernel drops what is in a queue that it detaches, and it chooses queues until then. So a
    /// queue that was in use stays attached where its worker hands over what still comes to it.
    fn attach_at_least(&self, pairs: u16) -> io::Result<()> {
        let (before, stay) = {
            let served = self.served.lock();
            (served.attached, served.hands_over)
        };
        let pairs = if stay { before.max(pairs) } else { pairs };
        self.attach_or_put_back(pairs, before)
    }

    fn attach_or_put_back(&self, pairs: u16, before: u16) -> io::Result<()> {
        if pairs == before {
            return Ok(());
        }
        let attached = self.attach(pairs);
        match attached {
            Ok(()) => self.served.lock().attached = pairs,
            Err(_) => {
                if let Err(error) = self.attach(before) {
                    tracing::error!(%error, "queues could not be put back as they were");
                }
            }
        }
        attached
    }

    pub(super) fn set_offloads(&self, bits: u64, offloads: Offloads) -> io::Result<()> {
        if let Some(first) = self.backends.first() {
            first.set_offloads(offloads)?;
        }
        self.runtime.lock().offloads = Some(bits);
        Ok(())
    }

    /// Attaches the first `pairs` queues of the interface and detaches the others. The first is
    /// always attached, and a single one cannot be detached.
    pub(super) fn attach(&self, pairs: u16) -> io::Result<()> {
        // A tap numbers its queues in the order they were attached, and moves the last into the
        // place of one that is detached: so from the first up, and from the last down.
        let (used, unused) = self
            .backends
            .split_at(self.backends.len().min(pairs.max(1).into()));
        for backend in used.iter().skip(1) {
            backend.set_attached(true)?;
        }
        for backend in unused.iter().rev() {
            backend.set_attached(false)?;
        }
        Ok(())
    }
}

impl Drop for Shared {
    /// A tap that outlives the card is not to hash or steer for the next one.
    fn drop(&mut self) {
        self.decline_help();
    }
}

impl Target for Arc<Shared> {
    fn carry_out(&self, command: Command) -> Result<(), Refusal> {
        let host =
            |operation| move |cause| Refusal::Failed(Box::new(HostError { operation, cause }));
        match command {
            Command::Pairs(pairs) => self
                .set_pairs(pairs)
                .map_err(host("attaching or detaching a queue")),
            Command::Hash(config) => {
                self.set_hash(config);
                Ok(())
            }
            Command::Rss(table) => self
                .set_table(table)
                .map_err(host("attaching or detaching a queue")),
            Command::Offloads(bits) => self
                .set_offloads(bits, Offloads::from_guest_features(bits))
                .map_err(host("setting the offloads")),
            Command::Announced => {
                self.announced();
                Ok(())
            }
        }
    }
}
