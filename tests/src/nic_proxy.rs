//! A man in the middle between `ferry` and `ferry-nic` who can make the DMA log forget, or fail, and
//! changes of the migration's state fail.
//!
//! It passes messages of vfio-user on, with the file descriptors that come along. Told to, it
//! zeroes bits in replies to DMA_LOGGING_REPORT: pages the device wrote are then not sent again. A
//! test that claims to see lost pages must fail through such a proxy. Or it makes an error of one
//! reply, [`LogFault`].
//!
//! It forgets the first report of each page, so that what is lost are the buffers that the device
//! wrote once. The rings, which it writes all the time, arrive: a guest that stumbles over a
//! broken ring would not live to find the lost pages.

use std::collections::HashSet;
use std::io::{IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use parking_lot::Mutex;
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, Shutdown,
};
use vfio_user::wire::{
    FEATURE_MASK, FEATURE_PROBE, FEATURE_SET, FLAG_ERROR, FeatureMsg, HEADER_SIZE, Header,
    LogReportMsg, MAX_MSG_FDS, MigStateMsg, TYPE_COMMAND, TYPE_MASK, TYPE_REPLY,
};
use vfio_user::{Command, DeviceState, Feature};
use zerocopy::{FromBytes, IntoBytes};

/// Longest message passed on; a dirty log's bitmap is the longest there is.
const MAX_MESSAGE: usize = vfio_user::wire::MAX_REPORT_BITMAP + 4096;

/// Which reply becomes an error. The server has done what it was asked, nobody hears of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LogFault {
    /// The next to DMA_LOGGING_START.
    Start,
    /// The DMA_LOGGING_REPORT of this number, from 1 on.
    Report(u32),
    /// The first DMA_LOGGING_REPORT after the device was stopped.
    LastReport,
}

/// How a change of the migration's state fails.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum StateFault {
    /// The card refuses and stays in the state it is in.
    Refused,
    /// The card enters the state, and says that it failed.
    Denied,
}

/// A change of state that is to fail, or has begun to.
#[derive(Debug, Default)]
pub struct States {
    /// The next change to this state fails.
    fault: Mutex<Option<(DeviceState, StateFault)>>,
    /// The answer to the message of this number is to be an error.
    denied: Mutex<Option<u16>>,
}

/// What the proxy does to the dirty log, and did.
#[derive(Debug, Default)]
pub struct DirtyLog {
    /// What is still to go wrong.
    fault: Mutex<Option<LogFault>>,
    /// Pages reported for the first time are forgotten from now on.
    pub forget: AtomicBool,
    /// How much longer each report takes, in milliseconds.
    pub delay_ms: AtomicU64,
    /// Pages reported as written, whether forgotten or not.
    pub reported: AtomicU64,
    /// Pages forgotten.
    pub forgotten: AtomicU64,
    /// Pages that were reported before.
    seen: Mutex<HashSet<u64>>,
}

/// A running proxy. Its connections last until one of their ends closes.
#[derive(Debug)]
pub struct NicProxy {
    /// Where `ferry` connects to.
    pub socket: PathBuf,
    /// The dirty log as it passes by.
    pub log: Arc<DirtyLog>,
    /// Changes of state as they pass by.
    pub states: Arc<States>,
}

impl NicProxy {
    /// Listens on `socket` and passes each connection on to a new one to `server`.
    ///
    /// # Errors
    /// When the socket cannot be made.
    pub fn start(socket: &Path, server: &Path) -> Result<Self> {
        let listener = UnixListener::bind(socket)
            .with_context(|| format!("cannot listen on {}", socket.display()))?;
        let (log, states) = (Arc::new(DirtyLog::default()), Arc::new(States::default()));
        let own = (Arc::clone(&log), Arc::clone(&states));
        let server = server.to_owned();
        thread::spawn(move || {
            while let Ok((client, _)) = listener.accept() {
                // A server that is gone: the client sees its connection close.
                let _ = connect(client, &server, &own.0, &own.1);
            }
        });
        Ok(Self {
            socket: socket.to_owned(),
            log,
            states,
        })
    }
}

fn connect(
    client: UnixStream,
    server: &Path,
    log: &Arc<DirtyLog>,
    states: &Arc<States>,
) -> Result<()> {
    let server = UnixStream::connect(server)?;
    let (up, down) = ((client.try_clone()?, server.try_clone()?), (server, client));
    let (up_log, log) = (Arc::clone(log), Arc::clone(log));
    let (up_states, states) = (Arc::clone(states), Arc::clone(states));
    thread::spawn(move || {
        pass_on(up.0, up.1, |message| {
            up_log.look_at_request(message);
            up_states.look_at_request(message);
        });
    });
    thread::spawn(move || {
        pass_on(down.0, down.1, |message| {
            log.look_at(message);
            states.look_at(message);
        });
    });
    Ok(())
}

