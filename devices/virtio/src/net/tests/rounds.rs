//! Whatever the card writes to guest memory is in the next round of a migration.

use std::collections::BTreeSet;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vm_migration::memory::MemoryHandle;
use vm_migration::state::Pause;

use net_util::toeplitz::PacketHash;

use super::buffers::RxBuffers;
use super::control::hash_config;
use super::header::{ClassifierCell, Hashed, Plain, RxHeader, WITH_HASH};
use super::runtime::Hashing;
use super::*;
use crate::queue::{QueuePosition, QueueSetup};
use crate::testing::{RingLayout, Rounds, pages, snapshot, two_views};

/// Queue size at which a used ring's event word is two pages behind its index.
const LARGE: u16 = 1024;

/// The page of a queue's used index and first elements.
fn used_page(queue: u64) -> u64 {
    layout(queue).used & !0xfff
}

/// The page of a large queue's event word.
fn event_page(queue: u64) -> u64 {
    (layout(queue).used + 4 + u64::from(LARGE) * 8) & !0xfff
}

fn layout(queue: u64) -> RingLayout {
    RingLayout::at(0x10_0000 + queue * 0x4_0000, LARGE)
}

const EVENT_IDX: u64 =
    features::MRG_RXBUF | features::HASH_REPORT | features::CTRL_VQ | feature::RING_EVENT_IDX;

/// A card whose writes are told from its driver's.
fn tracked(host: &Host, features: u64) -> (Card, MemoryHandle) {
    let (ours, theirs) = two_views();
    let fabric = Arc::default();
    let net = host.net();
    let counters = net.counters();
    let mut driver = Driver::new(pci_device(net, &ours, &fabric), &theirs);
    let rings = driver.bring_up(features, &[LARGE, LARGE, 64]);
    let card = Card {
        driver,
        rings,
        fabric,
        counters,
    };
    (card, ours)
}

fn large_host() -> Host {
    let mut host = Host::new(1);
    host.options.queue_size = LARGE;
    host
}

/// Lets the card come to rest: what it does when it is paused and resumed is done, then.
fn settle(card: &mut Card) {
    card.driver.device.pause().unwrap();
}

#[test]
fn what_a_card_writes_is_sent_again() {
    let host = large_host();
    let (mut card, ours) = tracked(&host, EVENT_IDX);
    assert_eq!(card.command(2, &hash_config(0x1ff), &[2]), 0);
    // Two chains, the first of two parts, in pages of their own: 0 and 2, 4 and 5.
    let at = |page: u64| BUFFERS + page * 0x1000;
    card.rings[RX].add(&[], &[(at(0), 0x1000), (at(2), 0x800)]);
    card.rings[RX].add(&[], &[(at(4), 0x2000)]);
    card.driver.kick(0);
    settle(&mut card);
    let mut rounds = Rounds::start(&ours);
    assert_eq!(rounds.next(), pages([]));
    // A resumed card asks for kicks on the queues that are empty: their event words are written.
    card.driver.device.resume().unwrap();
    settle(&mut card);
    assert_eq!(rounds.next(), pages([event_page(1), used_page(2)]));
    let looked = pages([event_page(0), event_page(1), used_page(2)]);

    card.driver.device.resume().unwrap();
    host.send(&pattern(20 + 0x2400, 1));
    card.used(RX);
    // The driver knows of it: the whole packet is in the log, wherever the card is.
    let mut sent = rounds.next();
    for page in [at(0), at(2), at(4)] {
        assert!(sent.contains(&page), "{page:#x} of {sent:x?}");
    }
    settle(&mut card);
    sent.append(&mut rounds.next());
    let received = pages([at(0), at(2), at(4), used_page(0)]);
    assert_eq!(
        sent,
        &received | &looked,
        "the third page of four is untouched"
    );

    card.driver.device.resume().unwrap();
    card.rings[TX].add(&[(at(8), 100)], &[]);
    card.driver.kick(1);
    card.used(TX);
    settle(&mut card);
    assert_eq!(rounds.next(), &pages([used_page(1)]) | &looked, "no buffer");

    card.driver.device.resume().unwrap();
    // The answer is at 0x60_8000, the command before it.
    assert_eq!(card.command(2, &hash_config(1), &[2]), 0);
    settle(&mut card);
    assert_eq!(rounds.next(), &pages([0x60_8000]) | &looked);
    assert_eq!(rounds.next(), pages([]), "nothing comes twice");
}

#[test]
fn the_flags_of_a_queue_without_event_words_are_sent_again() {
    let host = large_host();
    let (mut card, ours) = tracked(&host, EVENT_IDX & !feature::RING_EVENT_IDX);
    card.rings[RX].add(&[], &[(BUFFERS, 20), (BUFFERS + 0x3000, 2000)]);
    card.driver.kick(0);
    settle(&mut card);
    let mut rounds = Rounds::start(&ours);
    card.driver.device.resume().unwrap();
    host.send(&[&[0; 20][..], &tcp_frame()].concat());
    card.used(RX);
    settle(&mut card);
    // They are in front of the used index.
    let queues = [used_page(0), used_page(1), used_page(2)];
    let data = pages([BUFFERS, BUFFERS + 0x3000]);
    assert_eq!(rounds.next(), &data | &pages(queues));
}

