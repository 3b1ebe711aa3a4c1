use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::process::{Command, Output};
use std::sync::Barrier;
use std::time::Duration;

use super::*;

/// Names the test whose child this process is.
const CHILD: &str = "FERRY_SANDBOX_TEST";

/// Runs `body` in a process of its own: this test program again, with this test alone. `test` is
/// the test's own name.
fn in_child(test: &str, body: impl FnOnce()) -> Output {
    // As Filters::new has it in a program, where there are no threads before.
    in_child_with(test, &[("MALLOC_ARENA_MAX", "1")], body)
}

fn in_child_with(test: &str, environment: &[(&str, &str)], body: impl FnOnce()) -> Output {
    if std::env::var(CHILD).is_ok_and(|name| name == test) {
        body();
        std::process::exit(0);
    }
    let program = std::env::current_exe().unwrap();
    let mut child = Command::new(program);
    child.args(["--exact", &format!("tests::{test}"), "--nocapture"]);
    child.env(CHILD, test).envs(environment.iter().copied());
    child.output().unwrap()
}

/// The kinds of main threads: all others are started by them.
const MAINS: [ThreadKind; 2] = [ThreadKind::Vmm, ThreadKind::VfioServer];

fn kinds() -> impl Iterator<Item = ThreadKind> {
    MAINS.into_iter().flat_map(profile::reachable)
}

fn filters(main: ThreadKind, mode: SeccompMode) -> Filters {
    Filters::new("tester", main, mode).unwrap()
}

fn run(kind: ThreadKind, mode: SeccompMode, body: impl FnOnce() + Send + 'static) {
    let spawner = filters(kind, mode).spawner();
    spawner.spawn(kind, "worker", body).unwrap().join().unwrap();
}

fn forbidden(output: &Output, message: &str) {
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(FORBIDDEN_CALL_STATUS), "{said}");
    assert!(said.contains(message), "{said}");
}

fn fine(output: &Output) {
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{said}");
}

/// What any thread does.
fn ordinary_work() {
    let blocks: Vec<Vec<u8>> = (1..40).map(|size| vec![1; size * 50_000]).collect();
    assert_eq!(blocks.len(), 39);
    let (sender, receiver) = std::sync::mpsc::channel::<()>();
    assert!(receiver.recv_timeout(Duration::from_millis(2)).is_err());
    drop(sender);
    std::thread::sleep(Duration::from_millis(1));
    std::thread::yield_now();
    let lock = parking_lot::Mutex::new(0);
    *lock.lock() += 1;
    writeln!(std::io::stderr(), "ordinary work is done").unwrap();
}

#[test]
fn every_profile_compiles() {
    for mode in [SeccompMode::Enforce, SeccompMode::Log] {
        for kind in kinds() {
            let program = filter::compile(kind, mode).unwrap();
            // BPF_MAXINSNS of linux/bpf_common.h.
            assert!(
                (1..=4096).contains(&program.len()),
                "{kind:?}: {}",
                program.len()
            );
        }
    }
    let off = filters(ThreadKind::Vmm, SeccompMode::Off);
    assert!(off.programs.values().all(Vec::is_empty));
}

#[test]
fn a_program_has_the_filters_of_its_own_threads() {
    let ferry = filters(ThreadKind::Vmm, SeccompMode::Log);
    // A vCPU starts it, which the main thread starts.
    assert!(ferry.programs.contains_key(&ThreadKind::VirtioNetControl));
    let nic = filters(ThreadKind::VfioServer, SeccompMode::Log);
    assert!(nic.programs.contains_key(&ThreadKind::VirtioNetControl));
    let refused = nic.confine(ThreadKind::Vcpu).unwrap_err();
    assert!(matches!(
        refused,
        SeccompError::NoFilter {
            kind: ThreadKind::Vcpu
        }
    ));
}

#[test]
fn names_and_numbers_agree() {
    assert_eq!(names::number("ioctl"), Some(libc::SYS_ioctl));
    assert_eq!(names::name(libc::SYS_execve), Some("execve"));
    assert_eq!((names::number("SYS_read"), names::name(-1)), (None, None));
}

#[test]
fn a_forbidden_call_names_thread_kind_and_call() {
    let output = in_child("a_forbidden_call_names_thread_kind_and_call", || {
        run(ThreadKind::VirtioRng, SeccompMode::Enforce, || {
            let _ = File::open("/etc/passwd");
        });
    });
    let message =
        "tester: seccomp: thread 'worker' (virtio-rng) called forbidden system call 257 (openat)";
    forbidden(&output, message);
}

#[test]
fn ordinary_work_is_allowed_everywhere() {
    let output = in_child("ordinary_work_is_allowed_everywhere", || {
        for kind in kinds() {
            run(kind, SeccompMode::Enforce, ordinary_work);
        }
    });
    fine(&output);
}

