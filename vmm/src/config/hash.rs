//! What a virtio-net device offers about the hashes of packets.

use std::fmt;
use std::str::FromStr;

use net_util::hash::{HashReport, HashTypes};
use serde::{Deserialize, Serialize};

/// Whether hash reports are offered (`hash_report`). In JSON `true`, `false` or `"auto"`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "OfferText", into = "OfferText")]
pub enum Offer {
    /// No.
    #[default]
    Off,
    /// Yes, and a device that cannot is refused.
    On,
    /// If the device can: on a tap, and not on a vhost-user backend.
    Auto,
}

/// [`Offer`] in JSON, where on and off were booleans before there was `auto`.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum OfferText {
    Switch(bool),
    Word(AutoWord),
}

/// The word `auto`.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum AutoWord {
    Auto,
}

impl From<OfferText> for Offer {
    fn from(text: OfferText) -> Self {
        match text {
            OfferText::Switch(false) => Self::Off,
            OfferText::Switch(true) => Self::On,
            OfferText::Word(AutoWord::Auto) => Self::Auto,
        }
    }
}

impl From<Offer> for OfferText {
    fn from(offer: Offer) -> Self {
        match offer {
            Offer::Off => Self::Switch(false),
            Offer::On => Self::Switch(true),
            Offer::Auto => Self::Word(AutoWord::Auto),
        }
    }
}

impl Offer {
    /// `on`, `off` or `auto`.
    pub(super) fn parse(text: &str) -> Option<Self> {
        match text {
            "on" | "true" => Some(Self::On),
            "off" | "false" => Some(Self::Off),
            "auto" => Some(Self::Auto),
            _ => None,
        }
    }
}

impl fmt::Display for Offer {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(match self {
            Self::Off => "off",
            Self::On => "on",
            Self::Auto => "auto",
        })
    }
}

/// Who calculates hashes and steers by them (`hash_backend`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HashBackend {
    /// The kernel as far as it can and is right, Ferry else.
    #[default]
    Auto,
    /// As auto, but a host whose kernel cannot hash is refused.
    Kernel,
    /// Ferry, and the kernel is not asked.
    Software,
}

impl HashBackend {
    /// `auto`, `kernel` or `software`.
    pub(super) fn parse(text: &str) -> Option<Self> {
        [Self::Auto, Self::Kernel, Self::Software]
            .into_iter()
            .find(|backend| backend.name() == text)
    }

    fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Kernel => "kernel",
            Self::Software => "software",
        }
    }

    /// Whether it is what holds if nothing is said.
    #[expect(clippy::trivially_copy_pass_by_ref, reason = "serde gives a reference")]
    pub(super) fn is_auto(&self) -> bool {
        *self == Self::Auto
    }
}

impl fmt::Display for HashBackend {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(self.name())
    }
}

/// The hash types with their names, in the order of their bits.
fn named_types() -> impl Iterator<Item = (&'static str, HashTypes)> {
    let reports = HashReport::ALL.into_iter();
    reports.filter_map(|report| Some((report.name(), report.hash_type()?)))
}

/// Types of hashes that are offered (`hash_types`), at least one. In JSON a list of names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Vec<String>", into = "Vec<String>")]
pub struct HashTypeSet(HashTypes);

impl HashTypeSet {
    /// What [`FromStr`] takes, for messages.
    pub(super) const EXPECTED: &'static str = "one of ipv4, tcpv4, udpv4, ipv6, tcpv6, udpv6, \
         ip_ex, tcp_ex and udp_ex, or a list such as [tcpv4,tcpv6]";

    /// The types.
    pub fn types(self) -> HashTypes {
        self.0
    }

    fn names(self) -> impl Iterator<Item = &'static str> {
        let on = move |(_, types): &(_, HashTypes)| self.0.contains(*types);
        named_types().filter(on).map(|(name, _)| name)
    }

    fn of<'a>(names: impl Iterator<Item = &'a str>) -> Option<Self> {
        let mut all = HashTypes::NONE;
        for name in names {
            let (_, types) = named_types().find(|(known, _)| *known == name)?;
            all = all | types;
        }
        (!all.is_empty()).then_some(Self(all))
    }
}

