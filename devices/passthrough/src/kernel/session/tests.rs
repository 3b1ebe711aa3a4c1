//! A device that is never ready.

use rustix::event::{EventfdFlags, eventfd};

use super::*;
use crate::kernel::sys::HostKernel;

#[test]
fn nobody_waits_longer_than_the_deadline() {
    // An eventfd that is never written is never readable.
    let file = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
    let start = Instant::now();
    let limit = Duration::from_millis(50);
    let waited = wait(&HostKernel, file.as_fd(), false, start + limit);
    assert!(matches!(waited, Err(KernelError::Stalled { .. })));
    assert!(start.elapsed() >= limit);
    wait(&HostKernel, file.as_fd(), true, Instant::now() + limit).unwrap();
}
