//! What the tap's kernel does for a card, and that it is not believed blindly.

use std::time::Duration;

use net_util::ctrl::RssConfig;

use super::rss::{Guest, MQ, TYPES, datagram, flow_to, hash_of, rss_config, rss_host};
use super::*;

/// What the kernel of these tests hashes: all but the types of extension headers.
const KERNEL: u32 = 0x3f;

/// A program that notes what it is told, or cannot steer.
struct Program {
    calls: Arc<Mutex<Vec<Call>>>,
    works: bool,
}

impl QueueSteering for Program {
    fn steer(&mut self, table: Option<&RssConfig>) -> io::Result<()> {
        let call = table.map_or(Call::NoProgram, |table| {
            Call::Program(table.table().to_vec())
        });
        self.calls.lock().push(call);
        if self.works {
            Ok(())
        } else {
            Err(io::Error::other("the program was not attached"))
        }
    }
}

/// A host whose kernel helps: it hashes if `hashes`, and has a program that steers if `program`
/// (which works or not).
struct Helpful {
    host: Host,
    told: Arc<Mutex<Vec<String>>>,
    hashes: bool,
    program: Option<bool>,
}

impl Helpful {
    fn new(hashes: bool, program: Option<bool>) -> Self {
        Self {
            host: rss_host(2),
            told: Arc::default(),
            hashes,
            program,
        }
    }

    fn guest(&self, features: u64) -> (Guest, OffloadWatch) {
        let told = Arc::clone(&self.told);
        let types = HashTypes::from_bits(KERNEL);
        let steering = match self.program {
            None => Err("no program: bpf(2) is forbidden".to_owned()),
            Some(works) => Ok(Box::new(Program {
                calls: Arc::clone(&self.host.calls),
                works,
            }) as Box<dyn QueueSteering>),
        };
        let help = KernelHelp {
            abi: if self.hashes {
                HashAbi::V12 { types }
            } else {
                HashAbi::None
            },
            steering,
            on_mistrust: Box::new(move |why| told.lock().push(why.to_owned())),
        };
        let net = self.host.net().with_kernel_help(help);
        let watch = net.offload();
        (Guest::of(2, net, features), watch)
    }

    /// What was asked of the kernel since last looked, but for attaching and header sizes.
    fn asked(&self) -> Vec<Call> {
        let kernel = |call: &Call| {
            matches!(
                call,
                Call::Hash(..) | Call::NoHash | Call::Program(_) | Call::NoProgram
            )
        };
        let calls = std::mem::take(&mut *self.host.calls.lock());
        calls.into_iter().filter(kernel).collect()
    }

    /// Sends a datagram of `flow` for which the kernel reports `hash` as `report`, from the queue
    /// `pair` of the tap.
    fn send(&self, pair: usize, flow: u16, hash: (u32, u16)) {
        let packet = reported(flow, hash);
        (&self.host.peers[pair]).write_all(&packet).unwrap();
    }
}

/// A datagram of `flow` for which the kernel reports `hash` as `report`.
fn reported(flow: u16, (hash, report): (u32, u16)) -> Vec<u8> {
    let mut packet = vec![0; 20];
    packet[12..16].copy_from_slice(&hash.to_le_bytes());
    packet[16..18].copy_from_slice(&report.to_le_bytes());
    packet.extend(datagram(flow, 0, 60));
    packet
}

/// Has packets from before a change of settings come to an end.
fn settle(helpful: &Helpful, guest: &mut Guest, flow: u16, queue: u16) {
    for _ in 0..2 {
        std::thread::sleep(Duration::from_millis(30));
        helpful.send(usize::from(queue), flow, (hash_of(flow), 3));
        let packet = guest.wait_packet(queue);
        assert_eq!(guest.read(&packet).hash, hash_of(flow));
    }
    std::thread::sleep(Duration::from_millis(5));
}