/// The text is not a list of names.
#[derive(Debug, thiserror::Error)]
#[error("expected {}", HashTypeSet::EXPECTED)]
pub struct NoHashTypes;

impl FromStr for HashTypeSet {
    type Err = NoHashTypes;

    fn from_str(text: &str) -> Result<Self, NoHashTypes> {
        let inner = match text.strip_prefix('[') {
            Some(rest) => rest.strip_suffix(']').ok_or(NoHashTypes)?,
            None => text,
        };
        Self::of(inner.split(',').map(str::trim)).ok_or(NoHashTypes)
    }
}

impl TryFrom<Vec<String>> for HashTypeSet {
    type Error = NoHashTypes;

    fn try_from(names: Vec<String>) -> Result<Self, NoHashTypes> {
        Self::of(names.iter().map(String::as_str)).ok_or(NoHashTypes)
    }
}

impl From<HashTypeSet> for Vec<String> {
    fn from(set: HashTypeSet) -> Self {
        set.names().map(str::to_owned).collect()
    }
}

impl fmt::Display for HashTypeSet {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "[{}]", self.names().collect::<Vec<_>>().join(","))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offers_are_what_they_were_and_auto() {
        for (json, offer, text) in [
            ("true", Offer::On, "on"),
            ("false", Offer::Off, "off"),
            ("\"auto\"", Offer::Auto, "auto"),
        ] {
            assert_eq!(serde_json::from_str::<Offer>(json).unwrap(), offer);
            assert_eq!(serde_json::to_string(&offer).unwrap(), json);
            assert_eq!(Offer::parse(text), Some(offer));
            assert_eq!(offer.to_string(), text);
        }
        for json in ["\"on\"", "1", "null", "\"Auto\""] {
            assert!(serde_json::from_str::<Offer>(json).is_err(), "{json}");
        }
        assert_eq!(Offer::parse("maybe"), None);
    }

    #[test]
    fn backends_have_one_name_everywhere() {
        for (name, backend) in [
            ("auto", HashBackend::Auto),
            ("kernel", HashBackend::Kernel),
            ("software", HashBackend::Software),
        ] {
            assert_eq!(HashBackend::parse(name), Some(backend));
            assert_eq!(backend.to_string(), name);
            let json = serde_json::to_string(&backend).unwrap();
            assert_eq!(json, format!("\"{name}\""));
        }
        assert_eq!(HashBackend::parse("ebpf"), None);
    }

    #[test]
    fn names_are_those_of_all_types() {
        let all: HashTypeSet = "[ipv4,tcpv4,udpv4,ipv6,tcpv6,udpv6,ip_ex,tcp_ex,udp_ex]"
            .parse()
            .unwrap();
        assert_eq!(all.types(), HashTypes::ALL);
        let some: HashTypeSet = "[udpv6, tcpv4]".parse().unwrap();
        assert_eq!(some.types(), HashTypes::TCPV4 | HashTypes::UDPV6);
        assert_eq!(some.to_string(), "[tcpv4,udpv6]");
        let json = serde_json::to_string(&some).unwrap();
        assert_eq!(json, r#"["tcpv4","udpv6"]"#);
        assert_eq!(serde_json::from_str::<HashTypeSet>(&json).unwrap(), some);
        let one: HashTypeSet = "ipv6".parse().unwrap();
        assert_eq!(one.types(), HashTypes::IPV6);
        for bad in ["", "[]", "[ipv4", "ipv5", "ipv4,", "IPV4"] {
            assert!(bad.parse::<HashTypeSet>().is_err(), "{bad}");
        }
        assert!(serde_json::from_str::<HashTypeSet>("[]").is_err());
        assert!(serde_json::from_str::<HashTypeSet>("\"ipv4\"").is_err());
    }
}