/// The fields that are written after the packet: a round may end between.
#[test]
fn the_fields_of_a_header_are_sent_again() {
    let (ours, theirs) = two_views();
    let memory = snapshot(&ours);
    let counters = NetCounters::new(1);
    let counters = counters.pair(0).unwrap();
    // num_buffers ends before the page does, the hash is at its end, the report in the next.
    let header = BUFFERS + 0xff0;
    let none = PacketHash::default();
    let finish = |with_hash: bool| {
        let mut ring = Ring::new(snapshot(&theirs), layout(0), false);
        ring.add(&[], &[(header, 1000)]);
        let setup = QueueSetup {
            size: LARGE,
            descriptors: ring.layout.descriptors,
            available: ring.layout.available,
            used: ring.layout.used,
            event_idx: false,
            indirect: false,
        };
        let mut queue = Queue::new(0, setup, QueuePosition::default(), &memory).unwrap();
        let mut buffers = RxBuffers::default();
        buffers.fill(&mut queue, &memory, 100, 1, true).unwrap();
        let mut rounds = Rounds::start(&ours);
        if with_hash {
            let cell = ClassifierCell::new(&Hashing::default(), 1);
            let mut header = Hashed::<WITH_HASH, false>::new(Arc::new(cell));
            header.finish(&memory, &buffers, 1, none, counters).unwrap();
        } else {
            Plain.finish(&memory, &buffers, 1, none, counters).unwrap();
        }
        rounds.next()
    };
    assert_eq!(finish(false), pages([BUFFERS]));
    assert_eq!(finish(true), pages([BUFFERS, BUFFERS + 0x1000]));
}

/// A host's end at which a round ends whenever the card is about to read a packet.
struct Gate {
    end: OwnedFd,
    rounds: Mutex<Option<Rounds>>,
    /// Those rounds, and whether a packet was waiting to be read.
    seen: Mutex<Vec<(bool, BTreeSet<u64>)>>,
}

impl AsFd for Gate {
    fn as_fd(&self) -> BorrowedFd<'_> {
        if let Some(rounds) = self.rounds.lock().as_mut() {
            let mut ends = [PollFd::new(&self.end, PollFlags::IN)];
            let waiting = poll(&mut ends, Some(&Timespec::default())) == Ok(1);
            self.seen.lock().push((waiting, rounds.next()));
        }
        self.end.as_fd()
    }
}

impl NetBackend for Gate {
    fn set_header(&self, _size: HeaderSize) -> io::Result<()> {
        Ok(())
    }

    fn set_offloads(&self, _offloads: Offloads) -> io::Result<()> {
        Ok(())
    }

    fn set_attached(&self, _attached: bool) -> io::Result<()> {
        Ok(())
    }

    fn set_kernel_hash(&self, _abi: HashAbi, _hash: Option<&KernelHash<'_>>) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

#[test]
fn a_packet_is_logged_when_it_is_there_and_not_before() {
    let host = large_host();
    let gate = Arc::new(Gate {
        end: host.ends[0].try_clone().unwrap(),
        rounds: Mutex::default(),
        seen: Mutex::default(),
    });
    let (ours, theirs) = two_views();
    let net = Net::new(host.options.clone(), vec![Arc::clone(&gate) as _]).unwrap();
    let mut driver = Driver::new(pci_device(net, &ours, &Arc::default()), &theirs);
    let mut rings = driver.bring_up(features::MRG_RXBUF, &[LARGE, LARGE]);
    driver.device.pause().unwrap();
    let data = [0, 1, 4].map(|page| BUFFERS + page * 0x1000);
    rings[RX].add(&[], &[(data[0], 0x2000)]);
    rings[RX].add(&[], &[(data[2], 0x1000)]);
    host.send(&pattern(12 + 0x2800, 3));
    *gate.rounds.lock() = Some(Rounds::start(&ours));
    driver.device.resume().unwrap();
    wait_for("used chains", || rings[RX].used_index() == 2);
    driver.device.pause().unwrap();
    let mut last = gate.rounds.lock().take().unwrap();
    let mut after = last.next();
    let mut before = BTreeSet::new();
    for (waiting, mut round) in std::mem::take(&mut *gate.seen.lock()) {
        let set = if waiting { &mut before } else { &mut after };
        set.append(&mut round);
    }
    // A page that is in a round which ended before the read would not have been sent again.
    for page in data {
        assert!(!before.contains(&page), "{page:#x} of {before:x?}");
        assert!(after.contains(&page), "{page:#x} of {after:x?}");
    }
}
