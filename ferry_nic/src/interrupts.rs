//! MSI-X vectors whose triggers go to the client.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use devices::{InterruptError, MsiFabric, MsiLine, MsiMessage};
use parking_lot::{Mutex, RwLock};
use rustix::fs::OFlags;
use rustix::io::Errno;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// One vector.
///
/// Masking is the client's business: a trigger always goes to its eventfd, whose count is the
/// pending bit. A trigger before there is an eventfd is kept and passed on when there is one.
struct ClientLine {
    kept: EventFd,
    client: RwLock<Option<OwnedFd>>,
}

impl ClientLine {
    fn new() -> Result<Self, InterruptError> {
        let kept = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(failed("creation"))?;
        Ok(Self {
            kept,
            client: RwLock::new(None),
        })
    }

    fn connect(&self, eventfd: OwnedFd) -> Result<(), Errno> {
        // A client that fills its eventfd up must not make a worker thread wait.
        let flags = rustix::fs::fcntl_getfl(&eventfd)?;
        rustix::fs::fcntl_setfl(&eventfd, flags | OFlags::NONBLOCK)?;
        let mut client = self.client.write();
        if self.kept.read().is_ok() {
            signal(&eventfd)?;
        }
        *client = Some(eventfd);
        Ok(())
    }

    fn disconnect(&self) {
        *self.client.write() = None;
        // What was meant for this client is not for the next. An empty eventfd says so, which is
        // fine.
        let _ = self.kept.read();
    }
}

/// Adds one to an eventfd; one that is full is signalled as it is.
fn signal(eventfd: &OwnedFd) -> Result<(), Errno> {
    match rustix::io::write(eventfd, &1_u64.to_ne_bytes()) {
        Ok(_) | Err(Errno::AGAIN) => Ok(()),
        Err(errno) => Err(errno),
    }
}

fn failed(operation: &'static str) -> impl Fn(std::io::Error) -> InterruptError {
    move |cause| InterruptError::Backend { operation, cause }
}

impl MsiLine for ClientLine {
    fn trigger(&self) -> Result<(), InterruptError> {
        match &*self.client.read() {
            Some(eventfd) => signal(eventfd).map_err(|errno| failed("trigger")(errno.into())),
            None => self.kept.write(1).map_err(failed("trigger")),
        }
    }

    fn eventfd(&self) -> &EventFd {
        &self.kept
    }

    fn route(&self, _message: Option<MsiMessage>) -> Result<(), InterruptError> {
        // The client routes.
        Ok(())
    }

    fn is_pending(&self) -> bool {
        // The client has the pending bits.
        false
    }
}

/// All vectors of one device.
#[derive(Default)]
pub struct ClientFabric {
    lines: Mutex<Vec<Arc<ClientLine>>>,
}

impl ClientFabric {
    /// Number of vectors given out.
    pub fn vectors(&self) -> u32 {
        u32::try_from(self.lines.lock().len()).unwrap_or(u32::MAX)
    }

    /// Has the vectors from `start` on signal `eventfds`.
    ///
    /// # Errors
    /// EINVAL beyond the last vector; the operating system's for what is no eventfd.
    pub fn connect(&self, start: u32, eventfds: Vec<OwnedFd>) -> Result<(), Errno> {
        let start = usize::try_from(start).map_err(|_| Errno::INVAL)?;
        let lines = self.lines.lock();
        for (index, eventfd) in (start..).zip(eventfds) {
            lines.get(index).ok_or(Errno::INVAL)?.connect(eventfd)?;
        }
        Ok(())
    }

    /// Takes the eventfds of `count` vectors from `start` on away.
    pub fn disconnect(&self, start: u32, count: u32) {
        let start = usize::try_from(start).unwrap_or(usize::MAX);
        let count = usize::try_from(count).unwrap_or(usize::MAX);
        for line in self.lines.lock().iter().skip(start).take(count) {
            line.disconnect();
        }
    }

    /// Takes all eventfds away.
    pub fn disconnect_all(&self) {
        self.disconnect(0, u32::MAX);
    }

    /// Triggers `count` vectors from `start` on, as a client may ask for.
    ///
    /// # Errors
    /// EIO if a vector cannot be triggered.
    pub fn trigger(&self, start: u32, count: u32) -> Result<(), Errno> {
        let start = usize::try_from(start).unwrap_or(usize::MAX);
        let count = usize::try_from(count).unwrap_or(usize::MAX);
        for line in self.lines.lock().iter().skip(start).take(count) {
            line.trigger().map_err(|_| Errno::IO)?;
        }
        Ok(())
    }
}

impl MsiFabric for ClientFabric {
    fn allocate(&self, count: u16) -> Result<Vec<Arc<dyn MsiLine>>, InterruptError> {
        let fresh = (0..count)
            .map(|_| ClientLine::new().map(Arc::new))
            .collect::<Result<Vec<_>, _>>()?;
        self.lines.lock().extend(fresh.iter().cloned());
        Ok(fresh.into_iter().map(|line| line as _).collect())
    }
}

#[cfg(test)]
mod tests {
    use rustix::event::{EventfdFlags, eventfd};

    use super::*;

    fn count(eventfd: &OwnedFd) -> u64 {
        let mut bytes = [0; 8];
        match rustix::io::read(eventfd, &mut bytes) {
            Ok(_) => u64::from_ne_bytes(bytes),
            Err(_) => 0,
        }
    }

    #[test]
    fn triggers_go_to_the_client_and_early_ones_are_kept() {
        let fabric = ClientFabric::default();
        let lines = fabric.allocate(2).unwrap();
        assert_eq!(fabric.vectors(), 2);
        lines[1].trigger().unwrap();
        let event = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        let ours = event.try_clone().unwrap();
        fabric.connect(1, vec![event]).unwrap();
        assert_eq!(count(&ours), 1, "kept until there was an eventfd");
        lines[1].trigger().unwrap();
        lines[0].trigger().unwrap();
        assert_eq!(count(&ours), 1);
        fabric.disconnect_all();
        lines[1].trigger().unwrap();
        assert_eq!(count(&ours), 0);
    }

    #[test]
    fn a_full_eventfd_stops_nobody() {
        let fabric = ClientFabric::default();
        let lines = fabric.allocate(1).unwrap();
        let event = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        rustix::io::write(&event, &(u64::MAX - 1).to_ne_bytes()).unwrap();
        fabric.connect(0, vec![event]).unwrap();
        lines[0].trigger().unwrap();
    }

    #[test]
    fn vectors_that_are_not_there_are_refused() {
        let fabric = ClientFabric::default();
        let _lines = fabric.allocate(1).unwrap();
        let event = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        assert_eq!(fabric.connect(1, vec![event]), Err(Errno::INVAL));
    }
}
