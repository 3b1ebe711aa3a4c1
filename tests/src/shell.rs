//! Commands in a Linux guest, over its virtio console.
//!
//! The guest's side is `tests/lab/agent.sh`. The console is a unix socket of the VMM; what the
//! guest says while nobody is connected is lost, so a request is answered only to who waits.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::process::wait_for;

/// How long one read waits; the limits of callers are kept to this precision.
const PATIENCE: Duration = Duration::from_millis(100);
/// How long a guest that may not yet listen has for its first answer; twice as long each time.
const HELLO: Duration = Duration::from_secs(2);
/// Most bytes of one answer; more is a guest that has gone mad.
const MAX_ANSWER: usize = 16 << 20;

/// The VMM closed the console: its machine is gone.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("the VMM closed the guest's console")]
pub struct ConsoleClosed;

/// What a command in the guest came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// Its exit status.
    pub status: u8,
    /// What it printed, both outputs.
    pub output: String,
}

/// A connection to the agent in a guest.
#[derive(Debug)]
pub struct Shell {
    stream: UnixStream,
    received: Vec<u8>,
    requests: u64,
}

impl Shell {
    /// Connects to the console at `socket`, which need not be there yet, and waits until the agent
    /// answers.
    ///
    /// # Errors
    /// When it does not within `limit`.
    pub fn connect(socket: &Path, limit: Duration) -> Result<Self> {
        let mut shell = Self::attach(socket, limit)?;
        shell.greet(limit)?;
        Ok(shell)
    }

    /// Connects to `socket` instead, where the guest has gone, and waits until the agent answers.
    /// Jobs go on; an answer on its way is lost.
    ///
    /// # Errors
    /// When it does not within `limit`.
    pub fn follow(&mut self, socket: &Path, limit: Duration) -> Result<()> {
        // The numbers go on: an old answer must not be taken for a new one.
        let requests = self.requests;
        *self = Self::attach(socket, limit)?;
        self.requests = requests;
        self.greet(limit)
    }

