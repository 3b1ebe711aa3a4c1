//! Which system calls each kind of thread may make: the one file to edit when a thread learns
//! something new. To find what is missing, run with `--seccomp log` and read the kernel's log.

use devices::ThreadKind;

/// What a kind of thread may do.
pub(super) struct Profile {
    /// Groups of system calls it may make with any arguments, by name.
    pub(super) calls: &'static [&'static [&'static str]],
    /// Groups of ioctl requests it may make.
    pub(super) ioctls: &'static [&'static [Ioctl]],
    /// It may map memory executable: name resolution loads libraries.
    pub(super) executable: bool,
    /// Kinds of threads it starts. A thread inherits its maker's filter besides its own, so the
    /// maker is allowed whatever these are.
    pub(super) starts: &'static [ThreadKind],
}

/// An ioctl request, by the 16 bits that hold its type and number. Size and direction are left
/// open: they differ between versions of one request, and the kernel checks them.
#[derive(Clone, Copy)]
pub(super) enum Ioctl {
    /// One request.
    Request(u16),
    /// All requests of a type (the upper byte).
    Type(u8),
}

use Ioctl::{Request, Type};

/// What Rust's and C's run-time, locks, channels, allocation, logging to standard error and an
/// orderly panic need.
const RUNTIME: &[&str] = &[
    "brk",
    "clock_gettime",
    "clock_nanosleep",
    "close",
    "epoll_pwait",
    "epoll_wait",
    "exit",
    "exit_group",
    "fcntl",
    "futex",
    "getcpu",
    "getpid",
    "getrandom",
    "gettid",
    "gettimeofday",
    "madvise",
    "membarrier",
    "mremap",
    "munmap",
    "nanosleep",
    "poll",
    "ppoll",
    "read",
    "readv",
    "restart_syscall",
    "rseq",
    "rt_sigaction",
    "rt_sigprocmask",
    "rt_sigreturn",
    "sched_getaffinity",
    "sched_yield",
    "set_robust_list",
    "sigaltstack",
    "tgkill",
    "time",
    "write",
    "writev",
];

/// Starting a thread and confining it.
const THREADS: &[&str] = &["clone", "clone3", "seccomp"];

/// Waiting for many things at once, and timers.
const EVENTS: &[&str] = &[
    "epoll_create1",
    "epoll_ctl",
    "eventfd2",
    "timerfd_create",
    "timerfd_gettime",
    "timerfd_settime",
];

/// Talking on sockets that are connected already.
const SOCKETS: &[&str] = &[
    "getpeername",
    "getsockname",
    "getsockopt",
    "recvfrom",
    "recvmsg",
    "sendmsg",
    "sendto",
    "setsockopt",
    "shutdown",
];

/// Taking connections, and removing the socket's file at the end.
const ACCEPT: &[&str] = &["accept4", "unlink", "unlinkat"];

/// Making connections and listening.
const CONNECT: &[&str] = &[
    "bind",
    "connect",
    "listen",
    "sendmmsg",
    "socket",
    "socketpair",
    "uname",
];

/// Reading and writing at an offset of an open file.
const POSITIONED: &[&str] = &["lseek", "pread64", "preadv", "pwrite64", "pwritev"];

/// Opening files and looking at them.
const FILES: &[&str] = &[
    "access",
    "copy_file_range",
    "dup",
    "dup2",
    "dup3",
    "faccessat",
    "faccessat2",
    "fadvise64",
    "fallocate",
    "fchmod",
    "fstat",
    "fstatfs",
    "fsync",
    "ftruncate",
    "getcwd",
    "getdents64",
    "lstat",
    "newfstatat",
    "open",
    "openat",
    "pipe2",
    "readlink",
    "readlinkat",
    "stat",
    "statfs",
    "statx",
    "umask",
    "unlink",
    "unlinkat",
];

/// Making and placing guest memory.
const MEMORY: &[&str] = &[
    "fallocate",
    "ftruncate",
    "mbind",
    "memfd_create",
    "mincore",
    "mlock",
    "mlock2",
    "munlock",
    "msync",
];

/// Handling signals and telling processes apart.
const SIGNALS: &[&str] = &[
    "getegid",
    "geteuid",
    "getgid",
    "getppid",
    "getuid",
    "kill",
    "prlimit64",
    "rt_sigpending",
    "rt_sigtimedwait",
    "signalfd4",
    "sysinfo",
    "wait4",
];

/// `FIONBIO` and `FIONREAD` of `asm-generic/ioctls.h`.
const STREAM: &[Ioctl] = &[Request(0x5421), Request(0x541b)];

/// Terminals (`asm-generic/ioctls.h`).
const TTY: &[Ioctl] = &[
    Request(0x5401), // TCGETS
    Request(0x5402), // TCSETS
    Request(0x5403), // TCSETSW
    Request(0x5404), // TCSETSF
    Request(0x5413), // TIOCGWINSZ
    Request(0x5430), // TIOCGPTN
    Request(0x5431), // TIOCSPTLCK
    Request(0x5441), // TIOCGPTPEER
];

