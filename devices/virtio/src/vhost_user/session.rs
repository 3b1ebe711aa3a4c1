//! What was agreed with a backend, and what it is doing: one [`Session`] from connecting to the
//! end of the device, shared by the device, its control queue, the watching thread and a
//! migration.

use std::collections::BTreeMap;
use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use parking_lot::Mutex;
use vm_migration::memory::GuestMemory;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use zerocopy::IntoBytes;

use super::connection::{Connection, ExchangeError, connect};
use super::log::{LogError, SharedLog};
use super::message::{
    CONFIG_BYTES, ConfigPart, F_LOG_ALL, F_PROTOCOL_FEATURES, MAX_REGIONS, Request, protocol,
};
use super::ring::{Running, mem_table};
use crate::device::{DeviceInterrupt, feature};
use crate::net::features as net;

/// How long the requests of one operation may take together: a vCPU may be waiting.
pub(super) const LIMIT: Duration = Duration::from_secs(5);

/// Least MTU a device may tell (virtio 1.2, section 5.1.4.1).
const MIN_MTU: u16 = 68;

/// Why a vhost-user device cannot be made, started or migrated.
#[derive(Debug, thiserror::Error)]
pub enum VhostUserError {
    /// Nobody listens on the socket.
    #[error("cannot connect to the backend on {}: is it running?", socket.display())]
    Connect {
        /// The socket.
        socket: PathBuf,
        /// What the system said.
        #[source]
        cause: io::Error,
    },
    /// The host lacks something.
    #[error("{operation} failed")]
    Host {
        /// What was tried.
        operation: &'static str,
        /// What the host said.
        #[source]
        cause: io::Error,
    },
    /// A request failed.
    #[error("the vhost-user backend failed")]
    Exchange(#[from] ExchangeError),
    /// The backend lacks a feature without which it cannot be used.
    #[error("the backend offers no {name}: {remedy}")]
    Missing {
        /// The feature's name in the specification.
        name: &'static str,
        /// What to do.
        remedy: &'static str,
    },
    /// The backend has fewer queues than were asked for.
    #[error(
        "{pairs} queue pairs asked for, the backend has {offered} queues: set num_queues to fit, or \
         start the backend with more"
    )]
    Queues {
        /// Queue pairs asked for.
        pairs: u16,
        /// What the backend says.
        offered: u64,
    },
    /// The number or size of queues is not possible.
    #[error(
        "{pairs} queue pairs of size {size}; 1 to 127 pairs of a power of two from 2 to 32768 are possible"
    )]
    Shape {
        /// Queue pairs asked for.
        pairs: u16,
        /// Their size.
        size: u16,
    },
    /// Guest memory is private to this process.
    #[error(
        "the backend must map guest memory, which is private: configure shared memory (shared=on)"
    )]
    PrivateMemory,
    /// Guest memory has more regions than a backend can be told of.
    #[error("guest memory has {count} regions; a backend takes {MAX_REGIONS}")]
    Regions {
        /// How many there are.
        count: usize,
    },
    /// There is no dirty log.
    #[error("no dirty log")]
    Log(#[from] LogError),
    /// The dirty log was not started.
    #[error("the dirty log was not started")]
    NoLog,
}

/// What is called once when the backend is lost, with the reason.
pub type OnLost = Box<dyn FnOnce(&str) + Send>;

/// What a backend offers, fixed when it connects.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Offer {
    /// Virtio features.
    pub(super) features: u64,
    /// Protocol features that are in use.
    pub(super) protocol: u64,
    /// The MTU of its configuration space.
    pub(super) mtu: Option<u16>,
}

/// What is under the lock of a session. It is held while the backend is waited for, [`LIMIT`] at
/// most.
struct Link {
    connection: Connection,
    /// What the backend serves.
    running: Option<Running>,
    /// Where it logs, during a migration.
    log: Option<Arc<SharedLog>>,
}

/// A connection to a backend, and all that it was told.
pub(super) struct Session {
    socket: PathBuf,
    offer: Offer,
    link: Mutex<Link>,
    /// Whom interrupts and failures are told to while the device is active.
    driver: Mutex<Option<Arc<dyn DeviceInterrupt>>>,
    on_lost: Mutex<Option<OnLost>>,
    lost: OnceLock<String>,
    /// Signalled by the backend for a queue that has no vector just now, one per queue.
    pub(super) relays: Vec<EventFd>,
    /// Signalled by the backend when it cannot go on with a queue.
    pub(super) errors: EventFd,
}

