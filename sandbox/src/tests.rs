use std::fs::File;
use std::io::{IoSlice, IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::net::ToSocketAddrs;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Barrier;
use std::time::Duration;

use devices::terminal::Terminal;
use rustix::net::{
    RecvAncillaryBuffer, RecvFlags, SendAncillaryBuffer, SendFlags, Shutdown, recvmsg, sendmsg,
    shutdown,
};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::*;

/// Names the test whose child this process is.
const CHILD: &str = "FERRY_SANDBOX_TEST";
/// Names a directory a child may use.
const DIRECTORY: &str = "FERRY_SANDBOX_DIRECTORY";

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
fn a_tap_is_set_to_hash_where_its_commands_are_carried_out() {
    let test = "a_tap_is_set_to_hash_where_its_commands_are_carried_out";
    let output = in_child(test, || {
        run(ThreadKind::VirtioNetControl, SeccompMode::Enforce, || {
            // Header size, steering program and hash; then the question what the kernel can hash.
            for request in [0x54d7, 0x54e0, 0x54e5, 0x54e6, 0x54e7, 0x54e4] {
                // SAFETY: standard error is no tap and refuses each request.
                let status = unsafe { libc::ioctl(std::io::stderr().as_raw_fd(), request, 0) };
                assert_eq!(status, -1);
                eprintln!("request {request:#x} was allowed");
            }
        });
    });
    forbidden(&output, "(ioctl), argument 1 = 0x54e4");
    assert!(String::from_utf8_lossy(&output.stderr).contains("request 0x54e7 was allowed"));
}

#[test]
fn who_opens_a_tap_loads_programs_and_does_no_more() {
    let test = "who_opens_a_tap_loads_programs_and_does_no_more";
    let output = in_child(test, || {
        for kind in [ThreadKind::MigrationReceive, ThreadKind::Vmm] {
            run(kind, SeccompMode::Enforce, || {
                // BPF_MAP_CREATE and BPF_PROG_LOAD.
                for command in [0, 5] {
                    // SAFETY: no attributes are given, so that nothing is read.
                    let status = unsafe { libc::syscall(libc::SYS_bpf, command, 0, 0) };
                    assert_eq!(status, -1);
                }
                eprintln!("programs may be loaded");
            });
        }
        run(ThreadKind::Vmm, SeccompMode::Enforce, || {
            // SAFETY: no attributes are given; BPF_MAP_LOOKUP_ELEM would need some.
            unsafe { libc::syscall(libc::SYS_bpf, 1, 0, 0) };
        });
    });
    forbidden(&output, "(vmm) called forbidden system call 321 (bpf)");
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(said.matches("programs may be loaded").count(), 2, "{said}");
}

#[test]
fn who_builds_an_arriving_vm_makes_no_memory_executable() {
    let test = "who_builds_an_arriving_vm_makes_no_memory_executable";
    let output = in_child(test, || {
        run(ThreadKind::MigrationReceive, SeccompMode::Enforce, || {
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
fn a_vcpu_runs_and_makes_no_vm() {
    let output = in_child("a_vcpu_runs_and_makes_no_vm", || {
        run(ThreadKind::Vcpu, SeccompMode::Enforce, || {
            for request in [0xae80, 0xae01] {
                // SAFETY: KVM_RUN and KVM_CREATE_VM take no pointer; the file is not KVM's.
                let status = unsafe { libc::ioctl(std::io::stderr().as_raw_fd(), request, 0) };
                assert_eq!(status, -1);
                eprintln!("request {request:#x} was allowed");
            }
        });
    });
    forbidden(&output, "(ioctl), argument 1 = 0xae01");
    assert!(String::from_utf8_lossy(&output.stderr).contains("request 0xae80 was allowed"));
}

#[test]
fn a_vcpu_sets_a_devices_interrupts_and_migrates_no_device() {
    let output = in_child(
        "a_vcpu_sets_a_devices_interrupts_and_migrates_no_device",
        || {
            run(ThreadKind::Vcpu, SeccompMode::Enforce, || {
                for request in [0x3b6e, 0x3b75] {
                    // SAFETY: VFIO_DEVICE_SET_IRQS and VFIO_DEVICE_FEATURE with no structure; the file
                    // is not VFIO's.
                    let status = unsafe { libc::ioctl(std::io::stderr().as_raw_fd(), request, 0) };
                    assert_eq!(status, -1);
                    eprintln!("request {request:#x} was allowed");
                }
            });
        },
    );
    forbidden(&output, "(ioctl), argument 1 = 0x3b75");
    assert!(String::from_utf8_lossy(&output.stderr).contains("request 0x3b6e was allowed"));
}

#[test]
fn the_server_of_a_card_connects_to_nobody() {
    let output = in_child("the_server_of_a_card_connects_to_nobody", || {
        run(ThreadKind::VfioServer, SeccompMode::Enforce, || {
            let _ = UnixStream::connect("/nonexistent");
        });
    });
    forbidden(
        &output,
        "(vfio-server) called forbidden system call 41 (socket)",
    );
}

/// Sends a message and reads it, with room for descriptors, as either end of vfio-user does.
fn exchange(one: &UnixStream, other: &UnixStream) {
    let sent = sendmsg(
        one,
        &[IoSlice::new(b"answer")],
        &mut SendAncillaryBuffer::default(),
        SendFlags::empty(),
    );
    let mut answer = [0; 6];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let received = recvmsg(
        other,
        &mut [IoSliceMut::new(&mut answer)],
        &mut RecvAncillaryBuffer::new(&mut space),
        RecvFlags::empty(),
    );
    assert_eq!((sent.unwrap(), received.unwrap().bytes), (6, 6));
    shutdown(one, Shutdown::Both).unwrap();
}

/// Which one reads an answer is a matter of time, so that a run that goes well proves nothing.
#[test]
fn whoever_asks_a_vfio_user_server_may_read_its_answer() {
    let test = "whoever_asks_a_vfio_user_server_may_read_its_answer";
    let output = in_child(test, || {
        for kind in [
            ThreadKind::Vmm,
            ThreadKind::Vcpu,
            ThreadKind::MigrationSend,
            ThreadKind::MigrationReceive,
            ThreadKind::VfioUser,
            ThreadKind::VfioServer,
        ] {
            let (one, other) = UnixStream::pair().unwrap();
            run(kind, SeccompMode::Enforce, move || exchange(&one, &other));
        }
    });
    fine(&output);
}

#[test]
fn names_are_resolved_where_a_migration_needs_it() {
    let output = in_child("names_are_resolved_where_a_migration_needs_it", || {
        for kind in [ThreadKind::Vmm, ThreadKind::MigrationSend] {
            run(kind, SeccompMode::Enforce, || {
                let found = ("localhost", 1).to_socket_addrs().map(Iterator::count);
                println!("localhost: {found:?}");
                let found = ("name.invalid", 1).to_socket_addrs().map(Iterator::count);
                println!("name.invalid: {found:?}");
                // As libcap does when a module of nsswitch.conf loads it.
                // SAFETY: this option takes no pointer.
                unsafe { libc::prctl(libc::PR_CAPBSET_READ, 0) };
            });
        }
    });
    fine(&output);
}

/// Makes a console of each kind as a VM's builder does, feeds it input as its thread does, and puts
/// what it changed back.
fn connect_consoles(main: ThreadKind) {
    let dir = PathBuf::from(std::env::var_os(DIRECTORY).unwrap());
    let socket = dir.join("console");
    let filters = filters(main, SeccompMode::Enforce);
    let spawner = filters.spawner();
    filters.confine(main).unwrap();
    drop(Terminal::file(&dir.join("log")).unwrap());
    drop(Terminal::stdio().unwrap());
    let pty = Terminal::pty().unwrap();
    let slave = pty.pty_path().map(Path::to_owned).unwrap();
    let typed = || {
        let mut slave = File::options().write(true).open(&slave).unwrap();
        slave.write_all(b"x").unwrap();
    };
    read_a_byte(&spawner, pty, typed);
    drop(Terminal::socket(&socket).unwrap());
    // The file is left; the next one replaces it.
    let listener = Terminal::socket(&socket).unwrap();
    let mut client = UnixStream::connect(&socket).unwrap();
    read_a_byte(&spawner, listener, || client.write_all(b"x").unwrap());
}

fn read_a_byte(spawner: &ThreadSpawner, terminal: Terminal, type_it: impl FnOnce()) {
    let (tell, told) = std::sync::mpsc::channel();
    let stop = EventFd::new(EFD_NONBLOCK).unwrap();
    let never = EventFd::new(EFD_NONBLOCK).unwrap();
    let end = stop.try_clone().unwrap();
    let body = move || {
        let sink = |bytes: Option<&[u8]>| {
            if let Some(bytes) = bytes {
                tell.send(bytes.to_vec()).unwrap();
            }
            1
        };
        terminal.read_input(&stop, &never, sink).unwrap();
    };
    let thread = spawner.spawn(ThreadKind::Serial, "serial", body).unwrap();
    type_it();
    assert_eq!(told.recv().unwrap(), b"x");
    end.write(1).unwrap();
    thread.join().unwrap();
}

#[test]
fn consoles_are_connected_where_vms_are_built() {
    // The parent's to remove: a confined thread lists no directory.
    let dir = std::env::var_os(DIRECTORY)
        .is_none()
        .then(tempfile::tempdir);
    let dir = dir.transpose().unwrap();
    let path = dir.as_ref().and_then(|dir| dir.path().to_str());
    let environment = [
        ("MALLOC_ARENA_MAX", "1"),
        (DIRECTORY, path.unwrap_or_default()),
    ];
    let test = "consoles_are_connected_where_vms_are_built";
    let output = in_child_with(test, &environment, || {
        connect_consoles(ThreadKind::Vmm);
    });
    fine(&output);
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
fn a_panic_says_why_and_ends_its_thread() {
    let test = "a_panic_says_why_and_ends_its_thread";
    let environment = [("MALLOC_ARENA_MAX", "1"), ("RUST_BACKTRACE", "0")];
    let output = in_child_with(test, &environment, || {
        let spawner = filters(ThreadKind::VirtioNet, SeccompMode::Enforce).spawner();
        let body = || panic!("on purpose");
        let thread = spawner.spawn(ThreadKind::VirtioNet, "net", body).unwrap();
        assert!(thread.join().is_err());
    });
    fine(&output);
    assert!(String::from_utf8_lossy(&output.stderr).contains("on purpose"));
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
