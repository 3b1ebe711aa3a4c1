//! A VMM whose guest's serial port is its own standard input and output.
//!
//! Pipes lose nothing and let bytes go both ways, and every VMM can do it: so demo and bench treat
//! all of them alike.

use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use parking_lot::Mutex;

use crate::guest_output::{GuestLog, Tick, Verify};
use crate::process::wait_for;

/// What has come from the guest.
#[derive(Debug, Default)]
struct Heard {
    bytes: Vec<u8>,
    first: Option<Instant>,
}

/// A running VMM and what its guest says. Killed when dropped.
#[derive(Debug)]
pub struct Console {
    child: Child,
    name: String,
    input: ChildStdin,
    heard: Arc<Mutex<Heard>>,
    taken: usize,
    started: Instant,
    log: PathBuf,
}

impl Console {
    /// Starts `command`, whose standard error goes to `log`.
    ///
    /// # Errors
    /// When the log cannot be made or the program cannot be started.
    pub fn start(name: &str, mut command: Command, log: &Path) -> Result<Self> {
        let errors = File::create(log).with_context(|| format!("cannot make {}", log.display()))?;
        let started = Instant::now();
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(errors)
            .spawn()
            .with_context(|| format!("cannot start {name}: {command:?}"))?;
        let input = child.stdin.take().context("no pipe to the guest")?;
        let output = child.stdout.take().context("no pipe from the guest")?;
        let heard = Arc::new(Mutex::new(Heard::default()));
        let shared = Arc::clone(&heard);
        // Ends by itself when the VMM does.
        thread::Builder::new()
            .name(format!("{name}-console"))
            .spawn(move || listen(output, &shared))?;
        Ok(Self {
            child,
            name: name.to_owned(),
            input,
            heard,
            taken: 0,
            started,
            log: log.to_owned(),
        })
    }

    /// Process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// When it was started.
    pub fn started(&self) -> Instant {
        self.started
    }

    /// From the start of the process to the guest's first byte, once there is one.
    pub fn first_byte(&self) -> Option<Duration> {
        let first = self.heard.lock().first?;
        Some(first - self.started)
    }

    /// Everything the guest has said to this VMM.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.heard.lock().bytes).into_owned()
    }

    /// Says `bytes` to the guest.
    ///
    /// # Errors
    /// When the VMM has ended.
    pub fn say(&mut self, bytes: &[u8]) -> Result<()> {
        self.input
            .write_all(bytes)
            .with_context(|| format!("cannot speak to the guest: {}", self.words()))
    }

    /// Gives what the guest has said since the last call.
    pub fn take(&mut self) -> Vec<u8> {
        let heard = self.heard.lock();
        let new = heard.bytes.get(self.taken..).unwrap_or_default().to_vec();
        self.taken = heard.bytes.len();
        new
    }

    /// Feeds `log` with what the native guest has said since the last call.
    ///
    /// # Errors
    /// When the VMM has ended, or a line cannot be read.
    pub fn read_into(&mut self, log: &mut GuestLog) -> Result<()> {
        let bytes = self.take();
        log.feed(&bytes)?;
        if bytes.is_empty() {
            self.check()?;
        }
        Ok(())
    }

    /// Feeds `log` until `found` gives something.
    ///
    /// # Errors
    /// When it does not within `limit`, or the VMM ends.
    pub fn read_until<T>(
        &mut self,
        log: &mut GuestLog,
        what: &str,
        limit: Duration,
        mut found: impl FnMut(&GuestLog) -> Option<T>,
    ) -> Result<T> {
        wait_for(what, limit, || {
            self.read_into(log)?;
            Ok(found(log))
        })
        .with_context(|| self.words())
    }

    /// Waits for the native guest's next report.
    ///
    /// # Errors
    /// When none comes within `limit`, or the VMM ends.
    pub fn next_tick(&mut self, log: &mut GuestLog, limit: Duration) -> Result<Tick> {
        let before = log.ticks().count();
        self.read_until(log, "a report of the guest", limit, |log| {
            log.ticks().nth(before).cloned()
        })
    }

    /// Has the native guest check all of its memory.
    ///
    /// # Errors
    /// When it does not within `limit`, or the VMM ends.
    pub fn verify(&mut self, log: &mut GuestLog, limit: Duration) -> Result<Verify> {
        let before = log.verifies().count();
        self.say(b"v")?;
        self.read_until(log, "the guest's audit", limit, |log| {
            log.verifies().nth(before).copied()
        })
    }

    /// Fails, with its last words, unless it still runs.
    ///
    /// # Errors
    /// When it has ended.
    pub fn check(&mut self) -> Result<()> {
        if let Some(status) = self.child.try_wait()? {
            bail!("{} ended with {status}; {}", self.name, self.words());
        }
        Ok(())
    }

    /// Whether it has ended.
    pub fn has_ended(&mut self) -> bool {
        !matches!(self.child.try_wait(), Ok(None))
    }

    /// The last lines of VMM and guest, for a message.
    pub fn words(&self) -> String {
        let errors = std::fs::read(&self.log).unwrap_or_default();
        let errors = String::from_utf8_lossy(&errors).into_owned();
        format!(
            "{} said:\n{}\nits guest said:\n{}",
            self.name,
            tail(&errors),
            tail(&self.text())
        )
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        // It may have ended by itself, which is as good.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn tail(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(15)..].join("\n")
}

fn listen(mut from: impl Read, heard: &Mutex<Heard>) {
    let mut buffer = [0; 4096];
    while let Ok(count) = from.read(&mut buffer) {
        let now = Instant::now();
        let Some(bytes) = buffer.get(..count).filter(|bytes| !bytes.is_empty()) else {
            return;
        };
        let mut heard = heard.lock();
        heard.first.get_or_insert(now);
        heard.bytes.extend_from_slice(bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said_comes_back_in_pieces_and_the_end_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let mut command = Command::new("sh");
        command.args(["-c", "head -c 5; echo gone >&2"]);
        let mut console = Console::start("echo", command, &dir.path().join("log")).unwrap();
        console.say(b"ab").unwrap();
        console.say(b"cde").unwrap();
        wait_for("five bytes", Duration::from_secs(5), || {
            Ok((console.text().len() == 5).then_some(()))
        })
        .unwrap();
        assert_eq!(console.take(), b"abcde");
        assert!(console.take().is_empty());
        assert!(console.first_byte().is_some());
        wait_for("its end", Duration::from_secs(5), || {
            Ok(console.has_ended().then_some(()))
        })
        .unwrap();
        let error = console.check().unwrap_err().to_string();
        assert!(error.contains("gone"), "{error}");
    }
}
