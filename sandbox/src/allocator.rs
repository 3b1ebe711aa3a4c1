//! Keeping glibc's allocator from opening files when threads are confined already.

use std::io;

/// Makes all threads allocate from one arena.
///
/// An arena more than the first costs a thread dear later: its first one that is given back reads
/// `/proc/sys/vm/overcommit_memory`, and the ninth that is made reads the number of CPUs from
/// `/sys`, in whichever thread that happens to be. With one arena there is neither, and a thread
/// costs less memory. Small blocks come from a cache per thread all the same, and nothing
/// allocates per page or packet.
#[cfg(target_env = "gnu")]
pub(super) fn keep_to_one_arena() -> io::Result<()> {
    // SAFETY: has no preconditions besides its arguments', which mallopt(3) documents.
    match unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) } {
        1 => Ok(()),
        _ => Err(io::Error::other("mallopt refused M_ARENA_MAX")),
    }
}

/// Other C libraries' allocators open no files.
#[cfg(not(target_env = "gnu"))]
pub(super) fn keep_to_one_arena() -> io::Result<()> {
    Ok(())
}