    /// Connects only: the guest need not run yet.
    ///
    /// # Errors
    /// When nobody listens at `socket` within `limit`.
    pub fn attach(socket: &Path, limit: Duration) -> Result<Self> {
        let stream = wait_for("the guest's console", limit, || {
            Ok(UnixStream::connect(socket).ok())
        })?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(Duration::from_secs(5)))?;
        Ok(Self {
            stream,
            received: Vec::new(),
            requests: 0,
        })
    }

    /// Waits until the agent answers.
    ///
    /// # Errors
    /// When it does not within `limit`.
    pub fn greet(&mut self, limit: Duration) -> Result<()> {
        let deadline = Instant::now() + limit;
        let mut patience = HELLO;
        loop {
            // What is left of an interrupted request ends here.
            self.write("\n")?;
            match self.run("true", patience) {
                Ok(_) => return Ok(()),
                Err(error) if error.is::<ConsoleClosed>() || Instant::now() > deadline => {
                    return Err(error.context("the guest does not answer on its console"));
                }
                // It may be slow: an answer to an earlier question does not count.
                Err(_) => patience *= 2,
            }
        }
    }

    /// Runs `command` (one line of shell) in the guest.
    ///
    /// # Errors
    /// When there is no answer within `limit`.
    pub fn run(&mut self, command: &str, limit: Duration) -> Result<Answer> {
        ensure!(!command.contains('\n'), "more than one line: {command:?}");
        // A guest that restarted may still answer the one before.
        self.requests += 1;
        let number = self.requests;
        self.write(&format!("{number} {command}\n"))?;
        let deadline = Instant::now() + limit;
        let (line, end) = (format!("{number}: "), format!("{number}! "));
        let mut output = String::new();
        loop {
            while let Some(text) = self.next_line() {
                if let Some(text) = text.strip_prefix(&line) {
                    output.push_str(text);
                    output.push('\n');
                } else if let Some(status) = text.strip_prefix(&end) {
                    let status = status.parse().context("the guest's exit status")?;
                    return Ok(Answer { status, output });
                }
                ensure!(output.len() < MAX_ANSWER, "{command:?} does not stop");
            }
            if Instant::now() > deadline {
                bail!("{command:?}: no answer from the guest within {limit:?}; so far {output:?}");
            }
            self.receive()?;
        }
    }

    /// Runs a short `command`, which must succeed; gives what it printed.
    ///
    /// # Errors
    /// When it does not answer within a minute, or fails.
    pub fn ask(&mut self, command: &str) -> Result<String> {
        let answer = self.run(command, Duration::from_secs(60))?;
        ensure!(
            answer.status == 0,
            "{command:?} in the guest: status {}\n{}",
            answer.status,
            answer.output
        );
        Ok(answer.output)
    }

    /// Starts a job under `name`; [`Shell::job_output`] and [`Shell::end_job`] ask for it.
    ///
    /// # Errors
    /// When the guest does not answer.
    pub fn start_job(&mut self, name: &str, command: &str) -> Result<()> {
        let log = format!("/tmp/{name}");
        self.ask(&format!(
            "rm -f {log}.status; \
             ({command} > {log}.log 2>&1 & echo $! > {log}.pid; wait $!; \
             echo $? > {log}.end; mv {log}.end {log}.status) &"
        ))?;
        Ok(())
    }

    /// What a job has printed so far.
    ///
    /// # Errors
    /// When the guest does not answer.
    pub fn job_output(&mut self, name: &str) -> Result<String> {
        self.ask(&format!("cat /tmp/{name}.log"))
    }

    /// Waits until a job has printed a line with `text`.
    ///
    /// # Errors
    /// When it does not within `limit`.
    pub fn wait_job_says(&mut self, name: &str, text: &str, limit: Duration) -> Result<()> {
        let command = format!("grep -q -F '{text}' /tmp/{name}.log");
        let said = wait_for(&format!("{text:?} from {name}"), limit, || {
            let answer = self.run(&command, Duration::from_secs(30))?;
            Ok((answer.status == 0).then_some(()))
        });
        said.with_context(|| self.job_output(name).unwrap_or_default())
    }

    /// Waits for the end of a job; gives its status and what it printed.
    ///
    /// # Errors
    /// When it does not end within `limit`.
    pub fn end_job(&mut self, name: &str, limit: Duration) -> Result<Answer> {
        let status = self.wait_job(name, limit);
        let output = self.job_output(name)?;
        let status = status.with_context(|| output.clone())?;
        Ok(Answer { status, output })
    }

    /// Waits for the end of a job; gives its status.
    ///
    /// # Errors
    /// When it does not end within `limit`.
    pub fn wait_job(&mut self, name: &str, limit: Duration) -> Result<u8> {
        let command = format!("cat /tmp/{name}.status");
        wait_for(&format!("the end of {name} in the guest"), limit, || {
            let answer = self.run(&command, Duration::from_secs(60))?;
            if answer.status == 0 {
                return Ok(Some(answer.output.trim().parse::<u8>()?));
            }
            Ok(None)
        })
    }

    /// Asks a job to end.
    ///
    /// # Errors
    /// When there is none.
    pub fn stop_job(&mut self, name: &str) -> Result<()> {
        self.ask(&format!("kill $(cat /tmp/{name}.pid)")).map(drop)
    }

    /// Sends a command to which no answer can come, such as `reboot -f`.
    ///
    /// # Errors
    /// When it cannot be sent.
    pub fn send(&mut self, command: &str) -> Result<()> {
        self.requests += 1;
        self.write(&format!("{} {command}\n", self.requests))
    }

    fn write(&mut self, text: &str) -> Result<()> {
        self.stream.write_all(text.as_bytes()).map_err(lost)
    }

    /// The next whole line received, if there is one.
    fn next_line(&mut self) -> Option<String> {
        let end = self.received.iter().position(|byte| *byte == b'\n')?;
        let line: Vec<u8> = self.received.drain(..=end).collect();
        let text = String::from_utf8_lossy(&line);
        Some(text.trim_end_matches(['\r', '\n']).to_owned())
    }

    /// Takes in what has come, after waiting a little.
    fn receive(&mut self) -> Result<()> {
        let mut buffer = [0; 16 << 10];
        match self.stream.read(&mut buffer) {
            Ok(0) => return Err(ConsoleClosed.into()),
            Ok(len) => self.received.extend_from_slice(&buffer[..len]),
            Err(error) if is_idle(&error) => {}
            Err(error) => return Err(lost(error)),
        }
        Ok(())
    }
}

fn is_idle(error: &std::io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
}

/// What an error on the console means.
fn lost(error: std::io::Error) -> anyhow::Error {
    match error.kind() {
        ErrorKind::BrokenPipe | ErrorKind::ConnectionReset => ConsoleClosed.into(),
        _ => anyhow::Error::new(error).context("the guest's console"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A shell and the agent's end of it.
    fn pair() -> (Shell, UnixStream) {
        let (stream, agent) = UnixStream::pair().unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let shell = Shell {
            stream,
            received: Vec::new(),
            requests: 0,
        };
        (shell, agent)
    }

    #[test]
    fn an_answer_is_told_from_what_else_the_console_says() {
        let (mut shell, mut agent) = pair();
        agent
            .write_all(b"noise\n0! 9\r\n1: one\r\n1 echo\r\n1: \r\n1: two\r\n1! 3\r\n2! 0\n")
            .unwrap();
        let answer = shell.run("x", Duration::from_secs(5)).unwrap();
        assert_eq!((answer.status, answer.output.as_str()), (3, "one\n\ntwo\n"));
        assert_eq!(shell.ask("y").unwrap(), "");
        let mut requests = [0; 8];
        agent.read_exact(&mut requests).unwrap();
        assert_eq!(&requests, b"1 x\n2 y\n");
    }

    #[test]
    fn silence_and_a_closed_console_are_errors() {
        let (mut shell, agent) = pair();
        assert!(shell.run("x", Duration::from_millis(50)).is_err());
        assert!(shell.run("x\ny", Duration::from_millis(50)).is_err());
        drop(agent);
        let error = shell.run("x", Duration::from_secs(5)).unwrap_err();
        assert!(error.is::<ConsoleClosed>(), "{error:#}");
    }
}
