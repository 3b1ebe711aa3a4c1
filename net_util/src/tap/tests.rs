use std::io::{ErrorKind, Read, Write};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{Mode, OFlags, open};
use rustix::thread::{CapabilitySet, UnshareFlags, capabilities, set_capabilities, unshare_unsafe};
use zerocopy::FromBytes;

use super::*;
use crate::flow::{self, Flow};
use crate::header::{self, HeaderSize, HeaderV1Hash};

const ONE: NonZeroU16 = NonZeroU16::MIN;
const TWO: NonZeroU16 = NonZeroU16::MIN.saturating_add(1);

/// Runs `test` in a network namespace of its own, or says why not.
pub(crate) fn in_namespace(name: &str, test: fn()) {
    let namespaced = std::thread::spawn(move || {
        #[expect(unsafe_code, reason = "rustix has no safe call for it")]
        // SAFETY: the thread is new and shares no file descriptor table by this flag.
        let unshared = unsafe { unshare_unsafe(UnshareFlags::NEWNET) };
        let ready = unshared
            .map_err(Into::into)
            .and_then(|()| std::fs::metadata(TUN_DEVICE));
        ready.map(|_| test())
    });
    match namespaced.join() {
        Ok(Ok(())) => {}
        Ok(Err(error)) => println!("SKIP: {name}: no network namespace with taps: {error}"),
        Err(panic) => std::panic::resume_unwind(panic),
    }
}

pub(crate) fn name(name: &str) -> TapName {
    TapName::new(name).unwrap()
}

#[test]
fn names_are_checked() {
    for good in ["tap0", "a", "fifteen-bytes-x", "tap%d", "a.b", "日本"] {
        assert_eq!(TapName::new(good).unwrap().as_str(), good);
    }
    for bad in [
        "",
        ".",
        "..",
        "a/b",
        "a:b",
        "a b",
        "a\tb",
        "a\0b",
        "a%",
        "%d%d",
        "sixteen-bytes-xx",
    ] {
        let error = TapName::new(bad).unwrap_err();
        assert!(
            matches!(&error, TapError::BadName { name } if name == bad),
            "{bad}: {error}"
        );
    }
}

#[test]
fn kernel_knows_the_features_needed() {
    in_namespace("kernel_knows_the_features_needed", || {
        let expected = KernelFeatures {
            headers: true,
            multi_queue: true,
        };
        assert_eq!(KernelFeatures::probe().unwrap(), expected);
    });
}

#[test]
fn opens_a_single_queue() {
    in_namespace("opens_a_single_queue", || {
        let tap = Tap::open(&name("t%d"), ONE).unwrap();
        assert_eq!((tap.name().as_str(), tap.queues().len()), ("t0", 1));
        assert!(!tap.is_multi_queue());
        assert_ne!(tap.mac().unwrap(), [0; 6]);
        assert_eq!(tap.mtu().unwrap(), 1500);
        let error = tap.queues()[0].detach().unwrap_err();
        assert!(matches!(error, TapError::FixedQueue { .. }), "{error}");
        assert_eq!(
            (&tap.queues()[0]).read(&mut [0; 64]).unwrap_err().kind(),
            ErrorKind::WouldBlock
        );
    });
}

#[test]
fn opens_several_queues() {
    in_namespace("opens_several_queues", || {
        let tap = Tap::open(&name("many"), NonZeroU16::new(4).unwrap()).unwrap();
        assert_eq!(tap.queues().len(), 4);
        assert!(tap.is_multi_queue());
        for queue in tap.queues() {
            // Twice, since the guest may ask for what is so already.
            for _ in 0..2 {
                queue.detach().unwrap();
            }
            for _ in 0..2 {
                queue.attach().unwrap();
            }
        }
        let error = Tap::open(&name("many"), NonZeroU16::new(257).unwrap()).unwrap_err();
        assert!(
            matches!(error, TapError::TooManyQueues { queues: 257, .. }),
            "{error}"
        );
    });
}

#[test]
fn one_queue_of_a_multi_queue_tap_will_do() {
    in_namespace("one_queue_of_a_multi_queue_tap_will_do", || {
        let _owner = Tap::open(&name("many"), TWO).unwrap();
        let tap = Tap::open(&name("many"), ONE).unwrap();
        assert!(tap.is_multi_queue());
    });
}

