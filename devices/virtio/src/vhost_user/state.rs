//! What the driver sets at runtime, shared by the device and its control queue; and the saved
//! state, which is just that.

use std::sync::Arc;

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use vm_migration::StateError;
use vm_migration::saved;

use super::session::{Session, VhostUserError};
use crate::device::DeviceError;
use crate::net::ctrl::{Command, Refusal, Target};
use crate::net::runtime::link_status;

/// Version of [`SavedCard`].
const VERSION: u16 = 1;
/// Most bytes of a [`SavedCard`]; its fields take 16 at most.
const MAX_BYTES: usize = 64;

/// What the driver sets; the default is the state after a reset.
#[derive(Clone, Copy, Debug)]
struct Values {
    pairs: u16,
    announce: bool,
}

impl Default for Values {
    fn default() -> Self {
        Self {
            pairs: 1,
            announce: false,
        }
    }
}

/// The settings, and the session they act on.
pub(super) struct Settings {
    session: Arc<Session>,
    values: Mutex<Values>,
}

impl Settings {
    pub(super) fn new(session: Arc<Session>) -> Self {
        Self {
            session,
            values: Mutex::default(),
        }
    }

    /// Queue pairs in use.
    pub(super) fn pairs(&self) -> u16 {
        self.values.lock().pairs
    }

    /// Uses the first `pairs` pairs from now on.
    pub(super) fn set_pairs(&self, pairs: u16) -> Result<(), VhostUserError> {
        self.session.set_pairs(pairs)?;
        self.values.lock().pairs = pairs;
        Ok(())
    }

    /// Whether the guest is to announce itself, or be announced.
    pub(super) fn announce_pending(&self) -> bool {
        self.values.lock().announce
    }

    /// It has.
    pub(super) fn announced(&self) {
        self.values.lock().announce = false;
    }

    /// The link status field of the configuration.
    pub(super) fn status(&self) -> u16 {
        link_status(self.announce_pending())
    }

    pub(super) fn reset(&self) {
        *self.values.lock() = Values::default();
    }

    /// The guest arrived with `pairs` pairs in use; switches know it at the source's port.
    pub(super) fn arrived(&self, pairs: u16) {
        *self.values.lock() = Values {
            pairs,
            announce: true,
        };
    }
}

/// Ferry serves the control queue itself. A backend cannot be told of hashes and tables, nor of offloads that
/// change, so those are not offered.
impl Target for Arc<Settings> {
    fn carry_out(&self, command: Command) -> Result<(), Refusal> {
        match command {
            Command::Pairs(pairs) => self
                .set_pairs(pairs)
                .map_err(|cause| Refusal::Failed(Box::new(cause))),
            Command::Announced => {
                self.announced();
                Ok(())
            }
            Command::Hash(_) | Command::Rss(_) | Command::Offloads(_) => Err(Refusal::NotOffered),
        }
    }
}

/// Saved state of a card. Untrusted when it comes back.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(super) struct SavedCard {
    mac: [u8; 6],
    mtu: Option<u16>,
    pairs: u16,
}

impl SavedCard {
    /// Queue pairs in use.
    pub(super) fn pairs(&self) -> u16 {
        self.pairs
    }

    /// Whether a device with `max_pairs` and `mtu` can take it; gives the hardware address.
    pub(super) fn check(&self, max_pairs: u16, mtu: Option<u16>) -> Result<[u8; 6], String> {
        if !(1..=max_pairs).contains(&self.pairs) {
            return Err(format!(
                "{} queue pairs are in use, the device here has {max_pairs}",
                self.pairs
            ));
        }
        if self.mtu != mtu {
            return Err(format!(
                "the guest was told an MTU of {:?}, the device here has {mtu:?}: configure the same",
                self.mtu
            ));
        }
        Ok(self.mac)
    }
}

/// The state of card `id`.
pub(super) fn save(
    id: &str,
    mac: [u8; 6],
    mtu: Option<u16>,
    settings: &Settings,
) -> Result<Vec<u8>, DeviceError> {
    let card = SavedCard {
        mac,
        mtu,
        pairs: settings.pairs(),
    };
    saved::encode(id, VERSION, &card).map_err(|error| DeviceError::BadState {
        device: id.to_owned(),
        reason: format!("cannot be written: {error}"),
    })
}

/// What [`save`] gave.
pub(super) fn load(id: &str, state: &[u8]) -> Result<SavedCard, StateError> {
    saved::decode(id, VERSION, MAX_BYTES, state)
}
