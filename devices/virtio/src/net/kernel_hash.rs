//! Hash reports that the tap's kernel wrote, and whether they are believed.
//!
//! The patches that let a kernel report hashes have known defects, so its reports are believed only
//! where they cannot be wrong unnoticed:
//!
//! - Only a report for TCP or UDP of a packet in which that is what follows the IP header at once.
//!   So a kernel that looks into tunnels, or has another notion of fragments or extension headers,
//!   does no harm: those packets are hashed here.
//! - Of each type, the first [`FIRST`] packets of a worker, and then one in [`EVERY`], are hashed
//!   here too. One difference, and until the card is reset all are.
//! - After a change of key, types or table, packets that the tap has from before are hashed here.
//!
//! In a packet's header the guest could change a report before it is read: it deceives itself.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use net_util::hash::HashReport;
use net_util::header::HeaderV1Hash;
use net_util::toeplitz::PacketHash;
use parking_lot::Mutex;
use zerocopy::FromBytes;

use super::offload::{HashedBy, OffloadStatus, OnMistrust};

/// Packets of each type that a worker checks first.
pub(super) const FIRST: u8 = 64;
/// After those, one packet in so many is checked.
pub(super) const EVERY: u16 = 256;
/// For how long after the tap was found empty packets may still come that the kernel hashed by
/// older settings: one is on its way through the kernel for some microseconds.
const SETTLING: Duration = Duration::from_millis(20);

/// Number of reports, "none" included.
const REPORTS: usize = HashReport::ALL.len();

/// What a card knows of its kernel's help, for all its threads.
pub(super) struct Trust {
    mistrusted: AtomicBool,
    on_mistrust: Mutex<Option<OnMistrust>>,
    status: Mutex<OffloadStatus>,
}

impl fmt::Debug for Trust {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_struct("Trust")
            .field("mistrusted", &self.mistrusted)
            .field("status", &self.status)
            .finish_non_exhaustive()
    }
}

impl Default for Trust {
    fn default() -> Self {
        Self {
            mistrusted: AtomicBool::new(false),
            on_mistrust: Mutex::new(None),
            status: Mutex::new(OffloadStatus {
                why: "the kernel is not asked".to_owned(),
                ..OffloadStatus::default()
            }),
        }
    }
}

impl Trust {
    /// Tells `on_mistrust` from now on.
    pub(super) fn tell(&self, on_mistrust: OnMistrust) {
        *self.on_mistrust.lock() = Some(on_mistrust);
    }

    /// Whether the kernel has not been wrong.
    pub(super) fn is_whole(&self) -> bool {
        !self.mistrusted.load(Ordering::Relaxed)
    }

    /// The kernel was wrong; `why` is asked for by the first who finds out.
    fn breaks(&self, why: impl FnOnce() -> String) {
        if self.mistrusted.swap(true, Ordering::Relaxed) {
            return;
        }
        let why = why();
        tracing::warn!(why, "the kernel's hash reports are not used any more");
        {
            let mut status = self.status.lock();
            status.hashes = HashedBy::Software;
            status.why.clone_from(&why);
        }
        if let Some(tell) = self.on_mistrust.lock().as_ref() {
            tell(&why);
        }
    }

    /// The card is reset: the kernel gets another chance.
    pub(super) fn heal(&self) {
        self.mistrusted.store(false, Ordering::Relaxed);
    }

    /// What the kernel does.
    pub(super) fn status(&self) -> OffloadStatus {
        self.status.lock().clone()
    }

    /// The kernel does this now.
    pub(super) fn set_status(&self, status: OffloadStatus) {
        *self.status.lock() = status;
    }
}

/// One worker's checks.
#[derive(Clone, Copy, Debug)]
pub(super) struct Checks {
    /// The settings changed then, and packets from before may still come.
    changed: Option<Instant>,
    /// The tap was empty since.
    drained: bool,
    /// How many of each type are still to be checked.
    left: [u8; REPORTS],
    /// Counts those believed.
    believed: u16,
}

impl Checks {
    /// The settings have just changed.
    pub(super) fn new() -> Self {
        Self {
            changed: Some(Instant::now()),
            drained: false,
            left: [FIRST; REPORTS],
            believed: 0,
        }
    }

