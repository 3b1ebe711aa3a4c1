//! Cards of the lab's host, behind its IOMMU and vfio-pci, in a stock guest.
//!
//! `scripts/test-lab` gives the lab two pairs of cards, each pair on a wire of its own: one card is
//! passed through to the guest, the other stays the host's.

use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use e2e::ferry::Ferry;
use e2e::linux::{Kernel, Linux, LinuxConfig, in_lab, wait_reachable};
use e2e::migration::Route;
use e2e::netns;
use e2e::process::wait_for;
use serde_json::json;

use crate::streams::{Direction, Stream};

/// MiB of each stream; of the first ones as `FERRY_STREAM_MIB` says.
const STREAM_MIB: u64 = 32;
/// The slowest that a stream may be, in MiB per second.
const SLOWEST: u64 = 1;

/// Bytes of the first streams.
fn first_bytes() -> Result<u64> {
    let mib = match std::env::var("FERRY_STREAM_MIB") {
        Ok(text) => text.parse().context("FERRY_STREAM_MIB")?,
        Err(_) => STREAM_MIB,
    };
    Ok(mib << 20)
}

/// Has the host keep so many huge pages of 2 MiB for guests.
fn keep_huge_pages(count: u32) -> Result<()> {
    const KEPT: &str = "/proc/sys/vm/nr_hugepages";
    fs::write(KEPT, count.to_string())?;
    let kept: u32 = fs::read_to_string(KEPT)?.trim().parse()?;
    ensure!(kept == count, "{kept} huge pages instead of {count}");
    Ok(())
}

/// A pair of cards; addresses are 10.79.INDEX.END, MACs end in INDEX and END.
pub(crate) struct Pair {
    index: u8,
    /// Where the guest's card is on the host's bus.
    place: &'static str,
    /// The guest's driver of it.
    driver: &'static str,
    /// The guest's memory has to be made of huge pages.
    huge_pages: bool,
    /// The guest is asked to eject it when the host wants it back.
    gives_back: bool,
}

pub(crate) const VIRTIO: Pair = Pair {
    index: 0,
    place: "0000:00:10.0",
    driver: "virtio-pci",
    huge_pages: false,
    gives_back: true,
};
const E1000E: Pair = Pair {
    index: 1,
    place: "0000:00:11.0",
    driver: "e1000e",
    // The lab's emulated card (QEMU 7.2) drops what it is to send if one of its fragments is not in one
    // piece in the host's memory: `address_space_map` behind the emulated IOMMU gives it the first piece
    // and it takes that for a failure. A guest's fragment of up to 32 KiB is in one piece if the pages
    // are huge; of small pages it depends on what the host has free, and a TCP stream stands still at
    // the first segment that lies across a break. It is the same without Ferry: with the lab's own
    // QEMU and its vfio-pci, 32 MiB arrive from a guest whose memory file was filled in order, and
    // 112,944 bytes, then nothing, of one whose pages were allocated in random order; with `ethtool -K
    // … sg off` in that guest (no fragments across pages) all arrive again.
    huge_pages: true,
    gives_back: false,
};

impl Pair {
    fn mac(&self, end: u8) -> String {
        format!("52:54:00:79:0{}:0{end}", self.index)
    }

    fn address(&self, end: u8) -> String {
        format!("10.79.{}.{end}", self.index)
    }

    /// Takes the guest's card from the host's driver; its folder in sysfs.
    pub(crate) fn unbind(&self) -> Result<PathBuf> {
        let name = self.place;
        let card = Path::new("/sys/bus/pci/devices").join(name);
        fs::write(card.join("driver_override"), "vfio-pci")?;
        if card.join("driver").exists() {
            fs::write(card.join("driver/unbind"), name)?;
        }
        fs::write("/sys/bus/pci/drivers_probe", name)?;
        let driver = fs::read_link(card.join("driver")).context("no driver took the card")?;
        ensure!(driver.ends_with("vfio-pci"), "{}", driver.display());
        Ok(card)
    }

    /// Sets the host's card up.
    pub(crate) fn set_up(&self) -> Result<()> {
        let mac = self.mac(1);
        for entry in fs::read_dir("/sys/class/net")? {
            let path = entry?.path();
            let address = fs::read_to_string(path.join("address")).unwrap_or_default();
            if address.trim() == mac {
                let name = path.file_name().and_then(|name| name.to_str());
                let name = name.context("no name")?;
                let address = format!("{}/24", self.address(1));
                netns::ip(&["addr", "replace", &address, "dev", name])?;
                return netns::ip(&["link", "set", name, "up"]);
            }
        }
        bail!("the host has no card {mac}")
    }

    /// The guest's address for its card, and an answer from there.
    pub(crate) fn configure(&self, linux: &mut Linux) -> Result<()> {
        let address = format!("{}/24", self.address(2));
        linux.add_interface(&self.mac(2), &[&address])?;
        let address: IpAddr = self.address(2).parse()?;
        wait_reachable(address, Duration::from_secs(60))
    }

    /// The card in the guest: its place on the bus there.
    fn place_in_guest(&self, linux: &mut Linux) -> Result<String> {
        let script = format!(
            "for d in /sys/bus/pci/drivers/{}/0000:*; do \
             find $d/ -maxdepth 5 -name address | xargs grep -ls {} | grep -q . && basename $d; done; true",
            self.driver,
            self.mac(2)
        );
        let place = linux.shell.ask(&script)?.trim().to_owned();
        ensure!(place.starts_with("0000:"), "no card: {place:?}");
        Ok(place)
    }

    /// TCP both ways, one after the other, each byte and the checksum compared.
    fn stream(&self, linux: &mut Linux, dir: &Path, when: &str) -> Result<()> {
        self.stream_of(linux, dir, (when, STREAM_MIB << 20))
    }

