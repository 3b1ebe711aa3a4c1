//! TCP streams of known bytes between this host and a guest.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::linux::{Linux, lab_file};
use e2e::process::{Process, wait_for};
use serde_json::Value;

/// How long the end of a stream may take once nothing more is sent.
const DRAIN: Duration = Duration::from_secs(60);

/// Which way a stream goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Direction {
    /// From this host to the guest.
    In,
    /// From the guest to this host.
    Out,
}

/// A stream that runs.
pub(crate) struct Stream {
    name: String,
    direction: Direction,
    host: Process,
}

/// What came of a stream.
#[derive(Debug)]
pub(crate) struct Sum {
    /// Bytes that arrived.
    pub(crate) bytes: u64,
    /// The longest time without any, as the receiver saw it.
    pub(crate) longest_gap: Duration,
}

impl Stream {
    /// Starts a stream called `name` to or from `receiver` (`10.0.0.1:7000`); `limits` are more
    /// options of the sender, such as `--bytes 1000`.
    pub(crate) fn start(
        linux: &mut Linux,
        dir: &Path,
        name: &str,
        direction: Direction,
        receiver: &str,
        limits: &str,
    ) -> Result<Self> {
        let receive = format!("tcp-recv --listen {receiver}");
        let send = format!("tcp-send --to {receiver} {limits}");
        let (on_host, in_guest) = match direction {
            Direction::In => (&send, &receive),
            Direction::Out => (&receive, &send),
        };
        let start_host = || {
            let mut command = Command::new(lab_file("guest_net")?);
            command.args(on_host.split_whitespace());
            Process::start(name, command, &dir.join(format!("{name}.stream")))
        };
        let in_guest = format!("guest_net {in_guest}");
        // The receiver first.
        let host = match direction {
            Direction::In => {
                linux.shell.start_job(name, &in_guest)?;
                let shell = &mut linux.shell;
                shell.wait_job_says(name, "listening", Duration::from_secs(30))?;
                start_host()?
            }
            Direction::Out => {
                let host = start_host()?;
                wait_for("the host's receiver", Duration::from_secs(30), || {
                    Ok(host.output().contains("listening").then_some(()))
                })?;
                linux.shell.start_job(name, &in_guest)?;
                host
            }
        };
        Ok(Self {
            name: name.to_owned(),
            direction,
            host,
        })
    }

    /// Waits until the host's end has reported `more` bytes than now: the stream flows.
    pub(crate) fn wait_flow(&mut self, more: u64, limit: Duration) -> Result<()> {
        let bytes =
            |host: &Process| last_line(&host.output()).map_or(0, |line| number(&line, "bytes"));
        let goal = bytes(&self.host) + more;
        wait_for(&format!("progress of {}", self.name), limit, || {
            self.host.check()?;
            Ok((bytes(&self.host) >= goal).then_some(()))
        })
        .with_context(|| self.host.output())
    }

    /// Waits for the end of the stream, which has its limits; both ends must agree on all bytes.
    pub(crate) fn finish(self, linux: &mut Linux) -> Result<Sum> {
        self.finish_within(linux, DRAIN)
    }

    /// As [`Stream::finish`], of a stream that may still take that long.
    pub(crate) fn finish_within(mut self, linux: &mut Linux, limit: Duration) -> Result<Sum> {
        let guest = linux.shell.end_job(&self.name, limit)?;
        let status = self.host.wait(DRAIN)?;
        let about = || {
            format!(
                "{}: host {status}\n{}guest {}\n{}",
                self.name,
                self.host.output(),
                guest.status,
                guest.output
            )
        };
        ensure!(status.success() && guest.status == 0, "{}", about());
        let host_line = last_line(&self.host.output()).with_context(about)?;
        let guest_line = last_line(&guest.output).with_context(about)?;
        let (sender, receiver) = match self.direction {
            Direction::In => (host_line, guest_line),
            Direction::Out => (guest_line, host_line),
        };
        let same = |key: &str| !sender[key].is_null() && sender[key] == receiver[key];
        let done = sender["event"] == "done" && receiver["event"] == "done";
        ensure!(done && same("bytes") && same("crc32c"), "{}", about());
        ensure!(receiver["first_wrong_byte"].is_null(), "{}", about());
        Ok(Sum {
            bytes: number(&receiver, "bytes"),
            longest_gap: Duration::from_millis(number(&receiver, "longest_gap_ms")),
        })
    }

    /// Has the sender stop, then as [`Stream::finish`].
    pub(crate) fn stop(self, linux: &mut Linux) -> Result<Sum> {
        match self.direction {
            Direction::In => self.host.terminate()?,
            Direction::Out => linux.shell.stop_job(&self.name)?,
        }
        self.finish(linux)
    }
}

fn last_line(output: &str) -> Option<Value> {
    let mut lines = output.split_inclusive('\n').rev();
    let line = lines.find(|line| line.ends_with('\n') && line.starts_with('{'))?;
    serde_json::from_str(line).ok()
}

fn number(line: &Value, key: &str) -> u64 {
    line[key].as_u64().unwrap_or_default()
}