/// All of KVM (`linux/kvm.h`, `KVMIO`).
const KVM: &[Ioctl] = &[Type(0xae)];

/// Running a vCPU and moving its state (`linux/kvm.h`). `KVM_RUN` first: it is the hot one, and
/// requests are compared in order.
const VCPU: &[Ioctl] = &[
    Request(0xae80), // KVM_RUN
    Request(0xae81), // KVM_GET_REGS
    Request(0xae82), // KVM_SET_REGS
    Request(0xae83), // KVM_GET_SREGS
    Request(0xae84), // KVM_SET_SREGS
    Request(0xae85), // KVM_TRANSLATE
    Request(0xae86), // KVM_INTERRUPT
    Request(0xae88), // KVM_GET_MSRS
    Request(0xae89), // KVM_SET_MSRS
    Request(0xae8b), // KVM_SET_SIGNAL_MASK
    Request(0xae8c), // KVM_GET_FPU
    Request(0xae8d), // KVM_SET_FPU
    Request(0xae8e), // KVM_GET_LAPIC
    Request(0xae8f), // KVM_SET_LAPIC
    Request(0xae90), // KVM_SET_CPUID2
    Request(0xae91), // KVM_GET_CPUID2
    Request(0xae98), // KVM_GET_MP_STATE
    Request(0xae99), // KVM_SET_MP_STATE
    Request(0xae9a), // KVM_NMI
    Request(0xae9b), // KVM_SET_GUEST_DEBUG
    Request(0xae9f), // KVM_GET_VCPU_EVENTS
    Request(0xaea0), // KVM_SET_VCPU_EVENTS
    Request(0xaea1), // KVM_GET_DEBUGREGS
    Request(0xaea2), // KVM_SET_DEBUGREGS, KVM_SET_TSC_KHZ
    Request(0xaea3), // KVM_GET_TSC_KHZ, KVM_ENABLE_CAP
    Request(0xaea4), // KVM_GET_XSAVE
    Request(0xaea5), // KVM_SET_XSAVE, KVM_SIGNAL_MSI
    Request(0xaea6), // KVM_GET_XCRS
    Request(0xaea7), // KVM_SET_XCRS
    Request(0xaead), // KVM_KVMCLOCK_CTRL
    Request(0xaebe), // KVM_GET_NESTED_STATE
    Request(0xaebf), // KVM_SET_NESTED_STATE
    Request(0xaec7), // KVM_RESET_DIRTY_RINGS
    Request(0xaecc), // KVM_GET_SREGS2
    Request(0xaecd), // KVM_SET_SREGS2
    Request(0xaecf), // KVM_GET_XSAVE2
    Request(0xaee1), // KVM_GET_DEVICE_ATTR
    Request(0xaee2), // KVM_SET_DEVICE_ATTR
    Request(0xaee3), // KVM_HAS_DEVICE_ATTR
];

/// What a guest's writes to configuration space change in KVM (`linux/kvm.h`): interrupt routes,
/// doorbells, and where BARs that are mapped into the guest lie.
const ROUTES: &[Ioctl] = &[
    Request(0xae46), // KVM_SET_USER_MEMORY_REGION
    Request(0xae49), // KVM_SET_USER_MEMORY_REGION2
    Request(0xae61), // KVM_IRQ_LINE
    Request(0xae67), // KVM_IRQ_LINE_STATUS
    Request(0xae6a), // KVM_SET_GSI_ROUTING
    Request(0xae76), // KVM_IRQFD
    Request(0xae79), // KVM_IOEVENTFD
];

/// Taps (`linux/if_tun.h`, and the hash reporting requests of the patches that add them).
const TUN: &[Ioctl] = &[
    Request(0x54ca), // TUNSETIFF
    Request(0x54cf), // TUNGETFEATURES
    Request(0x54d0), // TUNSETOFFLOAD
    Request(0x54d2), // TUNGETIFF
    Request(0x54d3), // TUNGETSNDBUF
    Request(0x54d4), // TUNSETSNDBUF
    Request(0x54d7), // TUNGETVNETHDRSZ
    Request(0x54d8), // TUNSETVNETHDRSZ
    Request(0x54d9), // TUNSETQUEUE
    Request(0x54dc), // TUNSETVNETLE
    Request(0x54dd), // TUNGETVNETLE
    Request(0x54e0), // TUNSETSTEERINGEBPF
    Request(0x54e2), // TUNSETCARRIER
    Request(0x54e4), // TUNGETVNETHASHCAP, TUNGETVNETHASHTYPES
    Request(0x54e5), // TUNSETVNETHASH, TUNSETVNETREPORTINGAUTOMQ
    Request(0x54e6), // TUNSETVNETREPORTINGRSS
    Request(0x54e7), // TUNSETVNETRSS
];

