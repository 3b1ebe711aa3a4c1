//! The messages as they lie on the socket: header, command numbers, payload structures, limits.
//!
//! Layouts and numbers are those of the vfio-user specification (protocol 0.1) and, for what it
//! borrows, of the kernel's `<linux/vfio.h>`. All integers are in the byte order of the host, as
//! the specification says: both ends of a unix socket are on the same host.

use bitflags::bitflags;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Protocol major version spoken here.
pub const VERSION_MAJOR: u16 = 0;
/// Highest protocol minor version spoken here.
pub const VERSION_MINOR: u16 = 1;

/// Bytes of a message header.
pub const HEADER_SIZE: usize = 16;

/// Most data bytes in one read or write message that we offer and accept; also the value the
/// specification gives a peer that names none.
pub const MAX_DATA_XFER: usize = 1 << 20;

/// Largest payload of a command we read: a full data transfer and its fixed part. A longer one
/// ends the connection before a byte of it is stored.
pub const MAX_COMMAND_PAYLOAD: usize = MAX_DATA_XFER + 64;

/// Largest JSON text of a VERSION message.
pub const MAX_VERSION_DATA: usize = 4096;

/// File descriptors we take in one message.
pub const MAX_MSG_FDS: usize = 64;

/// File descriptors in one message that a peer takes if it names no limit (specification,
/// `max_msg_fds`).
pub const DEFAULT_MSG_FDS: usize = 1;

/// Most ranges of one DMA_LOGGING_START; the kernel's limit too (`LOG_MAX_RANGES`).
pub const MAX_LOG_RANGES: usize = 256;

/// Largest dirty bitmap of one DMA_LOGGING_REPORT: 64 MiB are 2 TiB of 4 KiB pages.
pub const MAX_REPORT_BITMAP: usize = 64 << 20;

/// Largest reply to GET_REGION_INFO: room for 256 sparse areas.
pub const MAX_REGION_INFO: usize = 32 + 16 + 256 * 16;

/// Most sub-regions of one GET_REGION_IO_FDS reply.
pub const MAX_IO_FDS: usize = 1024;

/// Regions of a PCI device: six BARs, ROM, configuration space, VGA (`VFIO_PCI_NUM_REGIONS`).
pub const PCI_NUM_REGIONS: u32 = 9;
/// Region index of PCI configuration space (`VFIO_PCI_CONFIG_REGION_INDEX`).
pub const PCI_CONFIG_REGION: u32 = 7;
/// Interrupt types of a PCI device: INTx, MSI, MSI-X, error, request (`VFIO_PCI_NUM_IRQS`).
pub const PCI_NUM_IRQS: u32 = 5;
/// Interrupt index of MSI-X (`VFIO_PCI_MSIX_IRQ_INDEX`).
pub const PCI_MSIX_IRQ: u32 = 2;

/// Commands, by their numbers.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u16)]
pub enum Command {
    /// Negotiates version and capabilities; the first message.
    Version = 1,
    /// Makes a range of client memory known to the device.
    DmaMap = 2,
    /// Takes it away again.
    DmaUnmap = 3,
    /// Asks what kind of device it is.
    GetInfo = 4,
    /// Asks for one region's size and mappable parts.
    GetRegionInfo = 5,
    /// Asks for file descriptors that replace accesses to parts of a region.
    GetRegionIoFds = 6,
    /// Asks for one interrupt type.
    GetIrqInfo = 7,
    /// Sets up, masks or triggers interrupts.
    SetIrqs = 8,
    /// Reads a region.
    RegionRead = 9,
    /// Writes a region.
    RegionWrite = 10,
    /// Server to client: reads client memory that has no file descriptor.
    DmaRead = 11,
    /// Server to client: writes such memory.
    DmaWrite = 12,
    /// Resets the device.
    Reset = 13,
    /// Several small region writes in one message. (14 was DIRTY_PAGES, dropped.)
    RegionWriteMulti = 15,
    /// Gets, sets or probes a feature ([`Feature`]). An early text numbered this and the next two
    /// 15 to 17; the reference header is right.
    DeviceFeature = 16,
    /// Reads migration data.
    MigDataRead = 17,
    /// Writes migration data.
    MigDataWrite = 18,
}

impl Command {
    /// The command of `number`, if there is one.
    pub const fn from_number(number: u16) -> Option<Self> {
        Some(match number {
            1 => Self::Version,
            2 => Self::DmaMap,
            3 => Self::DmaUnmap,
            4 => Self::GetInfo,
            5 => Self::GetRegionInfo,
            6 => Self::GetRegionIoFds,
            7 => Self::GetIrqInfo,
            8 => Self::SetIrqs,
            9 => Self::RegionRead,
            10 => Self::RegionWrite,
            11 => Self::DmaRead,
            12 => Self::DmaWrite,
            13 => Self::Reset,
            15 => Self::RegionWriteMulti,
            16 => Self::DeviceFeature,
            17 => Self::MigDataRead,
            18 => Self::MigDataWrite,
            _ => return None,
        })
    }

