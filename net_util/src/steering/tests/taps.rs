//! Real taps: packets come out at the queue that the table names.

use std::io::Read;
use std::num::NonZeroU16;
use std::os::fd::OwnedFd;
use std::process::Command;
use std::time::{Duration, Instant};

use super::*;
use crate::header::HeaderSize;
use crate::tap::tests::{in_namespace, name};
use crate::tap::{Offloads, Tap};

const QUEUES: u16 = 4;

/// A tap that is up.
fn tap() -> Tap {
    let tap = Tap::open(&name("t0"), NonZeroU16::new(QUEUES).unwrap()).unwrap();
    let first = &tap.queues()[0];
    first.set_header_size(HeaderSize::V1Hash).unwrap();
    first.set_offloads(Offloads::NONE).unwrap();
    tap.set_up().unwrap();
    tap
}

/// Sends frames out of an interface as they are.
struct Sender {
    socket: OwnedFd,
    address: libc::sockaddr_ll,
}

#[expect(unsafe_code, reason = "rustix has no packet addresses")]
impl Sender {
    fn new(interface: &str) -> Self {
        use rustix::net::{AddressFamily, SocketType, socket};
        let family = AddressFamily::from_raw(libc::AF_PACKET.try_into().unwrap());
        let socket = socket(family, SocketType::RAW, None).unwrap();
        let interface = std::ffi::CString::new(interface).unwrap();
        // SAFETY: the name ends with a zero.
        let index = unsafe { libc::if_nametoindex(interface.as_ptr()) };
        assert_ne!(index, 0);
        // SAFETY: zeros are a valid address.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::AF_PACKET.try_into().unwrap();
        address.sll_ifindex = index.try_into().unwrap();
        Self { socket, address }
    }

    fn send(&self, frame: &[u8]) {
        let address: *const libc::sockaddr_ll = &self.address;
        let len = libc::socklen_t::try_from(size_of::<libc::sockaddr_ll>()).unwrap();
        // SAFETY: frame and address are borrowed for the call, each with its length.
        let sent = unsafe {
            libc::sendto(
                self.socket.as_raw_fd(),
                frame.as_ptr().cast(),
                frame.len(),
                0,
                address.cast(),
                len,
            )
        };
        let error = std::io::Error::last_os_error();
        assert_eq!(usize::try_from(sent), Ok(frame.len()), "{error}");
    }
}

/// The queue at which `frame` comes out. What the host sends by itself is skipped.
fn comes_out(tap: &Tap, frame: &[u8]) -> u16 {
    let deadline = Instant::now() + Duration::from_secs(5);
    let mut packet = [0; 2048];
    while Instant::now() < deadline {
        for (index, mut queue) in (0..).zip(tap.queues()) {
            while let Ok(len) = queue.read(&mut packet) {
                if packet[HeaderSize::V1Hash.bytes()..len] == *frame {
                    return index;
                }
            }
        }
    }
    panic!("not seen: {frame:02x?}");
}

/// Tables whose queues exist.
fn config_of_four(types: HashTypes, seed: u8) -> RssConfig {
    let hash = HashConfig {
        types,
        key: key(seed),
    };
    let table = [3, 1, 2, 0, 1, 3, 0, 2];
    RssConfig::new(hash, table.into(), 2, 1).unwrap()
}

/// What can be sent by a packet socket: frames with all of an Ethernet header.
fn flows() -> Vec<Vec<u8>> {
    let ports = (0..40).map(|port| frames::tcp_v4_from(1000 + port));
    let samples = frames::samples().into_iter().map(|(_, frame)| frame);
    ports.chain(samples).collect()
}

#[test]
fn each_flow_comes_out_at_its_queue() {
    in_namespace("each_flow_comes_out_at_its_queue", || {
        let Some(mut program) = loaded("each_flow_comes_out_at_its_queue") else {
            return;
        };
        let tap = tap();
        let sender = Sender::new("t0");
        tap.queues()[1].set_steering(Some(&program)).unwrap();
        for (types, seed) in [
            (HashTypes::ALL, 1),
            (HashTypes::ALL, 2),
            (HashTypes::IPV4, 3),
        ] {
            let config = config_of_four(types, seed);
            program.update(&config);
            for frame in flows() {
                sender.send(&frame);
                assert_eq!(
                    comes_out(&tap, &frame),
                    expected(&config, &frame),
                    "{frame:02x?}"
                );
            }
        }
    });
}

