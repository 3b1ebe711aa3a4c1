//! Descriptors a supervisor opened and ferry inherits, named by number on the command line.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd, RawFd};

/// A descriptor of ferry's own for what is open as `number`, closed on exec.
///
/// The inherited one stays open: it belongs to whoever named it, who may name it again.
///
/// # Errors
/// `EBADF` if nothing is open as `number`, or the operating system's if there are no descriptors
/// left.
pub fn duplicate(number: RawFd) -> io::Result<OwnedFd> {
    if number < 0 {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: the descriptor is only borrowed for the call below, which checks that it is open, and
    // -1, which must never be borrowed, is excluded above.
    let inherited = unsafe { BorrowedFd::borrow_raw(number) };
    Ok(rustix::io::fcntl_dupfd_cloexec(inherited, 3)?)
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::fd::AsRawFd;

    use super::*;

    #[test]
    fn a_duplicate_is_the_same_open_file_and_a_closed_number_is_refused() {
        let (mut reader, writer) = io::pipe().unwrap();
        let copy = duplicate(writer.as_raw_fd()).unwrap();
        drop(writer);
        std::fs::File::from(copy).write_all(b"x").unwrap();
        let mut byte = [0];
        reader.read_exact(&mut byte).unwrap();
        assert_eq!(&byte, b"x");
        assert_eq!(
            duplicate(1_000_000).unwrap_err().raw_os_error(),
            Some(libc::EBADF)
        );
        assert!(duplicate(-1).is_err());
    }
}
