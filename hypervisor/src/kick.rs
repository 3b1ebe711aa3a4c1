//! Getting a vCPU out of the guest from another thread.
//!
//! A kick sends a real-time signal to the vCPU's thread. Its handler sets `immediate_exit` in the
//! vCPU's `kvm_run` page, so a kick that comes just before `KVM_RUN` is not lost: the run ends at
//! once (Linux `Documentation/virt/kvm/api.rst`, 5. The kvm_run structure).

use std::cell::Cell;
use std::io;
use std::sync::atomic::{AtomicU8, Ordering};

use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

thread_local! {
    static IMMEDIATE_EXIT: Cell<*const AtomicU8> = const { Cell::new(std::ptr::null()) };
}

extern "C" fn on_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    let flag = IMMEDIATE_EXIT.get();
    if !flag.is_null() {
        // SAFETY: `Bound` keeps the pointer valid while it is set; both run on this thread.
        unsafe { (*flag).store(1, Ordering::Relaxed) };
    }
}

fn kick_signal() -> libc::c_int {
    SIGRTMIN()
}

/// Installs the signal handler, once per process, before the first vCPU thread starts.
///
/// # Errors
/// The operating system's.
pub fn install_handler() -> io::Result<()> {
    register_signal_handler(kick_signal(), on_kick)
        .map_err(|error| io::Error::from_raw_os_error(error.errno()))
}

/// Binds a vCPU's `immediate_exit` to the calling thread; unbinds when dropped.
#[derive(Debug)]
pub struct Bound {
    // The pointer is only good on the thread it was set on.
    not_send: std::marker::PhantomData<*const ()>,
}

impl Bound {
    /// # Safety
    /// `flag` must stay valid until the guard is dropped.
    pub(crate) unsafe fn new(flag: *const AtomicU8) -> Self {
        IMMEDIATE_EXIT.set(flag);
        Self {
            not_send: std::marker::PhantomData,
        }
    }
}

impl Drop for Bound {
    fn drop(&mut self) {
        IMMEDIATE_EXIT.set(std::ptr::null());
    }
}

/// Kicks the thread it was made on.
#[derive(Clone, Copy, Debug)]
pub struct Kicker {
    pid: i32,
    tid: i32,
}

impl Kicker {
    /// A kicker of the calling thread.
    pub fn current_thread() -> Self {
        let tid = rustix::thread::gettid().as_raw_nonzero().get();
        let pid = rustix::process::getpid().as_raw_nonzero().get();
        Self { pid, tid }
    }

    /// Makes the thread's vCPU leave the guest, or not enter it. A thread that has ended is no
    /// error.
    pub fn kick(&self) {
        // SAFETY: tgkill reads only its integer arguments.
        unsafe { libc::syscall(libc::SYS_tgkill, self.pid, self.tid, kick_signal()) };
    }
}
