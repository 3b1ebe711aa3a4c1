//! Whole moves of a device's state, and aborts from everywhere.

use devices::MsiLine;
use pci::PciDevice;
use vm_migration::StateSink;

use vfio_user::{PrecopyInfo, StateArc};

use super::*;
use crate::backend::IrqKind;
use crate::fake::{FakeBackend, FakeFabric, Fault, How, MSIX_CAP, TABLE, VECTORS, device};
use crate::{Passthrough, PassthroughSink};

fn migratable(flags: u64) -> (Arc<FakeBackend>, Passthrough, FakeFabric) {
    let backend = FakeBackend::new(Some(MigrationFlags::from_bits_retain(flags)));
    let (nic, fabric) = device(&backend);
    (backend, nic, fabric)
}

/// An arc that fails once.
fn fault(arc: StateArc, how: How) -> Fault {
    Fault { arc, how, times: 1 }
}

fn precopy(source: &mut PassthroughSource, sink: &mut PassthroughSink) {
    let mut buffer = [0; 100];
    while let PrecopyRead::Data(len) = source.read_precopy(&mut buffer).unwrap() {
        sink.write(&buffer[..len]).unwrap();
    }
}

fn stop_copy(source: &mut PassthroughSource, sink: &mut PassthroughSink) {
    let mut buffer = [0; 100];
    loop {
        match source.read_stop_copy(&mut buffer).unwrap() {
            0 => return,
            len => sink.write(&buffer[..len]).unwrap(),
        }
    }
}

#[test]
fn state_moves_with_and_without_each_feature() {
    use DeviceState as S;
    for flags in [1, 3, 5, 7] {
        let (backend, mut nic, _) = migratable(flags);
        let (target, there, fabric) = migratable(flags);
        nic.write_config(4, &[6]);
        nic.write_config(MSIX_CAP + 2, &0x8000_u16.to_le_bytes());
        nic.write_bar(2, TABLE, &0xfee0_1000_u64.to_le_bytes());
        nic.write_bar(2, TABLE + 8, &0x55_u64.to_le_bytes());
        nic.set_bar_address(2, 0xd000_0000);
        {
            let mut seen = backend.seen.lock();
            seen.precopy = [vec![1; 250], vec![2; 3]].into();
            seen.stop_copy = [vec![3; 120]].into();
        }
        let mut source = nic.state_source().unwrap();
        let mut sink = there.state_sink().unwrap();
        sink.prepare().unwrap();
        source.start_precopy().unwrap();
        precopy(&mut source, &mut sink);
        source.quiesce().unwrap();
        source.stop().unwrap();
        stop_copy(&mut source, &mut sink);
        assert_eq!(backend.seen.lock().machine.state(), S::StopCopy);
        sink.finish_load().unwrap();
        assert_eq!(target.seen.lock().machine.state(), S::Stop);
        sink.wake().unwrap();
        let awake = match flags & 2 {
            0 => S::Stop,
            _ => S::RunningP2p,
        };
        assert_eq!(target.seen.lock().machine.state(), awake);
        sink.run().unwrap();
        source.finish().unwrap();
        assert_eq!(backend.seen.lock().machine.state(), S::Stop);
        assert_eq!(target.seen.lock().machine.state(), S::Running);

        let expected: &[S] = match flags {
            1 => &[S::Stop, S::StopCopy, S::Stop],
            3 => &[S::RunningP2p, S::Stop, S::StopCopy, S::Stop],
            5 => &[S::PreCopy, S::StopCopy, S::Stop],
            _ => &[S::PreCopy, S::PreCopyP2p, S::StopCopy, S::Stop],
        };
        assert_eq!(backend.seen.lock().path, expected);
        let early = if flags & 4 == 0 { 0 } else { 253 };
        assert_eq!(target.seen.lock().loaded.len(), early + 120);
        // The VMM's part came along and the device was told of it.
        assert_eq!(there.bars()[1].address, 0xd000_0000);
        assert!(there.memory_enabled());
        let route = fabric.0.lock()[0].route.lock().unwrap();
        assert_eq!((route.address, route.data), (0xfee0_1000, 0x55));
        let seen = target.seen.lock();
        assert_eq!(seen.config[4], 6);
        assert_eq!(seen.config[usize::from(MSIX_CAP) + 3], 0x80);
    }
}

