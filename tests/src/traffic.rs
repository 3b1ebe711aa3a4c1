//! Numbered UDP packets to the native guest, and counting their echoes.
//!
//! Every flow is a socket of its own, so its own 5-tuple: a device that spreads or hashes flows
//! has something to tell apart. Payloads are those of [`guest_logic::packet`]: both sides check
//! every byte.

use std::io::{self, ErrorKind};
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use guest_logic::packet::{self, HEADER_BYTES, Label, Payload};
use guest_logic::sequence::{Arrival, FLOWS, Tracker};
use parking_lot::Mutex;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::netns::ip;

/// First destination port; flow n goes to the n-th from it.
const FIRST_PORT: u16 = 9000;
/// How long echoes of the last packets are waited for.
const GRACE: Duration = Duration::from_millis(500);
/// Longest pause of the loop, so that stopping takes no longer.
const MAX_WAIT: Duration = Duration::from_millis(1);
/// Packets sent at once when the loop was late; more is given up, not made up for.
const MAX_BURST: u32 = 64;
/// Most payload that fits an unfragmented IPv6 packet of 1500 bytes.
pub const MAX_PAYLOAD: usize = 1452;

/// What to send.
#[derive(Clone, Debug)]
pub struct TrafficConfig {
    /// Interface the guest is behind; it has the host's addresses.
    pub interface: String,
    /// The guest's MAC address, `52:54:00:12:34:56`; made a permanent neighbour.
    pub guest_mac: String,
    /// Pairs of host's and guest's address, IPv4 or IPv6. Flows use them in turn.
    pub addresses: Vec<(IpAddr, IpAddr)>,
    /// Flows, 1 to 64.
    pub flows: u16,
    /// Bytes of UDP payload, 32 to 1452.
    pub payload: usize,
    /// Packets per second, of all flows together.
    pub packets_per_second: u32,
}

/// What happened so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TrafficCounts {
    /// Packets the host's kernel took.
    pub sent: u64,
    /// Packets it did not take (full queue, interface down); their numbers were used again.
    pub refused: u64,
    /// Echoes, each counted once.
    pub received: u64,
    /// Echoes with wrong content, or of another flow or run.
    pub bad: u64,
    /// Echoes that came before.
    pub duplicate: u64,
    /// Longest time between two echoes.
    pub max_gap: Duration,
    /// Longest time from sending a packet to its echo.
    pub max_round_trip: Duration,
}

impl TrafficCounts {
    /// Packets without an echo (yet).
    pub fn lost(&self) -> u64 {
        self.sent.saturating_sub(self.received)
    }
}

/// A running generator. Stops when dropped.
#[derive(Debug)]
pub struct Traffic {
    stop: Arc<AtomicBool>,
    counts: Arc<Mutex<TrafficCounts>>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl Traffic {
    /// Starts sending.
    ///
    /// # Errors
    /// When the configuration is out of bounds, a neighbour cannot be set (it takes root), or an
    /// address is not the host's.
    pub fn start(config: &TrafficConfig) -> Result<Self> {
        for (_, guest) in &config.addresses {
            let guest = guest.to_string();
            let neighbour = ["neigh", "replace", &guest, "lladdr", &config.guest_mac];
            let device = ["dev", &config.interface, "nud", "permanent"];
            ip(&[&neighbour[..], &device[..]].concat())?;
        }
        let sender = Sender::new(config)?;
        let stop = Arc::new(AtomicBool::new(false));
        let counts = Arc::new(Mutex::new(TrafficCounts::default()));
        let (thread_stop, thread_counts) = (Arc::clone(&stop), Arc::clone(&counts));
        let thread = thread::Builder::new()
            .name("traffic".to_owned())
            .spawn(move || sender.run(&thread_stop, &thread_counts))?;
        Ok(Self {
            stop,
            counts,
            thread: Some(thread),
        })
    }

    /// What happened so far.
    pub fn counts(&self) -> TrafficCounts {
        *self.counts.lock()
    }

    /// Stops sending, waits for the last echoes.
    ///
    /// # Errors
    /// What ended the generator, if something did.
    pub fn stop(mut self) -> Result<TrafficCounts> {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread
                .join()
                .map_err(|_| anyhow!("the traffic generator panicked"))??;
        }
        Ok(self.counts())
    }
}

