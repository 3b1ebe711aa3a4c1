//! What the native guest says on its serial port, as types.
//!
//! Each line is a word, a blank and a JSON object (`tests/guest/src/main.rs` lists them). A
//! [`GuestLog`] takes the raw bytes, in pieces of any size. After a migration, feed it the
//! destination's bytes behind the source's: the guest goes on in the middle of a line, so the two
//! outputs are one stream.

use anyhow::{Context, Result};
use serde::Deserialize;
use serde::de::DeserializeOwned;

/// How the guest tells time.
#[derive(Clone, Debug, Deserialize, PartialEq)]
pub struct Clock {
    /// Time-stamp counter when the guest's first Rust code ran.
    pub tsc: u64,
    /// Counter cycles per millisecond.
    pub tsc_khz: u64,
    /// Where that figure is from: `argument`, `cpuid-0x15`, `kvmclock`, `pit`, …, `assumed`.
    pub source: String,
}

/// A NIC the guest drives.
#[derive(Clone, Debug, Deserialize, PartialEq)]
pub struct NicInfo {
    /// Its place in [`Tick::nics`].
    pub index: u8,
    /// PCI device and function, `03.0`.
    pub slot: String,
    /// MAC address.
    pub mac: String,
    /// Negotiated feature bits, hexadecimal.
    pub features: String,
    /// Bytes of each packet's virtio-net header: 12, or 20 with hash reports.
    pub header: u32,
    /// Hash types the device offers (`VIRTIO_NET_HASH_TYPE_*`); 0 without hash reports.
    pub hash_types: u32,
    /// Entries of the receive queue.
    pub entries: u16,
    /// Whether it receives by interrupts.
    pub irq: bool,
}

/// The first writing of all pages.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq)]
pub struct Fill {
    /// Verified pages.
    pub pages: u64,
    /// How long it took.
    pub ms: u64,
}

/// The guest works from here on.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq)]
pub struct Ready {
    /// Verified pages.
    pub pages: u64,
    /// Running CPUs.
    pub cpus: u32,
}

/// The regular report.
#[derive(Clone, Debug, Deserialize, PartialEq)]
pub struct Tick {
    /// Reports so far, from 1.
    pub n: u64,
    /// Time-stamp counter.
    pub tsc: u64,
    /// Pass of CPU 0 through its pages, from 1.
    pub pass: u64,
    /// Pages dirtied so far by all CPUs.
    pub pages: u64,
    /// Pages dirtied since the last report, as MiB/s.
    pub rate_mib_s: f64,
    /// Longest time CPU 0 stood still since the last report.
    pub gap_us: u64,
    /// The same since the start, or since the longest gap was reset.
    pub max_gap_us: u64,
    /// Pages found wrong so far, at visits and in audits.
    pub errors: u64,
    /// The other CPUs.
    #[serde(default)]
    pub cpus: Vec<CpuTick>,
    /// The NICs.
    #[serde(default)]
    pub nics: Vec<NicTick>,
}

/// A further CPU's part of a [`Tick`].
#[derive(Clone, Copy, Debug, Deserialize, PartialEq)]
pub struct CpuTick {
    /// Its number.
    pub cpu: u32,
    /// Pages it dirtied so far.
    pub pages: u64,
    /// Longest time it stood still since the last report.
    pub gap_us: u64,
    /// The same since the start.
    pub max_gap_us: u64,
}

/// A NIC's part of a [`Tick`]. All but the gap count from the start.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq)]
pub struct NicTick {
    /// Test packets received, each counted once.
    pub rx: u64,
    /// Frames that are no test packets.
    pub rx_other: u64,
    /// Test packets with a wrong length or content, and impossible buffers.
    pub rx_bad: u64,
    /// Numbers missing between a flow's first and newest packet.
    pub rx_lost: u64,
    /// Test packets that came before.
    pub rx_dup: u64,
    /// Packets sent.
    pub tx: u64,
    /// Packets not sent, as no buffer was free.
    pub tx_drop: u64,
    /// Longest time between two test packets since the last report.
    pub gap_us: u64,
    /// Interrupts served.
    pub irqs: u64,
    /// Doorbells rung.
    pub kicks: u64,
    /// Kept receive buffers whose content was found changed.
    pub rx_pages_corrupt: u64,
    /// Packets with room for a hash report.
    pub hash_packets: u64,
    /// Reports that agree with the guest's own computation.
    pub hash_matched: u64,
    /// Reports that do not, or are missing.
    pub hash_mismatched: u64,
    /// Packets rightly reported as not hashed.
    pub hash_none: u64,
}

/// The result of an audit.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq)]
pub struct Verify {
    /// Pages checked in full.
    pub pages: u64,
    /// Pages that are not what they must be.
    pub corrupt: u64,
    /// Kept receive buffers checked.
    pub rx_pages: u64,
    /// Kept receive buffers found changed, since the start.
    pub rx_pages_corrupt: u64,
    /// How long it took.
    pub ms: u64,
}