/// Network interfaces (`linux/sockios.h`).
const INTERFACES: &[Ioctl] = &[Type(0x89)];

/// Kinds of threads that devices run.
const DEVICE_THREADS: &[ThreadKind] = &[
    ThreadKind::VirtioNet,
    ThreadKind::VirtioNetControl,
    ThreadKind::VirtioConsole,
    ThreadKind::VirtioRng,
    ThreadKind::VfioUser,
];

/// `kind`, the kinds of threads it starts, those that they start, and so on.
pub(super) fn reachable(kind: ThreadKind) -> Vec<ThreadKind> {
    let mut found = vec![kind];
    let mut next = 0;
    while let Some(kind) = found.get(next) {
        for started in profile(*kind).starts {
            if !found.contains(started) {
                found.push(*started);
            }
        }
        next += 1;
    }
    found
}

/// What a thread of `kind` may do.
pub(super) fn profile(kind: ThreadKind) -> Profile {
    match kind {
        // Builds VMs and starts all other threads.
        ThreadKind::Vmm => Profile {
            calls: &[
                RUNTIME, THREADS, EVENTS, SOCKETS, ACCEPT, CONNECT, POSITIONED, FILES, MEMORY,
                SIGNALS,
            ],
            ioctls: &[KVM, TUN, TTY, STREAM, INTERFACES],
            executable: true,
            starts: &[
                ThreadKind::Vcpu,
                ThreadKind::Api,
                ThreadKind::MigrationSend,
                ThreadKind::MigrationReceive,
                ThreadKind::Serial,
                ThreadKind::EventMonitor,
            ],
        },
        // Serves the guest's exits, which reach into every device: a configuration write makes
        // routes, a driver's DRIVER_OK starts a device's threads, a vfio-user access is a message.
        ThreadKind::Vcpu => Profile {
            calls: &[RUNTIME, THREADS, EVENTS, SOCKETS, POSITIONED],
            ioctls: &[VCPU, ROUTES, TUN],
            executable: false,
            starts: DEVICE_THREADS,
        },
        ThreadKind::Api => Profile {
            calls: &[RUNTIME, EVENTS, SOCKETS, ACCEPT],
            ioctls: &[STREAM],
            executable: false,
            starts: &[],
        },
        ThreadKind::MigrationSend => Profile {
            calls: &[
                RUNTIME, THREADS, EVENTS, SOCKETS, CONNECT, POSITIONED, FILES, MEMORY,
            ],
            ioctls: &[KVM, TUN, STREAM],
            executable: true,
            starts: DEVICE_THREADS,
        },
        // Builds the VM it receives.
        ThreadKind::MigrationReceive => Profile {
            calls: &[
                RUNTIME, THREADS, EVENTS, SOCKETS, ACCEPT, CONNECT, POSITIONED, FILES, MEMORY,
            ],
            ioctls: &[KVM, TUN, TTY, STREAM, INTERFACES],
            executable: true,
            starts: &[ThreadKind::Vcpu, ThreadKind::Serial],
        },
        ThreadKind::VirtioNet => Profile {
            calls: &[RUNTIME, EVENTS],
            ioctls: &[],
            executable: false,
            starts: &[],
        },
        // Reconfigures taps as the driver asks.
        ThreadKind::VirtioNetControl => Profile {
            calls: &[RUNTIME, EVENTS],
            ioctls: &[TUN],
            executable: false,
            starts: &[],
        },
        ThreadKind::VirtioConsole | ThreadKind::Serial => Profile {
            calls: &[RUNTIME, EVENTS, SOCKETS, ACCEPT],
            ioctls: &[TTY, STREAM],
            executable: false,
            starts: &[],
        },
        ThreadKind::VirtioRng => Profile {
            calls: &[RUNTIME, EVENTS, POSITIONED],
            ioctls: &[],
            executable: false,
            starts: &[],
        },
        ThreadKind::VfioUser => Profile {
            calls: &[RUNTIME, EVENTS, SOCKETS],
            ioctls: &[STREAM],
            executable: false,
            starts: &[],
        },
        // The main thread of ferry-nic: serves its client, whose memory it maps, and runs the
        // card's threads.
        ThreadKind::VfioServer => Profile {
            calls: &[RUNTIME, THREADS, EVENTS, SOCKETS, ACCEPT, POSITIONED, FILES],
            ioctls: &[TUN],
            executable: false,
            starts: &[
                ThreadKind::VirtioNet,
                ThreadKind::VirtioNetControl,
                ThreadKind::Signal,
            ],
        },
        ThreadKind::Signal => Profile {
            calls: &[RUNTIME, SIGNALS, SOCKETS],
            ioctls: &[],
            executable: false,
            starts: &[],
        },
        ThreadKind::EventMonitor => Profile {
            calls: &[RUNTIME],
            ioctls: &[],
            executable: false,
            starts: &[],
        },
    }
}