#[test]
fn refusals_name_the_tap_and_the_remedy() {
    in_namespace("refusals_name_the_tap_and_the_remedy", || {
        let _owner = Tap::open(&name("single"), ONE).unwrap();
        let error = Tap::open(&name("single"), ONE).unwrap_err();
        assert!(matches!(error, TapError::InUse { .. }), "{error}");
        assert!(
            error
                .to_string()
                .contains("`single` is in use by another process"),
            "{error}"
        );
        let error = Tap::open(&name("single"), TWO).unwrap_err();
        assert!(matches!(error, TapError::SingleQueue { .. }), "{error}");
        assert!(
            error
                .to_string()
                .contains("ip tuntap add dev single mode tap multi_queue"),
            "{error}"
        );
        for queues in [ONE, TWO] {
            let error = Tap::open(&name("lo"), queues).unwrap_err();
            assert!(matches!(error, TapError::NotATap { .. }), "{error}");
        }
    });
}

#[test]
fn lack_of_privilege_is_told() {
    in_namespace("lack_of_privilege_is_told", || {
        let tap = Tap::open(&name("mine"), TWO).unwrap();
        let mut sets = capabilities(None).unwrap();
        sets.effective -= CapabilitySet::NET_ADMIN;
        // Of this thread only, which ends with the test.
        set_capabilities(None, sets).unwrap();
        for refused in [Tap::open(&name("other"), ONE).map(drop), tap.set_up()] {
            let error = refused.unwrap_err();
            assert!(matches!(error, TapError::NeedsAdmin { .. }), "{error}");
            assert!(error.to_string().contains("ip tuntap add dev"), "{error}");
        }
    });
}

/// Opens the tun device and makes it a queue of `name` with `flags`.
fn raw(name: &TapName, flags: u16) -> OwnedFd {
    let fd = open(TUN_DEVICE, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).unwrap();
    let mut request = ioctl::IfRequest::new(name);
    request.set_flags(flags);
    ioctl::tun_set_iff(&fd, &mut request).unwrap();
    fd
}

const RIGHT: u16 = ioctl::IFF_TAP | ioctl::IFF_NO_PI | ioctl::IFF_VNET_HDR;

#[test]
fn adopts_what_another_program_opened() {
    in_namespace("adopts_what_another_program_opened", || {
        let (one, many) = (name("one"), name("many"));
        let tap = Tap::from_fds(vec![raw(&one, RIGHT)]).unwrap();
        assert_eq!((tap.name(), tap.is_multi_queue()), (&one, false));
        assert_eq!(
            (&tap.queues()[0]).read(&mut [0; 64]).unwrap_err().kind(),
            ErrorKind::WouldBlock
        );
        let queue = || raw(&many, RIGHT | ioctl::IFF_MULTI_QUEUE);
        let tap = Tap::from_fds(vec![queue(), queue(), queue()]).unwrap();
        assert_eq!(
            (tap.name(), tap.queues().len(), tap.is_multi_queue()),
            (&many, 3, true)
        );
    });
}

#[test]
fn refuses_to_adopt_what_does_not_fit() {
    in_namespace("refuses_to_adopt_what_does_not_fit", || {
        let refusal = |fds| Tap::from_fds(fds).unwrap_err();
        let plain = |path| open(path, OFlags::RDWR, Mode::empty()).unwrap();
        assert!(matches!(refusal(vec![]), TapError::NoFds));
        assert!(matches!(
            refusal(vec![plain("/dev/null")]),
            TapError::NotATapFd { .. }
        ));
        assert!(matches!(
            refusal(vec![plain(TUN_DEVICE)]),
            TapError::Unattached
        ));
        let tun = raw(&name("tun"), 1 | ioctl::IFF_NO_PI | ioctl::IFF_VNET_HDR);
        assert!(matches!(refusal(vec![tun]), TapError::NotATap { .. }));
        let headless = raw(&name("headless"), RIGHT & !ioctl::IFF_VNET_HDR);
        assert!(matches!(refusal(vec![headless]), TapError::NoHeader { .. }));
        let several = RIGHT | ioctl::IFF_MULTI_QUEUE;
        let mixed = vec![raw(&name("a"), several), raw(&name("b"), several)];
        assert!(matches!(refusal(mixed), TapError::Mixed { .. }));
        let single = raw(&name("single"), RIGHT);
        let twice = vec![single.try_clone().unwrap(), single];
        assert!(matches!(refusal(twice), TapError::SingleQueue { .. }));
    });
}

