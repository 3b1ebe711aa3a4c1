//! What can go wrong at the VMM's end.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use rustix::io::Errno;

use crate::link::LinkFault;
use crate::version::VersionError;
use crate::wire::Command;

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens there.
    #[error("cannot connect to {socket}: start the vfio-user server first")]
    Connect {
        /// The socket.
        socket: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The server is there but does not greet.
    #[error(
        "the vfio-user server at {socket} does not answer: it hangs or serves another client; \
         start a server for each VM"
    )]
    Busy {
        /// The socket.
        socket: PathBuf,
    },
    /// The server died, hung, or broke the protocol; the connection is over.
    #[error("the vfio-user server at {socket} is gone")]
    ServerGone {
        /// The socket.
        socket: PathBuf,
        /// What ended the connection.
        #[source]
        cause: Arc<LinkFault>,
    },
    /// The server answered with an error.
    #[error("the vfio-user server refused {command:?}")]
    Refused {
        /// What was asked.
        command: Command,
        /// Its answer.
        #[source]
        errno: Errno,
    },
    /// The server answered nonsense; the connection goes on.
    #[error("the vfio-user server gave a malformed reply to {command:?}: {reason}")]
    BadReply {
        /// What was asked.
        command: Command,
        /// What is wrong.
        reason: &'static str,
    },
    /// No common protocol version.
    #[error("the vfio-user server at {socket} is of another kind")]
    Version {
        /// The socket.
        socket: PathBuf,
        /// Why.
        #[source]
        source: VersionError,
    },
    /// What was to be sent does not fit the protocol's limits.
    #[error("{command:?}: {reason}")]
    Argument {
        /// What was to be asked.
        command: Command,
        /// Which limit.
        reason: &'static str,
    },
    /// A resource of this process is lacking.
    #[error("cannot set up the connection")]
    Setup(#[source] io::Error),
}

impl ClientError {
    /// The server's errno, if it refused.
    pub const fn refused(&self) -> Option<Errno> {
        match self {
            Self::Refused { errno, .. } => Some(*errno),
            _ => None,
        }
    }
}
