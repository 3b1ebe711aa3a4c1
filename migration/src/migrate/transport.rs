//! Transports: how the bytes get to the other host.
//!
//! `unix:PATH` and `tcp:HOST:PORT`. Every wait is bounded and ends early when the migration is
//! cancelled. Sockets stay in blocking mode; each call is made non-blocking by its flag and
//! waiting is done in `poll`, where the cancel event is watched too.

mod address;
mod io;

use std::net::{TcpListener, TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::Mode;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, sockopt};

use super::cancel::CancelHandle;
use super::limits::Limits;
pub use address::{Address, AddressError};
pub(super) use io::{Patience, Stop};

/// Longest wait for a connection to be made.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Socket buffer asked for on unix sockets, in bytes: a few page frames, so that both sides work
/// at the same time. TCP sockets keep the kernel's automatic sizing, which setting would end.
const UNIX_BUFFER_BYTES: usize = 2 << 20;

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    /// The address cannot be used.
    #[error(transparent)]
    Address(#[from] AddressError),
    /// The host name has no address.
    #[error("cannot resolve {host}: check the name, or give a numeric address")]
    Resolve {
        /// The name.
        host: String,
        /// What the resolver said.
        #[source]
        cause: std::io::Error,
    },
    /// Nobody answers there.
    #[error("cannot connect to {address}: is the destination waiting in receive-migration?")]
    Connect {
        /// Where to.
        address: Address,
        /// What the system said.
        #[source]
        cause: std::io::Error,
    },
    /// The address cannot be listened on.
    #[error("cannot listen on {address}")]
    Listen {
        /// Where.
        address: Address,
        /// What the system said.
        #[source]
        cause: std::io::Error,
    },
    /// No connection came.
    #[error("accepting a connection on {address} failed")]
    Accept {
        /// Where.
        address: Address,
        /// What the system said.
        #[source]
        cause: std::io::Error,
    },
    /// Nobody connected in time.
    #[error("no source connected to {address} within {seconds} s")]
    NobodyCame {
        /// Where.
        address: Address,
        /// How long was waited.
        seconds: u64,
    },
    /// The migration was cancelled before there was a connection.
    #[error("cancelled while waiting for a connection")]
    Cancelled,
    /// A system resource is exhausted.
    #[error("cannot set up the connection")]
    Setup(#[source] std::io::Error),
}

/// A byte stream to the peer, with its name and the handle that cancels work on it.
#[derive(Debug)]
pub struct Connection {
    socket: OwnedFd,
    peer: String,
    cancel: CancelHandle,
    limits: Limits,
}

impl Connection {
    /// A connection over a connected stream socket made elsewhere (a socket pair, or one passed
    /// in by a manager). `peer` is how errors call the other side.
    pub fn from_socket(socket: OwnedFd, peer: impl Into<String>, cancel: &CancelHandle) -> Self {
        Self {
            socket,
            peer: peer.into(),
            cancel: cancel.clone(),
            limits: Limits::default(),
        }
    }

    /// The same connection with other bounds on the peer's silence.
    #[must_use]
    pub fn with_limits(self, limits: Limits) -> Self {
        Self { limits, ..self }
    }

    /// The bounds on the peer's silence.
    pub fn limits(&self) -> Limits {
        self.limits
    }

    /// How errors call the other side.
    pub fn peer(&self) -> &str {
        &self.peer
    }

    /// The handle that cancels the migration on this connection.
    pub fn cancel_handle(&self) -> &CancelHandle {
        &self.cancel
    }
}

/// Connects to a waiting destination.
pub fn connect(address: &Address, cancel: &CancelHandle) -> Result<Connection, TransportError> {
    if cancel.is_cancelled() {
        return Err(TransportError::Cancelled);
    }
    let socket = match address {
        Address::Unix(path) => connect_unix(address, path, cancel)?,
        Address::Tcp { host, port } => connect_tcp(address, host, *port, cancel)?,
    };
    Ok(Connection::from_socket(socket, address.to_string(), cancel))
}

fn connect_unix(
    address: &Address,
    path: &Path,
    cancel: &CancelHandle,
) -> Result<OwnedFd, TransportError> {
    let failed = |errno: rustix::io::Errno| TransportError::Connect {
        address: address.clone(),
        cause: errno.into(),
    };
    let target = SocketAddrUnix::new(path).map_err(failed)?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let deadline = Instant::now() + CONNECT_TIMEOUT;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
        .map_err(failed)?;
    loop {
        match rustix::net::connect(&socket, &target) {
            Ok(()) => break,
            // The listener's queue is full.
            Err(rustix::io::Errno::AGAIN) if Instant::now() < deadline => {
                io::pause_for(Duration::from_millis(20), cancel)
                    .map_err(|()| TransportError::Cancelled)?;
            }
            Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(failed(errno)),
        }
    }
    tune_unix(&socket);
    Ok(socket)
}

fn connect_tcp(
    address: &Address,
    host: &str,
    port: u16,
    cancel: &CancelHandle,
) -> Result<OwnedFd, TransportError> {
    let targets = resolve(host, port)?;
    let mut last = std::io::Error::new(std::io::ErrorKind::NotFound, "the name has no address");
    for target in targets {
        if cancel.is_cancelled() {
            return Err(TransportError::Cancelled);
        }
        match TcpStream::connect_timeout(&target, CONNECT_TIMEOUT) {
            Ok(stream) => {
                stream.set_nodelay(true).map_err(TransportError::Setup)?;
                return Ok(stream.into());
            }
            Err(cause) => last = cause,
        }
    }
    Err(TransportError::Connect {
        address: address.clone(),
        cause: last,
    })
}

fn resolve(
    host: &str,
    port: u16,
) -> Result<impl Iterator<Item = std::net::SocketAddr>, TransportError> {
    (host, port)
        .to_socket_addrs()
        .map_err(|cause| TransportError::Resolve {
            host: host.to_owned(),
            cause,
        })
}

/// Asks for larger buffers, past the system's limit where the process may. The defaults work
/// too, only slower, so that a refusal is no error.
fn tune_unix(socket: &OwnedFd) {
    if sockopt::set_socket_send_buffer_size_force(socket, UNIX_BUFFER_BYTES).is_err() {
        let _ = sockopt::set_socket_send_buffer_size(socket, UNIX_BUFFER_BYTES);
    }
}

/// Whether `path` is a socket that belongs to nobody any more.
///
/// A living listener is not disturbed by the question: a socket of another type cannot connect to
/// it, which the kernel says (`EPROTOTYPE`) only if there is one.
fn is_left_over(path: &Path, target: &SocketAddrUnix) -> bool {
    let is_socket = |found: std::fs::Metadata| found.file_type().is_socket();
    if !path.symlink_metadata().is_ok_and(is_socket) {
        return false;
    }
    let probe = rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::DGRAM,
        SocketFlags::CLOEXEC,
        None,
    );
    let answer = probe.and_then(|probe| rustix::net::connect(&probe, target));
    answer == Err(rustix::io::Errno::CONNREFUSED)
}

