//! Devices of somebody else: of the host, by the kernel's VFIO, and of other processes, by
//! vfio-user.

use std::collections::BTreeMap;
use std::os::fd::BorrowedFd;
use std::path::PathBuf;
use std::sync::Arc;

use hypervisor::Vm;
use passthrough::kernel::{FileRegistry, Interface};
use passthrough::{
    Backend, BackendError, DeviceNews, DirtyRung, HostKernel, HostVfio, KernelVfioBackend,
    Passthrough, VfioUserBackend,
};
use vm_migration::{ErrorChain, StateError};

use super::devices::Board;
use super::{Host, MachineError};
use crate::api::DirtySourceInfo;
use crate::config::{DeviceConfig, DirtyConfig, IommufdConfig, UserDeviceConfig, VmConfig};
use crate::inherited;
use crate::interrupts::Fabric;
use crate::notice::ExitReason;

/// Where a passthrough device is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// On this host: its folder in sysfs, and the kernel's interface it was opened by.
    Host(PathBuf, Interface),
    /// On this host: a descriptor of it that ferry inherited.
    Inherited(i32),
    /// In another process: its server's socket.
    Server(PathBuf),
}

/// A passthrough device on the bus.
pub struct PassthroughFunction {
    /// Identifier.
    pub id: String,
    /// Where it is.
    pub origin: Origin,
    /// The device.
    pub device: Passthrough,
    /// The operator consents that all memory is copied while the guest stands still if nobody can
    /// tell what the device wrote.
    pub all_dirty: bool,
}

impl PassthroughFunction {
    /// Where a migration learns which pages it wrote.
    ///
    /// # Errors
    /// As [`Passthrough::dirty_rung`].
    pub fn rung(&self) -> Result<DirtyRung, StateError> {
        self.device.dirty_rung(self.all_dirty)
    }

    /// What is worth knowing of it besides its configuration.
    pub(super) fn facts(&self) -> BTreeMap<String, String> {
        let (backend, key, place) = match &self.origin {
            Origin::Host(path, Interface::Group) => ("vfio", "path", path.display().to_string()),
            Origin::Host(path, Interface::Iommufd | Interface::Auto) => {
                ("vfio with iommufd", "path", path.display().to_string())
            }
            Origin::Inherited(fd) => ("vfio with iommufd", "fd", fd.to_string()),
            Origin::Server(path) => ("vfio-user", "socket", path.display().to_string()),
        };
        let DirtySourceInfo { source, why, .. } = self.dirty_source();
        BTreeMap::from([
            ("backend".to_owned(), backend.to_owned()),
            (key.to_owned(), place),
            ("dirty_source".to_owned(), source),
            ("dirty_source_why".to_owned(), why),
            ("migration".to_owned(), self.migration()),
        ])
    }

    /// The rung in words, and why it is this one, or why there is none.
    pub fn dirty_source(&self) -> DirtySourceInfo {
        let (source, why) = match self.rung() {
            Ok(rung) => (rung.to_string(), rung.why().to_owned()),
            Err(error) => ("none".to_owned(), ErrorChain(&error).to_string()),
        };
        DirtySourceInfo {
            id: self.id.clone(),
            source,
            why,
        }
    }

    /// What its migration can do, in words.
    fn migration(&self) -> String {
        let Some(flags) = self.device.profile().migration else {
            return "none".to_owned();
        };
        let names: Vec<_> = flags.iter_names().map(|(name, _)| name).collect();
        names.join(" ")
    }
}

/// The passthrough devices of `config`, those of the host before those of servers.
pub(super) fn functions(
    config: &VmConfig,
    vfio: &HostVfio,
    host: &Host,
    board: &Board<'_>,
) -> Result<Vec<PassthroughFunction>, MachineError> {
    let devices = config.devices.iter();
    let of_host = devices.map(|config| host_device(config, vfio, host, board));
    let users = config.user_devices.iter();
    let of_servers = users.map(|config| user_device(config, host, board));
    of_host.chain(of_servers).collect()
}

/// VFIO of this host for the VM that `config` describes.
pub(super) fn host_vfio(
    config: &VmConfig,
    host: &Host,
    board: &Board<'_>,
) -> Result<HostVfio, MachineError> {
    let interface = match config.platform.iommufd {
        IommufdConfig::Auto => Interface::Auto,
        IommufdConfig::On => Interface::Iommufd,
        IommufdConfig::Off => Interface::Group,
    };
    if let Some(number) = config.platform.iommufd_fd {
        let file = inherited::duplicate(number).map_err(|cause| MachineError::Resources {
            what: "the inherited iommufd",
            cause,
        })?;
        host.iommufd.provide(file);
    }
    let registry = Arc::new(VmFiles(Arc::clone(board.vm)));
    let iommufd = Arc::clone(&host.iommufd);
    let kernel = Arc::new(HostKernel);
    Ok(HostVfio::new(kernel, interface, iommufd, registry))
}

