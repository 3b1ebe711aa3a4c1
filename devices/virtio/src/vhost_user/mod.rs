//! Network card whose queues another process serves, over vhost-user (QEMU's
//! `docs/interop/vhost-user.rst`): DPDK, OVS, a rust-vmm backend.
//!
//! Ferry keeps the registers, the configuration and the control queue; the backend gets guest
//! memory as file descriptors and works on receive and transmit queues by itself. The driver's
//! kicks reach it by ioeventfd, its interrupts the guest by irqfd, so no packet involves Ferry.
//!
//! # Where things are
//! * `message`, `connection`: the protocol, by requests that cannot wait for longer than their
//!   deadline. It is written here because the `vhost` crate's front end waits without end (it
//!   retries when a socket's time limit strikes), and in `SET_LOG_BASE` for an answer that DPDK
//!   and QEMU's library never send. The tests' backends use that crate, as a second opinion.
//! * `session`, `ring`: what was agreed with a backend, and starting and stopping its rings.
//! * `watch`: the thread that notices when a backend dies.
//! * `ctrl`: the control queue.
//! * `log`, `dirty`: which pages the backend wrote, for a migration.
//!
//! # A backend that fails
//! A wrong answer, none within 5 s, or a closed connection ends the connection. The device then
//! asks its driver for a reset (`DEVICE_NEEDS_RESET`), which does not help until the VM is built
//! anew; whoever made the device is told. The guest runs on without it, and cannot be migrated:
//! what the backend wrote last nobody knows.
//!
//! # Migration
//! `GET_VRING_BASE` stops each ring, so that a paused device writes no guest memory, and says
//! where; the used ring's index is read from memory. A network backend that behaves has no buffer
//! in its hands then (there is no "inflight" state to move): one that has is told of in the log,
//! for those buffers the driver never gets back. The destination connects to a backend of its
//! own, which must offer the same features, and starts its rings from there.

mod connection;
mod dirty;
mod log;
mod message;
mod ring;
mod session;
mod state;
#[cfg(test)]
mod tests;
mod watch;

use std::collections::BTreeMap;
use std::fmt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use devices::{ThreadKind, ThreadSpawner};
use net_util::config::NetConfig;
use net_util::ctrl::MqLimits;
use net_util::hash::HashTypes;
use vm_memory::GuestAddressSpace;
use vm_migration::ErrorChain;
use vm_migration::memory::{GuestMemory, MemoryHandle};
use zerocopy::IntoBytes;
use zerocopy::little_endian::U16;

pub use connection::ExchangeError;
pub use dirty::VhostUserDirty;
pub use log::LogError;
pub use message::Request;
pub use session::{OnLost, VhostUserError};

use crate::device::{
    Activation, ActiveQueue, DeviceError, DeviceInterrupt, DeviceType, VirtioDevice, feature,
    read_config_bytes,
};
use crate::net::ctrl::Control;
use crate::net::features;
use crate::net::{CTRL_QUEUE_SIZE, MAX_PAIRS};
use crate::queue::{MAX_QUEUE_SIZE, Queue, QueuePosition};
use crate::server::QueueServer;
use crate::worker::Worker;
use message::F_PROTOCOL_FEATURES;
use ring::{Ring, Running};
use session::Session;
use state::Settings;
use watch::Watch;

/// Bytes of the configuration the driver sees: all up to `mtu`.
const CONFIG_LEN: u16 = 12;

/// Features that need nothing of Ferry: the driver gets them if the backend has them.
const PASSED: u64 = feature::RING_INDIRECT_DESC
    | feature::RING_EVENT_IDX
    | features::MRG_RXBUF
    | features::OFFLOADS;

/// How a vhost-user network card is configured.
#[derive(Clone, Debug)]
pub struct VhostUserOptions {
    /// Identifier in the VM's configuration.
    pub id: String,
    /// The backend's socket.
    pub socket: PathBuf,
    /// Hardware address of the guest's end.
    pub mac: [u8; 6],
    /// Largest payload of a frame in bytes, if the guest is to be told; else the backend's.
    pub mtu: Option<u16>,
    /// Queue pairs.
    pub pairs: u16,
    /// Largest size of each receive and transmit queue, a power of two.
    pub queue_size: u16,
}

/// The network card.
pub struct VhostUserNet {
    id: String,
    mac: [u8; 6],
    mtu: Option<u16>,
    features: u64,
    queue_sizes: Vec<u16>,
    max_pairs: u16,
    session: Arc<Session>,
    settings: Arc<Settings>,
    active: Option<Active>,
    /// Ends with the card.
    _watch: Worker<Watch>,
}

