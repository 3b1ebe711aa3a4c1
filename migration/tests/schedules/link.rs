//! The connection, and the destination at its end.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use shuttle::sync::atomic::AtomicBool;
use shuttle::sync::mpsc::{Receiver, Sender, channel};
use shuttle::thread::{self, JoinHandle};

use super::guest::{Content, PAGES};

/// What the destination has of each page.
#[derive(Clone, Debug)]
pub(crate) struct Arrived(pub(crate) Arc<Mutex<Vec<Option<Content>>>>);

impl Arrived {
    /// Nothing.
    pub(crate) fn new() -> Self {
        Self(Arc::new(Mutex::new(vec![None; PAGES])))
    }
}

enum Frame {
    Pages(Vec<(usize, Content)>),
    RoundEnd,
}

/// A connection to a destination that reads it in its own time.
pub(crate) struct Link {
    frames: Sender<Frame>,
    acknowledgements: Receiver<()>,
    broken: Arc<AtomicBool>,
    destination: JoinHandle<()>,
}

impl Link {
    pub(crate) fn new(arrived: &Arrived) -> Self {
        let (frames, received) = channel();
        let (acknowledge, acknowledgements) = channel();
        let broken = Arc::new(AtomicBool::new(false));
        let (arrived, lost) = (arrived.clone(), Arc::clone(&broken));
        let destination = thread::spawn(move || {
            while let Ok(frame) = received.recv() {
                if lost.load(Ordering::SeqCst) {
                    return;
                }
                match frame {
                    Frame::Pages(pages) => {
                        let mut arrived = arrived.0.lock().unwrap();
                        for (page, content) in pages {
                            arrived[page] = Some(content);
                        }
                    }
                    Frame::RoundEnd => {
                        // The source may have hung up.
                        let _ = acknowledge.send(());
                    }
                }
            }
        });
        Self {
            frames,
            acknowledgements,
            broken,
            destination,
        }
    }

    pub(crate) fn send(&self, pages: Vec<(usize, Content)>) {
        self.frames.send(Frame::Pages(pages)).unwrap();
    }

    pub(crate) fn end_round(&self) {
        self.frames.send(Frame::RoundEnd).unwrap();
    }

    pub(crate) fn wait(&self) {
        self.acknowledgements.recv().unwrap();
    }

    /// Breaks: frames on the way are lost, which of them is chance.
    pub(crate) fn cut(self) {
        self.broken.store(true, Ordering::SeqCst);
        self.close();
    }

    /// Ends when everything is read.
    pub(crate) fn close(self) {
        drop(self.frames);
        self.destination.join().unwrap();
    }
}