#[test]
fn a_tap_of_another_namespace_is_not_confused_with_a_namesake() {
    in_namespace(
        "a_tap_of_another_namespace_is_not_confused_with_a_namesake",
        || {
            let there = std::thread::spawn(|| {
                #[expect(unsafe_code, reason = "rustix has no safe call for it")]
                // SAFETY: the thread is new and shares no file descriptor table by this flag.
                unsafe { unshare_unsafe(UnshareFlags::NEWNET) }.unwrap();
                Tap::open(&name("twin"), ONE).unwrap()
            });
            let there = there.join().unwrap();
            assert!(matches!(there.mtu(), Err(TapError::OtherNamespace { .. })));
            let here = Tap::open(&name("twin"), ONE).unwrap();
            assert_eq!(here.mtu().unwrap(), 1500);
            assert!(matches!(there.mtu(), Err(TapError::OtherNamespace { .. })));
            assert!(matches!(
                there.set_up(),
                Err(TapError::OtherNamespace { .. })
            ));
        },
    );
}

#[test]
fn header_sizes_and_offloads_are_set() {
    in_namespace("header_sizes_and_offloads_are_set", || {
        let tap = Tap::open(&name("t0"), ONE).unwrap();
        let queue = &tap.queues()[0];
        for size in [HeaderSize::V1Hash, HeaderSize::V1] {
            queue.set_header_size(size).unwrap();
            assert_eq!(
                usize::try_from(queue.header_bytes().unwrap()),
                Ok(size.bytes())
            );
        }
        // Every set a guest can ask for is taken, since what is refused is left out.
        let bits = [
            1_u64 << 1,
            1 << 7,
            1 << 8,
            1 << 9,
            1 << 10,
            1 << 54,
            1 << 55,
        ];
        for set in 0_u32..1 << bits.len() {
            let chosen = bits.iter().enumerate().filter(|(i, _)| set & 1 << i != 0);
            let features = chosen.fold(0, |features, (_, bit)| features | bit);
            let offloads = Offloads::from_guest_features(features);
            match queue.set_offloads(offloads) {
                Ok(()) => {}
                // Kernels before 6.2 do not know USO.
                Err(TapError::Offloads { .. }) if offloads.bits() & 0x60 != 0 => {}
                Err(error) => panic!("{features:#x}: {error}"),
            }
        }
    });
}

/// The first packet the host sends by itself: an interface that comes up announces itself to the
/// IPv6 neighbourhood.
fn first_packet(tap: &Tap, packet: &mut [u8]) -> Option<usize> {
    let mut queue = &tap.queues()[0];
    let deadline = Instant::now() + Duration::from_secs(5);
    while Instant::now() < deadline {
        let timeout = Duration::from_millis(100).try_into().unwrap();
        poll(&mut [PollFd::new(&queue, PollFlags::IN)], Some(&timeout)).unwrap();
        match queue.read(packet) {
            Ok(len) => return Some(len),
            Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock, "{error}"),
        }
    }
    None
}

/// Packets the interface `name` of this thread's namespace got from its tap.
fn received_packets(name: &TapName) -> u64 {
    let devices = std::fs::read_to_string("/proc/thread-self/net/dev").unwrap();
    let prefix = format!("{name}:");
    let line = devices
        .lines()
        .find_map(|line| line.trim_start().strip_prefix(&prefix))
        .unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[test]
fn packets_pass_both_ways() {
    in_namespace("packets_pass_both_ways", || {
        let tap = Tap::open(&name("t0"), ONE).unwrap();
        let mut queue = &tap.queues()[0];
        queue.set_header_size(HeaderSize::V1Hash).unwrap();
        queue.set_little_endian().unwrap();
        queue.set_offloads(Offloads::NONE).unwrap();
        tap.set_up().unwrap();
        tap.set_up().unwrap();
        let mut packet = [0xff; 2048];
        let Some(len) = first_packet(&tap, &mut packet) else {
            println!("SKIP: packets_pass_both_ways: the host sends nothing without IPv6");
            return;
        };
        let (header, _) = HeaderV1Hash::read_from_prefix(&packet[..len]).unwrap();
        assert_eq!(header.v1.flags, 0);
        let frame = &packet[HeaderSize::V1Hash.bytes()..len];
        let flow = flow::parse(&frame[..frame.len().min(flow::HEAD_BYTES)]);
        let Some(Flow::V6(flow)) = flow else {
            panic!("{flow:?} of {frame:x?}")
        };
        assert!(
            flow.destination.is_multicast() && flow.transport.is_none(),
            "{flow:?}"
        );

        let before = received_packets(tap.name());
        packet[..HeaderSize::V1Hash.bytes()].fill(0);
        assert_eq!(queue.write(&packet[..len]).unwrap(), len);
        assert_eq!(received_packets(tap.name()), before + 1);
        // A header that the frame does not bear out is refused.
        packet[0] = header::flags::NEEDS_CSUM;
        packet[6..10].fill(0xff);
        assert_eq!(
            queue.write(&packet[..len]).unwrap_err().kind(),
            ErrorKind::InvalidInput
        );
    });
}
