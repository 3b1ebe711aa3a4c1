//! What can go wrong with a tap, and what to do about it.

use std::io;

use super::{MAX_QUEUES, TapName};

/// Why a tap cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// The name is none an interface can have.
    #[error(
        "`{name}` cannot name an interface: use 1 to 15 bytes without whitespace, `/`, `:` or `%` \
         (but one `%d` for a free number)"
    )]
    BadName {
        /// The name.
        name: String,
    },
    /// The device behind all taps does not open.
    #[error(
        "cannot open /dev/net/tun: load the `tun` module and allow this user to read and write it"
    )]
    NoTunDevice {
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Another process holds the tap.
    #[error("tap `{tap}` is in use by another process: stop that one or use another tap")]
    InUse {
        /// Which tap.
        tap: TapName,
    },
    /// The tap is not this user's, or does not exist and may not be created.
    #[error(
        "tap `{tap}` needs CAP_NET_ADMIN: grant it, or let an administrator make and start the tap \
         for this user with `ip tuntap add dev {tap} mode tap user USER vnet_hdr && ip link set {tap} up` \
         (with `multi_queue` if it is to have several queues)"
    )]
    NeedsAdmin {
        /// Which tap.
        tap: TapName,
    },
    /// There is an interface of that name, but it is no tap.
    #[error(
        "`{tap}` is an interface but no tap: use another name, or delete it with `ip link del {tap}`"
    )]
    NotATap {
        /// Which interface.
        tap: TapName,
    },
    /// Several queues were asked of a tap that can have only one.
    #[error(
        "tap `{tap}` was made with a single queue: use one queue, or make it anew with \
         `ip tuntap del dev {tap} mode tap && ip tuntap add dev {tap} mode tap multi_queue vnet_hdr`"
    )]
    SingleQueue {
        /// Which tap.
        tap: TapName,
    },
    /// More queues than a tap can have.
    #[error("tap `{tap}` cannot have {queues} queues: use at most {MAX_QUEUES}")]
    TooManyQueues {
        /// Which tap.
        tap: TapName,
        /// Asked for.
        queues: u16,
    },
    /// More files than a tap can have queues.
    #[error("{fds} files cannot be queues of one tap: pass at most {MAX_QUEUES}")]
    TooManyFds {
        /// Given.
        fds: usize,
    },
    /// No file was given.
    #[error("a tap needs at least one file: pass one per queue pair")]
    NoFds,
    /// A file is of `/dev/net/tun`, but has not been made a queue yet.
    #[error(
        "the file is of /dev/net/tun but of no interface yet: call TUNSETIFF before passing it"
    )]
    Unattached,
    /// A file is something else.
    #[error("the file is no queue of a tap: pass files of /dev/net/tun after TUNSETIFF")]
    NotATapFd {
        /// What the kernel says to TUNGETIFF.
        #[source]
        source: io::Error,
    },
    /// The files are of several taps.
    #[error("the files are queues of `{tap}` and of `{other}`: pass those of one tap only")]
    Mixed {
        /// One tap.
        tap: TapName,
        /// Another.
        other: TapName,
    },
    /// The tap's packets have no virtio-net header.
    #[error(
        "tap `{tap}` was opened without IFF_VNET_HDR: open it with that and IFF_NO_PI before passing it"
    )]
    NoHeader {
        /// Which tap.
        tap: TapName,
    },
    /// The interface is not where this process looks for it.
    #[error(
        "tap `{tap}` is not in this process' network namespace: start Ferry in the tap's \
         (`ip netns exec NAME …`), or give MTU and address and bring it up yourself"
    )]
    OtherNamespace {
        /// Which tap.
        tap: TapName,
    },
    /// The tap can have only one queue, so that it cannot be detached.
    #[error("tap `{tap}` was made with a single queue, which cannot be attached or detached")]
    FixedQueue {
        /// Which tap.
        tap: TapName,
    },
    /// The kernel does not know the offloads.
    #[error("tap `{tap}` does not take the offloads {offloads:#x}: turn them off for this device")]
    Offloads {
        /// Which tap.
        tap: TapName,
        /// `TUN_F_*` bits.
        offloads: u32,
        /// What the kernel says.
        #[source]
        source: io::Error,
    },
    /// Anything else.
    #[error("tap `{tap}`: {operation} failed")]
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
