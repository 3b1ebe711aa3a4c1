//! Network card (virtio 1.2, section 5.1) on the queues of a tap.
//!
//! Each queue pair has a worker thread that moves packets between the guest's buffers and one
//! queue of the tap, without a copy: `readv` and `writev` go straight to guest memory. What a
//! `readv` wrote is logged for live migration by hand, since guest memory's own log sees only
//! writes made through it. A further thread serves the control queue.
//!
//! # Hash reports
//! With [`NetOptions::hash_report`] the device offers `VIRTIO_NET_F_HASH_REPORT`. Only if the
//! driver takes it, headers have 20 bytes (the tap is told at activation), and each received
//! packet's hash is calculated with the driver's key and types and put there. Otherwise the
//! receive path is compiled without any of it and headers are the plain 12 bytes.
//!
//! # Receive-side scaling
//! With [`NetOptions::rss`] the device offers `VIRTIO_NET_F_RSS`: the driver says by a table which
//! queue pair a packet's hash goes to. Each worker looks a packet it read up in that table and, if
//! the tap gave it to the wrong queue, hands it to the right worker (`exchange.rs`), so
//! steering is right whatever the tap does; the closer the tap comes, the fewer copies there are.
//! A new table takes effect with the next packet that is read. Of the commands of the class
//! `VIRTIO_NET_CTRL_MQ` the last one that succeeded holds: after `VQ_PAIRS_SET` or `HASH_CONFIG`
//! the tap chooses again, after the former among the pairs it names and with hashes reported as
//! before.
//!
//! # Migration
//! The state is what the driver set on the control queue, and packets that were read and wait for
//! buffers of the driver's (bounded: `Exchange::most_bytes`), so that none is lost. A destination
//! sets header size, offloads and attached queues on its own tap at activation, and asks a driver
//! that negotiated `VIRTIO_NET_F_GUEST_ANNOUNCE` to announce itself, so that switches learn the new
//! place; for another it sends frames in the guest's name (`announce.rs`).

mod announce;
mod backend;
mod buffers;
mod counters;
pub(crate) mod ctrl;
mod exchange;
pub mod features;
mod header;
mod kernel_hash;
mod lane;
mod offload;
mod pair;
pub(crate) mod runtime;
mod rx;
mod state;
#[cfg(test)]
mod tests;
mod tx;
mod workers;

use std::sync::Arc;

use net_util::config::NetConfig;
use net_util::ctrl::MqLimits;
use net_util::hash::HashTypes;
use net_util::header::HeaderSize;
use net_util::tap::Offloads;
use zerocopy::IntoBytes;
use zerocopy::little_endian::U16;

pub use backend::{NetBackend, TapSteering};
pub use counters::{NetCounters, NetTotals};
pub use offload::{HashedBy, KernelHelp, OffloadStatus, OnMistrust, QueueSteering, SteeredBy};

use crate::device::{
    Activation, DeviceError, DeviceType, VirtioDevice, feature, read_config_bytes,
};
use crate::queue::{MAX_QUEUE_SIZE, Queue};
use announce::Announcer;
use exchange::{Batch, Exchange};
use header::ClassifierCell;
use runtime::{Runtime, Shared};
use state::{NetState, STATE_VERSION};
use workers::Workers;

/// Most queue pairs: with the control queue they still fit the transport's 255 queues.
pub const MAX_PAIRS: u16 = 127;
/// Size of the control queue.
pub(crate) const CTRL_QUEUE_SIZE: u16 = 64;
/// Most bytes that packets which wait take in a card's saved state.
pub(crate) const MAX_WAITING_BYTES: usize = Exchange::most_bytes(MAX_PAIRS as usize);
/// Bytes of the configuration the driver sees: all up to `supported_hash_types`.
const CONFIG_LEN: u16 = 24;

/// How a network card is configured.
#[derive(Clone, Debug)]
pub struct NetOptions {
    /// Identifier in the VM's configuration.
    pub id: String,
    /// Hardware address of the guest's end.
    pub mac: [u8; 6],
    /// Largest payload of a frame in bytes, if the guest is to be told.
    pub mtu: Option<u16>,
    /// Largest size of each receive and transmit queue, a power of two.
    pub queue_size: u16,
    /// Whether large packets and packets without checksums may be exchanged with the host: true
    /// for taps.
    pub offloads: bool,
    /// Whether hash reports are offered.
    pub hash_report: bool,
    /// Whether receive-side scaling is offered.
    pub rss: bool,
    /// Types of hashes that are offered with either.
    pub hash_types: HashTypes,
}

