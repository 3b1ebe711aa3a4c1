//! From a profile to a program for the kernel.

use std::collections::BTreeMap;

use devices::ThreadKind;
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule, TargetArch,
};

use super::names;
use super::profile::{Ioctl, Profile, profile, reachable};
use super::{SeccompError, SeccompMode};

/// What is allowed, by system call: with any arguments, or where one of the rules matches.
#[derive(Default)]
struct Allowed(BTreeMap<i64, Arguments>);

enum Arguments {
    Any,
    Rules(Vec<SeccompRule>),
}

/// The program for threads of `kind`, which start others.
pub(super) fn compile(kind: ThreadKind, mode: SeccompMode) -> Result<BpfProgram, SeccompError> {
    let refused = match mode {
        SeccompMode::Enforce => SeccompAction::Trap,
        SeccompMode::Log => SeccompAction::Log,
        SeccompMode::Off => return Ok(Vec::new()),
    };
    let failed = |source| SeccompError::Compile { kind, source };
    let mut allowed = Allowed::default();
    for kind in reachable(kind) {
        allowed.add_kind(kind)?;
    }
    let rules = allowed.into_rules();
    let arch = TargetArch::x86_64;
    let filter = SeccompFilter::new(rules, refused, SeccompAction::Allow, arch).map_err(failed)?;
    BpfProgram::try_from(filter).map_err(failed)
}

impl Allowed {
    /// Allows what threads of `kind` do themselves.
    fn add_kind(&mut self, kind: ThreadKind) -> Result<(), SeccompError> {
        let profile = profile(kind);
        let failed = |source| SeccompError::Compile { kind, source };
        for name in profile.calls.iter().copied().flatten() {
            self.add_any(number(name)?);
        }
        self.add_ioctls(&profile).map_err(failed)?;
        self.add_bpf(&profile).map_err(failed)?;
        self.add_memory(&profile).map_err(failed)?;
        self.add_prctl(&profile).map_err(failed)
    }

    fn add_any(&mut self, number: i64) {
        self.0.insert(number, Arguments::Any);
    }

    fn add_rule(&mut self, number: i64, condition: SeccompCondition) -> Result<(), BackendError> {
        let rule = SeccompRule::new(vec![condition])?;
        let entry = self.0.entry(number);
        match entry.or_insert_with(|| Arguments::Rules(Vec::new())) {
            Arguments::Any => {}
            // The kinds a thread starts need much the same: compare each argument once.
            Arguments::Rules(rules) if rules.contains(&rule) => {}
            Arguments::Rules(rules) => rules.push(rule),
        }
        Ok(())
    }

    fn add_ioctls(&mut self, profile: &Profile) -> Result<(), BackendError> {
        for ioctl in profile.ioctls.iter().copied().flatten() {
            let (mask, value) = match *ioctl {
                Ioctl::Request(request) => (0xffff, u64::from(request)),
                Ioctl::Type(kind) => (0xff00, u64::from(kind) << 8),
            };
            self.add_rule(libc::SYS_ioctl, argument(1, mask, value)?)?;
        }
        Ok(())
    }

    fn add_bpf(&mut self, profile: &Profile) -> Result<(), BackendError> {
        for command in profile.bpf {
            let condition = argument(0, 0xffff_ffff, u64::from(*command))?;
            self.add_rule(libc::SYS_bpf, condition)?;
        }
        Ok(())
    }

    /// Mappings, which only libraries need executable.
    fn add_memory(&mut self, profile: &Profile) -> Result<(), BackendError> {
        for number in [libc::SYS_mmap, libc::SYS_mprotect] {
            if profile.resolves {
                self.add_any(number);
            } else {
                let executable = u64::from(libc::PROT_EXEC.cast_unsigned());
                self.add_rule(number, argument(2, executable, 0)?)?;
            }
        }
        Ok(())
    }

    /// A thread's own name, for messages; and for those that start threads the name they give,
    /// and what `seccomp` itself needs.
    fn add_prctl(&mut self, profile: &Profile) -> Result<(), BackendError> {
        let mut options = vec![libc::PR_GET_NAME];
        if !profile.starts.is_empty() {
            options.extend([libc::PR_SET_NAME, libc::PR_SET_NO_NEW_PRIVS]);
        }
        if profile.resolves {
            // libcap counts capabilities when it is loaded, and systemd's modules load it.
            options.push(libc::PR_CAPBSET_READ);
        }
        for option in options {
            let value = u64::from(option.cast_unsigned());
            self.add_rule(libc::SYS_prctl, argument(0, 0xffff_ffff, value)?)?;
        }
        Ok(())
    }

    fn into_rules(self) -> BTreeMap<i64, Vec<SeccompRule>> {
        let calls = self.0.into_iter();
        calls
            .map(|(number, arguments)| match arguments {
                Arguments::Any => (number, Vec::new()),
                Arguments::Rules(rules) => (number, rules),
            })
            .collect()
    }
}

/// That the bits `mask` of 32-bit argument `index` are `value`.
fn argument(index: u8, mask: u64, value: u64) -> Result<SeccompCondition, BackendError> {
    let operator = SeccompCmpOp::MaskedEq(mask);
    SeccompCondition::new(index, SeccompCmpArgLen::Dword, operator, value)
}

fn number(name: &'static str) -> Result<i64, SeccompError> {
    names::number(name).ok_or(SeccompError::UnknownCall { name })
}