    /// Its number on the wire.
    pub const fn number(self) -> u16 {
        self as u16
    }
}

/// Type bits of [`Header::flags`]: a command.
pub const TYPE_COMMAND: u32 = 0;
/// Type bits of [`Header::flags`]: a reply.
pub const TYPE_REPLY: u32 = 1;
/// Mask of the type bits of [`Header::flags`].
pub const TYPE_MASK: u32 = 0xf;
/// Flag of a command that wants no reply.
pub const FLAG_NO_REPLY: u32 = 1 << 4;
/// Flag of a reply that carries an errno and nothing else.
pub const FLAG_ERROR: u32 = 1 << 5;

/// What every message begins with.
#[derive(Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Header {
    /// Chosen by the sender of a command, echoed in its reply.
    pub id: u16,
    /// [`Command`] number.
    pub command: u16,
    /// Bytes of the whole message with this header.
    pub size: u32,
    /// `TYPE_*` and `FLAG_*`.
    pub flags: u32,
    /// An errno in a reply with [`FLAG_ERROR`].
    pub error: u32,
}

/// Fixed part of VERSION; JSON text follows.
#[derive(Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct VersionMsg {
    /// Major version.
    pub major: u16,
    /// Minor version.
    pub minor: u16,
}

bitflags! {
    /// Access to client memory that a mapping allows.
    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    pub struct DmaFlags: u32 {
        /// The device may read it.
        const READ = 1;
        /// The device may write it.
        const WRITE = 2;
    }

    /// What a device is and can (`VFIO_DEVICE_FLAGS_*`).
    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    pub struct DeviceFlags: u32 {
        /// RESET works.
        const RESET = 1;
        /// It is a PCI device.
        const PCI = 2;
    }

    /// What a region allows (`VFIO_REGION_INFO_FLAG_*`).
    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    pub struct RegionFlags: u32 {
        /// Reads.
        const READ = 1;
        /// Writes.
        const WRITE = 2;
        /// Mapping of all or parts of it; a file descriptor comes along.
        const MMAP = 4;
        /// A capability list follows.
        const CAPS = 8;
    }

    /// What an interrupt type can (`VFIO_IRQ_INFO_*`).
    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    pub struct IrqFlags: u32 {
        /// Signals eventfds.
        const EVENTFD = 1;
        /// MASK and UNMASK work.
        const MASKABLE = 2;
        /// Masks itself when triggered.
        const AUTOMASKED = 4;
        /// Is set up as a whole.
        const NORESIZE = 8;
    }
}

/// DMA_MAP.
#[derive(Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct DmaMapMsg {
    /// Bytes of this structure.
    pub argsz: u32,
    /// [`DmaFlags`].
    pub flags: u32,
    /// Offset in the file that comes along; 0 without one.
    pub offset: u64,
    /// First IOVA.
    pub address: u64,
    /// Bytes.
    pub size: u64,
}

/// DMA_UNMAP, command and reply.
#[derive(Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct DmaUnmapMsg {
    /// Largest reply payload taken.
    pub argsz: u32,
    /// None are defined.
    pub flags: u32,
    /// First IOVA, as mapped.
    pub address: u64,
    /// Bytes, as mapped.
    pub size: u64,
}

/// GET_INFO, command and reply.
#[derive(Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct DeviceInfoMsg {
    /// Largest reply payload taken; in the reply, needed.
    pub argsz: u32,
    /// [`DeviceFlags`].
    pub flags: u32,
    /// Number of regions.
    pub num_regions: u32,
    /// Number of interrupt types.
    pub num_irqs: u32,
}

/// GET_REGION_INFO, command and reply; a capability list may follow (`struct vfio_region_info`).
#[derive(Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct RegionInfoMsg {
    /// Largest reply payload taken; in the reply, needed.
    pub argsz: u32,
    /// [`RegionFlags`].
    pub flags: u32,
    /// Region.
    pub index: u32,
    /// Offset of the first capability from the start of this structure.
    pub cap_offset: u32,
    /// Bytes of the region.
    pub size: u64,
    /// Base offset for `mmap` of the region's file.
    pub offset: u64,
}

/// `VFIO_REGION_INFO_CAP_SPARSE_MMAP`.
pub const CAP_SPARSE_MMAP: u16 = 1;

/// Header of a region capability (`struct vfio_info_cap_header`).
#[derive(Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct CapHeader {
    /// Capability.
    pub id: u16,
    /// Its version.
    pub version: u16,
    /// Offset of the next from the start of the region info, 0 at the end.
    pub next: u32,
}