#[test]
fn off_and_log_let_forbidden_calls_through() {
    let output = in_child("off_and_log_let_forbidden_calls_through", || {
        for mode in [SeccompMode::Off, SeccompMode::Log] {
            run(ThreadKind::EventMonitor, mode, || {
                assert!(File::open("/etc/passwd").is_ok());
                println!("opened");
            });
        }
    });
    fine(&output);
    assert_eq!(
        String::from_utf8_lossy(&output.stdout)
            .matches("opened")
            .count(),
        2
    );
}

#[test]
fn an_ioctl_is_judged_by_its_request() {
    let output = in_child("an_ioctl_is_judged_by_its_request", || {
        run(ThreadKind::VirtioNetControl, SeccompMode::Enforce, || {
            let null = std::io::stderr();
            // SAFETY: TUNSETOFFLOAD takes no pointer; the file is no tap and refuses it.
            let status = unsafe { libc::ioctl(null.as_raw_fd(), 0x4004_54d0, 0) };
            assert_eq!(status, -1);
            eprintln!("the tap's request was allowed");
            let mut size = [0u16; 4];
            // SAFETY: TIOCGWINSZ would write a struct of 8 bytes.
            unsafe { libc::ioctl(null.as_raw_fd(), libc::TIOCGWINSZ, size.as_mut_ptr()) };
        });
    });
    forbidden(
        &output,
        "(virtio-net-control) called forbidden system call 16 (ioctl), argument 1 = 0x5413",
    );
    assert!(String::from_utf8_lossy(&output.stderr).contains("the tap's request was allowed"));
}

#[test]
fn no_worker_makes_memory_executable() {
    let output = in_child("no_worker_makes_memory_executable", || {
        run(ThreadKind::VirtioNet, SeccompMode::Enforce, || {
            // SAFETY: a new anonymous mapping touches nothing that exists.
            unsafe {
                libc::mmap(
                    std::ptr::null_mut(),
                    4096,
                    libc::PROT_READ | libc::PROT_EXEC,
                    libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                    -1,
                    0,
                );
            }
        });
    });
    forbidden(&output, "(mmap), argument 2 = 0x5");
}

#[test]
fn a_confined_thread_can_start_those_of_its_profile() {
    let output = in_child("a_confined_thread_can_start_those_of_its_profile", || {
        let filters = filters(ThreadKind::Vmm, SeccompMode::Enforce);
        let spawner = filters.spawner();
        filters.confine(ThreadKind::Vmm).unwrap();
        let inner = spawner.clone();
        let vcpu = spawner.spawn(ThreadKind::Vcpu, "vcpu0", move || {
            let worker = inner.spawn(ThreadKind::VirtioNet, "net", ordinary_work);
            worker.unwrap().join().unwrap();
        });
        vcpu.unwrap().join().unwrap();
    });
    fine(&output);
}

#[test]
fn many_threads_at_once_open_no_files() {
    let output = in_child_with("many_threads_at_once_open_no_files", &[], || {
        let filters = filters(ThreadKind::Vcpu, SeccompMode::Enforce);
        let spawner = filters.spawner();
        filters.confine(ThreadKind::Vcpu).unwrap();
        let all = Arc::new(Barrier::new(20));
        let start = |_| {
            let all = Arc::clone(&all);
            let wait = move || {
                all.wait();
            };
            spawner.spawn(ThreadKind::VirtioNet, "net", wait).unwrap()
        };
        let threads: Vec<_> = (0..20).map(start).collect();
        for thread in threads {
            thread.join().unwrap();
        }
    });
    fine(&output);
}

#[test]
fn a_signal_from_outside_is_called_that() {
    let output = in_child("a_signal_from_outside_is_called_that", || {
        filters(ThreadKind::Vmm, SeccompMode::Enforce);
        // SAFETY: sends a signal to this process.
        unsafe { libc::raise(libc::SIGSYS) };
    });
    forbidden(&output, "was ended by SIGSYS from outside");
}

#[test]
fn a_blocked_signal_is_let_through() {
    let output = in_child("a_blocked_signal_is_let_through", || {
        // SAFETY: the set is made by sigfillset before it is used.
        unsafe {
            let mut set = std::mem::zeroed();
            libc::sigfillset(&mut set);
            libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut());
        }
        run(ThreadKind::Signal, SeccompMode::Enforce, || {
            let _ = File::open("/etc/passwd");
        });
    });
    forbidden(&output, "thread 'worker' (signal)");
}

#[test]
fn events_are_written_under_their_filter() {
    let output = in_child("events_are_written_under_their_filter", || {
        let file = tempfile::NamedTempFile::new().unwrap();
        let (monitor, writer) = event_monitor::EventMonitor::new(file.reopen().unwrap());
        let spawner = filters(ThreadKind::EventMonitor, SeccompMode::Enforce).spawner();
        let thread = spawner.spawn(ThreadKind::EventMonitor, "events", move || writer.run());
        monitor.tell(event_monitor::Event::Booting);
        drop(monitor);
        thread.unwrap().join().unwrap();
        assert!(
            std::fs::read_to_string(file.path())
                .unwrap()
                .contains("booting")
        );
    });
    fine(&output);
}
