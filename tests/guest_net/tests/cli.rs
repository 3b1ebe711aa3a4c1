//! The program as a test's guest runs it: its output, its status, its signals.
#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a panic in a test is its report"
)]

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

/// A running `guest_net` and the lines it prints.
struct Program {
    child: Child,
    lines: std::io::Lines<BufReader<std::process::ChildStdout>>,
}

impl Program {
    fn start(args: &[&str]) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_guest_net"))
            .args(args)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        Self { child, lines }
    }

    /// The next line that says `event`.
    fn event(&mut self, event: &str) -> Value {
        loop {
            let line = self.lines.next().expect("the output ended").unwrap();
            let value: Value = serde_json::from_str(&line).unwrap();
            if value["event"] == event {
                return value;
            }
        }
    }

    fn terminate(&self) {
        let pid = libc::pid_t::try_from(self.child.id()).unwrap();
        // SAFETY: no addresses are passed; the child has not been waited for, so the id is its.
        assert_eq!(unsafe { libc::kill(pid, libc::SIGTERM) }, 0);
    }

    fn status(mut self) -> Option<i32> {
        self.child.wait().unwrap().code()
    }
}

#[test]
fn a_stream_from_one_program_to_the_other() {
    let mut receiver = Program::start(&["tcp-recv", "--listen", "127.0.0.1:0"]);
    let address = receiver.event("listening")["address"]
        .as_str()
        .unwrap()
        .to_owned();
    let mut sender = Program::start(&["tcp-send", "--to", &address, "--bytes", "3000000"]);
    let (sent, received) = (sender.event("done"), receiver.event("done"));
    assert_eq!(sent["bytes"], 3_000_000);
    assert_eq!(received["bytes"], 3_000_000);
    assert_eq!(sent["crc32c"], received["crc32c"]);
    assert_eq!(received["first_wrong_byte"], Value::Null);
    assert_eq!((sender.status(), receiver.status()), (Some(0), Some(0)));
}

#[test]
fn numbered_packets_from_one_program_to_the_other() {
    let options = ["udp-seq", "recv", "--listen", "127.0.0.1:0", "--idle", "1"];
    let mut receiver = Program::start(&options);
    let address = receiver.event("listening")["address"]
        .as_str()
        .unwrap()
        .to_owned();
    let options = [
        "udp-seq", "send", "--to", &address, "--count", "200", "--rate", "1000",
    ];
    let mut sender = Program::start(&options);
    let (sent, received) = (sender.event("done"), receiver.event("done"));
    assert_eq!((&sent["sent"], &sent["errors"]), (&200.into(), &0.into()));
    assert_eq!(
        (&received["received"], &received["lost"]),
        (&200.into(), &0.into())
    );
    // It ended because nothing came for a second.
    assert!(
        received["longest_gap_ms"].as_u64().unwrap() >= 1000,
        "{received}"
    );
    assert_eq!((sender.status(), receiver.status()), (Some(0), Some(0)));
}

#[test]
fn dirty_reports_and_ends_on_a_signal() {
    let mut dirty = Program::start(&["dirty", "--mib", "2", "--rate", "8"]);
    assert_eq!(dirty.event("ready")["pages"], 512);
    let progress = dirty.event("progress");
    assert_eq!(progress["corrupt"], 0);
    let asked = Instant::now();
    dirty.terminate();
    let done = dirty.event("done");
    assert!(asked.elapsed() < Duration::from_secs(5));
    assert_eq!(
        (&done["corrupt"], &done["counts_right"]),
        (&0.into(), &true.into())
    );
    assert!(
        done["writes"].as_u64() > Some(512) && done["verified"].as_u64() > Some(512),
        "{done}"
    );
    assert_eq!(dirty.status(), Some(0));
}

#[test]
fn receivers_end_on_a_signal() {
    let mut receiver = Program::start(&["udp-seq", "recv", "--listen", "127.0.0.1:0"]);
    receiver.event("listening");
    receiver.terminate();
    assert_eq!(receiver.event("done")["received"], 0);
    assert_eq!(receiver.status(), Some(0));
}

#[test]
fn mistakes_have_status_2() {
    for args in [
        &["nonsense"][..],
        &["dirty"],
        &["dirty", "--mib", "0"],
        &["udp-seq", "x"],
    ] {
        assert_eq!(Program::start(args).status(), Some(2), "{args:?}");
    }
    assert_eq!(Program::start(&["--help"]).status(), Some(0));
}