/// Passes messages on until one end closes, which closes the other.
fn pass_on(mut from: UnixStream, mut to: UnixStream, mut change: impl FnMut(&mut Vec<u8>)) {
    while let Ok((mut message, fds)) = receive(&mut from) {
        change(&mut message);
        if send(&mut to, &message, &fds).is_err() {
            break;
        }
    }
    for end in [&from, &to] {
        // Closed already is as good.
        let _ = rustix::net::shutdown(end, Shutdown::Both);
    }
}

/// One message with its descriptors, which come with its first byte.
fn receive(from: &mut UnixStream) -> Result<(Vec<u8>, Vec<OwnedFd>)> {
    let mut message = vec![0; HEADER_SIZE];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_MSG_FDS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut parts = [IoSliceMut::new(&mut message)];
    let got = rustix::net::recvmsg(&*from, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC)?;
    if got.bytes == 0 {
        bail!("closed");
    }
    let mut fds = Vec::new();
    for ancillary in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = ancillary {
            fds.extend(rights);
        }
    }
    from.read_exact(message.get_mut(got.bytes..).unwrap_or_default())?;
    let size = field(&message, 4).context("no size")?;
    let size = usize::try_from(size)?;
    if !(HEADER_SIZE..=MAX_MESSAGE).contains(&size) {
        bail!("a message of {size} bytes");
    }
    message.resize(size, 0);
    from.read_exact(message.get_mut(HEADER_SIZE..).unwrap_or_default())?;
    Ok((message, fds))
}

fn send(to: &mut UnixStream, message: &[u8], fds: &[OwnedFd]) -> Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_MSG_FDS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(&fds)) {
        bail!("{} descriptors", fds.len());
    }
    let parts = [IoSlice::new(message)];
    let sent = rustix::net::sendmsg(&*to, &parts, &mut control, SendFlags::NOSIGNAL)?;
    to.write_all(message.get(sent..).unwrap_or_default())?;
    Ok(())
}

/// The 32-bit number at a place in a message, in the host's byte order as the protocol has it.
fn field(message: &[u8], at: usize) -> Option<u32> {
    let bytes = message.get(at..)?.first_chunk()?;
    Some(u32::from_ne_bytes(*bytes))
}

impl States {
    /// Lets the next change to `state` fail.
    pub fn fail(&self, state: DeviceState, fault: StateFault) {
        *self.fault.lock() = Some((state, fault));
    }

    /// Whether the change that was to fail has not come.
    pub fn is_to_fail(&self) -> bool {
        self.fault.lock().is_some()
    }

    fn look_at_request(&self, message: &mut [u8]) {
        let mut fault = self.fault.lock();
        let Some((state, how)) = *fault else {
            return;
        };
        if wanted_state(message) != Some(state.number()) {
            return;
        }
        *fault = None;
        match how {
            StateFault::Refused => {
                let at = HEADER_SIZE + size_of::<FeatureMsg>();
                // A state that there is not.
                if let Some(number) = message.get_mut(at..at + size_of::<u32>()) {
                    number.fill(0xff);
                }
            }
            StateFault::Denied => {
                *self.denied.lock() = Header::read_from_prefix(message)
                    .ok()
                    .map(|(header, _)| header.id);
            }
        }
    }

    fn look_at(&self, message: &mut Vec<u8>) {
        let mut denied = self.denied.lock();
        let header = Header::read_from_prefix(message)
            .ok()
            .map(|(header, _)| header);
        let is_it = header.is_some_and(|header| {
            header.flags & TYPE_MASK == TYPE_REPLY && Some(header.id) == *denied
        });
        if is_it {
            *denied = None;
            make_error(message);
        }
    }
}

impl DirtyLog {
    /// Lets one reply fail.
    pub fn fail(&self, fault: LogFault) {
        *self.fault.lock() = Some(fault);
    }

    /// Whether the reply that was to fail has not come.
    pub fn is_to_fail(&self) -> bool {
        self.fault.lock().is_some()
    }

    /// Notes when the device is stopped: the next report is the last.
    fn look_at_request(&self, message: &[u8]) {
        let mut fault = self.fault.lock();
        if *fault == Some(LogFault::LastReport) && stops_device(message) {
            *fault = Some(LogFault::Report(1));
        }
    }

