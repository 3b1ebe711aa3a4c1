//! Which pages are dirty, and how the devices share them.

use std::sync::Arc;

use serde::Serialize;
use vm_migration::{Iova, IovaRange};

use crate::layout::PAGE;
use crate::random::{SEED, random};

/// Pages of a cluster: 2 MiB.
const CLUSTER: u64 = 512;

/// How many distances between dirty places there are before they repeat. They stay in the
/// innermost cache; as each device starts elsewhere in them, the union of several does not repeat.
const GAPS: usize = 4096;

/// Which pages of a guest all devices together have written.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Fill {
    /// None.
    Empty,
    /// One in so many, at random.
    Random(u64),
    /// One in so many for each device, at random.
    Each(u64),
    /// One in so many, in runs of 2 MiB at random places.
    Clustered(u64),
    /// One in so many, in one piece in the middle.
    OnePiece(u64),
    /// All.
    Full,
}

impl Fill {
    /// For tables.
    pub(crate) fn name(self) -> String {
        let percent = |one_in: u64| format!("{} %", 100 / one_in.max(1));
        match self {
            Self::Empty => "empty".to_owned(),
            Self::Random(one_in) => percent(one_in),
            Self::Each(one_in) => format!("{} of each", percent(one_in)),
            Self::Clustered(one_in) => format!("{} clustered", percent(one_in)),
            Self::OnePiece(one_in) => format!("{} in one piece", percent(one_in)),
            Self::Full => "full".to_owned(),
        }
    }

    /// The fewest and the most pages of `all` that may be dirty by it, with so many sources.
    pub(crate) fn bounds(self, all: u64, sources: usize) -> (u64, u64) {
        // A quarter for chance, and for what a small guest is rounded up to.
        let about = |pages: u64| {
            let slack = pages / 4 + CLUSTER;
            (pages.saturating_sub(slack), pages + slack)
        };
        match self {
            Self::Empty => (0, 0),
            Self::Random(one_in) | Self::Clustered(one_in) | Self::OnePiece(one_in) => {
                about(all / one_in.max(1))
            }
            Self::Each(one_in) => {
                // What none of them wrote is clean.
                let mut clean = all;
                for _ in 0..sources {
                    clean -= clean / one_in.max(1);
                }
                about(all - clean)
            }
            Self::Full => (all, all),
        }
    }
}

/// The pages that one device writes: places of some pages, at distances from one to the next.
#[derive(Clone, Debug)]
pub(crate) struct Pattern {
    /// Where it writes at all.
    area: IovaRange,
    /// Pages of a place; places are aligned to it.
    unit: u64,
    /// Distances, in places: [`GAPS`] of them.
    gaps: Arc<[u32]>,
    /// Whether all distances are the same and devices take turns. If not, they come upon each
    /// other's pages by chance.
    turns: bool,
    /// Whose pattern it is: no two have the same places.
    device: u64,
}

impl Pattern {
    /// The share of each of `devices`, which log by `granule` pages; none if no page is dirty.
    /// `ram` is the guest's largest region.
    pub(crate) fn shares(fill: Fill, ram: IovaRange, devices: u64, granule: u64) -> Vec<Self> {
        let devices = devices.max(1);
        let of_all = |one_in: u64| random_gaps(one_in.saturating_mul(devices));
        let turns = || Arc::from([u32::try_from(devices).unwrap_or(u32::MAX); GAPS]);
        let (area, unit, gaps) = match fill {
            Fill::Empty => return Vec::new(),
            Fill::Random(one_in) => (IovaRange::ALL, granule, of_all(one_in)),
            Fill::Each(one_in) => (IovaRange::ALL, granule, random_gaps(one_in)),
            Fill::Clustered(one_in) => (IovaRange::ALL, CLUSTER, of_all(one_in)),
            Fill::OnePiece(one_in) => (piece(ram, one_in), CLUSTER, turns()),
            Fill::Full => (IovaRange::ALL, CLUSTER, turns()),
        };
        let share = |device| Self {
            area,
            unit,
            gaps: Arc::clone(&gaps),
            turns: matches!(fill, Fill::OnePiece(_) | Fill::Full),
            device,
        };
        (0..devices).map(share).collect()
    }

    /// Bytes of a place.
    pub(crate) fn unit_bytes(&self) -> u64 {
        self.unit << PAGE.shift()
    }

    /// The addresses of the dirty places in `window`, in rising order; the first may lie partly
    /// before it and the last partly behind. The same at each call.
    pub(crate) fn places(&self, window: IovaRange) -> impl Iterator<Item = u64> {
        let step = self.unit_bytes();
        let part = self.area.intersection(window);
        let first = part.map_or(0, |part| part.first().0);
        let start = first - first % step;
        let mut at = index(mix(self.device ^ first)) % GAPS;
        let gap = |at: usize| self.gaps.get(at % GAPS).copied().map_or(1, u64::from);
        let ahead = if self.turns {
            // Places are counted from address 0, so that devices agree whatever the window.
            let devices = gap(0);
            (self.device + devices - (start / step) % devices) % devices
        } else {
            gap(at) - 1
        };
        let mut next = start.saturating_add(ahead.saturating_mul(step));
        std::iter::from_fn(move || {
            let place = next;
            at += 1;
            next = place.saturating_add(gap(at).saturating_mul(step));
            (place <= part?.last().0).then_some(place)
        })
    }
}

/// One in `one_in` of the pages of `ram`, in the middle and whole clusters.
fn piece(ram: IovaRange, one_in: u64) -> IovaRange {
    let cluster = CLUSTER << PAGE.shift();
    let bytes = (ram.last().0 - ram.first().0) / one_in.max(1);
    let middle = ram.first().0 + (ram.last().0 - ram.first().0) / 2;
    let first = Iova(middle - middle % cluster);
    let len = (bytes - bytes % cluster).max(cluster);
    IovaRange::new(first, len).unwrap_or(ram)
}

/// Distances between random places of which one in `one_in` is dirty.
fn random_gaps(one_in: u64) -> Arc<[u32]> {
    let mut state = SEED;
    let gap = |_| {
        let mut gap = 1u32;
        while !random(&mut state).is_multiple_of(one_in.max(1)) {
            gap = gap.saturating_add(1);
        }
        gap
    };
    (0..GAPS).map(gap).collect()
}

/// Spreads numbers that are near each other (the finalizer of splitmix64).
fn mix(number: u64) -> u64 {
    let number = number.wrapping_add(SEED);
    let number = (number ^ number >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let number = (number ^ number >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    number ^ number >> 31
}

fn index(number: u64) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}
