//! Whole-VM tests of Ferry, and what they are made of: processes, namespaces, taps, the API,
//! the native guest and the packets it echoes.
//!
//! The tests themselves are in `tests/`; each starts real `ferry` processes with a real guest on
//! a real `/dev/kvm`. One that cannot run on a host prints `SKIP: <test>: <reason>` and ends.

pub mod api;
pub mod ferry;
pub mod guest;
pub mod guest_output;
pub mod netns;
pub mod process;
pub mod traffic;
