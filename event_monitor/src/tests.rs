use std::io::{BufRead, BufReader, PipeReader, Read};
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use super::*;

fn piped() -> (EventMonitor, PipeReader, thread::JoinHandle<()>) {
    let (reader, sink) = std::io::pipe().unwrap();
    let (monitor, writer) = EventMonitor::new(sink);
    let thread = thread::spawn(move || writer.run());
    (monitor, reader, thread)
}

fn lines(reader: impl Read) -> Vec<serde_json::Value> {
    let lines = BufReader::new(reader).lines();
    lines
        .map(|line| serde_json::from_str(&line.unwrap()).unwrap())
        .collect()
}

#[test]
fn each_event_is_one_line_with_its_name_and_text_properties() {
    let (monitor, reader, thread) = piped();
    monitor.tell(Event::MigrationMemoryIteration {
        id: 0,
        bytes: 4096,
        dirty_pages: 1,
        took_ms: 7,
    });
    monitor.tell(Event::MigrationPhase {
        side: Side::Destination,
        phase: "Loading".into(),
    });
    monitor.tell(Event::DeviceLost {
        id: "_user0".to_owned(),
        reason: "line\nbreak".to_owned(),
    });
    monitor.tell(Event::Paused);
    drop(monitor);
    thread.join().unwrap();
    let lines = lines(reader);
    let bodies: Vec<String> = lines
        .iter()
        .map(|line| {
            format!(
                "{}:{}:{}",
                line["source"], line["event"], line["properties"]
            )
        })
        .collect();
    assert_eq!(
        bodies,
        [
            r#""vm":"migration-memory-iteration":{"bytes":"4096","dirty_pages":"1","id":"0","took_ms":"7"}"#,
            r#""vm":"migration-phase":{"phase":"Loading","side":"destination"}"#,
            r#""vm":"device-lost":{"id":"_user0","reason":"line\nbreak"}"#,
            r#""vm":"paused":null"#,
        ]
    );
}

#[test]
fn stamps_never_go_back_whoever_tells() {
    let (monitor, reader, thread) = piped();
    let tellers: Vec<_> = (0..4)
        .map(|_| {
            let monitor = monitor.clone();
            thread::spawn(move || (0..100).for_each(|_| monitor.tell(Event::Booted)))
        })
        .collect();
    drop(monitor);
    let lines = lines(reader);
    tellers
        .into_iter()
        .for_each(|teller| teller.join().unwrap());
    thread.join().unwrap();
    let stamps: Vec<(u64, u64)> = lines
        .iter()
        .map(|line| {
            let stamp = &line["timestamp"];
            (
                stamp["secs"].as_u64().unwrap(),
                stamp["nanos"].as_u64().unwrap(),
            )
        })
        .collect();
    assert_eq!(stamps.len(), 400);
    assert!(stamps.is_sorted());
}

#[test]
fn a_reader_that_does_not_read_blocks_nobody_and_learns_what_it_missed() {
    let (monitor, reader, thread) = piped();
    let began = Instant::now();
    // A pipe takes 64 KiB, the queue 1024 events; this is far more.
    let told = 20_000;
    for _ in 0..told {
        monitor.tell(Event::Booted);
    }
    assert!(began.elapsed() < Duration::from_secs(5));
    assert!(!monitor.flush(Duration::from_millis(20)));
    let dropped = monitor.dropped();
    assert!(dropped > 0);
    drop(monitor);
    let lines = lines(reader);
    thread.join().unwrap();
    let count = |name: &str| lines.iter().filter(|line| line["event"] == name).count();
    let reported: u64 = lines
        .iter()
        .filter(|line| line["event"] == "events-dropped")
        .map(|line| {
            line["properties"]["count"]
                .as_str()
                .unwrap()
                .parse::<u64>()
                .unwrap()
        })
        .sum();
    assert_eq!(reported, dropped);
    assert_eq!(u64::try_from(count("booted")).unwrap() + dropped, told);
}

#[test]
fn flush_waits_for_the_last_event() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let (monitor, writer) = EventMonitor::new(file.reopen().unwrap());
    let thread = thread::spawn(move || writer.run());
    monitor.tell(Event::VmmShutdown);
    assert!(monitor.flush(Duration::from_secs(10)));
    assert_eq!(lines(file.reopen().unwrap())[0]["source"], "vmm");
    drop(monitor);
    thread.join().unwrap();
}

#[test]
fn a_reader_that_leaves_ends_the_writer_and_not_the_vm() {
    let (monitor, reader, thread) = piped();
    drop(reader);
    monitor.tell(Event::Booting);
    thread.join().unwrap();
    monitor.tell(Event::Booted);
    assert_eq!(monitor.dropped(), 1);
    assert!(monitor.flush(Duration::from_secs(10)));
}

#[test]
fn disabled_monitors_cost_nothing_and_never_wait() {
    let monitor = EventMonitor::disabled();
    monitor.tell(Event::Booting);
    assert!(monitor.flush(Duration::ZERO));
    assert_eq!(monitor.dropped(), 0);
}

#[test]
fn sinks_are_named_by_path_or_descriptor() {
    assert_eq!(
        "path=/tmp/a=b".parse::<Sink>().unwrap(),
        Sink::Path(PathBuf::from("/tmp/a=b"))
    );
    assert_eq!("fd=3".parse::<Sink>().unwrap(), Sink::Fd(3));
    for bad in ["", "path=", "fd=", "fd=-1", "fd=x", "/tmp/x", "file=/tmp/x"] {
        assert!(
            matches!(bad.parse::<Sink>(), Err(SinkError::Syntax(_))),
            "{bad}"
        );
    }
}

#[test]
fn files_are_made_and_unread_pipes_refused() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("events");
    std::fs::write(&file, "old").unwrap();
    open_path(&file).unwrap();
    assert_eq!(std::fs::read(&file).unwrap(), b"");
    let pipe = dir.path().join("pipe");
    let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
    rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, mode, 0).unwrap();
    assert!(matches!(open_path(&pipe), Err(SinkError::NoReader { .. })));
    let missing = dir.path().join("no/such/dir");
    assert!(matches!(open_path(&missing), Err(SinkError::Open { .. })));
}