impl Drop for Traffic {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// One flow's socket and next number.
#[derive(Debug)]
struct Flow {
    socket: UdpSocket,
    number: u16,
    next: u64,
}

/// The generator's state, all in its thread.
struct Sender {
    flows: Vec<Flow>,
    run: u32,
    start: Instant,
    interval: Duration,
    payload: Vec<u8>,
    tracker: Tracker,
    last_echo: Option<Instant>,
}

impl Sender {
    fn new(config: &TrafficConfig) -> Result<Self> {
        if config.addresses.is_empty() || config.packets_per_second == 0 {
            bail!("traffic needs addresses and a rate");
        }
        if !(1..=FLOWS).contains(&usize::from(config.flows)) {
            bail!("{} flows: 1 to {FLOWS} can be told apart", config.flows);
        }
        if !(HEADER_BYTES..=MAX_PAYLOAD).contains(&config.payload) {
            bail!(
                "a payload of {} bytes: {HEADER_BYTES} to {MAX_PAYLOAD} fit",
                config.payload
            );
        }
        let flows = (0..config.flows)
            .zip(config.addresses.iter().cycle())
            .map(|(number, &(host, guest))| Flow::new(number, host, guest))
            .collect::<Result<_>>()?;
        Ok(Self {
            flows,
            run: new_run(),
            start: Instant::now(),
            interval: Duration::from_secs(1) / config.packets_per_second,
            payload: vec![0; config.payload],
            tracker: Tracker::default(),
            last_echo: None,
        })
    }

    fn run(mut self, stop: &AtomicBool, shared: &Mutex<TrafficCounts>) -> Result<()> {
        let mut counts = TrafficCounts::default();
        let mut turn = 0;
        let mut due = Instant::now();
        while !stop.load(Ordering::Relaxed) {
            let mut burst = 0;
            while due <= Instant::now() && burst < MAX_BURST {
                self.send(turn, &mut counts)?;
                turn = (turn + 1) % self.flows.len();
                due += self.interval;
                burst += 1;
            }
            due = due.max(
                Instant::now()
                    .checked_sub(MAX_WAIT * MAX_BURST)
                    .unwrap_or(due),
            );
            self.listen(
                due.saturating_duration_since(Instant::now()).min(MAX_WAIT),
                &mut counts,
            )?;
            *shared.lock() = counts;
        }
        let end = Instant::now() + GRACE;
        while counts.lost() != 0 && Instant::now() < end {
            self.listen(MAX_WAIT, &mut counts)?;
        }
        *shared.lock() = counts;
        Ok(())
    }

    fn send(&mut self, turn: usize, counts: &mut TrafficCounts) -> Result<()> {
        let Some(flow) = self.flows.get_mut(turn) else {
            return Ok(());
        };
        let stamp = u64::try_from(self.start.elapsed().as_nanos())?;
        let label = Label {
            run: self.run,
            flow: flow.number,
            sequence: flow.next,
            stamp,
        };
        if !packet::write(&mut self.payload, label) {
            bail!(
                "a payload of {} bytes cannot be written",
                self.payload.len()
            );
        }
        match flow.socket.send(&self.payload) {
            Ok(_) => {
                flow.next += 1;
                counts.sent += 1;
            }
            Err(error) if is_transient(&error) => counts.refused += 1,
            Err(error) => return Err(error).context("cannot send a test packet"),
        }
        Ok(())
    }

