//! The control queue (virtio 1.2, section 5.1.6.5).

use std::sync::Arc;

use net_util::ctrl::{
    ACK_ERR, ACK_OK, CLASS_ANNOUNCE, CLASS_GUEST_OFFLOADS, CLASS_MQ, CommandHeader, CtrlError,
    GUEST_OFFLOADS_SET, MAX_MQ_BODY_BYTES, MqCommand, MqLimits, parse_guest_offloads,
};
use net_util::tap::Offloads;
use vm_migration::memory::GuestMemory;
use zerocopy::FromBytes;

use super::features;
use super::runtime::Shared;
use crate::queue::{Chain, RingError};
use crate::server::Handler;

/// Bytes of a command that are looked at: header and longest body.
const COMMAND_BYTES: usize = size_of::<CommandHeader>() + MAX_MQ_BODY_BYTES;
/// `VIRTIO_NET_CTRL_ANNOUNCE_ACK`.
const ANNOUNCE_ACK: u8 = 0;

/// Carries out commands.
pub(super) struct Control {
    shared: Arc<Shared>,
    limits: MqLimits,
    features: u64,
}

/// Why a command is answered with an error.
#[derive(Debug, thiserror::Error)]
enum Refusal {
    /// The driver asked for what is not allowed.
    #[error(transparent)]
    Command(#[from] CtrlError),
    /// The host refused.
    #[error("{operation}: {cause}")]
    Host {
        /// What was tried.
        operation: &'static str,
        /// What the host said.
        #[source]
        cause: std::io::Error,
    },
}

impl Control {
    pub(super) fn new(shared: Arc<Shared>, limits: MqLimits, features: u64) -> Self {
        Self {
            shared,
            limits,
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
                MqCommand::Pairs(pairs) => self.set_pairs(pairs),
                MqCommand::Hash(config) => {
                    self.shared.set_hash(config);
                    Ok(())
                }
                // Not offered, so the parser never gives it.
                MqCommand::Rss(_) => Err(unavailable.into()),
            },
            (CLASS_GUEST_OFFLOADS, GUEST_OFFLOADS_SET)
                if self.features & features::CTRL_GUEST_OFFLOADS != 0 =>
            {
                let negotiated = self.features & features::GUEST_OFFLOADS;
                self.set_offloads(parse_guest_offloads(body, negotiated)?)
            }
            (CLASS_ANNOUNCE, ANNOUNCE_ACK) if self.features & features::GUEST_ANNOUNCE != 0 => {
                self.shared.announced();
                Ok(())
            }
            _ => Err(unavailable.into()),
        }
    }

    fn set_pairs(&self, pairs: u16) -> Result<(), Refusal> {
        self.shared.set_pairs(pairs).map_err(|cause| Refusal::Host {
            operation: "attaching or detaching a queue",
            cause,
        })
    }

    fn set_offloads(&self, offloads: u64) -> Result<(), Refusal> {
        self.shared
            .set_offloads(offloads, Offloads::from_guest_features(offloads))
            .map_err(|cause| Refusal::Host {
                operation: "setting the offloads",
                cause,
            })
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
