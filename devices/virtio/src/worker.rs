//! Worker threads that own what they work on and give it back when they stop.

use std::io;
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread::JoinHandle;

use devices::{ThreadKind, ThreadSpawner};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// What a worker thread does.
pub(crate) trait Work: Send + 'static {
    /// Works until `stop` is readable.
    fn run(&mut self, stop: &EventFd);
}

/// A running worker.
#[derive(Debug)]
pub(crate) struct Worker<W> {
    name: String,
    stop: EventFd,
    thread: Option<JoinHandle<()>>,
    back: Receiver<W>,
}

impl<W: Work> Worker<W> {
    /// Starts a thread called `name` that runs `work`.
    pub(crate) fn start(
        spawner: &ThreadSpawner,
        kind: ThreadKind,
        name: String,
        mut work: W,
    ) -> io::Result<Self> {
        let stop = EventFd::new(EFD_NONBLOCK)?;
        let stopped = stop.try_clone()?;
        let (give, back) = sync_channel(1);
        let thread = spawner.spawn(kind, &name, move || {
            work.run(&stopped);
            // No one takes it if the worker was dropped: then no one needs it.
            let _ = give.send(work);
        })?;
        Ok(Self {
            name,
            stop,
            thread: Some(thread),
            back,
        })
    }

    /// Stops the thread and gives back its work; the thread's name if it ended before.
    pub(crate) fn stop(mut self) -> Result<W, String> {
        self.join();
        self.back
            .try_recv()
            .map_err(|_| std::mem::take(&mut self.name))
    }
}

impl<W> Worker<W> {
    /// Tells the thread to stop without waiting for it, so that several stop at the same time.
    pub(crate) fn tell(&self) {
        if let Err(error) = self.stop.write(1) {
            // Only possible if the counter is full, and then it is readable.
            tracing::debug!(thread = self.name, %error, "worker was told to stop already");
        }
    }

    fn join(&mut self) {
        let Some(thread) = self.thread.take() else {
            return;
        };
        self.tell();
        if thread.join().is_err() {
            tracing::error!(thread = self.name, "worker panicked");
        }
    }
}

impl<W> Drop for Worker<W> {
    fn drop(&mut self) {
        self.join();
    }
}
