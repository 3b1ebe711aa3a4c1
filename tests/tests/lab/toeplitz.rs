//! The hash of a packet as the virtio specification has it (1.3, 5.1.6.4.3), bit by bit and by no
//! code of Ferry's.

use std::net::IpAddr;

/// The Toeplitz hash: for each bit of the input that is set, the 32 bits of the key from there.
pub(crate) fn toeplitz(key: &[u8], input: &[u8]) -> u32 {
    let bit = |bytes: &[u8], at: usize| bytes[at / 8] >> (7 - at % 8) & 1 == 1;
    let mut hash = 0;
    for at in (0..input.len() * 8).filter(|at| bit(input, *at)) {
        let window = (at..at + 32).fold(0, |word, at| word << 1 | u32::from(bit(key, at)));
        hash ^= window;
    }
    hash
}

/// Addresses, and ports if there are any, in the order they have in packets.
pub(crate) fn hash_input(
    source: IpAddr,
    destination: IpAddr,
    ports: Option<(u16, u16)>,
) -> Vec<u8> {
    let mut input = Vec::new();
    for address in [source, destination] {
        match address {
            IpAddr::V4(address) => input.extend(address.octets()),
            IpAddr::V6(address) => input.extend(address.octets()),
        }
    }
    if let Some((source, destination)) = ports {
        input.extend(source.to_be_bytes());
        input.extend(destination.to_be_bytes());
    }
    input
}

/// Microsoft's published verification suite ("Verifying the RSS hash calculation").
#[test]
fn this_is_the_published_function() {
    let key: Vec<u8> =
        "6d5a56da255b0ec24167253d43a38fb0d0ca2bcbae7b30b477cb2da38030f20c6a42b73bbeac01fa"
            .as_bytes()
            .chunks(2)
            .map(|digits| u8::from_str_radix(str::from_utf8(digits).unwrap(), 16).unwrap())
            .collect();
    let vectors = [
        (
            "66.9.149.187",
            2794,
            "161.142.100.80",
            1766,
            0x323e_8fc2,
            0x51cc_c178,
        ),
        (
            "199.92.111.2",
            14230,
            "65.69.140.83",
            4739,
            0xd718_262a,
            0xc626_b0ea,
        ),
        (
            "3ffe:2501:200:1fff::7",
            2794,
            "3ffe:2501:200:3::1",
            1766,
            0x2cc1_8cd5,
            0x4020_7d3d,
        ),
    ];
    for (source, source_port, destination, destination_port, addresses, with_ports) in vectors {
        let (source, destination) = (source.parse().unwrap(), destination.parse().unwrap());
        let ports = Some((source_port, destination_port));
        assert_eq!(
            toeplitz(&key, &hash_input(source, destination, None)),
            addresses
        );
        assert_eq!(
            toeplitz(&key, &hash_input(source, destination, ports)),
            with_ports
        );
    }
}
