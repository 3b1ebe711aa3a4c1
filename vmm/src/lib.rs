//! The Ferry virtual machine monitor.
//!
//! - [`config`]: what a VM is made of, from JSON or the command line.
//! - [`api`]: what can be asked of the VMM, and the REST server that asks it.

pub mod acpi;
pub mod api;
pub mod boot;
pub mod cli;
pub mod config;
pub mod control;
pub mod inherited;
pub mod interrupts;
pub mod layout;
pub mod machine;
pub mod memory;
pub mod metrics;
pub mod migrate;
pub mod migration_events;
pub mod notice;
pub mod power;
pub mod signals;
pub mod vcpu;
