//! Why a host's io_uring cannot be used, and what to do about it.

use std::io;

/// Why this host's io_uring cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Unavailable {
    /// The kernel or a container profile refuses io_uring_setup.
    #[error(
        "io_uring is refused on this host: set `sysctl kernel.io_uring_disabled=0`, or let the container's seccomp \
         profile and security module allow io_uring_setup, io_uring_enter and io_uring_register"
    )]
    Refused(#[source] io::Error),
    /// There is no such system call.
    #[error(
        "this kernel has no io_uring (or a seccomp profile hides it): use Linux 6.1 or later with CONFIG_IO_URING=y"
    )]
    Missing(#[source] io::Error),
    /// The kernel does not know the setup flags.
    #[error(
        "io_uring of this kernel ({release}) lacks IORING_SETUP_SINGLE_ISSUER and IORING_SETUP_DEFER_TASKRUN: \
         use Linux 6.1 or later"
    )]
    TooOld {
        /// What `uname -r` says.
        release: String,
    },
    /// The kernel does not know the operations on sockets.
    #[error("io_uring of this kernel ({release}) lacks operations on sockets: use Linux 6.8 or later")]
    NoSockets {
        /// What `uname -r` says.
        release: String,
    },
    /// A limit of this process is exhausted.
    #[error("no resources for an io_uring: raise the limit of open files (ulimit -n) or of memory")]
    Exhausted(#[source] io::Error),
    /// Something else.
    #[error("io_uring cannot be set up")]
    Other(#[source] io::Error),
}

impl Unavailable {
    pub(super) fn from_setup(error: io::Error) -> Self {
        match error.raw_os_error() {
            Some(libc::EPERM | libc::EACCES) => Self::Refused(error),
            Some(libc::ENOSYS) => Self::Missing(error),
            Some(libc::EINVAL) => Self::TooOld { release: release() },
            Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM) => Self::Exhausted(error),
            _ => Self::Other(error),
        }
    }

    pub(super) fn without_sockets() -> Self {
        Self::NoSockets { release: release() }
    }
}

fn release() -> String {
    rustix::system::uname().release().to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_and_an_old_kernel_are_told_apart_and_each_names_its_remedy() {
        let said = |errno| Unavailable::from_setup(io::Error::from_raw_os_error(errno)).to_string();
        assert!(said(libc::EPERM).contains("kernel.io_uring_disabled=0"));
        assert!(said(libc::ENOSYS).contains("CONFIG_IO_URING=y"));
        assert!(said(libc::EINVAL).contains("use Linux 6.1 or later"));
        assert!(said(libc::EMFILE).contains("ulimit -n"));
    }
}
