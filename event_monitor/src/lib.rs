//! What happens in a Ferry process, told to whoever supervises it.
//!
//! An [`Event`] is typed where it happens and is written as one JSON object on one line:
//!
//! ```json
//! {"timestamp":{"secs":1,"nanos":5000},"source":"vm","event":"migration-failed","properties":{"reason":"cut"}}
//! ```
//!
//! Names, and properties being text, follow Cloud Hypervisor; `properties` is `null` where there
//! are none. Timestamps count from the start of the monitor (made first thing in `main`) on the
//! monotonic clock and never go back from line to line.
//!
//! An [`EventMonitor`] is a cheap handle to be cloned into whatever has something to tell. Telling
//! never blocks: events wait in a bounded queue for an [`EventWriter`], which a thread of its own
//! runs. If the reader is slower than the VM, events are dropped, counted, and the count is told
//! (`events-dropped`) as soon as there is room.
//!
//! ```
//! use event_monitor::{Event, EventMonitor};
//!
//! let file = tempfile::NamedTempFile::new().unwrap();
//! let (monitor, writer) = EventMonitor::new(file.reopen().unwrap());
//! let thread = std::thread::spawn(move || writer.run());
//! monitor.tell(Event::Booting);
//! drop(monitor); // The last handle: the writer writes what is left and ends.
//! thread.join().unwrap();
//! let text = std::fs::read_to_string(file.path()).unwrap();
//! assert!(text.ends_with(",\"source\":\"vm\",\"event\":\"booting\",\"properties\":null}\n"));
//! ```

#![forbid(unsafe_code)]

mod event;
mod monitor;
mod sink;

#[cfg(test)]
mod tests;

pub use event::{Event, Side};
pub use monitor::{EventMonitor, EventWriter, QUEUE_DEPTH};
pub use sink::{Sink, SinkError, open_path};
