//! Writers, reports, the one who takes pages, and a connection that breaks, in thousands of random
//! schedules: no page is lost, none is invented, none is sent twice in a round.
//!
//! Empty unless built with `--cfg ferry_shuttle`:
//!
//! ```sh
//! RUSTFLAGS='--cfg ferry_shuttle' cargo test --release -p vm-migration --test schedules -- --nocapture
//! ```
//!
//! `DIRTY_SCHEDULES` says how many schedules (default 10,000; 1,000 in a debug build; a minute or two),
//! `DIRTY_SCHEDULES_SEED` where to start, and `DIRTY_SCHEDULE` replays the one that a failure printed.
//!
//! # What is real and what is model
//!
//! Real: [`GuestDirty`](vm_migration::GuestDirty) with its windows, chunks and threads that collect,
//! [`VmmWriteSource`](vm_migration::VmmWriteSource) and the write log of guest memory, `vm-memory`.
//! Their locks, atomics and threads are shuttle's (`src/sync.rs`), so each is a point at which
//! another thread may go on.
//!
//! Model (`guest`, `sources`, `link`, `migration`):
//!
//! - *Guest memory*: 69 pages in two regions and three windows, of which six are written. Each writer
//!   has a word of its own in each page and writes values that never come again.
//! - *Writers*: a vCPU that is stopped by write protection as KVM's are, and whose log is cleared in a
//!   second step; a device whose log its reports clear, of single pages or of groups of four; two
//!   threads of the VMM that write through `vm-memory`, or beside it with `mark_written`.
//! - *Store buffers*: a store of the device or, beside `vm-memory`, of the VMM waits until a
//!   read-modify-write of its thread, or until it gets through by itself. This is the one reordering
//!   of x86, without which skipping the OR of a set bit would look harmless.
//! - *The migration*: rounds on one to three threads; reports and clears that fail, with and without a
//!   new start of the source; a destination on a thread of its own that applies pages in its own
//!   time; a connection cut within a round, before its acknowledgement, or in the stop-copy, where
//!   the guest may then run on and all starts again.
//!
//! # What is checked
//!
//! - *Lost*: when the guest has stopped and the last round is acknowledged, each page at the
//!   destination has the content it has at the source, and nothing is dirty or in flight.
//! - *Invented*: each page handed out had a reason: everything was made dirty, it came back from
//!   flight, or a writer marked it (or its group) after the beginning of the last collection before
//!   it was last handed out; reports from then on are about later marks.
//! - *Twice*: no page is handed out twice in a round.
//!
//! That it would notice is shown by `every_fault_is_noticed`: each `Fault` breaks a
//! rule that this crate's documents give to sources and to whoever drives `GuestDirty`.

#![cfg(ferry_shuttle)]

#[cfg(test)]
mod explore;
#[cfg(test)]
mod faults;
#[cfg(test)]
mod guest;
#[cfg(test)]
mod ledger;
#[cfg(test)]
mod link;
#[cfg(test)]
mod migration;
#[cfg(test)]
mod sources;
#[cfg(test)]
mod writers;