/// Tells the hypervisor which files of VFIO a VM uses.
struct VmFiles(Arc<dyn Vm>);

impl FileRegistry for VmFiles {
    fn add(&self, file: BorrowedFd<'_>) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        match self.0.add_vfio_file(file) {
            // Devices work without; those that do not say so themselves.
            Err(error @ hypervisor::Error::Unsupported { .. }) => {
                tracing::warn!(%error, "a device of the host");
                Ok(())
            }
            told => Ok(told?),
        }
    }

    fn remove(&self, file: BorrowedFd<'_>) {
        if let Err(error) = self.0.remove_vfio_file(file) {
            tracing::warn!(error = %ErrorChain(&error), "a file of VFIO stays open");
        }
    }
}

fn open(config: &DeviceConfig, vfio: &HostVfio) -> Result<KernelVfioBackend, MachineError> {
    let id = &config.id;
    let Some(fd) = config.fd else {
        return vfio.open(&config.path).map_err(MachineError::device(id));
    };
    let file = inherited::duplicate(fd).map_err(MachineError::device(id))?;
    vfio.adopt(fd, file).map_err(MachineError::device(id))
}

/// The device of this host that `config` names.
pub(super) fn host_device(
    config: &DeviceConfig,
    vfio: &HostVfio,
    host: &Host,
    board: &Board<'_>,
) -> Result<PassthroughFunction, MachineError> {
    let id = &config.id;
    let mut backend = open(config, vfio)?;
    let (exits, of) = (host.exits.clone(), id.clone());
    let on_news = Box::new(move |news| {
        let id = of.clone();
        exits.send(match news {
            DeviceNews::Failed => ExitReason::DeviceLost {
                id,
                reason: "it reports an error that it cannot correct".to_owned(),
            },
            DeviceNews::Wanted => ExitReason::DeviceWanted { id },
        });
    });
    backend
        .watch(id, &host.spawner, on_news)
        .map_err(MachineError::device(id))?;
    let origin = match config.fd {
        Some(fd) => Origin::Inherited(fd),
        None => Origin::Host(config.path.clone(), backend.interface()),
    };
    let device = device(&config.id, Arc::new(backend), board)?;
    Ok(PassthroughFunction {
        id: config.id.clone(),
        origin,
        device,
        all_dirty: config.dirty == DirtyConfig::All,
    })
}

/// The device of the server that `config` names.
pub(super) fn user_device(
    config: &UserDeviceConfig,
    host: &Host,
    board: &Board<'_>,
) -> Result<PassthroughFunction, MachineError> {
    let id = &config.id;
    let (exits, gone) = (host.exits.clone(), id.clone());
    let on_gone = Box::new(move |error: &BackendError| {
        exits.send(ExitReason::DeviceLost {
            id: gone,
            reason: ErrorChain(error).to_string(),
        });
    });
    let memory = board.ram.handle().clone();
    let backend = VfioUserBackend::connect(&config.socket, memory, &host.spawner, on_gone)
        .map_err(MachineError::device(id))?;
    Ok(PassthroughFunction {
        id: id.clone(),
        origin: Origin::Server(config.socket.clone()),
        device: device(id, Arc::new(backend), board)?,
        all_dirty: false,
    })
}

/// The device behind `backend`, fresh from a reset and with all RAM mapped for it.
fn device(
    id: &str,
    backend: Arc<dyn Backend>,
    board: &Board<'_>,
) -> Result<Passthrough, MachineError> {
    let fabric = Fabric(Arc::clone(board.interrupts));
    let device = Passthrough::new(id, backend, &fabric).map_err(MachineError::device(id))?;
    device.reset().map_err(MachineError::device(id))?;
    if let Err(error) = device.map_memory(&board.ram.memory()) {
        // What others share with it would stay mapped for it.
        if let Err(error) = device.unmap_memory() {
            tracing::warn!(id, error = %ErrorChain(&error), "after its memory was not mapped");
        }
        return Err(MachineError::device(id)(error));
    }
    Ok(device)
}
