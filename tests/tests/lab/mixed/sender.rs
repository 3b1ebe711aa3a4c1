//! Sends the frames of `test-packets` to a bridge, no faster than a VMM takes them from its tap.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use test_packets::packet;

/// Frames that may wait in taps, whose queues hold 500 each.
const WINDOW: u64 = 150;
/// Once nothing was taken for so long, nobody is there: frames then go out slowly.
const STALL: Duration = Duration::from_millis(200);
/// How slowly.
const STALLED_PAUSE: Duration = Duration::from_millis(25);

/// What to send.
#[derive(Clone, Debug)]
pub(crate) struct Frames {
    /// The bridge.
    pub(crate) interface: String,
    /// The taps behind it.
    pub(crate) taps: Vec<String>,
    /// Which stream.
    pub(crate) seed: u64,
    /// How many of its frames.
    pub(crate) count: u32,
    /// To whom.
    pub(crate) mac: [u8; 6],
    /// At most so many in a second.
    pub(crate) per_second: u32,
}

/// What became of packets for taps, as the kernel counts it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Taken {
    /// Read by a VMM.
    pub(crate) read: u64,
    /// Dropped because a queue was full or nobody had the tap open.
    pub(crate) dropped: u64,
}

impl Taken {
    /// Of these taps until now.
    pub(crate) fn of(taps: &[String]) -> Result<Self> {
        // Of this thread's network namespace; sysfs shows that of who mounted it.
        let text = fs::read_to_string("/proc/thread-self/net/dev")?;
        let mut sum = Self::default();
        for tap in taps {
            let line = text
                .lines()
                .find_map(|line| line.trim().strip_prefix(&format!("{tap}:")));
            let line = line.with_context(|| format!("no counters of {tap}"))?;
            let numbers: Vec<u64> = line
                .split_whitespace()
                .map(str::parse)
                .collect::<Result<_, _>>()?;
            // Eight of receiving (by the host, from the guest), then of sending: bytes, packets, errors, drops.
            let number = |at: usize| numbers.get(at).copied().context("too few counters");
            sum.read += number(9)?;
            sum.dropped += number(11)?;
        }
        Ok(sum)
    }

    /// Since `before`.
    pub(crate) const fn since(self, before: Self) -> Self {
        Self {
            read: self.read - before.read,
            dropped: self.dropped - before.dropped,
        }
    }
}

/// Frames that are being sent.
pub(crate) struct Sender {
    shared: Arc<Shared>,
    count: u32,
    thread: JoinHandle<Result<()>>,
}

/// What its thread and others see.
#[derive(Default)]
struct Shared {
    sent: AtomicU32,
    enough: AtomicBool,
}

impl Sender {
    /// Starts to send.
    pub(crate) fn start(frames: &Frames) -> Result<Self> {
        let socket = open(&frames.interface)?;
        let shared = Arc::<Shared>::default();
        let (of_thread, frames_of_thread) = (Arc::clone(&shared), frames.clone());
        let thread = thread::Builder::new()
            .name("frames".to_owned())
            .spawn(move || send_all(&socket, &frames_of_thread, &of_thread))?;
        Ok(Self {
            shared,
            count: frames.count,
            thread,
        })
    }

    /// Waits until so many frames are sent in all.
    pub(crate) fn wait_sent(&self, goal: u32, limit: Duration) -> Result<()> {
        e2e::process::wait_for(&format!("frame {goal}"), limit, || {
            let there = self.sent() >= goal;
            ensure!(
                there || !self.thread.is_finished(),
                "{} frames were not enough",
                self.count
            );
            Ok(there.then_some(()))
        })
    }

    /// Waits until so many frames more are sent.
    pub(crate) fn wait_more(&self, more: u32, limit: Duration) -> Result<()> {
        self.wait_sent(self.sent() + more, limit)
    }

    /// How many have been sent.
    pub(crate) fn sent(&self) -> u32 {
        self.shared.sent.load(Ordering::Relaxed)
    }

    /// Sends no more.
    pub(crate) fn enough(&self) {
        self.shared.enough.store(true, Ordering::Relaxed);
    }