    /// There was no packet in the tap, after the settings changed.
    pub(super) fn drained(&mut self) {
        self.drained = true;
    }

    fn settled(&mut self) -> bool {
        if let Some(changed) = self.changed {
            if !self.drained || changed.elapsed() < SETTLING {
                return false;
            }
            self.changed = None;
        }
        true
    }

    /// Whether the next packet with this report is to be checked.
    fn is_due(&mut self, report: u16) -> bool {
        match self.left.get_mut(usize::from(report)) {
            Some(0) => {}
            Some(left) => {
                *left -= 1;
                return true;
            }
            None => return true,
        }
        self.believed = self.believed.wrapping_add(1);
        self.believed.is_multiple_of(EVERY)
    }

    /// The hash of a packet: the one that `told` says, or, unless that is to be believed, `own`.
    pub(super) fn hash(
        &mut self,
        told: Told,
        frame: &[u8],
        trust: &Trust,
        own: impl FnOnce() -> PacketHash,
    ) -> PacketHash {
        if !trust.is_whole() || !self.settled() {
            return own();
        }
        let due = self.is_due(told.report);
        match plain_report(frame) {
            Some(report) if report.code() == told.report && !due => PacketHash {
                value: told.value,
                report,
            },
            _ if !due => own(),
            _ => {
                let own = own();
                if (own.value, own.report.code()) != (told.value, told.report) {
                    trust.breaks(|| mismatch(told, own));
                }
                own
            }
        }
    }
}

fn mismatch(told: Told, own: PacketHash) -> String {
    format!(
        "the kernel reported hash {:#010x} with report {} for a packet whose hash is {:#010x} with \
         report {}",
        told.value,
        told.report,
        own.value,
        own.report.code()
    )
}

/// What the kernel wrote into a packet's header.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Told {
    value: u32,
    report: u16,
}

impl Told {
    /// Reads it from a header; `None` if that has no room for it.
    pub(super) fn read(header: &[u8]) -> Option<Self> {
        let (header, _) = HeaderV1Hash::ref_from_prefix(header).ok()?;
        Some(Self {
            value: header.hash_value.get(),
            report: header.hash_report.get(),
        })
    }
}

