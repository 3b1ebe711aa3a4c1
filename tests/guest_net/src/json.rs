//! One line of output.

use std::fmt::Write as _;
use std::io::Write as _;

/// A JSON object under construction.
#[derive(Debug)]
pub(crate) struct Line(String);

impl Line {
    /// An object whose first member is the name of the event.
    pub(crate) fn new(event: &str) -> Self {
        Self(String::from("{")).text("event", event)
    }

    /// Adds a string.
    pub(crate) fn text(mut self, key: &str, value: &str) -> Self {
        self.key(key);
        quote(&mut self.0, value);
        self
    }

    /// Adds bytes as hexadecimal digits.
    pub(crate) fn hex(mut self, key: &str, bytes: &[u8]) -> Self {
        self.key(key);
        self.0.push('"');
        for byte in bytes {
            let _ = write!(self.0, "{byte:02x}");
        }
        self.0.push('"');
        self
    }

    /// Adds a number.
    pub(crate) fn number(mut self, key: &str, value: impl Into<u64>) -> Self {
        self.key(key);
        let _ = write!(self.0, "{}", value.into());
        self
    }

    /// Adds a number, or `null`.
    pub(crate) fn maybe(mut self, key: &str, value: Option<u64>) -> Self {
        match value {
            Some(value) => self.number(key, value),
            None => {
                self.key(key);
                self.0.push_str("null");
                self
            }
        }
    }

    /// Adds a list of numbers.
    pub(crate) fn numbers(mut self, key: &str, values: &[u32]) -> Self {
        self.key(key);
        let _ = write!(self.0, "{values:?}");
        self
    }

    /// Adds a truth value.
    pub(crate) fn truth(mut self, key: &str, value: bool) -> Self {
        self.key(key);
        let _ = write!(self.0, "{value}");
        self
    }

    /// The object as text.
    pub(crate) fn finish(mut self) -> String {
        self.0.push('}');
        self.0
    }

    /// Prints the object at once: the reader may be waiting at the other end of a serial line.
    pub(crate) fn print(self) -> std::io::Result<()> {
        let mut out = std::io::stdout().lock();
        writeln!(out, "{}", self.finish())?;
        out.flush()
    }

    fn key(&mut self, key: &str) {
        if self.0.len() > 1 {
            self.0.push(',');
        }
        quote(&mut self.0, key);
        self.0.push(':');
    }
}

fn quote(out: &mut String, text: &str) {
    out.push('"');
    for c in text.chars() {
        match c {
            '"' | '\\' => out.extend(['\\', c]),
            c if c.is_control() => {
                let _ = write!(out, "\\u{:04x}", u32::from(c));
            }
            c => out.push(c),
        }
    }
    out.push('"');
}