    /// The same of so many bytes.
    pub(crate) fn stream_of(
        &self,
        linux: &mut Linux,
        dir: &Path,
        (when, bytes): (&str, u64),
    ) -> Result<()> {
        let limits = format!("--bytes {bytes}");
        let limit = Duration::from_secs(60 + (bytes >> 20) / SLOWEST);
        for direction in [Direction::In, Direction::Out] {
            let receiver = match direction {
                Direction::In => format!("{}:7001", self.address(2)),
                Direction::Out => format!("{}:7002", self.address(1)),
            };
            let start = Instant::now();
            let name = format!("{when}-{direction:?}");
            let stream = Stream::start(linux, dir, &name, direction, &receiver, &limits)?;
            let sum = stream.finish_within(linux, limit)?;
            ensure!(sum.bytes == bytes, "{when}: {sum:?}");
            let took = start.elapsed();
            println!(
                "{} {when} {direction:?}: {bytes} bytes in {took:.1?}, {:.1} MB/s",
                self.driver,
                Duration::from_micros(bytes).as_secs_f64() / took.as_secs_f64()
            );
        }
        Ok(())
    }
}

/// The guest's driver lets go of the card and takes it again.
fn rebind(pair: &Pair, linux: &mut Linux) -> Result<()> {
    let place = pair.place_in_guest(linux)?;
    let driver = pair.driver;
    linux.shell.ask(&format!(
        "cd /sys/bus/pci/drivers/{driver} && echo {place} > unbind && sleep 1 && echo {place} > bind"
    ))?;
    pair.configure(linux)
}

/// A migration is refused before anything happens, with the card's name.
fn refuses_to_move(linux: &mut Linux, dir: &Path) -> Result<()> {
    let destination = Ferry::start(dir, "destination", &[])?;
    let route = Route::unix(dir);
    route.open(&destination)?;
    // It is refused before anybody else is asked.
    let why = match route.go(&linux.ferry) {
        Ok(()) => bail!("a card that cannot migrate did not keep the VM here"),
        Err(error) => format!("{error:#}"),
    };
    println!("{why}");
    for word in ["card: migration is not supported", "unplug"] {
        ensure!(why.contains(word), "no {word:?} in {why}");
    }
    ensure!(
        linux.ferry.state()? == "Running",
        "{}",
        linux.ferry.last_words()
    );
    drop(destination);
    Ok(())
}

/// The guest loses the card while it runs, the host has it back, and the guest gets it again.
fn replug(pair: &Pair, card: &Path, linux: &mut Linux) -> Result<()> {
    let limit = Duration::from_secs(60);
    let name = card.file_name().and_then(|name| name.to_str());
    let name = name.context("no name")?;
    if !pair.gives_back {
        let id = json!({"id": "card"});
        linux.ferry.api.put("vm.remove-device", Some(&id))?;
        let removed = linux.ferry.wait_event("device-removed", limit);
        removed.with_context(|| linux.ferry.last_words())?;
    }
    // The kernel waits here until the card is closed.
    fs::write(card.join("driver/unbind"), name)?;
    if pair.gives_back {
        linux.ferry.wait_event("device-removal-requested", limit)?;
        linux.ferry.wait_event("device-removed", limit)?;
    }
    fs::write("/sys/bus/pci/drivers_probe", name)?;
    let device = json!({"id": "card", "path": card});
    let place = linux.ferry.api.put("vm.add-device", Some(&device))?;
    println!("plugged again: {place}");
    let there = format!("grep -l {} /sys/class/net/*/address", pair.mac(2));
    wait_for("the card in the guest", limit, || {
        let found = linux.shell.run(&there, limit)?;
        Ok((found.status == 0).then_some(()))
    })
    .with_context(|| linux.ferry.last_words())
}

fn passes_through(test: &str, pair: &Pair, vcpus: u8) -> Result<()> {
    if !in_lab(test) {
        return Ok(());
    }
    let card = pair.unbind()?;
    pair.set_up()?;
    let dir = tempfile::tempdir()?;
    let back = if pair.gives_back { "on" } else { "off" };
    let device = format!("path={},id=card,give_back={back}", card.display());
    let mut config = LinuxConfig::new(Kernel::Full6_12)
        .vcpus(vcpus)
        .options(&["--device", &device]);
    if pair.huge_pages {
        keep_huge_pages(config.memory_mib / 2)?;
        config = config.huge_pages();
    }
    let mut linux = Linux::boot(dir.path(), "linux", &config)?;
    pair.configure(&mut linux)?;
    pair.stream_of(&mut linux, dir.path(), ("first", first_bytes()?))?;
    let irqs = linux.shell.ask("cat /proc/interrupts")?;
    ensure!(irqs.contains("MSI"), "no MSI-X: {irqs}");

    rebind(pair, &mut linux)?;
    pair.stream(&mut linux, dir.path(), "rebound")?;

    refuses_to_move(&mut linux, dir.path())?;

    linux.reboot(dir.path())?;
    pair.configure(&mut linux)?;
    pair.stream(&mut linux, dir.path(), "rebooted")?;

    replug(pair, &card, &mut linux)?;
    pair.configure(&mut linux)?;
    pair.stream(&mut linux, dir.path(), "replugged")?;
    linux.power_off()?;
    keep_huge_pages(0)
}

#[test]
fn a_virtio_card_of_the_host_serves_debian_6_12() -> Result<()> {
    passes_through("a_virtio_card_of_the_host_serves_debian_6_12", &VIRTIO, 1)
}

#[test]
fn an_e1000e_card_of_the_host_serves_debian_6_12() -> Result<()> {
    passes_through("an_e1000e_card_of_the_host_serves_debian_6_12", &E1000E, 2)
}
