//! Each way in which KVM keeps its dirty log moves a busy guest whole.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::ferry::{Ferry, is_over};
use e2e::host;
use e2e::migration::{Route, check_nothing_arrived};
use e2e::process::wait_for;
use e2e::vm::{Vm, VmSpec};
use serde_json::json;

/// How often the guest goes to and fro.
const MOVES: usize = 4;

/// So little bandwidth that the guest writes much more than is sent.
const SLOW: u64 = 60 << 20;

/// A guest that writes 2 x 48 MiB as fast as it can, or `None` where KVM has no such log.
fn boot(
    dir: &Path,
    name: &str,
    dirty_log: &'static str,
    entries: Option<u32>,
) -> Result<Option<Vm>> {
    let words = "mem=96 rate=max smp=2 verify_every=2";
    let spec = VmSpec {
        cpus: 2,
        dirty_log,
        dirty_ring_entries: entries,
        ..VmSpec::new(160, words)
    };
    match Vm::boot(dir, name, &spec) {
        Ok(vm) => Ok(Some(vm)),
        Err(error) if format!("{error:#}").contains("which this KVM lacks") => {
            println!("SKIP: {dirty_log}: {error:#}");
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// How often vCPUs found their ring full, as long as there is a VM.
fn full_rings(ferry: &Ferry) -> u64 {
    let counters = ferry.api.get("vm.counters").unwrap_or_default();
    counters["vcpus"]["dirty_ring_full"].as_u64().unwrap_or(0)
}

/// To and fro between two processes, after a migration that was cancelled half-way. Gives how many
/// full rings a VM was seen to have.
fn to_and_fro(vm: &mut Vm, mut other: Ferry, dir: &Path) -> Result<u64> {
    let in_vain = Route::unix(dir).sending(json!({"max_bandwidth": SLOW}));
    in_vain.open(&other)?;
    in_vain.go(&vm.ferry)?;
    let begun = wait_for("a second round", Duration::from_secs(60), || {
        let status = vm.ferry.migration()?;
        ensure!(!is_over(&status), "{status}");
        Ok((status["rounds"].as_u64() >= Some(1)).then_some(()))
    });
    begun.context("a migration that shall be cancelled")?;
    let mut full = full_rings(&vm.ferry);
    vm.ferry.api.put("vm.cancel-migration", None)?;
    vm.stays(Duration::from_secs(20))?;
    check_nothing_arrived(&mut other)?;

    for number in 0..MOVES {
        // One with time for the guest to write everything over and over, then as fast as it goes.
        let route = Route::unix(dir);
        let route = match number {
            0 => route.sending(json!({"max_bandwidth": SLOW, "downtime_ms": 4000})),
            _ => route,
        };
        vm.reset_gap()?;
        route.open(&other)?;
        route.go(&vm.ferry)?;
        wait_for("the migration's end", Duration::from_secs(120), || {
            full = full.max(full_rings(&vm.ferry));
            Ok(is_over(&vm.ferry.migration()?).then_some(()))
        })?;
        let (left, moved) = vm.arrive(other)?;
        let disturbed = left.process.output().matches("was disturbed").count();
        println!("{}; ring resets disturbed: {disturbed}", moved.line());
        vm.verify_clean()
            .with_context(|| format!("migration {number}"))?;
        other = left;
    }
    Ok(full)
}

#[test]
fn every_dirty_log_moves_a_busy_guest() -> Result<()> {
    let Some(_turn) = host::turn("every_dirty_log_moves_a_busy_guest")? else {
        return Ok(());
    };
    for dirty_log in ["bitmap", "bitmap-auto-clear", "ring"] {
        let dir = tempfile::tempdir()?;
        let Some(mut vm) = boot(dir.path(), "left", dirty_log, None)? else {
            continue;
        };
        let info = vm.ferry.api.get("vm.info")?;
        println!("{dirty_log}: {}", info["dirty_log"]);
        ensure!(
            info["config"]["memory"]["dirty_log"]
                .as_str()
                .unwrap_or("bitmap")
                == dirty_log
        );
        // Only for the default is there something else where KVM lacks it.
        let used = info["dirty_log"].as_str().context("no dirty_log")?;
        ensure!(used == dirty_log || (dirty_log, used) == ("bitmap", "bitmap-auto-clear"));
        let other = Ferry::start(dir.path(), "right", &[])?;
        to_and_fro(&mut vm, other, dir.path()).with_context(|| dirty_log)?;
    }
    Ok(())
}

/// Rings that a vCPU fills in tens of milliseconds.
#[test]
fn a_full_ring_loses_nothing() -> Result<()> {
    let Some(_turn) = host::turn("a_full_ring_loses_nothing")? else {
        return Ok(());
    };
    let dir = tempfile::tempdir()?;
    let Some(mut vm) = boot(dir.path(), "left", "ring", Some(1024))? else {
        println!("SKIP: a_full_ring_loses_nothing: no rings");
        return Ok(());
    };
    let other = Ferry::start(dir.path(), "right", &[])?;
    let full = to_and_fro(&mut vm, other, dir.path())?;
    println!("rings of 1024 entries were full {full} times in two migrations");
    ensure!(full > 20, "only {full} times");
    Ok(())
}
