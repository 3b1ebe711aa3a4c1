//! The locks, atomics and threads of dirty tracking and of the write log.
//!
//! In one place, because the test `schedules` runs that code under the scheduler of `shuttle`: built
//! with `--cfg ferry_shuttle` these are shuttle's. That is a `cfg` and not a feature so that nothing
//! a program depends on can turn it on: what ships is the other branch.

#[cfg(not(ferry_shuttle))]
mod native {
    pub(crate) use parking_lot::Mutex;
    pub(crate) use std::sync::atomic::AtomicU64;
    pub(crate) use std::thread;

    /// Starts a thread of `scope`; one that cannot be started is left out.
    pub(crate) fn spawn_scoped<'scope>(
        scope: &'scope thread::Scope<'scope, '_>,
        name: &str,
        work: impl FnOnce() + Send + 'scope,
    ) {
        if let Err(error) = thread::Builder::new()
            .name(name.to_owned())
            .spawn_scoped(scope, work)
        {
            tracing::debug!(%error, name, "a thread could not be started");
        }
    }
}
#[cfg(ferry_shuttle)]
pub(crate) mod scheduled;

#[cfg(not(ferry_shuttle))]
pub(crate) use native::{AtomicU64, Mutex, spawn_scoped, thread};
#[cfg(ferry_shuttle)]
pub(crate) use scheduled::{AtomicU64, Mutex, spawn_scoped, thread};
