//! CPUs, memory, what is booted, and the entropy source.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use hypervisor::{DirtyLogChoice, DirtyLogMethod};
use serde::{Deserialize, Serialize};

use super::error::ConfigError;
use super::option::{OptionString, format_size, quote};

/// The most vCPUs a VM may have: one byte of APIC id, less the broadcast value, less the I/O APIC's.
pub const MAX_VCPUS: u32 = 254;
/// The longest kernel command line, without its NUL: `COMMAND_LINE_SIZE` of x86 Linux is 2048.
pub const MAX_CMDLINE_BYTES: usize = 2047;
/// The page guest RAM is made of unless huge pages are asked for.
const BASE_PAGE: u64 = 4096;
/// Huge page sizes of x86-64: a PDE's and a PDPTE's.
const HUGE_PAGES: [u64; 2] = [2 << 20, 1 << 30];

/// `--cpus`: how many virtual CPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "CpusWire")]
pub struct CpusConfig {
    /// vCPUs present at boot.
    pub boot_vcpus: u32,
    /// vCPUs there can ever be. Equal to `boot_vcpus` in this version; as many if left out.
    pub max_vcpus: u32,
}

/// [`CpusConfig`] as a client may write it: the maximum may be left out.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct CpusWire {
    boot_vcpus: u32,
    max_vcpus: Option<u32>,
}

impl From<CpusWire> for CpusConfig {
    fn from(wire: CpusWire) -> Self {
        Self {
            boot_vcpus: wire.boot_vcpus,
            max_vcpus: wire.max_vcpus.unwrap_or(wire.boot_vcpus),
        }
    }
}

impl Default for CpusConfig {
    fn default() -> Self {
        Self {
            boot_vcpus: 1,
            max_vcpus: 1,
        }
    }
}

impl FromStr for CpusConfig {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let keys = OptionString::parse("--cpus", &["boot", "max"], text)?;
        let boot_vcpus = keys.number("boot")?.unwrap_or(1);
        Ok(Self {
            boot_vcpus,
            max_vcpus: keys.number("max")?.unwrap_or(boot_vcpus),
        })
    }
}

impl fmt::Display for CpusConfig {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "boot={},max={}", self.boot_vcpus, self.max_vcpus)
    }
}

impl CpusConfig {
    pub(super) fn validate(&self) -> Result<(), ConfigError> {
        let Self {
            boot_vcpus: boot,
            max_vcpus: max,
        } = *self;
        if boot == 0 || boot > MAX_VCPUS {
            return Err(ConfigError::CpuCount {
                boot,
                limit: MAX_VCPUS,
            });
        }
        if max != boot {
            return Err(ConfigError::CpuHotplug { boot, max });
        }
        Ok(())
    }
}

/// `--memory`: how much guest RAM, and of what.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryConfig {
    /// Guest RAM in bytes.
    pub size: u64,
    /// RAM is a memfd that other processes may map (vfio-user and vhost-user devices need this).
    #[serde(default)]
    pub shared: bool,
    /// RAM is made of huge pages.
    #[serde(default)]
    pub hugepages: bool,
    /// Which huge pages, in bytes; the system's default size if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hugepage_size: Option<u64>,
    /// How KVM keeps the log of pages that vCPUs write.
    #[serde(default, skip_serializing_if = "DirtyLogConfig::is_default")]
    pub dirty_log: DirtyLogConfig,
    /// Entries of each vCPU's dirty ring; the hypervisor's default if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dirty_ring_entries: Option<u32>,
}

/// How KVM keeps the log of pages that vCPUs write while a VM migrates.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DirtyLogConfig {
    /// A bitmap that is cleared piece by piece, just before the pages are sent; where KVM cannot,
    /// as [`BitmapAutoClear`](Self::BitmapAutoClear).
    #[default]
    Bitmap,
    /// A bitmap that is cleared whole, each time it is read.
    BitmapAutoClear,
    /// A ring per vCPU.
    Ring,
}

impl DirtyLogConfig {
    /// All there are, and what they are called.
    const NAMES: [(Self, &'static str); 3] = [
        (Self::Bitmap, "bitmap"),
        (Self::BitmapAutoClear, "bitmap-auto-clear"),
        (Self::Ring, "ring"),
    ];

    fn is_default(&self) -> bool {
        *self == Self::default()
    }

    fn from_name(name: &str) -> Option<Self> {
        let mut known = Self::NAMES.into_iter();
        known
            .find(|(_, known)| *known == name)
            .map(|(this, _)| this)
    }
}

impl fmt::Display for DirtyLogConfig {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut known = Self::NAMES.into_iter();
        let name = known.find(|(this, _)| this == self);
        out.write_str(name.map_or("", |(_, name)| name))
    }
}

impl From<DirtyLogMethod> for DirtyLogConfig {
    fn from(method: DirtyLogMethod) -> Self {
        match method {
            DirtyLogMethod::BitmapManualClear { .. } => Self::Bitmap,
            DirtyLogMethod::BitmapAutoClear => Self::BitmapAutoClear,
            DirtyLogMethod::Ring { .. } => Self::Ring,
        }
    }
}

impl Default for MemoryConfig {
    fn default() -> Self {
        Self {
            size: 512 << 20,
            shared: false,
            hugepages: false,
            hugepage_size: None,
            dirty_log: DirtyLogConfig::default(),
            dirty_ring_entries: None,
        }
    }
}

