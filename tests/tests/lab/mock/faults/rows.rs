//! Which faults there are, and how each ends.

use serde_json::{Value, json};

/// Files of a mock device's folder and what is written to them.
type Files = &'static [(&'static str, &'static str)];

/// Whose device it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Side {
    Source,
    Destination,
}

/// When the fault is set.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum When {
    /// Before the migration begins.
    Before,
    /// While memory is sent and the guest runs.
    InPrecopy,
}

/// How a migration ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Ends {
    /// The guest is at the destination.
    Moves,
    /// Before anything was changed.
    Refused,
    /// The guest runs on at the source, as if nothing had been.
    Stays,
    /// It runs on at the source; its device was reset, of which an event tells.
    StaysAfterReset,
    /// It stands still at the source until the operator has it go on.
    Stranded,
    /// It runs on at the source; its device does not come back, which is said.
    Lost,
}

impl Ends {
    pub(super) const fn in_words(self) -> &'static str {
        match self {
            Self::Moves => "moves",
            Self::Refused => "refused, nothing changed",
            Self::Stays => "fails, runs on at the source",
            Self::StaysAfterReset => "fails, runs on at the source, device reset and told",
            Self::Stranded => "fails after the commit, paused at the source until resumed",
            Self::Lost => "fails, runs on at the source, device lost and told",
        }
    }
}

/// A fault.
#[derive(Clone, Debug)]
pub(super) struct Row {
    pub(super) side: Side,
    /// What it is, in words.
    pub(super) fault: &'static str,
    /// The step of the migration that it hits.
    pub(super) phase: &'static str,
    /// The devices' flags.
    pub(super) flags: u8,
    pub(super) when: When,
    pub(super) files: Files,
    /// What the device at the other side shall do.
    pub(super) beside: Files,
    pub(super) ends: Ends,
    /// A part of the reason that the source gives.
    pub(super) why: &'static str,
    /// An event that one of the sides tells.
    pub(super) event: Option<&'static str>,
    /// It is one of those that run each time.
    pub(super) few: bool,
    send: Option<Asked>,
}

/// What the operator asks for, if it is not the usual.
#[derive(Clone, Copy, Debug)]
enum Asked {
    /// Little bandwidth, so that memory takes a while.
    Slowly,
    /// Five seconds of pre-copy.
    Briefly,
}

impl Row {
    /// What it is called.
    pub(super) fn name(&self) -> String {
        let Self {
            side,
            fault,
            phase,
            flags,
            ..
        } = self;
        format!("{side:?}, flags {flags}, {phase}: {fault}")
    }

    /// The properties of `vm.send-migration`. One round, so that reports can be counted.
    pub(super) fn parameters(&self) -> Value {
        match self.send {
            None => json!({"downtime_ms": 60_000}),
            Some(Asked::Slowly) => json!({"downtime_ms": 60_000, "max_bandwidth": 4 << 20}),
            Some(Asked::Briefly) => json!({"downtime_ms": 60_000, "timeout_s": 5}),
        }
    }

