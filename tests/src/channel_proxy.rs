//! A man in the middle of a migration, who understands frames and can do harm at any of them.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use parking_lot::Mutex;
use rustix::net::Shutdown;
use vm_migration::migrate::frame::{Envelope, FrameBuffer, HEADER_BYTES, Kind};

/// Proxies so far, so that each has a socket of its own.
static NUMBER: AtomicU32 = AtomicU32::new(0);

/// One frame on its way.
#[derive(Debug)]
pub struct Frame {
    /// What it says, which also tells who says it.
    pub kind: Kind,
    /// Its number in its direction.
    pub sequence: u64,
    bytes: Vec<u8>,
}

impl Frame {
    /// The whole frame as it lies on the wire, to be damaged.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.bytes
    }

    /// What is in it.
    pub fn payload(&self) -> &[u8] {
        self.bytes.get(HEADER_BYTES..).unwrap_or_default()
    }

    /// Puts something else in it, with a checksum that fits.
    ///
    /// # Errors
    /// When it is too long.
    pub fn set_payload(&mut self, payload: &[u8]) -> Result<()> {
        let mut frame = FrameBuffer::default();
        frame.extend(payload);
        self.bytes = frame.seal(self.kind, self.sequence)?.to_vec();
        Ok(())
    }
}

/// What becomes of a frame and the connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// The frame goes on.
    Pass,
    /// The connection ends, before the frame went on.
    CutBefore,
    /// The connection ends, after the frame went on.
    CutAfter,
    /// Nothing goes on any more in either direction, but nobody hears of an end.
    Silence,
}

/// Sees each frame and says what becomes of it.
pub type Judge = Box<dyn FnMut(&mut Frame) -> Verdict + Send>;

/// A proxy for one migration.
#[derive(Debug)]
pub struct ChannelProxy {
    /// What the source is to be told as destination.
    pub url: String,
    over: Arc<AtomicBool>,
}

/// What both directions share.
struct Shared {
    judge: Mutex<Judge>,
    silent: AtomicBool,
    over: Arc<AtomicBool>,
}

enum Listener {
    Unix(UnixListener),
    Tcp(TcpListener),
}

impl ChannelProxy {
    /// Listens on a unix socket in `dir` or on a TCP port, as `target` does, for one source.
    ///
    /// # Errors
    /// When it cannot listen.
    pub fn start(dir: &Path, target: &str, judge: Judge) -> Result<Self> {
        let (listener, url) = if target.starts_with("unix:") {
            let number = NUMBER.fetch_add(1, Ordering::Relaxed);
            let path = dir.join(format!("proxy{number}"));
            let url = format!("unix:{}", path.display());
            (Listener::Unix(UnixListener::bind(path)?), url)
        } else {
            let listener = TcpListener::bind("127.0.0.1:0")?;
            let url = format!("tcp:{}", listener.local_addr()?);
            (Listener::Tcp(listener), url)
        };
        let over = Arc::new(AtomicBool::new(false));
        let shared = Arc::new(Shared {
            judge: Mutex::new(judge),
            silent: AtomicBool::new(false),
            over: Arc::clone(&over),
        });
        let target = target.to_owned();
        thread::spawn(move || {
            if let Err(error) = serve(&listener, &target, &shared) {
                eprintln!("channel proxy: {error:#}");
            }
        });
        Ok(Self { url, over })
    }
}

impl Drop for ChannelProxy {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
    }
}

fn serve(listener: &Listener, target: &str, shared: &Arc<Shared>) -> Result<()> {
    let source = match listener {
        Listener::Unix(listener) => file(listener.accept()?.0),
        Listener::Tcp(listener) => file(listener.accept()?.0),
    };
    let destination = match target.split_once(':') {
        Some(("unix", path)) => file(UnixStream::connect(path)?),
        Some(("tcp", address)) => file(TcpStream::connect(address)?),
        _ => bail!("{target} is no migration URL"),
    };
    let back = (destination.try_clone()?, source.try_clone()?);
    let own = Arc::clone(shared);
    thread::spawn(move || pass_on(back.0, back.1, &own));
    pass_on(source, destination, shared);
    Ok(())
}

fn file(socket: impl Into<OwnedFd>) -> File {
    File::from(socket.into())
}

/// Passes frames on until the connection ends or is ended.
fn pass_on(mut from: File, mut to: File, shared: &Shared) {
    loop {
        let Ok(mut frame) = receive(&mut from) else {
            // What was said last still arrives; the other direction may still be open.
            let _ = rustix::net::shutdown(&to, Shutdown::Write);
            return;
        };
        let verdict = (shared.judge.lock())(&mut frame);
        if verdict == Verdict::Silence {
            shared.silent.store(true, Ordering::Relaxed);
        }
        while shared.silent.load(Ordering::Relaxed) {
            if shared.over.load(Ordering::Relaxed) {
                return;
            }
            thread::sleep(Duration::from_millis(20));
        }
        let cut = verdict == Verdict::CutBefore
            || to.write_all(&frame.bytes).is_err()
            || verdict == Verdict::CutAfter;
        if cut {
            for end in [&from, &to] {
                // Closed already is as good.
                let _ = rustix::net::shutdown(end, Shutdown::Both);
            }
            return;
        }
    }
}

fn receive(from: &mut File) -> Result<Frame> {
    let mut header = [0; HEADER_BYTES];
    from.read_exact(&mut header)?;
    let envelope = Envelope::parse(&header).context("not a frame")?;
    let mut bytes = header.to_vec();
    bytes.resize(HEADER_BYTES + envelope.length, 0);
    from.read_exact(bytes.get_mut(HEADER_BYTES..).unwrap_or_default())?;
    Ok(Frame {
        kind: envelope.kind,
        sequence: envelope.sequence,
        bytes,
    })
}

/// A judge that does something at the `nth` (from 1) frame of a kind, and lets all others pass.
pub fn at(
    kind: Kind,
    nth: u32,
    mut act: impl FnMut(&mut Frame) -> Verdict + Send + 'static,
) -> Judge {
    let mut seen = 0;
    Box::new(move |frame| {
        if frame.kind != kind {
            return Verdict::Pass;
        }
        seen += 1;
        if seen == nth {
            act(frame)
        } else {
            Verdict::Pass
        }
    })
}