/// Head of the sparse mmap capability after its [`CapHeader`]; [`AreaMsg`]s follow.
#[derive(Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct SparseMsg {
    /// Number of areas.
    pub nr_areas: u32,
    /// Zero.
    pub reserved: u32,
}

/// One part of a region, or one range of IOVAs to log.
#[derive(Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct AreaMsg {
    /// Offset in the region, or first IOVA.
    pub offset: u64,
    /// Bytes.
    pub size: u64,
}

/// GET_REGION_IO_FDS, command and head of the reply; [`IoFdMsg`]s follow.
#[derive(Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct RegionIoFdsMsg {
    /// Largest reply payload taken; in the reply, needed.
    pub argsz: u32,
    /// Zero.
    pub flags: u32,
    /// Region.
    pub index: u32,
    /// Number of entries; zero in the command.
    pub count: u32,
}

/// `VFIO_USER_IO_FD_TYPE_IOEVENTFD`.
pub const IO_FD_IOEVENTFD: u32 = 0;
/// `KVM_IOEVENTFD_FLAG_DATAMATCH`.
pub const IO_FD_DATAMATCH: u32 = 1;

/// One sub-region of GET_REGION_IO_FDS.
#[derive(Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct IoFdMsg {
    /// Offset in the region.
    pub offset: u64,
    /// Access size that matches; 0 for any.
    pub size: u64,
    /// Which of the descriptors that came along.
    pub fd_index: u32,
    /// `IO_FD_*` type.
    pub kind: u32,
    /// `IO_FD_DATAMATCH` or 0.
    pub flags: u32,
    /// Zero.
    pub padding: u32,
    /// Value that matches.
    pub datamatch: u64,
}

/// GET_IRQ_INFO, command and reply (`struct vfio_irq_info`).
#[derive(Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct IrqInfoMsg {
    /// Largest reply payload taken; in the reply, needed.
    pub argsz: u32,
    /// [`IrqFlags`].
    pub flags: u32,
    /// Interrupt type.
    pub index: u32,
    /// Interrupts of this type.
    pub count: u32,
}

/// `VFIO_IRQ_SET_DATA_NONE`.
pub const IRQ_DATA_NONE: u32 = 1;
/// `VFIO_IRQ_SET_DATA_BOOL`.
pub const IRQ_DATA_BOOL: u32 = 2;
/// `VFIO_IRQ_SET_DATA_EVENTFD`.
pub const IRQ_DATA_EVENTFD: u32 = 4;
/// `VFIO_IRQ_SET_ACTION_MASK`.
pub const IRQ_ACTION_MASK: u32 = 8;
/// `VFIO_IRQ_SET_ACTION_UNMASK`.
pub const IRQ_ACTION_UNMASK: u32 = 16;
/// `VFIO_IRQ_SET_ACTION_TRIGGER`.
pub const IRQ_ACTION_TRIGGER: u32 = 32;

/// Fixed part of SET_IRQS (`struct vfio_irq_set`); booleans may follow.
#[derive(Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct SetIrqsMsg {
    /// Bytes of this structure and the data after it.
    pub argsz: u32,
    /// One `IRQ_DATA_*` and one `IRQ_ACTION_*`.
    pub flags: u32,
    /// Interrupt type.
    pub index: u32,
    /// First interrupt.
    pub start: u32,
    /// Number of interrupts.
    pub count: u32,
}

/// Fixed part of REGION_READ and REGION_WRITE and their replies; data may follow.
#[derive(Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct RegionAccessMsg {
    /// Offset in the region.
    pub offset: u64,
    /// Region.
    pub region: u32,
    /// Data bytes.
    pub count: u32,
}

/// Fixed part of DMA_READ and DMA_WRITE and their replies; data may follow.
#[derive(Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct DmaAccessMsg {
    /// IOVA.
    pub address: u64,
    /// Data bytes.
    pub count: u64,
}

/// One write of REGION_WRITE_MULTI, after a `u64` that counts them.
#[derive(Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct MultiWriteMsg {
    /// Offset in the region.
    pub offset: u64,
    /// Region.
    pub region: u32,
    /// Data bytes, up to 8.
    pub count: u32,
    /// The data.
    pub data: [u8; 8],
}

/// Features of DEVICE_FEATURE, by the kernel's numbers (`VFIO_DEVICE_FEATURE_*`).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u32)]
pub enum Feature {
    /// Migration flags (GET).
    Migration = 1,
    /// Migration state (GET, SET).
    MigDeviceState = 2,
    /// Starts the DMA log (SET).
    DmaLoggingStart = 6,
    /// Stops it (SET).
    DmaLoggingStop = 7,
    /// Reads and clears it (GET).
    DmaLoggingReport = 8,
    /// Estimate of the stop-copy data (GET). The kernel's number and structure; other vfio-user
    /// servers answer ENOTTY.
    MigDataSize = 9,
    /// What there is to read while the device runs (GET). The kernel's number and structure
    /// (`struct vfio_precopy_info`), but the kernel gives it by an ioctl on the data's descriptor,
    /// with this feature only to allow [`PRECOPY_INFO_REINIT`]. Other vfio-user servers answer
    /// ENOTTY.
    MigPrecopyInfo = 12,
}

