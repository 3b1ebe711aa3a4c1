//! Stock Debian guests in real `ferry` processes, inside the lab (`scripts/test-lab`).
//!
//! The lab's host has one emulated CPU: a boot takes ten seconds, so a test looks at all it can in
//! one boot. The programs run one after the other (`--test-threads=1`).

mod boot;
mod hashes;
mod host_devices;
mod hotplug;
mod iommufd;
mod migrate;
mod mixed;
mod mock;
mod net;
mod streams;
mod toeplitz;
