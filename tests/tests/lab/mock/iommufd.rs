//! The same devices by their own files and an iommufd: in the lab's kernel that has them
//! (`scripts/test-lab iommufd`). With an IOMMU of the devices' own, what they write is in the dirty
//! bits of its page table, which the kernel's iommufd reports.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::json;

use super::device::{DEVICES, can_run};
use super::rig::{Rig, Shape, number};

/// Whether `test` can run here; says why not.
fn has_iommufd(test: &str) -> bool {
    let there = Path::new("/dev/iommu").exists();
    if can_run(test) && !there {
        println!("SKIP: {test}: no iommufd (run scripts/test-lab iommufd)");
    }
    there && can_run(test)
}

fn run(program: &str, arguments: &[&str]) -> Result<()> {
    let status = Command::new(program).args(arguments).status()?;
    ensure!(status.success(), "{program} {arguments:?}: {status}");
    Ok(())
}

/// Loads the devices anew, behind an IOMMU of their own or VFIO's emulation of one, unless they are
/// so already.
fn put_behind_iommu(own: bool) -> Result<()> {
    let now = fs::read_to_string("/sys/module/ferry_mock_vfio/parameters/iommu")?;
    if (now.trim() == "Y") == own {
        return Ok(());
    }
    let modules = std::env::var_os("FERRY_LAB_MODULES").context("FERRY_LAB_MODULES is not set")?;
    let module = PathBuf::from(modules).join("ferry_mock_vfio.ko");
    let module = module.to_str().context("a folder's name")?;
    let devices = format!("devices={}", 2 * DEVICES);
    let iommu = format!("iommu={}", u8::from(own));
    run("rmmod", &["ferry_mock_vfio"])?;
    run("insmod", &[module, &devices, &iommu, "state_bytes=0"])
}

/// Moves the guest once, with at least one round of pre-copy; how many pages are not as they were
/// written.
fn move_once(rig: &mut Rig) -> Result<u64> {
    let moved = rig.migrate(json!({
        "downtime_ms": 1000, "timeout_s": 300, "timeout_strategy": "ignore",
    }))?;
    let (corrupt, checked) = (moved.corrupt(), number(&moved.arrival, "checked"));
    println!(
        "{corrupt} of {checked} pages corrupt, downtime {:.1?}, by {}",
        moved.downtime("total"),
        moved.status["sources"]
    );
    Ok(corrupt)
}

/// Moves a guest with two devices to and fro, and once more with reports that are lost.
fn loses_no_page(dirty_log: bool, dirty_source: &str, moves: usize) -> Result<()> {
    let mut rig = Rig::boot(Shape {
        flags: 7,
        devices: 2,
        dirty_log,
    })?;
    for mock in rig.all() {
        mock.set("config/state_bytes", 1 << 20)?;
    }
    for _ in 0..moves {
        let info = rig.linux.ferry.api.get("vm.info")?;
        for id in ["mock0", "mock1"] {
            let facts = &info["devices"][id];
            ensure!(facts["backend"] == "vfio with iommufd", "{facts}");
            ensure!(facts["dirty_source"] == dirty_source, "{facts}");
        }
        ensure!(move_once(&mut rig)? == 0, "pages were lost");
    }
    for mock in rig.here() {
        mock.set("faults/lose_log", 1)?;
    }
    ensure!(move_once(&mut rig)? > 0, "lost pages were not noticed");
    let words = rig.linux.ferry.process.output();
    ensure!(!words.contains("WARN"), "{words}");
    rig.end()
}

#[test]
fn iommufd_devices_that_move_under_dma_lose_no_page() -> Result<()> {
    if !has_iommufd("iommufd_devices_that_move_under_dma_lose_no_page") {
        return Ok(());
    }
    put_behind_iommu(false)?;
    loses_no_page(true, "device DMA log", 1)
}

#[test]
fn iommufd_page_tables_tell_what_devices_without_a_log_wrote() -> Result<()> {
    if !has_iommufd("iommufd_page_tables_tell_what_devices_without_a_log_wrote") {
        return Ok(());
    }
    put_behind_iommu(true)?;
    loses_no_page(false, "IOMMU dirty bits (iommufd)", 2)
}
