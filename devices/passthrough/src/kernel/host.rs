//! How a VM comes by its devices: by their own files and an iommufd, or by their groups and a
//! container.

use std::ffi::OsString;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};

use parking_lot::Mutex;
use rustix::io::Errno;

use super::backend::KernelVfioBackend;
use super::container::{Group, Groups, Named};
use super::error::KernelError;
use super::iommufd::{Attached, Bound, Ioas, Iommufd};
use super::registry::{FileRegistry, Registered};
use super::space::AddressSpace;
use super::sys::Kernel;
use crate::backend::SharedLog;

/// The file by which iommufds are made.
const IOMMUFD: &str = "/dev/iommu";
/// Where devices have files of their own.
const DEVICES: &str = "/dev/vfio/devices";

/// Which of the kernel's interfaces devices are opened by.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Interface {
    /// Files of devices and an iommufd, where both can be opened; else groups.
    #[default]
    Auto,
    /// Files of devices and an iommufd.
    Iommufd,
    /// Groups and containers.
    Group,
}

/// VFIO of this host, as the devices of one VM share it. Cheap to clone.
#[derive(Clone)]
pub struct HostVfio {
    kernel: Arc<dyn Kernel>,
    interface: Interface,
    registry: Arc<dyn FileRegistry>,
    groups: Groups,
    iommufd: Arc<Iommufd>,
    ioas: Arc<Mutex<Weak<Ioas>>>,
}

/// What a device is held by, and let go of in order when this is dropped: detached, unknown to
/// the hypervisor, closed.
pub(crate) enum Hold {
    /// Its group, in a container.
    Group(Arc<Group>),
    /// Its own file, in an I/O address space.
    File(Attached),
}

impl Hold {
    /// The map its DMA goes through.
    pub(crate) fn space(&self) -> &dyn AddressSpace {
        match self {
            Self::Group(group) => &**group.container(),
            Self::File(attached) => &**attached.space(),
        }
    }

    /// The log that it shares with others, if there is one.
    pub(crate) fn log(&self) -> Option<Arc<dyn SharedLog>> {
        match self {
            Self::Group(group) => {
                let container = group.container();
                container.has_log().then(|| Arc::clone(container) as _)
            }
            Self::File(attached) => attached.log().map(|table| Arc::clone(table) as _),
        }
    }

    /// The interface it came by.
    pub(crate) const fn interface(&self) -> Interface {
        match self {
            Self::Group(_) => Interface::Group,
            Self::File(_) => Interface::Iommufd,
        }
    }
}

impl HostVfio {
    /// Opens devices by `interface` and tells `registry` of them. `iommufd` is the process's.
    pub fn new(
        kernel: Arc<dyn Kernel>,
        interface: Interface,
        iommufd: Arc<Iommufd>,
        registry: Arc<dyn FileRegistry>,
    ) -> Self {
        Self {
            groups: Groups::new(Arc::clone(&kernel), Arc::clone(&registry)),
            kernel,
            interface,
            registry,
            iommufd,
            ioas: Arc::default(),
        }
    }

    /// Opens the device whose folder in sysfs is `path` (`/sys/bus/pci/devices/…`), whose driver is
    /// vfio-pci or a variant of it.
    ///
    /// # Errors
    /// [`KernelError`], which says what to do on the host.
    pub fn open(&self, path: &Path) -> Result<KernelVfioBackend, KernelError> {
        match self.interface {
            Interface::Group => self.open_by_group(path),
            Interface::Iommufd => self.open_by_file(self.parts(path)?),
            Interface::Auto => match self.parts(path) {
                Ok(parts) => self.open_by_file(parts),
                Err(error @ (KernelError::NoFile { .. } | KernelError::Open { .. })) => {
                    tracing::debug!(%error, "the device is opened by its group");
                    self.open_by_group(path)
                }
                Err(error) => Err(error),
            },
        }
    }

