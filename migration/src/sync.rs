//! Locks and threads.

pub(crate) use parking_lot::Mutex;
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
