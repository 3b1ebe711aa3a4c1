//! Devices of the lab's host that come by their own files and an iommufd. `scripts/test-lab` boots the
//! lab for these with a kernel that has them.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use e2e::linux::{Kernel, Linux, LinuxConfig, in_lab};
use rustix::io::{FdFlags, fcntl_setfd};

use crate::host_devices::VIRTIO;

/// Whether `test` can run here; says why not.
fn can_run(test: &str) -> bool {
    let there = Path::new("/dev/iommu").exists();
    if in_lab(test) && !there {
        println!("SKIP: {test}: no iommufd (run scripts/test-lab iommufd)");
    }
    there && in_lab(test)
}

/// The own file of the device whose folder in sysfs is `folder`.
fn own_file(folder: &Path) -> Result<PathBuf> {
    let mut files = fs::read_dir(folder.join("vfio-dev"))?;
    let file = files.next().context("no file of its own")??;
    Ok(Path::new("/dev/vfio/devices").join(file.file_name()))
}

/// Opens a file that children inherit.
fn inherited(path: &Path) -> Result<File> {
    let file = File::options().read(true).write(true).open(path);
    let file = file.with_context(|| path.display().to_string())?;
    fcntl_setfd(&file, FdFlags::empty())?;
    Ok(file)
}

/// What `vm.info` says of the card.
fn fact(linux: &Linux, key: &str) -> Result<String> {
    let info = linux.ferry.api.get("vm.info")?;
    let fact = &info["devices"]["card"][key];
    Ok(fact.as_str().context("no such fact")?.to_owned())
}

/// A stock guest uses the card of the host, or does so after it has rebooted.
fn serves(card: &str, options: &[&str], reboots: bool) -> Result<()> {
    VIRTIO.set_up()?;
    let dir = tempfile::tempdir()?;
    let device = format!("{card},id=card");
    let config = LinuxConfig::new(Kernel::Cloud6_12)
        .options(&["--device", &device])
        .options(options);
    let mut linux = Linux::boot(dir.path(), "linux", &config)?;
    let backend = fact(&linux, "backend")?;
    ensure!(backend == "vfio with iommufd", "{backend}");
    println!("dirty source: {}", fact(&linux, "dirty_source")?);
    VIRTIO.configure(&mut linux)?;
    if reboots {
        linux.reboot(dir.path())?;
        VIRTIO.configure(&mut linux)?;
    }
    VIRTIO.stream_of(&mut linux, dir.path(), ("served", 8 << 20))?;
    let irqs = linux.shell.ask("cat /proc/interrupts")?;
    ensure!(irqs.contains("MSI"), "no MSI-X: {irqs}");
    let words = linux.ferry.process.output();
    for left in ["not destroyed", "not detached", "stays open"] {
        ensure!(!words.contains(left), "{words}");
    }
    linux.power_off()
}

#[test]
fn iommufd_card_of_the_host_serves_debian_6_12() -> Result<()> {
    if !can_run("iommufd_card_of_the_host_serves_debian_6_12") {
        return Ok(());
    }
    let card = VIRTIO.unbind()?;
    // Where there is iommufd, it is used.
    serves(&format!("path={}", card.display()), &[], false)
}

#[test]
fn iommufd_card_is_inherited_by_descriptor() -> Result<()> {
    if !can_run("iommufd_card_is_inherited_by_descriptor") {
        return Ok(());
    }
    let card = VIRTIO.unbind()?;
    let device = inherited(&own_file(&card)?)?;
    let iommufd = inherited(Path::new("/dev/iommu"))?;
    let platform = format!("iommufd=on,iommufd_fd={}", iommufd.as_raw_fd());
    let card = format!("fd={}", device.as_raw_fd());
    serves(&card, &["--platform", &platform], true)
}