    /// Takes the device whose own file (`/dev/vfio/devices/…`) somebody else opened, and passed in as
    /// descriptor `number`, of which `file` is a copy. The device is this process's until it ends.
    ///
    /// # Errors
    /// [`KernelError`], which says what to do on the host.
    pub fn adopt(&self, number: i32, file: OwnedFd) -> Result<KernelVfioBackend, KernelError> {
        if self.interface == Interface::Group {
            return Err(KernelError::NeedsIommufd);
        }
        let ioas = self.ioas()?;
        let mut registered = None;
        let bound = self.iommufd.adopted(number, || {
            let device = Arc::new(file);
            registered = Some(Registered::new(&self.registry, &device)?);
            let id = ioas.bind(device.as_fd())?;
            Ok(Bound { device, id })
        })?;
        let registered = match registered {
            Some(registered) => registered,
            None => Registered::new(&self.registry, &bound.device)?,
        };
        self.attach(bound, registered, ioas)
    }

    /// What it takes to open a device by its own file.
    fn parts(&self, path: &Path) -> Result<(OwnedFd, Arc<Ioas>), KernelError> {
        let name = file_of(path)?;
        let device = Path::new(DEVICES).join(name);
        let device = self.open_file(device, "run as a user who may")?;
        Ok((device, self.ioas()?))
    }

    fn open_file(&self, path: PathBuf, remedy: &'static str) -> Result<OwnedFd, KernelError> {
        self.kernel.open(&path).map_err(|cause| KernelError::Open {
            path,
            remedy: match cause {
                Errno::BUSY => "another process has it",
                _ => remedy,
            },
            cause,
        })
    }

    /// The VM's I/O address space.
    fn ioas(&self) -> Result<Arc<Ioas>, KernelError> {
        let mut known = self.ioas.lock();
        if let Some(ioas) = known.upgrade() {
            return Ok(ioas);
        }
        let file = self.iommufd.get(|| {
            self.open_file(
                IOMMUFD.into(),
                "load the iommufd module, and run as a user who may or pass it in \
                 (--platform iommufd_fd=); or use groups (--platform iommufd=off)",
            )
        })?;
        let ioas = Arc::new(Ioas::new(&self.kernel, file)?);
        *known = Arc::downgrade(&ioas);
        Ok(ioas)
    }

    fn open_by_file(
        &self,
        (device, ioas): (OwnedFd, Arc<Ioas>),
    ) -> Result<KernelVfioBackend, KernelError> {
        let device = Arc::new(device);
        let registered = Registered::new(&self.registry, &device)?;
        let id = ioas.bind(device.as_fd())?;
        self.attach(Bound { device, id }, registered, ioas)
    }

    fn attach(
        &self,
        bound: Bound,
        registered: Registered,
        ioas: Arc<Ioas>,
    ) -> Result<KernelVfioBackend, KernelError> {
        let hold = Hold::File(Attached::new(registered, bound.id, ioas)?);
        KernelVfioBackend::new(Arc::clone(&self.kernel), bound.device, hold)
    }

    fn open_by_group(&self, path: &Path) -> Result<KernelVfioBackend, KernelError> {
        let named = Named::at(path)?;
        let group = self.groups.get(named.group)?;
        let device = self
            .kernel
            .group_device(group.fd().as_fd(), &named.name)
            .map_err(KernelError::refused(
                "give the device: is it bound to vfio-pci?",
            ))?;
        let hold = Hold::Group(group);
        KernelVfioBackend::new(Arc::clone(&self.kernel), Arc::new(device), hold)
    }
}

/// The name of the file of the device whose folder in sysfs is `path`.
fn file_of(path: &Path) -> Result<OsString, KernelError> {
    let no_file = |cause| KernelError::NoFile {
        path: path.to_owned(),
        cause,
    };
    let mut names = std::fs::read_dir(path.join("vfio-dev")).map_err(no_file)?;
    let name = names.next().transpose().map_err(no_file)?;
    let name = name.ok_or_else(|| no_file(std::io::ErrorKind::NotFound.into()))?;
    Ok(name.file_name())
}
