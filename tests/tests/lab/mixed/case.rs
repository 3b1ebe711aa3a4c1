//! One guest on one kind of tap.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use e2e::linux::Kernel;

use super::plan;
use super::scene::{Outcome, Run, Scene, View};
use super::tap::Tap;

/// How long anything may take on a loaded machine.
const LONG: Duration = Duration::from_secs(900);
/// Frames per second while something else goes on: a change of settings takes place among some hundreds of them.
const PER_SECOND: u32 = 500;
/// And while the guest moves: more would keep it from getting anywhere.
const SLOW: u32 = 200;
/// The event that tells that a kernel's hashes are no longer used.
const FALLBACK: &str = "hash-backend-fallback";

/// What the guest's card offers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Wish {
    /// Hash reports.
    Reports,
    /// And receive-side scaling.
    Rss,
}

/// A guest, its card and the tap behind it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Case {
    pub(crate) kernel: Kernel,
    pub(crate) pairs: u8,
    pub(crate) wish: Wish,
    pub(crate) tap: Tap,
    /// Frames of a stream.
    pub(crate) frames: u32,
    /// Whether the guest moves, which takes the longest.
    pub(crate) moves: bool,
}

impl Case {
    /// What it is called.
    pub(crate) fn name(&self) -> String {
        let (kernel, pairs) = (self.kernel.name(), self.pairs);
        let wish = match self.wish {
            Wish::Reports => "reports",
            Wish::Rss => "rss",
        };
        format!("{kernel}-{pairs}pairs-{wish}-{}", self.tap.name())
    }

    /// Whether a kernel can do anything for this card: hashes of the kernel are right only with RSS.
    fn kernel_hashes(&self) -> bool {
        self.wish == Wish::Rss && self.pairs > 1 && self.tap != Tap::Stock
    }

    /// All of it.
    pub(crate) fn run(&self) -> Result<()> {
        // Dropped last: it needs the end of the taps.
        let module = self.tap.load()?;
        let dir = tempfile::tempdir()?;
        let options = match self.wish {
            Wish::Reports => "hash_report=on",
            Wish::Rss => "hash_report=on,rss=on",
        };
        let mut scene = Scene::new(dir.path(), self.kernel, self.pairs, options)?;
        let begun = Instant::now();
        self.change_settings(&mut scene, begun)?;
        self.check_backend(&scene, self.kernel_hashes(), false)?;

        let spoilt = module.spoil()?;
        self.look_at_types(&mut scene, begun)?;
        let wrong = spoilt && self.kernel_hashes();
        self.check_backend(&scene, self.kernel_hashes() && !wrong, wrong)?;

        if self.moves {
            self.migrate(&mut scene, begun, dir.path())?;
        }
        scene.end()
    }

    /// A stream of at least the case's frames that goes on until all of a plan is done.
    fn stream(&self, scene: &mut Scene, view: View, seed: u64, plan: &str) -> Result<Outcome> {
        let stream = Run {
            view,
            seed,
            // As many as a slow machine can take.
            count: self.frames.max(40_000),
            per_second: PER_SECOND.max(self.frames / 60),
            plan,
        };
        scene.run(stream, |scene, sender| {
            scene.wait_steps(plan.split(',').count(), LONG)?;
            sender.wait_sent(self.frames, LONG)?;
            // Of the last change too there are some.
            if sender.sent() + 500 < stream.count {
                sender.wait_more(500, LONG)?;
                sender.enough();
            }
            Ok(())
        })
    }

    /// Every setting changes under way.
    fn change_settings(&self, scene: &mut Scene, begun: Instant) -> Result<()> {
        let plan = plan::all(self.frames, self.pairs, self.wish == Wish::Rss);
        let outcome = self.stream(scene, View::Skb, 1, &plan)?;
        self.tell("settings", begun, &outcome);
        outcome.check()
    }

    /// What is reported besides the hash, with more and more types.
    fn look_at_types(&self, scene: &mut Scene, begun: Instant) -> Result<()> {
        let outcome = self.stream(scene, View::Xdp, 2, &plan::types(self.frames))?;
        self.tell("types", begun, &outcome);
        outcome.check()?;
        // None and the six types that a Linux driver asks for were there, and every queue.
        let reports = outcome.numbers("reports");
        let as_asked = |(kind, count): (usize, &u64)| (kind < 7) == (*count > 0);
        let reports = reports.len() == 10 && reports.iter().enumerate().all(as_asked);
        ensure!(reports, "{outcome:?}");
        let queues = outcome.numbers("queues");
        let all = queues.len() == usize::from(self.pairs) && queues.iter().all(|count| *count > 0);
        ensure!(all, "{outcome:?}");
        Ok(())
    }

    /// The guest goes to another process and tap in the middle of a stream.
    fn migrate(&self, scene: &mut Scene, begun: Instant, dir: &std::path::Path) -> Result<()> {
        let stream = Run {
            view: View::Xdp,
            seed: 3,
            // As many as a slow migration can take.
            count: self.frames.max(100_000),
            per_second: SLOW.max(self.frames / 100),
            plan: "",
        };
        let outcome = scene.run(stream, |scene, sender| {
            sender.wait_more(300, LONG)?;
            scene.migrate(dir, "b")?;
            sender.wait_more(300, LONG)?;
            if self.frames < stream.count {
                sender.enough();
            }
            Ok(())
        })?;
        self.tell("migration", begun, &outcome);
        outcome.check()?;
        let both = outcome.taken.iter().all(|taken| taken.read > 200);
        ensure!(both, "not on both sides: {outcome:?}");
        Ok(())
    }

    /// What Ferry says of who hashes, and whether it told that a kernel was wrong.
    fn check_backend(&self, scene: &Scene, kernel: bool, fell_back: bool) -> Result<()> {
        let info = scene.ferry().api.get("vm.info")?;
        let card = &info["devices"]["net0"];
        println!("{}: {card}", self.name());
        let wanted = if kernel { "kernel" } else { "software" };
        ensure!(card["hash_backend"] == wanted, "not {wanted}: {card}");
        let events = scene.ferry().event_names();
        let told = events.iter().any(|event| event == FALLBACK);
        ensure!(told == fell_back, "{FALLBACK} {told}: {events:?}");
        Ok(())
    }

    fn tell(&self, what: &str, begun: Instant, outcome: &Outcome) {
        println!(
            "{} {what}: {} s, {} of {} frames, {:?}\n{}{}",
            self.name(),
            begun.elapsed().as_secs(),
            outcome.number("seen"),
            outcome.sent,
            outcome.taken,
            outcome.about,
            outcome.done
        );
    }
}