impl Session {
    /// Connects to the backend on `socket`, and agrees on features for `pairs` queue pairs.
    pub(super) fn connect(
        socket: &Path,
        pairs: u16,
        on_lost: OnLost,
    ) -> Result<Self, VhostUserError> {
        let stream = connect(socket, LIMIT).map_err(|cause| VhostUserError::Connect {
            socket: socket.to_owned(),
            cause,
        })?;
        Self::over(stream, socket, pairs, LIMIT, on_lost)
    }

    /// The same over a connection that is there already.
    pub(super) fn over(
        stream: UnixStream,
        socket: &Path,
        pairs: u16,
        limit: Duration,
        on_lost: OnLost,
    ) -> Result<Self, VhostUserError> {
        let mut connection = Connection::new(stream, limit);
        let offer = negotiate(&mut connection, pairs)?;
        let event = || {
            EventFd::new(EFD_NONBLOCK).map_err(|cause| VhostUserError::Host {
                operation: "making an eventfd",
                cause,
            })
        };
        Ok(Self {
            socket: socket.to_owned(),
            offer,
            link: Mutex::new(Link {
                connection,
                running: None,
                log: None,
            }),
            driver: Mutex::new(None),
            on_lost: Mutex::new(Some(on_lost)),
            lost: OnceLock::new(),
            relays: (0..pairs * 2).map(|_| event()).collect::<Result<_, _>>()?,
            errors: event()?,
        })
    }

    /// The socket's path.
    pub(super) fn path(&self) -> &Path {
        &self.socket
    }

    /// What the backend offers.
    pub(super) fn offer(&self) -> Offer {
        self.offer
    }

    /// Why the backend is lost, if it is. Never waits.
    pub(super) fn lost(&self) -> Option<&str> {
        self.lost.get().map(String::as_str)
    }

    /// Whether writes of the backend can be logged. Never waits.
    pub(super) fn can_log(&self) -> Result<(), VhostUserError> {
        let remedy = "a VM with it cannot be migrated; boot it with a backend that logs its writes";
        for (there, name) in [
            (
                self.offer.protocol & protocol::LOG_SHMFD,
                "VHOST_USER_PROTOCOL_F_LOG_SHMFD",
            ),
            (self.offer.features & F_LOG_ALL, "VHOST_F_LOG_ALL"),
        ] {
            if there == 0 {
                return Err(VhostUserError::Missing { name, remedy });
            }
        }
        match self.lost() {
            None => Ok(()),
            Some(reason) => Err(ExchangeError::Lost {
                reason: reason.to_owned(),
            }
            .into()),
        }
    }

    /// A descriptor of the socket, to be watched.
    pub(super) fn watched(&self) -> io::Result<UnixStream> {
        self.link.lock().connection.socket().try_clone()
    }

    /// Serves the driver with `rings`.
    pub(super) fn start(
        &self,
        memory: &GuestMemory,
        running: Running,
        interrupt: Arc<dyn DeviceInterrupt>,
    ) -> Result<(), VhostUserError> {
        let (table, files) = mem_table(memory)?;
        *self.driver.lock() = Some(interrupt);
        self.operate(|link| {
            let Link {
                connection,
                running: serving,
                log,
            } = link;
            // Noted first: what was begun is undone by `stop`.
            let running = serving.insert(running);
            let features = running.features(log.is_some());
            connection.tell(Request::SetFeatures, features.as_bytes(), &[])?;
            connection.tell(Request::SetMemTable, table.as_bytes(), &files)?;
            if let Some(log) = log {
                let (area, file) = log.area();
                connection.set_log(area, file)?;
            }
            for ring in running.rings() {
                ring.start(connection, log.is_some(), &self.errors)?;
            }
            running.enable(connection)?;
            Ok(connection.settle()?)
        })
    }

