//! Type 1 of VFIO: a container whose devices share one map of guest memory, and the groups in it.

use std::ffi::CString;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};

use parking_lot::Mutex;
use rustix::io::Errno;
use vm_migration::{IovaBitmap, PageSize, RamRegion};
use zerocopy::{FromBytes, IntoBytes};

use super::describe::{IommuInfo, ask, decode_iommu, iommu_question};
use super::error::{KernelError, failed};
use super::memory::PinnedRam;
use super::registry::{FileRegistry, Registered};
use super::space::{AddressSpace, Ledger};
use super::sys::{Kernel, LogSpan};
use super::uapi::{
    API_VERSION, DIRTY_PAGES_START, DIRTY_PAGES_STOP, DirtySwitchMsg, GROUP_VIABLE, GroupStatusMsg,
    Message, Number, TYPE1V2_IOMMU, UnmapMsg,
};
use crate::backend::{BackendError, SharedLog};
use crate::rung::DirtyRung;

/// What is in `/dev/vfio`.
const FOLDER: &str = "/dev/vfio";

/// The map of guest memory that devices share.
pub(crate) struct Container {
    kernel: Arc<dyn Kernel>,
    fd: OwnedFd,
    info: IommuInfo,
    mapped: Ledger,
}

impl Container {
    /// A container for `group`, which is in none.
    fn new(kernel: &Arc<dyn Kernel>, group: &OwnedFd) -> Result<Self, KernelError> {
        let path = Path::new(FOLDER).join("vfio");
        let fd = kernel.open(&path).map_err(|cause| KernelError::Open {
            path,
            remedy: "load the vfio and vfio_iommu_type1 modules, and run as a user who may",
            cause,
        })?;
        let number = |request, value| kernel.number(fd.as_fd(), request, value);
        let refused = KernelError::refused("tell its version of VFIO");
        let version = number(Number::ApiVersion, 0).map_err(refused)?;
        let type1 = number(Number::CheckExtension, TYPE1V2_IOMMU).map_err(refused)?;
        if version != API_VERSION || type1 == 0 {
            return Err(KernelError::Version { found: version });
        }
        kernel
            .set_container(group.as_fd(), fd.as_fd())
            .map_err(KernelError::refused(
                "put the device's group into a container",
            ))?;
        number(Number::SetIommu, TYPE1V2_IOMMU)
            .map_err(KernelError::refused("set the device's IOMMU up"))?;
        let what = "describe the IOMMU";
        let answer = ask(
            &**kernel,
            fd.as_fd(),
            Message::IommuInfo,
            &iommu_question(),
            what,
        )?;
        let info = decode_iommu(&answer).map_err(|cause| KernelError::Malformed {
            what: "the IOMMU",
            cause,
        })?;
        Ok(Self {
            kernel: Arc::clone(kernel),
            fd,
            info,
            mapped: Ledger::default(),
        })
    }
}

impl AddressSpace for Container {
    fn ledger(&self) -> &Ledger {
        &self.mapped
    }

    fn reaches(&self, first: u64, last: u64) -> Result<bool, KernelError> {
        Ok(self.info.reaches(first, last))
    }

    fn map_now(&self, memory: &PinnedRam) -> Result<(), Errno> {
        self.kernel.map(self.fd.as_fd(), memory)
    }

    fn unmap_now(&self, ram: RamRegion) -> Result<u64, Errno> {
        let mut message = UnmapMsg {
            argsz: 0,
            flags: 0,
            iova: ram.gpa.0,
            size: ram.len,
        };
        let request = Message::UnmapDma;
        self.kernel
            .message(self.fd.as_fd(), request, message.as_mut_bytes())?;
        Ok(message.size)
    }
}

impl Container {
    /// Switches its bitmaps of dirty pages on or off.
    fn switch_log(&self, flags: u32) -> Result<(), Errno> {
        let mut message = DirtySwitchMsg { argsz: 0, flags };
        let request = Message::DeviceFeature;
        let fd = self.fd.as_fd();
        let switched = self.kernel.message(fd, request, message.as_mut_bytes());
        switched.map(drop)
    }

    /// The page size of its bitmaps: the kernel takes the smallest it has, and no other.
    fn log_page(&self) -> PageSize {
        let sizes = self.info.dirty.map_or(0, |dirty| dirty.page_sizes);
        PageSize::new(sizes & sizes.wrapping_neg()).unwrap_or(PageSize::SIZE_4K)
    }

    /// Whether it has bitmaps.
    pub(crate) fn has_log(&self) -> bool {
        self.info.dirty.is_some()
    }
}

/// Bitmaps of dirty pages, kept by the kernel for all devices of the container.
impl SharedLog for Container {
    fn rung(&self) -> DirtyRung {
        DirtyRung::Container
    }

    fn page_size(&self) -> Result<PageSize, BackendError> {
        Ok(self.log_page())
    }

    fn max_region(&self) -> u64 {
        let bytes = self.info.dirty.map_or(0, |dirty| dirty.max_bytes);
        bytes
            .saturating_mul(8)
            .saturating_mul(self.log_page().bytes())
    }

