//! Rules that can be broken to see that it is noticed.

/// What is done wrongly.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Fault {
    /// Pages are cleared at the vCPUs' log after they were read, not before.
    ClearAfterRead,
    /// The vCPUs' log clears the whole range it is told, not only the pages given.
    ClearTooMuch,
    /// A round is acknowledged when it was sent, not when the destination has it.
    AcknowledgeAtOnce,
    /// A broken connection does not put back what is in flight.
    ForgetInFlight,
    /// The VMM marks a page before it writes it.
    MarkBeforeWrite,
    /// The device does not set a bit that it finds set.
    SkipSetBit,
    /// The device's report reads a word and then clears it.
    LoadThenClear,
    /// The device's report fails and does not say so.
    HideFailure,
    /// A source that failed is started anew after everything was made dirty and pages were sent.
    LateStart,
    /// The last reports are taken before the writers have stopped.
    ReportBeforeStop,
    /// The device reports a page that it did not write.
    ReportTooMuch,
    /// What is in flight is put back in the middle of a round that goes on.
    PutBackWithinRound,
}

/// All of them.
pub(crate) const FAULTS: [Fault; 12] = [
    Fault::ClearAfterRead,
    Fault::ClearTooMuch,
    Fault::AcknowledgeAtOnce,
    Fault::ForgetInFlight,
    Fault::MarkBeforeWrite,
    Fault::SkipSetBit,
    Fault::LoadThenClear,
    Fault::HideFailure,
    Fault::LateStart,
    Fault::ReportBeforeStop,
    Fault::ReportTooMuch,
    Fault::PutBackWithinRound,
];