#[test]
fn a_kernel_that_hashes_is_used_until_it_is_wrong() {
    let table = [0, 1];
    let helpful = Helpful::new(true, Some(true));
    let (mut guest, watch) = helpful.guest(MQ | features::HASH_REPORT);
    assert_eq!(helpful.asked(), [], "nothing before there is a table");
    assert!(watch.status().why.contains("has not set a table"));
    assert_eq!(guest.command(&rss_config(TYPES, &table, 1, 2)), 0);
    let calls = helpful.host.calls.lock().clone();
    let hash = Call::Hash(true, TYPES, 0x6d, table.to_vec(), 1, 2);
    assert_eq!(calls, [Call::Attach(1, true), hash.clone()]);
    helpful.asked();
    let expected = OffloadStatus {
        hashes: HashedBy::Kernel,
        steering: SteeredBy::Kernel,
        why: String::new(),
    };
    assert_eq!(watch.status(), expected);
    guest.post_all(32);
    let flow = flow_to(1, &table);
    // The tap may have such a packet from before: it is hashed here, and no reproach.
    helpful.send(1, flow, (0xdead, 3));
    let packet = guest.wait_packet(1);
    assert_eq!(guest.read(&packet).hash, hash_of(flow));
    settle(&helpful, &mut guest, flow, 1);
    assert_eq!(watch.status(), expected);
    // A packet on the wrong queue is still put right.
    helpful.send(0, flow, (hash_of(flow), 3));
    guest.wait_packet(1);
    assert_eq!(*helpful.told.lock(), Vec::<String>::new());
    helpful.send(1, flow, (0xdead, 3));
    let packet = guest.wait_packet(1);
    let seen = guest.read(&packet);
    assert_eq!((seen.hash, seen.report), (hash_of(flow), 3), "ours");
    let told = helpful.told.lock().clone();
    assert_eq!(told.len(), 1, "{told:?}");
    assert!(told[0].contains("0x0000dead"), "{told:?}");
    assert_eq!(watch.status().hashes, HashedBy::Software);
    // From the next table on the kernel only steers, by the program.
    assert_eq!(guest.command(&rss_config(TYPES, &[1, 0], 1, 2)), 0);
    assert_eq!(helpful.asked(), [Call::NoHash, Call::Program(vec![1, 0])]);
    let status = watch.status();
    assert_eq!(status.steering, SteeredBy::Program);
    assert!(status.why.contains("wrong hashes"), "{status:?}");
    // It gets another chance after a reset.
    guest.card.driver.write8(20, 0);
    guest.bring_up(MQ | features::HASH_REPORT);
    assert_eq!(helpful.asked(), [Call::NoProgram]);
    assert_eq!(guest.command(&rss_config(TYPES, &table, 1, 2)), 0);
    assert_eq!(helpful.asked(), [hash]);
    assert_eq!(watch.status(), expected);
}

