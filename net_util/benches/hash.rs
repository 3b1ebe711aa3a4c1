//! What a packet's hash costs: finding the flow, and hashing it by table and by definition.

use std::hint::black_box;

use criterion::{Criterion, criterion_group, criterion_main};
use net_util::flow;
use net_util::hash::{HashConfig, HashKey, HashTypes};
use net_util::toeplitz::{MAX_INPUT_BYTES, PacketHasher, Toeplitz, hash_bitwise};

/// TCP over IPv4, the shortest stack of headers.
const FRAME_V4: [u8; 60] = {
    let mut frame = [0; 60];
    (frame[12], frame[14], frame[17], frame[23]) = (0x08, 0x45, 46, 6);
    frame
};

/// UDP over IPv6 behind a VLAN tag and destination options with a home address.
const FRAME_V6: [u8; 100] = {
    let mut frame = [0; 100];
    (frame[12], frame[13], frame[16], frame[17]) = (0x81, 0x00, 0x86, 0xdd);
    (frame[18], frame[23], frame[24]) = (0x60, 42, 60);
    // Destination options, 24 bytes: UDP next, PadN of 2, home address.
    (
        frame[58], frame[59], frame[60], frame[61], frame[62], frame[63],
    ) = (17, 2, 1, 2, 0, 0);
    (frame[64], frame[65]) = (0xc9, 16);
    frame
};

fn toeplitz(c: &mut Criterion) {
    let key = HashKey::from([0x5a; 40]);
    let table = Toeplitz::new(&key);
    let input: [u8; MAX_INPUT_BYTES] = std::array::from_fn(|i| i.to_le_bytes()[0]);
    let mut group = c.benchmark_group("toeplitz");
    for (name, len) in [("ipv4-tcp", 12), ("ipv6-tcp", MAX_INPUT_BYTES)] {
        let input = &input[..len];
        group.bench_function(format!("table/{name}"), |b| {
            b.iter(|| table.hash(black_box(input)))
        });
        group.bench_function(format!("bitwise/{name}"), |b| {
            b.iter(|| hash_bitwise(&key, black_box(input)));
        });
    }
    group.bench_function("new-key", |b| b.iter(|| Toeplitz::new(black_box(&key))));
    group.finish();
}

fn frames(c: &mut Criterion) {
    let config = HashConfig {
        types: HashTypes::ALL,
        key: HashKey::from([0x5a; 40]),
    };
    let hasher = PacketHasher::new(&config);
    let mut group = c.benchmark_group("frame");
    for (name, frame) in [
        ("ipv4-tcp", &FRAME_V4[..]),
        ("vlan-ipv6-home-udp", &FRAME_V6[..]),
    ] {
        assert!(flow::parse(frame).is_some(), "{name} does not parse");
        group.bench_function(format!("parse/{name}"), |b| {
            b.iter(|| flow::parse(black_box(frame)))
        });
        group.bench_function(format!("parse-and-hash/{name}"), |b| {
            b.iter(|| hasher.hash_frame(black_box(frame)));
        });
    }
    group.finish();
}

criterion_group!(benches, toeplitz, frames);
criterion_main!(benches);
