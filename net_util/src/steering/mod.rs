//! Choosing a packet's queue in the tap's kernel, before anybody wakes up for it.
//!
//! A tap with several queues spreads packets by a hash of its own. With receive-side scaling (RSS)
//! the guest says which queue a flow goes to. A [`SteeringProgram`] does in the kernel what the
//! guest said: it finds the flow as [`flow::parse`](crate::flow::parse) does, hashes it as
//! [`PacketHasher`](crate::toeplitz::PacketHasher) does, and takes the queue from the guest's table as
//! [`RssConfig::queue_for`](crate::ctrl::RssConfig::queue_for) does.
//!
//! ```no_run
//! use std::num::NonZeroU16;
//! use net_util::ctrl::RssConfig;
//! use net_util::hash::{HashConfig, HashKey, HashTypes};
//! use net_util::steering::SteeringProgram;
//! use net_util::tap::{Tap, TapName};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let tap = Tap::open(&TapName::new("ferry0")?, NonZeroU16::MIN.saturating_add(1))?;
//! let mut program = SteeringProgram::load()?;
//! // Every other value of the hash goes to queue 1.
//! let hash = HashConfig { types: HashTypes::ALL, key: HashKey::from([0x6d; 40]) };
//! program.update(&RssConfig::new(hash, Box::new([0, 1]), 0, 2)?);
//! if let Some(queue) = tap.queues().first() {
//!     queue.set_steering(Some(&program))?;
//! }
//! # Ok(())
//! # }
//! ```
//!
//! | module | what |
//! |---|---|
//! | `asm` | an assembler with labels |
//! | `program` | the program, instruction by instruction |
//! | `shared` | types, key and table, in memory that program and Ferry share |
//! | `bpf` | bpf(2) and the mapping |
//!
//! # What it promises
//! - A packet is steered by one configuration: [`SteeringProgram::update`] lets each see all of the
//!   old one or all of the new one.
//! - What the program is not sure of goes to the queue for packets without a hash, never to a wrong
//!   one: more than [`MAX_TAGS`], [`MAX_HEADERS`] or [`MAX_OPTIONS`], and packets that two updates
//!   overtake. Whoever takes packets off the queues can tell by the flow and hand them over.
//! - The kernel takes the queue modulo those attached, and numbers them in the order of their
//!   attachment (see [`TapQueue::attach`](crate::tap::TapQueue::attach)).
//!
//! # Privileges
//! Loading takes bpf(2), CAP_BPF and CAP_PERFMON; nothing else does. The configuration is in a map that is
//! mapped into memory, so to change it is to write memory, and to attach is an ioctl that any owner
//! of the tap may make. So a privileged parent can [`load`](SteeringProgram::load) a program for
//! each tap and pass both descriptors to an unprivileged Ferry, which
//! [adopts](SteeringProgram::adopt) them.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, FileType, StatxFlags, statx};
use rustix::io::Errno;

use crate::ctrl::RssConfig;

mod asm;
mod bpf;
mod error;
mod program;
mod shared;

pub use error::SteeringError;
pub use program::{MAX_HEADERS, MAX_OPTIONS, MAX_TAGS};

/// A program in the kernel that steers packets of one tap.
///
/// It is for one tap, since it has one configuration. Dropping it leaves a tap that has it
/// steered as before.
#[derive(Debug)]
pub struct SteeringProgram {
    program: OwnedFd,
    map: OwnedFd,
    mapping: bpf::Mapping,
}

impl SteeringProgram {
    /// Loads the program. Until the first [`update`](Self::update) all packets go to queue 0.
    ///
    /// # Errors
    /// [`SteeringError`] says what is missing: steer in the VMM then.
    pub fn load() -> Result<Self, SteeringError> {
        let probe = program::probe().ok_or(SteeringError::Assembly)?;
        bpf::load(&probe, &mut []).map_err(refused)?;
        let map = bpf::create_map().map_err(refused)?;
        let program = program::assemble(map.as_fd()).ok_or(SteeringError::Assembly)?;
        let program = bpf::load_program(&program).map_err(rejected)?;
        let mapping = bpf::Mapping::map(&map).map_err(|errno| SteeringError::Mapping {
            source: errno.into(),
        })?;
        mapping.shared().claim();
        Ok(Self {
            program,
            map,
            mapping,
        })
    }

    /// Takes over what another process of the same version loaded, by the descriptors of program
    /// and map. It takes no privilege.
    ///
    /// That `program` is a steering program and uses this map cannot be told from here; a
    /// descriptor of something else is refused when it is attached.
    ///
    /// # Errors
    /// `map` is no steering map, or cannot be mapped.
    pub fn adopt(program: OwnedFd, map: OwnedFd) -> Result<Self, SteeringError> {
        // Only a file could be shorter than its mapping, where a read would be fatal.
        let status = statx(&map, "", AtFlags::EMPTY_PATH, StatxFlags::TYPE)
            .map_err(|errno| not_our_map(Some(errno)))?;
        if FileType::from_raw_mode(status.stx_mode.into()) != FileType::Unknown {
            return Err(not_our_map(None));
        }
        let mapping = bpf::Mapping::map(&map).map_err(|errno| not_our_map(Some(errno)))?;
        if !mapping.shared().is_claimed() {
            return Err(not_our_map(None));
        }
        Ok(Self {
            program,
            map,
            mapping,
        })
    }

    /// Has packets steered by `config` from now on.
    ///
    /// It writes memory and makes no system call. A packet sees all of `config` or nothing of it.
    pub fn update(&mut self, config: &RssConfig) {
        self.mapping.shared().update(config);
    }

    /// The program's descriptor, to pass to who [adopts](Self::adopt) it.
    pub fn program_fd(&self) -> BorrowedFd<'_> {
        self.program.as_fd()
    }

    /// The map's descriptor, to pass to who [adopts](Self::adopt) it.
    pub fn map_fd(&self) -> BorrowedFd<'_> {
        self.map.as_fd()
    }
}

fn refused(errno: Errno) -> SteeringError {
    let source = errno.into();
    match errno {
        Errno::PERM | Errno::ACCESS => SteeringError::Forbidden { source },
        _ => SteeringError::Unsupported { source },
    }
}

fn rejected((errno, log): (Errno, String)) -> SteeringError {
    let source = errno.into();
    SteeringError::Rejected { log, source }
}

fn not_our_map(errno: Option<Errno>) -> SteeringError {
    SteeringError::NotOurMap {
        source: errno.map(Into::into),
    }
}

#[cfg(test)]
mod tests;