/// What an active card has.
struct Active {
    memory: MemoryHandle,
    /// Queues that the backend serves.
    served: Vec<Queue>,
    /// Queues that the driver enabled but the negotiated features give no use.
    unused: Vec<Queue>,
    control: Option<Worker<QueueServer<Control<Arc<Settings>>>>>,
}

impl VhostUserNet {
    /// Connects to the backend; `on_lost` is told if it is lost later.
    ///
    /// # Errors
    /// See [`VhostUserError`].
    pub fn connect(
        options: VhostUserOptions,
        spawner: &ThreadSpawner,
        on_lost: OnLost,
    ) -> Result<Self, VhostUserError> {
        check_shape(&options)?;
        let session = Session::connect(&options.socket, options.pairs, on_lost)?;
        Self::new(options, session, spawner)
    }

    /// The same over a connection that is there already; operations of the backend may take
    /// `limit`.
    ///
    /// # Errors
    /// See [`VhostUserError`].
    pub fn over(
        options: VhostUserOptions,
        stream: UnixStream,
        limit: Duration,
        spawner: &ThreadSpawner,
        on_lost: OnLost,
    ) -> Result<Self, VhostUserError> {
        check_shape(&options)?;
        let session = Session::over(stream, &options.socket, options.pairs, limit, on_lost)?;
        Self::new(options, session, spawner)
    }

    fn new(
        options: VhostUserOptions,
        session: Session,
        spawner: &ThreadSpawner,
    ) -> Result<Self, VhostUserError> {
        let VhostUserOptions {
            id,
            mac,
            mtu,
            pairs,
            queue_size,
            socket: _,
        } = options;
        let offer = session.offer();
        let mtu = mtu.or(offer.mtu);
        if let Some(mtu) = mtu {
            session.set_mtu(mtu)?;
        }
        let mut offered = feature::VERSION_1
            | offer.features & PASSED
            | features::MAC
            | features::STATUS
            | features::CTRL_VQ
            | features::GUEST_ANNOUNCE;
        for (offer, bits) in [(mtu.is_some(), features::MTU), (pairs > 1, features::MQ)] {
            if offer {
                offered |= bits;
            }
        }
        let mut queue_sizes = vec![queue_size; usize::from(pairs) * 2];
        queue_sizes.push(CTRL_QUEUE_SIZE);
        let session = Arc::new(session);
        let watch = Watch::new(Arc::clone(&session));
        let watch =
            Worker::start(spawner, ThreadKind::VhostUser, id.clone(), watch).map_err(|cause| {
                VhostUserError::Host {
                    operation: "starting a thread",
                    cause,
                }
            })?;
        Ok(Self {
            settings: Arc::new(Settings::new(Arc::clone(&session))),
            id,
            mac,
            mtu,
            features: offered,
            queue_sizes,
            max_pairs: pairs,
            session,
            active: None,
            _watch: watch,
        })
    }

    /// A way to the backend that remains when the card has been handed to a transport.
    pub fn handle(&self) -> VhostUserHandle {
        VhostUserHandle {
            id: self.id.clone(),
            session: Arc::clone(&self.session),
        }
    }

    fn require_inactive(&self, operation: &'static str) -> Result<(), DeviceError> {
        match self.active {
            None => Ok(()),
            Some(_) => Err(DeviceError::WrongState {
                device: self.id.clone(),
                operation,
                state: "active",
            }),
        }
    }

    fn failed(&self, cause: VhostUserError) -> DeviceError {
        DeviceError::VhostUser {
            device: self.id.clone(),
            cause,
        }
    }

    /// Pairs that a driver with `features` can use.
    fn usable_pairs(&self, features: u64) -> u16 {
        if features & features::MQ != 0 {
            self.max_pairs
        } else {
            1
        }
    }

    /// A queue as the backend is told of it.
    fn ring(
        &self,
        active: ActiveQueue,
        interrupt: &dyn DeviceInterrupt,
    ) -> Result<(Ring, Queue), DeviceError> {
        let ActiveQueue { queue, kick } = active;
        let index = queue.index();
        let call = match interrupt.queue_event(index) {
            Some(call) => Some(call),
            None => {
                let relay = self.session.relays.get(usize::from(index));
                let copy = relay.map(|relay| relay.try_clone()).transpose();
                copy.map_err(|cause| DeviceError::Host {
                    device: self.id.clone(),
                    operation: "duplicating an eventfd",
                    cause,
                })?
            }
        };
        let call = call.ok_or_else(|| DeviceError::MissingQueue {
            device: self.id.clone(),
            index,
        })?;
        let ring = Ring {
            index,
            setup: queue.setup(),
            next_avail: queue.position().next_avail,
            kick,
            call,
        };
        Ok((ring, queue))
    }

