//! What the native guest and the host's tests must agree on.
//!
//! The native guest (`src/main.rs`, built by `build.sh`) is a bare-metal
//! program that stands in for an operating system where none can run at full
//! speed: it dirties its memory at a set rate, knows at each moment what every
//! page must contain, and drives virtio-net functions. This library holds its
//! pure half, which runs anywhere and is tested on the host:
//!
//! - [`args`]: the command line's `key=value` words.
//! - [`pattern`]: a page's content, as a function of its address and how often
//!   it was written.
//! - [`packet`]: a test packet's payload, from its flow and number.
//! - [`sequence`]: what of a numbered stream is lost or came twice.
//! - [`frame`]: enough of Ethernet, ARP, IP and UDP to answer.
//! - [`rss`]: a judge of the hash a device reports, independent of the VMM's.
#![no_std]
#![forbid(unsafe_code)]

pub mod args;
pub mod frame;
pub mod packet;
pub mod pattern;
pub mod rss;
pub mod sequence;
