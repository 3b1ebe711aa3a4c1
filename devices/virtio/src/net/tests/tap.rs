//! The same on a real tap. A raw packet socket is the host's network stack.

use std::num::NonZeroU16;
use std::os::fd::{AsRawFd, FromRawFd};

use net_util::tap::{HashAbi, Tap, TapName, TapQueue};
use vm_migration::state::{Pause, SaveRestore};

use super::control::hash_config;
use super::rss::{Guest, MQ, TYPES, datagram, hash_of, queue_of, rss_config};
use super::*;

/// A socket that sends and receives whole frames on the interface `name`.
fn packet_socket(name: &str) -> File {
    let name = std::ffi::CString::new(name).unwrap();
    let all = 3_u16.to_be();
    // SAFETY: plain calls; `name` is a terminated string and `address` a whole sockaddr_ll.
    unsafe {
        let fd = libc::socket(
            libc::AF_PACKET,
            libc::SOCK_RAW | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC,
            i32::from(all),
        );
        assert!(fd >= 0);
        let file = File::from_raw_fd(fd);
        let mut address: libc::sockaddr_ll = std::mem::zeroed();
        address.sll_family = u16::try_from(libc::AF_PACKET).unwrap();
        address.sll_protocol = all;
        address.sll_ifindex = i32::try_from(libc::if_nametoindex(name.as_ptr())).unwrap();
        let len = u32::try_from(size_of_val(&address)).unwrap();
        assert_eq!(
            libc::bind(file.as_raw_fd(), (&raw const address).cast(), len),
            0
        );
        file
    }
}

/// A tap of `queues` queues that is up, or why there is none.
fn tap(name: &str, queues: u16) -> Result<Tap, String> {
    let name = TapName::new(name).map_err(|error| error.to_string())?;
    let queues = NonZeroU16::new(queues).unwrap();
    let tap = Tap::open(&name, queues).map_err(|error| error.to_string())?;
    tap.set_up().map_err(|error| error.to_string())?;
    Ok(tap)
}

fn backends(tap: Tap) -> Vec<Arc<dyn NetBackend>> {
    tap.into_queues()
        .into_iter()
        .map(|queue| Arc::new(queue) as Arc<dyn NetBackend>)
        .collect()
}

fn options() -> NetOptions {
    NetOptions {
        mtu: None,
        ..Host::new(1).options
    }
}

/// A frame the host's own stack does not mix up with others.
fn marked(mut frame: Vec<u8>, mark: u8) -> Vec<u8> {
    frame[..6].copy_from_slice(&MAC);
    frame[6..12].copy_from_slice(&[2, 0, 0, 0, 9, mark]);
    frame
}

/// Waits for the received packet with `mark`, past others the host sends by itself; the buffer.
fn received(card: &mut Card, next: &mut u64, header: usize, mark: u8) -> u64 {
    loop {
        card.used(RX);
        let buffer = *next;
        *next += 1;
        if card.buffer(buffer, header + 12)[header + 6..] == [2, 0, 0, 0, 9, mark] {
            return buffer;
        }
    }
}

fn read_marked(socket: &File, mark: u8) -> Vec<u8> {
    let mut packet = vec![0; 2000];
    let mut len = 0;
    wait_for("frame on the host", || {
        len = (&mut &*socket).read(&mut packet).unwrap_or(0);
        len > 12 && packet[11] == mark && packet[6] == 2
    });
    packet.truncate(len);
    packet
}

