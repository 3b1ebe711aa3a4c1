//! System-call filters.

mod mode;

pub use mode::{SeccompMode, SeccompModeError};