/// One line of the guest's.
#[derive(Clone, Debug, PartialEq)]
pub enum Line {
    /// `FERRY-GUEST up`.
    Up,
    /// `CLOCK {…}`.
    Clock(Clock),
    /// `NIC {…}`.
    Nic(NicInfo),
    /// `FILL {…}`.
    Fill(Fill),
    /// `READY {…}`.
    Ready(Ready),
    /// `TICK {…}`.
    Tick(Tick),
    /// `VERIFY {…}`.
    Verify(Verify),
    /// `PASS name …` or `FAIL name …`.
    Check {
        /// `PASS`.
        passed: bool,
        /// The rest of the line.
        what: String,
    },
    /// `ERROR {…}`, `TRAP {…}` or `PANIC …`, whole.
    Trouble(String),
    /// `DONE`.
    Done,
    /// Anything else.
    Other(String),
}

fn object<T: DeserializeOwned>(line: &str, text: &str) -> Result<T> {
    serde_json::from_str(text).with_context(|| format!("not a line of the native guest: {line:?}"))
}

/// Reads one line.
///
/// # Errors
/// When a known word is followed by something other than its object.
pub fn parse(line: &str) -> Result<Line> {
    let line = line.trim_end_matches(['\r', '\n']);
    let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
    Ok(match word {
        "FERRY-GUEST" => Line::Up,
        "CLOCK" => Line::Clock(object(line, rest)?),
        "NIC" => Line::Nic(object(line, rest)?),
        "FILL" => Line::Fill(object(line, rest)?),
        "READY" => Line::Ready(object(line, rest)?),
        "TICK" => Line::Tick(object(line, rest)?),
        "VERIFY" => Line::Verify(object(line, rest)?),
        "PASS" | "FAIL" => Line::Check {
            passed: word == "PASS",
            what: rest.to_owned(),
        },
        "ERROR" | "TRAP" | "PANIC" => Line::Trouble(line.to_owned()),
        "DONE" => Line::Done,
        _ => Line::Other(line.to_owned()),
    })
}

/// Everything a guest has said.
#[derive(Debug, Default)]
pub struct GuestLog {
    partial: Vec<u8>,
    lines: Vec<Line>,
}

impl GuestLog {
    /// Takes the next bytes of the stream.
    ///
    /// # Errors
    /// When a completed line cannot be read; the lines before it are kept.
    pub fn feed(&mut self, bytes: &[u8]) -> Result<()> {
        for &byte in bytes {
            if byte == b'\n' {
                let line = std::mem::take(&mut self.partial);
                self.lines.push(parse(&String::from_utf8_lossy(&line))?);
            } else {
                self.partial.push(byte);
            }
        }
        Ok(())
    }

    /// All lines.
    pub fn lines(&self) -> &[Line] {
        &self.lines
    }

    /// All reports.
    pub fn ticks(&self) -> impl DoubleEndedIterator<Item = &Tick> {
        self.lines.iter().filter_map(|line| {
            if let Line::Tick(tick) = line {
                Some(tick)
            } else {
                None
            }
        })
    }

    /// All audits.
    pub fn verifies(&self) -> impl DoubleEndedIterator<Item = &Verify> {
        self.lines.iter().filter_map(|line| {
            if let Line::Verify(verify) = line {
                Some(verify)
            } else {
                None
            }
        })
    }

    /// How the guest tells time, once it has said so.
    pub fn clock(&self) -> Option<&Clock> {
        self.lines.iter().find_map(|line| {
            if let Line::Clock(clock) = line {
                Some(clock)
            } else {
                None
            }
        })
    }

    /// True once the guest works.
    pub fn is_ready(&self) -> bool {
        self.lines.iter().any(|line| matches!(line, Line::Ready(_)))
    }

    /// Everything that must not be, one line each: troubles, failed checks, errors counted,
    /// audits that found something, bad packets, wrong hashes, reports out of order. Lost packets
    /// are not among it: a network may lose.
    pub fn complaints(&self) -> Vec<String> {
        let mut complaints = Vec::new();
        let mut before: Option<&Tick> = None;
        for line in &self.lines {
            match line {
                Line::Trouble(text) => complaints.push(text.clone()),
                Line::Check {
                    passed: false,
                    what,
                } => complaints.push(format!("FAIL {what}")),
                Line::Verify(found) if found.corrupt + found.rx_pages_corrupt != 0 => {
                    complaints.push(format!("{found:?}"));
                }
                Line::Tick(tick) => {
                    if before.is_some_and(|before| tick.n != before.n + 1 || tick.tsc <= before.tsc)
                    {
                        complaints.push(format!("report {} out of order", tick.n));
                    }
                    before = Some(tick);
                }
                _ => {}
            }
        }
        if let Some(last) = before {
            complaints.extend(tick_complaints(last));
        }
        complaints
    }
}

