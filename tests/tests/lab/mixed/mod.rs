//! Frames of all sorts, and the hash and queue of each, against what they were made as.
//!
//! The frames and what must be reported are those of `test-packets`; the guest's `guest_net reports`
//! compares. Each test sends three streams: one while settings change, one of which the reported types are
//! looked at too, and one while the guest moves.
//!
//! By default one guest, and few frames. The matrix of guests, queues and taps takes hours, and is run by
//! `scripts/test-lab matrix --ignored`; `FERRY_LAB_MATRIX` says words one of which is in a case's name,
//! `FERRY_LAB_FRAMES` how many frames a stream has, `FERRY_LAB_TIMEOUT` how many seconds all may take.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use e2e::linux::{Kernel, in_lab};

mod scene;
mod sender;
mod tap;

use scene::{Outcome, Run, Scene, View};
use tap::Tap;

/// Frames of a stream, unless `FERRY_LAB_FRAMES` says otherwise.
const FRAMES: u32 = 4000;
/// How long anything may take on a loaded machine.
const LONG: Duration = Duration::from_secs(300);
/// Frames per second while something else goes on: a change of settings takes place among some hundreds of them.
const PER_SECOND: u32 = 500;
/// And while the guest moves: more would keep it from getting anywhere.
const SLOW: u32 = 200;
/// And while nothing goes on.
const FAST: u32 = 5000;

/// Changes of settings, evenly over `frames`.
fn plan(frames: u32, pairs: u8, rss: bool) -> String {
    let mut steps: Vec<String> = [
        "rxhash:off",
        "rxhash:on",
        "hkey:7",
        "flow:udp4:addresses",
        "flow:udp4:ports",
    ]
    .map(str::to_owned)
    .to_vec();
    if pairs > 1 {
        // Before the table is the user's own, drivers may make a new one.
        steps.extend(["combined:1".to_owned(), format!("combined:{pairs}")]);
        if rss {
            let shares: String = (1..=pairs).map(|share| format!(":{share}")).collect();
            steps.extend([
                format!("equal:{pairs}"),
                format!("weight{shares}"),
                "hkey:8".to_owned(),
            ]);
            // A table with more queues than there shall be is refused by the kernel.
            steps.extend(["equal:1", "combined:1"].map(str::to_owned));
            steps.extend([format!("combined:{pairs}"), format!("equal:{pairs}")]);
        }
    }
    let every = frames / (u32::try_from(steps.len()).unwrap_or(0) + 1);
    let at = (1..).map(|step| every * step);
    let steps = at.zip(steps).map(|(at, step)| format!("{at}={step}"));
    steps.collect::<Vec<_>>().join(",")
}

/// Every kind of report that a driver asks for was there, and every queue.
fn check_variety(outcome: &Outcome, pairs: u8) -> Result<()> {
    let reports = outcome.numbers("reports");
    ensure!(
        reports.len() == 10 && reports[..7].iter().all(|count| *count > 0),
        "{outcome:?}"
    );
    ensure!(reports[7..].iter().all(|count| *count == 0), "{outcome:?}");
    let queues = outcome.numbers("queues");
    ensure!(
        queues.len() == usize::from(pairs) && queues.iter().all(|count| *count > 0),
        "{outcome:?}"
    );
    Ok(())
}

/// A guest, its card and the tap behind it.
#[derive(Clone, Copy, Debug)]
struct Case {
    kernel: Kernel,
    pairs: u8,
    rss: bool,
    tap: Tap,
    /// Frames of a stream.
    frames: u32,
}

impl Case {
    fn name(&self) -> String {
        let rss = if self.rss { "rss" } else { "hash" };
        let tap = match self.tap {
            Tap::Stock => "stock".to_owned(),
            Tap::Patched(generation, defects) => format!(
                "v{generation}{}{defects}",
                if defects.is_empty() { "" } else { "-" }
            ),
        };
        format!("{}-{}pairs-{rss}-{tap}", self.kernel.name(), self.pairs)
    }

