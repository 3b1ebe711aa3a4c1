//! The native guest's pure half, and what the host's tests must agree on with it.
//!
//! The native guest (`tests/guest`) is a bare-metal program that stands in for an operating
//! system where none can run at full speed: it dirties its memory at a set rate, knows at each
//! moment what every page must contain, and drives virtio-net functions. It is linked with flags
//! of its own and therefore its own workspace; what of it runs anywhere is here, where it is
//! tested, and where the host finds the packets' format:
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
