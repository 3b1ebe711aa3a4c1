//! Something between the two sides that does what networks do.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use super::rig::connection;
use crate::migrate::frame::{HEADER_BYTES, Kind};
use crate::migrate::{CancelHandle, Connection};

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Way {
    ToDestination,
    ToSource,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Fault {
    /// The connection ends before the frame.
    Cut,
    /// The connection ends within the frame.
    CutWithin,
    /// A bit of the frame changes.
    Corrupt,
    /// Nothing passes any more, in either direction, and nobody is told.
    Stall,
    /// The frame comes twice.
    Repeat,
    /// The frame does not come.
    Lose,
    /// The frame and all after it in this direction come late.
    Delay,
}

/// How late [`Fault::Delay`] is.
pub(super) const DELAY: Duration = Duration::from_millis(1500);

/// A fault at the frame of this number (not counting signs of life) in one direction.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Plan {
    pub(super) way: Way,
    pub(super) frame: usize,
    pub(super) fault: Fault,
}

/// What passed: the kinds of frames, in both directions.
#[derive(Clone, Default)]
pub(super) struct Passed {
    counts: Arc<[AtomicUsize; 2]>,
}

impl Passed {
    pub(super) fn count(&self, way: Way) -> usize {
        self.counts[usize::from(way == Way::ToSource)].load(Ordering::SeqCst)
    }
}

/// Connections with a relay between them.
pub(super) fn relayed(plan: Option<Plan>) -> ((Connection, Connection), [CancelHandle; 2], Passed) {
    let (source, near) = UnixStream::pair().unwrap();
    let (far, destination) = UnixStream::pair().unwrap();
    let passed = Passed::default();
    let stalled = Arc::new(AtomicBool::new(false));
    for (way, from, to) in [
        (Way::ToDestination, &near, &far),
        (Way::ToSource, &far, &near),
    ] {
        let pump = Pump {
            way,
            from: from.try_clone().unwrap(),
            to: to.try_clone().unwrap(),
            plan: plan.filter(|plan| plan.way == way),
            passed: passed.clone(),
            stalled: stalled.clone(),
        };
        std::thread::spawn(move || pump.run());
    }
    let handles = [CancelHandle::new().unwrap(), CancelHandle::new().unwrap()];
    let to = connection(source, "the destination", &handles[0]);
    let from = connection(destination, "the source", &handles[1]);
    ((to, from), handles, passed)
}

struct Pump {
    way: Way,
    from: UnixStream,
    to: UnixStream,
    plan: Option<Plan>,
    passed: Passed,
    stalled: Arc<AtomicBool>,
}

impl Pump {
    fn run(mut self) {
        while let Some(mut frame) = self.next() {
            if self.stalled.load(Ordering::SeqCst) {
                continue;
            }
            let due = frame[6] != Kind::Progress.code() && {
                let counter = &self.passed.counts[usize::from(self.way == Way::ToSource)];
                let number = counter.fetch_add(1, Ordering::SeqCst);
                self.plan.is_some_and(|plan| plan.frame == number)
            };
            let fault = self.plan.filter(|_| due).map(|plan| plan.fault);
            match fault {
                Some(Fault::Cut) => return self.cut(),
                Some(Fault::CutWithin) => {
                    let _ = self.to.write_all(&frame[..frame.len() / 2]);
                    return self.cut();
                }
                Some(Fault::Corrupt) => {
                    // Sometimes in the payload, sometimes in the sequence number.
                    let at = (frame.len() - 1).min(1000);
                    frame[if at < HEADER_BYTES { 8 } else { at }] ^= 4;
                }
                Some(Fault::Stall) => {
                    self.stalled.store(true, Ordering::SeqCst);
                    continue;
                }
                Some(Fault::Lose) => continue,
                Some(Fault::Delay) => std::thread::sleep(DELAY),
                Some(Fault::Repeat) => {
                    let _ = self.to.write_all(&frame);
                }
                None => {}
            }
            if self.to.write_all(&frame).is_err() {
                break;
            }
        }
        let _ = self.to.shutdown(Shutdown::Write);
        let _ = self.from.shutdown(Shutdown::Read);
    }

    fn next(&mut self) -> Option<Vec<u8>> {
        let mut frame = vec![0; HEADER_BYTES];
        self.from.read_exact(&mut frame).ok()?;
        let length = u32::from_le_bytes(frame[16..20].try_into().unwrap());
        frame.resize(HEADER_BYTES + usize::try_from(length).unwrap(), 0);
        self.from.read_exact(&mut frame[HEADER_BYTES..]).ok()?;
        Some(frame)
    }

    fn cut(&self) {
        let _ = self.to.shutdown(Shutdown::Both);
        let _ = self.from.shutdown(Shutdown::Both);
    }
}