    /// Waits until all are sent, and taken by who takes any; how many those were.
    pub(crate) fn finish(self) -> Result<u32> {
        let ended = self
            .thread
            .join()
            .map_err(|_| anyhow!("the sender panicked"))?;
        ended.map(|()| self.shared.sent.load(Ordering::Relaxed))
    }
}

/// How many frames are on their way through taps.
struct InFlight {
    sent: u64,
    gone: u64,
    changed: Instant,
}

impl InFlight {
    /// Takes note of what the taps say.
    fn update(&mut self, taken: Taken) {
        let gone = taken.read + taken.dropped;
        if gone == self.gone {
            return;
        }
        // After a stall what was in a tap that nobody reads any more is lost; whoever reads now is up to date.
        if self.changed.elapsed() > STALL || gone > self.sent {
            self.sent = gone;
        }
        self.gone = gone;
        self.changed = Instant::now();
    }

    const fn is_full(&self) -> bool {
        self.sent.saturating_sub(self.gone) >= WINDOW
    }
}

fn send_all(socket: &OwnedFd, frames: &Frames, shared: &Shared) -> Result<()> {
    let begun = Instant::now();
    let start = Taken::of(&frames.taps)?;
    let gone = start.read + start.dropped;
    let mut flight = InFlight {
        sent: gone,
        gone,
        changed: begun,
    };
    let interval = Duration::from_secs(1) / frames.per_second;
    let mut due = begun;
    for number in 0..frames.count {
        if shared.enough.load(Ordering::Relaxed) {
            break;
        }
        // What was late is not made up for: the guest may need the time.
        let now = Instant::now();
        thread::sleep(due.saturating_duration_since(now));
        due = due.max(now) + interval;
        // The counters are not looked at for each frame: reading them costs more than sending.
        if number % 16 == 0 || flight.is_full() {
            flight.update(Taken::of(&frames.taps)?);
        }
        while flight.is_full() && flight.changed.elapsed() < STALL {
            thread::sleep(Duration::from_millis(1));
            flight.update(Taken::of(&frames.taps)?);
        }
        if flight.is_full() {
            thread::sleep(STALLED_PAUSE);
        }
        send(socket, &packet(frames.seed, number, frames.mac).bytes)?;
        flight.sent += 1;
        shared.sent.store(number + 1, Ordering::Relaxed);
    }
    while flight.sent > flight.gone && flight.changed.elapsed() < Duration::from_secs(1) {
        thread::sleep(Duration::from_millis(5));
        flight.update(Taken::of(&frames.taps)?);
    }
    Ok(())
}

/// A packet socket that only sends, on one interface.
fn open(interface: &str) -> Result<OwnedFd> {
    let name = std::ffi::CString::new(interface)?;
    // SAFETY: the name is a string that outlives the call.
    let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
    ensure!(index != 0, "{interface}: {}", io::Error::last_os_error());
    // Without a protocol it receives nothing.
    // SAFETY: no addresses are passed.
    let socket = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
    if socket < 0 {
        return Err(io::Error::last_os_error()).context("opening a packet socket");
    }
    // SAFETY: the kernel has just made it and gave it to nobody else.
    let socket = unsafe { OwnedFd::from_raw_fd(socket) };
    let address = libc::sockaddr_ll {
        sll_family: u16::try_from(libc::AF_PACKET)?,
        sll_protocol: 0,
        sll_ifindex: i32::try_from(index)?,
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 0,
        sll_addr: [0; 8],
    };
    let length = libc::socklen_t::try_from(size_of_val(&address))?;
    // SAFETY: the kernel reads `length` bytes of the address, the size of the struct.
    let bound = unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length) };
    if bound < 0 {
        return Err(io::Error::last_os_error()).context("binding a packet socket");
    }
    Ok(socket)
}

fn send(socket: &OwnedFd, frame: &[u8]) -> Result<()> {
    // SAFETY: the kernel reads the frame, which outlives the call.
    let sent = unsafe { libc::send(socket.as_raw_fd(), frame.as_ptr().cast(), frame.len(), 0) };
    if usize::try_from(sent) == Ok(frame.len()) {
        return Ok(());
    }
    Err(io::Error::last_os_error()).context("sending a frame")
}
