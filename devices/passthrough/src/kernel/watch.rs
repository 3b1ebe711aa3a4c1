//! News of a device: an error that it reports, and the host's wish to have it back.

use std::os::fd::AsFd;
use std::thread::JoinHandle;

use devices::{ThreadKind, ThreadSpawner};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::error::KernelError;
use crate::fd::borrow;

/// What the kernel tells of a device.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DeviceNews {
    /// An error that it cannot correct (PCI Express AER): what it does is not to be relied on.
    Failed,
    /// Somebody on the host wants it: unbinding its driver, or unplugging it, waits until it is
    /// closed. Told again while that lasts.
    Wanted,
}

/// Told of news, on a thread of its own; must not call the device.
pub type NewsHandler = Box<dyn Fn(DeviceNews) + Send>;

/// The eventfds that the kernel signals.
pub(crate) struct Signals {
    pub(crate) failed: EventFd,
    pub(crate) wanted: EventFd,
    stop: EventFd,
}

impl Signals {
    pub(crate) fn new() -> Result<Self, KernelError> {
        let event = || EventFd::new(EFD_NONBLOCK).map_err(KernelError::Resources);
        Ok(Self {
            failed: event()?,
            wanted: event()?,
            stop: event()?,
        })
    }
}

/// A thread that waits for news of a device; it ends with this.
pub(crate) struct Watch {
    stop: EventFd,
    thread: Option<JoinHandle<()>>,
}

impl Watch {
    /// Has `handler` told of what `signals` say about device `id`.
    pub(crate) fn start(
        id: &str,
        signals: Signals,
        spawner: &ThreadSpawner,
        handler: NewsHandler,
    ) -> Result<Self, KernelError> {
        let stop = signals.stop.try_clone().map_err(KernelError::Resources)?;
        // Names of threads are cut at 15 bytes.
        let name = format!("news-{id}");
        let thread = spawner
            .spawn(ThreadKind::DeviceNews, &name, move || {
                run(&signals, &handler);
            })
            .map_err(KernelError::Resources)?;
        Ok(Self {
            stop,
            thread: Some(thread),
        })
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        if self.stop.write(1).is_ok()
            && let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread that waits for a device's news panicked");
        }
    }
}

fn run(signals: &Signals, handler: &NewsHandler) {
    let told = [
        (&signals.failed, DeviceNews::Failed),
        (&signals.wanted, DeviceNews::Wanted),
    ];
    loop {
        let (failed, wanted) = (borrow(&signals.failed), borrow(&signals.wanted));
        let stop = borrow(&signals.stop);
        let mut set = [failed.as_fd(), wanted.as_fd(), stop.as_fd()]
            .map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN));
        match poll(&mut set, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return tracing::error!(%error, "waiting for a device's news"),
        }
        if signals.stop.read().is_ok() {
            return;
        }
        for (event, news) in told {
            if event.read().is_ok() {
                handler(news);
            }
        }
    }
}
