use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};

use super::*;
use crate::flow::HEAD_BYTES;
use crate::hash::{HashConfig, HashKey, HashTypes};
use crate::toeplitz::PacketHasher;

mod frames;
mod privileges;
mod taps;

/// The program; `None`, and a word about it, where this process may not load one.
fn loaded(test: &str) -> Option<SteeringProgram> {
    match SteeringProgram::load() {
        Ok(program) => Some(program),
        Err(error @ (SteeringError::Forbidden { .. } | SteeringError::Unsupported { .. })) => {
            println!("SKIP: {test}: {error}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

/// The queue of a packet without a hash.
const UNCLASSIFIED: u16 = 999;

/// A configuration whose table has another queue at each index, from `first` on.
fn config(types: HashTypes, key: HashKey, first: u16, entries: u16) -> RssConfig {
    let table = (first..first + entries).collect();
    RssConfig::new(HashConfig { types, key }, table, UNCLASSIFIED, 1).unwrap()
}

fn key(seed: u8) -> HashKey {
    let mut byte = seed;
    HashKey::from(std::array::from_fn(|_| {
        byte = byte.wrapping_mul(149).wrapping_add(73);
        byte
    }))
}

/// The queue that `config` has for a frame, by the code of this crate.
fn expected(config: &RssConfig, frame: &[u8]) -> u16 {
    let head = &frame[..frame.len().min(HEAD_BYTES)];
    config.queue_for(PacketHasher::new(config.hash()).hash_frame(head))
}

/// `union bpf_attr` for BPF_PROG_TEST_RUN, as far as it is used.
#[derive(Default)]
#[repr(C)]
struct TestRun {
    program: u32,
    result: u32,
    in_bytes: u32,
    out_bytes: u32,
    in_data: u64,
    out_data: u64,
    repeat: u32,
    nanoseconds: u32,
}

/// Runs the program on a frame as a tap does; gives the queue, and the nanoseconds a run took.
fn run(program: &SteeringProgram, frame: &[u8], repeat: u32) -> (u16, u32) {
    // The kernel takes off an Ethernet header before it calls a socket filter here, as a tap does
    // not.
    let packet = [&[0; 14], frame].concat();
    let mut attributes = TestRun {
        program: u32::try_from(program.program_fd().as_raw_fd()).unwrap(),
        in_bytes: u32::try_from(packet.len()).unwrap(),
        in_data: u64::try_from(packet.as_ptr().expose_provenance()).unwrap(),
        repeat,
        ..TestRun::default()
    };
    #[expect(unsafe_code, reason = "bpf(2)")]
    // SAFETY: BPF_PROG_TEST_RUN reads the packet, and writes results into the structure.
    let status = unsafe {
        let attributes: *mut TestRun = &mut attributes;
        libc::syscall(libc::SYS_bpf, 10, attributes, size_of::<TestRun>())
    };
    assert_eq!(status, 0, "{}", std::io::Error::last_os_error());
    (
        u16::try_from(attributes.result).unwrap(),
        attributes.nanoseconds,
    )
}

#[test]
fn the_program_assembles() {
    let file = std::io::stdin();
    let program = program::assemble(file.as_fd()).unwrap();
    // More would not be a program without privileges at all (BPF_MAXINSNS).
    assert!(program.len() < 4096, "{}", program.len());
    println!("{} instructions", program.len());
}

#[test]
fn a_new_program_steers_to_queue_0() {
    let Some(program) = loaded("a_new_program_steers_to_queue_0") else {
        return;
    };
    assert_eq!(run(&program, &frames::tcp_v4(), 1).0, 0);
}

#[test]
fn tables_of_any_length_are_followed() {
    let Some(mut program) = loaded("tables_of_any_length_are_followed") else {
        return;
    };
    for power in 0..8 {
        let config = config(HashTypes::ALL, key(power), 500, 1 << power);
        program.update(&config);
        for port in 0..100 {
            let frame = frames::tcp_v4_from(port);
            assert_eq!(run(&program, &frame, 1).0, expected(&config, &frame));
        }
    }
}

/// Two configurations take turns under packets, by `change`: none may be steered by a mix of them.
/// Gives how many were steered by the one, by the other, and by neither.
fn take_turns(test: &str, change: fn(&shared::Shared, &RssConfig)) -> Option<[u32; 3]> {
    let mut program = loaded(test)?;
    let [one, other] = [1, 2].map(|n| config(HashTypes::ALL, key(n), u16::from(n) * 200, 128));
    let frame = frames::tcp_v6();
    let allowed = [&one, &other].map(|config| expected(config, &frame));
    let allowed = [allowed[0], allowed[1], UNCLASSIFIED];
    program.update(&one);
    let done = AtomicBool::new(false);
    let queues = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                change(program.mapping.shared(), &other);
                change(program.mapping.shared(), &one);
            }
        });
        let queues: Vec<_> = (0..50_000).map(|_| run(&program, &frame, 1).0).collect();
        done.store(true, Ordering::Relaxed);
        queues
    });
    let mut seen = [0; 3];
    for queue in queues {
        let place = allowed.iter().position(|allowed| *allowed == queue);
        let place = place.unwrap_or_else(|| panic!("{queue} is of neither: {allowed:?}"));
        seen[place] += 1;
    }
    println!("steered by one, by the other, by neither: {seen:?}");
    Some(seen)
}

#[test]
fn a_packet_sees_one_configuration() {
    let test = "a_packet_sees_one_configuration";
    if let Some([one, other, _]) = take_turns(test, shared::Shared::update) {
        assert!(one > 0 && other > 0);
    }
}

#[test]
fn a_packet_that_updates_overtake_is_not_steered_wrong() {
    let test = "a_packet_that_updates_overtake_is_not_steered_wrong";
    if let Some([_, _, neither]) = take_turns(test, shared::Shared::refill) {
        assert!(neither > 0);
    }
}

#[test]
fn a_slot_that_is_being_filled_is_not_trusted() {
    let Some(mut program) = loaded("a_slot_that_is_being_filled_is_not_trusted") else {
        return;
    };
    let config = config(HashTypes::ALL, key(1), 0, 128);
    program.update(&config);
    program.mapping.shared().begin_filling();
    assert_eq!(run(&program, &frames::tcp_v4(), 1).0, UNCLASSIFIED);
    program.update(&config);
    let frame = frames::tcp_v4();
    assert_eq!(run(&program, &frame, 1).0, expected(&config, &frame));
}

/// Prints what the program costs; no promise hangs on it.
#[test]
fn a_run_takes_a_measured_time() {
    let Some(mut program) = loaded("a_run_takes_a_measured_time") else {
        return;
    };
    program.update(&config(HashTypes::ALL, key(1), 0, 128));
    for (what, frame) in [
        ("TCP over IPv4", frames::tcp_v4()),
        ("TCP over IPv6", frames::tcp_v6()),
        ("with a home address", frames::home_address()),
    ] {
        let (_, nanoseconds) = run(&program, &frame, 100_000);
        println!("{what}: {nanoseconds} ns");
    }
}