/// Why a network card could not be made.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// There are no queue pairs, or too many.
    #[error("{id}: {pairs} queue pairs; 1 to {MAX_PAIRS} are possible")]
    Pairs {
        /// Which card.
        id: String,
        /// How many were asked for.
        pairs: usize,
    },
    /// The queue size is not possible.
    #[error("{id}: queue size {size}; powers of two from 2 to {MAX_QUEUE_SIZE} are possible")]
    QueueSize {
        /// Which card.
        id: String,
        /// What was asked for.
        size: u16,
    },
    /// The host has no eventfds left to wake the threads of queues with.
    #[error("{id}: no eventfd for each queue pair; raise the limit of open files")]
    Wake {
        /// Which card.
        id: String,
        /// What the host said.
        #[source]
        cause: std::io::Error,
    },
}

/// What the tap's kernel does for a card, to be asked at any time.
#[derive(Clone, Debug)]
pub struct OffloadWatch(Arc<ClassifierCell>);

impl OffloadWatch {
    /// What it does now.
    pub fn status(&self) -> OffloadStatus {
        self.0.trust.status()
    }
}

/// The network card.
pub struct Net {
    id: String,
    mac: [u8; 6],
    mtu: Option<u16>,
    features: u64,
    /// Types of hashes that are offered; none if hashes are not.
    hash_types: HashTypes,
    queue_sizes: Vec<u16>,
    max_pairs: u16,
    shared: Arc<Shared>,
    counters: Arc<NetCounters>,
    workers: Option<Workers>,
    /// The guest arrived here, and the network has not been told that in full.
    announcer: Option<Announcer>,
}

impl Net {
    /// A card with one queue pair for each of `backends`, which are queues of one interface.
    ///
    /// # Errors
    /// See [`NetError`].
    pub fn new(options: NetOptions, backends: Vec<Arc<dyn NetBackend>>) -> Result<Self, NetError> {
        let NetOptions {
            id,
            mac,
            mtu,
            queue_size,
            offloads,
            hash_report,
            rss,
            hash_types,
        } = options;
        let pairs = backends.len();
        let max_pairs = match u16::try_from(pairs) {
            Ok(n) if (1..=MAX_PAIRS).contains(&n) => n,
            _ => return Err(NetError::Pairs { id, pairs }),
        };
        if !queue_size.is_power_of_two() || !(2..=MAX_QUEUE_SIZE).contains(&queue_size) {
            return Err(NetError::QueueSize {
                id,
                size: queue_size,
            });
        }
        let mut queue_sizes = vec![queue_size; pairs * 2];
        queue_sizes.push(CTRL_QUEUE_SIZE);
        let mut offered = feature::VERSION_1
            | feature::RING_INDIRECT_DESC
            | feature::RING_EVENT_IDX
            | features::MAC
            | features::STATUS
            | features::MRG_RXBUF
            | features::CTRL_VQ
            | features::GUEST_ANNOUNCE;
        for (offer, bits) in [
            (offloads, features::OFFLOADS | features::CTRL_GUEST_OFFLOADS),
            (mtu.is_some(), features::MTU),
            (max_pairs > 1, features::MQ),
            (hash_report, features::HASH_REPORT),
            (rss, features::RSS),
        ] {
            if offer {
                offered |= bits;
            }
        }
        let exchange = match rss.then(|| Exchange::new(pairs)).transpose() {
            Ok(exchange) => exchange.map(Arc::new),
            Err(cause) => return Err(NetError::Wake { id, cause }),
        };
        let hash_types = if hash_report || rss {
            hash_types
        } else {
            HashTypes::NONE
        };
        Ok(Self {
            id,
            mac,
            mtu,
            features: offered,
            hash_types,
            queue_sizes,
            max_pairs,
            shared: Arc::new(Shared::new(backends, exchange)),
            counters: Arc::new(NetCounters::new(pairs)),
            workers: None,
            announcer: None,
        })
    }

    /// Has the tap's kernel do what it can of hashing and steering, from the next activation on.
    #[must_use]
    pub fn with_kernel_help(self, help: KernelHelp) -> Self {
        self.shared.set_help(help);
        self
    }

    /// Tells what the tap's kernel does for the card, also when the card has been handed to a
    /// transport.
    pub fn offload(&self) -> OffloadWatch {
        OffloadWatch(Arc::clone(&self.shared.classifier))
    }

    /// The card's counters, which stay readable when the card has been handed to a transport.
    pub fn counters(&self) -> Arc<NetCounters> {
        Arc::clone(&self.counters)
    }

    fn require_inactive(&self, operation: &'static str) -> Result<(), DeviceError> {
        match self.workers {
            None => Ok(()),
            Some(_) => Err(DeviceError::WrongState {
                device: self.id.clone(),
                operation,
                state: "active",
            }),
        }
    }

    fn config(&self) -> NetConfig {
        let mut config = NetConfig {
            mac: self.mac,
            status: U16::new(self.shared.status()),
            max_virtqueue_pairs: U16::new(self.max_pairs),
            mtu: U16::new(self.mtu.unwrap_or(0)),
            ..NetConfig::default()
        };
        if self.features & (features::HASH_REPORT | features::RSS) != 0 {
            config.offer_hash(self.hash_types);
        }
        config
    }