    fn start(&self) -> Result<(), BackendError> {
        self.switch_log(DIRTY_PAGES_START)
            .map_err(KernelError::refused("start the container's dirty log"))
            .map_err(failed("start the dirty log it shares"))
    }

    fn stop(&self) -> Result<(), BackendError> {
        self.switch_log(DIRTY_PAGES_STOP)
            .map_err(KernelError::refused("stop the container's dirty log"))
            .map_err(failed("stop the dirty log it shares"))
    }

    fn report(&self, bitmap: &mut IovaBitmap) -> Result<(), BackendError> {
        let operation = "report the dirty log it shares";
        let (range, page_size) = (bitmap.range(), bitmap.page_size());
        let span = LogSpan::over(range, page_size).map_err(failed(operation))?;
        // The kernel overwrites, and wants to be asked for whole mappings at once.
        let mut fresh =
            IovaBitmap::over(range, page_size).map_err(|cause| BackendError::Failed {
                operation,
                cause: Box::new(cause),
            })?;
        self.kernel
            .container_report(self.fd.as_fd(), span, fresh.words_mut())
            .map_err(KernelError::refused("report what devices wrote"))
            .map_err(failed(operation))?;
        bitmap.merge(&fresh);
        Ok(())
    }
}

/// An IOMMU group in a container. The hypervisor knows of it until it is closed.
pub(crate) struct Group {
    number: u32,
    file: Registered,
    container: Arc<Container>,
}

impl Group {
    /// The map its devices share with others.
    pub(crate) fn container(&self) -> &Arc<Container> {
        &self.container
    }

    /// Its descriptor.
    pub(crate) fn fd(&self) -> &OwnedFd {
        self.file.file()
    }
}

/// The groups that a VM's devices are in. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Groups {
    kernel: Arc<dyn Kernel>,
    registry: Arc<dyn FileRegistry>,
    open: Arc<Mutex<Vec<Weak<Group>>>>,
}

/// A device as it is named in a group.
pub(crate) struct Named {
    pub(crate) group: u32,
    pub(crate) name: CString,
}

impl Named {
    /// The device whose folder in sysfs is `path`.
    pub(crate) fn at(path: &Path) -> Result<Self, KernelError> {
        let no_group = |cause| KernelError::NoGroup {
            path: path.to_owned(),
            cause,
        };
        let bad = || KernelError::BadName {
            path: path.to_owned(),
        };
        let folder = std::fs::canonicalize(path).map_err(no_group)?;
        let group = std::fs::read_link(folder.join("iommu_group")).map_err(no_group)?;
        let number = |path: &PathBuf| path.file_name()?.to_str()?.parse().ok();
        let name = folder.file_name().and_then(std::ffi::OsStr::to_str);
        Ok(Self {
            group: number(&group).ok_or_else(bad)?,
            name: name
                .and_then(|name| CString::new(name).ok())
                .ok_or_else(bad)?,
        })
    }
}

impl Groups {
    /// No groups yet.
    pub(crate) fn new(kernel: Arc<dyn Kernel>, registry: Arc<dyn FileRegistry>) -> Self {
        Self {
            kernel,
            registry,
            open: Arc::default(),
        }
    }

    /// Group `number`, opened and put into a container unless it is already.
    pub(crate) fn get(&self, number: u32) -> Result<Arc<Group>, KernelError> {
        let mut open = self.open.lock();
        open.retain(|group| group.strong_count() != 0);
        let groups: Vec<_> = open.iter().filter_map(Weak::upgrade).collect();
        if let Some(group) = groups.iter().find(|group| group.number == number) {
            return Ok(Arc::clone(group));
        }
        let fd = self.open_group(number)?;
        // One container for all, so that RAM is mapped and pinned once; a group whose IOMMU is of
        // another kind is refused there and gets its own.
        let shared = groups.iter().find(|group| {
            let container = group.container.fd.as_fd();
            self.kernel.set_container(fd.as_fd(), container).is_ok()
        });
        let container = match shared {
            Some(group) => Arc::clone(&group.container),
            None => Arc::new(Container::new(&self.kernel, &fd)?),
        };
        let group = Arc::new(Group {
            number,
            file: Registered::new(&self.registry, &Arc::new(fd))?,
            container,
        });
        open.push(Arc::downgrade(&group));
        Ok(group)
    }

    fn open_group(&self, number: u32) -> Result<OwnedFd, KernelError> {
        let path = Path::new(FOLDER).join(number.to_string());
        let fd = self.kernel.open(&path).map_err(|cause| KernelError::Open {
            path,
            remedy: match cause {
                Errno::BUSY => "another process has the device's group",
                Errno::NOENT => "bind the device to vfio-pci",
                _ => "run as a user who may",
            },
            cause,
        })?;
        let mut status = [0; size_of::<GroupStatusMsg>()];
        self.kernel
            .message(fd.as_fd(), Message::GroupStatus, &mut status)
            .map_err(KernelError::refused("tell of the device's group"))?;
        let viable = GroupStatusMsg::read_from_bytes(&status)
            .is_ok_and(|status| status.flags & GROUP_VIABLE != 0);
        if !viable {
            return Err(KernelError::NotViable { group: number });
        }
        Ok(fd)
    }
}

#[cfg(test)]
mod tests;
