//! A vhost-user network backend for tests: small, single-threaded, and on the `vhost` crate's
//! side of the protocol, so that it is a second opinion on Ferry's.
//!
//! [`Backend::start`] listens on a socket and serves one front end after the other, on a thread of
//! its own. Each queue pair has a *port*: a non-blocking file of which each read gives one packet
//! and each write takes one, behind a 12-byte virtio-net header: a tap ([`taps`]), or one end of a
//! socket pair that keeps message boundaries.
//!
//! It logs what it writes as `vhost-user.rst`, section "Migration", asks for. [`Faults`] makes it
//! forget that, or other duties.
//!
//! | file | is |
//! |---|---|
//! | `requests` | what a front end asks |
//! | `rings` | moving packets |
//! | `log` | the dirty log |

mod log;
mod requests;
mod rings;

use std::io;
use std::num::NonZeroU16;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use net_util::header::HeaderSize;
use net_util::tap::{Offloads, Tap, TapName};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vhost::vhost_user::BackendReqHandler;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use requests::Device;

/// The host's end of a queue pair.
pub type Port = Box<dyn AsFd + Send>;

/// What a backend does wrong.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Faults {
    /// It says that it logs its writes, and does not log packets.
    pub forgets_buffers: bool,
    /// It says that it logs its writes, and does not log those to used rings.
    pub forgets_used_rings: bool,
    /// It does not offer `VHOST_F_LOG_ALL`.
    pub cannot_log: bool,
    /// It does not offer `VHOST_USER_PROTOCOL_F_REPLY_ACK`.
    pub no_acknowledgements: bool,
}

/// A backend that is running. It ends when dropped.
#[derive(Debug)]
pub struct Backend {
    stop: EventFd,
    socket: PathBuf,
    logging: Arc<AtomicBool>,
    hung: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Backend {
    /// Listens on `socket`, which must not exist; `ports` has one for each queue pair.
    ///
    /// # Errors
    /// When nobody may listen there, or there is no thread.
    pub fn start(socket: &Path, ports: Vec<Port>, faults: Faults) -> io::Result<Self> {
        let listener = UnixListener::bind(socket)?;
        let stop = EventFd::new(EFD_NONBLOCK)?;
        let stopped = stop.try_clone()?;
        let logging = Arc::new(AtomicBool::new(false));
        let device = Device::new(ports, faults, Arc::clone(&logging));
        let hung = Arc::new(AtomicBool::new(false));
        let hangs = Arc::clone(&hung);
        let thread = std::thread::Builder::new()
            .name("vhost-backend".to_owned())
            .spawn(move || {
                let device = Arc::new(Mutex::new(device));
                while let Some(stream) = accept(&listener, &stopped) {
                    if let Err(error) = serve(stream, &device, &stopped, &hangs) {
                        tracing::info!(%error, "the front end is gone");
                    }
                    if let Ok(mut device) = device.lock() {
                        device.forget();
                    }
                }
            })?;
        Ok(Self {
            stop,
            socket: socket.to_owned(),
            logging,
            hung,
            thread: Some(thread),
        })
    }

    /// The socket's path.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Whether its front end has it log anything it writes.
    pub fn is_logging(&self) -> bool {
        self.logging.load(Ordering::SeqCst)
    }

    /// From now on it does and says nothing, and keeps its connection.
    pub fn hang(&self) {
        self.hung.store(true, Ordering::SeqCst);
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        // A full counter is readable as well.
        let _ = self.stop.write(1);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the backend panicked");
        }
        // Somebody may have removed it.
        let _ = std::fs::remove_file(&self.socket);
    }
}

/// The queues of tap `name`, which is made if it does not exist, as ports for `pairs` pairs. Its
/// packets are plain: no offloads.
///
/// # Errors
/// When the tap cannot be opened or set up.
pub fn taps(name: &str, pairs: u16) -> io::Result<Vec<Port>> {
    let name = TapName::new(name).map_err(io::Error::other)?;
    let pairs = NonZeroU16::new(pairs).unwrap_or(NonZeroU16::MIN);
    let tap = Tap::open(&name, pairs).map_err(io::Error::other)?;
    tap.set_up().map_err(io::Error::other)?;
    let mut ports: Vec<Port> = Vec::new();
    for queue in tap.into_queues() {
        if ports.is_empty() {
            let none = Offloads::from_guest_features(0);
            queue
                .set_header_size(HeaderSize::V1)
                .and_then(|()| queue.set_little_endian())
                .and_then(|()| queue.set_offloads(none))
                .map_err(io::Error::other)?;
        }
        ports.push(Box::new(queue));
    }
    Ok(ports)
}

/// The next front end; none when the backend is to end.
fn accept(listener: &UnixListener, stop: &EventFd) -> Option<UnixStream> {
    let (stop, listening) = (rings::event_fd(stop), listener.as_fd());
    let mut fds = [stop, listening].map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN));
    loop {
        // A signal: once more.
        let _ = poll(&mut fds, None);
        if fds.first().is_none_or(|stop| !stop.revents().is_empty()) {
            return None;
        }
        if let Ok((stream, _)) = listener.accept() {
            return Some(stream);
        }
    }
}

/// Serves one front end until it is gone or the backend is to end.
fn serve(
    stream: UnixStream,
    device: &Arc<Mutex<Device>>,
    stop: &EventFd,
    hung: &AtomicBool,
) -> io::Result<()> {
    let socket = stream.try_clone()?;
    let mut requests = BackendReqHandler::from_stream(stream, Arc::clone(device));
    loop {
        let (stopped, asked) = {
            let device = device.lock().map_err(|_| io::ErrorKind::Other)?;
            wait(&socket, &device, stop)?
        };
        if stopped {
            return Ok(());
        }
        if hung.load(Ordering::SeqCst) {
            std::thread::sleep(Duration::from_millis(10));
            continue;
        }
        if asked {
            requests.handle_request().map_err(io::Error::other)?;
        }
        let mut device = device.lock().map_err(|_| io::ErrorKind::Other)?;
        device.move_packets();
    }
}

/// Waits for something to do: whether the backend is to end, and whether the front end asks.
fn wait(socket: &UnixStream, device: &Device, stop: &EventFd) -> io::Result<(bool, bool)> {
    let mut fds = vec![
        PollFd::from_borrowed_fd(rings::event_fd(stop), PollFlags::IN),
        PollFd::from_borrowed_fd(socket.as_fd(), PollFlags::IN),
    ];
    fds.extend(
        device
            .awaited()
            .map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)),
    );
    let limit = Timespec::try_from(Duration::from_millis(100)).map_err(io::Error::other)?;
    match poll(&mut fds, Some(&limit)) {
        Ok(_) | Err(rustix::io::Errno::INTR) => {}
        Err(error) => return Err(error.into()),
    }
    let ready = |index: usize| fds.get(index).is_some_and(|fd| !fd.revents().is_empty());
    Ok((ready(0), ready(1)))
}
