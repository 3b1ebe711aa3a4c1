//! The program's options.

use std::hash::{BuildHasher, RandomState};
use std::num::NonZeroU16;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;

use clap::{Parser, ValueEnum};
use net_util::hash::HashTypes;
use net_util::tap::{Tap, TapError, TapName};
use sandbox::SeccompMode;
use virtio_devices::net::MAX_PAIRS;
use virtio_devices::{Net, NetBackend, NetError, NetOptions};

/// A hardware address, written `52:54:00:12:34:56`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Mac(pub [u8; 6]);

impl Mac {
    /// One drawn at random from the locally administered ones.
    pub fn random() -> Self {
        // The standard library seeds each `RandomState` from the kernel's generator.
        let [a, b, c, d, e, f, ..] = RandomState::new()
            .hash_one(std::process::id())
            .to_le_bytes();
        // IEEE 802: bit 0 of the first byte is "group", bit 1 "locally administered".
        Self([(a & 0xfc) | 0x02, b, c, d, e, f])
    }
}

impl FromStr for Mac {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let bad = "expected an address of one station, such as 52:54:00:12:34:56";
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().filter(|part| part.len() == 2).ok_or(bad)?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| bad)?;
        }
        let [first, ..] = bytes;
        match parts.next() {
            None if first & 1 == 0 && bytes != [0; 6] => Ok(Self(bytes)),
            _ => Err(bad),
        }
    }
}

/// A switch.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum Switch {
    /// Yes.
    On,
    /// No.
    Off,
}

/// Serves a virtio network card on a tap over vfio-user, for `ferry --user-device socket=PATH`.
///
/// The card can migrate: start another ferry-nic with the same options for the destination.
#[derive(Clone, Parser, Debug)]
#[command(name = "ferry-nic", version, max_term_width = 100)]
pub struct Options {
    /// Where to listen; a socket file that nobody listens on any more is replaced.
    #[arg(long, value_name = "PATH")]
    pub socket: PathBuf,
    /// The tap that carries the card's packets; made if there is none of this name.
    #[arg(long, value_name = "NAME", value_parser = TapName::new)]
    pub tap: TapName,
    /// The guest's hardware address; drawn at random if not given.
    #[arg(long)]
    pub mac: Option<Mac>,
    /// Largest payload of a frame in bytes that the guest is told; not told if not given.
    #[arg(long, value_parser = clap::value_parser!(u16).range(68..))]
    pub mtu: Option<u16>,
    /// Virtqueues, receive and transmit together, without the control queue: an even number up to
    /// 254.
    #[arg(long, default_value_t = 2, value_parser = even)]
    pub num_queues: u16,
    /// Descriptors per virtqueue, a power of two.
    #[arg(long, default_value_t = 256)]
    pub queue_size: u16,
    /// Whether to offer the guest the hash of each received packet (VIRTIO_NET_F_HASH_REPORT).
    #[arg(long, value_enum, default_value_t = Switch::Off)]
    pub hash_report: Switch,
    /// Whether to offer the guest to steer received packets by their hashes (VIRTIO_NET_F_RSS).
    #[arg(long, value_enum, default_value_t = Switch::Off)]
    pub rss: Switch,
    /// What a system call that its thread has no use for does: true|false|log.
    ///
    /// true ends ferry-nic with a message that names thread and call; log writes to the kernel's
    /// audit log; false installs no filters.
    #[arg(long, value_name = "MODE", default_value_t)]
    pub seccomp: SeccompMode,
}

fn even(text: &str) -> Result<u16, String> {
    match text.parse::<u16>() {
        Ok(n) if n % 2 == 0 && (1..=MAX_PAIRS).contains(&(n / 2)) => Ok(n),
        _ => Err(format!(
            "expected an even number from 2 to {}",
            u32::from(MAX_PAIRS) * 2
        )),
    }
}

/// Why the card could not be made.
#[derive(Debug, thiserror::Error)]
pub enum CardError {
    /// The tap.
    #[error("the card's tap is not usable")]
    Tap(#[from] TapError),
    /// The card.
    #[error("the card cannot be made as asked for")]
    Card(#[from] NetError),
}

impl Options {
    /// Opens the tap and makes the card.
    ///
    /// # Errors
    /// [`CardError`].
    pub fn card(&self) -> Result<Net, CardError> {
        let pairs = NonZeroU16::new(self.num_queues / 2).unwrap_or(NonZeroU16::MIN);
        let tap = Tap::open(&self.tap, pairs)?;
        tap.set_up()?;
        let queues = tap.into_queues().into_iter();
        let backends = queues
            .map(|queue| Arc::new(queue) as Arc<dyn NetBackend>)
            .collect();
        let Mac(mac) = self.mac.unwrap_or_else(Mac::random);
        Ok(Net::new(
            NetOptions {
                id: "ferry-nic".to_owned(),
                mac,
                mtu: self.mtu,
                queue_size: self.queue_size,
                offloads: true,
                hash_report: self.hash_report == Switch::On,
                rss: self.rss == Switch::On,
                hash_types: HashTypes::ALL,
            },
            backends,
        )?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(arguments: &[&str]) -> Result<Options, clap::Error> {
        let program = ["ferry-nic", "--socket", "/x", "--tap", "tap0"];
        Options::try_parse_from(program.iter().chain(arguments))
    }

    #[test]
    fn options_have_the_documented_defaults() {
        let options = parse(&[]).unwrap();
        assert_eq!((options.num_queues, options.queue_size), (2, 256));
        assert_eq!(
            (options.hash_report, options.rss),
            (Switch::Off, Switch::Off)
        );
        assert_eq!(options.seccomp, SeccompMode::Enforce);
        assert!(options.mac.is_none() && options.mtu.is_none());
        let options = parse(&[
            "--mac",
            "52:54:00:12:34:56",
            "--num-queues",
            "4",
            "--queue-size",
            "512",
            "--hash-report",
            "on",
            "--rss",
            "on",
            "--mtu",
            "9000",
            "--seccomp",
            "log",
        ])
        .unwrap();
        assert_eq!(options.mac, Some(Mac([0x52, 0x54, 0, 0x12, 0x34, 0x56])));
        assert_eq!((options.num_queues, options.queue_size), (4, 512));
        assert_eq!((options.hash_report, options.rss), (Switch::On, Switch::On));
        assert_eq!(options.mtu, Some(9000));
        assert_eq!(options.seccomp, SeccompMode::Log);
    }

    #[test]
    fn nonsense_is_refused() {
        for bad in [
            ["--mac", "52:54:00:12:34"],
            ["--mac", "01:00:00:00:00:01"],
            ["--mac", "00:00:00:00:00:00"],
            ["--mac", "+5:54:00:12:34:5x"],
            ["--num-queues", "3"],
            ["--num-queues", "0"],
            ["--num-queues", "256"],
            ["--mtu", "60"],
            ["--hash-report", "maybe"],
            ["--seccomp", "maybe"],
        ] {
            assert!(parse(&bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_random_address_is_local_and_of_one_station() {
        let Mac([first, ..]) = Mac::random();
        assert_eq!(first & 3, 2);
    }
}
