//! A guest's driver, the passthrough device of the VMM, and ferry-nic's device, over a real
//! socket: packets, interrupts, dirty log, migration, death.

#[cfg(test)]
mod driver;
#[cfg(test)]
mod machine;
#[cfg(test)]
mod migration;
#[cfg(test)]
mod packets;