    /// Starts the control queue's thread.
    fn serve_control(
        &self,
        queue: ActiveQueue,
        activation: &Activation,
    ) -> Result<Worker<QueueServer<Control<Arc<Settings>>>>, DeviceError> {
        let features = activation.features;
        let limits = MqLimits {
            max_pairs: self.usable_pairs(features),
            hash_types: HashTypes::NONE,
            multi_queue: features & features::MQ != 0,
            rss: false,
            hash_report: false,
        };
        let control = Control::new(Arc::clone(&self.settings), limits, features);
        let server = QueueServer::new(
            queue,
            activation.memory.clone(),
            Arc::clone(&activation.interrupt),
            control,
        );
        let name = format!("{}-ctrl", self.id);
        Worker::start(&activation.spawner, ThreadKind::VhostUser, name, server).map_err(|cause| {
            DeviceError::Host {
                device: self.id.clone(),
                operation: "starting a thread",
                cause,
            }
        })
    }

    /// Has the driver announce the guest to the network, or the backend if the driver cannot.
    fn announce(&self, features: u64, interrupt: &dyn DeviceInterrupt) {
        if features & features::GUEST_ANNOUNCE != 0 {
            interrupt.config_changed();
            return;
        }
        self.settings.announced();
        if let Err(error) = self.session.announce(self.mac) {
            // The card works; switches learn where the guest is by its next packet.
            tracing::warn!(
                device = self.id,
                error = %ErrorChain(&error),
                "the guest's new place is not announced"
            );
        }
    }

    /// That the backend is not lost.
    fn require_backend(&self) -> Result<(), DeviceError> {
        match self.session.lost() {
            None => Ok(()),
            Some(reason) => {
                let reason = reason.to_owned();
                Err(self.failed(ExchangeError::Lost { reason }.into()))
            }
        }
    }

    /// Where a queue is that the backend stopped at `base`.
    fn position(&self, queue: &Queue, base: Option<u16>, memory: &GuestMemory) -> QueuePosition {
        let next_used = queue.published(memory).unwrap_or_else(|error| {
            // It was in memory when the driver set it up, and memory does not go away.
            tracing::error!(device = self.id, %error, "used index cannot be read");
            queue.position().next_used
        });
        // A backend that did not answer is taken to have used what it took.
        let next_avail = base.unwrap_or(next_used);
        let kept = next_avail.wrapping_sub(next_used);
        if kept != 0 {
            tracing::warn!(
                device = self.id,
                queue = queue.index(),
                kept,
                "vhost-user backend stopped with buffers in its hands, which the driver loses"
            );
        }
        QueuePosition {
            next_avail,
            next_used,
        }
    }
}

/// Whether a card can have these queues at all.
fn check_shape(options: &VhostUserOptions) -> Result<(), VhostUserError> {
    let (pairs, size) = (options.pairs, options.queue_size);
    let possible = (1..=MAX_PAIRS).contains(&pairs)
        && size.is_power_of_two()
        && (2..=MAX_QUEUE_SIZE).contains(&size);
    if possible {
        return Ok(());
    }
    Err(VhostUserError::Shape { pairs, size })
}

impl fmt::Debug for VhostUserNet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VhostUserNet")
            .field("id", &self.id)
            .field("socket", &self.session.path())
            .field("active", &self.active.is_some())
            .finish_non_exhaustive()
    }
}

impl Drop for VhostUserNet {
    fn drop(&mut self) {
        self.session.close();
    }
}