#[test]
fn a_waiting_interrupt_moves_along() {
    let (_, nic, fabric) = migratable(7);
    let (_, there, other) = migratable(7);
    fabric.0.lock()[2].trigger().unwrap();
    let mut source = nic.state_source().unwrap();
    let mut sink = there.state_sink().unwrap();
    sink.prepare().unwrap();
    source.start_precopy().unwrap();
    source.stop().unwrap();
    stop_copy(&mut source, &mut sink);
    sink.finish_load().unwrap();
    assert!(other.0.lock()[2].is_pending());
    assert!(!other.0.lock()[1].is_pending());
}

#[test]
fn an_abort_leaves_the_device_running_from_every_phase() {
    for steps in 0..5 {
        let (backend, nic, _) = migratable(7);
        let mut source = nic.state_source().unwrap();
        let mut buffer = [0; 100];
        if steps > 0 {
            source.start_precopy().unwrap();
        }
        if steps > 1 {
            source.quiesce().unwrap();
        }
        if steps > 2 {
            source.stop().unwrap();
        }
        if steps > 3 {
            while source.read_stop_copy(&mut buffer).unwrap() != 0 {}
        }
        source.wake();
        source.abort().unwrap();
        let seen = backend.seen.lock();
        assert_eq!(seen.machine.state(), DeviceState::Running, "{steps}");
        assert_eq!(seen.resets, 0);
        drop(seen);
        // And it can be tried again.
        source.start_precopy().unwrap();
    }
}

#[test]
fn a_paused_device_moves_without_running_again() {
    let (backend, nic, _) = migratable(7);
    backend
        .seen
        .lock()
        .machine
        .transition(DeviceState::Stop, |_| Ok(()))
        .unwrap();
    let mut source = nic.state_source().unwrap();
    source.start_precopy().unwrap();
    assert_eq!(source.size().unwrap().precopy_bytes, 0);
    source.quiesce().unwrap();
    source.stop().unwrap();
    assert_eq!(backend.seen.lock().path, [DeviceState::StopCopy]);
    source.abort().unwrap();
    assert_eq!(backend.seen.lock().machine.state(), DeviceState::Stop);
}

#[test]
fn a_device_that_fails_to_stop_goes_on_or_is_reset() {
    // It stays where it was: running is one arc away.
    let (backend, nic, _) = migratable(7);
    let arc = StateArc::PreCopyP2pToStopCopy;
    backend.seen.lock().faults = vec![fault(arc, How::Stays)];
    let mut source = nic.state_source().unwrap();
    source.start_precopy().unwrap();
    assert!(source.stop().is_err());
    source.wake();
    source.abort().unwrap();
    assert_eq!(backend.seen.lock().machine.state(), DeviceState::Running);

    // It breaks: only a reset helps, and that is an error to be told.
    let (backend, nic, _) = migratable(7);
    backend.seen.lock().faults = vec![fault(arc, How::Breaks)];
    let mut source = nic.state_source().unwrap();
    source.start_precopy().unwrap();
    assert!(source.stop().is_err());
    assert_eq!(backend.seen.lock().machine.state(), DeviceState::Error);
    nic.clone().write_config(4, &[6]);
    backend.seen.lock().config[4] = 0;
    nic.clone()
        .write_config(MSIX_CAP + 2, &0x8000_u16.to_le_bytes());
    backend.seen.lock().irqs = Some((IrqKind::Msix, 0));
    source.wake();
    let error = source.abort().unwrap_err();
    assert!(matches!(error, StateError::Reset { .. }), "{error}");
    let seen = backend.seen.lock();
    assert_eq!(seen.machine.state(), DeviceState::Running);
    assert_eq!(seen.resets, 1);
    // It is set up again as the guest had it.
    let all = Some((IrqKind::Msix, usize::from(VECTORS)));
    assert_eq!((seen.config[4], seen.irqs), (6, all));
}

#[test]
fn a_dead_device_is_an_error_in_every_call() {
    let (backend, nic, _) = migratable(7);
    let mut source = nic.state_source().unwrap();
    source.start_precopy().unwrap();
    backend.seen.lock().gone = true;
    let mut buffer = [0; 100];
    assert!(source.size().is_err());
    // The preamble is the VMM's own.
    assert!(source.read_precopy(&mut buffer).is_ok());
    assert!(source.read_precopy(&mut buffer).is_err());
    assert!(source.quiesce().is_err());
    assert!(source.stop().is_err());
    assert!(source.abort().is_err());
    let mut sink = nic.state_sink().unwrap();
    assert!(sink.prepare().is_err());
}

