//! Hashing, hash reports and RSS in the tap's kernel.
//!
//! No released kernel has them. Two generations of a series of patches do ("tun: Introduce
//! virtio-net hashing feature", RFC v5 of 2024 and v12 of 2025), so [`HashAbi::probe`] looks, and
//! whoever runs such a kernel has the use of it. Both have defects, found by reading them, which
//! decide what [`TapQueue::set_vnet_hash`] is ready to ask for:
//!
//! | asked for | because otherwise |
//! |---|---|
//! | reports only together with RSS | the report has the hash of another function than the guest's |
//! | at least two queues | the code that hashes is not reached |
//! | types with one of IPv4, TCPv4, UDPv4 | all but 4 bytes of the key are uninitialised memory |
//! | the key with all its 40 bytes | shorter ones are read past their end |
//!
//! One defect cannot be seen from here: tunnels are entered, and the inner header hashed. Whoever
//! uses the reports compares the first of them with [`PacketHasher`](crate::toeplitz::PacketHasher).

use std::io;

use rustix::io::Errno;

use super::{TapError, TapName, TapQueue, ioctl, no_tun_device, open_unattached};
use crate::ctrl::RssError;
use crate::hash::{HashKey, HashTypes};
use crate::header::HeaderSize;

mod argument;

pub use argument::VnetHashArgument;

/// Bytes of RFC v5's `struct tun_vnet_hash { u16 flags; u8 pad[2]; u32 types; }`.
pub(super) const CAP_BYTES: usize = 8;

/// `TUN_VNET_HASH_REPORT` of RFC v5.
const FLAG_REPORT: u16 = 1;
/// `TUN_VNET_HASH_RSS` of RFC v5.
const FLAG_RSS: u16 = 2;

/// The types that every version of the patches had: all but those of extension headers.
const PLAIN_TYPES: u32 = 0x3f;

/// IPv4, TCPv4 and UDPv4; with one of them the patches take all of the key.
const V4_TYPES: u32 = 0x7;

/// By which interface the kernel's taps can hash, if by any.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum HashAbi {
    /// By none, as all released kernels.
    None,
    /// By `TUNSETVNETHASH`, as the patches from v3 to v11.
    RfcV5 {
        /// Types of hash it offers.
        types: HashTypes,
        /// Whether it can steer by them.
        rss: bool,
    },
    /// By `TUNSETVNETREPORTINGRSS` and its neighbours, as the patches' v12.
    V12 {
        /// Types of hash it offers.
        types: HashTypes,
    },
}

impl HashAbi {
    /// Asks the running kernel, through a file that is no queue of any tap.
    ///
    /// # Errors
    /// `/dev/net/tun` cannot be opened or used. That the kernel does not know the question is
    /// [`HashAbi::None`].
    pub fn probe() -> Result<Self, TapError> {
        let fd = open_unattached()?;
        if let Some(answer) = answered(ioctl::tun_get_vnet_hash_cap(&fd))? {
            return Ok(Self::from_cap(answer));
        }
        let types = answered(ioctl::tun_get_vnet_hash_types(&fd))?;
        Ok(types.map_or(Self::None, Self::from_types))
    }

    /// What an answer to `TUNGETVNETHASHCAP` says, whatever its bytes are.
    ///
    /// Types that Ferry does not know are left out, and a kernel that cannot report is as one
    /// without the interface.
    pub fn from_cap(answer: [u8; CAP_BYTES]) -> Self {
        let [f0, f1, _, _, types @ ..] = answer;
        let flags = u16::from_ne_bytes([f0, f1]);
        let types = HashTypes::from_bits(u32::from_ne_bytes(types) & HashTypes::ALL.bits());
        if flags & FLAG_REPORT == 0 || types.is_empty() {
            return Self::None;
        }
        Self::RfcV5 {
            types,
            rss: flags & FLAG_RSS != 0,
        }
    }

    /// What an answer to `TUNGETVNETHASHTYPES` says, whatever it is.
    ///
    /// The number of this ioctl was proposed for `TUNGETQUEUEINDEX` too, whose answer is a small
    /// number. So an answer counts only if it has all types that the patches ever had, which
    /// are 63 together, and no bit that is no type.
    pub fn from_types(answer: u32) -> Self {
        let types = HashTypes::from_bits(answer);
        if types.contains(HashTypes::from_bits(PLAIN_TYPES)) && types.is_subset_of(HashTypes::ALL) {
            Self::V12 { types }
        } else {
            Self::None
        }
    }

    /// The types of hash it offers.
    pub const fn types(self) -> HashTypes {
        match self {
            Self::None => HashTypes::NONE,
            Self::RfcV5 { types, .. } | Self::V12 { types } => types,
        }
    }
}