impl VirtioDevice for VhostUserNet {
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
        let config = NetConfig {
            mac: self.mac,
            status: U16::new(self.settings.status()),
            max_virtqueue_pairs: U16::new(self.max_pairs),
            mtu: U16::new(self.mtu.unwrap_or(0)),
            ..NetConfig::default()
        };
        let bytes = config.as_bytes();
        let visible = bytes.get(..usize::from(CONFIG_LEN)).unwrap_or(bytes);
        read_config_bytes(visible, offset, data);
    }

    fn write_config(&mut self, _offset: u16, _data: &[u8]) {
        // Section 5.1.4: all fields are read-only for a driver of a modern device.
    }

    fn activate(&mut self, mut activation: Activation) -> Result<(), DeviceError> {
        self.require_inactive("activate")?;
        let features = activation.features;
        let data_queues = self.usable_pairs(features) * 2;
        let (mut rings, mut served, mut unused) = (Vec::new(), Vec::new(), Vec::new());
        let mut control = None;
        for active in std::mem::take(&mut activation.queues) {
            match active.queue.index() {
                index if index < data_queues => {
                    let (ring, queue) = self.ring(active, activation.interrupt.as_ref())?;
                    rings.push(ring);
                    served.push(queue);
                }
                index if index == data_queues && features & features::CTRL_VQ != 0 => {
                    control = Some(active);
                }
                _ => unused.push(active.queue),
            }
        }
        if let Some(index) = (0..2).find(|index| !rings.iter().any(|ring| ring.index == *index)) {
            let device = self.id.clone();
            return Err(DeviceError::MissingQueue { device, index });
        }
        let acked = features & self.session.offer().features | F_PROTOCOL_FEATURES;
        let running = Running::new(acked, rings, self.settings.pairs());
        let interrupt = Arc::clone(&activation.interrupt);
        self.session
            .start(&activation.memory.memory(), running, interrupt)
            .map_err(|cause| self.failed(cause))?;
        // After the rings: its commands change which of them are enabled.
        let control = control
            .map(|queue| self.serve_control(queue, &activation))
            .transpose()?;
        self.active = Some(Active {
            memory: activation.memory,
            served,
            unused,
            control,
        });
        if self.settings.announce_pending() {
            self.announce(features, activation.interrupt.as_ref());
        }
        Ok(())
    }

    fn deactivate(&mut self) -> Result<Vec<Queue>, DeviceError> {
        let Some(active) = self.active.take() else {
            return Ok(Vec::new());
        };
        let mut queues = active.unused;
        // First the control queue, so that nothing changes the rings while they stop.
        let control = active.control.map(Worker::stop).transpose();
        let bases: BTreeMap<u16, Option<u16>> = self.session.stop().into_iter().collect();
        let memory = active.memory.memory();
        for queue in active.served {
            let base = bases.get(&queue.index()).copied().flatten();
            let position = self.position(&queue, base, &memory);
            queues.push(queue.at(position));
        }
        let control = control.map_err(|thread| DeviceError::ThreadLost {
            device: self.id.clone(),
            thread,
        })?;
        queues.extend(control.map(|server| server.queue));
        queues.sort_by_key(Queue::index);
        Ok(queues)
    }

    fn reset(&mut self) {
        // Dropping the control queue's worker joins it.
        self.active = None;
        self.session.stop();
        self.settings.reset();
    }

    fn save(&self) -> Result<Vec<u8>, DeviceError> {
        self.require_inactive("save")?;
        self.require_backend()?;
        state::save(&self.id, self.mac, self.mtu, &self.settings)
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), DeviceError> {
        self.require_inactive("restore")?;
        // While the guest can still stay where it is.
        self.require_backend()?;
        let bad = |reason: String| DeviceError::BadState {
            device: self.id.clone(),
            reason,
        };
        let saved =
            state::load(&self.id, state).map_err(|error| bad(ErrorChain(&error).to_string()))?;
        self.mac = saved.check(self.max_pairs, self.mtu).map_err(bad)?;
        self.settings.arrived(saved.pairs());
        Ok(())
    }
}

/// A way to a card's backend, from outside of its transport.
#[derive(Clone)]
pub struct VhostUserHandle {
    id: String,
    session: Arc<Session>,
}

impl VhostUserHandle {
    /// The backend's socket.
    pub fn socket(&self) -> &Path {
        self.session.path()
    }

    /// What is worth knowing of the backend. Never waits for it.
    pub fn facts(&self) -> BTreeMap<String, String> {
        session::facts(&self.session)
    }

    /// The backend as a writer of guest memory. Never waits for it.
    ///
    /// # Errors
    /// [`VhostUserError::Missing`] if it cannot log its writes, [`VhostUserError::Exchange`] if
    /// it is lost.
    pub fn dirty_source(&self, memory: &MemoryHandle) -> Result<VhostUserDirty, VhostUserError> {
        self.session.can_log()?;
        Ok(VhostUserDirty::new(
            self.id.clone(),
            Arc::clone(&self.session),
            memory.clone(),
        ))
    }
}
