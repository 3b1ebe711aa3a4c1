//! The demo with a stock Debian guest.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use vm_migration::migrate::MigrationStatus;

use super::link::{Link, LinkMover};
use super::linux_words::Words;
use super::native::{NICS, hash_backend, machine_arguments, receive_body, start_cards};
use super::report::{
    GuestOutcome, HashOutcome, MigrationOutcome, NicOutcome, Outcome, explained_loss,
};
use super::{LinuxFiles, Options, Progress, in_lab};
use crate::console::Console;
use crate::ferry::program;
use crate::process::{Process, wait_for};
use crate::vmm_process::FerryConsole;

/// How long a stock kernel may take to its init where KVM runs it well.
const PROBE_LIMIT: Duration = Duration::from_secs(20);
/// The line by which `scripts/guest-image`'s init says that it runs.
const INIT: &str = "GUEST-INIT";
const MIGRATION_LIMIT: Duration = Duration::from_secs(300);
const WORD_LIMIT: Duration = Duration::from_secs(240);
const POLL: Duration = Duration::from_millis(200);
/// Bytes per second of each TCP stream.
const TCP_RATE: &str = "100000";
/// Nothing may be silent for longer than this without the migration, on a slow host.
const SLACK_MS: u64 = 1000;

/// A stream from the host to the guest: what the guest calls its end, the sender's words, and
/// where to.
struct Flow {
    name: &'static str,
    sender: &'static [&'static str],
    to: String,
}

/// Numbered packets and a TCP stream through each NIC. The first NIC's have a hash each.
fn flows(links: [Link; 2]) -> [Flow; 4] {
    let [first, second] = links;
    let flow = |name, sender, to| Flow { name, sender, to };
    [
        flow(
            "udp0",
            &["udp-seq", "send"],
            format!("{}:7000", first.guest4()),
        ),
        flow(
            "udp1",
            &["udp-seq", "send"],
            format!("[{}]:7000", second.guest6()),
        ),
        flow("tcp0", &["tcp-send"], format!("[{}]:7001", first.guest6())),
        flow("tcp1", &["tcp-send"], format!("{}:7001", second.guest4())),
    ]
}