    /// Whether this reply is to fail.
    fn is_due(&self, message: &[u8]) -> bool {
        let mut fault = self.fault.lock();
        let (due, next) = match (*fault, feature_of(message, TYPE_REPLY)) {
            (Some(LogFault::Start), Some((Feature::DmaLoggingStart, _)))
            | (Some(LogFault::Report(0 | 1)), Some((Feature::DmaLoggingReport, _))) => (true, None),
            (Some(LogFault::Report(number)), Some((Feature::DmaLoggingReport, _))) => {
                (false, Some(LogFault::Report(number - 1)))
            }
            (other, _) => (false, other),
        };
        *fault = next;
        due
    }

    /// Looks at a reply: it may be one that fails, or a report that forgets.
    fn look_at(&self, message: &mut Vec<u8>) {
        if self.is_due(message) {
            return make_error(message);
        }
        self.look_at_report(message);
    }

    /// Counts the pages in a DMA_LOGGING_REPORT reply, and zeroes the new ones if it is to forget.
    fn look_at_report(&self, message: &mut [u8]) {
        let Some((first_page, bitmap)) = report(message) else {
            return;
        };
        thread::sleep(Duration::from_millis(self.delay_ms.load(Ordering::Relaxed)));
        let forget = self.forget.load(Ordering::Relaxed);
        let mut seen = self.seen.lock();
        for (byte, base) in bitmap.iter_mut().zip((first_page..).step_by(8)) {
            for bit in (0..8)
                .filter(|bit| *byte & (1 << bit) != 0)
                .collect::<Vec<u8>>()
            {
                self.reported.fetch_add(1, Ordering::Relaxed);
                if seen.insert(base + u64::from(bit)) && forget {
                    *byte &= !(1 << bit);
                    self.forgotten.fetch_add(1, Ordering::Relaxed);
                }
            }
        }
    }
}

/// The feature that a DEVICE_FEATURE message of this type (command or good reply) is about, and its
/// flags.
fn feature_of(message: &[u8], kind: u32) -> Option<(Feature, u32)> {
    let (header, rest) = Header::read_from_prefix(message).ok()?;
    let good = header.flags & TYPE_MASK == kind && header.flags & FLAG_ERROR == 0;
    if !good || header.command != Command::DeviceFeature.number() {
        return None;
    }
    let (feature, _) = FeatureMsg::read_from_prefix(rest).ok()?;
    if feature.flags & FEATURE_PROBE != 0 {
        // Preflight asks whether there is a log: nothing is started, nothing reported.
        return None;
    }
    let number = feature.flags & FEATURE_MASK;
    let all = [
        Feature::DmaLoggingStart,
        Feature::DmaLoggingReport,
        Feature::MigDeviceState,
    ];
    let known = all.into_iter().find(|one| one.number() == number)?;
    Some((known, feature.flags))
}

/// Whether a command has the device go to STOP_COPY.
fn stops_device(message: &[u8]) -> bool {
    wanted_state(message) == Some(DeviceState::StopCopy.number())
}

/// The number of the state that a command has the device go to, if it is such a one.
fn wanted_state(message: &[u8]) -> Option<u32> {
    let (Feature::MigDeviceState, flags) = feature_of(message, TYPE_COMMAND)? else {
        return None;
    };
    let data = message.get(HEADER_SIZE + size_of::<FeatureMsg>()..)?;
    let (state, _) = MigStateMsg::read_from_prefix(data).ok()?;
    (flags & FEATURE_SET != 0).then_some(state.device_state)
}

/// Makes a reply one that says EIO.
fn make_error(message: &mut Vec<u8>) {
    message.truncate(HEADER_SIZE);
    let Ok(mut header) = Header::read_from_bytes(message) else {
        return;
    };
    header.flags |= FLAG_ERROR;
    header.error = Errno::IO.raw_os_error().unsigned_abs();
    header.size = u32::try_from(HEADER_SIZE).unwrap_or(u32::MAX);
    message.copy_from_slice(header.as_bytes());
}

/// The first page's number and the bitmap in a reply to DMA_LOGGING_REPORT, if `message` is one.
fn report(message: &mut [u8]) -> Option<(u64, &mut [u8])> {
    let (Feature::DmaLoggingReport, _) = feature_of(message, TYPE_REPLY)? else {
        return None;
    };
    let data = message.get(HEADER_SIZE + size_of::<FeatureMsg>()..)?;
    let (report, _) = LogReportMsg::read_from_prefix(data).ok()?;
    let first_page = report.iova.checked_div(report.page_size)?;
    let begin = HEADER_SIZE + size_of::<FeatureMsg>() + size_of::<LogReportMsg>();
    Some((first_page, message.get_mut(begin..)?))
}