    /// Waits at most `limit` for echoes, then takes all there are.
    fn listen(&mut self, limit: Duration, counts: &mut TrafficCounts) -> Result<()> {
        let timeout = Timespec::try_from(limit)?;
        let mut ready: Vec<PollFd<'_>> = self
            .flows
            .iter()
            .map(|flow| PollFd::from_borrowed_fd(flow.socket.as_fd(), PollFlags::IN))
            .collect();
        poll(&mut ready, Some(&timeout))?;
        let ready: Vec<bool> = ready.iter().map(|fd| !fd.revents().is_empty()).collect();
        let mut buffer = [0; 2048];
        for (flow, _) in self.flows.iter().zip(ready).filter(|&(_, ready)| ready) {
            loop {
                match flow.socket.recv(&mut buffer) {
                    Ok(len) => {
                        let payload = buffer.get(..len).unwrap_or_default();
                        let clock = (self.start, &mut self.last_echo);
                        count(
                            payload,
                            (self.run, flow.number),
                            &mut self.tracker,
                            clock,
                            counts,
                        );
                    }
                    Err(error) if is_transient(&error) => break,
                    Err(error) => return Err(error).context("cannot receive an echo"),
                }
            }
        }
        Ok(())
    }
}

/// Counts one echo that came to the socket of `expected` run and flow.
fn count(
    payload: &[u8],
    expected: (u32, u16),
    tracker: &mut Tracker,
    (start, last): (Instant, &mut Option<Instant>),
    counts: &mut TrafficCounts,
) {
    let now = Instant::now();
    let label = match packet::read(payload) {
        Payload::Good(label) if (label.run, label.flow) == expected => label,
        Payload::Good(_) | Payload::Damaged | Payload::Foreign => {
            counts.bad += 1;
            return;
        }
    };
    match tracker.observe(label.run, label.flow, label.sequence) {
        Arrival::New => counts.received += 1,
        Arrival::Duplicate => counts.duplicate += 1,
    }
    let round_trip = (now - start).saturating_sub(Duration::from_nanos(label.stamp));
    counts.max_round_trip = counts.max_round_trip.max(round_trip);
    if let Some(before) = last.replace(now) {
        counts.max_gap = counts.max_gap.max(now - before);
    }
}

impl Flow {
    fn new(number: u16, host: IpAddr, guest: IpAddr) -> Result<Self> {
        let socket = UdpSocket::bind(SocketAddr::new(host, 0))
            .with_context(|| format!("{host} is not an address of this host"))?;
        let port = FIRST_PORT
            .checked_add(number)
            .context("no port for a flow")?;
        socket
            .connect(SocketAddr::new(guest, port))
            .with_context(|| format!("no way to {guest}"))?;
        socket.set_nonblocking(true)?;
        Ok(Self {
            socket,
            number,
            next: 0,
        })
    }
}

/// Errors that pass: a full queue, an interface that is down, a neighbour that answered with an
/// ICMP error.
fn is_transient(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::WouldBlock
            | ErrorKind::ConnectionRefused
            | ErrorKind::NetworkDown
            | ErrorKind::NetworkUnreachable
            | ErrorKind::HostUnreachable
            | ErrorKind::Interrupted
    ) || error.raw_os_error() == Some(libc::ENOBUFS)
}

