//! Receive hashing of an interface, without the `ethtool` program.
//!
//! Source: uapi `linux/ethtool.h`: `SIOCETHTOOL` with `ETHTOOL_GFLAGS`, `ETHTOOL_SFLAGS` and
//! `ETHTOOL_GRSSH`.

use std::ffi::{c_int, c_void};
use std::io;
use std::net::UdpSocket;
use std::os::fd::AsRawFd;

use anyhow::{Context, bail, ensure};

use crate::Verdict;
use crate::args::Args;
use crate::json::Line;

mod rss;

pub(crate) use rss::{RXH_ADDRESSES, RXH_PORTS, weighted};

const ETHTOOL_GFLAGS: u32 = 0x25;
const ETHTOOL_SFLAGS: u32 = 0x26;
const ETHTOOL_GRSSH: u32 = 0x46;
/// The device puts the hash into received packets.
const ETH_FLAG_RXHASH: u32 = 1 << 28;

/// Most table entries and key bytes that are believed.
const MAX_ENTRIES: usize = 1 << 16;

/// `struct ethtool_rxfh` up to its flexible member, in 32-bit words.
const RXFH_WORDS: usize = 6;
const RXFH_TABLE_LEN: usize = 2;
const RXFH_KEY_LEN: usize = 3;

/// `struct ifreq` with a pointer in it.
#[repr(C)]
struct Request {
    name: [u8; 16],
    data: *mut c_void,
    rest: [u64; 2],
}

/// Key and indirection table of an interface.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(crate) struct Steering {
    pub(crate) key: Vec<u8>,
    pub(crate) table: Vec<u32>,
}

/// An interface that ethtool commands go to.
pub(crate) struct Interface {
    name: [u8; 16],
    socket: UdpSocket,
}

impl Interface {
    pub(crate) fn new(name: &str) -> anyhow::Result<Self> {
        let mut padded = [0; 16];
        ensure!(
            name.len() < padded.len(),
            "--iface {name}: the name is too long"
        );
        padded[..name.len()].copy_from_slice(name.as_bytes());
        Ok(Self {
            name: padded,
            socket: UdpSocket::bind("0.0.0.0:0").context("opening a socket")?,
        })
    }

    /// One command; the kernel reads and writes `words`, as far as the command says.
    fn command(&self, words: &mut [u32]) -> io::Result<()> {
        let mut request = Request {
            name: self.name,
            data: words.as_mut_ptr().cast(),
            rest: [0; 2],
        };
        // SAFETY: SIOCETHTOOL reads one `struct ifreq`, which `Request` is; its pointer leads to
        // `words`, which the callers make as long as their command and the lengths in it say.
        let result: c_int =
            unsafe { libc::ioctl(self.socket.as_raw_fd(), libc::SIOCETHTOOL, &raw mut request) };
        if result < 0 {
            Err(io::Error::last_os_error())
        } else {
            Ok(())
        }
    }

    /// `ETH_FLAG_*` bits that are on.
    fn flags(&self) -> io::Result<u32> {
        let mut value = [ETHTOOL_GFLAGS, 0];
        self.command(&mut value)?;
        Ok(value[1])
    }

    fn set_flags(&self, flags: u32) -> io::Result<()> {
        self.command(&mut [ETHTOOL_SFLAGS, flags])
    }

    /// Whether the hash is put into received packets.
    pub(crate) fn rxhash(&self) -> io::Result<bool> {
        Ok(self.flags()? & ETH_FLAG_RXHASH != 0)
    }

    /// Has the hash put into received packets, or not.
    pub(crate) fn set_rxhash(&self, on: bool) -> io::Result<()> {
        let others = self.flags()? & !ETH_FLAG_RXHASH;
        self.set_flags(others | if on { ETH_FLAG_RXHASH } else { 0 })
    }

    /// Key and table; empty if the device has none.
    pub(crate) fn steering(&self) -> anyhow::Result<Steering> {
        let mut sizes = [0; RXFH_WORDS];
        sizes[0] = ETHTOOL_GRSSH;
        match self.command(&mut sizes) {
            Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                return Ok(Steering::default());
            }
            result => result.context("asking for the size of the hash key")?,
        }
        let table_len = usize::try_from(sizes[RXFH_TABLE_LEN])?;
        let key_len = usize::try_from(sizes[RXFH_KEY_LEN])?;
        ensure!(
            table_len.max(key_len) <= MAX_ENTRIES,
            "table {table_len}, key {key_len}: too long"
        );
        let mut words = vec![0; RXFH_WORDS + table_len + key_len.div_ceil(4)];
        words[0] = ETHTOOL_GRSSH;
        words[RXFH_TABLE_LEN] = sizes[RXFH_TABLE_LEN];
        words[RXFH_KEY_LEN] = sizes[RXFH_KEY_LEN];
        self.command(&mut words)
            .context("asking for the hash key")?;
        let (table, key) = words[RXFH_WORDS..].split_at(table_len);
        let mut key: Vec<u8> = key.iter().flat_map(|word| word.to_ne_bytes()).collect();
        key.truncate(key_len);
        Ok(Steering {
            key,
            table: table.to_vec(),
        })
    }
}

/// `ethtool-rxhash`.
pub(crate) fn run(mut args: Args) -> anyhow::Result<Verdict> {
    let wanted = match args.word("on, off or show")?.as_str() {
        "on" => Some(true),
        "off" => Some(false),
        "show" => None,
        other => bail!("ethtool-rxhash has no `{other}`: use on, off or show"),
    };
    let name: String = args.required("iface")?;
    args.finish()?;
    let interface = Interface::new(&name)?;
    if let Some(on) = wanted {
        interface.set_rxhash(on).with_context(|| {
            let remedy = "was VIRTIO_NET_F_HASH_REPORT negotiated?";
            format!("{name}: switching the receive hash ({remedy})")
        })?;
    }
    // What is so, not what was asked for: the driver may have refused in silence.
    let on = interface
        .rxhash()
        .with_context(|| format!("{name}: reading the features"))?;
    let steering = interface.steering().with_context(|| name.clone())?;
    Line::new("rxhash")
        .text("iface", &name)
        .truth("on", on)
        .hex("key", &steering.key)
        .numbers("indirection", &steering.table)
        .print()?;
    Ok(Verdict::of(wanted.is_none_or(|wanted| wanted == on)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_has_no_key_and_cannot_switch() {
        let lo = Interface::new("lo").unwrap();
        let flags = lo.flags().unwrap();
        lo.set_flags(flags).unwrap();
        assert!(lo.steering().unwrap().key.is_empty());
        let error = lo.set_flags(flags ^ ETH_FLAG_RXHASH).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EOPNOTSUPP));
        let missing = Interface::new("missing0").unwrap();
        assert_eq!(
            missing.flags().unwrap_err().raw_os_error(),
            Some(libc::ENODEV)
        );
        assert!(Interface::new("sixteen-bytes-xx").is_err());
    }

    #[test]
    fn layout_is_that_of_the_uapi() {
        assert_eq!(size_of::<Request>(), size_of::<libc::ifreq>());
    }
}