    /// Sets on the tap what was negotiated, and what the driver then changed.
    fn prepare_backend(&self, features: u64) -> Result<(), DeviceError> {
        let host = |operation| {
            move |cause| DeviceError::Host {
                device: self.id.clone(),
                operation,
                cause,
            }
        };
        let runtime = self.shared.runtime();
        let size = if features & features::HASH_REPORT != 0 {
            HeaderSize::V1Hash
        } else {
            HeaderSize::V1
        };
        let offloads = runtime.offloads.unwrap_or(features) & features & features::GUEST_OFFLOADS;
        // A kernel that reports hashes needs the header's room for them.
        self.shared.decline_help();
        if let Some(first) = self.shared.backends().first() {
            first
                .set_header(size)
                .map_err(host("setting the size of packet headers"))?;
            if self.features & features::OFFLOADS != 0 {
                first
                    .set_offloads(Offloads::from_guest_features(offloads))
                    .map_err(host("setting the offloads"))?;
            }
        }
        self.shared
            .begin(size == HeaderSize::V1Hash, self.hands_over(features))
            .map_err(host("attaching the queues in use"))
    }

    /// Whether packets may be for another queue than the one they come from.
    fn hands_over(&self, features: u64) -> bool {
        features & features::RSS != 0 && self.max_pairs > 1
    }

    fn limits(&self, features: u64) -> MqLimits {
        MqLimits {
            max_pairs: self.max_pairs,
            hash_types: self.hash_types,
            multi_queue: features & features::MQ != 0,
            rss: features & features::RSS != 0,
            hash_report: features & features::HASH_REPORT != 0,
        }
    }
}

impl VirtioDevice for Net {
    fn id(&self) -> &str {
        &self.id
    }

    fn device_type(&self) -> DeviceType {
        DeviceType::Net
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn check_features(&self, features: u64) -> Result<(), &'static str> {
        features::check(features)
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn config_len(&self) -> u16 {
        CONFIG_LEN
    }

    fn read_config(&self, offset: u16, data: &mut [u8]) {
        let config = self.config();
        let bytes = config.as_bytes();
        let visible = bytes.get(..usize::from(CONFIG_LEN)).unwrap_or(bytes);
        read_config_bytes(visible, offset, data);
    }

    fn write_config(&mut self, _offset: u16, _data: &[u8]) {
        // Section 5.1.4: all fields are read-only for a driver of a modern device.
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        self.require_inactive("activate")?;
        let features = activation.features;
        self.prepare_backend(features)?;
        let interrupt = Arc::clone(&activation.interrupt);
        let announces_itself = features & features::GUEST_ANNOUNCE != 0;
        let workers = Workers::start(
            &self.id,
            activation,
            self.limits(features),
            &self.shared,
            &self.counters,
            self.announcer.take().filter(|_| !announces_itself),
        )?;
        self.workers = Some(workers);
        if features & features::GUEST_ANNOUNCE == 0 {
            self.shared.announced();
        } else if self.shared.runtime().announce {
            interrupt.config_changed();
        }
        Ok(())
    }

    fn deactivate(&mut self) -> Result<Vec<Queue>, DeviceError> {
        let Some(workers) = self.workers.take() else {
            return Ok(Vec::new());
        };
        let stopped = workers.stop(&self.id, &self.shared)?;
        self.announcer = stopped.announcer;
        Ok(stopped.queues)
    }

    fn reset(&mut self) {
        // Dropping the workers joins them.
        self.workers = None;
        self.announcer = None;
        self.shared.reset();
    }

    fn save(&self) -> Result<Vec<u8>, DeviceError> {
        self.require_inactive("save")?;
        let state = NetState {
            version: STATE_VERSION,
            mac: self.mac,
            mtu: self.mtu,
            runtime: self.shared.runtime(),
            waiting: self.shared.waiting(),
        };
        postcard::to_stdvec(&state).map_err(|error| DeviceError::BadState {
            device: self.id.clone(),
            reason: format!("cannot be written: {error}"),
        })
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), DeviceError> {
        self.require_inactive("restore")?;
        let bad = |reason: String| DeviceError::BadState {
            device: self.id.clone(),
            reason,
        };
        let state = NetState::read(state).map_err(bad)?;
        state.check(&self.limits(self.features)).map_err(bad)?;
        if state.mtu != self.mtu {
            return Err(bad(format!(
                "the guest was told an MTU of {:?}, the device here has {:?}: configure the same",
                state.mtu, self.mtu
            )));
        }
        self.mac = state.mac;
        self.announcer = Some(Announcer::new(state.mac));
        self.shared.forget_waiting();
        for (pair, packets) in &state.waiting {
            let mut batch = Batch::default();
            packets.iter().for_each(|packet| batch.push_copy(packet));
            self.shared.put_waiting(*pair, batch);
        }
        self.shared.replace(Runtime {
            // Switches know the guest at the source's port.
            announce: true,
            ..state.runtime
        });
        Ok(())
    }
}
