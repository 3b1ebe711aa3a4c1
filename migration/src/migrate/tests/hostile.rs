//! Peers that do not keep to the protocol, and VMs that do not fit.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use super::fakes::*;
use super::rig::*;
use crate::migrate::frame::{Envelope, FrameBuffer, HEADER_BYTES, Kind};
use crate::migrate::protocol::{
    Abort, Commit, Complete, DeviceEnd, Ready, Refuse, Round, chunk_room, decode, encode,
};
use crate::migrate::*;

/// A peer that says whatever a test wants.
struct Peer {
    socket: UnixStream,
    sequence: u64,
}

impl Peer {
    fn say<T: serde::Serialize>(&mut self, kind: Kind, message: &T) {
        let mut frame = FrameBuffer::default();
        encode(kind, message, &mut frame).unwrap();
        self.say_frame(kind, frame);
    }

    fn say_frame(&mut self, kind: Kind, mut frame: FrameBuffer) {
        let bytes = frame.seal(kind, self.sequence).unwrap().to_vec();
        self.sequence += 1;
        self.say_bytes(&bytes);
    }

    fn say_raw(&mut self, kind: Kind, payload: &[u8]) {
        let mut frame = FrameBuffer::default();
        frame.extend(payload);
        self.say_frame(kind, frame);
    }

    fn say_bytes(&mut self, bytes: &[u8]) {
        // The other side may have hung up on us already.
        let _ = self.socket.write_all(bytes);
    }

    /// The next frame that says something, if any comes.
    fn hear(&mut self) -> Option<(Kind, Vec<u8>)> {
        loop {
            let mut header = [0; HEADER_BYTES];
            self.socket.read_exact(&mut header).ok()?;
            let envelope = Envelope::parse(&header).unwrap();
            let mut payload = vec![0; envelope.length];
            self.socket.read_exact(&mut payload).ok()?;
            if envelope.kind != Kind::Progress {
                return Some((envelope.kind, payload));
            }
        }
    }

    fn hear_abort(&mut self) -> String {
        match self.hear() {
            Some((Kind::Abort, payload)) => decode::<Abort>(Kind::Abort, &payload).unwrap().reason,
            other => panic!("{other:?}"),
        }
    }
}

fn peer() -> (Peer, Connection) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let cancel = CancelHandle::new().unwrap();
    let peer = Peer {
        socket: ours,
        sequence: 0,
    };
    let connection = connection(theirs, "the peer", &cancel);
    (peer, connection.with_limits(SHORT))
}

/// Runs a destination against a source that `talk` plays. Gives its error.
fn against_destination(talk: impl FnOnce(&mut Peer)) -> MigrationError {
    let (mut peer, connection) = peer();
    let mut host = Host::new(&Failures::default());
    let result = std::thread::scope(|scope| {
        let host = &mut host;
        let destination = scope.spawn(move || {
            let mut nobody = |_: &MigrationEvent| {};
            destination::run(connection, host, &Status::destination(), &mut nobody).map(drop)
        });
        talk(&mut peer);
        drop(peer);
        destination.join().unwrap()
    });
    assert!(!host.is_running());
    assert_eq!(host.prepared, host.aborted.is_some());
    result.unwrap_err()
}

/// The same with the manifest accepted.
fn against_loading(talk: impl FnOnce(&mut Peer)) -> MigrationError {
    against_destination(|peer| {
        peer.say(Kind::Manifest, &manifest());
        assert!(matches!(peer.hear(), Some((Kind::Accept, _))));
        talk(peer);
    })
}

/// Runs a source against a destination that `talk` plays. Gives its error.
fn against_source(talk: impl FnOnce(&mut Peer)) -> MigrationError {
    let (mut peer, connection) = peer();
    let mut leaving = leaving(&Failures::default());
    let result = std::thread::scope(|scope| {
        let parts = &mut leaving.parts;
        let source = scope.spawn(move || {
            let mut nobody = |_: &MigrationEvent| {};
            let params = MigrationParams::default();
            source::run(parts, connection, &params, &Status::source(), &mut nobody)
        });
        talk(&mut peer);
        drop(peer);
        source.join().unwrap()
    });
    let error = result.unwrap_err();
    assert_eq!(leaving.writer.is_paused(), error.guest_is_paused());
    error
}

