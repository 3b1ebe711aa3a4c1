//! Whether each frame of `test-packets` comes with the hash, and by the queue, that it must.
//!
//! Who sends needs to say nothing: a frame has its number, from which this program makes it again and so
//! knows what it is. Two views of what the device reported:
//!
//! | view | how | sees |
//! |---|---|---|
//! | `skb` | a socket filter | what the driver made of it: the hash of each packet, of all types; not which type it is, which the kernel has no place for. A packet without a hash has 0 |
//! | `xdp` | a program in the driver | the header itself: hash and report, also of frames that the network stack would drop |
//!
//! Both work with the stock kernels 6.1 and 6.12. With `--plan`, the settings of `ethtool` are changed while
//! frames come in; of frames that may have been handled before a change, what was right then still is.

use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use test_packets::hash::Report;
use test_packets::{Frame, packet};

use crate::Verdict;
use crate::args::Args;
use crate::json::Line;
use crate::progress::Schedule;
use crate::rxhash::{HashSocket, HeaderProgram, Record};

mod plan;
mod setting;
mod tally;

use plan::{Plan, Step};
use setting::{Device, Setting};
use tally::Tally;

/// How long a change of settings takes at least until the next one, and how many frames.
const SETTLING: Duration = Duration::from_millis(300);
/// See [`SETTLING`]: more than are on their way to the device (the sender sees to that) and in queues that are served.
const SETTLING_FRAMES: u32 = 300;

/// How packets are looked at.
enum View {
    Skb(HashSocket),
    Xdp(HeaderProgram),
}

impl View {
    fn open(name: &str, interface: &str, room: u32) -> anyhow::Result<Self> {
        match name {
            "skb" => HashSocket::open(interface, room).map(Self::Skb),
            "xdp" => HeaderProgram::open(interface, room).map(Self::Xdp),
            other => bail!("there is no view `{other}`: use skb or xdp"),
        }
    }

    fn next(&self) -> anyhow::Result<Option<Record>> {
        match self {
            Self::Skb(socket) => socket.next(),
            Self::Xdp(program) => program.next(),
        }
    }

    /// A frame as it is seen; `None` if it is not.
    fn shows(&self, frame: &Frame) -> Option<Vec<u8>> {
        match self {
            Self::Skb(_) => frame.untagged(),
            Self::Xdp(_) => Some(frame.bytes.clone()),
        }
    }

    /// Whether the hash, and the report if the header is seen, are what `setting` says.
    fn is_right(&self, setting: &Setting, wanted: Report, record: &Record) -> bool {
        match self {
            Self::Skb(_) if !setting.shown => record.hash == 0,
            Self::Skb(_) => record.hash == wanted.value,
            Self::Xdp(_) => record.hash == wanted.value && record.report == u32::from(wanted.kind),
        }
    }
}

/// What was set before the last change.
struct Before {
    setting: Setting,
    /// When the change was made, and the highest number that was seen until then.
    at: Instant,
    top: u32,
    /// Frames up to this number may have been handled before the change, and be seen at any time: a queue may wait
    /// long for its processor. Not known as long as the change is new.
    up_to: Option<u32>,
}

impl Before {
    /// The setting, if frame `number` may go by it.
    fn of(&self, number: u32) -> Option<&Setting> {
        self.up_to
            .is_none_or(|up_to| number <= up_to)
            .then_some(&self.setting)
    }
}

/// The work of `reports`.
struct Checker {
    view: View,
    device: Device,
    setting: Setting,
    before: Option<Before>,
    /// The highest number seen.
    top: u32,
    plan: Plan,
    tally: Tally,
    seed: u64,
    count: u32,
    mac: [u8; 6],
}