/// Waits for a source to connect.
#[derive(Debug)]
pub struct Listener {
    socket: OwnedFd,
    address: Address,
    /// The socket file to remove in the end.
    file: Option<PathBuf>,
}

impl Listener {
    /// Listens on `address`. A unix socket is made with mode 0600 and removed on drop; one that a
    /// destination that died left behind is replaced. TCP port 0 takes any free one, told by
    /// [`address`](Self::address).
    pub fn bind(address: &Address) -> Result<Self, TransportError> {
        match address {
            Address::Unix(path) => Self::bind_unix(address, path),
            Address::Tcp { host, port } => Self::bind_tcp(address, host, *port),
        }
    }

    fn bind_unix(address: &Address, path: &Path) -> Result<Self, TransportError> {
        let failed = |errno: rustix::io::Errno| TransportError::Listen {
            address: address.clone(),
            cause: errno.into(),
        };
        let target = SocketAddrUnix::new(path).map_err(failed)?;
        let socket = rustix::net::socket_with(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::CLOEXEC,
            None,
        )
        .map_err(failed)?;
        // Linux makes the file with the mode the socket has at bind: there is no moment at which
        // others could connect.
        rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR).map_err(failed)?;
        match rustix::net::bind(&socket, &target) {
            Err(rustix::io::Errno::ADDRINUSE) if is_left_over(path, &target) => {
                let removed = std::fs::remove_file(path);
                removed.map_err(|cause| TransportError::Listen {
                    address: address.clone(),
                    cause,
                })?;
                rustix::net::bind(&socket, &target).map_err(failed)?;
            }
            bound => bound.map_err(failed)?,
        }
        let listener = Self {
            socket,
            address: address.clone(),
            file: Some(path.to_owned()),
        };
        rustix::net::listen(&listener.socket, 1).map_err(failed)?;
        Ok(listener)
    }

    fn bind_tcp(address: &Address, host: &str, port: u16) -> Result<Self, TransportError> {
        let failed = |cause| TransportError::Listen {
            address: address.clone(),
            cause,
        };
        let targets: Vec<_> = resolve(host, port)?.collect();
        let listener = TcpListener::bind(targets.as_slice()).map_err(failed)?;
        let port = listener.local_addr().map_err(failed)?.port();
        Ok(Self {
            socket: listener.into(),
            address: Address::Tcp {
                host: host.to_owned(),
                port,
            },
            file: None,
        })
    }

    /// Where it listens, with the true port.
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// Waits for one source, at most `timeout` if given.
    pub fn accept(
        &self,
        timeout: Option<Duration>,
        cancel: &CancelHandle,
    ) -> Result<Connection, TransportError> {
        let failed = |cause: std::io::Error| TransportError::Accept {
            address: self.address.clone(),
            cause,
        };
        let patience = Patience {
            idle: timeout,
            until: None,
            heed_cancel: true,
        };
        io::wait_readable(self.socket.as_fd(), cancel, &patience).map_err(|stop| match stop {
            Stop::TimedOut => TransportError::NobodyCame {
                address: self.address.clone(),
                seconds: timeout.unwrap_or_default().as_secs(),
            },
            Stop::Cancelled => TransportError::Cancelled,
            Stop::Closed => failed(std::io::ErrorKind::NotConnected.into()),
            Stop::Io(cause) => failed(cause),
        })?;
        let (socket, peer) = rustix::net::acceptfrom_with(&self.socket, SocketFlags::CLOEXEC)
            .map_err(|errno| failed(errno.into()))?;
        let peer = match &self.address {
            Address::Unix(_) => {
                tune_unix(&socket);
                format!("the source on {}", self.address)
            }
            Address::Tcp { .. } => {
                sockopt::set_tcp_nodelay(&socket, true).map_err(|errno| failed(errno.into()))?;
                match peer.and_then(|peer| std::net::SocketAddr::try_from(peer).ok()) {
                    Some(peer) => format!("tcp:{peer}"),
                    None => format!("the source on {}", self.address),
                }
            }
        };
        Ok(Connection::from_socket(socket, peer, cancel))
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Some(file) = &self.file {
            let _ = std::fs::remove_file(file);
        }
    }
}

#[cfg(test)]
mod tests;
