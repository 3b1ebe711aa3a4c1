//! The Ferry virtual machine monitor.
//!
//! - [`config`]: what a VM is made of, from JSON or the command line.
//! - [`api`]: what can be asked of the VMM, and the REST server that asks it.

pub mod api;
pub mod cli;
pub mod config;
pub mod inherited;
pub mod metrics;
pub mod seccomp;
