//! Getting a vCPU out of the guest.
//!
//! Two things are needed. A signal gets the thread out of a running guest. But a signal that
//! arrives just before the thread enters KVM would be handled and forgotten, so the kick first
//! sets the `immediate_exit` byte of the page shared with KVM, which makes the entry return at
//! once. In this order no kick is lost: either the entry sees the byte, or the thread was in the
//! guest before the byte was set and the signal, sent after that, ends it.

use std::ffi::c_void;
use std::io;
use std::marker::PhantomData;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use parking_lot::Mutex;
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler, unblock_signal};

use crate::Error;
use crate::kvm::run_page::RunPage;

/// The signal that takes vCPU threads out of the guest: the first real-time signal.
pub fn kick_signal() -> libc::c_int {
    SIGRTMIN()
}

/// The signal's arrival is all that is wanted of it.
extern "C" fn ignore(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut c_void) {}

/// Installs the process-wide handler of [`kick_signal`], which does nothing (the default action
/// would end the process).
pub(crate) fn install_handler() -> Result<(), Error> {
    register_signal_handler(kick_signal(), ignore).map_err(|cause| Error::Signal {
        operation: "sigaction",
        cause: io::Error::from_raw_os_error(cause.errno()),
    })
}

/// Gets one vCPU out of the guest, from any thread. Cheap to clone.
///
/// Publish what the vCPU thread shall do *before* [`kick`](Self::kick); the thread looks for it
/// after [`crate::VcpuExit::Interrupted`].
#[derive(Clone, Debug)]
pub struct VcpuKicker {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    page: Arc<RunPage>,
    /// The thread that runs the vCPU, while it does. Held while signalling, so that the thread
    /// cannot end in between.
    thread: Mutex<Option<libc::pthread_t>>,
}

impl VcpuKicker {
    pub(crate) fn new(page: Arc<RunPage>) -> Self {
        Self {
            shared: Arc::new(Shared {
                page,
                thread: Mutex::new(None),
            }),
        }
    }

    /// Declares the calling thread to be the one that runs the vCPU, until the guard is dropped.
    /// Without it a kick takes effect at the next entry only.
    ///
    /// # Errors
    /// [`Error::Signal`] if the thread's signal mask cannot be changed.
    pub fn attach(&self) -> Result<AttachedThread, Error> {
        unblock_signal(kick_signal()).map_err(|cause| Error::Signal {
            operation: "pthread_sigmask",
            cause: io::Error::other(cause.to_string()),
        })?;
        // SAFETY: `pthread_self` has no preconditions.
        let thread = unsafe { libc::pthread_self() };
        *self.shared.thread.lock() = Some(thread);
        Ok(AttachedThread {
            shared: Arc::clone(&self.shared),
            not_send: PhantomData,
        })
    }

    /// Makes the vCPU's present or next run return [`crate::VcpuExit::Interrupted`] soon.
    ///
    /// # Errors
    /// [`Error::Signal`] if the thread cannot be signalled; the next entry still returns.
    pub fn kick(&self) -> Result<(), Error> {
        self.shared.page.immediate_exit().store(1, Ordering::SeqCst);
        let thread = self.shared.thread.lock();
        let Some(thread) = *thread else {
            return Ok(());
        };
        // SAFETY: the thread is alive: its guard takes the lock held here before it goes.
        match unsafe { libc::pthread_kill(thread, kick_signal()) } {
            0 => Ok(()),
            code => Err(Error::Signal {
                operation: "pthread_kill",
                cause: io::Error::from_raw_os_error(code),
            }),
        }
    }
}

/// Proof that the current thread is known to a [`VcpuKicker`].
#[derive(Debug)]
pub struct AttachedThread {
    shared: Arc<Shared>,
    /// Must be dropped by the thread it speaks of.
    not_send: PhantomData<*const ()>,
}

impl Drop for AttachedThread {
    fn drop(&mut self) {
        *self.shared.thread.lock() = None;
    }
}
