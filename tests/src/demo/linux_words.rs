//! What the Linux guest of the demo says: `DEMO word {json}` lines of `scripts/demo.d/guest.sh`,
//! and the judgement of the hashes among them.

use std::net::IpAddr;

use anyhow::{Context, Result};
use guest_logic::rss::toeplitz;
use serde_json::Value;

use super::report::HashOutcome;

/// Everything a Linux guest said, on both sides of its move.
#[derive(Debug, Default)]
pub(super) struct Words {
    text: String,
}

impl Words {
    /// Takes the next bytes.
    pub(super) fn feed(&mut self, bytes: &[u8]) {
        self.text.push_str(&String::from_utf8_lossy(bytes));
    }

    /// The rest of every complete line `DEMO word rest`.
    pub(super) fn all(&self, word: &str) -> Vec<&str> {
        let whole = self.text.rfind('\n').map_or(0, |end| end + 1);
        self.text
            .get(..whole)
            .unwrap_or_default()
            .lines()
            .filter_map(|line| {
                let rest = line.split_once("DEMO ")?.1.trim_end();
                let (first, rest) = rest.split_once(' ').unwrap_or((rest, ""));
                (first == word).then_some(rest)
            })
            .collect()
    }

    /// Whether the guest has said so.
    pub(super) fn said(&self, word: &str) -> bool {
        !self.all(word).is_empty()
    }

    /// The last object the guest said after `word`.
    pub(super) fn object(&self, word: &str) -> Result<Value> {
        let all = self.all(word);
        let last = all
            .last()
            .with_context(|| format!("the guest did not say {word:?}"))?;
        serde_json::from_str(last).with_context(|| format!("{word}: {last:?}"))
    }

    /// Compares each hash that the guest's driver gave with an independent computation.
    pub(super) fn hashes(&self, backend: String) -> Result<HashOutcome> {
        let key = self.object("rxhash")?["key"]
            .as_str()
            .and_then(unhex)
            .context("the guest does not know the hash key")?;
        let mut outcome = HashOutcome {
            backend,
            ..HashOutcome::default()
        };
        for line in self.all("hash") {
            let packet: Value =
                serde_json::from_str(line).with_context(|| format!("hash: {line:?}"))?;
            let Some(expected) = expected(&key, &packet) else {
                continue;
            };
            outcome.packets += 1;
            if packet["hash"].as_u64() == Some(u64::from(expected)) {
                outcome.matched += 1;
            } else {
                outcome.mismatched += 1;
            }
        }
        Ok(outcome)
    }
}

/// The Toeplitz hash over addresses and ports; `None` for what is no TCP or UDP packet.
fn expected(key: &[u8], packet: &Value) -> Option<u32> {
    let mut input = Vec::new();
    for end in ["source", "destination"] {
        match packet[end].as_str()?.parse().ok()? {
            IpAddr::V4(address) => input.extend(address.octets()),
            IpAddr::V6(address) => input.extend(address.octets()),
        }
    }
    for port in ["source_port", "destination_port"] {
        let port = u16::try_from(packet[port].as_u64()?).ok()?;
        input.extend(port.to_be_bytes());
    }
    Some(toeplitz(key, &input))
}

fn unhex(text: &str) -> Option<Vec<u8>> {
    if text.is_empty() || !text.is_ascii() || !text.len().is_multiple_of(2) {
        return None;
    }
    (0..text.len())
        .step_by(2)
        .map(|at| u8::from_str_radix(text.get(at..at + 2)?, 16).ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Microsoft's verification suite: 161.142.100.80:1766 from 66.9.149.187:2794.
    const KEY: &str =
        "6d5a56da255b0ec24167253d43a38fb0d0ca2bcbae7b30b477cb2da38030f20c6a42b73bbeac01fa";

    fn words(hash: u32) -> Words {
        let mut words = Words::default();
        let packet = format!(
            r#"DEMO hash {{"hash":{hash},"source":"66.9.149.187","destination":"161.142.100.80","protocol":6,"source_port":2794,"destination_port":1766}}"#
        );
        let other = r#"DEMO hash {"hash":1,"source":"::1","destination":"::2","protocol":58}"#;
        let key = format!(r#"DEMO rxhash {{"on":true,"key":"{KEY}"}}"#);
        words
            .feed(format!("[    1.0] noise\r\n{key}\r\n{packet}\r\n{other}\r\nDEMO en").as_bytes());
        words
    }

    #[test]
    fn hashes_are_judged_and_other_packets_are_not() {
        let good = words(0x51cc_c178).hashes("software".to_owned()).unwrap();
        assert_eq!((good.packets, good.matched, good.mismatched), (1, 1, 0));
        let bad = words(0x51cc_c179).hashes("software".to_owned()).unwrap();
        assert_eq!((bad.packets, bad.matched, bad.mismatched), (1, 0, 1));
    }

    #[test]
    fn only_whole_lines_count() {
        let mut words = words(1);
        assert!(!words.said("en") && !words.said("end"));
        words.feed(b"d\r\n");
        assert!(words.said("end"));
        assert!(words.object("end").is_err());
    }
}