impl Checker {
    /// Looks at one packet.
    fn look(&mut self, record: &Record) -> anyhow::Result<()> {
        let Some(number) = Frame::number_of(record.head()) else {
            self.tally.foreign += 1;
            return Ok(());
        };
        if number >= self.count {
            return self.tally.wrong("number", number, record, "");
        }
        let frame = packet(self.seed, number, self.mac);
        let Some(shown) = self.view.shows(&frame) else {
            return self.tally.wrong("invisible", number, record, frame.kind);
        };
        let same_length = u32::try_from(shown.len()) == Ok(record.length);
        if !same_length || !shown.starts_with(record.head()) {
            return self.tally.wrong("bytes", number, record, frame.kind);
        }
        if !self.tally.first_time(number) {
            return self.tally.wrong("again", number, record, frame.kind);
        }
        let wanted = self.setting.report(frame.flow.as_ref());
        // The driver changes what it shows a moment after the device has changed what it does, so that hash
        // and queue may be of different settings.
        self.top = self.top.max(number);
        let before = self.before.as_ref().and_then(|before| before.of(number));
        let settings = || [Some(&self.setting), before].into_iter().flatten();
        let report = |setting: &Setting| setting.report(frame.flow.as_ref());
        let is_right =
            settings().any(|setting| self.view.is_right(setting, report(setting), record));
        let steers = |queue| settings().any(|setting| setting.steers(report(setting), queue));
        if !is_right || !record.queue().is_some_and(steers) {
            let about = format!("{}, not {wanted:08x?}", frame.kind);
            return self.tally.wrong("report", number, record, &about);
        }
        self.tally.right(frame.kind, wanted, record.queue());
        Ok(())
    }

    /// Nothing is waiting: the moment for the next change, if it is due.
    fn idle(&mut self, now: Instant) -> anyhow::Result<()> {
        match &mut self.before {
            Some(before) if before.up_to.is_none() => {
                let settled = now.duration_since(before.at) >= SETTLING;
                if settled && self.top >= before.top.saturating_add(SETTLING_FRAMES) {
                    before.up_to = Some(self.top);
                }
            }
            _ => {
                if let Some(step) = self.plan.due(self.tally.seen) {
                    self.change(&step)?;
                }
            }
        }
        Ok(())
    }

    fn change(&mut self, step: &Step) -> anyhow::Result<()> {
        let setting = self
            .device
            .apply(step)
            .with_context(|| format!("{step:?}"))?;
        let before = std::mem::replace(&mut self.setting, setting);
        Line::new("step")
            .text("what", &format!("{step:?}"))
            .number("seen", self.tally.seen)
            .number("types", self.setting.types)
            .print()?;
        self.before = Some(Before {
            setting: before,
            at: Instant::now(),
            top: self.top,
            up_to: None,
        });
        Ok(())
    }

    /// How many of the frames can be seen.
    fn visible(&self) -> u32 {
        let frames = (0..self.count).map(|number| packet(self.seed, number, self.mac));
        let visible = frames
            .filter(|frame| self.view.shows(frame).is_some())
            .count();
        u32::try_from(visible).unwrap_or(u32::MAX)
    }

    fn run(mut self, mut schedule: Schedule) -> anyhow::Result<Verdict> {
        let visible = self.visible();
        Line::new("listening").number("visible", visible).print()?;
        while self.tally.seen < visible && !schedule.is_over(Instant::now()) {
            match self.view.next()? {
                Some(record) => self.look(&record)?,
                None => {
                    self.idle(Instant::now())?;
                    std::thread::sleep(Duration::from_millis(1));
                }
            }
            if schedule.report_is_due(Instant::now()) {
                Line::new("progress")
                    .number("seen", self.tally.seen)
                    .print()?;
            }
        }
        self.tally.done(self.plan.left()).print()?;
        Ok(Verdict::of(self.tally.is_right()))
    }
}

/// `reports`.
pub(crate) fn run(mut args: Args) -> anyhow::Result<Verdict> {
    let interface: String = args.required("iface")?;
    let seed = args.required("seed")?;
    let count = args.required("count")?;
    let view: String = args.option("view")?.unwrap_or_else(|| "skb".to_owned());
    let plan: String = args.option("plan")?.unwrap_or_default();
    let schedule = Schedule::new(args.option("seconds")?);
    args.finish()?;
    let mut device = Device::open(&interface).with_context(|| interface.clone())?;
    let plan = plan.parse().with_context(|| format!("--plan {plan}"))?;
    let mac = device.mac()?;
    // Room for all of them: nothing is lost here. To attach a program tells the device a number of queues.
    let view = View::open(&view, &interface, count + 1000).with_context(|| interface.clone())?;
    // From here on driver and device agree on the settings, whatever the driver's version.
    device.apply(&Step::Rxhash(false))?;
    let setting = device.apply(&Step::Rxhash(true))?;
    let checker = Checker {
        view,
        device,
        setting,
        before: None,
        top: 0,
        plan,
        tally: Tally::new(count),
        seed,
        count,
        mac,
    };
    checker.run(schedule)
}
