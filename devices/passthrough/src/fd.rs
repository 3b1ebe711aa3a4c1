//! Between descriptors as the standard library has them and vmm-sys-util's eventfds.

#![expect(
    unsafe_code,
    reason = "vmm-sys-util's EventFd has no safe conversions from and to owned descriptors"
)]

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};

use vmm_sys_util::eventfd::EventFd;

/// The eventfd behind `fd`.
pub(crate) fn into_event(fd: OwnedFd) -> EventFd {
    // SAFETY: `into_raw_fd` gives up ownership of an open descriptor, which the EventFd takes.
    unsafe { EventFd::from_raw_fd(fd.into_raw_fd()) }
}

/// The descriptor of `event`, for as long as it is borrowed.
pub(crate) fn borrow(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the EventFd keeps its descriptor open for the lifetime of the borrow.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

/// A descriptor of our own for an open one of this number.
#[cfg(test)]
pub(crate) fn duplicate_for_test(number: i32) -> EventFd {
    // SAFETY: the test has just seen the number, and its owner lives on.
    let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
    into_event(borrowed.try_clone_to_owned().unwrap())
}
