//! Which system calls each kind of thread may make: the one file to edit when a thread learns
//! something new. To find what is missing, run with `--seccomp log` and read the kernel's log.

use devices::ThreadKind;

/// What a kind of thread may do.
pub(super) struct Profile {
    /// Groups of system calls it may make with any arguments, by name.
    pub(super) calls: &'static [&'static [&'static str]],
    /// Groups of ioctl requests it may make.
    pub(super) ioctls: &'static [&'static [Ioctl]],
    /// Commands of bpf(2) it may give.
    pub(super) bpf: &'static [u32],
    /// It resolves host names: modules for that are libraries, loaded when they are needed. No
    /// other may make memory executable.
    pub(super) resolves: bool,
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

/// What Rust's and C's run-time need in any thread: memory, locks, time, handled signals, what the
/// thread has open, a message on standard error, an orderly panic, an end.
const RUNTIME: &[&str] = &[
    "brk",
    "clock_gettime", // where the clock cannot be read without a call
    "clock_nanosleep",
    "close",
    "exit",
    "exit_group",
    "fcntl", // copies of descriptors; debug builds look before they close
    "futex",
    "getpid", // to signal a thread, an abort's own among them
    "getrandom",
    "gettid",
    "madvise",
    "mremap",
    "munmap",
    "ppoll",
    "read",
    "restart_syscall", // the kernel's own, after a stop in the middle of a wait
    "rt_sigaction",
    "rt_sigprocmask",
    "rt_sigreturn",
    "sched_yield",
    "sigaltstack",
    "tgkill",
    "write",
];

/// Starting threads, each with an eventfd that ends it. What a thread does before it is confined
/// is its maker's to allow.
const THREADS: &[&str] = &[
    "clone", // where there is no clone3
    "clone3",
    "eventfd2",
    "rseq",
    "sched_getaffinity",
    "seccomp",
    "set_robust_list",
];

/// Waiting for the queues of a virtio device.
const QUEUES: &[&str] = &["epoll_create1", "epoll_ctl", "epoll_pwait"];

/// A vfio-user connection, of which any thread that waits for an answer may be the one that reads,
/// or a vhost-user connection.
const DEVICE_SOCKETS: &[&str] = &["recvmsg", "sendmsg", "shutdown"];

/// Sending and taking a migration's stream.
const STREAM: &[&str] = &["recvfrom", "sendto", "shutdown"];

/// Accesses of a device of the host at offsets of its file.
const VFIO: &[&str] = &["pread64", "pwrite64"];

/// Finding a device of the host, its IOMMU group and its own file.
const VFIO_OPEN: &[&str] = &["fstat", "getdents64", "newfstatat", "readlink"];

/// Opening what devices are connected to: files, taps, sockets.
const OPEN_DEVICES: &[&str] = &[
    "bind",
    "connect",
    "listen",
    "open", // rustix
    "openat",
    "setsockopt",
    "socket",
    "statx",
    "unlink",
];

/// Making guest memory, and memory in which others log what they write to it.
const MEMORY: &[&str] = &["fallocate", "ftruncate", "memfd_create"];

/// Listening for a migration on a socket for this user alone.
const LISTEN: &[&str] = &["fchmod", "getsockname"];

/// Connecting with a time limit.
const CONNECT: &[&str] = &["connect", "getsockopt", "poll", "setsockopt", "socket"];

/// Resolving a host name: files, DNS, the modules of nsswitch.conf and the services some of them
/// ask.
const RESOLVE: &[&str] = &[
    "access",
    "bind",
    "connect",
    "fstat", // by the version of the C library this or newfstatat
    "getpeername",
    "getsockname",
    "getsockopt",
    "lseek",
    "newfstatat",
    "openat",
    "poll",
    "pread64",
    "recvfrom",
    "recvmsg",
    "sendmmsg",
    "sendmsg",
    "sendto",
    "setsockopt",
    "socket",
    "sysinfo", // how much memory a sort may take
    "uname",
    "writev",
];

/// Emptying dirty rings: whether the thread was stopped meanwhile.
const DIRTY_RINGS: &[&str] = &["getrusage"];

/// Making a descriptor non-blocking, and how much is there to read (`asm-generic/ioctls.h`).
const FIONBIO: Ioctl = Request(0x5421);
const FIONREAD: Ioctl = Request(0x541b);

/// Setting terminals up (`asm-generic/ioctls.h`).
const TERMINALS: &[Ioctl] = &[
    FIONBIO,
    Request(0x5401), // TCGETS
    Request(0x5402), // TCSETS
    Request(0x542a), // TCGETS2
    Request(0x542b), // TCSETS2
    Request(0x5413), // TIOCGWINSZ, which tells whether it is one
    Request(0x5430), // TIOCGPTN
    Request(0x5431), // TIOCSPTLCK
];

/// Serving a console: its socket's clients, and a terminal put back as it was by the last who
/// holds it.
const CONSOLE: &[Ioctl] = &[
    FIONBIO,
    Request(0x5402), // TCSETS
    Request(0x542b), // TCSETS2
];

/// All of KVM (`linux/kvm.h`, `KVMIO`): making and restoring a VM takes most of it.
const KVM: &[Ioctl] = &[Type(0xae)];

/// Running a vCPU, and emptying the dirty rings when its own is full (`linux/kvm.h`).
const RUN: &[Ioctl] = &[
    Request(0xae80), // KVM_RUN
    Request(0xaec7), // KVM_RESET_DIRTY_RINGS
];

/// Reading a VM's state and what it wrote (`linux/kvm.h`).
const SAVE: &[Ioctl] = &[
    Request(0xae42), // KVM_GET_DIRTY_LOG
    Request(0xae62), // KVM_GET_IRQCHIP
    Request(0xae7c), // KVM_GET_CLOCK
    Request(0xae81), // KVM_GET_REGS
    Request(0xae83), // KVM_GET_SREGS
    Request(0xae88), // KVM_GET_MSRS
    Request(0xae8e), // KVM_GET_LAPIC
    Request(0xae98), // KVM_GET_MP_STATE
    Request(0xae9f), // KVM_GET_VCPU_EVENTS, KVM_GET_PIT2
    Request(0xaea1), // KVM_GET_DEBUGREGS
    Request(0xaea3), // KVM_GET_TSC_KHZ
    Request(0xaea4), // KVM_GET_XSAVE
    Request(0xaea6), // KVM_GET_XCRS
    Request(0xaead), // KVM_KVMCLOCK_CTRL
    Request(0xaebe), // KVM_GET_NESTED_STATE
    Request(0xaec0), // KVM_CLEAR_DIRTY_LOG
    Request(0xaec7), // KVM_RESET_DIRTY_RINGS
    Request(0xaecf), // KVM_GET_XSAVE2
];

/// What a guest's writes to configuration space change in KVM (`linux/kvm.h`): interrupt routes,
/// doorbells, and where BARs that are mapped into the guest lie.
const ROUTES: &[Ioctl] = &[
    Request(0xae46), // KVM_SET_USER_MEMORY_REGION
    Request(0xae6a), // KVM_SET_GSI_ROUTING
    Request(0xae76), // KVM_IRQFD
    Request(0xae79), // KVM_IOEVENTFD
];

/// Opening a device of the host and giving it the guest's memory (`linux/vfio.h`,
/// `linux/iommufd.h`).
const VFIO_SETUP: &[Ioctl] = &[
    Request(0x3b64), // VFIO_GET_API_VERSION
    Request(0x3b65), // VFIO_CHECK_EXTENSION
    Request(0x3b66), // VFIO_SET_IOMMU
    Request(0x3b67), // VFIO_GROUP_GET_STATUS
    Request(0x3b68), // VFIO_GROUP_SET_CONTAINER
    Request(0x3b6a), // VFIO_GROUP_GET_DEVICE_FD
    Request(0x3b6b), // VFIO_DEVICE_GET_INFO
    Request(0x3b6c), // VFIO_DEVICE_GET_REGION_INFO
    Request(0x3b6d), // VFIO_DEVICE_GET_IRQ_INFO
    Request(0x3b70), // VFIO_IOMMU_GET_INFO
    Request(0x3b71), // VFIO_IOMMU_MAP_DMA
    Request(0x3b72), // VFIO_IOMMU_UNMAP_DMA
    Request(0x3b76), // VFIO_DEVICE_BIND_IOMMUFD
    Request(0x3b77), // VFIO_DEVICE_ATTACH_IOMMUFD_PT
    Request(0x3b81), // IOMMU_IOAS_ALLOC
    Request(0x3b84), // IOMMU_IOAS_IOVA_RANGES
    Request(0x3b85), // IOMMU_IOAS_MAP
    Request(0x3b86), // IOMMU_IOAS_UNMAP
    Request(0x3b89), // IOMMU_HWPT_ALLOC
    Request(0x3b8a), // IOMMU_GET_HW_INFO
];

/// Letting go of a device of the host (`linux/vfio.h`, `linux/iommufd.h`, `linux/kvm.h`).
const VFIO_RELEASE: &[Ioctl] = &[
    Request(0x3b78), // VFIO_DEVICE_DETACH_IOMMUFD_PT
    Request(0x3b80), // IOMMU_DESTROY
    Request(0xaee1), // KVM_SET_DEVICE_ATTR
];

/// What a guest's driver asks of a device of the host: interrupts (`linux/vfio.h`).
const VFIO_IRQS: &[Ioctl] = &[
    Request(0x3b6e), // VFIO_DEVICE_SET_IRQS
];

/// Stopping, resetting and migrating a device of the host, and learning what it wrote
/// (`linux/vfio.h`, `linux/iommufd.h`).
const VFIO_STATE: &[Ioctl] = &[
    Request(0x3b6f), // VFIO_DEVICE_RESET
    Request(0x3b75), // VFIO_DEVICE_FEATURE
    Request(0x3b79), // VFIO_MIG_GET_PRECOPY_INFO
    Request(0x3b84), // IOMMU_IOAS_IOVA_RANGES, for the page size of the next two
    Request(0x3b8b), // IOMMU_HWPT_SET_DIRTY_TRACKING
    Request(0x3b8c), // IOMMU_HWPT_GET_DIRTY_BITMAP
];

/// Opening a tap and bringing it up (`linux/if_tun.h`, `linux/sockios.h`).
const TAP_OPEN: &[Ioctl] = &[
    Request(0x54ca), // TUNSETIFF
    Request(0x54d2), // TUNGETIFF
    Request(0x54e4), // TUNGETVNETHASHCAP, TUNGETVNETHASHTYPES
    Request(0x8913), // SIOCGIFFLAGS
    Request(0x8914), // SIOCSIFFLAGS
    Request(0x8927), // SIOCGIFHWADDR
];

/// Setting a tap as the driver that begins wants it (`linux/if_tun.h`).
const TAP_START: &[Ioctl] = &[
    Request(0x54d8), // TUNSETVNETHDRSZ
    Request(0x54dc), // TUNSETVNETLE
];

/// Setting a tap as the driver asks on its control queue (`linux/if_tun.h`; those for hashes are of
/// patches to it, see `net_util::tap::HashAbi`).
const TAP_CONTROL: &[Ioctl] = &[
    Request(0x54d0), // TUNSETOFFLOAD
    Request(0x54d2), // TUNGETIFF
    Request(0x54d7), // TUNGETVNETHDRSZ
    Request(0x54d9), // TUNSETQUEUE
    Request(0x54e0), // TUNSETSTEERINGEBPF
    Request(0x54e5), // TUNSETVNETHASH, TUNSETVNETREPORTINGAUTOMQ
    Request(0x54e6), // TUNSETVNETREPORTINGRSS
    Request(0x54e7), // TUNSETVNETRSS
];

/// Loading a steering program for a tap (`linux/bpf.h`), where the tap is opened. What the driver
/// asks for later is written to memory that the program reads, and takes no call; in ferry-nic the
/// tap is opened before there is a filter.
const STEERING_LOAD: &[u32] = &[
    0, // BPF_MAP_CREATE
    5, // BPF_PROG_LOAD
];

/// Kinds of threads that devices run.
const DEVICE_THREADS: &[ThreadKind] = &[
    ThreadKind::VirtioNet,
    ThreadKind::VirtioNetControl,
    ThreadKind::VhostUser,
    ThreadKind::VirtioConsole,
    ThreadKind::VirtioRng,
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
                RUNTIME,
                THREADS,
                OPEN_DEVICES,
                MEMORY,
                LISTEN,
                RESOLVE,
                DEVICE_SOCKETS,
                VFIO,
                VFIO_OPEN,
                DIRTY_RINGS, // of a guest that is taken back after its migration
                &["lseek"],  // in a kernel's file
            ],
            ioctls: &[
                KVM,
                TAP_OPEN,
                TAP_START,
                TAP_CONTROL,
                TERMINALS,
                VFIO_SETUP,
                VFIO_RELEASE,
                VFIO_IRQS,
                VFIO_STATE,
            ],
            bpf: STEERING_LOAD,
            resolves: true,
            starts: &[
                ThreadKind::Vcpu,
                ThreadKind::Api,
                ThreadKind::MigrationSend,
                ThreadKind::MigrationReceive,
                ThreadKind::Serial,
                ThreadKind::VfioUser,
                ThreadKind::DeviceNews,
                ThreadKind::EventMonitor,
            ],
        },
        // Serves the guest's exits, which reach into every device: a configuration write makes
        // routes, a driver's DRIVER_OK starts a device's threads, a vfio-user access is a message,
        // and serial output may go to a socket.
        ThreadKind::Vcpu => Profile {
            calls: &[
                RUNTIME,
                THREADS,
                DEVICE_SOCKETS,
                VFIO,
                DIRTY_RINGS,
                &["sendto"],
            ],
            ioctls: &[RUN, ROUTES, TAP_START, TAP_CONTROL, VFIO_IRQS],
            bpf: &[],
            resolves: false,
            starts: DEVICE_THREADS,
        },
        ThreadKind::Api => Profile {
            calls: &[
                RUNTIME,
                &["accept4", "epoll_ctl", "epoll_wait", "unlink"],
                &["recvfrom", "sendto", "shutdown", "writev"],
            ],
            ioctls: &[],
            bpf: &[],
            resolves: false,
            starts: &[],
        },
        // Goes on with the VM where it was if the migration fails: devices start again. Lets go of it
        // if all went well.
        ThreadKind::MigrationSend => Profile {
            calls: &[
                RUNTIME,
                THREADS,
                RESOLVE,
                CONNECT,
                STREAM,
                DEVICE_SOCKETS,
                VFIO,
                DIRTY_RINGS,
                MEMORY,
            ],
            ioctls: &[
                SAVE,
                ROUTES,
                TAP_START,
                TAP_CONTROL,
                VFIO_IRQS,
                VFIO_RELEASE,
                VFIO_STATE,
                &[FIONBIO, FIONREAD],
            ],
            bpf: &[],
            resolves: true,
            starts: DEVICE_THREADS,
        },
        // Builds the VM it receives.
        ThreadKind::MigrationReceive => Profile {
            calls: &[
                RUNTIME,
                THREADS,
                OPEN_DEVICES,
                MEMORY,
                STREAM,
                DEVICE_SOCKETS,
                VFIO,
                VFIO_OPEN,
                &["accept4"],
            ],
            ioctls: &[
                KVM,
                TAP_OPEN,
                TAP_START,
                TAP_CONTROL,
                TERMINALS,
                VFIO_SETUP,
                VFIO_RELEASE,
                VFIO_IRQS,
                VFIO_STATE,
            ],
            bpf: STEERING_LOAD,
            resolves: false,
            starts: &[
                ThreadKind::Vcpu,
                ThreadKind::Serial,
                ThreadKind::VfioUser,
                ThreadKind::DeviceNews,
            ],
        },
        ThreadKind::VirtioNet => Profile {
            calls: &[RUNTIME, QUEUES, &["readv", "writev"]],
            ioctls: &[],
            bpf: &[],
            resolves: false,
            starts: &[],
        },
        ThreadKind::VirtioNetControl => Profile {
            calls: &[RUNTIME, QUEUES],
            ioctls: &[TAP_CONTROL],
            bpf: &[],
            resolves: false,
            starts: &[],
        },
        // Tells the backend what the driver asks on the control queue.
        ThreadKind::VhostUser => Profile {
            calls: &[RUNTIME, QUEUES, DEVICE_SOCKETS],
            ioctls: &[],
            bpf: &[],
            resolves: false,
            starts: &[],
        },
        ThreadKind::VirtioConsole => Profile {
            calls: &[RUNTIME, QUEUES, &["accept4", "sendto"]],
            ioctls: &[CONSOLE],
            bpf: &[],
            resolves: false,
            starts: &[],
        },
        ThreadKind::VirtioRng => Profile {
            calls: &[RUNTIME, QUEUES],
            ioctls: &[],
            bpf: &[],
            resolves: false,
            starts: &[],
        },
        ThreadKind::Serial => Profile {
            calls: &[RUNTIME, &["accept4"]],
            ioctls: &[CONSOLE],
            bpf: &[],
            resolves: false,
            starts: &[],
        },
        // Takes what the server asks, and answers.
        ThreadKind::VfioUser => Profile {
            calls: &[RUNTIME, DEVICE_SOCKETS],
            ioctls: &[],
            bpf: &[],
            resolves: false,
            starts: &[],
        },
        // The main thread of ferry-nic: serves its client, whose memory it maps, and runs the
        // card's threads.
        ThreadKind::VfioServer => Profile {
            calls: &[
                RUNTIME,
                THREADS,
                DEVICE_SOCKETS,
                &["accept4", "statx", "unlink"],
            ],
            ioctls: &[TAP_START, TAP_CONTROL],
            bpf: &[],
            resolves: false,
            starts: &[
                ThreadKind::VirtioNet,
                ThreadKind::VirtioNetControl,
                ThreadKind::Signal,
            ],
        },
        // Cuts the client's connection.
        ThreadKind::Signal => Profile {
            calls: &[RUNTIME, &["rt_sigtimedwait", "shutdown"]],
            ioctls: &[],
            bpf: &[],
            resolves: false,
            starts: &[],
        },
        ThreadKind::EventMonitor | ThreadKind::DeviceNews => Profile {
            calls: &[RUNTIME],
            ioctls: &[],
            bpf: &[],
            resolves: false,
            starts: &[],
        },
    }
}
