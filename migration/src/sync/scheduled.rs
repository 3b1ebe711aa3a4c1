//! What the parent module gives, under shuttle's scheduler: every operation is a point at which
//! another thread may go on.
//!
//! shuttle runs atomics one after another in the order in which they are called. A processor does
//! not: a store may wait in its core's buffer while later loads of that core are done. Whoever models
//! that (for data; these atomics have no buffer) is told by [`on_fence`] when the buffer is emptied.

use std::sync::atomic::Ordering;
use std::sync::{OnceLock, PoisonError};

pub(crate) use shuttle::thread;

static FENCE: OnceLock<fn()> = OnceLock::new();

/// Has `hook` called before each read-modify-write of an [`AtomicU64`], by the thread that does it:
/// on x86 such an instruction waits until all stores before it are visible to others. The first hook
/// stays.
pub fn on_fence(hook: fn()) {
    FENCE.get_or_init(|| hook);
}

fn fence() {
    if let Some(hook) = FENCE.get() {
        hook();
    }
}

/// As [`std::sync::atomic::AtomicU64`], as much of it as is used.
#[derive(Debug)]
pub struct AtomicU64(shuttle::sync::atomic::AtomicU64);

impl AtomicU64 {
    pub(crate) const fn new(value: u64) -> Self {
        Self(shuttle::sync::atomic::AtomicU64::new(value))
    }

    pub(crate) fn load(&self, order: Ordering) -> u64 {
        self.0.load(order)
    }

    pub(crate) fn swap(&self, value: u64, order: Ordering) -> u64 {
        fence();
        self.0.swap(value, order)
    }

    pub(crate) fn fetch_or(&self, bits: u64, order: Ordering) -> u64 {
        fence();
        self.0.fetch_or(bits, order)
    }

    pub(crate) fn fetch_and(&self, bits: u64, order: Ordering) -> u64 {
        fence();
        self.0.fetch_and(bits, order)
    }
}

/// As `parking_lot::Mutex`, as much of it as is used.
#[derive(Debug)]
pub(crate) struct Mutex<T>(shuttle::sync::Mutex<T>);

impl<T> Mutex<T> {
    pub(crate) const fn new(value: T) -> Self {
        Self(shuttle::sync::Mutex::new(value))
    }

    pub(crate) fn lock(&self) -> shuttle::sync::MutexGuard<'_, T> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn get_mut(&mut self) -> &mut T {
        self.0.get_mut().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Starts a thread of `scope`. Now and then one cannot be started, and is left out.
pub(crate) fn spawn_scoped<'scope>(
    scope: &'scope thread::Scope<'scope, '_>,
    _name: &str,
    work: impl FnOnce() + Send + 'scope,
) {
    use shuttle::rand::Rng;
    if shuttle::rand::thread_rng().gen_range(0..8) > 0 {
        scope.spawn(work);
    }
}
