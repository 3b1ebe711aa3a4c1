//! What a virtio-net device needs that knows nothing of VMs: taps, headers, flows and hashes.
//!
//! A packet comes from the host through a [`tap::TapQueue`] behind a [`header::HeaderV1Hash`].
//! If the guest negotiated hash reports, [`flow::parse`] finds what of the frame is hashed,
//! [`toeplitz::PacketHasher`] computes the hash with the guest's key, and the result is written
//! into the header. If the guest negotiated receive-side scaling (RSS), the same hash picks the
//! receive queue through an [`ctrl::RssConfig`]: in the kernel, by a [`steering::SteeringProgram`],
//! where that is allowed.
//!
//! ```
//! use net_util::hash::{HashConfig, HashKey, HashReport, HashTypes};
//! use net_util::toeplitz::PacketHasher;
//!
//! let config = HashConfig { types: HashTypes::IPV4 | HashTypes::UDPV4, key: HashKey::from([7; 40]) };
//! let hasher = PacketHasher::new(&config);
//! // An ARP frame has nothing to hash.
//! let mut arp = [0; 42];
//! arp[12..14].copy_from_slice(&[0x08, 0x06]);
//! assert_eq!(hasher.hash_frame(&arp).report, HashReport::None);
//! ```
//!
//! | module | what |
//! |---|---|
//! | [`tap`] | opening and adopting taps, one typed function per ioctl, errors that name the remedy |
//! | [`header`] | the 12- and 20-byte headers in front of each packet |
//! | [`config`] | the device configuration space of virtio-net |
//! | [`flow`] | Ethernet frame → addresses and ports, on an untrusted slice, without allocation |
//! | [`hash`] | hash types, reports and keys as the specification numbers them |
//! | [`toeplitz`] | the Toeplitz hash by the fastest method of the CPU, and the rule which type of hash a packet gets |
//! | [`ctrl`] | bodies of the control queue's commands, checked |
//! | [`steering`] | a program for the tap's kernel that chooses queues as the guest's RSS says |
//!
//! Frames and control commands come from guests and networks: every parser here takes any bytes,
//! never panics, and allocates only what it has bounded. Specification sections are those of
//! *Virtual I/O Device (VIRTIO) Version 1.4*.
#![deny(unsafe_code)]

pub mod config;
pub mod ctrl;
pub mod flow;
pub mod hash;
pub mod header;
pub mod steering;
pub mod tap;
pub mod toeplitz;