fn expect(error: &MigrationError, parts: &[&str]) {
    let chain = error.chain();
    for part in parts {
        assert!(chain.contains(part), "{part:?} is not in {chain:?}");
    }
}

#[test]
fn another_version_is_named_on_both_sides() {
    let mut frame = FrameBuffer::default();
    let mut bytes = frame.seal(Kind::Manifest, 0).unwrap().to_vec();
    bytes[4] = 7;
    let error = against_destination(|peer| {
        peer.say_bytes(&bytes);
        assert!(peer.hear_abort().contains("protocol 7"));
    });
    expect(&error, &["protocol 7", "speaks 2", "listening"]);
    let error = against_source(|peer| {
        peer.hear();
        peer.say_bytes(&bytes);
    });
    expect(&error, &["protocol 7", "speaks 2", "preflight"]);
}

#[test]
fn garbage_is_told_from_a_frame() {
    let error = against_destination(|peer| peer.say_bytes(&[b'G'; 64]));
    expect(&error, &["not a Ferry migration frame"]);
}

#[test]
fn oversized_lengths_are_refused_before_the_payload() {
    let mut frame = FrameBuffer::default();
    let mut bytes = frame.seal(Kind::Manifest, 0).unwrap().to_vec();
    bytes[16..20].copy_from_slice(&u32::MAX.to_le_bytes());
    let error = against_destination(|peer| {
        peer.say_bytes(&bytes);
        assert!(peer.hear_abort().contains("4294967295 bytes"));
    });
    expect(
        &error,
        &["Manifest frame of 4294967295 bytes; the limit is 4194304"],
    );
}

#[test]
fn a_silent_or_absent_source_is_noticed() {
    let began = Instant::now();
    let error = against_destination(|_| std::thread::sleep(SHORT.idle * 2));
    expect(
        &error,
        &["the peer", "listening", "no manifest within 600 ms"],
    );
    let error = against_loading(|_| std::thread::sleep(SHORT.idle * 2));
    expect(&error, &["the peer", "prepared", "within 600 ms"]);
    let error = against_loading(|_| {});
    expect(&error, &["the peer closed the connection"]);
    assert!(began.elapsed() < Duration::from_secs(10));
}

#[test]
fn frames_out_of_place_are_refused() {
    let error = against_destination(|peer| peer.say(Kind::Commit, &Commit));
    expect(&error, &["unexpected Commit frame"]);
    let error = against_loading(|peer| peer.say(Kind::Commit, &Commit));
    expect(&error, &["loading", "unexpected Commit frame"]);
    let error = against_loading(|peer| peer.say(Kind::Manifest, &manifest()));
    expect(&error, &["unexpected Manifest frame"]);
    let error = against_source(|peer| {
        peer.hear();
        peer.say(
            Kind::Ready,
            &Ready {
                load_us: 0,
                devices_us: Vec::new(),
            },
        );
    });
    expect(&error, &["preflight", "unexpected Ready frame"]);
}

#[test]
fn malformed_payloads_are_refused() {
    let error = against_destination(|peer| peer.say_raw(Kind::Manifest, &[0xff; 40]));
    expect(&error, &["malformed Manifest frame"]);
    let error = against_loading(|peer| peer.say_raw(Kind::RoundEnd, &[1, 0, 0]));
    expect(&error, &["malformed RoundEnd frame", "too many"]);
    for payload in [
        &[][..],
        &[1, 0, 0, 0, 0, 0, 0, 0],
        &[0; 8],
        &[1; 24],
        &[0xff; 100],
    ] {
        let error = against_loading(|peer| peer.say_raw(Kind::Pages, payload));
        expect(&error, &["malformed Pages frame"]);
    }
    let error = against_loading(|peer| peer.say_raw(Kind::DeviceChunk, &[1, 0, 0]));
    expect(&error, &["malformed DeviceChunk frame"]);
}

/// A page frame of one zero run.
fn zeroes(gpa: u64, len: u32) -> Vec<u8> {
    let mut payload = vec![1, 0, 0, 0, 0, 0, 0, 0];
    payload.extend(gpa.to_le_bytes());
    payload.extend(len.to_le_bytes());
    payload.extend([1, 0, 0, 0]);
    payload
}