#[test]
fn frames_pass_both_ways_with_and_without_hash() {
    let tap = match tap("ferryvt0", 1) {
        Ok(tap) => tap,
        Err(reason) => {
            println!("SKIP: frames_pass_both_ways_with_and_without_hash: {reason}");
            return;
        }
    };
    let socket = packet_socket("ferryvt0");
    let mut shared = backends(tap);
    let other = || Net::new(options(), shared.clone()).unwrap();
    let common = features::CTRL_VQ | features::MRG_RXBUF | feature::RING_EVENT_IDX;
    for (features, header) in [(common, 12), (common | features::HASH_REPORT, 20)] {
        let mut card = card_of(other(), features, &[256, 256, 16]);
        for index in 0..100 {
            card.post(index, 1526);
        }
        if header == 20 {
            assert_eq!(card.command(2, &hash_config(0x1ff), &[2]), 0);
        }
        let mut next = 0;
        (&socket).write_all(&marked(tcp_frame(), 1)).unwrap();
        let buffer = received(&mut card, &mut next, header, 1);
        let bytes = card.buffer(buffer, header + 54);
        assert_eq!(bytes[header..], marked(tcp_frame(), 1));
        assert_eq!(bytes[..12], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
        if header == 20 {
            assert_eq!(bytes[12..20], [0x78, 0xc1, 0xcc, 0x51, 2, 0, 0, 0]);
        }
        // And out: the header's length is the same there.
        let mut packet = vec![0; header];
        packet.extend(marked(tcp_frame(), 2));
        let at = BUFFERS + 0x40_0000;
        card.put(at, &packet);
        let len = u32::try_from(packet.len()).unwrap();
        card.rings[TX].add(&[(at, len)], &[]);
        card.driver.kick(1);
        card.used(TX);
        assert_eq!(read_marked(&socket, 2), marked(tcp_frame(), 2));
        assert_eq!(card.counters.totals().tx_dropped, 0);

        // Moved to another device on the same tap, frames still pass.
        card.driver.device.pause().unwrap();
        let state = card.driver.device.save().unwrap();
        let mut device = pci_device(other(), &card.driver.memory, &Arc::default());
        device.pause().unwrap();
        device.restore(&state).unwrap();
        device.resume().unwrap();
        card.driver.device = device;
        (&socket).write_all(&marked(tcp_frame(), 3)).unwrap();
        let buffer = received(&mut card, &mut next, header, 3);
        assert_eq!(
            card.buffer(buffer, header + 54)[header..],
            marked(tcp_frame(), 3)
        );
    }
    shared.clear();
}

#[test]
fn queues_are_detached_and_attached_again() {
    let tap = match tap("ferryvt1", 2) {
        Ok(tap) => tap,
        Err(reason) => {
            println!("SKIP: queues_are_detached_and_attached_again: {reason}");
            return;
        }
    };
    let socket = packet_socket("ferryvt1");
    let net = Net::new(options(), backends(tap)).unwrap();
    let features = features::CTRL_VQ | features::MQ | features::MRG_RXBUF;
    let mut card = card_of(net, features, &[64, 64, 64, 64, 16]);
    for index in 0..32 {
        card.rings[2].add(&[], &[(BUFFERS + 0x10_0000 + index * STRIDE, 1526)]);
        card.post(index, 1526);
    }
    card.driver.kick(2);
    for _ in 0..3 {
        // Many flows: the kernel spreads them over the queues that are attached.
        let flow = |port: u16| {
            let mut frame = marked(tcp_frame(), 1);
            frame[34..36].copy_from_slice(&port.to_be_bytes());
            (&socket).write_all(&frame).unwrap();
        };
        assert_eq!(card.command(4, &[4, 0, 1, 0], &[]), 0);
        let second = card.rings[2].used_index();
        (0..100).for_each(flow);
        wait_for("frames on the first queue", || {
            while card.rings[RX].pop_used().is_some() {
                card.rings[RX].add(&[], &[(BUFFERS, 1526)]);
            }
            card.driver.kick(0);
            card.counters.totals().rx_packets >= 100
        });
        assert_eq!(card.rings[2].used_index(), second);
        assert_eq!(card.command(4, &[4, 0, 2, 0], &[]), 0);
        let mut port = 1000_u16;
        wait_for("frame on the second queue", || {
            port += 1;
            flow(port);
            while card.rings[RX].pop_used().is_some() {
                card.rings[RX].add(&[], &[(BUFFERS, 1526)]);
            }
            card.driver.kick(0);
            std::thread::sleep(std::time::Duration::from_millis(1));
            card.rings[2].used_index() != second
        });
        while card.rings[2].pop_used().is_some() {
            card.rings[2].add(&[], &[(BUFFERS + 0x10_0000, 1526)]);
        }
        card.driver.kick(2);
    }
}

/// Sends datagrams of 64 flows by each of several tables to a card of four pairs, each of which has
/// to come to the queue that the table names.
fn tables_hold(
    name: &str,
    help: impl FnOnce(Arc<TapQueue>) -> Option<KernelHelp>,
) -> Result<NetTotals, String> {
    let queues: Vec<_> = tap(name, 4)?
        .into_queues()
        .into_iter()
        .map(Arc::new)
        .collect();
    let first = Arc::clone(&queues[0]);
    let backends = queues.into_iter().map(|queue| queue as Arc<dyn NetBackend>);
    let socket = packet_socket(name);
    let rss = NetOptions {
        rss: true,
        ..options()
    };
    let mut net = Net::new(rss, backends.collect()).unwrap();
    if let Some(help) = help(first) {
        net = net.with_kernel_help(help);
    }
    let watch = net.offload();
    let mut guest = Guest::of(4, net, MQ | features::HASH_REPORT);
    guest.post_all(48);
    for table in [[3, 1, 0, 2], [0, 0, 0, 0], [1, 1, 2, 2]] {
        assert_eq!(guest.command(&rss_config(TYPES, &table, 3, 4)), 0);
        for flow in 0..64 {
            let queue = queue_of(flow, &table);
            (&socket).write_all(&datagram(flow, 7, 100)).unwrap();
            // Past others that the host sends by itself.
            let packet = loop {
                let packet = guest.wait_packet(queue);
                guest.post(queue, 1);
                if packet[32..34] == [8, 0] && packet[46..50] == [10, 0, 0, 1] {
                    break packet;
                }
            };
            let seen = guest.read(&packet);
            assert_eq!(
                (seen.flow, seen.hash, seen.report),
                (flow, hash_of(flow), 3)
            );
        }
    }
    println!("{:?}", watch.status());
    let totals = guest.card.counters.totals();
    assert_eq!((totals.rx_dropped, totals.rx_hand_over_dropped), (0, 0));
    Ok(totals)
}

#[test]
fn tables_hold_whatever_the_kernel_chooses() {
    match tables_hold("ferryvt2", |_| None) {
        Ok(totals) => assert!(totals.rx_handed_over > 0, "the kernel knows no table"),
        Err(reason) => println!("SKIP: tables_hold_whatever_the_kernel_chooses: {reason}"),
    }
}

#[test]
fn a_program_spares_workers_the_hand_over() {
    let test = "a_program_spares_workers_the_hand_over";
    // Loaded once before, to tell whether it may be.
    if let Err(error) = net_util::steering::SteeringProgram::load() {
        println!("SKIP: {test}: {error}");
        return;
    }
    let help = |queue| {
        Some(KernelHelp {
            abi: HashAbi::None,
            steering: Ok(Box::new(TapSteering::load(queue).unwrap())),
            on_mistrust: Box::new(|_| {}),
        })
    };
    match tables_hold("ferryvt3", help) {
        // What the host sends by itself may come before the first table.
        Ok(totals) => assert!(totals.rx_handed_over < 10, "{totals:?}"),
        Err(reason) => println!("SKIP: {test}: {reason}"),
    }
}