/// Whether KVM on this machine boots a stock kernel: tries to.
///
/// # Errors
/// When ferry cannot even be started.
pub fn can_run(dir: &Path, files: &LinuxFiles) -> Result<bool> {
    if !Path::new("/dev/kvm").exists() {
        return Ok(false);
    }
    let mut command = Command::new(program("ferry")?);
    command.args(boot_arguments(files, "demo.probe")).args([
        "--memory",
        "size=512M",
        "--serial",
        "tty",
        "--console",
        "off",
    ]);
    let mut console = Console::start("probe", command, &dir.join("probe.log"))?;
    let deadline = Instant::now() + PROBE_LIMIT;
    while Instant::now() < deadline && !console.has_ended() {
        if console.text().contains(INIT) {
            return Ok(true);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(console.text().contains(INIT))
}

fn boot_arguments(files: &LinuxFiles, words: &str) -> Vec<String> {
    vec![
        "--kernel".to_owned(),
        files.kernel.display().to_string(),
        "--initramfs".to_owned(),
        files.initramfs.display().to_string(),
        "--cmdline".to_owned(),
        format!("console=ttyS0 quiet loglevel=1 panic=-1 reboot=t {words}"),
    ]
}

/// Everything that runs.
struct Stage {
    source: FerryConsole,
    destination: FerryConsole,
    _cards: [crate::ferry::Nic; 2],
    links: [Link; 2],
    words: Words,
}

/// Runs the demo. The caller is in a network namespace of its own; files go to `dir`.
///
/// # Errors
/// When something does not work at all. What works and is wrong is in the outcome.
pub fn run(
    dir: &Path,
    options: &Options,
    files: &LinuxFiles,
    progress: &mut Progress,
) -> Result<Outcome> {
    let mut stage = Stage::start(dir, options, files, progress)?;
    progress.step("sending packets and TCP streams through both NICs");
    let senders = stage.start_senders(dir, options, files)?;
    std::thread::sleep(Duration::from_secs(options.seconds));
    stage.hear_from_source("hashed")?;

    progress.step("migrating the guest to the second process");
    let status = stage.migrate(dir, options, progress)?;
    progress.step("guest runs at the destination; letting it work");
    stage.destination.console.say(b"hash\n")?;
    stage.hear("hashed2")?;
    std::thread::sleep(Duration::from_secs(options.seconds));

    progress.step("ending the streams, checking every page at the destination");
    let sent = stop_senders(senders)?;
    stage.destination.console.say(b"stop\n")?;
    stage.hear("end")?;
    let backend = hash_backend(&stage.destination)?;
    stage.outcome(options, &status, &sent, backend)
}

impl Stage {
    fn start(
        dir: &Path,
        options: &Options,
        files: &LinuxFiles,
        progress: &Progress,
    ) -> Result<Self> {
        progress.step("starting two ferry and two ferry-nic processes");
        let links = [Link::new(0)?, Link::new(1)?];
        let cards = start_cards(dir, links[1])?;
        let rate = if options.rate == "max" {
            "1000"
        } else {
            &options.rate
        };
        let words = format!("demo.mib={} demo.rate={rate}", dirty_mib(options));
        let mut arguments = boot_arguments(files, &words);
        arguments.extend(machine_arguments(options.memory_mib, dir, links));
        let destination = FerryConsole::start(dir, "destination", &[])?;
        progress.step("booting a stock Debian kernel");
        let source = FerryConsole::start(dir, "source", &arguments)?;
        let mut stage = Self {
            source,
            destination,
            _cards: cards,
            links,
            words: Words::default(),
        };
        stage.hear_from_source("ready")?;
        Ok(stage)
    }

    fn hear_from_source(&mut self, word: &str) -> Result<()> {
        hear(&mut self.source.console, &mut self.words, word)
    }

    fn hear(&mut self, word: &str) -> Result<()> {
        hear(&mut self.destination.console, &mut self.words, word)
    }

    fn start_senders(
        &self,
        dir: &Path,
        options: &Options,
        files: &LinuxFiles,
    ) -> Result<Vec<(&'static str, Process)>> {
        let mut senders = Vec::new();
        for flow in flows(self.links) {
            let rate = if flow.name.starts_with("tcp") {
                TCP_RATE.to_owned()
            } else {
                options.packets_per_second.to_string()
            };
            let mut command = Command::new(&files.guest_net);
            command
                .args(flow.sender)
                .args(["--to", &flow.to, "--rate", &rate]);
            let log = dir.join(format!("{}.sender", flow.name));
            senders.push((flow.name, Process::start(flow.name, command, &log)?));
        }
        Ok(senders)
    }

    fn migrate(
        &mut self,
        dir: &Path,
        options: &Options,
        progress: &mut Progress,
    ) -> Result<MigrationStatus> {
        let url = options.transport.url(dir);
        let receive = receive_body(&url, dir, self.links);
        self.destination
            .api
            .put("vm.receive-migration", Some(&receive))?;
        let mover = LinkMover::start(self.links.to_vec(), dir.join("destination.events"))?;
        self.source.send(&url, options.downtime_ms)?;
        let result = self
            .source
            .follow(&mut self.destination, (POLL, MIGRATION_LIMIT), |status| {
                progress.migration(status)
            });
        progress.migration_over();
        let status = result?;
        mover.finish()?;
        let rest = self.source.console.take();
        self.words.feed(&rest);
        Ok(status)
    }

    fn outcome(
        &self,
        options: &Options,
        status: &MigrationStatus,
        sent: &[(&'static str, Value)],
        backend: String,
    ) -> Result<Outcome> {
        let dirty = self.words.object("dirty")?;
        let mut problems = Vec::new();
        let mut notes = Vec::new();
        if dirty["counts_right"] != true {
            problems.push("the guest's own counters are wrong".to_owned());
        }
        let mut nic = NicOutcome::default();
        let downtime_ms = status
            .downtime
            .as_ref()
            .map_or(0, |downtime| downtime.total)
            / 1000;
        for (name, sender) in sent {
            let guest = self.words.object(name)?;
            let (note, problem) = if name.starts_with("tcp") {
                judge_tcp(name, sender, &guest)
            } else {
                nic.sent += number(sender, "sent");
                nic.received += number(&guest, "received");
                judge_udp(name, sender, &guest, options, downtime_ms)
            };
            notes.push(note);
            problems.extend(problem);
        }
        nic.lost = nic.sent.saturating_sub(nic.received);
        let hash: HashOutcome = self.words.hashes(backend)?;
        let gap = u32::try_from(self.longest_standstill()?).unwrap_or(u32::MAX);
        Ok(Outcome {
            guest: GuestOutcome {
                kind: self.kind(),
                memory_mib: options.memory_mib,
                // Each was checked when the guest ended its work, besides what was checked before.
                pages_verified: dirty_mib(options) * 256,
                pages_corrupt: number(&dirty, "corrupt"),
                max_gap_ms: f64::from(gap),
            },
            migration: MigrationOutcome::new(status),
            hash,
            nic,
            lab: None,
            problems,
            notes,
        })
    }

    /// The longest the guest can have stood still, in ms: all its programs do when it does, so
    /// no longer than the one that was held up least.
    fn longest_standstill(&self) -> Result<u64> {
        let mut least = u64::MAX;
        for name in ["dirty", "udp0", "udp1"] {
            least = least.min(number(&self.words.object(name)?, "longest_gap_ms"));
        }
        Ok(least)
    }

    fn kind(&self) -> String {
        let kernel = self.words.all("kernel").first().copied().unwrap_or("?");
        let place = if in_lab() { " in the lab" } else { "" };
        format!("linux {kernel}{place}")
    }
}

/// How much of its memory the guest writes and checks.
fn dirty_mib(options: &Options) -> u64 {
    options.memory_mib / 4
}

fn hear(console: &mut Console, words: &mut Words, word: &str) -> Result<()> {
    let result = wait_for(&format!("{word:?} from the guest"), WORD_LIMIT, || {
        let bytes = console.take();
        words.feed(&bytes);
        if bytes.is_empty() {
            console.check()?;
        }
        Ok(words.said(word).then_some(()))
    });
    result.with_context(|| console.words())
}

/// Ends the senders; what each has to say at its end.
fn stop_senders(senders: Vec<(&'static str, Process)>) -> Result<Vec<(&'static str, Value)>> {
    for (_, sender) in &senders {
        sender.terminate()?;
    }
    let mut results = Vec::new();
    for (name, mut sender) in senders {
        sender.wait(Duration::from_secs(30))?;
        let output = sender.output();
        let last = output.lines().last().unwrap_or_default();
        let result: Value =
            serde_json::from_str(last).with_context(|| format!("{name} said {output:?}"))?;
        ensure!(result["event"] == "done", "{name} ended with {result}");
        results.push((name, result));
    }
    Ok(results)
}

fn number(value: &Value, key: &str) -> u64 {
    value[key].as_u64().unwrap_or(0)
}

/// The NIC that a flow goes through.
fn nic_of(flow: &str) -> &'static str {
    if flow.ends_with('0') {
        NICS[0]
    } else {
        NICS[1]
    }
}

fn judge_tcp(name: &str, sender: &Value, guest: &Value) -> (String, Option<String>) {
    let (bytes, arrived) = (number(sender, "bytes"), number(guest, "bytes"));
    let same = bytes > 0 && bytes == arrived && sender["crc32c"] == guest["crc32c"];
    let nic = nic_of(name);
    let note = format!(
        "{nic}: a TCP stream of {bytes} bytes went on through the move, {}",
        if same { "checksums match" } else { "DAMAGED" }
    );
    let problem = format!("{nic}: TCP stream: sent {sender}, received {guest}");
    (note, (!same).then_some(problem))
}

fn judge_udp(
    name: &str,
    sender: &Value,
    guest: &Value,
    options: &Options,
    downtime_ms: u64,
) -> (String, Option<String>) {
    let (sent, received) = (number(sender, "sent"), number(guest, "received"));
    let silence = number(guest, "longest_gap_ms");
    // The guest's clock may have stood still with the guest, so the VMM's count is added.
    let explained = explained_loss(options.packets_per_second, silence + downtime_ms + SLACK_MS);
    let lost = sent.saturating_sub(received);
    let nic = nic_of(name);
    let note = format!("{nic}: {received} of {sent} packets arrived, longest silence {silence} ms");
    let problem = if received == 0 {
        Some(format!("{nic}: no packet arrived"))
    } else if number(guest, "foreign") != 0 {
        Some(format!("{nic}: {} packets came changed", guest["foreign"]))
    } else {
        (lost > explained).then(|| {
            format!("{nic}: {lost} packets lost, the link's move explains at most {explained}")
        })
    };
    (note, problem)
}
