//! A system call that no signal cuts short, as far as that can be had, and whether it was had.

use std::io;
use std::mem::MaybeUninit;
use std::ptr;

/// Does `call` with all signals of this thread held back. Also says whether the thread may have been
/// stopped meanwhile, by what cannot be held back (SIGSTOP, a freezer, a debugger).
pub(super) fn undisturbed<T>(call: impl FnOnce() -> T) -> io::Result<(T, bool)> {
    let held = HeldSignals::hold()?;
    let before = times_slept()?;
    let answer = call();
    // Who is stopped sleeps. A lock that had to be waited for counts too, which is harmless.
    let stopped = times_slept()? != before;
    drop(held);
    Ok((answer, stopped))
}

/// How often this thread gave up its CPU because it could not go on.
fn times_slept() -> io::Result<libc::c_long> {
    let mut usage = MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY: the kernel writes a whole `rusage`.
    if unsafe { libc::getrusage(libc::RUSAGE_THREAD, usage.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: plain integers, zeroed and then written.
    Ok(unsafe { usage.assume_init() }.ru_nvcsw)
}

/// All signals of this thread are held back while it lives.
struct HeldSignals {
    before: libc::sigset_t,
}

impl HeldSignals {
    fn hold() -> io::Result<Self> {
        let mut all = MaybeUninit::<libc::sigset_t>::zeroed();
        let mut before = MaybeUninit::<libc::sigset_t>::zeroed();
        // SAFETY: it writes a whole `sigset_t`.
        unsafe { libc::sigfillset(all.as_mut_ptr()) };
        // SAFETY: reads the set just filled and writes a whole one; only this thread's mask changes.
        let failed =
            unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, all.as_ptr(), before.as_mut_ptr()) };
        if failed != 0 {
            return Err(io::Error::from_raw_os_error(failed));
        }
        // SAFETY: plain integers, zeroed and then written.
        let before = unsafe { before.assume_init() };
        Ok(Self { before })
    }
}

impl Drop for HeldSignals {
    fn drop(&mut self) {
        // SAFETY: reads a whole set; nothing is written. It cannot fail with a valid command.
        unsafe {
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.before, ptr::null_mut())
        };
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::thread;
    use std::time::Duration;

    use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler, unblock_signal};

    use super::*;

    static HANDLED: AtomicU32 = AtomicU32::new(0);

    extern "C" fn count(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
        HANDLED.fetch_add(1, Ordering::SeqCst);
    }

    #[test]
    fn signals_come_after_the_call() {
        let signal = SIGRTMIN() + 5;
        register_signal_handler(signal, count).unwrap();
        unblock_signal(signal).unwrap();
        let raise = || {
            // SAFETY: signals the calling thread, which has a handler.
            assert_eq!(unsafe { libc::raise(signal) }, 0);
            HANDLED.load(Ordering::SeqCst)
        };
        assert_eq!(raise(), 1);
        assert_eq!(undisturbed(raise).unwrap().0, 1, "it waits");
        assert_eq!(HANDLED.load(Ordering::SeqCst), 2, "it is not lost");
        assert_eq!(raise(), 3, "and the next one does not wait");
    }

    #[test]
    fn a_stop_is_noticed() {
        let (_, stopped) = undisturbed(|| thread::sleep(Duration::from_millis(1))).unwrap();
        assert!(stopped);
        let quiet = (0..100).any(|_| !undisturbed(|| ()).unwrap().1);
        assert!(quiet, "nothing sleeps here");
    }
}
