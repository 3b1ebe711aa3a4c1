//! What is measured.

use std::error::Error;

use serde::Serialize;
use vm_migration::{DirtySource, IovaRange, PageSize};

use crate::fill::{Fill, Pattern};
use crate::layout::PAGE;
use crate::measure::{Guest, Row, Sources};
use crate::sources::{OwnWrites, copied, device};

/// Guests in GiB.
const SIZES: [u64; 8] = [1, 4, 16, 64, 256, 1 << 10, 4 << 10, 12 << 10];

/// The guest, in GiB, at which sources are compared.
const COMPARED: u64 = 1 << 10;

/// Devices of a guest, where sizes are compared.
pub(crate) const DEVICES: u64 = 24;

/// Where the number of devices is compared.
const COUNTS: [u64; 4] = [1, 4, 24, 64];

/// What is dirty, where sizes are compared.
const FILLS: [Fill; 6] = [
    Fill::Empty,
    Fill::Random(100),
    Fill::OnePiece(100),
    Fill::Random(10),
    Fill::Clustered(10),
    Fill::Full,
];

/// Pages of 4 KiB in one of a device that logs by 64 KiB.
const COARSE: u64 = 16;

/// What to measure.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Options {
    /// Samples of a row.
    pub(crate) samples: u32,
    /// The window of a report.
    pub(crate) window_bytes: u64,
    /// The largest guest.
    pub(crate) largest_gib: u64,
}

/// Everything.
#[derive(Debug, Serialize)]
pub(crate) struct Results {
    /// [`DEVICES`] devices, guests of all sizes, in rising order for each fill.
    pub(crate) by_size: Vec<Row>,
    /// One guest, more and more devices.
    pub(crate) by_devices: Vec<Row>,
    /// One guest, one source of each kind, and all of them.
    pub(crate) by_kind: Vec<Row>,
}

impl Results {
    /// All rows.
    pub(crate) fn rows(&self) -> impl Iterator<Item = &Row> {
        let (sizes, devices, kinds) = (&self.by_size, &self.by_devices, &self.by_kind);
        sizes.iter().chain(devices).chain(kinds)
    }
}

/// Measures; progress goes to standard error.
pub(crate) fn run(options: Options) -> Result<Results, Box<dyn Error>> {
    let samples = options.samples;
    let mut results = Results {
        by_size: Vec::new(),
        by_devices: Vec::new(),
        by_kind: Vec::new(),
    };
    let compared = COMPARED.min(options.largest_gib);
    for gib in SIZES.into_iter().filter(|gib| *gib <= options.largest_gib) {
        eprintln!("guest of {gib} GiB");
        let mut guest = Guest::new(gib, options.window_bytes)?;
        for fill in FILLS {
            let mut sources = devices(fill, guest.largest(), DEVICES);
            results
                .by_size
                .push(guest.measure(fill, &mut sources, samples)?);
        }
    }
    results
        .by_size
        .sort_by_key(|row| FILLS.iter().position(|fill| *fill == row.fill));

    eprintln!("kinds and numbers of sources");
    let mut guest = Guest::new(compared, options.window_bytes)?;
    for fill in [Fill::Empty, Fill::Random(100), Fill::Each(100)] {
        for count in COUNTS {
            let mut sources = devices(fill, guest.largest(), count);
            results
                .by_devices
                .push(guest.measure(fill, &mut sources, samples)?);
        }
    }
    let fill = Fill::Random(100);
    for mut sources in kinds(fill, &guest)? {
        results
            .by_kind
            .push(guest.measure(fill, &mut sources, samples)?);
    }
    Ok(results)
}

fn sources(who: &str, all: Vec<Box<dyn DirtySource>>) -> Sources {
    Sources {
        who: who.to_owned(),
        all,
        prepare: Box::new(|| ()),
    }
}

/// So many devices that share what is dirty.
fn devices(fill: Fill, ram: IovaRange, count: u64) -> Sources {
    let mut shares = Pattern::shares(fill, ram, count, 1).into_iter();
    let share = |number| device(number, PAGE, shares.next());
    sources("", (0..count).map(share).collect())
}

/// One source of each kind, and a VM with all of them.
fn kinds(fill: Fill, guest: &Guest) -> Result<Vec<Sources>, Box<dyn Error>> {
    let (ranges, ram) = (guest.ranges(), guest.largest());
    let one = |granule| Pattern::shares(fill, ram, 1, granule).pop();
    let coarse = PageSize::new(COARSE << PAGE.shift()).unwrap_or(PAGE);
    let pattern = one(1).ok_or("nothing is dirty")?;
    let mut kinds = vec![
        sources("device of 4 KiB", vec![device(0, PAGE, one(1))]),
        sources("device of 64 KiB", vec![device(0, coarse, one(COARSE))]),
        sources("copied log, as KVM's", vec![copied(ranges, &pattern, 0)?]),
        sources("copied log, shifted", vec![copied(ranges, &pattern, 5)?]),
    ];
    let own = OwnWrites::new(ranges, pattern);
    let log = own.clone();
    kinds.push(Sources {
        who: "the VMM's own writes".to_owned(),
        all: vec![own.into_source()],
        prepare: Box::new(move || log.refill()),
    });

    // What is dirty is shared by all of them.
    let mut shares = Pattern::shares(fill, ram, DEVICES + 2, 1).into_iter();
    let (Some(first), Some(second)) = (shares.next(), shares.next()) else {
        return Err("nothing is dirty".into());
    };
    let own = OwnWrites::new(ranges, second);
    let log = own.clone();
    let mut all = vec![copied(ranges, &first, 0)?, own.into_source()];
    for (number, share) in (0..).zip(shares) {
        all.push(device(number, PAGE, Some(share)));
    }
    kinds.push(Sources {
        who: format!("KVM's, the VMM's, {DEVICES} devices"),
        all,
        prepare: Box::new(move || log.refill()),
    });
    Ok(kinds)
}
