//! Keeping the status and the observer told.

use super::observer::{MigrationEvent, Observer};
use super::phase::{DestinationPhase, SourcePhase};
use super::status::{MigrationStatus, Side, Status};

/// Where a migration tells how it goes.
pub(super) struct Story<'a> {
    status: &'a Status,
    observer: &'a mut dyn Observer,
}

impl<'a> Story<'a> {
    pub(super) fn new(status: &'a Status, observer: &'a mut dyn Observer) -> Self {
        Self { status, observer }
    }

    pub(super) fn source(&mut self, phase: SourcePhase) {
        self.enter(Side::Source(phase));
    }

    pub(super) fn destination(&mut self, phase: DestinationPhase) {
        self.enter(Side::Destination(phase));
    }

    fn enter(&mut self, side: Side) {
        self.status.enter(side.clone());
        self.observer.event(&MigrationEvent::Phase(side));
    }

    pub(super) fn tell(&mut self, event: &MigrationEvent) {
        self.observer.event(event);
    }

    pub(super) fn update(&self, change: impl FnOnce(&mut MigrationStatus)) {
        self.status.update(change);
    }

    pub(super) fn snapshot(&self) -> MigrationStatus {
        self.status.snapshot()
    }
}