    /// Stops all rings: the backend writes nothing any more. Gives for each where it stopped;
    /// `None` if the backend did not tell.
    pub(super) fn stop(&self) -> Vec<(u16, Option<u16>)> {
        let mut stopped = Vec::new();
        let result = self.operate(|link| {
            let Some(running) = link.running.take() else {
                return Ok(());
            };
            stopped.extend(running.rings().map(|ring| (ring.index, None)));
            for (ring, (_, base)) in running.rings().zip(&mut stopped) {
                *base = Some(ring.stop(&mut link.connection)?);
            }
            running.disable(&mut link.connection)?;
            Ok(link.connection.settle()?)
        });
        *self.driver.lock() = None;
        if let Err(error) = result {
            tracing::warn!(
                socket = %self.socket.display(),
                error = %vm_migration::ErrorChain(&error),
                "vhost-user backend did not stop its rings"
            );
        }
        stopped
    }

    /// Enables the rings of the first `pairs` pairs and no other.
    pub(super) fn set_pairs(&self, pairs: u16) -> Result<(), VhostUserError> {
        self.operate(|link| {
            let Some(running) = &mut link.running else {
                return Ok(());
            };
            let before = running.set_pairs(pairs);
            let Err(error) = running.enable(&mut link.connection) else {
                return Ok(link.connection.settle()?);
            };
            // The driver keeps what it had: rings that it does not look at must get no packets.
            running.set_pairs(before);
            if let Err(again) = running.enable(&mut link.connection) {
                tracing::debug!(error = %again, "rings are enabled that are not in use");
            }
            Err(error.into())
        })
    }

    /// Has the backend announce the guest's address to the network, if it can.
    pub(super) fn announce(&self, mac: [u8; 6]) -> Result<(), VhostUserError> {
        if self.offer.protocol & protocol::RARP == 0 {
            return Ok(());
        }
        let [a, b, c, d, e, f] = mac;
        let payload = u64::from_le_bytes([a, b, c, d, e, f, 0, 0]);
        self.operate(|link| {
            Ok(link
                .connection
                .tell(Request::SendRarp, payload.as_bytes(), &[])?)
        })
    }

    /// Tells the backend what the guest was told of the MTU, if it wants to know.
    pub(super) fn set_mtu(&self, mtu: u16) -> Result<(), VhostUserError> {
        let Offer {
            features, protocol, ..
        } = self.offer;
        if features & net::MTU == 0 || protocol & protocol::MTU == 0 {
            return Ok(());
        }
        self.operate(|link| {
            Ok(link
                .connection
                .tell(Request::NetSetMtu, u64::from(mtu).as_bytes(), &[])?)
        })
    }

    /// Has the backend log its writes in `log` from now on, and whenever it is started.
    pub(super) fn start_log(&self, log: Arc<SharedLog>) -> Result<(), VhostUserError> {
        self.can_log()?;
        self.operate(|link| {
            // Noted first: what was begun is undone by `stop_log`.
            let log = link.log.insert(log);
            if let Some(running) = &link.running {
                let connection = &mut link.connection;
                let (area, file) = log.area();
                connection.set_log(area, file)?;
                running.set_logging(connection, true)?;
                // Until then writes may not have been logged.
                connection.settle()?;
            }
            Ok(())
        })
    }

    /// Ends the logging. A backend that is lost logs nothing.
    pub(super) fn stop_log(&self) -> Result<(), VhostUserError> {
        self.operate(|link| match (&link.running, link.log.take()) {
            (Some(running), Some(_)) if link.connection.lost().is_none() => {
                running.set_logging(&mut link.connection, false)?;
                Ok(link.connection.settle()?)
            }
            // Rings that start later do so without it.
            _ => Ok(()),
        })
    }

    /// The backend hung up.
    pub(super) fn hung_up(&self) {
        self.give_up("the backend closed the connection");
    }

    /// Nothing more is expected of the backend, for `reason`.
    pub(super) fn give_up(&self, reason: &str) {
        self.link.lock().connection.lose(reason.to_owned());
        self.note_lost(reason);
    }

    /// The device goes: ends the connection without telling anybody.
    pub(super) fn close(&self) {
        self.on_lost.lock().take();
        self.link
            .lock()
            .connection
            .lose("the device is gone".into());
    }

    /// The backend signalled queue `index`, which has no vector of its own.
    pub(super) fn relay(&self, index: u16) {
        if let Some(driver) = self.driver.lock().as_ref() {
            driver.queue_used(index);
        }
    }

    /// The backend cannot go on with a queue.
    pub(super) fn queue_failed(&self) {
        if let Some(driver) = self.driver.lock().as_ref() {
            driver.needs_reset(&"the vhost-user backend reports an error of a queue");
        }
    }

