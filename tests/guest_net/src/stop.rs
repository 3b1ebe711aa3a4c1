//! Ending on a signal.

use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::bail;

static STOP: AtomicBool = AtomicBool::new(false);

extern "C" fn on_signal(_signal: libc::c_int) {
    STOP.store(true, Ordering::Relaxed);
}

/// Makes `SIGTERM` and `SIGINT` set what [`requested`] says, and end no blocking call for good.
pub(crate) fn install() -> anyhow::Result<()> {
    for signal in [libc::SIGTERM, libc::SIGINT] {
        // SAFETY: the handler only stores to an atomic, which may be done in a handler.
        let old = unsafe { libc::signal(signal, on_signal as *const () as libc::sighandler_t) };
        if old == libc::SIG_ERR {
            bail!(
                "cannot handle signal {signal}: {}",
                std::io::Error::last_os_error()
            );
        }
    }
    Ok(())
}

/// Whether a signal asked to end.
pub(crate) fn requested() -> bool {
    STOP.load(Ordering::Relaxed)
}
