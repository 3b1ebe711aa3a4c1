//! Which `tun` the lab's kernel has: the stock one, or that with hash reports (`scripts/lab.d/modules/tun`).

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::process::wait_for;

/// A kind of tap.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Tap {
    /// The distribution's.
    Stock,
    /// With the ioctls of a generation (5 or 12) of the series, and later these of its defects.
    Patched(u8, &'static str),
}

/// A loaded module; the stock one is back when this goes.
pub(crate) struct Loaded(Tap);

fn succeed(program: &str, arguments: &[&str]) -> Result<()> {
    let done = Command::new(program)
        .args(arguments)
        .output()
        .context(program.to_owned())?;
    let said = String::from_utf8_lossy(&done.stderr).into_owned();
    ensure!(
        done.status.success(),
        "{program} {}: {said}",
        arguments.join(" ")
    );
    Ok(())
}

/// Unloads the module; the taps of a test that ended go away with its network namespace, in a while.
fn unload() -> Result<()> {
    wait_for("the last tap's end", Duration::from_secs(30), || {
        Ok(
            (succeed("rmmod", &["tun"]).is_ok() || !Path::new("/sys/module/tun").exists())
                .then_some(()),
        )
    })
}

impl Tap {
    /// What it is called.
    pub(crate) fn name(self) -> String {
        match self {
            Self::Stock => "stock".to_owned(),
            Self::Patched(generation, "") => format!("v{generation}"),
            Self::Patched(generation, _) => format!("v{generation}-defects"),
        }
    }

    /// Loads it instead of the one that is loaded.
    pub(crate) fn load(self) -> Result<Loaded> {
        if let Self::Patched(generation, _) = self {
            unload()?;
            let scripts =
                Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/lab.d/load-modules");
            let scripts = scripts.to_str().context("a path that is no text")?;
            succeed(scripts, &["tun", &format!("generation={generation}")])?;
        }
        Ok(Loaded(self))
    }
}

impl Loaded {
    /// Lets the defects in; whether there are any.
    pub(crate) fn spoil(&self) -> Result<bool> {
        let Tap::Patched(_, defects) = self.0 else {
            return Ok(false);
        };
        // Also if there are none: the parameter must be there.
        std::fs::write("/sys/module/tun/parameters/defects", format!("{defects}\n"))?;
        Ok(!defects.is_empty())
    }
}

impl Drop for Loaded {
    fn drop(&mut self) {
        if self.0 != Tap::Stock
            && let Err(error) = unload().and_then(|()| succeed("modprobe", &["tun"]))
        {
            println!("the stock tun is not back: {error:#}");
        }
    }
}
