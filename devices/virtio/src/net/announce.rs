//! Announcing a guest that arrived by migration and whose driver does not do so itself.
//!
//! Switches send a guest's packets to the port where they last saw its address. Until the guest
//! happens to send something from its new host that is the old one, so the device sends frames in
//! its name: reverse ARP requests (RFC 903), which carry the hardware address and need no other.

use std::time::{Duration, Instant};

use super::backend::{NetBackend, write_packet};
use super::counters::PairCounters;

/// Frames sent: a switch may not yet forward from the new port when the first ones come.
const FRAMES: u32 = 5;
/// The pause after the first frame; each one after it is longer by [`STEP`], so that all are sent
/// within 800 ms.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
/// See [`FIRST_PAUSE`].
const STEP: Duration = Duration::from_millis(100);

/// Bytes of the shortest Ethernet frame, without its checksum (`ETH_ZLEN`, uapi `linux/if_ether.h`).
const FRAME_BYTES: usize = 60;
/// The largest virtio-net header in front.
const HEADER_BYTES: usize = net_util::header::HeaderSize::MAX_BYTES;

/// Ethernet type, and the fields of the request up to its addresses: hardware Ethernet, protocol
/// IPv4, their lengths, "request reverse" (RFC 903; `ETH_P_RARP`, `ARPOP_RREQUEST` of the uapi).
const REQUEST: [u8; 10] = [0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3];

/// Sends the frames, one after the other.
#[derive(Debug)]
pub(super) struct Announcer {
    mac: [u8; 6],
    sent: u32,
    next: Instant,
}

impl Announcer {
    /// Announces `mac`, from now on.
    pub(super) fn new(mac: [u8; 6]) -> Self {
        Self {
            mac,
            sent: 0,
            next: Instant::now(),
        }
    }

    /// Time until the next frame.
    pub(super) fn timeout(&self) -> Duration {
        self.next.saturating_duration_since(Instant::now())
    }

    /// Sends the next frame, behind a header of `header` bytes, if it is time to; whether all have
    /// been sent.
    pub(super) fn announce(
        &mut self,
        backend: &dyn NetBackend,
        header: usize,
        counters: &PairCounters,
    ) -> bool {
        let now = Instant::now();
        if now < self.next {
            return false;
        }
        let (mut packet, len) = request(self.mac, header);
        let list = [libc::iovec {
            iov_base: packet.as_mut_ptr().cast(),
            iov_len: len,
        }];
        // SAFETY: the list is of `packet`, of which `len` is no more than its length.
        match unsafe { write_packet(backend, &list) } {
            Ok(_) => counters.announced(),
            // The next one may pass.
            Err(error) => tracing::debug!(%error, "an announcement was not sent"),
        }
        self.next = now + FIRST_PAUSE + STEP * self.sent;
        self.sent += 1;
        self.sent >= FRAMES
    }
}

/// The frame behind a header of `header` zeros, and the length of both.
fn request(mac: [u8; 6], header: usize) -> ([u8; HEADER_BYTES + FRAME_BYTES], usize) {
    let mut packet = [0; HEADER_BYTES + FRAME_BYTES];
    let header = header.min(HEADER_BYTES);
    let addresses = [[0xff; 6], mac];
    // Sender and target are the guest; the protocol addresses between stay zero.
    let body = [&mac[..], &[0; 4], &mac];
    let parts = addresses.concat().into_iter().chain(REQUEST);
    let all = parts.chain(body.concat());
    for (to, from) in packet.iter_mut().skip(header).zip(all) {
        *to = from;
    }
    (packet, header + FRAME_BYTES)
}
