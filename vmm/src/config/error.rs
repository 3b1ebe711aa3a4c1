//! What can be wrong with a configuration, and what to do about it.

use std::path::PathBuf;

use thiserror::Error;
use vm_migration::migrate::AddressError;

/// Why a configuration is refused. Each message names the option and the remedy.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ConfigError {
    /// An option string longer than any sensible one.
    #[error("{option}: the value is longer than {limit} bytes; shorten it")]
    TooLong {
        /// The command-line option.
        option: &'static str,
        /// The most bytes it takes.
        limit: usize,
    },
    /// A quote or bracket that is opened and not closed, or the reverse.
    #[error("{option}: quotes or brackets do not pair up in `{text}`; close them")]
    Unbalanced {
        /// The command-line option.
        option: &'static str,
        /// The whole value.
        text: String,
    },
    /// A key the option does not have.
    #[error("{option}: unknown key `{key}`; it takes {allowed}")]
    UnknownKey {
        /// The command-line option.
        option: &'static str,
        /// The key as given.
        key: String,
        /// The keys the option has.
        allowed: String,
    },
    /// A key given twice.
    #[error("{option}: `{key}` is given more than once; give it once")]
    RepeatedKey {
        /// The command-line option.
        option: &'static str,
        /// The key.
        key: String,
    },
    /// A key without which the option means nothing.
    #[error("{option}: `{key}` is missing; add `{key}=…`")]
    MissingKey {
        /// The command-line option.
        option: &'static str,
        /// The key.
        key: &'static str,
    },
    /// A key without a value.
    #[error("{option}: `{key}` has no value; write `{key}=…`")]
    MissingValue {
        /// The command-line option.
        option: &'static str,
        /// The key.
        key: &'static str,
    },
    /// A value that cannot be read.
    #[error("{option}: `{key}={value}` is not {expected}")]
    InvalidValue {
        /// The command-line option.
        option: &'static str,
        /// The key.
        key: &'static str,
        /// The value as given.
        value: String,
        /// What is taken instead.
        expected: &'static str,
    },
    /// A slot that a PCI bus does not have, or that is the host bridge's.
    #[error(
        "device {id} (pci_device_id): there is no PCI slot {slot} for it; give one of 1 to {last}, \
         or leave it out",
        last = pci::SLOTS - 1
    )]
    Slot {
        /// The device.
        id: String,
        /// The slot asked for.
        slot: u8,
    },
    /// A slot that two devices shall have.
    #[error("device {id} (pci_device_id): another device has PCI slot {slot}; leave it out")]
    RepeatedSlot {
        /// The second device.
        id: String,
        /// The slot of both.
        slot: u8,
    },
    /// No kernel to boot.
    #[error(
        "--kernel (payload.kernel) is missing; name an ELF vmlinux with a PVH note or a bzImage"
    )]
    NoKernel,
    /// No virtual CPU, or more than the VMM supports.
    #[error("--cpus (cpus.boot_vcpus): {boot} vCPUs asked for; give 1 to {limit}")]
    CpuCount {
        /// The number asked for.
        boot: u32,
        /// The most that are supported.
        limit: u32,
    },
    /// Room for vCPUs to be added later, which this version cannot do.
    #[error(
        "--cpus (cpus.max_vcpus): max={max} differs from boot={boot}, and vCPUs cannot be added \
         to a running VM; set max to {boot} or leave it out"
    )]
    CpuHotplug {
        /// vCPUs at boot.
        boot: u32,
        /// vCPUs at most.
        max: u32,
    },
    /// A memory size that is zero or not whole pages.
    #[error(
        "--memory (memory.size): {size} bytes is not a positive multiple of the {page}-byte page; round it"
    )]
    MemorySize {
        /// The size asked for, in bytes.
        size: u64,
        /// The page size it must be a multiple of.
        page: u64,
    },
    /// A huge page size the architecture does not have.
    #[error("--memory (memory.hugepage_size): {size} bytes is no x86-64 huge page; use 2M or 1G")]
    HugepageSize {
        /// The size asked for, in bytes.
        size: u64,
    },
    /// A huge page size with huge pages off.
    #[error(
        "--memory (memory.hugepage_size): given while hugepages=off; add hugepages=on or drop it"
    )]
    HugepagesOff,
    /// A size of dirty rings where there are none.
    #[error(
        "--memory (memory.dirty_ring_entries): given while there are no rings; add dirty_log=ring \
         or drop it"
    )]
    DirtyRingOff,
    /// A dirty ring of a size that rings do not have.
    #[error(
        "--memory (memory.dirty_ring_entries): {entries} is no power of two; use one such as \
         4096"
    )]
    DirtyRingEntries {
        /// The entries asked for.
        entries: u32,
    },
    /// A console that needs a path, without it.
    #[error("{option}: mode {mode} needs `{key}`; give the path")]
    ConsolePathMissing {
        /// `--serial` or `--console`.
        option: &'static str,
        /// The mode.
        mode: &'static str,
        /// The JSON key that is missing.
        key: &'static str,
    },
    /// A console given a path its mode has no use for.
    #[error("a console with mode {mode} takes no `{key}`; drop it or change the mode")]
    ConsolePathUnused {
        /// The mode.
        mode: &'static str,
        /// The JSON key that has no use.
        key: &'static str,
    },
    /// Several consoles that want the one terminal.
    #[error(
        "--serial and --console are both tty, and there is one terminal; set one of them to off, pty, file=… or socket=…"
    )]
    TwoTtys,
    /// Two uses of one file or socket.
    #[error("{path} is named by two options; each needs its own")]
    PathTwice {
        /// The path.
        path: PathBuf,
    },
    /// A NIC with no backend, or two.
    #[error("--net {id}: name exactly one backend: tap=NAME, fd=N or vhost_user=on,socket=SOCKET")]
    NetBackend {
        /// The device.
        id: String,
    },
    /// A vhost-user backend without its socket, or a socket without it.
    #[error("--net {id}: vhost_user=on and socket=SOCKET (vhost_socket) go together; give both")]
    VhostSocket {
        /// The device.
        id: String,
    },
    /// Hashes of packets that Ferry never sees.
    #[error(
        "--net {id}: with a vhost-user backend Ferry sees no packets to hash; drop {option}, or use \
         a tap"
    )]
    VhostHash {
        /// The device.
        id: String,
        /// What needs hashes.
        option: &'static str,
    },
    /// Types of hashes that are offered for nothing.
    #[error(
        "--net {id}: hash_types given without hash_report=on or rss=on; add one of them or drop it"
    )]
    HashTypesUnused {
        /// The device.
        id: String,
    },
    /// Hashes by the kernel where kernels do not calculate them, or not right.
    #[error(
        "--net {id}: hash_backend=kernel needs rss=on and at least num_queues=4, as kernels report \
         right hashes only so; add both or take hash_backend=auto"
    )]
    KernelHash {
        /// The device.
        id: String,
    },
    /// A tap for a device with a vhost-user backend, or the reverse.
    #[error("net {id}: at the source it has {there}; give its `{key}`")]
    OtherBackend {
        /// The device.
        id: String,
        /// What it has.
        there: &'static str,
        /// The key that is to be given.
        key: &'static str,
    },
    /// Not just one backend for a device that arrives.
    #[error("net {id}: give exactly one of `tap`, `fds` and `vhost_socket`")]
    ReceivedBackend {
        /// The device.
        id: String,
    },
    /// A tap name Linux does not take.
    #[error(
        "--net {id}: `{name}` is no interface name; use 1 to 15 bytes without `/`, `%` or white space"
    )]
    TapName {
        /// The device.
        id: String,
        /// The name as given.
        name: String,
    },
    /// A queue count that is odd, zero or too large.
    #[error(
        "--net {id}: num_queues={queues} must be even (receive and transmit in pairs), 2 to {limit}"
    )]
    NetQueues {
        /// The device.
        id: String,
        /// The number given.
        queues: u16,
        /// The most that are supported.
        limit: u16,
    },
    /// A queue size that virtio does not allow.
    #[error("--net {id}: queue_size={size} must be a power of two, 2 to {limit}")]
    NetQueueSize {
        /// The device.
        id: String,
        /// The number given.
        size: u16,
        /// The most that is supported.
        limit: u16,
    },
    /// File descriptors that do not match the queue pairs.
    #[error("--net {id}: {fds} file descriptors for {pairs} queue pairs; give one per pair")]
    NetFds {
        /// The device.
        id: String,
        /// How many were given.
        fds: usize,
        /// How many pairs there are.
        pairs: usize,
    },
    /// A device of the host in two ways, or in none.
    #[error("--device {id}: give either its path= or the fd= of its open file")]
    DevicePlace {
        /// The device.
        id: String,
    },
    /// A descriptor number that is one of the standard streams.
    #[error("{option} {id}: fd {fd} cannot be it; pass a descriptor above 2 that ferry inherits")]
    FdNumber {
        /// The option.
        option: &'static str,
        /// The device.
        id: String,
        /// The number given.
        fd: i32,
    },
    /// One descriptor for two devices.
    #[error("--device {id}: fd {fd} is another device's already")]
    FdTwice {
        /// The second device.
        id: String,
        /// The number given.
        fd: i32,
    },
    /// An iommufd that is not to be used.
    #[error("--platform: iommufd_fd is of no use with iommufd=off; leave one of them out")]
    IommufdOff,
    /// At the source it was a descriptor, whose number means something else here.
    #[error(
        "{what} has a descriptor at the source, of which the number means nothing here: say what \
         it is here ({key})"
    )]
    ForeignFd {
        /// The device or option.
        what: String,
        /// Where it is said.
        key: &'static str,
    },
    /// A descriptor number that cannot be an inherited tap.
    #[error("--net {id}: fd={fd} cannot be a tap; pass a descriptor above 2 that ferry inherits")]
    NetFdNumber {
        /// The device.
        id: String,
        /// The number given.
        fd: i32,
    },
    /// A MAC address no station may have.
    #[error(
        "--net {id}: mac={mac} is a group or zero address; clear the lowest bit of its first byte"
    )]
    MacGroup {
        /// The device.
        id: String,
        /// The address.
        mac: String,
    },
    /// An MTU outside what Ethernet and virtio allow.
    #[error("--net {id}: mtu={mtu} is out of range; give {min} to {max}")]
    Mtu {
        /// The device.
        id: String,
        /// The number given.
        mtu: u16,
        /// The smallest.
        min: u16,
        /// The largest.
        max: u16,
    },
    /// A device name that could not be printed or addressed.
    #[error(
        "device id `{id}` is not 1 to {limit} of the characters a-z A-Z 0-9 _ - . ; choose another"
    )]
    DeviceId {
        /// The id as given.
        id: String,
        /// The most bytes.
        limit: usize,
    },
    /// One device name for two devices.
    #[error("device id `{id}` is used twice; give each device its own id")]
    RepeatedId {
        /// The id.
        id: String,
    },
    /// A device that the VM does not have.
    #[error("the VM has no device `{id}`; name one of its devices or leave it out")]
    UnknownDevice {
        /// The id as given.
        id: String,
    },
    /// Not the address of a migration.
    #[error("{key}: not an address")]
    MigrationUrl {
        /// `destination_url` or `receiver_url`.
        key: &'static str,
        /// What is wrong with it.
        #[source]
        source: AddressError,
    },
    /// An empty path.
    #[error("{option}: the path is empty; give one")]
    EmptyPath {
        /// The option.
        option: &'static str,
    },
    /// A device of another process that could not map guest RAM.
    #[error(
        "{option} {id}: its server must map guest RAM, which is private; add shared=on to \
         --memory (memory.shared)"
    )]
    PrivateMemory {
        /// The command-line option.
        option: &'static str,
        /// The device.
        id: String,
    },
    /// More devices than there are PCI slots.
    #[error("{count} PCI devices asked for; the bus takes {limit}; remove some")]
    TooManyDevices {
        /// How many.
        count: usize,
        /// The most.
        limit: usize,
    },
    /// A command line longer than the boot protocol's buffer.
    #[error(
        "--cmdline (payload.cmdline): {len} bytes; the kernel takes {limit} without NUL; shorten it"
    )]
    Cmdline {
        /// Its length.
        len: usize,
        /// The most bytes.
        limit: usize,
    },
}