    /// The three streams.
    fn run(&self) -> Result<()> {
        // Dropped last: it needs the end of the taps.
        let _module = self.tap.load()?;
        let dir = tempfile::tempdir()?;
        let options = if self.rss {
            "hash_report=on,rss=on"
        } else {
            "hash_report=on"
        };
        let mut scene = Scene::new(dir.path(), self.kernel, self.pairs, options)?;
        let begun = Instant::now();
        let told = |what: &str, outcome: &Outcome| {
            let (name, seconds) = (self.name(), begun.elapsed().as_secs());
            println!(
                "{name} {what}: {seconds} s, {} of {} frames, {:?}\n{}{}",
                outcome.number("seen"),
                outcome.sent,
                outcome.taken,
                outcome.about,
                outcome.done
            );
        };

        let plan = plan(self.frames, self.pairs, self.rss);
        let stream = Run {
            view: View::Skb,
            seed: 1,
            count: self.frames,
            per_second: PER_SECOND,
            plan: &plan,
        };
        let outcome = scene.run(stream, |_, _| Ok(()))?;
        told("settings", &outcome);
        outcome.check()?;

        let stream = Run {
            view: View::Xdp,
            seed: 2,
            per_second: FAST,
            plan: "",
            ..stream
        };
        let outcome = scene.run(stream, |_, _| Ok(()))?;
        told("types", &outcome);
        outcome.check()?;
        check_variety(&outcome, self.pairs)?;

        // As many as a slow migration can take.
        let stream = Run {
            seed: 3,
            count: 100_000.max(self.frames),
            per_second: SLOW,
            ..stream
        };
        let outcome = scene.run(stream, |scene, sender| {
            sender.wait_more(300, LONG)?;
            scene.migrate(dir.path(), "b")?;
            sender.wait_more(300, LONG)?;
            if self.frames < stream.count {
                sender.enough();
            }
            Ok(())
        })?;
        told("migration", &outcome);
        outcome.check()?;
        ensure!(
            outcome.taken.iter().all(|taken| taken.read > 200),
            "{outcome:?}"
        );
        println!("{:?}", scene.ferry().event_names());
        scene.end()
    }
}

#[test]
fn debian_6_12_gets_the_right_hash_of_each_frame_on_the_right_queue() -> Result<()> {
    if !in_lab("debian_6_12_gets_the_right_hash_of_each_frame_on_the_right_queue") {
        return Ok(());
    }
    let case = Case {
        kernel: Kernel::Cloud6_12,
        pairs: 2,
        rss: true,
        tap: Tap::Stock,
        frames: FRAMES,
    };
    case.run()
}

/// All cases: each guest, number of pairs and tap.
fn cases(frames: u32) -> impl Iterator<Item = Case> {
    let taps = [
        Tap::Stock,
        Tap::Patched(5, ""),
        Tap::Patched(12, ""),
        Tap::Patched(5, "automq,key,single_queue,tunnels"),
        Tap::Patched(12, "automq,key,single_queue,tunnels"),
    ];
    let kernels = [Kernel::Cloud6_12, Kernel::Cloud6_1];
    let each = move |tap, kernel, pairs| {
        let case = move |rss| Case {
            kernel,
            pairs,
            rss,
            tap,
            frames,
        };
        [case(true), case(false)]
    };
    taps.into_iter().flat_map(move |tap| {
        kernels.into_iter().flat_map(move |kernel| {
            [2, 1, 4]
                .into_iter()
                .flat_map(move |pairs| each(tap, kernel, pairs))
        })
    })
}

#[test]
#[ignore = "it takes hours: scripts/test-lab matrix --ignored"]
fn matrix_of_guests_and_taps() -> Result<()> {
    if !in_lab("matrix_of_guests_and_taps") {
        return Ok(());
    }
    let words = std::env::var("FERRY_LAB_MATRIX").unwrap_or_default();
    let words: Vec<&str> = words.split_whitespace().collect();
    let is_wanted =
        |case: &Case| words.is_empty() || words.iter().any(|word| case.name().contains(word));
    let frames = match std::env::var("FERRY_LAB_FRAMES") {
        Ok(number) => number.parse()?,
        Err(_) => FRAMES,
    };
    let mut failed = Vec::new();
    for case in cases(frames).filter(is_wanted) {
        println!("== {}", case.name());
        // One after the other, each in a network namespace, and so a thread, of its own.
        let outcome = std::thread::spawn(move || case.run()).join();
        match outcome {
            Ok(Ok(())) => println!("== {} ok", case.name()),
            Ok(Err(error)) => failed.push(format!("{}: {error:#}", case.name())),
            Err(_) => failed.push(format!("{}: panicked", case.name())),
        }
    }
    ensure!(failed.is_empty(), "{}", failed.join("\n"));
    Ok(())
}
