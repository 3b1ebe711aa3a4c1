use super::*;

#[derive(Default)]
struct Part {
    state: Vec<u8>,
    paused: bool,
    fail_pause: bool,
}

impl Pause for Part {
    fn pause(&mut self) -> Result<(), StateError> {
        self.paused = true;
        if self.fail_pause {
            return Err(StateError::BadState {
                id: "part".into(),
                reason: "told to".into(),
            });
        }
        Ok(())
    }

    fn resume(&mut self) -> Result<(), StateError> {
        self.paused = false;
        Ok(())
    }
}

impl SaveRestore for Part {
    const MAX_STATE_BYTES: usize = 100;

    fn expected_bytes(&self) -> usize {
        60
    }

    fn save(&mut self) -> Result<Vec<u8>, StateError> {
        Ok(self.state.clone())
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), StateError> {
        self.state = state.to_vec();
        Ok(())
    }
}

fn part(state: &[u8]) -> Arc<Mutex<Part>> {
    Arc::new(Mutex::new(Part {
        state: state.to_vec(),
        ..Part::default()
    }))
}

fn left(source: &mut SnapshotSource<Part>) -> u64 {
    source.size().unwrap().stop_copy_bytes
}

#[test]
fn the_whole_state_goes_over() {
    let (from, to) = (part(b"a state"), part(b""));
    to.lock().paused = true;
    let mut source = SnapshotSource::new("part", from.clone());
    let mut sink = SnapshotSink::new("part", to.clone());
    sink.prepare().unwrap();
    source.start_precopy().unwrap();
    assert_eq!(left(&mut source), 60);
    let mut buffer = [0; 3];
    assert_eq!(
        source.read_precopy(&mut buffer).unwrap(),
        PrecopyRead::Empty
    );
    assert!(!from.lock().paused);
    source.quiesce().unwrap();
    assert!(from.lock().paused);
    source.stop().unwrap();
    assert_eq!(left(&mut source), 7);
    loop {
        let count = source.read_stop_copy(&mut buffer).unwrap();
        if count == 0 {
            break;
        }
        sink.write(&buffer[..count]).unwrap();
    }
    assert_eq!(left(&mut source), 0);
    sink.finish_load().unwrap();
    assert_eq!(to.lock().state, b"a state");
    assert!(to.lock().paused);
    sink.run().unwrap();
    source.finish().unwrap();
    assert!(from.lock().paused && !to.lock().paused);
}

#[test]
fn an_abort_resumes_what_was_paused_and_nothing_else() {
    let from = part(b"");
    from.lock().paused = true;
    let mut source = SnapshotSource::new("part", from.clone());
    source.start_precopy().unwrap();
    source.abort().unwrap();
    assert!(from.lock().paused, "it was paused by somebody else");
    from.lock().fail_pause = true;
    source.quiesce().unwrap_err();
    source.abort().unwrap();
    assert!(!from.lock().paused, "a pause that failed is undone too");
}

#[test]
fn a_still_part_is_never_paused() {
    let from = part(b"x");
    let mut source = SnapshotSource::still("part", from.clone());
    source.quiesce().unwrap();
    source.stop().unwrap();
    assert!(!from.lock().paused);
    let to = part(b"");
    to.lock().paused = true;
    let mut sink = SnapshotSink::still("part", to.clone());
    sink.run().unwrap();
    assert!(to.lock().paused);
}

#[test]
fn too_much_state_is_refused_on_both_sides() {
    let mut source = SnapshotSource::new("part", part(&[1; 101]));
    source.quiesce().unwrap();
    let error = source.stop().unwrap_err().to_string();
    assert!(
        error.contains("101 bytes") && error.contains("at most 100"),
        "{error}"
    );
    let mut sink = SnapshotSink::new("part", part(b""));
    sink.write(&[0; 100]).unwrap();
    let error = sink.write(&[0]).unwrap_err().to_string();
    assert!(error.contains("101 bytes"), "{error}");
}

#[test]
fn an_aborted_sink_stands_still() {
    let to = part(b"old");
    to.lock().paused = true;
    let mut sink = SnapshotSink::new("part", to.clone());
    sink.write(b"new").unwrap();
    sink.abort().unwrap();
    assert!(to.lock().paused);
    sink.run().unwrap();
    sink.abort().unwrap();
    assert!(to.lock().paused);
    assert_eq!(to.lock().state, b"old");
}