    const fn new(
        (side, flags): (Side, u8),
        (phase, fault): (&'static str, &'static str),
        files: Files,
        (ends, why): (Ends, &'static str),
    ) -> Self {
        Self {
            side,
            fault,
            phase,
            flags,
            when: When::Before,
            files,
            beside: &[],
            ends,
            why,
            event: None,
            few: false,
            send: None,
        }
    }

    const fn beside(mut self, files: Files) -> Self {
        self.beside = files;
        self
    }

    const fn telling(mut self, event: &'static str) -> Self {
        self.event = Some(event);
        self
    }

    const fn few(mut self) -> Self {
        self.few = true;
        self
    }

    /// Set in pre-copy, which then takes a while.
    const fn in_precopy(mut self) -> Self {
        self.when = When::InPrecopy;
        self.send = Some(Asked::Slowly);
        self
    }

    const fn briefly(mut self) -> Self {
        self.send = Some(Asked::Briefly);
        self
    }
}

/// A state arc that fails: the device stays in the old state, or is in ERROR.
macro_rules! arc {
    ($rows:ident, $side:ident $flags:literal, $phase:literal, $from:ident $to:ident,
     $stay:ident $error:ident $why:literal $(, beside $beside:expr)?) => {
        $rows.extend([
            Row::new(
                (Side::$side, $flags),
                ($phase, concat!(stringify!($from), " to ", stringify!($to), " fails")),
                &[("faults/fail_arc", concat!(stringify!($from), " ", stringify!($to), " 1 stay"))],
                (Ends::$stay, $why),
            )$(.beside($beside))?,
            Row::new(
                (Side::$side, $flags),
                ($phase, concat!(stringify!($from), " to ", stringify!($to), " breaks the device")),
                &[("faults/fail_arc", concat!(stringify!($from), " ", stringify!($to), " 1 error"))],
                (Ends::$error, $why),
            )$(.beside($beside))?,
        ]);
    };
}

/// The destination's device does not take its state when it is complete.
const NOT_LOADED: Files = &[("faults/fail_arc", "RESUMING STOP 1 stay")];
/// The destination's device has no room.
const NO_ROOM: Files = &[("config/state_bytes", "65536")];

/// All of them, those with the same flags together.
pub(super) fn rows() -> Vec<Row> {
    let mut rows = arcs();
    rows.extend(logs());
    rows.extend(data());
    rows.extend(devices());
    rows.sort_by_key(|row| (std::cmp::Reverse(row.flags), row.ends == Ends::Lost));
    let few = [
        "PRE_COPY_P2P to STOP_COPY breaks the device",
        "STOP to RUNNING_P2P fails",
    ];
    for row in &mut rows {
        row.few |= few.contains(&row.fault) && row.flags == 7 && row.beside.is_empty();
    }
    rows
}

/// Arcs of saving, of going on after a failure, and of loading.
fn arcs() -> Vec<Row> {
    let mut rows = Vec::new();
    arc!(rows, Source 7, "set-up", RUNNING PRE_COPY, Stays StaysAfterReset "PRE_COPY");
    arc!(rows, Source 7, "coming to rest", PRE_COPY PRE_COPY_P2P, Stays StaysAfterReset "quiescing");
    arc!(rows, Source 7, "stopping", PRE_COPY_P2P STOP_COPY, Stays StaysAfterReset "entering STOP_COPY");
    arc!(rows, Source 7, "after the commit", STOP_COPY STOP, Moves Moves "");
    arc!(rows, Source 3, "coming to rest", RUNNING RUNNING_P2P, Stays StaysAfterReset "quiescing");
    arc!(rows, Source 3, "stopping", RUNNING_P2P STOP, Stays StaysAfterReset "entering STOP_COPY");
    arc!(rows, Source 3, "stopping", STOP STOP_COPY, Stays StaysAfterReset "entering STOP_COPY");
    arc!(rows, Source 5, "stopping", PRE_COPY STOP_COPY, Stays StaysAfterReset "entering STOP_COPY");
    arc!(rows, Source 1, "stopping", RUNNING STOP, Stays StaysAfterReset "entering STOP_COPY");
    arc!(rows, Source 1, "stopping", STOP STOP_COPY, Stays StaysAfterReset "entering STOP_COPY");

    arc!(rows, Source 7, "going on from pre-copy", PRE_COPY RUNNING, Stays StaysAfterReset "taking its state", beside NO_ROOM);
    arc!(rows, Source 7, "going on from a stop", STOP_COPY STOP, Stays StaysAfterReset "loading its state", beside NOT_LOADED);
    arc!(rows, Source 7, "going on from a stop", STOP RUNNING_P2P, Stays StaysAfterReset "loading its state", beside NOT_LOADED);
    arc!(rows, Source 7, "going on from a stop", RUNNING_P2P RUNNING, Stays StaysAfterReset "loading its state", beside NOT_LOADED);
    arc!(rows, Source 1, "going on from a stop", STOP RUNNING, Stays StaysAfterReset "loading its state", beside NOT_LOADED);

    arc!(rows, Destination 7, "preparing", RUNNING RUNNING_P2P, Refused Refused "entering RESUMING");
    arc!(rows, Destination 7, "preparing", RUNNING_P2P STOP, Refused Refused "entering RESUMING");
    arc!(rows, Destination 7, "preparing", STOP RESUMING, Refused Refused "entering RESUMING");
    arc!(rows, Destination 7, "loading", RESUMING STOP, Stays Stays "loading its state");
    arc!(rows, Destination 7, "after the commit", STOP RUNNING_P2P, Stranded Stranded "waking");
    arc!(rows, Destination 7, "after the commit", RUNNING_P2P RUNNING, Stranded Stranded "starting");
    arc!(rows, Destination 1, "after the commit", STOP RUNNING, Stranded Stranded "starting");
    rows
}

/// Dirty logs.
fn logs() -> Vec<Row> {
    vec![
        Row::new(
            (Side::Source, 7),
            ("set-up", "the DMA log does not start"),
            &[("faults/fail_log_start", "1")],
            (Ends::Stays, "start"),
        ),
        Row::new(
            (Side::Source, 7),
            ("pre-copy", "a report fails, and forgets"),
            &[("faults/fail_report", "1")],
            (Ends::Moves, ""),
        )
        .telling("migration-dirty-log-restarted")
        .few(),
        Row::new(
            (Side::Source, 7),
            ("pre-copy", "all reports fail"),
            &[("faults/fail_report", "1000")],
            (Ends::Stays, "report"),
        ),
        Row::new(
            (Side::Source, 7),
            ("stopped", "the last report fails, and forgets"),
            &[
                ("faults/fail_report", "1"),
                ("faults/fail_report_skip", "1"),
            ],
            (Ends::Stays, "report"),
        )
        .few(),
        // There it is on another rung from then on.
        Row::new(
            (Side::Destination, 7),
            ("preparing", "the trial of its DMA log fails"),
            &[("faults/fail_report", "1")],
            (Ends::Moves, ""),
        ),
        Row::new(
            (Side::Source, 7),
            ("stopped", "the device writes memory until it stops"),
            &[("config/p2p_ram_dma", "1")],
            (Ends::Moves, ""),
        ),
    ]
}

/// The stream of state.
fn data() -> Vec<Row> {
    vec![
        Row::new(
            (Side::Source, 7),
            ("pre-copy", "no data yet, three times before each read"),
            &[("faults/enomsg_run", "3")],
            (Ends::Moves, ""),
        ),
        Row::new(
            (Side::Source, 7),
            ("all", "reads move 1000 bytes at most"),
            &[("faults/short_io", "1000")],
            (Ends::Moves, ""),
        ),
        Row::new(
            (Side::Destination, 7),
            ("all", "writes move 1000 bytes at most"),
            &[("faults/short_io", "1000")],
            (Ends::Moves, ""),
        ),
        Row::new(
            (Side::Source, 7),
            ("pre-copy", "a bit of the state flips"),
            &[("faults/corrupt_state", "1")],
            (Ends::Stays, "taking its state"),
        ),
        Row::new(
            (Side::Source, 1),
            ("stopped", "a bit of the state flips"),
            &[("faults/corrupt_state", "1")],
            (Ends::Stays, "taking its state"),
        )
        .few(),
        Row::new(
            (Side::Source, 7),
            ("pre-copy", "the state ends too early"),
            &[("faults/cut_state", "100000")],
            (Ends::Stays, "have not sent yet"),
        )
        .briefly(),
        Row::new(
            (Side::Source, 1),
            ("stopped", "the state ends too early"),
            &[("faults/cut_state", "100000")],
            (Ends::Stays, "loading its state"),
        ),
        Row::new(
            (Side::Source, 7),
            ("stopped", "the state is empty"),
            &[("faults/stateless", "1")],
            (Ends::Stays, "loading its state"),
        ),
        Row::new(
            (Side::Source, 7),
            ("pre-copy", "the state does not come"),
            &[("config/save_rate", "1")],
            (Ends::Stays, "have not sent yet"),
        )
        .briefly(),
        Row::new(
            (Side::Source, 1),
            ("stopped", "the state does not come"),
            &[("config/save_rate", "1")],
            (Ends::Stays, "reading its state"),
        ),
        Row::new(
            (Side::Destination, 7),
            ("pre-copy", "the state is not taken"),
            &[("config/load_rate", "1")],
            (Ends::Stays, "taking its state"),
        ),
        Row::new(
            (Side::Source, 7),
            ("pre-copy", "its state changes all the time"),
            &[("config/precopy_dirty_rate", "100000000")],
            (Ends::Moves, ""),
        ),
    ]
}

/// The device as a whole.
fn devices() -> Vec<Row> {
    vec![
        Row::new(
            (Side::Source, 7),
            ("pre-copy", "the device breaks down"),
            &[("faults/break_now", "1")],
            (Ends::StaysAfterReset, ""),
        )
        .in_precopy()
        .telling("migration-device-reset"),
        Row::new(
            (Side::Destination, 7),
            ("pre-copy", "the device breaks down"),
            &[("faults/break_now", "1")],
            (Ends::Stays, "its state"),
        )
        .in_precopy(),
        Row::new(
            (Side::Source, 7),
            ("pre-copy", "the device reports an error"),
            &[("faults/raise_error", "1")],
            (Ends::Moves, ""),
        )
        .in_precopy()
        .telling("device-lost"),
        Row::new(
            (Side::Destination, 7),
            ("preparing", "a reset fails"),
            &[("faults/fail_reset", "1")],
            (Ends::Refused, "mock0"),
        ),
        Row::new(
            (Side::Destination, 7),
            ("preparing", "it is another device"),
            &[("config/pci_subdevice", "2")],
            (Ends::Refused, "subsystem"),
        ),
        Row::new(
            (Side::Destination, 7),
            ("preparing", "its migration can do less"),
            &[("config/migration_flags", "3")],
            (Ends::Refused, "migration is"),
        ),
        Row::new(
            (Side::Destination, 7),
            ("pre-copy", "it has less room than the state takes"),
            NO_ROOM,
            (Ends::Stays, "taking its state"),
        )
        .few(),
        Row::new(
            (Side::Source, 7),
            ("all", "each arc takes 1.5 s"),
            &[("config/arc_delay_ms", "1500")],
            (Ends::Moves, ""),
        ),
        Row::new(
            (Side::Destination, 7),
            ("all", "each arc takes 1.5 s"),
            &[("config/arc_delay_ms", "1500")],
            (Ends::Moves, ""),
        ),
        Row::new(
            (Side::Source, 7),
            ("stopping", "the device breaks and its reset fails"),
            &[
                ("faults/fail_arc", "PRE_COPY_P2P STOP_COPY 1 error"),
                ("faults/fail_reset", "1"),
            ],
            (Ends::Lost, "resetting it"),
        ),
    ]
}