#[test]
fn a_kernel_is_asked_only_for_what_it_can() {
    // Types that it has not: the program steers.
    let helpful = Helpful::new(true, Some(true));
    let (mut guest, watch) = helpful.guest(MQ | features::HASH_REPORT);
    assert_eq!(guest.command(&rss_config(0x1ff, &[0, 1], 0, 2)), 0);
    assert_eq!(helpful.asked(), [Call::Program(vec![0, 1])]);
    let status = watch.status();
    assert_eq!(
        (status.hashes, status.steering),
        (HashedBy::Software, SteeredBy::Program)
    );
    assert!(status.why.contains("not all of"), "{status:?}");
    assert_eq!(guest.command(&rss_config(0x1ff, &[1, 1], 0, 2)), 0);
    assert_eq!(helpful.asked(), [Call::Program(vec![1, 1])], "in one step");
    // Those it has: it does all; and the tap is let alone when there is no table.
    assert_eq!(guest.command(&rss_config(7, &[0, 1], 0, 2)), 0);
    assert_eq!(
        helpful.asked(),
        [Call::NoProgram, Call::Hash(true, 7, 0x6d, vec![0, 1], 0, 2)]
    );
    assert_eq!(guest.command(&[4, 0, 2, 0]), 0);
    assert_eq!(helpful.asked(), [Call::NoHash]);
    assert_eq!(watch.status().steering, SteeredBy::Tap);

    // Without reports it steers all the same.
    let helpful = Helpful::new(true, None);
    let (mut guest, watch) = helpful.guest(MQ);
    assert_eq!(guest.command(&rss_config(7, &[0, 1], 0, 2)), 0);
    assert_eq!(
        helpful.asked(),
        [Call::Hash(false, 7, 0x6d, vec![0, 1], 0, 2)]
    );
    assert_eq!(watch.status().hashes, HashedBy::Software);

    // No help at all, with all reasons.
    let helpful = Helpful::new(false, Some(false));
    let (mut guest, watch) = helpful.guest(MQ);
    assert_eq!(guest.command(&rss_config(7, &[0, 1], 0, 2)), 0);
    let status = watch.status();
    assert_eq!(status.steering, SteeredBy::Tap);
    for part in ["taps cannot hash", "not attached"] {
        assert!(status.why.contains(part), "{status:?}");
    }
    let helpful = Helpful::new(false, None);
    let (mut guest, watch) = helpful.guest(MQ);
    assert_eq!(guest.command(&rss_config(7, &[0, 1], 0, 2)), 0);
    assert_eq!(helpful.asked(), []);
    assert!(watch.status().why.contains("bpf(2)"));
    guest.post_all(4);
    let flow = flow_to(1, &[0, 1]);
    (&helpful.host.peers[0])
        .write_all(&[&[0; 12][..], &datagram(flow, 3, 40)].concat())
        .unwrap();
    let packet = guest.wait_packet(1);
    assert_eq!(guest.read(&packet).number, 3);
}

#[test]
fn the_kernel_is_asked_again_when_the_card_goes_on() {
    use vm_migration::state::Pause;
    let helpful = Helpful::new(true, None);
    let (mut guest, _) = helpful.guest(MQ | features::HASH_REPORT);
    assert_eq!(guest.command(&rss_config(5, &[1, 0], 0, 2)), 0);
    helpful.asked();
    guest.card.driver.device.pause().unwrap();
    guest.card.driver.device.resume().unwrap();
    let hash = Call::Hash(true, 5, 0x6d, vec![1, 0], 0, 2);
    assert_eq!(helpful.asked(), [Call::NoHash, hash]);
}

#[test]
fn hashes_by_settings_that_workers_do_not_know_yet_are_no_reproach() {
    let helpful = Helpful::new(true, None);
    let (mut guest, watch) = helpful.guest(MQ | features::HASH_REPORT);
    let table = [0, 1];
    assert_eq!(guest.command(&rss_config(TYPES, &table, 1, 2)), 0);
    guest.post_all(16);
    let flow = flow_to(1, &table);
    settle(&helpful, &mut guest, flow, 1);
    // Told of a new key, the kernel hashes the next packet by it at once.
    let counters = Arc::clone(&guest.card.counters);
    let peer = helpful.host.peers[1].try_clone().unwrap();
    let hook = move || {
        let before = counters.totals().rx_packets;
        (&peer).write_all(&reported(flow, (0xbeef, 3))).unwrap();
        wait_for("packet", || counters.totals().rx_packets > before);
    };
    *helpful.host.hook.lock() = Some(Box::new(hook));
    let mut other_key = rss_config(TYPES, &table, 1, 2);
    *other_key.last_mut().unwrap() ^= 1;
    assert_eq!(guest.command(&other_key), 0);
    let packet = guest.wait_packet(1);
    assert_eq!(guest.read(&packet).hash, hash_of(flow));
    assert_eq!(*helpful.told.lock(), Vec::<String>::new());
    assert_eq!(watch.status().hashes, HashedBy::Kernel);
}
