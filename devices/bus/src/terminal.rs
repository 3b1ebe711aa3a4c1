//! What a console is connected to on the host: nothing, a file, the terminal, a pty, a socket.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::OFlags;
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};
use vmm_sys_util::eventfd::EventFd;

/// Why a console could not be connected.
#[derive(Debug, thiserror::Error)]
pub enum TerminalError {
    /// A file or socket cannot be made.
    #[error("cannot {operation} {}", path.display())]
    Path {
        /// What was tried.
        operation: &'static str,
        /// Where.
        path: PathBuf,
        /// What the system said.
        #[source]
        cause: io::Error,
    },
    /// A socket's path is taken by something else than a left-over socket.
    #[error("{} exists and is no socket: remove it or give another path", .0.display())]
    NotASocket(PathBuf),
    /// A terminal or pty cannot be set up.
    #[error("cannot {operation}")]
    Terminal {
        /// What was tried.
        operation: &'static str,
        /// What the system said.
        #[source]
        cause: io::Error,
    },
}

fn terminal(operation: &'static str) -> impl Fn(rustix::io::Errno) -> TerminalError {
    move |errno| TerminalError::Terminal {
        operation,
        cause: errno.into(),
    }
}

/// The host's side of a console. Output never blocks the guest: what nobody takes is dropped.
pub struct Terminal {
    output: Output,
    input: Input,
    /// Where a pty's other end is.
    pty: Option<PathBuf>,
    /// Terminal settings to be put back.
    saved: Option<Termios>,
}

#[derive(Clone)]
enum Output {
    Null,
    File(Arc<File>),
    Client(Arc<Mutex<Option<UnixStream>>>),
}

enum Input {
    None,
    Fd(OwnedFd),
    Listener(UnixListener, Arc<Mutex<Option<UnixStream>>>),
}

impl Terminal {
    /// Output is dropped, input never comes.
    pub fn null() -> Self {
        Self::of(Output::Null, Input::None)
    }

    /// Output goes to a file, input never comes.
    ///
    /// # Errors
    /// When the file cannot be made.
    pub fn file(path: &Path) -> Result<Self, TerminalError> {
        let file = OpenOptions::new()
            .create(true)
            .write(true)
            .truncate(true)
            .mode(0o600)
            .open(path)
            .map_err(|cause| TerminalError::Path {
                operation: "make",
                path: path.into(),
                cause,
            })?;
        Ok(Self::of(Output::File(Arc::new(file)), Input::None))
    }

    /// The process's own stdin and stdout. A terminal is put into raw mode until this is dropped.
    ///
    /// # Errors
    /// When the terminal cannot be set up.
    pub fn stdio() -> Result<Self, TerminalError> {
        let stdin = io::stdin();
        let failed = |cause| TerminalError::Terminal {
            operation: "use stdin and stdout",
            cause,
        };
        let input = stdin.as_fd().try_clone_to_owned().map_err(failed)?;
        let output = io::stdout().as_fd().try_clone_to_owned().map_err(failed)?;
        let mut this = Self::of(Output::File(Arc::new(File::from(output))), Input::Fd(input));
        if rustix::termios::isatty(&stdin) {
            let settings = tcgetattr(&stdin).map_err(terminal("read the terminal's settings"))?;
            let mut raw = settings.clone();
            raw.make_raw();
            // Keep "\n" working as a line end on output.
            raw.output_modes = settings.output_modes;
            tcsetattr(&stdin, OptionalActions::Now, &raw)
                .map_err(terminal("set the terminal raw"))?;
            this.saved = Some(settings);
        }
        Ok(this)
    }