impl Feature {
    /// The feature of `number`, if we know it.
    pub const fn from_number(number: u32) -> Option<Self> {
        Some(match number {
            1 => Self::Migration,
            2 => Self::MigDeviceState,
            6 => Self::DmaLoggingStart,
            7 => Self::DmaLoggingStop,
            8 => Self::DmaLoggingReport,
            9 => Self::MigDataSize,
            12 => Self::MigPrecopyInfo,
            _ => return None,
        })
    }

    /// Its number on the wire.
    pub const fn number(self) -> u32 {
        self as u32
    }
}

/// Mask of the feature number in [`FeatureMsg::flags`].
pub const FEATURE_MASK: u32 = 0xffff;
/// `VFIO_DEVICE_FEATURE_GET`.
pub const FEATURE_GET: u32 = 1 << 16;
/// `VFIO_DEVICE_FEATURE_SET`.
pub const FEATURE_SET: u32 = 1 << 17;
/// `VFIO_DEVICE_FEATURE_PROBE`.
pub const FEATURE_PROBE: u32 = 1 << 18;

/// Fixed part of DEVICE_FEATURE, command and reply; the feature's data follows.
#[derive(Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct FeatureMsg {
    /// Largest reply payload taken; in the reply, its size.
    pub argsz: u32,
    /// Feature number and `FEATURE_*` operation.
    pub flags: u32,
}

/// Data of [`Feature::MigDeviceState`] (`struct vfio_device_feature_mig_state`).
#[derive(Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct MigStateMsg {
    /// [`DeviceState`](crate::DeviceState) number.
    pub device_state: u32,
    /// Not used over a socket; -1.
    pub data_fd: i32,
}

/// `VFIO_PRECOPY_INFO_REINIT` in [`PrecopyInfoMsg::flags`].
pub const PRECOPY_INFO_REINIT: u32 = 1;

/// Data of [`Feature::MigPrecopyInfo`] (`struct vfio_precopy_info`).
#[derive(Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct PrecopyInfoMsg {
    /// Size of this structure.
    pub argsz: u32,
    /// [`PRECOPY_INFO_REINIT`].
    pub flags: u32,
    /// Bytes left of what should be moved before the device is stopped.
    pub initial_bytes: u64,
    /// Bytes that changed after they were read.
    pub dirty_bytes: u64,
}

/// Data of [`Feature::DmaLoggingStart`]; [`AreaMsg`]s follow. (The kernel has a pointer instead.)
#[derive(Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct LogStartMsg {
    /// Page size wished; in the reply, chosen.
    pub page_size: u64,
    /// Ranges that follow; 0 for all memory.
    pub num_ranges: u32,
    /// Zero.
    pub reserved: u32,
}

/// Data of [`Feature::DmaLoggingReport`]; in the reply the bitmap follows.
#[derive(Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct LogReportMsg {
    /// First IOVA.
    pub iova: u64,
    /// Bytes.
    pub length: u64,
    /// Bytes one bit stands for.
    pub page_size: u64,
}

/// Fixed part of MIG_DATA_READ and MIG_DATA_WRITE and the reply of the former; data may follow.
#[derive(Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct MigDataMsg {
    /// Largest reply payload taken; in the reply, its size.
    pub argsz: u32,
    /// Data bytes.
    pub size: u32,
}

/// Bytes of a dirty bitmap of `length` bytes in pages of `page_size`, rounded up to whole `u64`s.
///
/// `None` if `page_size` is not a power of two or the size does not fit a `usize`.
pub fn bitmap_bytes(length: u64, page_size: u64) -> Option<usize> {
    if !page_size.is_power_of_two() {
        return None;
    }
    let pages = length.div_ceil(page_size);
    usize::try_from(pages.div_ceil(64)).ok()?.checked_mul(8)
}

/// Splits a payload into its fixed part and the rest.
pub(crate) fn split<T: FromBytes>(payload: &[u8]) -> Option<(T, &[u8])> {
    T::read_from_prefix(payload).ok()
}

/// The `argsz` of something `len` bytes long. Lengths are bounded far below 4 GiB by the limits
/// above; a longer one saturates and is refused by the peer.
pub(crate) fn argsz(len: usize) -> u32 {
    u32::try_from(len).unwrap_or(u32::MAX)
}
