//! The tests see loss when there is loss: the same migration with a dirty log that forgets.

use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{Result, ensure};
use e2e::ferry::{Ferry, Nic};
use e2e::guest_output::Verify;
use e2e::host;
use e2e::migration::Route;
use e2e::network::Network;
use e2e::nic_proxy::NicProxy;
use e2e::process::wait_for;
use e2e::vm::{Vm, VmSpec};
use serde_json::json;

/// Slow enough for a second or more of packets between a page's sending and the switchover.
const BYTES_PER_SECOND: u64 = 60 << 20;

/// So slow a report is not waited for alone: the next round asks several sources at once.
const SLOW_REPORT: Duration = Duration::from_millis(5);

/// Migrates a guest whose passthrough card is under traffic, with a proxy before the card's
/// server that makes its reports slow; gives the audit at the destination, and the pages that the
/// card reported and that were forgotten.
fn migrate(dir: &Path, card: Network, forget: bool) -> Result<(Verify, u64, u64)> {
    let mac = card.mac();
    let options = ["--mac", &mac, "--hash-report", "on"];
    let nics = [0, 1].map(|end| Nic::start(dir, &format!("card{end}"), &card.tap(end), &options));
    let [source_nic, destination_nic] = nics;
    let (source_nic, destination_nic) = (source_nic?, destination_nic?);
    let proxy = NicProxy::start(&dir.join("proxy"), &source_nic.socket)?;

    let mut spec = VmSpec::new(160, "mem=64 rate=20 hash=1 irq=1 retain=4096");
    spec.user_devices = vec![json!({"id": card.id(), "socket": proxy.socket})];
    let mut vm = Vm::boot(dir, "source", &spec)?;
    let stream = card.traffic(800)?;
    wait_for("echoes", Duration::from_secs(20), || {
        Ok((stream.counts().received > 500).then_some(()))
    })?;
    proxy.log.forget.store(forget, Ordering::Relaxed);
    let delay = u64::try_from(SLOW_REPORT.as_millis())?;
    proxy.log.delay_ms.store(delay, Ordering::Relaxed);

    let destination = Ferry::start(dir, "destination", &[])?;
    let route = Route::unix(dir)
        .sending(json!({"max_bandwidth": BYTES_PER_SECOND, "downtime_ms": 100}))
        .receiving(json!({"user_devices": [{"id": card.id(), "socket": destination_nic.socket}]}));
    vm.reset_gap()?;
    route.open(&destination)?;
    route.go(&vm.ferry)?;
    let status = vm.ferry.wait_migration(Duration::from_secs(60))?;
    ensure!(status["aborted"].is_null(), "{status}");
    ensure!(status["rounds"].as_u64() >= Some(2), "{status}");
    destination.wait_migration(Duration::from_secs(10))?;
    vm.follow(destination)?;
    let found = vm.verify()?;
    let counts = stream.stop()?;
    println!("forget {forget}: {found:?}, {counts:?}");
    let log = &proxy.log;
    let [reported, forgotten] = [&log.reported, &log.forgotten].map(|n| n.load(Ordering::Relaxed));
    Ok((found, reported, forgotten))
}

#[test]
fn a_dirty_log_that_forgets_is_noticed() -> Result<()> {
    let Some(_turn) = host::network_turn("a_dirty_log_that_forgets_is_noticed")? else {
        return Ok(());
    };
    let card = Network::new(0)?;
    let dir = tempfile::tempdir()?;
    let (found, reported, forgotten) = migrate(dir.path(), card, true)?;
    ensure!(
        forgotten > 100 && forgotten <= reported,
        "{forgotten} of {reported} forgotten"
    );
    ensure!(
        found.rx_pages_corrupt > 0,
        "{forgotten} pages were forgotten and nobody noticed: {found:?}"
    );

    // What made the difference was the forgetting. On another bridge: the first one has learned
    // that the card's address is at the destination, and tells nothing to a card at the source
    // that only answers.
    let card = Network::new(1)?;
    let dir = tempfile::tempdir()?;
    let (found, reported, forgotten) = migrate(dir.path(), card, false)?;
    ensure!(
        reported > 100 && forgotten == 0,
        "{forgotten} of {reported} forgotten"
    );
    ensure!(found.rx_pages > 500, "{found:?}");
    ensure!(
        found.corrupt == 0 && found.rx_pages_corrupt == 0,
        "{found:?}"
    );
    Ok(())
}