    /// Does something with the backend within [`LIMIT`], and notices when it is lost.
    fn operate<T>(
        &self,
        operation: impl FnOnce(&mut Link) -> Result<T, VhostUserError>,
    ) -> Result<T, VhostUserError> {
        let mut link = self.link.lock();
        link.connection.begin();
        let result = operation(&mut link);
        let lost = link.connection.lost().map(str::to_owned);
        drop(link);
        if let Some(reason) = lost {
            self.note_lost(&reason);
        }
        result
    }

    /// Tells everybody that the backend is lost, once.
    fn note_lost(&self, reason: &str) {
        if self.lost.set(reason.to_owned()).is_err() {
            return;
        }
        if let Some(driver) = self.driver.lock().as_ref() {
            driver.needs_reset(&reason);
        }
        let on_lost = self.on_lost.lock().take();
        if let Some(on_lost) = on_lost {
            on_lost(reason);
        }
    }
}

/// Agrees with a backend that just connected.
fn negotiate(connection: &mut Connection, pairs: u16) -> Result<Offer, VhostUserError> {
    connection.begin();
    let features = connection.ask::<u64>(Request::GetFeatures, &[])?;
    for (bit, name, remedy) in [
        (
            F_PROTOCOL_FEATURES,
            "VHOST_USER_F_PROTOCOL_FEATURES",
            "use a backend of this decade",
        ),
        (
            feature::VERSION_1,
            "VIRTIO_F_VERSION_1",
            "legacy backends are not supported",
        ),
    ] {
        if features & bit == 0 {
            return Err(VhostUserError::Missing { name, remedy });
        }
    }
    let offered = connection.ask::<u64>(Request::GetProtocolFeatures, &[])?;
    let protocol = offered & protocol::KNOWN;
    connection.tell(Request::SetProtocolFeatures, protocol.as_bytes(), &[])?;
    if protocol & protocol::REPLY_ACK != 0 {
        connection.acknowledge();
    }
    connection.tell(Request::SetOwner, &[], &[])?;
    if protocol & protocol::MQ != 0 {
        // Backends tell pairs (DPDK, as QEMU takes it) or queues (rust-vmm). What they have too
        // few of in the second case is refused when a ring is set up.
        let offered = connection.ask::<u64>(Request::GetQueueNum, &[])?;
        if offered < u64::from(pairs) {
            return Err(VhostUserError::Queues { pairs, offered });
        }
    } else if pairs > 1 {
        return Err(VhostUserError::Missing {
            name: "VHOST_USER_PROTOCOL_F_MQ",
            remedy: "set num_queues=2, or give a backend with more queues",
        });
    }
    let mtu = if protocol & protocol::CONFIG != 0 && features & net::MTU != 0 {
        read_mtu(connection)?
    } else {
        None
    };
    Ok(Offer {
        features,
        protocol,
        mtu,
    })
}

/// The MTU in the backend's configuration space; `None` if it is none that may be there.
fn read_mtu(connection: &mut Connection) -> Result<Option<u16>, VhostUserError> {
    let size = u32::try_from(CONFIG_BYTES).unwrap_or(0);
    let part = ConfigPart {
        offset: 0,
        size,
        flags: 0,
        bytes: [0; CONFIG_BYTES],
    };
    let request = Request::GetConfig;
    let Some(answer) = connection.try_ask::<ConfigPart>(request, part.as_bytes())? else {
        return Ok(None);
    };
    if (answer.offset, answer.size) != (0, size) {
        let reason = format!("{} bytes from {}", answer.size, answer.offset);
        return Err(ExchangeError::BadReply { request, reason }.into());
    }
    let [.., low, high] = answer.bytes;
    let mtu = u16::from_le_bytes([low, high]);
    Ok((mtu >= MIN_MTU).then_some(mtu))
}

/// Facts about a session for whoever looks at the VM.
pub(super) fn facts(session: &Session) -> BTreeMap<String, String> {
    let dirty_source = match session.can_log() {
        Ok(()) => "shared log".to_owned(),
        Err(error) => vm_migration::ErrorChain(&error).to_string(),
    };
    BTreeMap::from([
        ("backend".to_owned(), "vhost-user".to_owned()),
        ("socket".to_owned(), session.path().display().to_string()),
        ("dirty_source".to_owned(), dirty_source),
    ])
}