#[test]
fn calls_out_of_order_are_refused() {
    let (_, nic, _) = migratable(7);
    let mut source = nic.state_source().unwrap();
    let mut buffer = [0; 100];
    assert!(source.read_precopy(&mut buffer).is_err());
    assert!(source.quiesce().is_err());
    assert!(source.stop().is_err());
    assert!(source.read_stop_copy(&mut buffer).is_err());
    assert!(source.finish().is_err());
    source.start_precopy().unwrap();
    assert!(source.start_precopy().is_err());
    assert!(source.finish().is_err(), "not before all was read");
    let mut sink = nic.state_sink().unwrap();
    assert!(sink.write(&[1]).is_err());
    assert!(sink.finish_load().is_err());
    assert!(sink.wake().is_err());
    assert!(sink.run().is_err());
    sink.abort().unwrap();
}

#[test]
fn a_bad_stream_never_runs_and_an_abort_resets_the_device() {
    let (backend, nic, _) = migratable(7);
    let mut sink = nic.state_sink().unwrap();
    sink.prepare().unwrap();
    assert!(matches!(
        sink.write(b"not a stream"),
        Err(StateError::BadState { .. })
    ));
    assert!(sink.write(b"more").is_err());
    assert!(sink.finish_load().is_err());
    assert!(sink.run().is_err());
    sink.abort().unwrap();
    let seen = backend.seen.lock();
    assert_eq!(seen.resets, 1);
    assert_eq!(seen.machine.state(), DeviceState::Running);
    drop(seen);
    // A front that is no front.
    sink.prepare().unwrap();
    let identity = nic.profile().identity;
    let stream = [preamble(identity), front_frame(b"???"), end_frame(0)].concat();
    sink.write(&stream).unwrap();
    assert!(matches!(
        sink.finish_load(),
        Err(StateError::BadState { .. })
    ));
    sink.abort().unwrap();
}

#[test]
fn the_size_is_the_devices_estimate_or_a_careful_guess() {
    let (backend, nic, _) = migratable(7);
    let mut source = nic.state_source().unwrap();
    assert_eq!(source.size().unwrap().total(), 1000);
    source.start_precopy().unwrap();
    let mut buffer = [0; 100];
    while source.read_precopy(&mut buffer).unwrap() != PrecopyRead::Empty {}
    assert_eq!(
        source.size().unwrap(),
        StateSize {
            stop_copy_bytes: 1000,
            ..StateSize::default()
        }
    );
    backend.seen.lock().size = None;
    assert_eq!(source.size().unwrap().stop_copy_bytes, UNKNOWN_STOP_COPY);
}

#[test]
fn what_the_device_tells_of_its_pre_copy_is_in_the_size() {
    let (backend, nic, _) = migratable(7);
    let mut source = nic.state_source().unwrap();
    // Before it can be asked: all of it might go while it runs.
    assert_eq!(
        (
            source.size().unwrap().precopy_bytes,
            source.size().unwrap().total()
        ),
        (1000, 1000)
    );
    source.start_precopy().unwrap();
    for (initial_bytes, dirty_bytes, reinit) in [(400, 0, false), (0, 100, false), (700, 0, true)] {
        backend.seen.lock().precopy_info = Some(PrecopyInfo {
            initial_bytes,
            dirty_bytes,
            reinit,
        });
        let size = source.size().unwrap();
        assert_eq!(size.initial_bytes, initial_bytes);
        assert_eq!(size.precopy_bytes, initial_bytes + dirty_bytes);
        // What may go early is part of what the device estimates for the end.
        assert_eq!(size.total(), 1000);
    }
}

#[test]
fn a_buffer_too_small_for_a_frame_is_refused() {
    let (_, nic, _) = migratable(7);
    let mut source = nic.state_source().unwrap();
    source.start_precopy().unwrap();
    let mut small = [0; 12];
    assert_eq!(
        source.read_precopy(&mut small).unwrap(),
        PrecopyRead::Data(12)
    );
    assert!(source.read_precopy(&mut small).is_err());
}
