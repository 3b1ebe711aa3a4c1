//! Whole-VM tests of Ferry, and what they are made of: processes, namespaces, taps, the API,
//! the native guest and the packets it echoes.
//!
//! The tests themselves are in `tests/`; each starts real `ferry` processes with a real guest on
//! a real `/dev/kvm`. One that cannot run on a host prints `SKIP: <test>: <reason>` and ends.
//!
//! # Where things are
//! * [`host`]: what a test needs of its host, and taking turns on it.
//! * [`process`], [`api`], [`ferry`]: processes and their REST APIs; [`poller`] asks one all the
//!   time.
//! * [`guest`], [`guest_output`], [`vm`]: the native guest's image, what it says, and a VM with it.
//! * [`migration`]: moving such a VM and what it cost.
//! * [`netns`], [`network`], [`traffic`], [`arp_watch`]: namespaces, bridges and taps, packets
//!   through them, and who announces itself there.

pub mod api;
pub mod arp_watch;
pub mod bench;
pub mod channel_proxy;
pub mod console;
pub mod demo;
pub mod ferry;
pub mod guest;
pub mod guest_output;
pub mod host;
pub mod linux;
pub mod migration;
pub mod netns;
pub mod network;
pub mod nic_proxy;
pub mod poller;
pub mod process;
pub mod shell;
pub mod traffic;
pub mod vm;
pub mod vmm_process;