#[test]
fn memory_outside_the_guest_is_not_written() {
    let end = REGIONS[0].0 + REGIONS[0].1;
    for (gpa, len) in [
        (end, 4096),
        (end - 4096, 8192),
        (u64::MAX - 4095, 4096),
        (u64::MAX, 2),
    ] {
        let error = against_loading(|peer| peer.say_raw(Kind::Pages, &zeroes(gpa, len)));
        expect(&error, &["no guest memory", &format!("{gpa:#x}")]);
    }
    let error = against_loading(|peer| peer.say_raw(Kind::Pages, &zeroes(0, 32 << 20)));
    expect(&error, &["tell of too much"]);
}

#[test]
fn missing_memory_is_noticed() {
    let memory_bytes = 8192;
    let error = against_loading(|peer| {
        peer.say_raw(Kind::Pages, &zeroes(0, 4096));
        let round = 1;
        peer.say(
            Kind::RoundEnd,
            &Round {
                round,
                memory_bytes,
            },
        );
    });
    expect(&error, &["sent 8192 bytes of memory, 4096 arrived"]);
    let error = against_loading(|peer| peer.say(Kind::Complete, &Complete { memory_bytes }));
    expect(&error, &["sent 8192 bytes of memory, 0 arrived"]);
}

fn chunk(device: u16, bytes: usize) -> FrameBuffer {
    let mut frame = FrameBuffer::default();
    chunk_room(&mut frame, device, bytes);
    frame
}

#[test]
fn broken_device_state_is_noticed() {
    let end = |index, bytes, checksum| DeviceEnd {
        index,
        bytes,
        checksum,
    };
    let sum = crc32c::crc32c(&[0; 10]);
    let error = against_loading(|peer| peer.say_frame(Kind::DeviceChunk, chunk(3, 10)));
    expect(&error, &["the manifest has no such device"]);
    let error = against_loading(|peer| peer.say(Kind::DeviceEnd, &end(9, 0, 0)));
    expect(&error, &["the manifest has no such device"]);
    let error = against_loading(|peer| {
        peer.say_frame(Kind::DeviceChunk, chunk(1, 10));
        peer.say(Kind::DeviceEnd, &end(1, 11, sum));
    });
    expect(&error, &["nic", "length differs"]);
    let error = against_loading(|peer| {
        peer.say_frame(Kind::DeviceChunk, chunk(1, 10));
        peer.say(Kind::DeviceEnd, &end(1, 10, sum ^ 1));
    });
    expect(&error, &["nic", "checksum differs"]);
    let error = against_loading(|peer| peer.say(Kind::DeviceEnd, &end(1, 0, 0)));
    expect(
        &error,
        &["nic", "ended before a device that is loaded before it"],
    );
    let error = against_loading(|peer| {
        peer.say(Kind::DeviceEnd, &end(0, 0, 0));
        peer.say_frame(Kind::DeviceChunk, chunk(1, 10));
        peer.say(Kind::DeviceEnd, &end(1, 10, sum));
        peer.say_frame(Kind::DeviceChunk, chunk(1, 10));
    });
    expect(&error, &["nic", "more came after its end"]);
    let error = against_loading(|peer| {
        for index in [0, 1, 1] {
            peer.say(Kind::DeviceEnd, &end(index, 0, 0));
        }
    });
    expect(&error, &["nic", "ended twice"]);
    let error = against_loading(|peer| {
        peer.say(Kind::DeviceEnd, &end(0, 0, 0));
        peer.say(Kind::DeviceEnd, &end(2, 0, 0));
        peer.say(Kind::Complete, &Complete { memory_bytes: 0 });
    });
    expect(&error, &["nic", "never ended"]);
    let error = against_loading(|peer| {
        for _ in 0..33 {
            peer.say_frame(Kind::DeviceChunk, chunk(1, 512 << 10));
        }
    });
    expect(&error, &["nic", "more than 16777216 bytes"]);
}

#[test]
fn a_wrong_acknowledgement_is_refused() {
    let error = against_source(|peer| {
        peer.hear();
        let ferry_version = String::new();
        peer.say(Kind::Accept, &protocol::Accept { ferry_version });
        while let Some((kind, _)) = peer.hear() {
            if kind == Kind::RoundEnd {
                let (round, memory_bytes) = (1, 1);
                peer.say(
                    Kind::RoundAck,
                    &Round {
                        round,
                        memory_bytes,
                    },
                );
            }
        }
    });
    expect(&error, &["sent 8388608 bytes of memory, 1 arrived"]);
}