fn tick_complaints(tick: &Tick) -> Vec<String> {
    let mut complaints = Vec::new();
    if tick.errors != 0 {
        complaints.push(format!("{} wrong pages", tick.errors));
    }
    for (index, nic) in tick.nics.iter().enumerate() {
        for (count, what) in [
            (nic.rx_bad, "bad packets"),
            (nic.rx_pages_corrupt, "receive buffers changed"),
            (nic.hash_mismatched, "wrong hashes"),
        ] {
            if count != 0 {
                complaints.push(format!("nic {index}: {count} {what}"));
            }
        }
    }
    complaints
}

#[cfg(test)]
mod tests {
    use super::*;

    const TICK: &str = r#"TICK {"n":2,"tsc":900,"pass":1,"pages":25616,"rate_mib_s":99.9,"gap_us":192,"max_gap_us":200,"errors":0,"cpus":[{"cpu":1,"pages":5,"gap_us":6,"max_gap_us":7}],"nics":[{"rx":10,"rx_other":4,"rx_bad":0,"rx_lost":1,"rx_dup":0,"tx":10,"tx_drop":0,"gap_us":0,"irqs":0,"kicks":1,"rx_pages_corrupt":0,"hash_packets":14,"hash_matched":12,"hash_mismatched":0,"hash_none":2}]}"#;

    fn tick(n: u64, errors: u64) -> String {
        format!(
            "TICK {{\"n\":{n},\"tsc\":{n},\"pass\":1,\"pages\":1,\"rate_mib_s\":0.0,\"gap_us\":0,\"max_gap_us\":0,\"errors\":{errors}}}\n"
        )
    }

    #[test]
    fn reads_a_tick_with_everything() {
        let Line::Tick(tick) = parse(TICK).unwrap() else {
            panic!("no tick")
        };
        assert_eq!((tick.n, tick.pages, tick.rate_mib_s), (2, 25616, 99.9));
        assert_eq!(
            tick.cpus[0],
            CpuTick {
                cpu: 1,
                pages: 5,
                gap_us: 6,
                max_gap_us: 7
            }
        );
        assert_eq!((tick.nics[0].rx, tick.nics[0].hash_matched), (10, 12));
    }

    #[test]
    fn reads_every_other_word() {
        assert_eq!(parse("FERRY-GUEST up\r").unwrap(), Line::Up);
        assert_eq!(
            parse(r#"VERIFY {"pages":5,"corrupt":1,"rx_pages":2,"rx_pages_corrupt":0,"ms":9}"#)
                .unwrap(),
            Line::Verify(Verify {
                pages: 5,
                corrupt: 1,
                rx_pages: 2,
                rx_pages_corrupt: 0,
                ms: 9
            })
        );
        assert_eq!(
            parse("PASS smoke").unwrap(),
            Line::Check {
                passed: true,
                what: "smoke".to_owned()
            }
        );
        assert_eq!(parse("DONE").unwrap(), Line::Done);
        assert!(matches!(parse("PANIC at x").unwrap(), Line::Trouble(_)));
        assert!(matches!(
            parse("SeaBIOS (version x)").unwrap(),
            Line::Other(_)
        ));
        assert!(parse("TICK {\"n\":1}").is_err());
    }

    #[test]
    fn a_line_cut_by_a_migration_is_one_line() {
        let mut log = GuestLog::default();
        let (source, destination) = TICK.split_at(40);
        log.feed(source.as_bytes()).unwrap();
        assert_eq!(log.ticks().count(), 0);
        log.feed(destination.as_bytes()).unwrap();
        log.feed(b"\nREADY {\"pages\":1,\"cpus\":1}\n").unwrap();
        assert_eq!(log.ticks().count(), 1);
        assert!(log.is_ready() && log.complaints().is_empty());
    }

    #[test]
    fn complains_about_each_thing_that_must_not_be() {
        let complaints = |text: &str| {
            let mut log = GuestLog::default();
            log.feed(text.as_bytes()).unwrap();
            log.complaints().len()
        };
        assert_eq!(complaints(&(tick(1, 0) + &tick(2, 0))), 0);
        assert_eq!(
            complaints(&(tick(1, 0) + &tick(3, 0))),
            1,
            "a report is missing"
        );
        assert_eq!(complaints(&(tick(2, 0) + &tick(1, 0))), 1, "time went back");
        assert_eq!(complaints(&tick(1, 3)), 1);
        assert_eq!(complaints("FAIL nic 0: x\nERROR {}\n"), 2);
        assert_eq!(
            complaints(&(TICK.replace("\"rx_bad\":0", "\"rx_bad\":1") + "\n")),
            1
        );
        assert_eq!(
            complaints(&(TICK.replace("\"hash_mismatched\":0", "\"hash_mismatched\":1") + "\n")),
            1
        );
        assert_eq!(
            complaints(
                "VERIFY {\"pages\":5,\"corrupt\":0,\"rx_pages\":2,\"rx_pages_corrupt\":1,\"ms\":9}\n"
            ),
            1
        );
    }
}
