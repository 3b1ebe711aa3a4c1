//! What a thread says before a forbidden system call ends the process.

use std::cell::Cell;
use std::fmt::{self, Write};
use std::io;
use std::mem::MaybeUninit;
use std::ptr;
use std::sync::OnceLock;

use libc::{c_int, c_void, siginfo_t, ucontext_t};

use super::names;

/// The status the process exits with after a forbidden system call: as a shell shows `SIGSYS`.
pub const FORBIDDEN_CALL_STATUS: i32 = 128 + libc::SIGSYS;

/// `si_code` of a signal sent by a filter (`SYS_SECCOMP` of `asm-generic/siginfo.h`).
const SYS_SECCOMP: c_int = 1;

/// What messages begin with. Set before the handler is installed, which only reads it.
static PROGRAM: OnceLock<&str> = OnceLock::new();

thread_local! {
    /// The kind of this thread. Constant at first and never dropped: safe in a signal handler.
    /// Threads that a library starts have their maker's filter and no kind.
    static KIND: Cell<&'static str> = const { Cell::new("of no kind") };
}

/// `siginfo_t` as `SIGSYS` has it (`asm-generic/siginfo.h`, `_sigsys`, on 64-bit machines).
#[repr(C)]
struct SigsysInfo {
    signal: c_int,
    errno: c_int,
    code: c_int,
    padding: c_int,
    address: *mut c_void,
    call: c_int,
    arch: u32,
}

/// Remembers what this thread is, for the message.
pub(super) fn set_kind(kind: &'static str) {
    KIND.set(kind);
}

/// Makes `SIGSYS` end the process with a message that begins with `program`, in all threads. The
/// first name stays.
pub(super) fn install(program: &'static str) -> io::Result<()> {
    PROGRAM.get_or_init(|| program);
    let mut action = MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: all-zero bytes are a valid `sigaction`: no flags, an empty mask, SIG_DFL.
    let action = unsafe { action.assume_init_mut() };
    let handler: extern "C" fn(c_int, *mut siginfo_t, *mut c_void) = on_sigsys;
    action.sa_sigaction = handler as libc::sighandler_t;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    // SAFETY: `action` is initialised, and the handler has the signature SA_SIGINFO asks for and
    // does only what is safe in a signal handler.
    match unsafe { libc::sigaction(libc::SIGSYS, action, ptr::null_mut()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Lets `SIGSYS` through in this thread: blocked, it would kill without a word.
pub(super) fn unblock() -> io::Result<()> {
    let mut set = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: `sigemptyset` initialises the set before the others use it; the pointers are valid
    // for the calls.
    let status = unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        libc::sigaddset(set.as_mut_ptr(), libc::SIGSYS);
        libc::pthread_sigmask(libc::SIG_UNBLOCK, set.as_ptr(), ptr::null_mut())
    };
    match status {
        0 => Ok(()),
        error => Err(io::Error::from_raw_os_error(error)),
    }
}

/// Text on the stack: nothing in a signal handler may allocate. What does not fit is cut off.
struct Line {
    bytes: [u8; 320],
    len: usize,
}

impl Write for Line {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            let place = self.bytes.get_mut(self.len).ok_or(fmt::Error)?;
            *place = byte;
            self.len = self.len.saturating_add(1);
        }
        Ok(())
    }
}

extern "C" fn on_sigsys(_signal: c_int, info: *mut siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel passes a valid `siginfo_t`, which is larger than `SigsysInfo` and aligned
    // for it; for SIGSYS it has this layout.
    let info = unsafe { &*info.cast::<SigsysInfo>() };
    // SAFETY: with SA_SIGINFO the third argument is a valid `ucontext_t`.
    let context = unsafe { &*context.cast::<ucontext_t>() };
    let mut line = Line {
        bytes: [0; 320],
        len: 0,
    };
    // A message cut short is still a message.
    let _ = describe(&mut line, info, context);
    let text = line.bytes.get(..line.len).unwrap_or_default();
    // SAFETY: `text` is valid for its length. Nobody is left to tell if it cannot be written, and
    // `_exit` runs no destructors and takes no locks.
    unsafe {
        libc::write(libc::STDERR_FILENO, text.as_ptr().cast(), text.len());
        libc::_exit(FORBIDDEN_CALL_STATUS);
    }
}

fn describe(line: &mut Line, info: &SigsysInfo, context: &ucontext_t) -> fmt::Result {
    let mut name = [0u8; 16];
    // SAFETY: PR_GET_NAME writes at most 16 bytes (TASK_COMM_LEN), NUL included.
    unsafe { libc::prctl(libc::PR_GET_NAME, name.as_mut_ptr()) };
    let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
    let name = str::from_utf8(name).unwrap_or("?");
    let kind = KIND.get();
    let program = PROGRAM.get().copied().unwrap_or_default();
    write!(line, "{program}: seccomp: thread '{name}' ({kind}) ")?;
    if info.code != SYS_SECCOMP {
        return writeln!(line, "was ended by SIGSYS from outside");
    }
    let number = info.call;
    let call = names::name(i64::from(number)).unwrap_or("unknown");
    write!(line, "called forbidden system call {number} ({call})")?;
    let argument = |register: c_int| {
        let index = usize::try_from(register).ok()?;
        context.uc_mcontext.gregs.get(index).copied()
    };
    // The second argument tells which ioctl; the others are told apart by the first.
    let (place, register) = match i64::from(number) {
        libc::SYS_ioctl => (1, libc::REG_RSI),
        libc::SYS_mmap | libc::SYS_mprotect => (2, libc::REG_RDX),
        _ => (0, libc::REG_RDI),
    };
    if let Some(value) = argument(register) {
        write!(line, ", argument {place} = {value:#x}")?;
    }
    writeln!(
        line,
        "; report this, and run with --seccomp log until it is fixed"
    )
}
