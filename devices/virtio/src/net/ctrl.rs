//! The control queue (virtio 1.2, section 5.1.6.5): reads commands and checks them against what was
//! negotiated. A [`Target`] carries them out.

use net_util::ctrl::{
    ACK_ERR, ACK_OK, CLASS_ANNOUNCE, CLASS_GUEST_OFFLOADS, CLASS_MQ, CommandHeader, CtrlError,
    GUEST_OFFLOADS_SET, MAX_MQ_BODY_BYTES, MqCommand, MqLimits, RssConfig, parse_guest_offloads,
};
use net_util::hash::HashConfig;
use vm_migration::memory::GuestMemory;
use zerocopy::FromBytes;

use super::features;
use crate::queue::{Chain, RingError};
use crate::server::Handler;

/// Bytes of a command that are looked at: header and longest body.
const COMMAND_BYTES: usize = size_of::<CommandHeader>() + MAX_MQ_BODY_BYTES;
/// `VIRTIO_NET_CTRL_ANNOUNCE_ACK`.
const ANNOUNCE_ACK: u8 = 0;

/// What a driver may ask for, given what it negotiated.
#[derive(Clone, Debug)]
pub(crate) enum Command {
    /// Use the first so many queue pairs.
    Pairs(u16),
    /// Hash so, and leave it to the host which queue a packet goes to.
    Hash(HashConfig),
    /// Hash so, and steer by the hash.
    Rss(RssConfig),
    /// Have these offloads on, as feature bits, and no other.
    Offloads(u64),
    /// The driver has announced the guest to the network.
    Announced,
}

/// Who carries commands out.
pub(crate) trait Target: Send + 'static {
    /// Carries out `command`.
    ///
    /// # Errors
    /// [`Refusal::Failed`], and [`Refusal::NotOffered`] for what was not to be negotiated.
    fn carry_out(&self, command: Command) -> Result<(), Refusal>;
}

/// Why a command is answered with an error.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Refusal {
    /// The driver asked for what is not allowed.
    #[error(transparent)]
    Command(#[from] CtrlError),
    /// The device has no such command.
    #[error("the device does not offer this command")]
    NotOffered,
    /// The host or the backend failed.
    #[error(transparent)]
    Failed(Box<dyn std::error::Error + Send + Sync>),
}

/// Serves the queue for a driver that negotiated `features`.
pub(crate) struct Control<T> {
    target: T,
    limits: MqLimits,
    features: u64,
}

impl<T: Target> Control<T> {
    pub(crate) fn new(target: T, limits: MqLimits, features: u64) -> Self {
        Self {
            target,
            limits,
            features,
        }
    }

    fn parse(&self, command: &[u8]) -> Result<Command, CtrlError> {
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
                MqCommand::Pairs(pairs) => Ok(Command::Pairs(pairs)),
                MqCommand::Hash(config) => Ok(Command::Hash(config)),
                MqCommand::Rss(config) => Ok(Command::Rss(config)),
            },
            (CLASS_GUEST_OFFLOADS, GUEST_OFFLOADS_SET)
                if self.features & features::CTRL_GUEST_OFFLOADS != 0 =>
            {
                let negotiated = self.features & features::GUEST_OFFLOADS;
                parse_guest_offloads(body, negotiated).map(Command::Offloads)
            }
            (CLASS_ANNOUNCE, ANNOUNCE_ACK) if self.features & features::GUEST_ANNOUNCE != 0 => {
                Ok(Command::Announced)
            }
            _ => Err(unavailable),
        }
    }

    fn carry_out(&self, command: &[u8]) -> Result<(), Refusal> {
        self.target.carry_out(self.parse(command)?)
    }
}

impl<T: Target> Handler for Control<T> {
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
