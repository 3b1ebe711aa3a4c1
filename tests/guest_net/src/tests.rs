use std::time::{Duration, Instant};

use crate::args::Args;
use crate::flow::FiveTuple;
use crate::json::Line;
use crate::pattern::{self, Crc32c};
use crate::progress::{Gaps, Schedule};

fn args(line: &str) -> anyhow::Result<Args> {
    Args::parse(line.split_whitespace().map(str::to_owned))
}

#[test]
fn command_lines_are_words_and_options() {
    let mut good = args("udp-seq --to 1 send --rate 9").unwrap();
    assert_eq!(good.word("a").unwrap(), "udp-seq");
    assert_eq!(good.word("b").unwrap(), "send");
    assert_eq!(good.required::<u8>("to").unwrap(), 1);
    assert_eq!(good.option::<u64>("rate").unwrap(), Some(9));
    assert_eq!(good.option::<u64>("seconds").unwrap(), None);
    good.finish().unwrap();
}

#[test]
fn bad_command_lines_are_explained() {
    let said = |result: anyhow::Result<()>| result.unwrap_err().to_string();
    assert_eq!(said(args("--to").map(drop)), "--to needs a value");
    assert_eq!(
        said(args("--to 1 --to 2").map(drop)),
        "--to was given twice"
    );
    assert!(said(args("").unwrap().word("COMMAND").map(drop)).contains("COMMAND is missing"));
    let number = |line| args(line).unwrap().required::<u8>("n").map(drop);
    assert!(said(number("--n x")).starts_with("--n x: invalid digit"));
    assert!(said(number("")).contains("--n is missing"));
    assert!(said(args("--x 1").unwrap().finish()).contains("--x is no option"));
    assert!(said(args("x").unwrap().finish()).contains("`x` is one word too many"));
}

#[test]
fn lines_are_json() {
    let line = Line::new("a\"b\\c\n")
        .number("n", u64::MAX)
        .maybe("none", None)
        .maybe("some", Some(1))
        .truth("t", true)
        .hex("h", &[0, 255])
        .numbers("l", &[1, 2])
        .finish();
    let expected = serde_json::json!({
        "event": "a\"b\\c\n", "n": u64::MAX, "none": null, "some": 1, "t": true, "h": "00ff",
        "l": [1, 2],
    });
    assert_eq!(
        serde_json::from_str::<serde_json::Value>(&line).unwrap(),
        expected
    );
}

#[test]
fn checksum_is_that_of_the_rfc() {
    let mut crc = Crc32c::new();
    crc.update(b"1234");
    crc.update(b"56789");
    assert_eq!(crc.value(), 0xe306_9283);
}

#[test]
fn pattern_does_not_depend_on_how_it_is_cut() {
    let (mut whole, mut parts) = ([0; 1000], [0; 1000]);
    pattern::fill(5, 3, &mut whole);
    pattern::fill(5, 3, &mut parts[..13]);
    pattern::fill(5, 16, &mut parts[13..]);
    assert_eq!(whole, parts);
    assert_eq!(pattern::mismatch(5, 3, &whole), None);
    whole[500] ^= 1;
    assert_eq!(pattern::mismatch(5, 3, &whole), Some(503));
    // Of the reference implementation of SplitMix64: its first output for seed 0.
    assert_eq!(pattern::word(0, 0), 0xe220_a839_7b1d_cdaf);
}

#[test]
fn gaps_are_between_events_and_since_the_last() {
    let start = Instant::now();
    let at = |ms| start + Duration::from_millis(ms);
    let mut gaps = Gaps::new();
    assert_eq!((gaps.longest_ms(at(99)), gaps.idle(at(99))), (0, None));
    for ms in [100, 110, 300, 310] {
        gaps.event(at(ms));
    }
    assert_eq!(gaps.longest_ms(at(320)), 190);
    assert_eq!(gaps.longest_ms(at(1310)), 1000);
    assert_eq!(gaps.idle(at(320)), Some(Duration::from_millis(10)));
}

#[test]
fn schedules_say_what_is_due() {
    let mut schedule = Schedule::new(Some(10));
    let now = Instant::now();
    assert!(!schedule.is_over(now));
    assert!(schedule.is_over(now + Duration::from_secs(10)));
    let late = now + Duration::from_secs(5);
    assert!(schedule.report_is_due(late));
    assert!(!schedule.report_is_due(late));
    assert!(schedule.report_is_due(late + Duration::from_secs(1)));
    assert!((5000..5100).contains(&schedule.due(1000, late)));
    assert_eq!(
        schedule.due(u64::MAX, late + Duration::from_secs(5)),
        u64::MAX
    );
}

#[test]
fn flows_are_found() {
    let mut frame = [0; 60];
    frame[12..15].copy_from_slice(&[8, 0, 0x45]);
    frame[23] = 17;
    frame[26..38].copy_from_slice(&[10, 0, 0, 1, 10, 0, 0, 2, 0, 7, 0, 9]);
    let flow = FiveTuple::parse(&frame).unwrap();
    assert_eq!(
        (flow.version(), flow.protocol, flow.ports),
        (4, 17, Some((7, 9)))
    );
    assert_eq!(flow.source.to_string(), "10.0.0.1");
    assert_eq!(flow.destination.to_string(), "10.0.0.2");
    assert!(flow.has_port(9) && !flow.has_port(8));
    frame[20] = 0x20;
    assert_eq!(FiveTuple::parse(&frame).unwrap().ports, None);
    assert_eq!(FiveTuple::parse(&frame[..33]), None);
    frame[13] = 6;
    assert_eq!(FiveTuple::parse(&frame), None);
}
