//! The listening socket.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;
use rustix::event::{EventfdFlags, PollFd, PollFlags};
use rustix::io::Errno;

use super::{CLIENT_TIMEOUT, ServerDevice, ServerError, serve_link};
use crate::link::Link;

/// A listening server.
///
/// The socket file is removed when it is dropped.
pub struct Server {
    listener: UnixListener,
    path: PathBuf,
    stop: Stopper,
}

/// Ends [`Server::run`] from another thread.
#[derive(Clone)]
pub struct Stopper {
    event: Arc<OwnedFd>,
    state: Arc<Mutex<StopState>>,
}

#[derive(Default)]
struct StopState {
    stopped: bool,
    link: Option<Arc<Link>>,
}

impl Stopper {
    /// Ends [`Server::run`] and the connection it serves. Takes effect once and for all.
    ///
    /// # Errors
    /// The operating system's, if the waiting thread could not be woken.
    pub fn stop(&self) -> io::Result<()> {
        let link = {
            let mut state = self.state.lock();
            state.stopped = true;
            state.link.take()
        };
        if let Some(link) = link {
            link.close();
        }
        rustix::io::write(&self.event, &1_u64.to_ne_bytes())?;
        Ok(())
    }

    fn is_stopped(&self) -> bool {
        self.state.lock().stopped
    }

    /// Makes `link` the connection to end; false if it is too late to serve it.
    fn serving(&self, link: Option<Arc<Link>>) -> bool {
        let mut state = self.state.lock();
        state.link = link;
        !state.stopped
    }
}

impl Server {
    /// Listens on a new socket at `path`. A socket file that nobody listens on any more is
    /// replaced.
    ///
    /// # Errors
    /// [`ServerError::Listen`].
    pub fn bind(path: &Path) -> Result<Self, ServerError> {
        let refused = |hint, source| ServerError::Listen {
            path: path.display().to_string(),
            hint,
            source,
        };
        let listener = match UnixListener::bind(path) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                if UnixStream::connect(path).is_ok() {
                    return Err(refused("another server listens there; stop it", error));
                }
                std::fs::remove_file(path)
                    .and_then(|()| UnixListener::bind(path))
                    .map_err(|error| refused("remove the stale file there", error))?
            }
            other => other.map_err(|error| {
                refused("check that its directory exists and is writable", error)
            })?,
        };
        let setup = || -> io::Result<Stopper> {
            listener.set_nonblocking(true)?;
            Ok(Stopper {
                event: Arc::new(rustix::event::eventfd(
                    0,
                    EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC,
                )?),
                state: Arc::default(),
            })
        };
        let stop = setup().map_err(|error| refused("raise the limit of open files", error))?;
        Ok(Self {
            listener,
            path: path.to_owned(),
            stop,
        })
    }

    /// What ends [`run`](Self::run).
    pub fn stopper(&self) -> Stopper {
        self.stop.clone()
    }

    /// Serves one client after another until stopped. What goes wrong with a client is logged
    /// and the next one served.
    ///
    /// # Errors
    /// [`ServerError::Accept`], and [`ServerError::Reset`] of a device that cannot be used again.
    pub fn run(&self, device: &mut dyn ServerDevice) -> Result<(), ServerError> {
        while let Some(stream) = self.accept().map_err(ServerError::Accept)? {
            let link = Arc::new(Link::new(stream, CLIENT_TIMEOUT));
            if !self.stop.serving(Some(Arc::clone(&link))) {
                break;
            }
            tracing::info!(socket = %self.path.display(), "client connected");
            let served = serve_link(&link, device);
            self.stop.serving(None);
            match served {
                Ok(()) => tracing::info!("client disconnected"),
                Err(error @ ServerError::Reset(_)) => return Err(error),
                Err(error) => {
                    let cause = std::error::Error::source(&error).map(ToString::to_string);
                    tracing::warn!(%error, cause, "client dropped");
                }
            }
        }
        Ok(())
    }

    /// The next client; `None` when stopped.
    fn accept(&self) -> io::Result<Option<UnixStream>> {
        loop {
            if self.stop.is_stopped() {
                return Ok(None);
            }
            let mut set = [
                PollFd::from_borrowed_fd(self.listener.as_fd(), PollFlags::IN),
                PollFd::new(&*self.stop.event, PollFlags::IN),
            ];
            match rustix::event::poll(&mut set, None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            match self.listener.accept() {
                Ok((stream, _)) => return Ok(Some(stream)),
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::WouldBlock
                            | io::ErrorKind::Interrupted
                            | io::ErrorKind::ConnectionAborted
                    ) => {}
                Err(error) => return Err(error),
            }
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.path) {
            tracing::warn!(socket = %self.path.display(), %error, "socket file is left behind");
        }
    }
}
