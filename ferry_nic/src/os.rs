//! Between vmm-sys-util's eventfds, signals, and safe Rust.

#![expect(
    unsafe_code,
    reason = "EventFd has no safe conversion to an owned descriptor, and waiting for signals none at all"
)]

use std::io;
use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};

use vmm_sys_util::eventfd::EventFd;

/// A descriptor of its own for what `event` is.
///
/// # Errors
/// The operating system's, if there are too many descriptors.
pub(crate) fn duplicate(event: &EventFd) -> io::Result<OwnedFd> {
    let copy = event.try_clone()?;
    // SAFETY: `into_raw_fd` gives up ownership of an open descriptor, which the OwnedFd takes.
    Ok(unsafe { OwnedFd::from_raw_fd(copy.into_raw_fd()) })
}

/// Keeps `signals` from ending the process: they wait for [`wait_for_signal`]. For the calling
/// thread and those it starts.
///
/// # Errors
/// The operating system's.
pub fn block_signals(signals: &[i32]) -> io::Result<()> {
    for signal in signals {
        vmm_sys_util::signal::block_signal(*signal)
            .map_err(|error| io::Error::other(format!("signal {signal}: {error:?}")))?;
    }
    Ok(())
}

/// Waits until one of `signals` is pending for the process; which.
///
/// # Errors
/// The operating system's.
pub fn wait_for_signal(signals: &[i32]) -> io::Result<i32> {
    let set = vmm_sys_util::signal::create_sigset(signals)?;
    let mut number = 0;
    // SAFETY: both pointers are to live variables of the right types.
    match unsafe { libc::sigwait(&raw const set, &raw mut number) } {
        0 => Ok(number),
        error => Err(io::Error::from_raw_os_error(error)),
    }
}
