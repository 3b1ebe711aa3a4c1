//! Why packets are not steered by a program.

use std::io;

use crate::tap::TapName;

/// Why a steering program cannot be had or used.
#[derive(Debug, thiserror::Error)]
pub enum SteeringError {
    /// This process may not load programs.
    #[error(
        "loading a steering program is not permitted: give Ferry CAP_BPF and CAP_PERFMON (before \
         Linux 5.8 CAP_SYS_ADMIN), or have a privileged program load it and pass its descriptors; \
         CAP_NET_ADMIN does not help, and sysctl kernel.unprivileged_bpf_disabled=0 not either"
    )]
    Forbidden {
        /// What the kernel says.
        #[source]
        source: io::Error,
    },
    /// The kernel has no bpf(2), or none that takes what is used here.
    #[error(
        "this kernel cannot load a steering program: it takes Linux 5.15 or later with \
         CONFIG_BPF_SYSCALL"
    )]
    Unsupported {
        /// What the kernel says.
        #[source]
        source: io::Error,
    },
    /// The kernel's verifier does not let the program in.
    #[error("the kernel refuses the steering program; the end of its verifier's log:\n{log}")]
    Rejected {
        /// The end of the verifier's log.
        log: String,
        /// What the kernel says.
        #[source]
        source: io::Error,
    },
    /// The program could not be put together.
    #[error("the steering program has a jump that goes nowhere: this is a defect of Ferry")]
    Assembly,
    /// A descriptor is not that of a map this version of Ferry made.
    #[error(
        "the descriptor is of no steering map of this version of Ferry: pass those of a \
         program that the same version loaded"
    )]
    NotOurMap {
        /// What the kernel says, if it was the one to notice.
        #[source]
        source: Option<io::Error>,
    },
    /// The map's memory cannot be had.
    #[error("mapping the steering map failed")]
    Mapping {
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The kernel steers the tap by RSS of its own.
    #[error("tap `{tap}`: the kernel steers by RSS already: clear that first")]
    HashLoaded {
        /// Which tap.
        tap: TapName,
        /// What the kernel says.
        #[source]
        source: io::Error,
    },
    /// The tap does not take the program.
    #[error(
        "tap `{tap}` does not take the steering program: it takes Linux 4.16 or later, and the \
         descriptor of a socket filter"
    )]
    Attach {
        /// Which tap.
        tap: TapName,
        /// What the kernel says.
        #[source]
        source: io::Error,
    },
}
