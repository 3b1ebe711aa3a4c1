//! Where the API listens.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use rustix::fs::{Mode, fchmod};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use thiserror::Error;

use crate::inherited;

/// Connections the kernel keeps until the server accepts them.
const BACKLOG: i32 = 64;

/// Why the API cannot listen.
#[derive(Debug, Error)]
pub enum SocketError {
    /// The option's text is neither form.
    #[error("`{0}` names no API socket; write path=FILE or fd=NUMBER")]
    Syntax(String),
    /// Something else is in the way.
    #[error("{path} exists and is not a socket; remove it or choose another path")]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// A server answers there already.
    #[error("another process serves {path}; stop it or choose another path")]
    InUse {
        /// The path.
        path: PathBuf,
    },
    /// A step of making the socket failed.
    #[error("cannot {step} the API socket {path}; check the directory and its permissions")]
    Listen {
        /// What was being done.
        step: &'static str,
        /// The path.
        path: PathBuf,
        /// The operating system's reason.
        #[source]
        source: io::Error,
    },
    /// The inherited descriptor does not do.
    #[error("fd={fd} is not a listening unix socket that ferry inherits")]
    Inherited {
        /// Its number.
        fd: i32,
        /// The operating system's reason.
        #[source]
        source: io::Error,
    },
}

/// Where the API listens, as the command line names it (`path=FILE`, `fd=NUMBER` or a bare path).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ApiSocket {
    /// A socket to be made.
    Path(PathBuf),
    /// A listening socket that ferry inherits.
    Fd(i32),
}

impl FromStr for ApiSocket {
    type Err = SocketError;

    fn from_str(text: &str) -> Result<Self, SocketError> {
        let syntax = || SocketError::Syntax(text.to_owned());
        match text.split_once('=') {
            Some(("path", path)) if !path.is_empty() => Ok(Self::Path(PathBuf::from(path))),
            Some(("fd", number)) => match number.parse() {
                Ok(fd) if fd >= 0 => Ok(Self::Fd(fd)),
                _ => Err(syntax()),
            },
            None if !text.is_empty() => Ok(Self::Path(PathBuf::from(text))),
            _ => Err(syntax()),
        }
    }
}

/// A listening socket, whose file is removed with it if it was made here.
#[derive(Debug)]
pub struct ApiListener {
    pub(super) listener: UnixListener,
    pub(super) file: Option<SocketFile>,
}

impl ApiListener {
    /// Listens on a new socket at `path`, for this user alone (mode 0600). A socket nobody listens
    /// on, left by a process that died, is replaced.
    ///
    /// # Errors
    /// [`SocketError`] if something else is there or the socket cannot be made.
    pub fn bind(path: &Path) -> Result<Self, SocketError> {
        let failed = |step| {
            move |source| SocketError::Listen {
                step,
                path: path.to_owned(),
                source,
            }
        };
        remove_stale(path)?;
        let address = SocketAddrUnix::new(path).map_err(io::Error::from);
        let address = address.map_err(failed("name"))?;
        let socket = private_socket().map_err(failed("make"))?;
        rustix::net::bind(&socket, &address)
            .map_err(io::Error::from)
            .map_err(failed("bind"))?;
        let file = SocketFile(path.to_owned());
        rustix::net::listen(&socket, BACKLOG)
            .map_err(io::Error::from)
            .map_err(failed("listen on"))?;
        Ok(Self {
            listener: UnixListener::from(socket),
            file: Some(file),
        })
    }

    /// Listens on the socket the supervisor bound and passed as descriptor `fd`.
    ///
    /// # Errors
    /// [`SocketError::Inherited`] if it is not open or not a listening socket.
    pub fn inherited(fd: i32) -> Result<Self, SocketError> {
        let failed = |source| SocketError::Inherited { fd, source };
        let socket = inherited::duplicate(fd).map_err(failed)?;
        match rustix::net::sockopt::socket_acceptconn(&socket) {
            Ok(true) => Ok(Self {
                listener: UnixListener::from(socket),
                file: None,
            }),
            Ok(false) => Err(failed(io::ErrorKind::InvalidInput.into())),
            Err(error) => Err(failed(error.into())),
        }
    }

    /// Listens where `socket` says.
    ///
    /// # Errors
    /// As [`ApiListener::bind`] and [`ApiListener::inherited`].
    pub fn open(socket: &ApiSocket) -> Result<Self, SocketError> {
        match socket {
            ApiSocket::Path(path) => Self::bind(path),
            ApiSocket::Fd(fd) => Self::inherited(*fd),
        }
    }
}

/// A socket in the file system, removed on drop.
#[derive(Debug)]
pub(super) struct SocketFile(PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.0) {
            tracing::debug!(path = %self.0.display(), %error, "API socket was not there to remove");
        }
    }
}

/// A unix stream socket whose file, once bound, has mode 0600: Linux takes the file's mode from the
/// socket's own inode, so there is no moment at which others may connect.
fn private_socket() -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    Ok(socket)
}

fn remove_stale(path: &Path) -> Result<(), SocketError> {
    let path = path.to_owned();
    let listen = |step, source, path| SocketError::Listen { step, path, source };
    match fs::symlink_metadata(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(listen("look at", error, path)),
        Ok(meta) if !meta.file_type().is_socket() => return Err(SocketError::NotASocket { path }),
        Ok(_) => {}
    }
    match UnixStream::connect(&path) {
        Ok(_) => Err(SocketError::InUse { path }),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            fs::remove_file(&path).map_err(|source| listen("replace", source, path))
        }
        Err(error) => Err(listen("probe", error, path)),
    }
}