/// The report of a frame in which TCP or UDP follows the IP header at once, with all types on.
fn plain_report(frame: &[u8]) -> Option<HashReport> {
    let ip = frame.get(14..)?;
    let protocol = match *frame.get(12..14)? {
        [0x08, 0x00] => {
            // Neither a fragment nor followed by one: of these bits only "do not fragment" is on.
            let [flags, offset] = *ip.get(6..8)? else {
                return None;
            };
            let whole = flags & 0x3f == 0 && offset == 0;
            (whole.then_some(*ip.get(9)?)?, false)
        }
        [0x86, 0xdd] => (*ip.get(6)?, true),
        _ => return None,
    };
    match protocol {
        (6, false) => Some(HashReport::TcpV4),
        (17, false) => Some(HashReport::UdpV4),
        (6, true) => Some(HashReport::TcpV6),
        (17, true) => Some(HashReport::UdpV6),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Checks that are past the settling.
    fn settled() -> Checks {
        Checks {
            changed: None,
            ..Checks::new()
        }
    }

    fn frame(ether_type: [u8; 2], protocol: u8) -> Vec<u8> {
        let mut frame = vec![0; 74];
        frame[12..14].copy_from_slice(&ether_type);
        frame[14] = 0x45;
        frame[if ether_type == [8, 0] { 23 } else { 20 }] = protocol;
        frame
    }

    const TOLD: Told = Told {
        value: 7,
        report: 2,
    };
    const RIGHT: PacketHash = PacketHash {
        value: 7,
        report: HashReport::TcpV4,
    };

    #[test]
    fn the_first_of_a_type_are_checked_and_then_some() {
        let (mut checks, trust) = (settled(), Trust::default());
        let tcp = frame([8, 0], 6);
        let mut checked = 0;
        for _ in 0..u32::from(FIRST) + 3 * u32::from(EVERY) {
            let hash = checks.hash(TOLD, &tcp, &trust, || {
                checked += 1;
                RIGHT
            });
            assert_eq!(hash, RIGHT);
        }
        assert_eq!(checked, u32::from(FIRST) + 3);
        // Another type begins anew.
        let udp = Told { report: 3, ..TOLD };
        let right = PacketHash {
            report: HashReport::UdpV4,
            ..RIGHT
        };
        let mut asked = false;
        checks.hash(udp, &frame([8, 0], 17), &trust, || {
            asked = true;
            right
        });
        assert!(asked && trust.is_whole());
    }

    #[test]
    fn one_difference_ends_it_and_is_told_once() {
        let told: std::sync::Arc<Mutex<Vec<String>>> = std::sync::Arc::default();
        let (mut checks, trust) = (settled(), Trust::default());
        let heard = std::sync::Arc::clone(&told);
        trust.tell(Box::new(move |why| heard.lock().push(why.to_owned())));
        trust.set_status(OffloadStatus {
            hashes: HashedBy::Kernel,
            ..OffloadStatus::default()
        });
        let other = PacketHash { value: 8, ..RIGHT };
        for _ in 0..3 {
            let hash = checks.hash(TOLD, &frame([8, 0], 6), &trust, || other);
            assert_eq!(hash, other, "ours holds");
        }
        assert!(!trust.is_whole());
        let told = told.lock().clone();
        assert_eq!(told.len(), 1);
        assert!(told[0].contains("0x00000007"), "{told:?}");
        let status = trust.status();
        assert_eq!((status.hashes, &status.why), (HashedBy::Software, &told[0]));
        trust.heal();
        assert!(trust.is_whole());
    }

    #[test]
    fn a_report_that_is_missing_is_a_difference_too() {
        let (mut checks, trust) = (settled(), Trust::default());
        let none = Told {
            value: 0,
            report: 0,
        };
        checks.hash(none, &frame([8, 0], 6), &trust, || RIGHT);
        assert!(!trust.is_whole());
    }

    #[test]
    fn only_plain_packets_are_believed() {
        let (mut checks, trust) = (settled(), Trust::default());
        checks.left = [0; REPORTS];
        let mut fragment = frame([8, 0], 6);
        fragment[20] = 0x20;
        let mut later = frame([8, 0], 6);
        later[21] = 1;
        let mut whole = frame([8, 0], 6);
        whole[20] = 0x40;
        let v6 = frame([0x86, 0xdd], 6);
        for (frame, report, believed) in [
            (&whole, 2, true),
            (&v6, 5, true),
            (&frame([8, 0], 47), 2, false),
            (&fragment, 2, false),
            (&later, 2, false),
            (&frame([0x86, 0xdd], 43), 5, false),
            (&frame([8, 0], 6), 1, false),
            (&frame([0x81, 0], 6), 2, false),
            (&vec![0; 20], 2, false),
        ] {
            let told = Told { value: 9, report };
            let hash = checks.hash(told, frame, &trust, || RIGHT);
            assert_eq!(hash.value, if believed { 9 } else { 7 }, "{frame:x?}");
        }
    }

    #[test]
    fn packets_from_before_a_change_are_hashed_here() {
        let (mut checks, trust) = (Checks::new(), Trust::default());
        let tcp = frame([8, 0], 6);
        let old = Told { value: 1, ..TOLD };
        assert_eq!(checks.hash(old, &tcp, &trust, || RIGHT), RIGHT);
        checks.drained();
        assert_eq!(checks.hash(old, &tcp, &trust, || RIGHT), RIGHT);
        std::thread::sleep(SETTLING);
        assert_eq!(checks.hash(TOLD, &tcp, &trust, || RIGHT), RIGHT);
        assert!(trust.is_whole(), "no difference counted");
        checks.hash(old, &tcp, &trust, || RIGHT);
        assert!(!trust.is_whole());
    }

    #[test]
    fn what_the_kernel_told_is_at_the_headers_end() {
        let mut header = [0xff; 20];
        header[12..].copy_from_slice(&[0x78, 0x56, 0x34, 0x12, 6, 0, 0, 0]);
        let told = Told::read(&header).unwrap();
        assert_eq!((told.value, told.report), (0x1234_5678, 6));
        assert_eq!(Told::read(&header[..12]), None);
    }
}
