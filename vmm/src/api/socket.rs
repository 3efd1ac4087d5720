//! The socket of the API, and its file.

use std::io::{self, ErrorKind};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

/// Longest path of a socket, in bytes: `sun_path` without its final zero.
const PATH_BYTES_MAX: usize = 107;

/// The socket that clients connect to; its file goes away with it.
#[derive(Debug)]
pub struct Socket {
    pub(super) listener: UnixListener,
    path: PathBuf,
}

impl Socket {
    /// Creates the socket at `path`.
    ///
    /// # Errors
    ///
    /// There is something at `path`, or nothing can be created there.
    pub fn bind(path: &Path) -> Result<Self, BindError> {
        let cannot = |source: io::Error| {
            let path = path.to_owned();
            match source.kind() {
                ErrorKind::AddrInUse if UnixStream::connect(&path).is_ok() => BindError::Served { path },
                ErrorKind::AddrInUse => BindError::Exists { path },
                _ => BindError::Create { path, source },
            }
        };
        let listener = UnixListener::bind(path).map_err(cannot)?;
        listener.set_nonblocking(true).map_err(cannot)?;
        Ok(Self {
            listener,
            path: path.to_owned(),
        })
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        // A jail may have taken the directory away; then there is nothing to clean up.
        let _nothing_there = std::fs::remove_file(&self.path);
    }
}

/// Why there is no socket.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// Another process listens there.
    #[error(
        "Failed to open the API socket at: {}. Check that it is not already used: a running process serves it; \
         stop that one, or choose another path with --api-sock",
        path.display()
    )]
    Served {
        /// The path.
        path: PathBuf,
    },
    /// Something is left over there.
    #[error(
        "Failed to open the API socket at: {}. Check that it is not already used: nobody serves what is there; \
         remove it, or choose another path with --api-sock",
        path.display()
    )]
    Exists {
        /// The path.
        path: PathBuf,
    },
    /// Nothing can be created there.
    #[error(
        "Failed to open the API socket at: {}. Choose a path of at most {PATH_BYTES_MAX} bytes with --api-sock, \
         in a directory that exists and in which this user may create it",
        path.display()
    )]
    Create {
        /// The path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}
