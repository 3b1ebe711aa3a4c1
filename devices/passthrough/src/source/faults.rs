//! A move with a fault at each arc, of each kind, for each set of features.

use vfio_user::{MigrationFlags, StateArc};
use vm_migration::{Pause, StateError, StateSink, StateSource};

use super::*;
use crate::fake::{Events, FakeBackend, Fault, How, device};
use crate::{Passthrough, PassthroughSink};

/// Where a move ended.
#[derive(Debug)]
enum End {
    Moved,
    /// At the source, before the guest was handed over.
    Source(StateError),
    /// At the destination, before that.
    Load(StateError),
    /// At the destination, after that.
    Run(StateError),
}

fn nic(flags: MigrationFlags) -> (Arc<FakeBackend>, Passthrough) {
    let backend = FakeBackend::new(Some(flags));
    {
        let mut seen = backend.seen.lock();
        seen.precopy = [vec![1; 250], vec![2; 3]].into();
        seen.stop_copy = [vec![3; 120]].into();
    }
    let (nic, _) = device(&backend);
    (backend, nic)
}

fn source_half(source: &mut PassthroughSource) -> Result<Vec<u8>, StateError> {
    let mut stream = Vec::new();
    let mut buffer = [0; 100];
    source.start_precopy()?;
    while let PrecopyRead::Data(len) = source.read_precopy(&mut buffer)? {
        stream.extend_from_slice(&buffer[..len]);
    }
    source.quiesce()?;
    source.stop()?;
    loop {
        match source.read_stop_copy(&mut buffer)? {
            0 => return Ok(stream),
            len => stream.extend_from_slice(&buffer[..len]),
        }
    }
}

fn load(sink: &mut PassthroughSink, stream: &[u8]) -> Result<(), StateError> {
    sink.prepare()?;
    sink.write(stream)?;
    sink.finish_load()
}

/// What the engine does with one device at each side.
fn move_over(source: &mut PassthroughSource, sink: &mut PassthroughSink) -> End {
    let stream = match source_half(source) {
        Ok(stream) => stream,
        Err(error) => return End::Source(error),
    };
    if let Err(error) = load(sink, &stream) {
        return End::Load(error);
    }
    if let Err(error) = sink.wake().and_then(|()| sink.run()) {
        return End::Run(error);
    }
    match source.finish() {
        Ok(()) => End::Moved,
        // Only a warning for the engine: the guest runs at the destination.
        Err(_) => End::Moved,
    }
}

/// Whatever goes wrong at the source, the guest's device runs there afterwards, or is gone.
fn check_source(backend: &FakeBackend, source: &mut PassthroughSource, fault: Fault) {
    source.wake();
    let came_back = source.abort();
    let mut seen = backend.seen.lock();
    match came_back {
        Ok(()) => assert_eq!(seen.resets, 0, "{fault:?}"),
        Err(StateError::Reset { .. }) => assert_eq!(seen.resets, 1, "{fault:?}"),
        Err(error) => {
            assert!(seen.gone, "{fault:?}: {error}");
            return;
        }
    }
    assert_eq!(seen.machine.state(), DeviceState::Running, "{fault:?}");
    // The next try goes well.
    seen.faults.clear();
    seen.stop_copy = [vec![3; 120]].into();
    drop(seen);
    source_half(source).unwrap();
}

