//! What the driver sets at runtime, shared by the device, its control queue and its workers; and
//! the saved state, which is just that.

use std::io;
use std::sync::Arc;

use net_util::config::{STATUS_ANNOUNCE, STATUS_LINK_UP};
use net_util::hash::{HashConfig, HashTypes};
use net_util::tap::Offloads;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use super::backend::NetBackend;
use super::ctrl::{Command, Refusal, Target};
use super::header::HashCell;

/// Version of [`NetState`].
pub(super) const STATE_VERSION: u16 = 1;

/// Everything the driver sets; the default is the state after a reset.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(super) struct Runtime {
    /// Queue pairs in use.
    pub(super) pairs: u16,
    /// Offloads the driver chose by command, as feature bits; else those negotiated hold.
    pub(super) offloads: Option<u64>,
    /// What is hashed.
    pub(super) hash: HashConfig,
    /// The driver has been asked to announce itself and has not yet done so.
    pub(super) announce: bool,
}

impl Default for Runtime {
    fn default() -> Self {
        Self {
            pairs: 1,
            offloads: None,
            hash: HashConfig::default(),
            announce: false,
        }
    }
}

/// Saved state of a network card. Untrusted when it comes back.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(super) struct NetState {
    pub(super) version: u16,
    pub(super) mac: [u8; 6],
    pub(super) mtu: Option<u16>,
    pub(super) runtime: Runtime,
}

impl NetState {
    /// Whether a device with `max_pairs` can take it.
    pub(super) fn check(&self, max_pairs: u16) -> Result<(), String> {
        let Runtime { pairs, hash, .. } = self.runtime;
        if !(1..=max_pairs).contains(&pairs) {
            return Err(format!(
                "{pairs} queue pairs are in use, the device here has {max_pairs}"
            ));
        }
        if !hash.types.is_subset_of(HashTypes::ALL) {
            return Err(format!("unknown hash types in {:?}", hash.types));
        }
        Ok(())
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

/// The runtime settings and what they act on.
pub(super) struct Shared {
    backends: Vec<Arc<dyn NetBackend>>,
    runtime: Mutex<Runtime>,
    pub(super) hash: Arc<HashCell>,
}

impl Shared {
    pub(super) fn new(backends: Vec<Arc<dyn NetBackend>>) -> Self {
        let runtime = Runtime::default();
        Self {
            backends,
            hash: Arc::new(HashCell::new(&runtime.hash)),
            runtime: Mutex::new(runtime),
        }
    }

    pub(super) fn backends(&self) -> &[Arc<dyn NetBackend>] {
        &self.backends
    }

    pub(super) fn runtime(&self) -> Runtime {
        *self.runtime.lock()
    }

    /// Replaces all settings at once; the host is told at the next activation.
    pub(super) fn replace(&self, runtime: Runtime) {
        *self.runtime.lock() = runtime;
        self.hash.set(&runtime.hash);
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
        self.runtime.lock().hash = config;
        self.hash.set(&config);
    }

    /// Uses the first `pairs` pairs. On error the pairs in use are as before.
    pub(super) fn set_pairs(&self, pairs: u16) -> io::Result<()> {
        let before = self.runtime.lock().pairs;
        if let Err(error) = self.attach(pairs) {
            if let Err(error) = self.attach(before) {
                tracing::error!(%error, "queues could not be put back as they were");
            }
            return Err(error);
        }
        self.runtime.lock().pairs = pairs;
        Ok(())
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
        for (index, backend) in self.backends.iter().enumerate().skip(1) {
            backend.set_attached(index < usize::from(pairs))?;
        }
        Ok(())
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
