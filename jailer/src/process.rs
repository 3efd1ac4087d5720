//! Processes that this one makes: forked while there is one thread, and heard of until they are another program.

#![expect(unsafe_code, reason = "fork and clone have no safe form")]

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::OwnedFd;

use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, getpid};

/// Which of two processes this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fork {
    /// The new one.
    Child,
    /// The old one, with the number of the new one.
    Parent(Pid),
}

/// Namespaces that a process starts in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Namespaces {
    /// A PID namespace, whose first process it is.
    pub(crate) pid: bool,
    /// A user namespace, which owns the PID namespace.
    pub(crate) user: bool,
}

/// Makes a process that goes on from here, as this one does.
///
/// # Errors
///
/// When the kernel refuses.
pub(crate) fn fork(namespaces: Namespaces) -> io::Result<Fork> {
    let flags = [
        (namespaces.pid, libc::CLONE_NEWPID),
        (namespaces.user, libc::CLONE_NEWUSER),
    ];
    let flags: i32 = flags
        .iter()
        .filter(|(is_asked, _)| *is_asked)
        .map(|(_, flag)| flag)
        .sum();
    let made = if flags == 0 {
        // SAFETY: this process has one thread, so the child has all of it.
        i64::from(unsafe { libc::fork() })
    } else {
        let flags = i64::from(flags | libc::SIGCHLD);
        // SAFETY: as with fork; without a stack the child goes on on a copy of this one.
        unsafe { libc::syscall(libc::SYS_clone, flags, 0_i64, 0_i64, 0_i64, 0_i64) }
    };
    match i32::try_from(made).ok().map(Pid::from_raw) {
        Some(Some(pid)) if made > 0 => Ok(Fork::Parent(pid)),
        _ if made == 0 => Ok(Fork::Child),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Whether this process leads a session. One whose session began outside of its PID namespace does not: the kernel calls that
/// session 0, which `rustix::process::getsid` takes for no process.
pub(crate) fn leads_session() -> bool {
    // SAFETY: it only reads a number of this process.
    let session = unsafe { libc::getsid(0) };
    session == getpid().as_raw_nonzero().get()
}

/// Closes every descriptor from 3 on but these.
///
/// # Errors
///
/// When the kernel refuses.
pub(crate) fn close_all_but(kept: &[i32]) -> io::Result<()> {
    let mut kept: Vec<u32> = kept
        .iter()
        .filter_map(|number| u32::try_from(*number).ok())
        .collect();
    kept.sort_unstable();
    let mut first = 3_u32;
    for end in kept.into_iter().chain([u32::MAX]) {
        if end > first {
            let last = if end == u32::MAX { end } else { end - 1 };
            // SAFETY: nothing here owns a descriptor yet; what is closed came from the caller of this program.
            if unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) } < 0 {
                return Err(io::Error::last_os_error());
            }
        }
        first = end.saturating_add(1);
    }
    Ok(())
}

/// The end of a pipe by which a process tells how its start went; it closes when that process becomes another program.
#[derive(Debug)]
pub(crate) struct Teller(File);

/// The other end.
#[derive(Debug)]
pub(crate) struct Hearer(File);

/// What was heard of a start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Heard {
    /// It is another program now; with what was in the way of it, if it said.
    Started {
        /// What it found of the host that it will miss.
        lack: Option<String>,
    },
    /// It could not go on.
    Failed(String),
    /// It ended without a word.
    Silence,
}

const FAILED: u8 = b'!';
const READY: u8 = b'+';
/// Longest that is heard of one start, in bytes.
const HEARD_BYTES_MAX: u64 = 16 << 10;

/// Both ends of a pipe.
///
/// # Errors
///
/// When there are no descriptors left.
pub(crate) fn wire() -> io::Result<(Hearer, Teller)> {
    let (hears, tells): (OwnedFd, OwnedFd) = pipe_with(PipeFlags::CLOEXEC)?;
    Ok((Hearer(hears.into()), Teller(tells.into())))
}

impl Teller {
    /// Says that the next step is to become the program.
    ///
    /// # Errors
    ///
    /// When nobody hears it any more.
    pub(crate) fn ready(&mut self, lack: Option<&str>) -> io::Result<()> {
        let mut said = vec![READY];
        said.extend_from_slice(lack.unwrap_or_default().as_bytes());
        self.0.write_all(&said)
    }

    /// Says why it does not go on. Nobody may hear it.
    pub(crate) fn failed(&mut self, text: &str) {
        let mut said = vec![FAILED];
        said.extend_from_slice(text.as_bytes());
        let _ = self.0.write_all(&said);
    }
}

impl Hearer {
    /// Waits until the other end is closed.
    ///
    /// # Errors
    ///
    /// When the pipe cannot be read.
    pub(crate) fn wait(self) -> io::Result<Heard> {
        let mut said = Vec::new();
        self.0.take(HEARD_BYTES_MAX).read_to_end(&mut said)?;
        Ok(heard(&said))
    }
}

fn heard(said: &[u8]) -> Heard {
    if let Some(at) = said.iter().position(|byte| *byte == FAILED) {
        let text = said.get(at + 1..).unwrap_or_default();
        return Heard::Failed(String::from_utf8_lossy(text).into_owned());
    }
    match said.split_first() {
        Some((&READY, lack)) => Heard::Started {
            lack: (!lack.is_empty()).then(|| String::from_utf8_lossy(lack).into_owned()),
        },
        _ => Heard::Silence,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_said_last_before_a_failure_does_not_hide_it() {
        assert_eq!(heard(b"+"), Heard::Started { lack: None });
        assert_eq!(
            heard(b"+no kvm"),
            Heard::Started {
                lack: Some("no kvm".into())
            }
        );
        assert_eq!(heard(b"+!no such file"), Heard::Failed("no such file".into()));
        assert_eq!(heard(b"!no such file"), Heard::Failed("no such file".into()));
        assert_eq!(heard(b""), Heard::Silence);
    }
}
