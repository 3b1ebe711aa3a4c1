//! Live migration: dirty tracking, the wire protocol and the engine.
//!
//! This crate knows no device, no KVM and no VMM. It sees guest memory, a list of
//! [`DirtySource`]s that say which pages were written, and lists of [`StateSource`]s and
//! [`StateSink`]s whose state moves; the VMM supplies them.

pub mod addr;
pub mod dirty;
mod error_chain;
pub mod memory;
pub mod migrate;
pub mod saved;
pub mod snapshot;
pub mod source;
pub mod state;
mod sync;
pub mod translate;

pub use ::iova_bitmap::{BitmapError, IovaBitmap};
pub use addr::{Gpa, Iova, IovaRange, PageSize};
pub use dirty::{Collect, GpaRun, GuestDirty, SourceReport, VmmWriteSource};
pub use error_chain::ErrorChain;
pub use memory::{GuestMemory, MemoryHandle, RamRegion, WriteLog, mark_written};
pub use snapshot::{SnapshotSink, SnapshotSource};
pub use source::{Clearing, DeferredClear, DirtyError, DirtySource, Precision, Reported};
pub use state::{Pause, PrecopyRead, SaveRestore, StateError, StateSink, StateSize, StateSource};
#[cfg(ferry_shuttle)]
pub use sync::scheduled::on_fence;
pub use translate::{AfterUnmap, IovaLog, IovaMap, MapHandle, Mapping, Translated};
