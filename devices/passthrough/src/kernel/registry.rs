//! Who else is to know of the files of VFIO that a VM uses: its hypervisor, for the sake of devices
//! that snoop or not, and of drivers that want to know the VM.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use super::error::KernelError;

/// Takes note of files of VFIO: of groups, and of devices that have a file of their own.
pub trait FileRegistry: Send + Sync {
    /// A file whose devices are about to be opened.
    ///
    /// # Errors
    /// The hypervisor's.
    fn add(&self, file: BorrowedFd<'_>) -> Result<(), Box<dyn std::error::Error + Send + Sync>>;

    /// It is about to be closed.
    fn remove(&self, file: BorrowedFd<'_>);
}

/// A file that is registered for as long as this lives.
pub(crate) struct Registered {
    registry: Arc<dyn FileRegistry>,
    file: Arc<OwnedFd>,
}

impl Registered {
    pub(crate) fn new(
        registry: &Arc<dyn FileRegistry>,
        file: &Arc<OwnedFd>,
    ) -> Result<Self, KernelError> {
        registry.add(file.as_fd()).map_err(KernelError::Registry)?;
        Ok(Self {
            registry: Arc::clone(registry),
            file: Arc::clone(file),
        })
    }

    /// The file.
    pub(crate) fn file(&self) -> &OwnedFd {
        &self.file
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        self.registry.remove(self.file.as_fd());
    }
}
