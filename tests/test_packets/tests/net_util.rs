//! Ferry's own parser and hash against what the frames were made as.

use net_util::hash::{HashConfig, HashKey, HashTypes};
use net_util::toeplitz::PacketHasher;
use test_packets::hash::Key;
use test_packets::{Random, packet};

#[test]
fn flows_and_hashes_of_100000_frames_are_as_they_were_made() {
    let mut random = Random::new(3, 0);
    // All types often, so that none hides behind those that are off.
    let settings: Vec<_> = (0..64)
        .map(|at| {
            let key = random.bytes::<40>();
            let types = if at % 2 == 0 {
                0x1ff
            } else {
                u32::from(random.below(0x200))
            };
            let config = HashConfig {
                types: HashTypes::from_bits(types),
                key: HashKey::from(key),
            };
            (types, Key::new(&key), PacketHasher::new(&config))
        })
        .collect();
    for number in 0..100_000 {
        let frame = packet(11, number, [0x52, 0x54, 0, 0, 0, 1]);
        let (types, key, hasher) = random.pick(&settings);
        let got = hasher.hash_frame(&frame.bytes);
        let got = (got.report.code(), got.value);
        let wanted = key.report(frame.flow.as_ref(), *types);
        assert_eq!(
            got,
            (wanted.kind, wanted.value),
            "frame {number}, {types:#x}: {frame:02x?}"
        );
    }
}
