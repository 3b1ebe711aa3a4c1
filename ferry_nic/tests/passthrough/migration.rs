//! A card that moves to another server while its guest's memory stays (both map one file).

use std::os::unix::net::UnixDatagram;

use vm_migration::{Pause, PrecopyRead, StateError, StateSink, StateSource};

use crate::driver::{Driver, HEADER};
use crate::machine::{Machine, card, ram_file};

fn inject(cable: &UnixDatagram, frame: &[u8]) {
    cable.send(&[&[0; HEADER], frame].concat()).unwrap();
}

/// Moves all that there is while the source runs.
fn precopy(source: &mut dyn StateSource, sink: &mut dyn StateSink) -> Result<usize, StateError> {
    let mut buffer = vec![0; 1 << 16];
    let mut total = 0;
    loop {
        match source.read_precopy(&mut buffer)? {
            PrecopyRead::Empty => return Ok(total),
            PrecopyRead::Data(len) => {
                sink.write(&buffer[..len])?;
                total += len;
            }
        }
    }
}

fn stop_copy(source: &mut dyn StateSource, sink: &mut dyn StateSink) -> Result<(), StateError> {
    let mut buffer = vec![0; 1000];
    loop {
        match source.read_stop_copy(&mut buffer)? {
            0 => return Ok(()),
            len => sink.write(&buffer[..len])?,
        }
    }
}

#[test]
fn a_card_in_use_moves_there_and_back() {
    let file = ram_file();
    let (net, cable) = card(1);
    let mut here = Machine::new(&file, net);
    let mut driver = Driver::start(&mut here);
    let mut here_cable = cable;
    let mut machine = here;
    for round in 0..4_u8 {
        driver.send(&machine, &[round; 64]);
        let (net, there_cable) = card(1);
        let there = Machine::new(&file, net);
        let mut source = machine.nic.state_source().unwrap();
        let mut sink = there.nic.state_sink().unwrap();
        assert!(source.size().unwrap().precopy_bytes > 0);
        sink.prepare().unwrap();
        source.start_precopy().unwrap();
        let size = source.size().unwrap();
        assert!(size.initial_bytes > 100, "{size:?}");
        let early = precopy(&mut source, &mut sink).unwrap();
        assert!(early > 100, "an early copy of the state");
        let size = source.size().unwrap();
        assert_eq!(size.initial_bytes, 0);
        assert!(size.stop_copy_bytes > 100, "the final state is to come");
        assert_eq!(source.size().unwrap().precopy_bytes, 0);
        // It runs all the while, and what it does now is in the final state only.
        for _ in 0..5 {
            inject(&here_cable, &[round; 500]);
            assert_eq!(driver.receive(&machine).unwrap().1, [round; 500]);
        }
        source.quiesce().unwrap();
        source.stop().unwrap();
        // Packets for a card that stands still wait.
        inject(&here_cable, &[0xee; 100]);
        stop_copy(&mut source, &mut sink).unwrap();
        sink.finish_load().unwrap();
        sink.wake().unwrap();
        sink.run().unwrap();
        source.finish().unwrap();

        for number in 0..70_u8 {
            inject(&there_cable, &[number; 300]);
            assert_eq!(driver.receive(&there).unwrap().1, [number; 300]);
        }
        driver.send(&there, &[0xaa; 64]);
        assert!(there.lines[0].signalled());
        assert_eq!(there.lines[1].route.lock().unwrap().data, 1);
        machine = there;
        here_cable = there_cable;
    }
}

#[test]
fn an_aborted_move_leaves_the_card_at_work() {
    for steps in 1..4 {
        let file = ram_file();
        let (net, cable) = card(1);
        let mut machine = Machine::new(&file, net);
        let mut driver = Driver::start(&mut machine);
        let (net, _) = card(1);
        let there = Machine::new(&file, net);
        let mut source = machine.nic.state_source().unwrap();
        let mut sink = there.nic.state_sink().unwrap();
        sink.prepare().unwrap();
        source.start_precopy().unwrap();
        precopy(&mut source, &mut sink).unwrap();
        if steps > 1 {
            source.quiesce().unwrap();
        }
        if steps > 2 {
            source.stop().unwrap();
            stop_copy(&mut source, &mut sink).unwrap();
        }
        source.wake();
        source.abort().unwrap();
        sink.abort().unwrap();
        for number in 0..70_u8 {
            inject(&cable, &[number; 300]);
            assert_eq!(driver.receive(&machine).unwrap().1, [number; 300]);
        }
        driver.send(&machine, &[1; 64]);
    }
}

#[test]
fn a_destination_that_does_not_fit_is_found_out_while_the_guest_runs() {
    let file = ram_file();
    let (net, cable) = card(1);
    let mut machine = Machine::new(&file, net);
    let mut driver = Driver::start(&mut machine);
    let (net, _) = card(2);
    let there = Machine::new(&file, net);
    let mut source = machine.nic.state_source().unwrap();
    let mut sink = there.nic.state_sink().unwrap();
    sink.prepare().unwrap();
    source.start_precopy().unwrap();
    assert!(precopy(&mut source, &mut sink).is_err());
    sink.abort().unwrap();
    source.abort().unwrap();
    inject(&cable, &[7; 300]);
    assert_eq!(driver.receive(&machine).unwrap().1, [7; 300]);
}

#[test]
fn a_pause_holds_the_card_and_a_resume_lets_it_go_on() {
    let (net, cable) = card(1);
    let mut machine = Machine::new(&ram_file(), net);
    let mut driver = Driver::start(&mut machine);
    machine.nic.pause().unwrap();
    inject(&cable, &[7; 300]);
    std::thread::sleep(std::time::Duration::from_millis(50));
    assert!(driver.has_nothing(&machine), "a paused card wrote memory");
    machine.nic.resume().unwrap();
    assert_eq!(driver.receive(&machine).unwrap().1, [7; 300]);
}