#[test]
fn each_reason_to_refuse_is_named() {
    let mut leaving_guest = leaving(&Failures::default());
    let mut host = Host::new(&Failures::default());
    host.refusals = vec![
        Refusal::new("nic", "the tap cannot report hashes", "use hash_report=off"),
        Refusal::new("cpuid", "leaf 7 lacks avx512f", "use a host that has it"),
    ];
    let params = MigrationParams::default();
    let outcome = migrate(&mut leaving_guest, &mut host, &params, pair());
    check(&mut leaving_guest, &host, &outcome);
    let error = outcome.source.unwrap_err();
    expect(
        &error,
        &[
            "the destination refuses",
            "nic: the tap cannot report hashes: use hash_",
        ],
    );
    expect(
        &error,
        &["cpuid: leaf 7 lacks avx512f: use a host that has it"],
    );
    assert!(matches!(error, MigrationError::Refused { refusals, .. } if refusals.len() == 2));

    // The source's manifest does not match what the destination made of it.
    let error = against_destination(|peer| {
        let mut manifest = manifest();
        manifest.devices[2].id = "gpu".into();
        manifest.memory[1].len += 4096;
        peer.say(Kind::Manifest, &manifest);
        let (kind, payload) = peer.hear().unwrap();
        assert_eq!(kind, Kind::Refuse);
        let refuse: Refuse = decode(kind, &payload).unwrap();
        let subjects: Vec<_> = refuse
            .refusals
            .iter()
            .map(|one| one.subject.as_str())
            .collect();
        assert_eq!(subjects, ["memory", "memory", "gpu", "disk"]);
    });
    expect(
        &error,
        &[
            "gpu: the destination has no such device",
            "5 MiB at 0x100000000",
        ],
    );
}

#[test]
fn a_bad_manifest_is_refused_for_each_fault() {
    let try_with = |change: &dyn Fn(&mut Manifest)| {
        let mut bad = manifest();
        change(&mut bad);
        against_destination(|peer| {
            peer.say(Kind::Manifest, &bad);
            assert!(matches!(peer.hear(), Some((Kind::Refuse, _))));
        })
    };
    let error = try_with(&|bad| bad.protocol = 3);
    expect(
        &error,
        &["protocol: the source speaks version 3, this side 2"],
    );
    for size in [0, 2048, 12288, 2 << 20] {
        let error = try_with(&|bad| bad.page_size = size);
        expect(&error, &[&format!("pages of {size} bytes cannot be sent")]);
    }
    let error = try_with(&|bad| bad.vcpus = 0);
    expect(&error, &["vcpus"]);
    let error = try_with(&|bad| bad.memory.clear());
    expect(&error, &["memory: 0 regions"]);
    let error = try_with(&|bad| bad.memory[1].gpa = u64::MAX - 4095);
    expect(
        &error,
        &["memory", "overlaps another or is not made of whole pages"],
    );
    let error = try_with(&|bad| bad.memory[1].gpa = 4096);
    expect(&error, &["memory", "overlaps"]);
    let error = try_with(&|bad| bad.devices[1].id = "vcpu".into());
    expect(&error, &["vcpu: two devices have this identifier"]);
    let error = try_with(&|bad| bad.devices[1].id.clear());
    expect(&error, &["a device of kind nic: it has no identifier"]);
}

#[test]
fn a_device_that_cannot_move_is_refused_at_the_source() {
    let mut guest = leaving(&Failures::default());
    guest.parts.manifest.devices[1].migratable = Migratable::No {
        reason: "it has no migration support".into(),
        remedy: "unplug it first".into(),
    };
    let mut host = Host::new(&Failures::default());
    let outcome = migrate(&mut guest, &mut host, &MigrationParams::default(), pair());
    check(&mut guest, &host, &outcome);
    let error = outcome.source.unwrap_err();
    expect(
        &error,
        &[
            "this host refuses",
            "nic: it has no migration support: unplug it first",
        ],
    );
    assert!(!host.prepared);
}
