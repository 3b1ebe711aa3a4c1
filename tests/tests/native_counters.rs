//! What a user sees of a network card: counters, metrics and `ferryctl top`.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::ferry::program;
use e2e::host;
use e2e::network::Network;
use e2e::process::wait_for;
use e2e::vm::{Vm, VmSpec};
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(30);

fn count(card: &Value, name: &str) -> Result<u64> {
    let count = card[name].as_u64();
    count.with_context(|| format!("no {name} in {card}"))
}

/// The card's counters are the sums of its queues', hash reports are counted by type, and what
/// `ferryctl` prints tells of them.
#[test]
fn packets_and_hash_reports_are_counted_by_queue() -> Result<()> {
    let Some(_turn) = host::network_turn("packets_and_hash_reports_are_counted_by_queue")? else {
        return Ok(());
    };
    let dir = tempfile::tempdir()?;
    let network = Network::new(0)?;
    let mut spec = VmSpec::new(160, "mem=16 rate=10 hash=1 irq=1");
    spec.nets.push(network.device(0));
    let vm = Vm::boot(dir.path(), "host", &spec)?;
    let traffic = network.traffic(500)?;
    let id = network.id();
    let counters = wait_for("reports of both kinds of UDP", LIMIT, || {
        let counters = vm.ferry.api.get("vm.counters")?;
        let seen = |name: &str| counters[&id][name].as_u64().is_some_and(|n| n > 200);
        Ok((seen("hash_udpv4") && seen("hash_udpv6")).then_some(counters))
    })
    .with_context(|| vm.ferry.last_words())?;
    let card = &counters[&id];
    for name in [
        "rx_frames",
        "rx_bytes",
        "tx_frames",
        "hash_none",
        "hash_udpv6",
    ] {
        let of_queue = count(card, &format!("queue0_{name}"))?;
        ensure!(count(card, name)? == of_queue, "{name}: {card}");
    }
    let by_type = card.as_object().into_iter().flatten();
    let by_type = by_type.filter(|(name, _)| name.starts_with("hash_"));
    let reports: u64 = by_type.filter_map(|(_, count)| count.as_u64()).sum();
    let frames = count(card, "rx_frames")?;
    // The packets of this moment may be in one counter and not yet in the other.
    ensure!(reports.abs_diff(frames) <= 64, "{card}");

    let ferryctl = |arguments: &[&str]| -> Result<String> {
        let socket = dir.path().join("host.sock");
        let mut command = Command::new(program("ferryctl")?);
        command.arg("--api-socket").arg(socket).args(arguments);
        let output = command.output()?;
        ensure!(output.status.success(), "{output:?}");
        Ok(String::from_utf8(output.stdout)?)
    };
    let metrics = ferryctl(&["metrics"])?;
    for part in [
        format!("ferry_device_queue_total{{device=\"{id}\",queue=\"0\",counter=\"hash_udpv4\"}} "),
        format!("ferry_device_fact{{device=\"{id}\",fact=\"hash_backend\",value=\"software\"}} 1"),
    ] {
        ensure!(metrics.contains(&part), "{part} is not in:\n{metrics}");
    }
    let top = ferryctl(&["top", "--count", "2", "--interval-ms", "500"])?;
    print!("{top}");
    ensure!(top.matches("running, 1 vCPU,").count() == 2, "{top}");
    ensure!(top.contains("hash_backend: software"), "{top}");
    let all = top
        .lines()
        .filter(|line| line.trim_start().starts_with("all "));
    let all: Vec<&str> = all.collect();
    ensure!(all.len() == 2, "{top}");
    ensure!(
        all.iter()
            .all(|line| line.contains("udpv4") && line.contains("udpv6")),
        "{top}"
    );

    let counts = traffic.stop()?;
    ensure!(counts.bad == 0, "{counts:?}");
    vm.ferry.shut_down()
}