/// A run number no generator before had: the low bits of the time, never 0.
fn new_run() -> u32 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let [a, b, c, d, ..] = since.map_or(0, |since| since.as_micros()).to_le_bytes();
    u32::from_le_bytes([a, b, c, d]) | 1
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A peer on loopback that echoes as `answer` makes of each packet's number.
    fn peer(answer: impl Fn(u64, &[u8]) -> Vec<Vec<u8>> + Send + 'static) -> Sender {
        let config = TrafficConfig {
            interface: "lo".to_owned(),
            guest_mac: String::new(),
            addresses: vec![("127.0.0.1".parse().unwrap(), "127.0.0.1".parse().unwrap())],
            flows: 1,
            payload: 100,
            packets_per_second: 2000,
        };
        let sender = Sender::new(&config).unwrap();
        let far = UdpSocket::bind("127.0.0.1:0").unwrap();
        sender.flows[0]
            .socket
            .connect(far.local_addr().unwrap())
            .unwrap();
        far.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
        thread::spawn(move || {
            let mut buffer = [0; 2048];
            while let Ok((len, from)) = far.recv_from(&mut buffer) {
                let Payload::Good(label) = packet::read(&buffer[..len]) else {
                    panic!("damaged")
                };
                for echo in answer(label.sequence, &buffer[..len]) {
                    far.send_to(&echo, from).unwrap();
                }
            }
        });
        sender
    }

    fn run(sender: Sender, packets: u64) -> TrafficCounts {
        let (stop, counts) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::default()));
        let (thread_stop, thread_counts) = (Arc::clone(&stop), Arc::clone(&counts));
        let thread = thread::spawn(move || sender.run(&thread_stop, &thread_counts));
        let start = Instant::now();
        while counts.lock().sent < packets {
            assert!(start.elapsed() < Duration::from_secs(10), "stuck");
            thread::sleep(MAX_WAIT);
        }
        stop.store(true, Ordering::Relaxed);
        thread.join().unwrap().unwrap();
        *counts.lock()
    }

    #[test]
    fn all_echoes_are_counted_once() {
        let counts = run(peer(|_, packet| vec![packet.to_vec()]), 200);
        assert_eq!(
            (counts.received, counts.lost(), counts.bad),
            (counts.sent, 0, 0)
        );
        assert!(counts.max_round_trip > Duration::ZERO && counts.duplicate == 0);
    }

    #[test]
    fn lost_doubled_and_damaged_echoes_are_told_apart() {
        let counts = run(
            peer(|number, packet| match number {
                10..20 => vec![],
                20..25 => vec![packet.to_vec(); 2],
                30..33 => vec![packet.iter().map(|byte| byte ^ 1).collect()],
                40..44 => vec![packet[..99].to_vec()],
                _ => vec![packet.to_vec()],
            }),
            100,
        );
        assert_eq!((counts.lost(), counts.duplicate, counts.bad), (17, 5, 7));
    }

    #[test]
    fn another_runs_echo_is_bad() {
        let counts = run(
            peer(|number, packet| {
                let mut other = packet.to_vec();
                let label = Label {
                    run: 2,
                    flow: 0,
                    sequence: number,
                    stamp: 0,
                };
                assert!(packet::write(&mut other, label));
                vec![other]
            }),
            10,
        );
        assert_eq!((counts.received, counts.bad), (0, counts.sent));
    }

    #[test]
    fn bounds_are_checked() {
        let good = TrafficConfig {
            interface: "lo".to_owned(),
            guest_mac: String::new(),
            addresses: vec![("127.0.0.1".parse().unwrap(), "127.0.0.1".parse().unwrap())],
            flows: 64,
            payload: MAX_PAYLOAD,
            packets_per_second: 1,
        };
        assert!(Sender::new(&good).is_ok());
        assert!(
            Sender::new(&TrafficConfig {
                flows: 0,
                ..good.clone()
            })
            .is_err()
        );
        assert!(
            Sender::new(&TrafficConfig {
                flows: 65,
                ..good.clone()
            })
            .is_err()
        );
        assert!(
            Sender::new(&TrafficConfig {
                payload: 31,
                ..good.clone()
            })
            .is_err()
        );
        assert!(
            Sender::new(&TrafficConfig {
                payload: 1453,
                ..good.clone()
            })
            .is_err()
        );
        assert!(
            Sender::new(&TrafficConfig {
                packets_per_second: 0,
                ..good.clone()
            })
            .is_err()
        );
        assert!(
            Sender::new(&TrafficConfig {
                addresses: vec![],
                ..good
            })
            .is_err()
        );
    }
}
