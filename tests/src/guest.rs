//! The native guest's image.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use anyhow::{Context, Result, anyhow, bail};

/// The native guest as an ELF image with a PVH entry: `FERRY_GUEST_ELF`, or built now.
///
/// # Errors
/// When `tests/guest/build.sh` fails; its complaint is in the error.
pub fn elf() -> Result<PathBuf> {
    static BUILT: OnceLock<std::result::Result<PathBuf, String>> = OnceLock::new();
    if let Some(path) = std::env::var_os("FERRY_GUEST_ELF") {
        return Ok(PathBuf::from(path));
    }
    BUILT
        .get_or_init(|| build().map_err(|error| format!("{error:#}")))
        .clone()
        .map_err(|text| anyhow!(text))
}

/// Builds into a name of this process's own, then renames: tests in other processes may do the
/// same, or boot the image, at this moment.
fn build() -> Result<PathBuf> {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("guest");
    let dir =
        std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| source.join("target"), PathBuf::from);
    std::fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
    let path = dir.join("native-guest.elf");
    let fresh = dir.join(format!("native-guest.{}.elf", std::process::id()));
    let output = Command::new(source.join("build.sh"))
        .arg(&fresh)
        .output()
        .context("cannot run tests/guest/build.sh")?;
    if !output.status.success() {
        bail!(
            "tests/guest/build.sh: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    std::fs::rename(&fresh, &path)?;
    Ok(path)
}
