//! The sign of life of a busy side.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Instant;

use parking_lot::{Condvar, Mutex};

use super::Writer;
use crate::migrate::frame::{FrameBuffer, Kind};
use crate::migrate::limits::Limits;
use crate::migrate::transport::Patience;

/// A thread that sends `Progress` while its side has nothing else to say.
#[derive(Debug)]
pub(super) struct Heartbeat {
    stop: Arc<(Mutex<bool>, Condvar)>,
    thread: Option<JoinHandle<()>>,
}

impl Heartbeat {
    pub(super) fn start(writer: Arc<Mutex<Writer>>, limits: Limits) -> std::io::Result<Self> {
        let stop = Arc::new((Mutex::new(false), Condvar::new()));
        let thread = std::thread::Builder::new()
            .name("migrate-beat".into())
            .spawn({
                let stop = stop.clone();
                move || beat(&writer, limits, &stop)
            })?;
        Ok(Self {
            stop,
            thread: Some(thread),
        })
    }

    /// Ends it; no frame of its comes after. Twice is once.
    pub(super) fn stop(&mut self) {
        let (flag, condvar) = &*self.stop;
        *flag.lock() = true;
        condvar.notify_all();
        if let Some(thread) = self.thread.take() {
            // It cannot have panicked, and if so there is nothing left to do for it.
            let _ = thread.join();
        }
    }
}

impl Drop for Heartbeat {
    fn drop(&mut self) {
        self.stop();
    }
}

fn beat(writer: &Mutex<Writer>, limits: Limits, stop: &(Mutex<bool>, Condvar)) {
    let patience = Patience {
        idle: Some(limits.idle),
        until: None,
        heed_cancel: true,
    };
    let mut frame = FrameBuffer::default();
    loop {
        let (flag, condvar) = stop;
        {
            let mut stopped = flag.lock();
            if *stopped {
                return;
            }
            condvar.wait_until(&mut stopped, Instant::now() + limits.beat);
            if *stopped {
                return;
            }
        }
        // Who holds the lock is sending: that is sign of life enough.
        let Some(mut writer) = writer.try_lock() else {
            continue;
        };
        // A full socket holds enough that the peer has yet to read, and waiting for room with the
        // lock held would keep the main thread from its own frame.
        if writer.last.elapsed() < limits.beat || !writer.connection.writable_now() {
            continue;
        }
        // A failure is found by the main thread at its next frame.
        frame.clear();
        writer.send_small(Kind::Progress, &mut frame, &patience);
    }
}
