//! What of hashing and steering the tap's kernel does for a card.
//!
//! Steering is right without any help, as workers hand packets over, and so are hash reports, as
//! workers calculate them. The kernel saves them work, as far as it can do what the driver asked
//! for, in this order:
//!
//! 1. It hashes, reports and steers (patched kernels only, see [`net_util::tap::HashAbi`]).
//! 2. A program in it steers ([`QueueSteering`]).
//! 3. Nothing: it spreads packets over the queues in use by a hash of its own.
//!
//! A kernel's reports are believed only as long as they agree with ours ([`super::kernel_hash`]).

use std::fmt;
use std::io;

use net_util::ctrl::RssConfig;
use net_util::tap::{HashAbi, KernelHash, KernelRss};
use vm_migration::ErrorChain;

use super::backend::NetBackend;
use super::runtime::Hashing;

/// Who calculates the hashes that are reported.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum HashedBy {
    /// The card's threads.
    #[default]
    Software,
    /// The tap's kernel.
    Kernel,
}

impl fmt::Display for HashedBy {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(match self {
            Self::Software => "software",
            Self::Kernel => "kernel",
        })
    }
}

/// Who chooses the queue a packet comes from. Workers correct what is wrong in any case.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum SteeredBy {
    /// The kernel, by a hash of its own.
    #[default]
    Tap,
    /// The kernel, by the driver's table.
    Kernel,
    /// A program in the kernel, by the driver's table.
    Program,
}

impl fmt::Display for SteeredBy {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(match self {
            Self::Tap => "tap",
            Self::Kernel => "kernel",
            Self::Program => "ebpf",
        })
    }
}

/// What a card's kernel does for it now.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct OffloadStatus {
    /// Who hashes.
    pub hashes: HashedBy,
    /// Who steers.
    pub steering: SteeredBy,
    /// Why the kernel does not do more; empty if it does all it could.
    pub why: String,
}

/// A program in the kernel that chooses the queue of the tap for each packet.
pub trait QueueSteering: Send {
    /// Steers by `table` from now on; `None` leaves the choice to the tap.
    ///
    /// # Errors
    /// The host's; then it is as before.
    fn steer(&mut self, table: Option<&RssConfig>) -> io::Result<()>;
}

/// Is told why the kernel's hash reports are not believed any more.
pub type OnMistrust = Box<dyn Fn(&str) + Send + Sync>;

/// What the kernel may be asked to do for a card.
pub struct KernelHelp {
    /// How its taps hash, if they can.
    pub abi: HashAbi,
    /// The program that steers, or why there is none.
    pub steering: Result<Box<dyn QueueSteering>, String>,
    /// Told, once until the card is reset, when the kernel's reports turn out to be wrong, and why
    /// that is known.
    pub on_mistrust: OnMistrust,
}

impl fmt::Debug for KernelHelp {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_struct("KernelHelp")
            .field("abi", &self.abi)
            .field("steering", &self.steering.as_ref().map(|_| ()))
            .finish_non_exhaustive()
    }
}

/// What was last asked of the kernel.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Set {
    Nothing,
    Hash,
    Program,
}

/// What the driver wants, for the kernel to help with.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wish<'a> {
    pub(super) hashing: &'a Hashing,
    /// Pairs in use, all of which are attached.
    pub(super) pairs: u16,
    /// Hashes are reported.
    pub(super) report: bool,
    /// The kernel's reports have not been wrong.
    pub(super) trusted: bool,
}

/// The kernel's help for one card.
pub(super) struct Offload {
    abi: HashAbi,
    steering: Result<Box<dyn QueueSteering>, String>,
    set: Set,
}

impl Offload {
    pub(super) fn new(abi: HashAbi, steering: Result<Box<dyn QueueSteering>, String>) -> Self {
        Self {
            abi,
            steering,
            set: Set::Nothing,
        }
    }

    /// Has the kernel do what it can of `wish`, on the interface that `backend` is a queue of.
    pub(super) fn apply(&mut self, backend: &dyn NetBackend, wish: Wish<'_>) -> OffloadStatus {
        let Hashing::Table(table) = wish.hashing else {
            self.clear(backend);
            return OffloadStatus {
                why: "the driver has not set a table".to_owned(),
                ..OffloadStatus::default()
            };
        };
        let no_hash = match self.hash(backend, table, wish) {
            Ok(()) => {
                return OffloadStatus {
                    hashes: if wish.report {
                        HashedBy::Kernel
                    } else {
                        HashedBy::Software
                    },
                    steering: SteeredBy::Kernel,
                    why: String::new(),
                };
            }
            Err(why) => why,
        };
        if self.set == Set::Hash {
            self.clear(backend);
        }
        match self.program(table) {
            Ok(()) => OffloadStatus {
                steering: SteeredBy::Program,
                why: no_hash,
                ..OffloadStatus::default()
            },
            Err(no_program) => OffloadStatus {
                why: format!("{no_hash}; {no_program}"),
                ..OffloadStatus::default()
            },
        }
    }

    /// Has the program steer; why not, if it does not.
    fn program(&mut self, table: &RssConfig) -> Result<(), String> {
        let program = self.steering.as_mut().map_err(|why| why.clone())?;
        program
            .steer(Some(table))
            .map_err(|error| ErrorChain(&error).to_string())?;
        self.set = Set::Program;
        Ok(())
    }

    /// Has the kernel hash and steer; why not, if it does not.
    fn hash(
        &mut self,
        backend: &dyn NetBackend,
        table: &RssConfig,
        wish: Wish<'_>,
    ) -> Result<(), String> {
        if self.abi == HashAbi::None {
            return Err("this kernel's taps cannot hash".to_owned());
        }
        if !wish.trusted {
            return Err("the kernel reported wrong hashes".to_owned());
        }
        let types = table.hash().types;
        if !types.is_subset_of(self.abi.types()) {
            return Err(format!(
                "this kernel's taps hash {:?}, not all of {types:?}",
                self.abi.types()
            ));
        }
        if self.set == Set::Program {
            self.clear(backend);
        }
        let hash = KernelHash {
            report: wish.report,
            rss: Some(KernelRss {
                table: table.table(),
                unclassified: table.unclassified(),
            }),
            types,
            key: table.hash().key,
            queues: wish.pairs,
        };
        backend
            .set_kernel_hash(self.abi, Some(&hash))
            .map_err(|error| ErrorChain(&error).to_string())?;
        self.set = Set::Hash;
        Ok(())
    }

    /// Ends all that was asked of the kernel.
    pub(super) fn clear(&mut self, backend: &dyn NetBackend) {
        let cleared = match self.set {
            Set::Nothing => Ok(()),
            Set::Hash => backend.set_kernel_hash(self.abi, None),
            Set::Program => match &mut self.steering {
                Ok(program) => program.steer(None),
                Err(_) => Ok(()),
            },
        };
        if let Err(error) = cleared {
            // Workers correct what the kernel goes on to do.
            tracing::warn!(%error, "the tap still hashes or steers as before");
        }
        self.set = Set::Nothing;
    }
}