/// The answer to a question that the kernel may not know: EBADFD is what `tun.c` says to any
/// ioctl it does not know while there is no interface, EINVAL and ENOTTY what others might.
fn answered<T>(answer: Result<T, Errno>) -> Result<Option<T>, TapError> {
    match answer {
        Ok(answer) => Ok(Some(answer)),
        Err(Errno::BADFD | Errno::INVAL | Errno::NOTTY) => Ok(None),
        Err(errno) => Err(no_tun_device(errno)),
    }
}

/// What the kernel is to do with the hashes of packets the host sends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct KernelHash<'a> {
    /// Write them into the header; only together with `rss`.
    pub report: bool,
    /// Choose the queue by them.
    pub rss: Option<KernelRss<'a>>,
    /// Which packets get one; an IPv4 type is among them.
    pub types: HashTypes,
    /// The guest's key.
    pub key: HashKey,
    /// Queues of the interface that are attached: at least 2. All queues of `rss` are below.
    pub queues: u16,
}

/// How the kernel chooses a queue by a packet's hash.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct KernelRss<'a> {
    /// The queue of each index; a power of two of them, at most 128.
    pub table: &'a [u16],
    /// The queue of packets without a hash.
    pub unclassified: u16,
}

/// Why the kernel does not hash as it was asked to.
#[derive(Debug, thiserror::Error)]
pub enum VnetHashError {
    /// The kernel has no such interface.
    #[error("tap `{tap}`: this kernel's taps cannot hash: use the software backend")]
    NoAbi {
        /// Which tap.
        tap: TapName,
    },
    /// The kernel can report but not steer.
    #[error("tap `{tap}`: this kernel's taps report hashes without RSS: use the software backend")]
    NoRss {
        /// Which tap.
        tap: TapName,
    },
    /// Reports were asked for without RSS, where the patches report another hash.
    #[error(
        "tap `{tap}`: this kernel reports right hashes only together with RSS: give a table or \
         use the software backend"
    )]
    ReportWithoutRss {
        /// Which tap.
        tap: TapName,
    },
    /// Neither reports nor RSS were asked for.
    #[error("tap `{tap}`: neither hash reports nor RSS were asked for: clear the hash instead")]
    Nothing {
        /// Which tap.
        tap: TapName,
    },
    /// Types were asked for that the kernel does not offer.
    #[error(
        "tap `{tap}`: this kernel's taps hash {supported:?}, not all of {asked:?}: leave types \
         out (`hash_types=`) or use the software backend"
    )]
    Types {
        /// Which tap.
        tap: TapName,
        /// Asked for.
        asked: HashTypes,
        /// Offered.
        supported: HashTypes,
    },
    /// No IPv4 type was asked for, without which the patches lose the key.
    #[error(
        "tap `{tap}`: this kernel loses the key without an IPv4 type, and {asked:?} have none: \
         use the software backend"
    )]
    NoV4Type {
        /// Which tap.
        tap: TapName,
        /// Asked for.
        asked: HashTypes,
    },
    /// There are too few queues for the kernel to get to the hash.
    #[error(
        "tap `{tap}`: this kernel hashes from two queues on, attached are {queues}: use the \
         software backend"
    )]
    TooFewQueues {
        /// Which tap.
        tap: TapName,
        /// Attached.
        queues: u16,
    },
    /// The table or what belongs to it is unsound.
    #[error("tap `{tap}`: the RSS configuration is unsound")]
    Rss {
        /// Which tap.
        tap: TapName,
        /// What about it.
        #[source]
        source: RssError,
    },
    /// The header has no room for a report: its size is to be set first.
    #[error("tap `{tap}`: headers of {bytes} bytes have no room for a hash: set their size first")]
    HeaderSize {
        /// Which tap.
        tap: TapName,
        /// The header's bytes now.
        bytes: i32,
    },
    /// A steering program chooses the queues already.
    #[error(
        "tap `{tap}` has an eBPF steering program: take it out (TUNSETSTEERINGEBPF with -1) \
         before the kernel steers by RSS"
    )]
    SteeringLoaded {
        /// Which tap.
        tap: TapName,
        /// What the kernel says.
        #[source]
        source: io::Error,
    },
    /// The header's size cannot be read.
    #[error("the kernel does not hash")]
    Tap(#[from] TapError),
    /// Anything else.
    #[error("tap `{tap}`: {operation} failed: use the software backend")]
    Failed {
        /// Which tap.
        tap: TapName,
        /// What was tried.
        operation: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

/// [`TapQueue::set_vnet_hash`].
pub(super) fn set(
    queue: &TapQueue,
    abi: HashAbi,
    hash: &KernelHash<'_>,
) -> Result<(), VnetHashError> {
    let rss = check(queue.name(), abi, hash)?;
    if hash.report {
        let bytes = queue.header_bytes()?;
        if usize::try_from(bytes).is_ok_and(|bytes| bytes < HeaderSize::V1Hash.bytes()) {
            return Err(VnetHashError::HeaderSize {
                tap: queue.name().clone(),
                bytes,
            });
        }
    }
    let unsound = |source| VnetHashError::Rss {
        tap: queue.name().clone(),
        source,
    };
    let (types, key) = (hash.types, &hash.key);
    let (operation, done) = match abi {
        HashAbi::None => return Err(no_abi(queue.name())),
        HashAbi::RfcV5 { .. } => {
            let flags = FLAG_RSS | if hash.report { FLAG_REPORT } else { 0 };
            let argument = VnetHashArgument::rfc_v5(flags, types, &rss, key).map_err(unsound)?;
            let done = ioctl::tun_set_vnet_hash(queue, &argument);
            ("TUNSETVNETHASH", done)
        }
        HashAbi::V12 { .. } => {
            let argument = VnetHashArgument::v12(types, &rss, key).map_err(unsound)?;
            if hash.report {
                let done = ioctl::tun_set_vnet_reporting_rss(queue, &argument);
                ("TUNSETVNETREPORTINGRSS", done)
            } else {
                let done = ioctl::tun_set_vnet_rss(queue, &argument);
                ("TUNSETVNETRSS", done)
            }
        }
    };
    done.map_err(|errno| failed(queue.name(), operation, errno))
}

/// [`TapQueue::clear_vnet_hash`].
pub(super) fn clear(queue: &TapQueue, abi: HashAbi) -> Result<(), VnetHashError> {
    let (operation, done) = match abi {
        HashAbi::None => return Err(no_abi(queue.name())),
        HashAbi::RfcV5 { .. } => {
            let done = ioctl::tun_set_vnet_hash(queue, &VnetHashArgument::rfc_v5_off());
            ("TUNSETVNETHASH", done)
        }
        HashAbi::V12 { .. } => {
            let done = ioctl::tun_set_vnet_reporting_automq(queue, HashTypes::NONE);
            ("TUNSETVNETREPORTINGAUTOMQ", done)
        }
    };
    done.map_err(|errno| failed(queue.name(), operation, errno))
}

/// Whether the kernel is known to do what `hash` says; gives its RSS, without which it is not.
fn check<'a>(
    tap: &TapName,
    abi: HashAbi,
    hash: &KernelHash<'a>,
) -> Result<KernelRss<'a>, VnetHashError> {
    let tap = || tap.clone();
    let (asked, supported) = (hash.types, abi.types());
    match (abi, hash.rss) {
        (HashAbi::None, _) => Err(VnetHashError::NoAbi { tap: tap() }),
        (_, None) if hash.report => Err(VnetHashError::ReportWithoutRss { tap: tap() }),
        (_, None) => Err(VnetHashError::Nothing { tap: tap() }),
        (HashAbi::RfcV5 { rss: false, .. }, Some(_)) => Err(VnetHashError::NoRss { tap: tap() }),
        _ if !asked.is_subset_of(supported) => Err(VnetHashError::Types {
            tap: tap(),
            asked,
            supported,
        }),
        _ if asked.bits() & V4_TYPES == 0 => Err(VnetHashError::NoV4Type { tap: tap(), asked }),
        _ if hash.queues < 2 => Err(VnetHashError::TooFewQueues {
            tap: tap(),
            queues: hash.queues,
        }),
        (HashAbi::RfcV5 { rss: true, .. } | HashAbi::V12 { .. }, Some(rss)) => rss
            .check_queues(hash.queues)
            .map(|()| rss)
            .map_err(|source| VnetHashError::Rss { tap: tap(), source }),
    }
}

impl KernelRss<'_> {
    /// Checks that all queues named are below `queues`.
    fn check_queues(&self, queues: u16) -> Result<(), RssError> {
        let queue = self.unclassified;
        if queue >= queues {
            return Err(RssError::Unclassified { queue, queues });
        }
        let mut entries = self.table.iter().copied().enumerate();
        match entries.find(|(_, queue)| *queue >= queues) {
            Some((index, queue)) => Err(RssError::Entry {
                index,
                queue,
                queues,
            }),
            None => Ok(()),
        }
    }
}

fn no_abi(tap: &TapName) -> VnetHashError {
    VnetHashError::NoAbi { tap: tap.clone() }
}

fn failed(tap: &TapName, operation: &'static str, errno: Errno) -> VnetHashError {
    let (tap, source) = (tap.clone(), errno.into());
    match errno {
        Errno::BUSY => VnetHashError::SteeringLoaded { tap, source },
        _ => VnetHashError::Failed {
            tap,
            operation,
            source,
        },
    }
}

#[cfg(test)]
mod tests;
