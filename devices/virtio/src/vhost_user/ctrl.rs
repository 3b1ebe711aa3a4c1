//! The control queue (virtio 1.2, section 5.1.6.5), which Ferry serves itself: it has commands
//! for the number of pairs and for announcements. A backend cannot be told of offloads that
//! change, so those are not offered.

use std::sync::Arc;

use net_util::ctrl::{
    ACK_ERR, ACK_OK, CLASS_ANNOUNCE, CLASS_MQ, CommandHeader, CtrlError, MqCommand, MqLimits,
};
use net_util::hash::HashTypes;
use vm_migration::memory::GuestMemory;
use zerocopy::FromBytes;

use super::session::VhostUserError;
use super::state::Settings;
use crate::net::features;
use crate::queue::{Chain, RingError};
use crate::server::Handler;

/// Bytes of a command that are looked at: header and a number of pairs.
const COMMAND_BYTES: usize = size_of::<CommandHeader>() + size_of::<u16>();
/// `VIRTIO_NET_CTRL_ANNOUNCE_ACK`.
const ANNOUNCE_ACK: u8 = 0;

/// Carries out commands.
pub(super) struct Control {
    settings: Arc<Settings>,
    limits: MqLimits,
    features: u64,
}

/// Why a command is answered with an error.
#[derive(Debug, thiserror::Error)]
enum Refusal {
    /// The driver asked for what is not allowed.
    #[error(transparent)]
    Command(#[from] CtrlError),
    /// The backend failed.
    #[error(transparent)]
    Backend(#[from] VhostUserError),
}

impl Control {
    /// For a driver that negotiated `features` and has `max_pairs` to use.
    pub(super) fn new(settings: Arc<Settings>, max_pairs: u16, features: u64) -> Self {
        Self {
            settings,
            limits: MqLimits {
                max_pairs,
                hash_types: HashTypes::NONE,
                multi_queue: features & features::MQ != 0,
                rss: false,
                hash_report: false,
            },
            features,
        }
    }

    fn carry_out(&self, command: &[u8]) -> Result<(), Refusal> {
        let (header, body) =
            CommandHeader::read_from_prefix(command).map_err(|_| CtrlError::Short {
                len: command.len(),
                field: "class and command",
            })?;
        let unavailable = CtrlError::Unavailable {
            class: header.class,
            command: header.command,
        };
        match (header.class, header.command) {
            (CLASS_MQ, command) => match MqCommand::parse(command, body, &self.limits)? {
                MqCommand::Pairs(pairs) => Ok(self.settings.set_pairs(pairs)?),
                // Not offered, so the parser never gives them.
                MqCommand::Hash(_) | MqCommand::Rss(_) => Err(unavailable.into()),
            },
            (CLASS_ANNOUNCE, ANNOUNCE_ACK) if self.features & features::GUEST_ANNOUNCE != 0 => {
                self.settings.announced();
                Ok(())
            }
            _ => Err(unavailable.into()),
        }
    }
}

impl Handler for Control {
    fn handle(&mut self, memory: &GuestMemory, chain: &Chain) -> Result<u32, RingError> {
        let mut command = [0; COMMAND_BYTES];
        let len = chain.read_at(memory, 0, &mut command)?;
        let answer = match self.carry_out(command.get(..len).unwrap_or_default()) {
            Ok(()) => ACK_OK,
            Err(refusal) => {
                tracing::debug!(%refusal, "control command refused");
                ACK_ERR
            }
        };
        match chain.write_at(memory, 0, &[answer])? {
            0 => Err(RingError::Request(
                "control command without room for its answer",
            )),
            _ => Ok(1),
        }
    }
}