/// Of a VLAN interface's frame the tag is beside the frame, and in it when it is read.
#[test]
fn a_tag_beside_the_frame_makes_no_difference() {
    let test = "a_tag_beside_the_frame_makes_no_difference";
    in_namespace(test, || {
        let test = "a_tag_beside_the_frame_makes_no_difference";
        let Some(mut program) = loaded(test) else {
            return;
        };
        let tap = tap();
        for command in [
            "link add link t0 name vlan5 type vlan id 5",
            "link set vlan5 up",
        ] {
            // The child is in this thread's network namespace.
            match Command::new("ip").args(command.split(' ')).output() {
                Ok(output) if output.status.success() => {}
                other => {
                    println!("SKIP: {test}: ip {command}: {other:?}");
                    return;
                }
            }
        }
        let sender = Sender::new("vlan5");
        let config = config_of_four(HashTypes::ALL, 1);
        program.update(&config);
        tap.queues()[0].set_steering(Some(&program)).unwrap();
        // Those around the head have a chain of headers that fits it but for the tag's 4 bytes.
        for frame in flows().into_iter().chain(frames::around_the_head()) {
            sender.send(&frame);
            let tagged = [&frame[..12], &[0x81, 0, 0, 5], &frame[12..]].concat();
            assert_eq!(
                comes_out(&tap, &tagged),
                expected(&config, &tagged),
                "{frame:02x?}"
            );
        }
    });
}

#[test]
fn a_program_is_taken_out() {
    in_namespace("a_program_is_taken_out", || {
        let Some(mut program) = loaded("a_program_is_taken_out") else {
            return;
        };
        let tap = tap();
        let sender = Sender::new("t0");
        // All to queue 3.
        let hash = HashConfig::default();
        program.update(&RssConfig::new(hash, Box::new([0]), 3, 1).unwrap());
        let queue = &tap.queues()[0];
        let spread = || {
            let mut seen = [0; QUEUES as usize];
            for frame in flows() {
                sender.send(&frame);
                seen[usize::from(comes_out(&tap, &frame))] += 1;
            }
            seen
        };
        let before = spread();
        queue.set_steering(Some(&program)).unwrap();
        let [0, 0, 0, _] = spread() else {
            panic!("not all at queue 3")
        };
        // A tap keeps the program when nobody else does.
        drop(program);
        let [0, 0, 0, _] = spread() else {
            panic!("not all at queue 3")
        };
        queue.set_steering(None).unwrap();
        let after = spread();
        println!("before {before:?}, after {after:?}");
        assert!(
            after.iter().filter(|count| **count > 0).count() > 1,
            "{after:?}"
        );
    });
}

/// The kernel numbers queues anew when one is detached; from the last down and the first up, the
/// numbers stay.
#[test]
fn queues_keep_their_numbers() {
    in_namespace("queues_keep_their_numbers", || {
        let Some(mut program) = loaded("queues_keep_their_numbers") else {
            return;
        };
        let tap = tap();
        let sender = Sender::new("t0");
        let config = config_of_four(HashTypes::ALL, 1);
        program.update(&config);
        let [one, two, three, four] = tap.queues() else {
            panic!("{} queues", tap.queues().len())
        };
        one.set_steering(Some(&program)).unwrap();
        for queue in [four, three, two] {
            queue.detach().unwrap();
        }
        for frame in flows() {
            sender.send(&frame);
            assert_eq!(comes_out(&tap, &frame), 0);
        }
        for queue in [two, three, four] {
            queue.attach().unwrap();
        }
        for frame in flows() {
            sender.send(&frame);
            assert_eq!(comes_out(&tap, &frame), expected(&config, &frame));
        }
    });
}

#[test]
fn what_is_no_program_is_not_attached() {
    in_namespace("what_is_no_program_is_not_attached", || {
        let Some(program) = loaded("what_is_no_program_is_not_attached") else {
            return;
        };
        let map = || program.map_fd().try_clone_to_owned().unwrap();
        let swapped = SteeringProgram::adopt(map(), map()).unwrap();
        let tap = tap();
        let error = tap.queues()[0].set_steering(Some(&swapped)).unwrap_err();
        assert!(matches!(error, SteeringError::Attach { .. }), "{error}");
    });
}
