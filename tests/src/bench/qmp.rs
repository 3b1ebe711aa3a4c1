//! QEMU's control socket.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use serde_json::{Value, json};

/// How long QEMU may take to any answer.
const LIMIT: Duration = Duration::from_secs(20);

/// A connection past its greeting.
#[derive(Debug)]
pub(super) struct Qmp {
    writer: UnixStream,
    reader: BufReader<UnixStream>,
}

impl Qmp {
    /// Connects as soon as QEMU listens, and takes its greeting.
    pub(super) fn connect(path: &Path) -> Result<Self> {
        let deadline = Instant::now() + LIMIT;
        let stream = loop {
            match UnixStream::connect(path) {
                Ok(stream) => break stream,
                Err(error) if Instant::now() > deadline => {
                    return Err(error).context("QEMU does not listen");
                }
                Err(_) => std::thread::sleep(Duration::from_micros(200)),
            }
        };
        stream.set_read_timeout(Some(LIMIT))?;
        let mut this = Self {
            writer: stream.try_clone()?,
            reader: BufReader::new(stream),
        };
        this.line()?;
        this.execute("qmp_capabilities", &json!({}))?;
        Ok(this)
    }

    fn line(&mut self) -> Result<Value> {
        let mut line = String::new();
        if self.reader.read_line(&mut line)? == 0 {
            return Err(anyhow!("QEMU closed its control socket"));
        }
        Ok(serde_json::from_str(&line)?)
    }

    /// Executes one command; gives what it returns.
    pub(super) fn execute(&mut self, command: &str, arguments: &Value) -> Result<Value> {
        let order = json!({"execute": command, "arguments": arguments});
        writeln!(self.writer, "{order}")?;
        loop {
            let mut answer = self.line()?;
            if let Some(error) = answer.get("error") {
                bail!("QEMU: {command}: {}", error["desc"]);
            }
            if let Some(result) = answer.get_mut("return") {
                return Ok(result.take());
            }
        }
    }
}