    /// A new pty.
    ///
    /// # Errors
    /// When there is none to be had.
    pub fn pty() -> Result<Self, TerminalError> {
        use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
        let failed = terminal("make a pty");
        let main = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)
            .map_err(&failed)?;
        grantpt(&main).map_err(&failed)?;
        unlockpt(&main).map_err(&failed)?;
        let name = ptsname(&main, Vec::new()).map_err(&failed)?;
        let path = PathBuf::from(name.to_string_lossy().into_owned());
        let mut raw = tcgetattr(&main).map_err(&failed)?;
        raw.make_raw();
        tcsetattr(&main, OptionalActions::Now, &raw).map_err(&failed)?;
        // A pty that nobody reads must not stop the guest.
        rustix::fs::fcntl_setfl(&main, OFlags::NONBLOCK).map_err(&failed)?;
        let input = rustix::io::fcntl_dupfd_cloexec(&main, 0).map_err(&failed)?;
        let mut this = Self::of(Output::File(Arc::new(File::from(main))), Input::Fd(input));
        this.pty = Some(path);
        Ok(this)
    }

    /// A unix socket at `path` that takes one client at a time.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn socket(path: &Path) -> Result<Self, TerminalError> {
        if let Ok(found) = path.symlink_metadata() {
            if !found.file_type().is_socket() {
                return Err(TerminalError::NotASocket(path.into()));
            }
            std::fs::remove_file(path).map_err(|cause| TerminalError::Path {
                operation: "remove the old",
                path: path.into(),
                cause,
            })?;
        }
        let failed = |cause| TerminalError::Path {
            operation: "listen on",
            path: path.into(),
            cause,
        };
        let listener = UnixListener::bind(path).map_err(failed)?;
        listener.set_nonblocking(true).map_err(failed)?;
        let client = Arc::new(Mutex::new(None));
        Ok(Self::of(
            Output::Client(Arc::clone(&client)),
            Input::Listener(listener, client),
        ))
    }

    fn of(output: Output, input: Input) -> Self {
        Self {
            output,
            input,
            pty: None,
            saved: None,
        }
    }

    /// Where the other end of a pty is.
    pub fn pty_path(&self) -> Option<&Path> {
        self.pty.as_deref()
    }

    /// A writer for the guest's output. It never fails and never blocks for long: what cannot be
    /// written now is dropped.
    pub fn writer(&self) -> TerminalWriter {
        TerminalWriter(self.output.clone())
    }

    /// Whether input can ever come.
    pub fn has_input(&self) -> bool {
        !matches!(self.input, Input::None)
    }

    /// Waits for input or `stop`, and hands what comes to `sink` until `stop` is signalled or the
    /// input ends for good. `sink` says whether it wants more now; when it does not, `resume`
    /// must be signalled once it does.
    ///
    /// # Errors
    /// When waiting fails.
    pub fn read_input(
        &self,
        stop: &EventFd,
        resume: &EventFd,
        mut sink: impl FnMut(Option<&[u8]>) -> usize,
    ) -> io::Result<()> {
        let mut buffer = [0u8; 64];
        loop {
            // Room first: a guest that reads nothing holds its input back at the host.
            let room = sink(None).min(buffer.len());
            let Some(space) = buffer.get_mut(..room) else {
                return Ok(());
            };
            match self.wait(stop, resume, room > 0)? {
                Wake::Stop | Wake::End => return Ok(()),
                Wake::Resume => {}
                Wake::Input => match self.take(space)? {
                    Some(0) if !matches!(self.input, Input::Listener(..)) => return Ok(()),
                    Some(count) => {
                        sink(space.get(..count));
                    }
                    None => {}
                },
            }
        }
    }

    fn wait(&self, stop: &EventFd, resume: &EventFd, want_input: bool) -> io::Result<Wake> {
        let client = match &self.input {
            Input::Listener(_, client) => client
                .lock()
                .as_ref()
                .map(UnixStream::try_clone)
                .transpose()?,
            Input::None | Input::Fd(_) => None,
        };
        let input: BorrowedFd<'_> = match (&self.input, &client) {
            (Input::None, _) => return Ok(Wake::End),
            (Input::Fd(fd), _) => fd.as_fd(),
            (Input::Listener(..), Some(client)) => client.as_fd(),
            (Input::Listener(listener, _), None) => listener.as_fd(),
        };
        // SAFETY: both eventfds outlive the poll.
        let (stop_fd, resume_fd) = unsafe { (borrow(stop), borrow(resume)) };
        let events = if want_input {
            PollFlags::IN
        } else {
            PollFlags::empty()
        };
        let mut fds = [
            PollFd::from_borrowed_fd(stop_fd, PollFlags::IN),
            PollFd::from_borrowed_fd(resume_fd, PollFlags::IN),
            PollFd::from_borrowed_fd(input, events),
        ];
        // A hung-up pty or client would wake at once for ever, so look only when there is room.
        let count = if want_input { 3 } else { 2 };
        loop {
            match poll(&mut fds[..count], None) {
                Err(rustix::io::Errno::INTR) => {}
                other => break other.map(drop).map_err(io::Error::from)?,
            };
        }
        if !fds[0].revents().is_empty() {
            return Ok(Wake::Stop);
        }
        if !fds[1].revents().is_empty() {
            let _ = resume.read();
            return Ok(Wake::Resume);
        }
        Ok(Wake::Input)
    }

    /// Takes what input there is; `None` if it was only a client that came or went.
    fn take(&self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        match &self.input {
            Input::None => Ok(Some(0)),
            Input::Fd(fd) => match rustix::io::read(fd, buffer) {
                Ok(count) => Ok(Some(count)),
                // A pty whose other end is closed says so until someone opens it again.
                Err(rustix::io::Errno::IO) => {
                    std::thread::sleep(std::time::Duration::from_millis(100));
                    Ok(None)
                }
                Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => Ok(None),
                Err(errno) => Err(errno.into()),
            },
            Input::Listener(listener, client) => {
                let mut client = client.lock();
                let Some(stream) = client.as_mut() else {
                    if let Ok((stream, _)) = listener.accept() {
                        stream.set_nonblocking(true)?;
                        *client = Some(stream);
                    }
                    return Ok(None);
                };
                match rustix::io::read(&*stream, buffer) {
                    Ok(count) if count > 0 => Ok(Some(count)),
                    Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => Ok(None),
                    Ok(_) | Err(_) => {
                        *client = None;
                        Ok(None)
                    }
                }
            }
        }
    }
}

enum Wake {
    Stop,
    Resume,
    Input,
    End,
}

/// # Safety
/// `event` must outlive the borrow.
unsafe fn borrow<'a>(event: &EventFd) -> BorrowedFd<'a> {
    use std::os::fd::AsRawFd;
    // SAFETY: the caller promises that the descriptor stays open.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        if let Some(saved) = &self.saved {
            // Nothing can be done about a terminal that is gone.
            let _ = tcsetattr(io::stdin(), OptionalActions::Now, saved);
        }
    }
}

/// Writes a console's output; see [`Terminal::writer`].
pub struct TerminalWriter(Output);

impl Write for TerminalWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match &self.0 {
            Output::Null => {}
            Output::File(file) => {
                if let Err(error) = (&**file).write_all(bytes)
                    && error.kind() != io::ErrorKind::WouldBlock
                {
                    tracing::debug!(%error, "console output was dropped");
                }
            }
            Output::Client(client) => {
                let mut client = client.lock();
                let gone = match client.as_mut().map(|stream| stream.write_all(bytes)) {
                    Some(Err(error)) => error.kind() != io::ErrorKind::WouldBlock,
                    Some(Ok(())) | None => false,
                };
                if gone {
                    *client = None;
                }
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
