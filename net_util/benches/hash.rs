//! What a packet's hash costs: finding the flow, and hashing it by each method this CPU has and by
//! definition.

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use net_util::flow;
use net_util::hash::{HashConfig, HashKey, HashTypes};
use net_util::toeplitz::{MAX_INPUT_BYTES, Method, PacketHasher, Toeplitz, hash_bitwise};

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

/// Keys in turn, so that tables come out of outer caches: as after the copying of a packet, and on
/// a host with many cards.
const KEYS: usize = 64;

/// Inputs of one call for many.
const MANY: u64 = 256;

/// One input and many by every method, and by the definition.
fn lengths<const N: usize>(c: &mut Criterion, key: &HashKey, name: &str) {
    let input: [u8; N] = std::array::from_fn(|i| i.to_le_bytes()[0]);
    let inputs: Vec<[u8; N]> = (0..MANY)
        .map(|i| std::array::from_fn(|byte| (byte * 7 + 1).to_le_bytes()[0] ^ i.to_le_bytes()[0]))
        .collect();
    let mut hashes = vec![0; inputs.len()];
    let mut group = c.benchmark_group(format!("toeplitz/{name}"));
    group.throughput(Throughput::Elements(1));
    group.bench_function("bitwise", |b| {
        b.iter(|| hash_bitwise(key, black_box(&input)))
    });
    let ready = Method::ALL.map(|method| Toeplitz::with_method(key, method));
    for toeplitz in ready.iter().flatten() {
        group.bench_function(format!("{}/one", toeplitz.method().name()), |b| {
            b.iter(|| toeplitz.hash_array(black_box(&input)));
        });
    }
    for method in Method::ALL {
        let ready: Option<Vec<_>> = (0..KEYS)
            .map(|_| Toeplitz::with_method(key, method))
            .collect();
        if let Some(ready) = ready {
            let mut next = ready.iter().cycle();
            group.bench_function(format!("{}/one-of-{KEYS}-keys", method.name()), |b| {
                b.iter(|| next.next().map(|key| key.hash_array(black_box(&input))));
            });
        }
    }
    // Divide by 256: the throughput is of single inputs.
    group.throughput(Throughput::Elements(MANY));
    for toeplitz in ready.iter().flatten() {
        group.bench_function(format!("{}/256", toeplitz.method().name()), |b| {
            b.iter(|| toeplitz.hash_many(black_box(&inputs), black_box(&mut hashes)));
        });
    }
    group.finish();
}

fn toeplitz(c: &mut Criterion) {
    let key = HashKey::from(std::array::from_fn(|i| (i * 37 + 5).to_le_bytes()[0]));
    lengths::<12>(c, &key, "12-bytes");
    lengths::<MAX_INPUT_BYTES>(c, &key, "36-bytes");
    let mut group = c.benchmark_group("toeplitz/new-key");
    for method in Method::ALL {
        group.bench_function(method.name(), |b| {
            b.iter(|| Toeplitz::with_method(black_box(&key), method));
        });
    }
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
