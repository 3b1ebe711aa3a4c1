//! Where events go.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use rustix::fs::OFlags;
use thiserror::Error;

/// Why a sink cannot be used.
#[derive(Debug, Error)]
pub enum SinkError {
    /// The option's text is neither form.
    #[error("`{0}` names no event sink; write path=FILE or fd=NUMBER")]
    Syntax(String),
    /// The file could not be opened.
    #[error("event sink {path} cannot be opened; check that its directory exists and is writable")]
    Open {
        /// The file.
        path: PathBuf,
        /// The operating system's reason.
        #[source]
        source: io::Error,
    },
    /// A named pipe that nobody reads would block the first event for ever.
    #[error("event sink {path} is a pipe that nobody reads; start its reader first")]
    NoReader {
        /// The pipe.
        path: PathBuf,
    },
}

/// Where events go, as the command line names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Sink {
    /// A file, made or emptied; or a named pipe with a reader.
    Path(PathBuf),
    /// An open descriptor the process inherits.
    Fd(i32),
}

impl FromStr for Sink {
    type Err = SinkError;

    fn from_str(text: &str) -> Result<Self, SinkError> {
        let syntax = || SinkError::Syntax(text.to_owned());
        match text.split_once('=') {
            Some(("path", path)) if !path.is_empty() => Ok(Self::Path(PathBuf::from(path))),
            Some(("fd", number)) => match number.parse() {
                Ok(fd) if fd >= 0 => Ok(Self::Fd(fd)),
                _ => Err(syntax()),
            },
            _ => Err(syntax()),
        }
    }
}

/// Opens `path` for events: an existing pipe must have a reader, a file is made or emptied.
///
/// # Errors
/// [`SinkError::Open`] or [`SinkError::NoReader`].
pub fn open_path(path: &Path) -> Result<File, SinkError> {
    let is_pipe = path.metadata().is_ok_and(|meta| meta.file_type().is_fifo());
    let opened = if is_pipe {
        // Without NONBLOCK the open itself would wait for a reader.
        let nonblock = OFlags::NONBLOCK.bits().cast_signed();
        OpenOptions::new()
            .write(true)
            .custom_flags(nonblock)
            .open(path)
    } else {
        OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .open(path)
    };
    opened.map_err(|source| {
        let path = path.to_owned();
        if is_pipe && source.raw_os_error() == Some(rustix::io::Errno::NXIO.raw_os_error()) {
            SinkError::NoReader { path }
        } else {
            SinkError::Open { path, source }
        }
    })
}