impl FromStr for MemoryConfig {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let allowed = &[
            "size",
            "shared",
            "hugepages",
            "hugepage_size",
            "dirty_log",
            "dirty_ring_entries",
        ];
        let expected = "bitmap, bitmap-auto-clear or ring";
        let keys = OptionString::parse("--memory", allowed, text)?;
        Ok(Self {
            size: keys.size("size")?.unwrap_or(Self::default().size),
            shared: keys.toggle("shared")?.unwrap_or(false),
            hugepages: keys.toggle("hugepages")?.unwrap_or(false),
            hugepage_size: keys.size("hugepage_size")?,
            dirty_log: keys
                .parsed("dirty_log", expected, DirtyLogConfig::from_name)?
                .unwrap_or_default(),
            dirty_ring_entries: keys.number("dirty_ring_entries")?,
        })
    }
}

impl fmt::Display for MemoryConfig {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let word = |on| if on { "on" } else { "off" };
        write!(
            out,
            "size={},shared={},hugepages={}",
            format_size(self.size),
            word(self.shared),
            word(self.hugepages)
        )?;
        if let Some(size) = self.hugepage_size {
            write!(out, ",hugepage_size={}", format_size(size))?;
        }
        write!(out, ",dirty_log={}", self.dirty_log)?;
        match self.dirty_ring_entries {
            Some(entries) => write!(out, ",dirty_ring_entries={entries}"),
            None => Ok(()),
        }
    }
}

impl MemoryConfig {
    /// What the VM is asked for.
    pub fn dirty_log_choice(&self) -> DirtyLogChoice {
        match self.dirty_log {
            DirtyLogConfig::Bitmap => DirtyLogChoice::Bitmap,
            DirtyLogConfig::BitmapAutoClear => DirtyLogChoice::BitmapAutoClear,
            DirtyLogConfig::Ring => DirtyLogChoice::Ring {
                entries: self.dirty_ring_entries,
            },
        }
    }

    /// Refuses device `id` of `option`, which another process serves, with private memory.
    pub(super) fn require_shared(&self, option: &'static str, id: &str) -> Result<(), ConfigError> {
        if self.shared {
            return Ok(());
        }
        let id = id.to_owned();
        Err(ConfigError::PrivateMemory { option, id })
    }

    pub(super) fn validate(&self) -> Result<(), ConfigError> {
        if let Some(size) = self.hugepage_size {
            if !self.hugepages {
                return Err(ConfigError::HugepagesOff);
            }
            if !HUGE_PAGES.contains(&size) {
                return Err(ConfigError::HugepageSize { size });
            }
        }
        if let Some(entries) = self.dirty_ring_entries {
            if self.dirty_log != DirtyLogConfig::Ring {
                return Err(ConfigError::DirtyRingOff);
            }
            if !entries.is_power_of_two() {
                return Err(ConfigError::DirtyRingEntries { entries });
            }
        }
        let page = match (self.hugepages, self.hugepage_size) {
            (true, Some(size)) => size,
            (true, None) => HUGE_PAGES[0],
            (false, _) => BASE_PAGE,
        };
        if self.size == 0 || !self.size.is_multiple_of(page) {
            return Err(ConfigError::MemorySize {
                size: self.size,
                page,
            });
        }
        Ok(())
    }
}

/// `--kernel`, `--initramfs`, `--cmdline`: what the VM boots.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PayloadConfig {
    /// An ELF `vmlinux` with a PVH note, or a `bzImage`. [`VmConfig::validate`] refuses `None`.
    ///
    /// [`VmConfig::validate`]: super::VmConfig::validate
    #[serde(default)]
    pub kernel: Option<PathBuf>,
    /// The initial RAM disk, if any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initramfs: Option<PathBuf>,
    /// The kernel's command line; empty if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cmdline: Option<String>,
}

impl PayloadConfig {
    pub(super) fn validate(&self) -> Result<(), ConfigError> {
        let kernel = self.kernel.as_ref().ok_or(ConfigError::NoKernel)?;
        if kernel.as_os_str().is_empty() {
            return Err(ConfigError::NoKernel);
        }
        if self
            .initramfs
            .as_ref()
            .is_some_and(|path| path.as_os_str().is_empty())
        {
            return Err(ConfigError::EmptyPath {
                option: "--initramfs (payload.initramfs)",
            });
        }
        if let Some(line) = &self.cmdline {
            // A NUL would end the line early in the guest: count it as what it is, too much.
            if line.len() > MAX_CMDLINE_BYTES || line.contains('\0') {
                return Err(ConfigError::Cmdline {
                    len: line.len(),
                    limit: MAX_CMDLINE_BYTES,
                });
            }
        }
        Ok(())
    }
}

/// `--rng`: where the virtio-rng device gets its bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RngConfig {
    /// The file that is read.
    pub src: PathBuf,
}

impl Default for RngConfig {
    fn default() -> Self {
        Self {
            src: PathBuf::from("/dev/urandom"),
        }
    }
}

impl FromStr for RngConfig {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let keys = OptionString::parse("--rng", &["src"], text)?;
        Ok(Self {
            src: PathBuf::from(keys.required("src")?),
        })
    }
}

impl fmt::Display for RngConfig {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "src={}", quote(&self.src.to_string_lossy()))
    }
}

impl RngConfig {
    pub(super) fn validate(&self) -> Result<(), ConfigError> {
        if self.src.as_os_str().is_empty() {
            return Err(ConfigError::EmptyPath {
                option: "--rng (rng.src)",
            });
        }
        Ok(())
    }
}
