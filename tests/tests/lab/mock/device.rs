//! A mock device of the host: what it shall do, and what it did.

use std::fmt::Display;
use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};
use e2e::linux::in_lab;

/// How many there are for each of the two processes.
pub(super) const DEVICES: usize = 4;

/// Whether `test` can run here; says why not.
pub(super) fn can_run(test: &str) -> bool {
    let there = Mock(2 * DEVICES - 1).path().exists();
    if in_lab(test) && !there {
        println!(
            "SKIP: {test}: no {} mock devices (run scripts/test-lab)",
            2 * DEVICES
        );
    }
    there && in_lab(test)
}

/// One of them, by its number.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Mock(pub(super) usize);

impl Mock {
    /// Its folder in sysfs, by which a VMM knows it.
    pub(super) fn path(self) -> PathBuf {
        format!("/sys/devices/platform/ferry_mock_vfio.{}", self.0).into()
    }

    /// Writes a file of `config` or `faults`.
    pub(super) fn set(self, file: &str, value: impl Display) -> Result<()> {
        let path = self.path().join(file);
        fs::write(&path, value.to_string())
            .with_context(|| format!("{value} to {}", path.display()))
    }

    /// Reads a file of any folder.
    pub(super) fn get(self, file: &str) -> Result<String> {
        let path = self.path().join(file);
        let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        Ok(text.trim().to_owned())
    }

    /// All as after the module was loaded, but for what the device does now.
    pub(super) fn restore(self) -> Result<()> {
        for (file, value) in [
            ("config/migration_flags", "7"),
            ("config/dirty_log", "1"),
            ("config/state_bytes", "1048576"),
            ("config/precopy_percent", "100"),
            ("config/precopy_dirty_rate", "0"),
            ("config/save_rate", "0"),
            ("config/load_rate", "0"),
            ("config/arc_delay_ms", "0"),
            ("config/pci_subdevice", "1"),
            ("config/log_page_min", "4096"),
            ("config/log_ranges", "256"),
            ("config/log_ranges_refused", "0"),
            ("config/log_bytes", "0"),
            ("config/p2p_ram_dma", "0"),
            ("faults/fail_arc", "* * 0 stay"),
            ("faults/fail_log_start", "0"),
            ("faults/fail_report", "0"),
            ("faults/fail_report_skip", "0"),
            ("faults/fail_reset", "0"),
            ("faults/lose_log", "0"),
            ("faults/lose_dma", "0"),
            ("faults/enomsg_run", "0"),
            ("faults/short_io", "0"),
            ("faults/corrupt_state", "0"),
            ("faults/cut_state", "0"),
            ("faults/stateless", "0"),
        ] {
            self.set(file, value)?;
        }
        Ok(())
    }
}
