//! Who may load, adopt and attach.

use std::fs::File;

use rustix::fs::{MemfdFlags, memfd_create};
use rustix::thread::{CapabilitySet, capabilities, set_capabilities};

use super::*;

/// Runs `test` on a thread that has of the process' capabilities only `kept`; `None` if the
/// process has not got these.
fn with_capabilities<T: Send + 'static>(
    kept: CapabilitySet,
    test: impl FnOnce() -> T + Send + 'static,
) -> Option<T> {
    let thread = std::thread::spawn(move || {
        let mut sets = capabilities(None).unwrap();
        if !sets.permitted.contains(kept) {
            return None;
        }
        sets.effective = kept;
        // Of this thread only, which ends with the test.
        set_capabilities(None, sets).unwrap();
        Some(test())
    });
    thread.join().unwrap()
}

#[test]
fn two_capabilities_suffice() {
    let Some(_) = loaded("two_capabilities_suffice") else {
        return;
    };
    let two = CapabilitySet::BPF | CapabilitySet::PERFMON;
    match with_capabilities(two, SteeringProgram::load) {
        Some(program) => drop(program.unwrap()),
        None => println!("SKIP: two_capabilities_suffice: this process has not got them"),
    }
}

#[test]
fn lack_of_privilege_is_told_at_once() {
    for kept in [CapabilitySet::empty(), CapabilitySet::BPF] {
        let began = std::time::Instant::now();
        match with_capabilities(kept, || SteeringProgram::load().unwrap_err()) {
            Some(error @ SteeringError::Forbidden { .. }) => {
                assert!(error.to_string().contains("CAP_BPF"), "{error}");
            }
            Some(error @ SteeringError::Unsupported { .. }) => println!("{error}"),
            Some(other) => panic!("{other}"),
            None => println!("SKIP: lack_of_privilege_is_told_at_once: no CAP_BPF to keep"),
        }
        // The verifier would be at the whole program for seconds.
        assert!(began.elapsed() < std::time::Duration::from_secs(1));
    }
}

#[test]
fn a_program_is_adopted_without_privilege() {
    let Some(program) = loaded("a_program_is_adopted_without_privilege") else {
        return;
    };
    let fds = [program.program_fd(), program.map_fd()];
    let [program_fd, map_fd] = fds.map(|fd| fd.try_clone_to_owned().unwrap());
    let config = config(HashTypes::ALL, key(5), 300, 64);
    let theirs = config.clone();
    with_capabilities(CapabilitySet::empty(), move || {
        let mut adopted = SteeringProgram::adopt(program_fd, map_fd).unwrap();
        adopted.update(&theirs);
    })
    .unwrap();
    // It is one program with one configuration.
    for (what, frame) in frames::samples() {
        assert_eq!(
            run(&program, &frame, 1).0,
            expected(&config, &frame),
            "{what}"
        );
    }
}

#[test]
fn what_is_no_steering_map_is_not_adopted() {
    let Some(program) = loaded("what_is_no_steering_map_is_not_adopted") else {
        return;
    };
    let refusal = |map: OwnedFd| {
        let fd = program.program_fd().try_clone_to_owned().unwrap();
        let error = SteeringProgram::adopt(fd, map).unwrap_err();
        assert!(matches!(error, SteeringError::NotOurMap { .. }), "{error}");
    };
    // An empty file would be mapped, and the first look at it be the last.
    refusal(memfd_create("empty", MemfdFlags::CLOEXEC).unwrap());
    refusal(File::open("/dev/null").unwrap().into());
    refusal(program.program_fd().try_clone_to_owned().unwrap());
    // A map of the right size that nobody claimed.
    refusal(bpf::create_map().unwrap());
}