#[test]
fn every_fault_of_every_arc_ends_with_one_good_device_or_a_reset() {
    let mut ends = [0; 4];
    for flags in MigrationFlags::LEGAL {
        for arc in StateArc::ALL
            .into_iter()
            .filter(|arc| arc.exists_with(flags))
        {
            for how in [How::Stays, How::Breaks, How::Dies] {
                for times in [1, 2, 100] {
                    for at_source in [true, false] {
                        let fault = Fault { arc, how, times };
                        let (here, nic_here) = nic(flags);
                        let (there, nic_there) = nic(flags);
                        let faulty = if at_source { &here } else { &there };
                        faulty.seen.lock().faults = vec![fault];
                        let mut source = nic_here.state_source().unwrap();
                        let mut sink = nic_there.state_sink().unwrap();
                        let end = move_over(&mut source, &mut sink);
                        let (place, told) = match &end {
                            End::Moved => (0, "nic0".to_owned()),
                            End::Source(error) => (1, error.to_string()),
                            End::Load(error) => (2, error.to_string()),
                            End::Run(error) => (3, error.to_string()),
                        };
                        assert!(told.contains("nic0"), "{told}");
                        ends[place] += 1;
                        if matches!(end, End::Moved) {
                            let state = there.seen.lock().machine.state();
                            assert_eq!(state, DeviceState::Running, "{fault:?}");
                            continue;
                        }
                        assert_eq!(
                            matches!(end, End::Source(_)),
                            at_source,
                            "{end:?} {fault:?}"
                        );
                        // The destination's device is reset, to be of use to the next one.
                        let dropped = sink.abort();
                        let seen = there.seen.lock();
                        assert_eq!(dropped.is_err(), seen.gone, "{fault:?}");
                        if !seen.gone {
                            assert_eq!(seen.machine.state(), DeviceState::Running);
                        }
                        drop(seen);
                        check_source(&here, &mut source, fault);
                    }
                }
            }
        }
    }
    assert!(ends.into_iter().all(|count| count > 10), "{ends:?}");
}

/// As the engine and the VMM call them: all come to rest before any is stopped, all wake before
/// any runs.
#[test]
fn two_devices_come_to_rest_and_wake_together() {
    use DeviceState as S;
    let events = Events::default();
    let pair = [0, 1].map(|name| {
        let (backend, device) = nic(MigrationFlags::STOP_COPY | MigrationFlags::P2P);
        backend.seen.lock().events = Some((name, events.clone()));
        device
    });
    for device in &pair {
        device.quiesce().unwrap();
    }
    for device in &pair {
        device.clone().pause().unwrap();
    }
    for device in &pair {
        device.wake();
    }
    for device in &pair {
        device.clone().resume().unwrap();
    }
    let order = |state| [(0, state), (1, state)];
    let expected = [S::RunningP2p, S::Stop, S::RunningP2p, S::Running]
        .map(order)
        .concat();
    assert_eq!(*events.lock(), expected);
}

#[test]
fn a_pause_that_fails_leaves_the_device_running() {
    for how in [How::Stays, How::Breaks] {
        for arc in [StateArc::RunningToRunningP2p, StateArc::RunningP2pToStop] {
            let (backend, device) = nic(MigrationFlags::all());
            backend.seen.lock().faults = vec![Fault { arc, how, times: 1 }];
            let paused = device.quiesce().and_then(|()| device.clone().pause());
            let error = paused.unwrap_err();
            let reset = matches!(error, StateError::Reset { .. });
            assert_eq!(reset, how == How::Breaks, "{error}");
            assert_eq!(backend.seen.lock().machine.state(), DeviceState::Running);
        }
    }
}

#[test]
fn a_device_that_does_not_go_on_is_reset() {
    for arc in [StateArc::StopToRunningP2p, StateArc::RunningP2pToRunning] {
        let (backend, device) = nic(MigrationFlags::all());
        device.clone().pause().unwrap();
        let (how, times) = (How::Breaks, 1);
        backend.seen.lock().faults = vec![Fault { arc, how, times }];
        device.wake();
        device.clone().resume().unwrap();
        let seen = backend.seen.lock();
        assert_eq!(
            (seen.machine.state(), seen.resets),
            (DeviceState::Running, 1)
        );
    }
}

/// A paused guest's device is stopped again after the reset.
#[test]
fn a_paused_device_that_breaks_stands_still_afterwards() {
    let (backend, device) = nic(MigrationFlags::all());
    device.clone().pause().unwrap();
    let mut source = device.state_source().unwrap();
    source.start_precopy().unwrap();
    let (arc, how, times) = (StateArc::StopToStopCopy, How::Breaks, 1);
    backend.seen.lock().faults = vec![Fault { arc, how, times }];
    assert!(source.stop().is_err());
    source.wake();
    assert!(matches!(source.abort(), Err(StateError::Reset { .. })));
    assert_eq!(backend.seen.lock().machine.state(), DeviceState::Stop);
}
