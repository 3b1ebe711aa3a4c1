//! The serial port at 0x3f8: the guest's only voice and ear.
//!
//! A byte costs an exit to the VMM (66 µs on the slowest KVM known), a line
//! some 30 ms. Lines are therefore queued, and [`pump`] sends one byte at a
//! time between other work.

use core::fmt::{self, Write};

use crate::cpu::{inb, outb};
use crate::sync::SpinLock;

const DATA: u16 = 0x3f8;
const FIFO_CONTROL: u16 = DATA + 2;
const LINE_STATUS: u16 = DATA + 5;
const LSR_DATA_READY: u8 = 1;
const LSR_TRANSMITTER_EMPTY: u8 = 1 << 5;
/// What an absent port reads as.
const LSR_ABSENT: u8 = 0xff;
/// Bytes a 16550A takes once its transmitter is empty.
const FIFO_BYTES: u8 = 16;
const QUEUE_BYTES: usize = 16384;
/// Two reports or so: from here on the line is slower than what is said.
const MANY_BYTES: usize = 2048;

struct Queue {
    bytes: [u8; QUEUE_BYTES],
    head: usize,
    len: usize,
    /// Bytes the FIFO takes before the line status must be asked again.
    credit: u8,
}

static QUEUE: SpinLock<Queue> = SpinLock::new(Queue {
    bytes: [0; QUEUE_BYTES],
    head: 0,
    len: 0,
    credit: 0,
});

impl Queue {
    /// Sends one byte if there is one and the port takes it.
    fn pump(&mut self) -> bool {
        if self.len == 0 {
            return false;
        }
        if self.credit == 0 {
            if inb(LINE_STATUS) & LSR_TRANSMITTER_EMPTY == 0 {
                return false;
            }
            self.credit = FIFO_BYTES;
        }
        self.credit -= 1;
        outb(DATA, self.bytes[self.head]);
        self.head = (self.head + 1) % QUEUE_BYTES;
        self.len -= 1;
        true
    }

    /// Sends until `left` bytes or fewer are queued. A port that takes nothing
    /// for long loses the bytes: the guest's work must go on.
    fn drain(&mut self, left: usize) {
        let mut refusals = 0;
        while self.len > left {
            if self.pump() {
                refusals = 0;
            } else {
                refusals += 1;
                if refusals > 100_000 {
                    self.len = 0;
                }
            }
        }
    }
}

impl Write for Queue {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for &byte in text.as_bytes() {
            self.drain(QUEUE_BYTES - 1);
            self.bytes[(self.head + self.len) % QUEUE_BYTES] = byte;
            self.len += 1;
        }
        Ok(())
    }
}

/// Queues a line, whole, whichever CPU says it.
pub(crate) fn say_line(text: fmt::Arguments<'_>) {
    let mut queue = QUEUE.lock();
    // The queue's `write_str` never fails, so formatting cannot.
    let _ = queue.write_fmt(text);
    let _ = queue.write_str("\n");
}

/// Queues a line built by several writes.
pub(crate) fn say_with(build: impl FnOnce(&mut dyn Write) -> fmt::Result) {
    let mut queue = QUEUE.lock();
    let _ = build(&mut *queue);
    let _ = queue.write_str("\n");
}

/// Queues a formatted line.
macro_rules! say {
    ($($part:tt)*) => { $crate::serial::say_line(format_args!($($part)*)) };
}
pub(crate) use say;

/// The very first words, straight to the port: no queue, no status.
pub(crate) fn say_raw(text: &str) {
    outb(FIFO_CONTROL, 1);
    // `Raw` never fails.
    let _ = Raw.write_str(text);
}

/// The port without queue and lock, for the first words and the last.
pub(crate) struct Raw;

impl Write for Raw {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for &byte in text.as_bytes() {
            outb(DATA, byte);
        }
        Ok(())
    }
}

/// Sends a queued byte, or some when many wait; whether it did.
pub(crate) fn pump() -> bool {
    let mut queue = QUEUE.lock();
    let bytes = if queue.len < MANY_BYTES {
        1
    } else {
        FIFO_BYTES
    };
    (0..bytes).fold(false, |sent, _| queue.pump() | sent)
}

/// Sends everything queued.
pub(crate) fn flush() {
    QUEUE.lock().drain(0);
}

/// A byte from the other side, if one has come.
pub(crate) fn heard() -> Option<u8> {
    let status = inb(LINE_STATUS);
    (status != LSR_ABSENT && status & LSR_DATA_READY != 0).then(|| inb(DATA))
}
