//! Who announces itself on an interface: gratuitous ARP requests that come in there.

use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::process::wait_for;

/// `ETH_P_ARP` (`linux/if_ether.h`).
const ETHERTYPE_ARP: u32 = 0x0806;
/// `ETH_P_ALL`: a bridge takes frames of its ports before sockets of one protocol see them.
const ALL_PROTOCOLS: u16 = 0x0003;
/// Bytes of an ARP packet for IPv4 over Ethernet, with the Ethernet header.
const ARP_FRAME: usize = 14 + 28;

/// A packet socket that sees the ARP packets of one interface of this thread's namespace.
#[derive(Debug)]
pub struct ArpWatch {
    socket: OwnedFd,
    interface: String,
}

impl ArpWatch {
    /// Watches from now on.
    ///
    /// # Errors
    /// When there is no such interface, or the caller is not root.
    pub fn start(interface: &str) -> Result<Self> {
        let socket = packet_socket().context("a packet socket")?;
        only_arp(&socket).context("filtering a packet socket")?;
        bind(&socket, interface).with_context(|| format!("watching {interface}"))?;
        Ok(Self {
            socket,
            interface: interface.to_owned(),
        })
    }

    /// Waits until the station with `mac` (`52:54:…`) has announced itself here.
    ///
    /// # Errors
    /// When it does not within `limit`.
    pub fn wait_announcement(&self, mac: &str, limit: Duration) -> Result<()> {
        let what = format!("gratuitous ARP of {mac} on {}", self.interface);
        wait_for(&what, limit, || {
            Ok(self.take_announcement(mac)?.then_some(()))
        })
    }

    /// Whether among the frames that came in since last asked is an announcement of `mac`.
    ///
    /// # Errors
    /// When they cannot be read.
    pub fn take_announcement(&self, mac: &str) -> Result<bool> {
        let mut frame = [0; ARP_FRAME];
        while let Some(len) = self.receive(&mut frame)? {
            if len == ARP_FRAME && announces(&frame, mac) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// The next frame that came in; frames that go out there are passed over.
    fn receive(&self, frame: &mut [u8; ARP_FRAME]) -> Result<Option<usize>> {
        loop {
            // SAFETY: all zeroes is an address of no family.
            let mut from: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
            let mut from_len = socklen::<libc::sockaddr_ll>();
            // SAFETY: the pointers are to `frame` and `from` with their lengths.
            let len = unsafe {
                libc::recvfrom(
                    self.socket.as_raw_fd(),
                    frame.as_mut_ptr().cast(),
                    frame.len(),
                    0,
                    (&raw mut from).cast(),
                    &mut from_len,
                )
            };
            match usize::try_from(len) {
                Ok(len) if from.sll_pkttype != libc::PACKET_OUTGOING => return Ok(Some(len)),
                Ok(_) => {}
                Err(_) => match io::Error::last_os_error() {
                    error if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                    error => return Err(error).context("reading a packet socket"),
                },
            }
        }
    }
}

/// Whether a frame is an ARP request of `mac` for its own address (RFC 5227, section 3).
fn announces(frame: &[u8; ARP_FRAME], mac: &str) -> bool {
    let part = |at: usize, len: usize| frame.get(at..at + len).unwrap_or_default();
    let sender: Vec<_> = part(22, 6)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    part(20, 2) == [0, 1] && sender.join(":") == mac && part(28, 4) == part(38, 4)
}

fn socklen<T>() -> libc::socklen_t {
    libc::socklen_t::try_from(size_of::<T>()).unwrap_or(libc::socklen_t::MAX)
}

fn packet_socket() -> io::Result<OwnedFd> {
    let kind = libc::SOCK_RAW | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    // SAFETY: no pointers. Without a protocol it sees nothing until it is bound.
    let fd = unsafe { libc::socket(libc::AF_PACKET, kind, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it was just opened, and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Lets only ARP through, so that streams beside it do not fill the socket's buffer.
fn only_arp(socket: &OwnedFd) -> io::Result<()> {
    let step = |code: u32, jt, jf, k| libc::sock_filter {
        code: u16::try_from(code).unwrap_or(0),
        jt,
        jf,
        k,
    };
    let mut filter = [
        step(libc::BPF_LD | libc::BPF_H | libc::BPF_ABS, 0, 0, 12),
        step(
            libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K,
            0,
            1,
            ETHERTYPE_ARP,
        ),
        step(libc::BPF_RET | libc::BPF_K, 0, 0, 65535),
        step(libc::BPF_RET | libc::BPF_K, 0, 0, 0),
    ];
    let program = libc::sock_fprog {
        len: 4,
        filter: filter.as_mut_ptr(),
    };
    // SAFETY: the kernel copies the program, which lives until the call returns.
    let done = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_FILTER,
            (&raw const program).cast(),
            socklen::<libc::sock_fprog>(),
        )
    };
    result(done)
}

fn bind(socket: &OwnedFd, interface: &str) -> Result<()> {
    let index = rustix::net::netdevice::name_to_index(socket, interface)?;
    // SAFETY: all zeroes is a valid address.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::sa_family_t::try_from(libc::AF_PACKET)?;
    address.sll_protocol = ALL_PROTOCOLS.to_be();
    address.sll_ifindex = index.cast_signed();
    // SAFETY: the pointer is to `address` with its length.
    let done = unsafe {
        libc::bind(
            socket.as_raw_fd(),
            (&raw const address).cast(),
            socklen::<libc::sockaddr_ll>(),
        )
    };
    result(done).context("bind")
}

fn result(done: libc::c_int) -> io::Result<()> {
    match done {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
